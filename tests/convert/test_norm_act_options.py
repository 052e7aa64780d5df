"""convert_norm_act: what is kept, options and errors."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torchvision
from timm.layers import FilterResponseNormTlu2d, GroupNormAct
from torch import Tensor, nn
from torch.testing import assert_close

from tests.convert.hosts import vit
from tests.convert.norm_checks import check, randomise, refused
from zoo.convert import ConversionError, convert_norm_act
from zoo.errors import ComponentArgumentError, UnknownComponentError
from zoo.norms import EvoNorm2d, EvoNorm2dS0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# what is kept


class Modulated(nn.Module):
    """A norm that a condition scales and shifts, as in class-conditional generators."""

    def __init__(self, *, act: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.norm = nn.InstanceNorm2d(8)
        self.scale = nn.Sequential(nn.SiLU(), nn.Linear(4, 16))
        self.act = nn.ReLU() if act else nn.Identity()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.scale(condition)[..., None, None].chunk(2, dim=1)
        h = self.norm(self.stem(x)) * (1 + scale) + shift
        return self.conv(self.act(h))


@pytest.mark.parametrize("act", [True, False])
def test_norms_under_a_condition_are_kept(act):
    model = Modulated(act=act)
    report = convert_norm_act(model)
    assert [row.path for row in report] == ["stem.1"]
    assert [(row.path, row.reason) for row in report.kept] == [("norm", "is scaled or shifted by a condition")]


class Squeeze(nn.Module):
    """Squeeze-and-excitation with a norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.act, self.fc2 = nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 8, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(x.mean((2, 3), keepdim=True))))))


def test_norms_of_gates_vectors_inputs_and_features_are_kept():
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Squeeze(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.LayerNorm(8),
    )
    report = convert_norm_act(model)
    assert [row.path for row in report] == ["2"]
    assert [(row.path, row.reason) for row in report.kept] == [
        ("0", "normalises the input of the model"),
        ("8", "normalises vectors, which are no map to take statistics of"),
        ("10", "normalises over the features of a place, not over a map"),
        ("4.bn", "is part of squeeze-and-excitation"),
    ]


class Attention(nn.Module):
    """Of a denoising U-Net, reduced to what matters here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(2, 8), nn.Conv2d(8, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        return x + q * k * v


def test_norms_that_belong_to_no_convolution_and_no_activation_are_kept():
    mixer = (nn.Conv2d(8, 8, 1), nn.GELU(), nn.BatchNorm2d(8))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.MaxPool2d(2), Attention(), Attention(), *mixer)
    report = convert_norm_act(model)
    assert [(row.path, row.note) for row in report] == [("1", "affine only")]
    assert {row.path: row.reason for row in report.kept} == dict.fromkeys(
        ("7", "3.norm", "4.norm"), "comes after no layer and before no activation"
    )


class Gated(nn.Module):
    """A block of a squeeze-and-excitation ResNet whose gate ends in a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.gate = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y = y * self.gate(y.mean((2, 3)))[..., None, None]
        return (x + y).relu()


def test_gate_of_a_norms_own_output_is_no_condition():
    model = Gated()
    with refused(model, "norm and 0 more"):
        convert_norm_act(model)
    report = convert_norm_act(model, post_act="affine")
    assert [row.note for row in report] == ["affine only, scale starts at 0"]


class Untraceable(nn.Module):
    """Its path depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.open = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.open(self.whole(x)))
        return self.norm(x) if x.sum() > 0 else x


@pytest.mark.parametrize("inside", [False, True])
def test_of_what_cannot_be_traced_the_parts_are(inside):
    model = nn.Sequential(Untraceable(), nn.ReLU()) if inside else Untraceable()
    part = "0." if inside else ""
    report = convert_norm_act(model)
    assert [row.path for row in report] == [f"{part}whole.1"]
    assert [(row.path, row.reason) for row in report.kept] == [
        (f"{part}norm", "is called by no forward that can be traced"),
        (f"{part}open.1", "is followed by what cannot be traced"),
    ]


def test_ours_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), EvoNorm2d(8, "b1"), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    ours = model[1]
    report = convert_norm_act(model)
    assert model[1] is ours
    assert [(row.path, row.reason) for row in report.kept] == [("1", "is of the zoo already")]
    with refused(model, r"2 EvoNorm|1 EvoNorm2d, 1 EvoNorm2dS0"):
        convert_norm_act(model)


# options


def small(norm: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), norm or nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    )


def test_affine_is_that_of_a_new_layer_or_the_hosts():
    for copies in (False, True):
        model = randomise(small())
        old = deepcopy(model.state_dict())
        model[1].weight.requires_grad_(False)
        convert_norm_act(model, keep_affine_init=not copies)
        for path in ("1", "4"):
            layer = model.get_submodule(path)
            assert layer.weight.requires_grad
            assert_close(layer.weight, old[f"{path}.weight"] if copies else torch.ones(8))
            assert_close(layer.bias, old[f"{path}.bias"] if copies else torch.zeros(8))


def test_norm_without_affine_gets_one():
    model = small(nn.InstanceNorm2d(8))
    convert_norm_act(model, keep_affine_init=False)
    assert_close(model[1].weight, torch.ones(8))


def test_activations_stay_without_folding():
    model, x = small(nn.GroupNorm(2, 8)), torch.randn(2, 3, 4, 4)
    report = convert_norm_act(model, fold_act=False)
    assert [(row.old, row.note, row.parameters) for row in report] == [
        ("GroupNorm", "deviation only", 0),
        ("BatchNorm2d", "deviation only", 0),
    ]
    assert isinstance(model[2], nn.ReLU)

    def over_deviation(h: Tensor, groups: int) -> Tensor:
        grouped = h.reshape(2, groups, -1)
        return h / (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt().expand_as(grouped).reshape_as(h)

    assert_close(model(x), over_deviation(model[3](over_deviation(model[0](x), 2).relu()), 8))


def test_held_activation_stays_beside_the_new_layer():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 1), GroupNormAct(8, 2), FilterResponseNormTlu2d(8)),
        torch.randn(2, 3, 4, 4),
    )
    report = convert_norm_act(model, fold_act=False)
    assert [(row.path, row.note) for row in report] == [("1", "deviation only, with its ReLU in a Sequential")]
    assert [row.reason for row in report.kept] == ["holds a TLU that cannot be kept without it"]
    assert list(dict(model[1].named_parameters())) == ["norm.weight", "norm.bias"]
    assert (model[1](model[0](x)) == model[1].norm(model[0](x)).relu()).all()


def test_residual_networks_take_layers_without_activation():
    report = convert_norm_act(torchvision.models.resnet18(), fold_act=False)
    assert len(report) == 20
    assert not any("rewritten" in row.note or "starts" in row.note for row in report)


def test_only_s_layers_can_do_without_activation():
    model = small()
    with refused(model, "fold_act=False needs .* an S layer of EvoNorm, got EvoNorm2dB0"):
        convert_norm_act(model, "evonorm_b0", fold_act=False)


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        ("evonorm_s0", 4),
        ({"name": "evonorm_s0", "groups": 2}, 2),
        ({"name": "evonorm_s1", "group_size": 8}, 1),
        ({"class_path": "zoo.norms.EvoNorm2dS2", "init_args": {"groups": 2}}, 2),
        (partial(EvoNorm2dS0, groups=2), 2),
        (lambda channels, apply_act: EvoNorm2dS0(channels, apply_act=apply_act), 8),
    ],
)
def test_groups_are_the_users_or_the_hosts(target, groups):
    model = small(nn.GroupNorm(4, 8))
    convert_norm_act(model, target)
    assert model[1].groups == groups


def test_new_layers_follow_the_old():
    model = small().to(torch.bfloat16)
    model[1].eval()
    convert_norm_act(model, "evonorm_b0")
    layer = model[1]
    assert not layer.training
    assert model[4].training
    assert layer.weight.dtype == layer.v.dtype == torch.bfloat16
    assert layer.running_var.dtype == torch.float32
    with torch.device("meta"):
        meta = small()
    convert_norm_act(meta)
    assert meta[1].weight.is_meta


def test_layers_for_synchronised_norms_synchronise():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small())
    convert_norm_act(model, "evonorm_b1")
    assert model[1].process_group == "world"
    plain = small()
    convert_norm_act(plain, "evonorm_b1")
    assert plain[1].process_group is None


def test_skip_leaves_paths_and_what_is_below_them():
    model = nn.Sequential(small(), small())
    report = convert_norm_act(model, skip=("1", "0.4"))
    assert [row.path for row in report] == ["0.1"]
    assert [(row.path, row.reason) for row in report.kept] == [(path, "is skipped") for path in ("0.4", "1.1", "1.4")]
    assert isinstance(model[1][2], nn.ReLU)


def test_skipped_ends_make_a_post_activation_network_convertible():
    model = torchvision.models.resnet18(num_classes=3)
    report = convert_norm_act(model, skip=["layer?.?.bn2", "*.downsample"])
    assert (len(report), len(report.kept)) == (9, 11)
    check(model, torch.randn(2, 3, 32, 32), acts=9, affine=0, left=11)


def test_report_prints_as_a_table():
    model = nn.Sequential(small(), nn.LayerNorm(4))
    text = repr(convert_norm_act(model))
    assert text.splitlines() == [
        "Sequential: 2 replaced, 1 kept, parameters 144 -> 152 (+5.56%)",
        "",
        "path  old                 new          parameters  note",
        "0.1   BatchNorm2d + ReLU  EvoNorm2dS0  +8",
        "0.4   BatchNorm2d         EvoNorm2dS0  +0          affine only",
        "",
        "kept  is         because",
        "1     LayerNorm  normalises over the features of a place, not over a map",
    ]


# errors


def test_nothing_to_convert():
    with refused(vit(), "contains: 5 LayerNorm. norm normalises over the features"):
        convert_norm_act(vit())
    model = nn.Sequential(nn.Linear(2, 2))
    with refused(model, "no BatchNorm, .* in this Sequential; of normalisations it contains: none$"):
        convert_norm_act(model)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("evonorm_s9", UnknownComponentError, "no norm is called 'evonorm_s9'. Did you mean"),
        ({"name": "evonorm_s0", "group": 2}, ComponentArgumentError, "has no argument 'group'"),
        ({"name": "evonorm_s0", "apply_act": True}, ComponentArgumentError, "must leave apply_act open"),
        ("conditional_evonorm", ComponentArgumentError, "must take apply_act, .* ConditionalEvoNorm2d does not"),
        (nn.BatchNorm2d, ComponentArgumentError, "must take apply_act, .* BatchNorm2d does not"),
        (EvoNorm2dS0(8), ComponentArgumentError, "must build a new layer for every site"),
        (lambda channels, apply_act: None, ComponentArgumentError, "must build a module"),
        ({"name": "evonorm_s0", "group_size": 3}, ConversionError, "cannot be built for 1: .*group_size must divide"),
    ],
)
def test_targets_that_cannot_be_meant(target, error, message):
    model = small()
    with pytest.raises(error, match=message):
        convert_norm_act(model, target)
    assert [type(part) for part in model] == [type(part) for part in small()]


def test_the_same_layer_for_every_norm_is_refused():
    layer = EvoNorm2dS0(8)
    model = small()
    with pytest.raises(ComponentArgumentError, match="gave the same one again"):
        convert_norm_act(model, lambda channels, apply_act: layer)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_compiled_models_are_refused():
    model = small()
    model.compile()
    with refused(model, "convert the model before .compile"):
        convert_norm_act(model)


def test_options_are_checked():
    with refused(small(), "post_act must be 'raise' or 'affine', got 'keep'"):
        convert_norm_act(small(), post_act="keep")
    with refused(small(), r"skip must fit paths of norms, for example 1; 'stem\.\*' fits none"):
        convert_norm_act(small(), skip="stem.*")


class Shared(nn.Module):
    """One norm in two places."""

    def __init__(self, *, alike: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU()
        self.again = self.norm
        self.last = self.act if alike else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.two(self.act(self.norm(self.one(x))))))


def test_shared_norm_stays_shared_if_its_places_are_alike():
    model = Shared(alike=True)
    report = convert_norm_act(model)
    assert [(row.path, row.note.partition(", ")[2] or row.note) for row in report] == [("norm", "also again")]
    assert model.again is model.norm
    check(model, torch.randn(2, 3, 4, 4), acts=1, affine=0)


def test_shared_norm_of_different_places_is_refused():
    model = Shared(alike=False)
    with refused(model, "norm is called in several places, before an activation and before no activation"):
        convert_norm_act(model)
