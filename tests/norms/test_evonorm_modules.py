"""EvoNorm as modules: parameters, buffers, checkpoints of other implementations, errors, PyTorch's machinery."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import zoo
from scripts.bench._timing import saved_multiple
from tests._numerics import assert_close, max_ratio
from zoo.norms import (
    ConditionalEvoNorm2d,
    EvoNorm,
    EvoNorm1d,
    EvoNorm2d,
    EvoNorm2dB0,
    EvoNorm2dS0,
    EvoNorm3d,
    convert_sync_evonorm,
    fold_into_conv,
)

NAMES = ("B0", "B1", "B2", "S0", "S1", "S2", "S0a", "S1a", "S2a")


def _ours(name: str) -> type[EvoNorm2d]:
    return getattr(zoo, f"EvoNorm2d{name}")


def _theirs(name: str) -> type[nn.Module]:
    import timm.layers

    return getattr(timm.layers, f"EvoNorm2d{name}")


def _noisy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("apply_act", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_timm_layers_exchange_state_and_agree(name: str, apply_act: bool) -> None:
    torch.manual_seed(0)
    eps, options = 1e-3, {"groups": 4} if name.startswith("S") else {"unbiased_running_var": True}
    theirs = _noisy(_theirs(name)(8, apply_act=apply_act, eps=eps, **({"groups": 4} if "groups" in options else {})))
    ours = _ours(name)(8, apply_act=apply_act, eps=eps, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for training in (True, False):
        x = torch.randn(3, 8, 5, 6)
        assert max_ratio(ours.train(training)(x), theirs.train(training)(x)) < 1e-5
    if "running_var" in theirs.state_dict():
        assert_close(ours.running_var, theirs.running_var)


def test_defaults_are_the_papers() -> None:
    layer = EvoNorm2d(64)
    assert (layer.variant, layer.eps, layer.momentum, layer.groups) == ("s0", 1e-5, 0.1, 32)
    assert {name: parameter.unique().tolist() for name, parameter in layer.named_parameters()} == {
        "weight": [1.0],
        "bias": [0.0],
        "v": [1.0],
    }
    assert EvoNorm2dB0(8).eps == 1e-5
    assert {_ours(f"S{i}a")(8).eps for i in range(3)} == {1e-3}


@pytest.mark.parametrize(("channels", "groups"), [(24, 24), (40, 20), (48, 24), (96, 32), (144, 24), (7, 7), (37, 1)])
def test_groups_are_lowered_to_a_divisor(channels: int, groups: int) -> None:
    assert EvoNorm2d(channels).groups == groups


def test_group_size_is_another_spelling() -> None:
    assert EvoNorm2d(24, group_size=4).groups == EvoNorm2dS0(24, group_size=4).groups == 6


@pytest.mark.parametrize("name", ["B0", "S0", "S1"])
def test_without_activation_it_is_affine_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    layer = _noisy(_ours(name)(6, apply_act=False))
    x = torch.randn(2, 6, 3, 3)
    assert layer.v is None
    assert torch.equal(layer(x), x * layer.weight.view(6, 1, 1) + layer.bias.view(6, 1, 1))
    if layer.running_var is not None:
        assert torch.equal(layer.running_var, torch.ones(6))


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 3, groups=3), nn.ConvTranspose2d(3, 6, 2), nn.Conv1d(3, 6, 2)],
    ids=lambda conv: type(conv).__name__,
)
def test_affine_only_layers_fold_into_a_convolution(conv: nn.Module) -> None:
    torch.manual_seed(0)
    conv = copy.deepcopy(conv).double()
    norm = _noisy(EvoNorm(6, "b1", apply_act=False).double())
    x = torch.randn(2, conv.in_channels, *(5,) * (conv.weight.ndim - 2), dtype=torch.float64)
    before = conv.weight.clone()
    assert_close(fold_into_conv(conv, norm)(x), norm(conv(x)))
    assert torch.equal(conv.weight, before)


def test_zero_init() -> None:
    layer = EvoNorm2d(4, "b1", zero_init=True)
    assert torch.equal(layer(torch.randn(2, 4, 3, 3)), torch.zeros(2, 4, 3, 3))
    layer.weight.data.fill_(3)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.zeros(4))


@pytest.mark.parametrize("prefix", ["", "stem.1."])
@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (1, 6, 1), (6,)])
def test_names_and_shapes_of_other_implementations_load(prefix: str, shape: tuple[int, ...]) -> None:
    state = {f"{prefix}{name}": torch.randn(shape) for name in ("gamma", "beta", "v", "running_var")}
    layer = EvoNorm2dB0(6)
    model = nn.ModuleDict({"stem": nn.Sequential(nn.Identity(), layer)}) if prefix else layer
    keys = list(state)
    model.load_state_dict(state)
    assert list(state) == keys
    for ours, theirs in (("weight", "gamma"), ("bias", "beta"), ("v", "v"), ("running_var", "running_var")):
        assert torch.equal(getattr(layer, ours), state[prefix + theirs].reshape(6))


def test_a_checkpoint_of_another_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for v.*\[1, 5, 1, 1\]"):
        EvoNorm2dS0(6).load_state_dict({n: torch.zeros(1, 5, 1, 1) for n in ("gamma", "beta", "v")})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_variance_stays_wide(dtype: torch.dtype) -> None:
    """In bfloat16 it stops at 2 on its way to 4."""
    cast = EvoNorm2dB0(4).to(dtype)
    cast.running_var += 1 / 3
    for layer in (cast, cast.to(dtype), EvoNorm2dB0(4, dtype=dtype)):
        assert layer.weight.dtype is dtype
        assert layer.running_var.dtype is torch.float32
    assert cast.running_var[0] == torch.ones(1) + 1 / 3
    assert EvoNorm2dB0(4).double().running_var.dtype is torch.float64
    layer = EvoNorm2dB0(4, momentum=0.001, dtype=dtype)
    for _ in range(2000):
        layer(torch.tensor([2.0, -2.0], dtype=dtype).expand(4, 4, 1, 2))
    assert layer.running_var[0] == pytest.approx(4 - 3 * 0.999**2000, rel=1e-3)


def test_running_variance_is_no_part_of_the_graph() -> None:
    layer = EvoNorm2dB0(4)
    for _ in range(2):
        layer(torch.randn(2, 4, 3, 3, requires_grad=True)).sum().backward()
        assert not layer.running_var.requires_grad
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(layer))
    average.update_parameters(layer)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).running_var, layer.running_var)


def test_a_frozen_layer_keeps_its_statistics() -> None:
    model = nn.Sequential(EvoNorm2dB0(4), EvoNorm2dB0(4)).train()
    model[0].eval()
    model(torch.randn(2, 4, 3, 3))
    assert torch.equal(model[0].running_var, torch.ones(4))
    assert not torch.equal(model[1].running_var, torch.ones(4))


def test_without_tracking_evaluation_takes_the_batch() -> None:
    torch.manual_seed(0)
    layer = EvoNorm2d(4, "b0", track_running_stats=False)
    x = torch.randn(3, 4, 3, 3)
    assert "running_var" not in layer.state_dict()
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_s_layers_do_the_same_in_training_and_evaluation() -> None:
    layer, x = EvoNorm2dS0(4), torch.randn(1, 4, 3, 3)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_conditional_form_is_the_layer_with_scales_of_each_sample() -> None:
    torch.manual_seed(0)
    for variant in ("s0", "b0"):
        layer = ConditionalEvoNorm2d(6, 3, variant, groups=2)
        x, cond = torch.randn(4, 6, 5, 5), torch.randn(4, 3)
        plain = EvoNorm2d(6, variant, groups=2)
        expected = plain(x) * (1 + layer.gain(cond))[:, :, None, None] + layer.shift(cond)[:, :, None, None]
        assert_close(layer(x, cond), expected)


def test_scale_and_shift_can_come_from_the_caller() -> None:
    layer, x = EvoNorm2d(4, affine=False), torch.randn(2, 4, 3, 3)
    assert torch.equal(layer(x), EvoNorm2d(4)(x))
    assert_close(layer(x, torch.full((2, 4), 2.0), torch.ones(4)), 2 * layer(x) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["S0", "S1", "S2", "B0", "B1", "B2"])
def test_keeps_little_beside_the_input_for_the_backward(name: str, dtype: torch.dtype) -> None:
    layer = _ours(name)(64, dtype=dtype)
    assert saved_multiple(layer, torch.randn(4, 64, 28, 28, dtype=dtype, requires_grad=True)) <= 1.05


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # timm
@pytest.mark.parametrize("name", ["resnetv2_50d_evos", "regnetz_c16_evos"])
def test_timm_models_are_the_same_with_our_layers(name: str) -> None:
    import timm

    theirs = timm.create_model(name, num_classes=3)
    layer = zoo.EvoNorm2dS0a if "regnetz" in name else EvoNorm2dS0
    size = {} if "regnetz" not in name else {"group_size": 16}
    ours = timm.create_model(name, num_classes=3, norm_layer=lambda *args, **kwargs: layer(*args, **kwargs, **size))
    replaced = [module for module in ours.modules() if isinstance(module, layer)]
    assert len(replaced) == sum("EvoNorm" in type(module).__name__ for module in theirs.modules()) > 40
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert max_ratio(ours.eval()(x), theirs.eval()(x)) < 1e-5


def _error(call) -> str:
    with pytest.raises(ValueError, match=r"\w+: ") as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: EvoNorm2d(4)(torch.zeros(2, 4, 3)),
            "EvoNorm2d: expected an input of 4 dimensions, [N, C, ...], got 3, shape (2, 4, 3)",
        ),
        (
            lambda: EvoNorm1d(4)(torch.zeros(2, 4, 3, 3)),
            "EvoNorm1d: expected an input of 2 or 3 dimensions, [N, C, ...], got 4, shape (2, 4, 3, 3)",
        ),
        (
            lambda: EvoNorm3d(4)(torch.zeros(4)),
            "EvoNorm3d: expected an input of 5 dimensions, [N, C, ...], got 1, shape (4,)",
        ),
        (
            lambda: EvoNorm2dB0(4)(torch.zeros(2, 5, 3, 3)),
            "EvoNorm2dB0: expected 4 channels, got 5 in an input of shape (2, 5, 3, 3)",
        ),
        (lambda: EvoNorm2d(24, group_size=5), "EvoNorm2d: group_size must divide num_features 24, got 5"),
        (lambda: EvoNorm2d(24, groups=0), "EvoNorm2d: groups must be at least 1, got 0"),
        (lambda: EvoNorm2d(0), "EvoNorm2d: num_features must be at least 1, got 0"),
        (lambda: EvoNorm2d(4, "s3"), "EvoNorm2d: variant must be one of b0, b1, b2, s0, s1, s2, got 's3'"),
        (lambda: EvoNorm2d(4, eps=-1.0), "EvoNorm2d: eps must not be negative, got -1.0"),
        (lambda: EvoNorm2d(4, momentum=1.5), "EvoNorm2d: momentum must lie in [0, 1], got 1.5"),
        (
            lambda: EvoNorm2d(4, "b0", normalize_when_linear=True),
            "EvoNorm2d: normalize_when_linear belongs to S layers, got variant 'b0'",
        ),
        (
            lambda: EvoNorm2d(4)(torch.zeros(1, 4, 2, 2), torch.ones(4)),
            "EvoNorm2d: expected no weight and bias, as it has its own; build it with affine=False",
        ),
        (
            lambda: EvoNorm2dS0(4, drop_layer=nn.Dropout),
            "EvoNorm2dS0: expected no drop_layer, got <class 'torch.nn.modules.dropout.Dropout'>; put it between "
            "layers of the model",
        ),
        (
            lambda: _ours("S2")(4, act_layer=nn.GELU),
            "EvoNorm2dS2: expected no act_layer, since it holds its activation, got <class "
            "'torch.nn.modules.activation.GELU'>",
        ),
        (
            lambda: ConditionalEvoNorm2d(4, 3)(torch.zeros(2, 4, 2, 2), torch.zeros(3, 3)),
            "ConditionalEvoNorm2d: expected a condition of shape (2, 3), got (3, 3)",
        ),
        (
            lambda: fold_into_conv(nn.Conv2d(3, 6, 1), EvoNorm2dS0(6)),
            "fold_into_conv: expected an affine-only layer, apply_act=False, got EvoNorm2dS0(6, 's0', groups=6, "
            "eps=1e-05)",
        ),
        (
            lambda: fold_into_conv(nn.Conv2d(3, 6, 1), EvoNorm2dS0(8, apply_act=False)),
            "fold_into_conv: expected a layer of the 6 channels of the convolution, got one of 8",
        ),
        (
            lambda: convert_sync_evonorm(nn.Conv2d(1, 1, 1)),
            "convert_sync_evonorm: expected EvoNorm-B layers of the zoo, found none in Conv2d; convert other "
            "implementations with zoo.convert.convert_norm_act first",
        ),
        (
            lambda: zoo.functional.evonorm_s(torch.zeros(2, 6, 3), None, None, None, 4, act="silu"),
            "evonorm_s: groups must divide the 6 channels of x, got 4",
        ),
        (
            lambda: zoo.functional.evonorm_s(torch.zeros(2, 6, 3), None, None, None, 2),
            "evonorm_s: act='swish_v' needs v, the slope of its gate; v belongs to 'swish_v' alone",
        ),
        (
            lambda: zoo.functional.evonorm_s(torch.zeros(2, 6, 3), None, torch.ones(3, 6), None, 2, act="silu"),
            "evonorm_s: weight must have shape (6,) or, one set a sample, (2, 6), got (3, 6)",
        ),
        (
            lambda: zoo.functional.evonorm_b(torch.zeros(2, 6, 3), None, None, None, torch.ones(6).half(), True),
            "evonorm_b: running_var must be float32 or float64, got torch.float16: in 16 bits it stops moving; keep it "
            "with running_var.float()",
        ),
        (
            lambda: zoo.functional.evonorm_b(torch.zeros(2, 6, 3), None, None, None, torch.ones(5), True),
            "evonorm_b: running_var must have shape (6,), one for each channel of x, got (5,)",
        ),
        (
            lambda: zoo.functional.evonorm_b(torch.zeros(2, 6, 3).long(), None, None, None, None, True),
            "evonorm_b: x must be floating point, got torch.int64; cast it first",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, message: str) -> None:
    assert _error(call) == message


def test_groups_of_one_element_warn_once() -> None:
    layer, x = EvoNorm(6, groups=6), torch.randn(2, 6, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zoo.warn.warn_once.cache_clear()
        layer(x)
        layer(x)
        EvoNorm(6, groups=6, eps=1e-3)(x)
        EvoNorm(6, "s2", groups=6)(x)
        EvoNorm(6, groups=3)(x)
    assert len(caught) == 1
    assert "6 groups of 6 channels" in str(caught[0].message)
    assert "eps=1e-3" in str(caught[0].message)


# PyTorch's machinery


def _op_arguments() -> dict[str, tuple]:
    torch.manual_seed(0)
    x, grad = (torch.randn(2, 6, 5) for _ in range(2))
    v, weight, bias, left, centre, batch_pull = (torch.rand(6) + 0.5 for _ in range(6))
    stats, moments, batch = torch.rand(2, 2, 3) + 0.5, torch.rand(2, 2, 6) + 0.5, torch.rand(2, 6) + 0.5
    last = [t.transpose(1, 2).contiguous() for t in (x, grad)]
    return {
        "evonorm_s": (x.requires_grad_(), v.requires_grad_(), weight, bias, 3, 1e-5, False, False, False),
        "evonorm_s_backward": (grad, x, v, weight, stats, 1e-5, False, False, False),
        "evonorm_moments": (last[0], True),
        "evonorm_b_apply": (x.detach(), v.detach(), weight, bias, moments, left, 1e-5, 0, False),
        "evonorm_b_sums": (last[1], last[0], v.detach(), weight, moments, left, 1e-5, 1, True),
        "evonorm_b_grad": (
            *(grad, x.detach(), v.detach(), weight, moments, left, centre),
            *(torch.rand(2, 6), batch_pull, 1e-5, 2, False),
        ),
        "evonorm_b": (x, v, weight, bias, None, 1e-5, 0, False),
        "evonorm_b_backward": (grad, x, v, weight, moments, batch, True, 1e-5, 0, False),
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at .grad
@pytest.mark.parametrize("name", list(_op_arguments()))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.zoo, name).default, _op_arguments()[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["S0", "B0"])
def test_compiles_to_one_graph_that_updates_the_buffer(name: str, training: bool) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    layer = _ours(name)(6).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    for _ in range(2):
        y, expected = compiled(x), twin(x)
        assert_close(y, expected)
        got, wanted = (
            torch.autograd.grad(out, [x, *m.parameters()], torch.ones_like(out))
            for out, m in ((y, layer), (expected, twin))
        )
        for ours, theirs in zip(got, wanted, strict=True):
            assert_close(ours, theirs, loose=4)
    if layer.running_var is not None:
        assert_close(layer.running_var, twin.running_var)
        assert torch.equal(layer.running_var, torch.ones(6)) != training


@pytest.mark.parametrize("name", ["S0", "B0"])
def test_export_holds_only_core_ops(name: str) -> None:
    layer, x = _ours(name)(6).eval(), torch.randn(2, 6, 5, 5)
    program = torch.export.export(layer, (x,))
    assert not any("zoo" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode
def test_vmap_over_models_and_jacobians() -> None:
    torch.manual_seed(0)
    layer, x = EvoNorm2dS0(4).double(), torch.randn(3, 2, 4, 2, 2, dtype=torch.float64)
    assert_close(torch.vmap(layer)(x), torch.stack([layer(part) for part in x]))
    row = x[0, :1].flatten()

    def function(flat: torch.Tensor) -> torch.Tensor:
        return layer(flat.view(1, 4, 2, 2)).flatten()

    forward, reverse = torch.func.jacfwd(function)(row), torch.func.jacrev(function)(row)
    assert_close(forward, reverse)


def test_gradient_penalty_reaches_every_parameter() -> None:
    """R1: the squared gradient of an output for the input, differentiated by the parameters."""
    for name in ("S0", "B0"):
        layer = _noisy(_ours(name)(4).double())
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        for parameter in layer.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().min() > 0
