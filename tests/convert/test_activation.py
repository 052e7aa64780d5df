"""convert_activation on timm, torchvision and plain models, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.convert.hosts import (
    DIM,
    GPT2MLP,
    HIDDEN,
    LlamaMLP,
    Scorer,
    check_round_trips,
    check_trains,
    coefficients,
    stack,
    vit,
)
from zoo import PolyNorm, PolyReLU, ZooError, convert_activation
from zoo.convert import ConversionError, ConversionReport
from zoo.errors import ComponentArgumentError, UnknownComponentError

# hosts


def test_timm_vit():
    model, x = vit(), torch.randn(2, 3, 16, 16)
    before = model.state_dict()
    report = convert_activation(model)
    assert [row.path for row in report] == ["blocks.0.mlp.act", "blocks.1.mlp.act"]
    assert [(row.old, row.new, row.parameters) for row in report] == [("GELU", "PolyNorm", 4)] * 2
    assert all(
        model.state_dict()[name] is not None and model.state_dict()[name].equal(old) for name, old in before.items()
    )
    check_trains(model, x, sites=2)
    check_round_trips(model, vit, x)


def test_timm_model_by_name():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    assert len(convert_activation(model)) == 12
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("layer", [SwiGLU, GluMlp, SwiGLUPacked], ids=["SwiGLU", "GluMlp", "SwiGLUPacked"])
def test_timm_gate_is_kept(layer):
    model, x = vit(mlp_layer=layer), torch.randn(2, 3, 16, 16)
    mlp = model.blocks[0].mlp
    report = convert_activation(model)
    assert model.blocks[0].mlp is mlp
    assert all(row.note == "on the gate" and row.path.endswith("mlp.act") for row in report)
    check_trains(model, x, sites=2)


@pytest.mark.parametrize("layer", [SwiGLU, GluMlp, SwiGLUPacked], ids=["SwiGLU", "GluMlp", "SwiGLUPacked"])
def test_timm_gate_is_dropped(layer):
    make = partial(vit, mlp_layer=layer, scale_mlp_norm=True, proj_drop_rate=0.1)
    model, x = make(), torch.randn(2, 3, 16, 16)
    before = sum(p.numel() for p in model.blocks[0].mlp.parameters())
    report = convert_activation(model, glu="drop")
    mlp = model.blocks[0].mlp
    assert list(dict(mlp.named_children())) == ["fc1", "act", "drop1", "norm", "fc2", "drop2"]
    assert mlp.norm.normalized_shape == (mlp.fc1.out_features,)
    assert mlp.drop1.p == mlp.drop2.p == 0.1
    after = sum(p.numel() for p in mlp.parameters())
    assert abs(after / before - 1) < 0.01
    assert [(row.path, row.parameters) for row in report] == [(f"blocks.{i}.mlp", after - before) for i in (0, 1)]
    assert all("fresh weights" in row.note for row in report)
    check_trains(model, x, sites=2)
    check_round_trips(model, make, x, glu="drop")


@pytest.mark.parametrize("last", [True, False])
def test_packed_spread_is_that_of_the_half_without_gate(last):
    model = nn.Sequential(GluMlp(DIM, 2048, gate_last=last))
    value = model[0].fc1.weight[:1024] if last else model[0].fc1.weight[1024:]
    with torch.no_grad():
        model[0].fc1.weight.zero_()
        value.normal_(std=0.3)
    convert_activation(model, glu="drop")
    assert_close(model[0].fc1.weight.std().item(), 0.3, rtol=0.05, atol=0)


def test_torchvision_vit():
    make = partial(torchvision.models.VisionTransformer, 16, 8, 2, 2, 32, 64, num_classes=3)
    model, x = make(), torch.randn(2, 3, 16, 16)
    nn.init.normal_(model.heads.head.weight)  # zero at the start, and so are all gradients below it
    report = convert_activation(model)
    assert [row.path for row in report] == [f"encoder.layers.encoder_layer_{i}.mlp.1" for i in (0, 1)]
    check_trains(model, x, sites=2)
    check_round_trips(model, make, x)


def test_torchvision_swin():
    model = torchvision.models.SwinTransformer(
        [2, 2], 16, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=3
    )
    report = convert_activation(model)
    assert report.replaced[0].path == "features.1.0.mlp.1"
    check_trains(model, torch.randn(2, 3, 32, 32), sites=2)


def test_resnet_takes_an_elementwise_target():
    model, x = torchvision.models.resnet18(num_classes=3), torch.randn(2, 3, 32, 32)
    with pytest.raises(ConversionError, match=r'relu follows a BatchNorm2d.*"dim": 1'):
        convert_activation(model)
    report = convert_activation(model, "polyrelu")
    assert len(report) == 9  # one a block: BasicBlock calls its relu twice
    assert isinstance(model.layer1[0].relu, PolyReLU)
    check_trains(model, x, sites=9)


@pytest.mark.parametrize("target", [{"name": "polynorm", "dim": 1}, partial(PolyNorm, dim=1), lambda: PolyNorm(dim=1)])
def test_feature_maps_take_polynorm_over_channels(target):
    model = timm.create_model("resnet10t", num_classes=3)
    convert_activation(model, target)
    assert {module.dim for module in coefficients(model)} == {1}
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_default_converts_where_the_dim_fits():
    def mixed() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(2), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 8))

    for target, path, kept in (("polynorm", "4", "1"), ({"name": "polynorm", "dim": 1}, "1", "4")):
        report = convert_activation(mixed(), target)
        assert [row.path for row in report] == [path]
        assert [row.path for row in report.kept] == [kept]
        assert "features lie on dim" in report.kept[0].reason
    assert len(convert_activation(mixed(), "polyrelu")) == 2


def test_a_chosen_site_must_fit_unless_the_dim_is_given():
    def conv() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

    with pytest.raises(ConversionError, match=r'1 follows a Conv2d, whose features .*pass a target with "dim": 1'):
        convert_activation(conv(), match="1")
    for target in ({"class_path": "zoo.PolyNorm", "init_args": {"dim": -1}}, partial(PolyNorm, dim=-1)):
        model = conv()
        convert_activation(model, target, match="1")
        assert model[1].dim == -1


@pytest.mark.parametrize(
    ("before", "fits"),
    [
        (nn.LazyLinear(4), -1),
        (nn.LayerNorm(4), -1),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Dropout()), -1),
        (nn.LazyConv1d(4, 1), 1),
        (nn.GroupNorm(2, 4), 1),
        (timm.layers.LayerNorm2d(4), 1),
        (torchvision.ops.FrozenBatchNorm2d(4), 1),
        (nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm1d(4)), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.BatchNorm1d(4)), -1),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Embedding(4, 4)), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layout_of_what_comes_before(before, fits):
    model = nn.Sequential(before, nn.GELU())
    with pytest.raises(ConversionError, match=f'"dim": {fits}'):
        convert_activation(deepcopy(model), lambda: PolyNorm(dim=-fits))
    assert len(convert_activation(model, lambda: PolyNorm(dim=fits))) == 1


class SmallNet(nn.Module):
    """Calls its one activation after convolutions and linear layers alike."""

    def __init__(self, act: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 4)
        self.act = act


@pytest.mark.parametrize("act", [nn.ReLU(), F.relu], ids=["module", "function"])
def test_default_keeps_what_may_follow_both_kinds_of_layers(act):
    with pytest.raises(ConversionError, match="act may follow convolutions and linear layers alike"):
        convert_activation(SmallNet(act))
    assert len(convert_activation(SmallNet(act), "polyrelu")) == 1
    assert len(convert_activation(SmallNet(act), match="act")) == 1


def test_order_tells_what_an_activation_follows():
    class ConvNeXtBlock(nn.Module):
        """Of the authors and of transformers: both kinds of layers before, but a linear one right before and after."""

        def __init__(self) -> None:
            super().__init__()
            self.dwconv, self.pwconv1 = nn.Conv2d(4, 4, 3), nn.Linear(4, 8)
            self.act = nn.GELU()
            self.pwconv2 = nn.Linear(8, 4)

    class ActivationFirst(nn.Module):
        """Registered before the layers it follows."""

        def __init__(self) -> None:
            super().__init__()
            self.act = nn.GELU()
            self.conv = nn.Conv2d(4, 4, 3)

    assert len(convert_activation(ConvNeXtBlock())) == 1
    assert len(convert_activation(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.GELU()))) == 1
    with pytest.raises(ConversionError, match="act follows a Conv2d"):
        convert_activation(ActivationFirst())


def test_default_keeps_an_activation_without_layer_before_it():
    """The modulation of a DiT block acts on the conditioning vector itself."""
    model = nn.ModuleDict({"modulation": nn.Sequential(nn.SiLU(), nn.Linear(4, 8)), "mlp": GPT2MLP(nn.GELU())})
    report = convert_activation(model)
    assert [row.path for row in report] == ["mlp.act"]
    assert [(row.path, row.reason) for row in report.kept] == [("modulation.0", "has no layer before it in its block")]


@pytest.mark.parametrize(
    "block",
    [
        timm.layers.SEModule(16),
        torchvision.ops.SqueezeExcitation(16, 4),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid()),
    ],
    ids=["timm", "torchvision", "sequential"],
)
def test_default_keeps_squeeze_and_excitation(block):
    with pytest.raises(ConversionError, match="is part of squeeze-and-excitation"):
        convert_activation(nn.Sequential(block), "polyrelu")
    assert len(convert_activation(nn.Sequential(block), "polyrelu", match=nn.ReLU)) == 1


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.Sigmoid()),
        (nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4), nn.Sigmoid()),
        (nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1), nn.Sigmoid()),
        (nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4)),
    ],
    ids=["spatial", "wide", "classifier", "no sigmoid"],
)
def test_other_blocks_are_no_squeeze_and_excitation(layers):
    assert len(convert_activation(nn.Sequential(*layers), "polyrelu")) == 1


def test_timm_norm_that_holds_its_activation():
    model = timm.create_model("resnetv2_18", num_classes=3)
    report = convert_activation(model, "polyrelu")
    assert any(row.path.endswith(".norm1.act") for row in report)
    check_trains(model, torch.randn(2, 3, 32, 32), sites=len(report))


# torch.nn.TransformerEncoder


@pytest.mark.parametrize("act", ["relu", "gelu", F.gelu, nn.GELU()])
def test_encoder_layer_leaves_its_fast_path(act):
    layer = nn.TransformerEncoderLayer(DIM, 2, HIDDEN, activation=act, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, DIM)
    with torch.no_grad():
        old = layer.eval()(x)
        report = convert_activation(layer)
        fast, slow = layer.eval()(x), layer.train()(x)
    assert [row.path for row in report] == ["activation"]
    assert (fast - old).abs().max() > 1e-3
    assert_close(fast, slow)


def test_encoder_layer_leaves_its_fast_path_for_another_stock_activation_too():
    layer = nn.TransformerEncoderLayer(DIM, 2, HIDDEN, activation="gelu", batch_first=True, dropout=0.0)
    convert_activation(layer, nn.SiLU)
    x = torch.randn(2, 5, DIM)
    with torch.no_grad():
        assert_close(layer.eval()(x), layer.train()(x))


def test_encoder_layer_that_is_not_converted_keeps_its_fast_path():
    layer = nn.TransformerEncoderLayer(DIM, 2, HIDDEN, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": GPT2MLP()})
    convert_activation(model, match="head.act")
    assert model["encoder"].use_nested_tensor
    assert model["encoder"].layers[0].activation_relu_or_gelu == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_leaves_nested_tensors():
    layer = nn.TransformerEncoderLayer(DIM, 2, HIDDEN, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, DIM), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    convert_activation(model)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    slow = model.train()(x, src_key_padding_mask=padding)
    assert_close(fast[~padding], slow[~padding])
    assert_close(deepcopy(model)(x), model(x))
    check_trains(model, x, sites=2)


# what is matched


def test_shared_activation_is_split():
    act = nn.GELU()
    model, x = stack(lambda: GPT2MLP(act), 3), torch.randn(4, DIM)
    report = convert_activation(model)
    assert [row.path for row in report] == ["0.act", "1.act", "2.act"]
    check_trains(model, x, sites=3)


def test_shared_activation_within_one_sequential_is_split():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(DIM, DIM), act, nn.Linear(DIM, DIM), act)
    assert len(convert_activation(model)) == 2
    check_trains(model, torch.randn(4, DIM), sites=2)


def test_shared_block_is_converted_once():
    block = GPT2MLP()
    report = convert_activation(nn.Sequential(block, block))
    assert [(row.path, row.note) for row in report] == [("0.act", "also 1.act")]
    assert isinstance(block.act, PolyNorm)


def test_shared_block_is_found_by_any_of_its_paths():
    block = GPT2MLP()
    model = nn.ModuleDict({"encoder": block, "decoder": block, "head": GPT2MLP()})
    for match in ("decoder.*", lambda path, value: path == "decoder.act"):
        report = convert_activation(deepcopy(model), match=match)
        assert [(row.path, row.note) for row in report] == [("encoder.act", "also decoder.act")]


def test_activations_of_the_zoo_are_converted_when_chosen():
    model = nn.Sequential(nn.Linear(4, 4), PolyNorm(), nn.Linear(4, 4), nn.GELU())
    report = convert_activation(model, "polyrelu")
    assert [(row.path, row.reason) for row in report.kept] == [("1", "is of the zoo already")]
    assert [row.path for row in convert_activation(model, "polyrelu", match="*")] == ["1"]
    reordered = convert_activation(model, {"name": "polyrelu", "order": 2}, match=PolyReLU)
    assert [row.parameters for row in reordered] == [-1, -1]


def test_bounding_activations_stay_unless_named():
    model = stack(Scorer)
    report = convert_activation(model)
    assert [(row.path, row.reason) for row in report.kept] == [(f"{i}.gate", "bounds a value") for i in (0, 1)]
    assert [row.path for row in convert_activation(model, match="*.gate")] == ["0.gate", "1.gate"]


@pytest.mark.parametrize(
    ("match", "paths"),
    [
        ("1.*", ["1.act", "1.gate"]),
        ("*.act", ["0.act", "1.act"]),
        (nn.Sigmoid, ["0.gate", "1.gate"]),
        ((nn.Sigmoid, nn.ReLU), ["0.act", "0.gate", "1.act", "1.gate"]),
        (lambda path, module: path.startswith("0.") and isinstance(module, nn.ReLU), ["0.act"]),
    ],
)
def test_match(match, paths):
    model = stack(Scorer)
    report = convert_activation(model, match=match)
    assert [row.path for row in report] == paths
    assert len(report.kept) == 4 - len(paths)
    assert {row.reason for row in report.kept} <= {"not matched"}


def test_own_activation_is_matched_by_type_or_predicate():
    class Snake(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.sin().square()

    def snake(x: Tensor) -> Tensor:
        return x + x.sin().square()

    assert len(convert_activation(nn.Sequential(nn.Linear(4, 4), Snake()), match=Snake)) == 1
    assert len(convert_activation(stack(lambda: GPT2MLP(snake)), match=lambda path, value: value is snake)) == 2


def test_module_with_weights_is_no_activation():
    class GELU(nn.Module):
        """Of diffusers: a projection lies inside."""

        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

    with pytest.raises(ConversionError, match="contains: none"):
        convert_activation(nn.Sequential(GELU()))
    with pytest.raises(ConversionError, match="match selected 0, a GELU with weights of its own"):
        convert_activation(nn.Sequential(GELU()), match=lambda path, module: path == "0")


def test_constructors_held_as_attributes_are_no_functions():
    model = GPT2MLP(nn.GELU())
    model.act_layer, model.make_act = nn.GELU, partial(nn.ReLU, inplace=True)
    assert len(convert_activation(model)) == 1
    assert model.act_layer is nn.GELU


def test_parameters_of_the_old_activation_are_counted():
    model = nn.Sequential(nn.Linear(4, 8), nn.PReLU(8))
    assert convert_activation(model).parameters == 4 - 8


# targets


@pytest.mark.parametrize(
    "target", ["polyrelu", {"name": "polyrelu", "order": 2}, PolyReLU, lambda: PolyReLU(4), "zoo.PolyReLU"]
)
def test_targets(target):
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    convert_activation(model, target)
    assert isinstance(model[1], PolyReLU)


def test_targets_that_build_nothing_new():
    model = stack(GPT2MLP)
    with pytest.raises(ComponentArgumentError, match="got the module PolyNorm"):
        convert_activation(model, PolyNorm())
    shared = PolyNorm()
    with pytest.raises(ComponentArgumentError, match="must build a new module at each call"):
        convert_activation(model, lambda: shared)
    with pytest.raises(ComponentArgumentError, match="must build a new module"):
        convert_activation(model, lambda: None)
    with pytest.raises(ComponentArgumentError, match="cannot be built without arguments"):
        convert_activation(model, F.gelu)
    with pytest.raises(UnknownComponentError, match="Did you mean 'polynorm'"):
        convert_activation(model, "polynom")
    assert not any(isinstance(module.act, nn.Module) for module in model)


def test_a_site_that_is_the_target_already_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.GELU())
    kept = model[1]
    report = convert_activation(model, "torch.nn.SiLU")
    assert [row.path for row in report] == ["3"]
    assert [(row.path, row.reason) for row in report.kept] == [("1", "is the target")]
    assert model[1] is kept
    with pytest.raises(ConversionError, match="contains: 2 SiLU"):
        convert_activation(model, "torch.nn.SiLU")


# surroundings


def test_new_modules_follow_dtype_and_mode():
    model = nn.ModuleList([stack(GPT2MLP, 1).double(), stack(GPT2MLP, 1).half().eval()])
    convert_activation(model)
    assert [module.weight.dtype for module in coefficients(model)] == [torch.float64, torch.float16]
    assert [module.training for module in coefficients(model)] == [True, False]


def test_new_modules_do_not_follow_a_storage_dtype():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.GELU())
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    convert_activation(model)
    assert model[1].weight.dtype == torch.float32


def test_position_embeddings_are_no_experts():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU())
    model.pos_embed = nn.Parameter(torch.zeros(1, 9, 4))
    with pytest.raises(ConversionError, match="1 follows a Conv2d"):
        convert_activation(model)


def test_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(LlamaMLP(), GPT2MLP())
    convert_activation(model, match="0.*", glu="drop")
    convert_activation(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model[0].up_proj.out_features == 96


# errors


def test_nothing_matched():
    model = stack(GPT2MLP)
    convert_activation(model)
    with pytest.raises(ConversionError, match=r"^no GELU, ReLU, SiLU.* in this Sequential; .* contains: 2 PolyNorm$"):
        convert_activation(model)
    with pytest.raises(ValueError, match=r"no activation at 'block\..*'"):
        convert_activation(vit(), match="block.*.act")
    with pytest.raises(ZooError, match=r"no ReLU or SiLU to convert in this VisionTransformer.*: 2 GELU"):
        convert_activation(vit(), match=(nn.ReLU, nn.SiLU))

    def never(path: str, module: object) -> bool:
        return False

    with pytest.raises(ConversionError, match="accepted by 'never'"):
        convert_activation(vit(), match=never)
    with pytest.raises(ConversionError, match="contains: none"):
        convert_activation(nn.Linear(2, 2))


def test_bad_options():
    with pytest.raises(ConversionError, match="glu must be 'keep' or 'drop'"):
        convert_activation(vit(), glu="remove")
    with pytest.raises(ConversionError, match="resize"):
        convert_activation(vit(), resize="width")
    with pytest.raises(ConversionError, match="match must be a glob"):
        convert_activation(vit(), match=3)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_captured_models_are_refused():
    compiled = torch.compile(stack(GPT2MLP))
    with pytest.raises(ConversionError, match=r"convert the model before torch.compile"):
        convert_activation(compiled)
    in_place = stack(GPT2MLP)
    in_place[1].compile()
    with pytest.raises(ConversionError, match="1 is a GPT2MLP and compiled"):
        convert_activation(in_place)
    traced = nn.Sequential(torch.jit.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.randn(1, 2)))
    with pytest.raises(ConversionError, match=r"convert before torch.jit"):
        convert_activation(traced)

    class DistributedDataParallel(nn.Sequential):
        """Stands for torch's, which needs a process group."""

    with pytest.raises(ConversionError, match="before wrapping it in DistributedDataParallel"):
        convert_activation(DistributedDataParallel(nn.ReLU()))

    class FSDPModule:
        """Stands for the mixin by which torch's fully_shard changes a module's class."""

    with pytest.raises(ConversionError, match="0 is a FSDPLinear; convert the model before sharding it"):
        convert_activation(nn.Sequential(type("FSDPLinear", (FSDPModule, nn.Linear), {})(2, 2), nn.ReLU()))


def test_failure_half_way_leaves_the_model_as_it_was():
    model = stack(GPT2MLP, 3)
    built: list[nn.Module] = []

    def build() -> nn.Module:
        if len(built) == 2:
            raise RuntimeError("out of memory")
        built.append(PolyNorm())
        return built[-1]

    before = [vars(module)["act"] for module in model]
    with pytest.raises(RuntimeError, match="out of memory"):
        convert_activation(model, build)
    assert [vars(module)["act"] for module in model] == before
    assert not coefficients(model)


# report


def test_report_prints_every_path():
    report = convert_activation(nn.Sequential(*stack(Scorer), LlamaMLP()))
    assert isinstance(report, ConversionReport)
    text = str(report)
    assert text.splitlines()[0] == "Sequential: 3 replaced, 2 kept, parameters 3,218 -> 3,230 (+0.37%)"
    for line in (
        "0.act     ReLU  PolyNorm  +4",
        "2.act_fn  silu  PolyNorm  +4          on the gate",
        "1.gate  Sigmoid",
    ):
        assert line in text
    assert len({len(row) for row in text.splitlines() if " +4" in row and "gate" not in row}) == 1
    assert report.parameters == 12
    assert "note" not in str(convert_activation(GPT2MLP()))  # a column without content is left out
