"""Spherical harmonics: the formula and the op against two others, and their derivatives against differences."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from tests.splat.scenes import F64, assert_within, closed_forms
from zoo.splat import sh, spherical_harmonics
from zoo.splat.convex.reference import harmonics

IMPLEMENTATIONS = ("native", "closed_form", "formula")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Within the test `spherical_harmonics` runs on one of the three."""
    with contextlib.ExitStack() as stack:
        if request.param == "closed_form":
            stack.enter_context(closed_forms())
        elif request.param == "formula":
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(sh, "prefers_formula", lambda *_: True)
        yield request.param


def _expected(degree: int, dirs: Tensor, coeffs: Tensor) -> Tensor:
    """By the recursion of the reference, for directions [P, 3] of any length and coefficients [P, S, D]."""
    units = F.normalize(dirs, dim=-1)
    return torch.stack([harmonics(u, degree) @ c[: (degree + 1) ** 2] for u, c in zip(units, coeffs, strict=True)])


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("degree", range(5))
def test_values_and_gradients_are_those_of_the_recursion(degree: int) -> None:
    dirs = torch.randn(7, 3, dtype=F64, requires_grad=True)
    coeffs = torch.randn(7, 25, 3, dtype=F64, requires_grad=True)
    both = []
    for function in (spherical_harmonics, _expected):
        value = function(degree, dirs, coeffs)
        weights = torch.linspace(-1, 1, value.numel(), dtype=F64).reshape(value.shape)
        grads = torch.autograd.grad((value * weights).sum(), (dirs, coeffs), allow_unused=True, materialize_grads=True)
        both.append((value, *grads))
    for found, wanted in zip(*both, strict=True):
        assert_within(found, wanted, 1e-13)
    assert not both[0][2][:, (degree + 1) ** 2 :].any()
    assert bool(both[0][1].any()) is (degree > 0)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("degree", range(5))
def test_values_are_those_of_gsplat(degree: int) -> None:
    peer = pytest.importorskip("gsplat.cuda._torch_impl")
    dirs, coeffs = torch.randn(3, 40, 3, dtype=F64), torch.randn(3, 40, (degree + 1) ** 2, 3, dtype=F64)
    # Its constants have sixteen digits, its polynomials another form.
    wanted = peer._spherical_harmonics(degree, F.normalize(dirs, dim=-1), coeffs)
    assert_within(spherical_harmonics(degree, dirs, coeffs), wanted, 1e-13)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("degree", range(5))
def test_gradients_are_those_of_differences(degree: int) -> None:
    dirs, coeffs = torch.randn(3, 3, dtype=F64), torch.randn(3, 25, 2, dtype=F64)
    assert gradcheck(lambda d, c: spherical_harmonics(degree, d, c), (dirs.requires_grad_(), coeffs.requires_grad_()))


@pytest.mark.parametrize("degree", [0, 3])
@pytest.mark.usefixtures("implementation")
def test_second_derivatives_are_those_of_differences(degree: int) -> None:
    dirs, coeffs = torch.randn(2, 3, dtype=F64), torch.randn(2, 16, 1, dtype=F64)
    given = (dirs.requires_grad_(), coeffs.requires_grad_())
    if degree == 0:  # has none in the direction
        (grad,) = torch.autograd.grad(spherical_harmonics(0, *given).square().sum(), coeffs, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), coeffs)
        assert_close(second[:, 0], torch.full_like(second[:, 0], 2 / (4 * math.pi)))
        return
    assert gradgradcheck(lambda d, c: spherical_harmonics(degree, d, c), given)


@pytest.mark.usefixtures("implementation")
def test_the_length_of_a_direction_does_not_matter() -> None:
    dirs, coeffs = torch.randn(9, 3, dtype=F64, requires_grad=True), torch.randn(9, 25, 3, dtype=F64)
    wanted = spherical_harmonics(4, dirs, coeffs)
    for length in (1e-80, 3.0, 1e80):
        assert_within(spherical_harmonics(4, dirs * length, coeffs), wanted, 1e-13)
    (grad,) = torch.autograd.grad(wanted.square().sum(), dirs)
    assert_close((grad * dirs).sum(-1), torch.zeros(9, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_direction_has_degree_0_alone(dtype: torch.dtype) -> None:
    dirs = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    coeffs = torch.randn(2, 25, 3, dtype=dtype, requires_grad=True)
    value = spherical_harmonics(4, dirs, coeffs)
    assert_close(value, 0.28209479177387814 * coeffs[:, 0])
    value.sum().backward()
    assert not dirs.grad.any()
    assert coeffs.grad.isfinite().all()


@pytest.mark.usefixtures("implementation")
def test_masks_hide_values_and_gradients() -> None:
    dirs, coeffs = torch.randn(4, 5, 3, dtype=F64), torch.randn(4, 5, 9, 3, dtype=F64)
    masks = torch.rand(4, 5) > 0.5
    dirs[~masks] = math.nan
    coeffs[~masks] = math.nan
    dirs.requires_grad_()
    coeffs.requires_grad_()
    value = spherical_harmonics(2, dirs, coeffs, masks)
    assert not value[~masks].any()
    assert_close(value[masks], spherical_harmonics(2, dirs[masks], coeffs[masks]))
    value.sum().backward()
    for t in (dirs, coeffs):
        assert not t.grad[~masks].any()
        assert t.grad[masks].isfinite().all()
        assert t.grad[masks].any()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("sets", [1, 2])
def test_cameras_share_coefficients(sets: int) -> None:
    images = 2 * sets
    dirs = torch.randn(images, 6, 3, dtype=F64, requires_grad=True)
    coeffs = torch.randn(sets, 6, 16, 3, dtype=F64, requires_grad=True)
    visible = torch.rand(images, 6) > 0.3
    value = sh.sh_of_views(dirs, coeffs, visible, 3)
    own = spherical_harmonics(3, dirs, coeffs.repeat_interleave(2, 0), visible)
    assert_within(value, own, 1e-15)
    weights = torch.randn_like(value)
    found = torch.autograd.grad((value * weights).sum(), (dirs, coeffs), retain_graph=True)
    wanted = torch.autograd.grad((own * weights).sum(), (dirs, coeffs))
    for a, b in zip(found, wanted, strict=True):
        assert_within(a, b, 1e-13)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
@pytest.mark.parametrize("channels", [1, 5])
def test_axes_and_channels(leading: tuple[int, ...], channels: int) -> None:
    dirs = torch.randn(*leading, 3, requires_grad=True)
    coeffs = torch.randn(*leading, 4, channels, requires_grad=True)
    value = spherical_harmonics(1, dirs, coeffs)
    assert value.shape == (*leading, channels)
    assert value.dtype is torch.float32
    if value.numel():
        wanted = _expected(1, dirs.reshape(-1, 3).double(), coeffs.reshape(-1, 4, channels).double())
        assert_close(value, wanted.reshape(value.shape).float())
    value.sum().backward()
    assert dirs.grad.shape == dirs.shape
    assert coeffs.grad.shape == coeffs.shape


def test_strided_inputs_are_taken() -> None:
    dirs, coeffs = torch.randn(3, 8, dtype=F64).mT, torch.randn(3, 9, 8, dtype=F64).movedim(-1, 0).movedim(1, 2)
    assert_close(spherical_harmonics(2, dirs, coeffs), _expected(2, dirs, coeffs))


WRONG: dict[str, tuple[Callable[[], Tensor], str]] = {
    "degree": (lambda: spherical_harmonics(5, torch.zeros(3), torch.zeros(36, 3)), r"lie in \[0, 4\], got 5"),
    "negative": (lambda: spherical_harmonics(-1, torch.zeros(3), torch.zeros(1, 3)), r"lie in \[0, 4\], got -1"),
    "dirs": (lambda: spherical_harmonics(0, torch.zeros(2), torch.zeros(1, 3)), r"dirs \[..., 3\].*got \(2,\)"),
    "axes": (lambda: spherical_harmonics(0, torch.zeros(4, 3), torch.zeros(1, 3)), r"same first axes, got \(4, 3\)"),
    "few": (lambda: spherical_harmonics(2, torch.zeros(3), torch.zeros(8, 3)), r"degree 2 needs 9 coefficients, got 8"),
    "masks": (
        lambda: spherical_harmonics(0, torch.zeros(4, 3), torch.zeros(4, 1, 3), torch.ones(3, dtype=torch.bool)),
        r"masks must be shaped \(4,\) as dirs, got \(3,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_refused_in_a_sentence(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^spherical_harmonics: .*{message}"):
        call()
