"""The modules of PolyCom: arguments, messages, checkpoints, coefficient options, experts, the feed-forward block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests._numerics import assert_close
from tests.activations.polycom_baselines import official_poly_norm, official_poly_relu, oracle_poly_norm
from zoo.activations.polycom import (
    PolyCom,
    PolyFFN,
    PolyNorm,
    PolyNormGLU,
    PolyPReLU,
    PolyReLU,
    PolyReLUNorm,
)
from zoo.functional import poly_com, poly_norm, poly_norm_mul, poly_relu

F64 = torch.float64
x64 = torch.zeros(2, 4, dtype=F64)
w64 = torch.ones(3, dtype=F64)


@pytest.mark.parametrize("cls", [PolyReLU, PolyNorm, PolyPReLU, PolyReLUNorm, PolyCom, PolyNormGLU])
def test_start_values_are_the_papers(cls: type[nn.Module]) -> None:
    for order in (1, 2, 3, 4):
        module = cls(order=order)
        assert torch.equal(module.weight, torch.full((order,), 1 / order))
        assert torch.equal(module.bias, torch.zeros(1))
    assert cls(bias=False).bias is None
    assert torch.equal(cls(init=0.2).weight, torch.full((3,), 0.2))
    assert torch.equal(cls(init=(3, 2, 1)).weight, torch.tensor([3.0, 2.0, 1.0]))
    assert cls().order == 3


def test_prelu_slope_starts_at_a_quarter() -> None:
    assert PolyPReLU().slope.item() == 0.25
    assert PolyPReLU(slope=0.5).slope.item() == 0.5
    assert PolyCom("prelu").slope.item() == 0.25


def test_reset_parameters_returns_to_the_start() -> None:
    module = PolyPReLU(init=(1, 2, 3))
    start = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    module.reset_parameters()
    assert all(torch.equal(value, start[key]) for key, value in module.state_dict().items())


def test_official_checkpoints_load_unchanged() -> None:
    """A layer of the released dense model: same keys, same shapes, same order of coefficients."""
    official = {"weight": torch.tensor([0.45, 0.47, 0.22], dtype=F64), "bias": torch.tensor([0.03], dtype=F64)}
    x = torch.randn(5, 16, dtype=F64)
    for module, formula in ((PolyNorm(dtype=F64), official_poly_norm), (PolyReLU(dtype=F64), official_poly_relu)):
        module.load_state_dict(official, strict=True)
        assert_close(module(x), formula(x, official["weight"], official["bias"]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PolyNorm(0), "polynorm: order must be an integer >= 1, got 0; the paper uses 3"),
        (lambda: PolyReLU(2.0), "polyrelu: order must be an integer >= 1, got 2.0"),
        (lambda: PolyReLU(True), "polyrelu: order must be an integer >= 1, got True"),
        (lambda: PolyNorm(init=(1, 2)), r"polynorm: init must be a number or 3 numbers, .* got 2"),
        (lambda: PolyNorm(norm="l1"), "polynorm: norm must be 'rms' or 'l2', got 'l1'"),
        (lambda: PolyNorm(eps=-1.0), "polynorm: eps must be finite and >= 0, got -1.0"),
        (lambda: PolyNorm(backend="cuda"), "polynorm: backend must be 'auto' or 'eager', got 'cuda'"),
        (lambda: PolyNorm(coeff_map="tanh"), "polynorm: coeff_map must be None, 'sigmoid' or 'abs', got 'tanh'"),
        (lambda: PolyNorm(bias_clamp=0), "polynorm: bias_clamp must be positive or None, got 0"),
        (lambda: PolyNorm(num_groups=0), "polynorm: num_groups must be >= 1 or None, got 0"),
        (lambda: PolyNorm(num_groups=2)(x64), "polynorm: tokens_per_expert is needed with num_groups"),
        (lambda: PolyNorm()(x64, [2]), "polynorm: tokens_per_expert needs a module built with num_groups"),
        (lambda: PolyCom("tanh"), "polycom: rho must be one of relu, .* got 'tanh'"),
        (lambda: PolyCom(kind=3), "polycom: kind must be 1 .* got 3"),
        (lambda: PolyNormGLU(clamp=-1.0), "polynorm_glu: clamp must be positive or None, got -1.0"),
        (lambda: PolyFFN(0), "poly_ffn: dim and hidden must be >= 1, got dim=0"),
        (lambda: PolyFFN(4, drop=1.0), r"poly_ffn: drop must be in \[0, 1\), got 1.0"),
        (lambda: poly_norm(x64.long(), w64), "poly_norm: x must be floating point, got torch.int64; cast it first"),
        (lambda: poly_norm(x64[:, :0], w64), r"poly_norm: x must have at least one element along dim -1, .*\(2, 0\)"),
        (lambda: poly_norm(x64, w64, dim=2), "poly_norm: dim must be an axis of x, which has 2, got 2"),
        (lambda: poly_norm(x64[0, 0], w64), "poly_norm: dim must be an axis of x, which has 0, got -1"),
        (lambda: poly_norm(x64, w64, norm="l1"), "poly_norm: norm must be 'rms' or 'l2', got 'l1'"),
        (lambda: poly_norm(x64, w64[:0]), r"poly_norm: weight must have shape \(order,\) with order >= 1, got \(0,\)"),
        (lambda: poly_norm(x64, w64[None]), "pass tokens_per_expert to use one set a group"),
        (lambda: poly_norm(x64, w64, w64), r"poly_norm: bias must have one element, got shape \(3,\)"),
        (lambda: poly_norm(x64, w64, backend="c"), "poly_norm: backend must be 'auto' or 'eager', got 'c'"),
        (
            lambda: poly_norm(x64, w64[None], tokens_per_expert=[3]),
            "poly_norm: tokens_per_expert must sum to the 2 rows of x, got 3",
        ),
        (
            lambda: poly_norm(x64, w64[None], tokens_per_expert=torch.tensor([[2]])),
            "poly_norm: tokens_per_expert must be a 1-D tensor of integers",
        ),
        (
            lambda: poly_norm(x64, w64[None], tokens_per_expert=[1, 1]),
            r"poly_norm: weight must have shape \(2, order\) with order >= 1, got \(1, 3\)",
        ),
        (lambda: poly_relu(x64, w64[None]), r"poly_relu: weight must have shape \(order,\)"),
        (lambda: poly_norm_mul(x64, x64[:1], w64), "poly_norm_mul: mul must be shaped and typed like x"),
        (lambda: poly_norm_mul(x64, x64.float(), w64), "poly_norm_mul: mul must be shaped and typed like x"),
        (
            lambda: poly_norm_mul(x64, x64, w64, scores=w64),
            r"poly_norm_mul: scores must hold one factor a row, shape \(2,\), got \(3,\)",
        ),
        (lambda: poly_norm_mul(x64, x64, w64, clamp=0), "poly_norm_mul: clamp must be positive or None, got 0"),
        (lambda: poly_com(x64, w64, rho="prelu"), "poly_com: rho='prelu' needs a slope of one element, got None"),
        (lambda: poly_com(x64, w64, rho="gelu"), "poly_com: rho must be relu, .* or a function, got 'gelu'"),
        (lambda: poly_com(x64, w64, kind=0), "poly_com: kind must be 1 .* got 0"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_instance_is_no_activation_spec() -> None:
    with pytest.raises(TypeError, match="poly_ffn: act must be a name, a class or a function"):
        PolyFFN(4, act=nn.ReLU())


@pytest.mark.parametrize("cls", [PolyNorm, PolyNormGLU])
def test_coefficient_options(cls: type[nn.Module]) -> None:
    module = cls(init=(-2.0, 0.5, 1.0), coeff_map="sigmoid", bias_clamp=0.5, out_scale=0.5, dtype=F64)
    with torch.no_grad():
        module.bias.fill_(3)
    weight, bias = module.coefficients()
    assert_close(weight, 0.5 * torch.tensor([-2.0, 0.5, 1.0], dtype=F64).sigmoid())
    assert bias.item() == 0.25
    module.coeff_map = "abs"
    assert_close(module.coefficients()[0], 0.5 * torch.tensor([2.0, 0.5, 1.0], dtype=F64))
    x = torch.randn(3, 8, dtype=F64)
    y = module(x, torch.ones_like(x)) if cls is PolyNormGLU else module(x)
    assert_close(y, oracle_poly_norm(x, *module.coefficients()))


def test_mapped_coefficients_of_half_parameters_are_not_rounded_twice() -> None:
    module = PolyNorm(coeff_map="sigmoid", out_scale=0.3, dtype=torch.bfloat16)
    assert module.coefficients()[0].dtype is torch.float32


def _split_by_expert(x: torch.Tensor, counts: list[int], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    parts = x.reshape(-1, x.shape[-1]).split(counts)
    return torch.cat([oracle_poly_norm(p, w, b) for p, w, b in zip(parts, weight, bias, strict=True)]).view(x.shape)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_each_expert_has_its_own_coefficients(backend: str, as_tensor: bool) -> None:
    module = PolyNorm(num_groups=4, backend=backend, dtype=F64)
    assert module.weight.shape == (4, 3)
    assert module.bias.shape == (4, 1)
    with torch.no_grad():
        module.weight.normal_()
        module.bias.normal_()
    counts, x = [3, 0, 5, 2], torch.randn(2, 5, 8, dtype=F64)
    grad = torch.randn_like(x)
    y = module(x, torch.tensor(counts) if as_tensor else counts)
    expected = _split_by_expert(x, counts, module.weight, module.bias)
    assert_close(y, expected)
    wanted = torch.autograd.grad(expected, list(module.parameters()), grad)
    for actual, gradient in zip(torch.autograd.grad(y, list(module.parameters()), grad), wanted, strict=True):
        assert_close(actual, gradient)
        assert not actual[1].any()  # an expert without tokens


def test_gated_experts_with_scores() -> None:
    module = PolyNormGLU(num_groups=2, clamp=2.0, dtype=F64)
    with torch.no_grad():
        module.weight.normal_()
    gate, up, scores = torch.randn(6, 8, dtype=F64), torch.randn(6, 8, dtype=F64), torch.rand(6, dtype=F64)
    expected = _split_by_expert(gate.clamp(-2, 2), [4, 2], module.weight, module.bias)
    assert_close(module(gate, up, scores, [4, 2]), expected * up.clamp(-2, 2) * scores[:, None])


def test_callable_and_module_rho() -> None:
    x = torch.randn(3, 4)
    assert_close(PolyCom(torch.tanh, order=1, init=1.0)(x), x.tanh())
    module = PolyCom(nn.Hardtanh(), order=1, init=1.0)
    assert_close(module(x), x.clamp(-1, 1))
    assert [name for name, _ in module.named_children()] == ["rho"]


def test_plain_feed_forward() -> None:
    block = PolyFFN(6, dtype=F64)
    x = torch.randn(2, 3, 6, dtype=F64)
    assert [name for name, _ in block.named_children()] == ["up", "act", "down"]
    assert block.hidden == 24
    assert_close(block(x), block.down(block.act(block.up(x))))


def test_gated_feed_forward_is_swiglu_with_silu() -> None:
    block = PolyFFN(96, act="torch.nn.SiLU", gated=True, dtype=F64)
    x = torch.randn(2, 96, dtype=F64)
    assert [name for name, _ in block.named_children()] == ["gate", "up", "act", "down"]
    assert_close(block(x), block.down(nn.functional.silu(block.gate(x)) * block.up(x)))


@pytest.mark.parametrize(("dim", "hidden"), [(96, 256), (768, 2048), (2048, 5464), (8, 24)])
def test_gated_width_keeps_the_number_of_parameters(dim: int, hidden: int) -> None:
    gated = PolyFFN(dim, gated=True, act="torch.nn.SiLU", device="meta")
    plain = PolyFFN(dim, act="torch.nn.ReLU", device="meta")
    assert gated.hidden == hidden
    sizes = [sum(p.numel() for p in block.parameters()) for block in (gated, plain)]
    assert sizes[0] >= sizes[1]
    assert sizes[0] - sizes[1] < 3 * 8 * dim


@pytest.mark.parametrize(
    "act",
    [
        "polyrelu",
        {"name": "polynorm", "order": 2},
        {"class_path": "torch.nn.ELU", "init_args": {"alpha": 0.5}},
        "torch.nn.GELU",
        nn.ReLU,
        lambda: nn.Identity(),
    ],
)
def test_feed_forward_takes_any_activation(act: Any) -> None:
    block = PolyFFN(4, act=act, dtype=torch.bfloat16)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert block(torch.randn(2, 4, dtype=torch.bfloat16)).shape == (2, 4)


def test_every_feed_forward_has_its_own_coefficients() -> None:
    assert PolyFFN(4).act.weight is not PolyFFN(4).act.weight


def test_dropout_acts_in_training_only() -> None:
    block, x = PolyFFN(16, drop=0.5), torch.randn(4, 16)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_repr_shows_what_was_chosen() -> None:
    assert repr(PolyNorm(2)) == "PolyNorm(order=2, eps=1e-06, norm='rms')"
    assert repr(PolyNorm(dim=1, bias=False)) == "PolyNorm(order=3, eps=1e-06, norm='rms', dim=1, bias=False)"
    assert repr(PolyReLU()) == "PolyReLU(order=3)"
    assert repr(PolyNormGLU(clamp=4.0)) == "PolyNormGLU(order=3, eps=1e-06, norm='rms', clamp=4.0)"
    assert repr(PolyCom("silu", 2)) == "PolyCom(rho='silu', kind=2, order=3)"
