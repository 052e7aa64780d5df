"""convert_norm_act on timm, torchvision and plain models, with random weights."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d, FilterResponseNormAct2d, FilterResponseNormTlu2d, GroupNormAct, evo_norm
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.resnet import Bottleneck
from torchvision.ops import SqueezeExcitation

from tests.convert.norm_checks import check, check_round_trips, evonorms, randomise, refused
from zoo.convert import convert_norm_act
from zoo.norms import EvoNorm, EvoNorm1d, EvoNorm2d, EvoNorm2dS0, EvoNorm3d


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# timm


def test_timm_resnetv2():
    model, x = timm.create_model("resnetv2_50", num_classes=3), torch.randn(2, 3, 64, 64)
    before = sum(p.numel() for p in model.parameters())
    report = convert_norm_act(model)
    assert len(report) == 49
    assert not report.kept
    assert {(row.old, row.new, row.note) for row in report} == {("BatchNormAct2d + ReLU", "EvoNorm2dS0", "")}
    after = sum(p.numel() for p in model.parameters())
    assert (report.parameters_before, report.parameters_after) == (before, after)
    assert sum(row.parameters for row in report) == after - before > 0
    check(model, x, acts=49, affine=0)


@pytest.mark.parametrize(
    ("name", "layers", "size"),
    [("resnetv2_50d_evos", 51, 64), ("regnetz_c16_evos", 68, 64)],
    ids=["resnetv2", "regnetz"],
)
def test_timm_evonorm_becomes_ours_and_computes_the_same(name, layers, size):
    model, x = randomise(timm.create_model(name, num_classes=3)), torch.randn(2, 3, size, size)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model.eval()(x), model.train()(x)
        report = convert_norm_act(model)
        after = model.eval()(x), model.train()(x)
    assert len(evonorms(model)) == len(report) == layers
    assert {row.note for row in report} == {"weights kept"}
    assert report.parameters == 0
    assert list(model.state_dict()) == keys
    for old, new in zip(before, after, strict=True):
        assert_close(new, old, rtol=1e-5, atol=1e-5 * old.abs().max().item())


@pytest.mark.parametrize("act", [True, False], ids=["act", "linear"])
@pytest.mark.parametrize("name", ["B0", "B1", "B2", "S0", "S1", "S2", "S0a", "S1a", "S2a"])
def test_every_layer_of_timm_becomes_ours(name, act):
    options = {"momentum": 0.3} if "B" in name else {"groups": 4}
    layer = getattr(evo_norm, f"EvoNorm2d{name}")(8, apply_act=act, eps=0.1, **options)
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), layer)).requires_grad_(False)
    old = deepcopy(model)
    convert_norm_act(model, "evonorm_b1")
    assert type(model[1]).__name__ == f"EvoNorm2d{name}"
    assert isinstance(model[1], EvoNorm2d)
    assert not any(p.requires_grad for p in model.parameters())
    x = torch.randn(2, 3, 3, 3)
    assert_close(model(x), old(x))
    assert_close(model.state_dict(), old.state_dict())  # after the update of the running variance
    assert_close(model.eval()(x), old.eval()(x))


def test_timm_norms_that_hold_an_activation_are_one_with_it():
    conv = partial(nn.Conv2d, 8, 8, 1)
    model = nn.Sequential(
        conv(),
        BatchNormAct2d(8),
        conv(),
        BatchNormAct2d(8, act_layer=nn.SiLU),
        conv(),
        GroupNormAct(8, num_groups=2),
        conv(),
        FilterResponseNormAct2d(8),
        conv(),
        FilterResponseNormTlu2d(8),
        conv(),
        FilterResponseNormTlu2d(8, apply_act=False),
        conv(),
        BatchNormAct2d(8, apply_act=False),
        nn.ReLU(),
        conv(),
        GroupNormAct(8, num_groups=2, apply_act=False),
    )
    report = convert_norm_act(model)
    assert [(row.old, row.note, row.parameters) for row in report] == [
        ("BatchNormAct2d + ReLU", "", 8),
        ("BatchNormAct2d + SiLU", "", 8),
        ("GroupNormAct + ReLU", "", 8),
        ("FilterResponseNormAct2d + ReLU", "", 8),
        ("FilterResponseNormTlu2d + TLU", "", 0),
        ("FilterResponseNormTlu2d", "affine only", 0),
        ("BatchNormAct2d + ReLU", "", 8),
        ("GroupNormAct", "affine only", 0),
    ]
    assert [layer.groups for layer in evonorms(model)] == [8, 8, 2, 8, 8, 8, 8, 2]
    check(model, torch.randn(2, 8, 3, 3), acts=6, affine=2)


def test_timm_norms_with_what_evonorm_lacks_are_kept():
    conv = partial(nn.Conv2d, 8, 8, 1)
    model = nn.Sequential(
        conv(),
        BatchNormAct2d(8, drop_layer=nn.Dropout),
        conv(),
        BatchNormAct2d(8, act_layer=nn.Sigmoid),
        conv(),
        timm.layers.FrozenBatchNormAct2d(8),
        conv(),
        evo_norm.EvoNorm2dS1(8, groups=8, act_layer=nn.ReLU),
        conv(),
        nn.LazyBatchNorm2d(),
        conv(),
        nn.BatchNorm2d(8),
    )
    report = convert_norm_act(model)
    assert [row.path for row in report] == ["11"]
    assert [row.reason for row in report.kept] == [
        "holds a Dropout, which EvoNorm does not",
        "holds a Sigmoid, which EvoNorm does not replace",
        "is frozen",
        "has ReLU where EvoNorm has SiLU",
        "has no shape before the first batch",
    ]


# torchvision


@pytest.mark.parametrize(
    ("name", "acts", "affine"),
    [
        ("mobilenet_v2", 35, 17),  # a projection in each of its 17 blocks
        ("efficientnet_b0", 33, 16),
        ("mobilenet_v3_small", 23, 11),
        ("vgg11_bn", 8, 0),
        ("densenet121", 121, 0),
    ],
)
def test_torchvision(name, acts, affine):
    model, x = getattr(torchvision.models, name)(num_classes=3), torch.randn(2, 3, 64, 64)
    squeezes = [(part, str(part)) for part in model.modules() if isinstance(part, SqueezeExcitation)]
    report = convert_norm_act(model)
    assert (len(report), len(report.kept)) == (acts + affine, 0)
    check(model, x, acts=acts, affine=affine)
    # what the projections end is the block, whose sum with its input meets no activation
    linear = [row.path for row in report if row.note == "affine only"]
    assert len(linear) == affine
    if name == "mobilenet_v2":
        assert linear == ["features.1.conv.2", *(f"features.{i}.conv.3" for i in range(2, 18))]
    if name == "efficientnet_b0":
        assert all(path.endswith(("block.2.1", "block.3.1")) for path in linear)
    assert len(squeezes) == {"efficientnet_b0": 16, "mobilenet_v3_small": 9}.get(name, 0)
    assert all(str(part) == text for part, text in squeezes)


def test_resnet_v1_is_refused():
    model = torchvision.models.resnet50()
    with refused(model, r"layer1\.0\.bn3 and 19 more norms .* pre-activation form .* post_act='affine'"):
        convert_norm_act(model)


class HandMadeBottleneck(nn.Module):
    """What the parts of a converted block must compute."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.block = deepcopy(block)

    def forward(self, x: Tensor) -> Tensor:
        own, identity = self.block._modules, x
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            x = own[conv](x)
            layer = own[norm]
            grouped = x.reshape(len(x), layer.groups, -1)
            deviation = (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt().expand_as(grouped).reshape_as(x)
            weight, bias, v = (p[:, None, None] for p in (layer.weight, layer.bias, layer.v))
            x = x * torch.sigmoid(v * x) / deviation * weight + bias
        x = own["conv3"](x) * own["bn3"].weight[:, None, None] + own["bn3"].bias[:, None, None]
        if own.get("downsample") is not None:
            conv, norm = own["downsample"]
            identity = conv(identity) * norm.weight[:, None, None] + norm.bias[:, None, None]
        return torch.relu(x + identity)


def test_resnet_v1_with_affine_ends():
    make = partial(torchvision.models.resnet50, num_classes=3)
    model, x = make(), torch.randn(2, 3, 32, 32)
    report = convert_norm_act(model, post_act="affine")
    ends = {name: part for name, part in model.named_modules() if name.endswith("bn3")}
    shortcuts = [layer.downsample[1] for layer in (model.layer1[0], model.layer2[0], model.layer3[0], model.layer4[0])]
    assert (len(report), len(ends), len(shortcuts)) == (53, 16, 4)
    assert not any(part.apply_act or part.weight.any() for part in ends.values())
    assert all(not part.apply_act and (part.weight == 1).all() for part in shortcuts)
    notes = {row.path: row.note for row in report}
    assert {notes[path] for path in ends} == {"affine only, scale starts at 0"}
    assert notes["bn1"] == ""
    assert notes["layer1.0.bn2"] == "forward of layer1.0 rewritten"
    assert isinstance(model.relu, nn.Identity)
    # one relu a block stays, after the sum
    assert isinstance(model.layer1[0].relu, nn.ReLU)
    check(model, x, acts=33, affine=20)
    check_round_trips(model, x, make(), post_act="affine")
    randomise(model)
    for block in (model.layer1[0], model.layer1[1]):
        assert isinstance(block, Bottleneck)
        assert type(block).__name__ == "Bottleneck"
        maps = torch.randn(2, block.conv1.in_channels, 6, 6)
        assert_close(block(maps), HandMadeBottleneck(block)(maps))


def test_scales_that_are_zero_in_the_host_stay_zero():
    model = torchvision.models.resnet18(zero_init_residual=True, num_classes=3)
    block = model.layer1[0]
    assert not block.bn2.weight.any()
    report = convert_norm_act(nn.Sequential(nn.Conv2d(3, 64, 1), block.conv2, block.bn2))
    assert report.replaced[0].note == "affine only, scale starts at 0"


def test_timm_resnet_v1_has_an_activation_for_each_norm():
    model, x = timm.create_model("resnet18", num_classes=3), torch.randn(2, 3, 32, 32)
    report = convert_norm_act(model, post_act="affine")
    assert not any("rewritten" in row.note for row in report)
    assert isinstance(model.layer1[0].act1, nn.Identity)
    assert isinstance(model.layer1[0].act2, nn.ReLU)
    check(model, x, acts=9, affine=11)


def test_gates_between_norm_and_addition_are_seen_through():
    model = timm.models.ResNet(
        timm.models.resnet.Bottleneck, [1, 1, 1, 1], block_args={"attn_layer": "se"}, num_classes=3
    )
    with refused(model, r"layer1\.0\.bn3 and 7 more norms"):
        convert_norm_act(model)


# plain models


def test_sequential_of_every_rank():
    for conv, norm, cls in (
        (nn.Conv1d, nn.BatchNorm1d, EvoNorm1d),
        (nn.Conv2d, nn.InstanceNorm2d, EvoNorm2dS0),
        (nn.Conv3d, nn.BatchNorm3d, EvoNorm3d),
        (nn.Conv3d, partial(nn.GroupNorm, 2), EvoNorm3d),
        (nn.Conv1d, nn.SyncBatchNorm, EvoNorm1d),
    ):
        model = nn.Sequential(conv(3, 8, 1), norm(8), nn.LeakyReLU(), conv(8, 8, 1), norm(8))
        report = convert_norm_act(model)
        assert [(row.path, row.note) for row in report] == [("1", ""), ("4", "affine only")]
        assert type(model[1]) is type(model[4]) is cls
        assert isinstance(model[2], nn.Identity)
        check(model, torch.randn(2, 3, *(4,) * (model[0].weight.ndim - 2)), acts=1, affine=1)


def test_norm_whose_rank_nothing_tells_takes_any():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU())
    convert_norm_act(model, {"name": "evonorm_b0", "momentum": 0.3, "eps": 0.1})
    assert type(model[0]) is EvoNorm
    assert (model[0].variant, model[0].momentum, model[0].eps) == ("b0", 0.3, 0.1)


def test_shared_activation_goes_only_where_a_norm_is_before_it():
    act = nn.ReLU()
    conv = partial(nn.Conv2d, 8, 8, 1)
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), act, conv(), act, conv(), nn.BatchNorm2d(8), act)
    convert_norm_act(model)
    assert [type(model[i]) for i in (2, 4, 7)] == [nn.Identity, nn.ReLU, nn.Identity]
    check(model, torch.randn(2, 8, 3, 3), acts=2, affine=0)


def test_parameters_of_an_activation_that_goes_are_counted_once():
    act = nn.PReLU(8)
    conv = partial(nn.Conv2d, 8, 8, 1)
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), act, conv(), nn.BatchNorm2d(8), act)
    report = convert_norm_act(model)
    assert [row.parameters for row in report] == [0, 8]
    assert report.parameters == 8
    kept = nn.Sequential(conv(), nn.BatchNorm2d(8), act, conv(), act)
    assert [row.parameters for row in convert_norm_act(kept)] == [8]


def test_identity_between_norm_and_activation_is_seen_through():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Identity(), nn.ReLU())
    assert convert_norm_act(model).replaced[0].old == "BatchNorm2d + ReLU"


class TwoUsers(nn.Module):
    """An output that an activation and something else take."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x))
        return torch.cat([h, self.act(h)], 1)


def test_norm_with_other_users_becomes_affine():
    model, x = TwoUsers(), torch.randn(2, 3, 4, 4)
    report = convert_norm_act(model)
    assert [row.note for row in report] == ["affine only"]
    h = model.conv(x)
    assert_close(model(x), torch.cat([h, h.relu()], 1))


def test_bounded_activations_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Sigmoid())
    convert_norm_act(model)
    assert not model[1].apply_act
    assert isinstance(model[2], nn.Sigmoid)
