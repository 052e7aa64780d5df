"""SSIM and its mix with L1, against loops over pixels, and against scikit-image and torchmetrics where they agree."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.losses import L1DSSIMLoss, SSIMLoss, d_ssim, l1_dssim, ssim


def pictures(*shape: int, noise: float = 0.1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A picture and a noisy copy, both in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=generator, dtype=torch.float64)
    other = image + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    return image.to(dtype), other.clamp(0, 1).to(dtype)


def by_loops(x: Tensor, y: Tensor, data_range: float = 1.0) -> Tensor:
    """The formula as printed, pixel by pixel over [H, W], with variances as means of squared deviations.

    Pixels outside the picture are zeros, so that the weights of a window sum to 1 everywhere.
    """
    height, width = x.shape
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    offsets = [(di, dj) for di in range(-5, 6) for dj in range(-5, 6)]
    weights = [math.exp(-(di * di + dj * dj) / (2 * 1.5**2)) for di, dj in offsets]
    result = torch.empty_like(x)
    for i in range(height):
        for j in range(width):

            def seen(picture: Tensor, i: int = i, j: int = j) -> list[float]:
                places = ((i + di, j + dj) for di, dj in offsets)
                return [picture[p, q].item() if 0 <= p < height and 0 <= q < width else 0.0 for p, q in places]

            def mean(values: list[float]) -> float:
                return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

            a, b = seen(x), seen(y)
            mu_a, mu_b = mean(a), mean(b)
            var_a, var_b = mean([(v - mu_a) ** 2 for v in a]), mean([(v - mu_b) ** 2 for v in b])
            cov = mean([(v - mu_a) * (u - mu_b) for v, u in zip(a, b, strict=True)])
            result[i, j] = (2 * mu_a * mu_b + c1) * (2 * cov + c2)
            result[i, j] /= (mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)
    return result


def published_form(x: Tensor, y: Tensor) -> Tensor:
    """1 - SSIM of [B, H, W, C] with variances as E[x^2] - mu^2 and one convolution of 11 x 11 a map."""
    x, y = x.movedim(-1, 1), y.movedim(-1, 1)
    gauss = (-(torch.arange(-5, 6, dtype=torch.float64) / 1.5).square() / 2).exp()
    gauss = gauss / gauss.sum()
    kernel = torch.outer(gauss, gauss).to(x).expand(x.shape[1], 1, 11, 11)

    def blur(maps: Tensor) -> Tensor:
        return F.conv2d(maps, kernel, padding=5, groups=maps.shape[1])

    mu_x, mu_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2
    cov = blur(x * y) - mu_x * mu_y
    value = (2 * mu_x * mu_y + 1e-4) * (2 * cov + 9e-4)
    value = value / ((mu_x**2 + mu_y**2 + 1e-4) * (var_x + var_y + 9e-4))
    return (1 - value).movedim(1, -1)


# The oracle, and two other libraries


@pytest.mark.parametrize("size", [(13, 17), (3, 4), (1, 1), (1, 12)])
def test_map_is_the_formula_pixel_by_pixel(size: tuple[int, int]) -> None:
    x, y = pictures(*size, 2)
    found = ssim(x, y, reduction="none")
    expected = torch.stack([by_loops(x[..., c], y[..., c]) for c in range(2)], -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(d_ssim(x, y, reduction="none"), 1 - expected, rtol=0, atol=1e-12)


def test_constants_scale_with_the_data_range() -> None:
    x, y = pictures(6, 7, 1)
    expected = by_loops(255 * x[..., 0], 255 * y[..., 0], 255.0)
    torch.testing.assert_close(ssim(255 * x, 255 * y, data_range=255, reduction="none")[..., 0], expected)
    torch.testing.assert_close(ssim(255 * x, 255 * y, data_range=255), ssim(x, y))
    assert abs(ssim(255 * x, 255 * y).item() - ssim(x, y).item()) > 1e-4


def test_interior_is_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pictures(40, 33, 3)
    options: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, expected = metrics.structural_similarity(
        x.numpy(), y.numpy(), channel_axis=-1, data_range=1.0, full=True, **options
    )
    found = ssim(x, y, reduction="none")[5:-5, 5:-5]
    torch.testing.assert_close(found, torch.from_numpy(expected)[5:-5, 5:-5], rtol=0, atol=1e-12)


def test_interior_is_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    x, y = pictures(2, 31, 40, 3)
    planes = (p.movedim(-1, 1) for p in (x, y))
    _, expected = image.structural_similarity_index_measure(*planes, data_range=1.0, return_full_image=True)
    found = ssim(x, y, reduction="none")[:, 5:-5, 5:-5]
    torch.testing.assert_close(found, expected.movedim(1, -1)[:, 5:-5, 5:-5], rtol=0, atol=1e-12)


# Identities


def test_a_picture_agrees_with_itself() -> None:
    for dtype in (torch.float64, torch.float32):
        x, _ = pictures(2, 9, 14, 3, dtype=dtype)
        x.requires_grad_()
        target = x.detach().clone()
        assert ssim(x, target).item() == 1
        for loss in (d_ssim(x, target), l1_dssim(x, target)):
            assert loss.item() == 0
            assert not torch.autograd.grad(loss, x)[0].any()


def test_constant_pictures_in_closed_form() -> None:
    """Far from the border variances vanish and only the means are compared."""
    x, y = torch.full((21, 23, 1), 0.3, dtype=torch.float64), torch.full((21, 23, 1), 0.8, dtype=torch.float64)
    expected = (2 * 0.3 * 0.8 + 1e-4) / (0.3**2 + 0.8**2 + 1e-4)
    inside = ssim(x, y, reduction="none")[5:-5, 5:-5]
    torch.testing.assert_close(inside, torch.full_like(inside, expected), rtol=0, atol=1e-12)


def test_a_negative_has_negative_similarity() -> None:
    x, _ = pictures(12, 12, 1)
    assert ssim(x, 1 - x).item() < 0
    assert 1 < d_ssim(x, 1 - x).item() < 2


def test_both_arguments_count_alike() -> None:
    x, y = pictures(8, 9, 3)
    torch.testing.assert_close(ssim(x, y, reduction="none"), ssim(y, x, reduction="none"), rtol=0, atol=1e-12)


def test_d_ssim_is_one_minus_ssim_and_not_half_of_it() -> None:
    x, y = pictures(2, 12, 9, 3)
    torch.testing.assert_close(d_ssim(x, y), 1 - ssim(x, y), rtol=1e-12, atol=0)


def test_mix_is_four_to_one() -> None:
    x, y = pictures(2, 12, 9, 3)
    l1 = (x - y).abs().mean()
    torch.testing.assert_close(l1_dssim(x, y), 0.8 * l1 + 0.2 * (1 - ssim(x, y)))
    torch.testing.assert_close(l1_dssim(x, y, ssim_lambda=0.0), l1)
    torch.testing.assert_close(l1_dssim(x, y, ssim_lambda=1.0), d_ssim(x, y))
    torch.testing.assert_close(
        l1_dssim(x, y, reduction="none"), 0.8 * (x - y).abs() + 0.2 * d_ssim(x, y, reduction="none")
    )


# Layouts, reductions, dtypes


def test_leading_axes_are_a_batch() -> None:
    x, y = pictures(2, 3, 7, 8, 3)
    together = ssim(x, y, reduction="none")
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], ssim(x[i, j], y[i, j], reduction="none"))
    torch.testing.assert_close(ssim(x, y), together.mean())
    torch.testing.assert_close(ssim(x, y, reduction="sum"), together.sum())


@pytest.mark.parametrize("function", [ssim, d_ssim, l1_dssim])
def test_channels_first(function: Any) -> None:
    x, y = pictures(2, 7, 8, 3)
    planes = (x.movedim(-1, 1).contiguous(), y.movedim(-1, 1).contiguous())
    torch.testing.assert_close(function(*planes, channels_first=True), function(x, y))
    maps = function(*planes, channels_first=True, reduction="none")
    torch.testing.assert_close(maps, function(x, y, reduction="none").movedim(-1, 1))


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_channels_do_not_mix(channels: int) -> None:
    x, y = pictures(6, 7, channels)
    found = ssim(x, y, reduction="none")
    for c in range(channels):
        torch.testing.assert_close(found[..., c : c + 1], ssim(x[..., c : c + 1], y[..., c : c + 1], reduction="none"))


def test_arithmetic_of_halves_is_float32() -> None:
    x, y = pictures(9, 9, 3, dtype=torch.bfloat16)
    found = ssim(x.requires_grad_(), y)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), ssim(x.double(), y.double()), rtol=0, atol=1e-6)
    assert torch.autograd.grad(found, x)[0].dtype is torch.bfloat16
    assert ssim(x, y.double()).dtype is torch.float64


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_windows_alone(low: torch.dtype) -> None:
    x, y = pictures(9, 9, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=low):
        assert torch.equal(ssim(x, y), ssim(x.clone(), y.clone()))
        found = ssim(x, y)
    assert torch.equal(found, ssim(x, y))


def test_nearly_equal_pictures_keep_their_digits_in_float32() -> None:
    """The published form loses the loss and its gradient in rounding here: 1 % and 0.1 % off, and 7 times the map."""
    x = 0.3 + 0.5 * pictures(1, 64, 63, 3, dtype=torch.float32)[0]
    y = x + 1e-4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    exact_x = x.double().requires_grad_()
    exact = published_form(exact_x, y.double()).mean()
    (exact_gradient,) = torch.autograd.grad(exact, exact_x)

    def errors(function: Any) -> tuple[float, float]:
        leaf = x.clone().requires_grad_()
        loss = function(leaf, y).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        of_gradient = (gradient - exact_gradient).norm() / exact_gradient.norm()
        return abs(loss.item() / exact.item() - 1), of_gradient.item()

    ours, published = errors(d_ssim), errors(published_form)
    assert ours[0] < 1e-5 > ours[1]
    assert published[0] > 1e-3
    assert published[1] > 1e-4


def test_white_pictures_are_finite_in_float32() -> None:
    """Variances that are 0 come out negative by rounding; the constants keep the quotient and the gradient."""
    x = torch.ones(1, 40, 41, 3, requires_grad=True)
    loss = d_ssim(x, torch.full_like(x, 0.999))
    (gradient,) = torch.autograd.grad(loss, x)
    exact = d_ssim(x.detach().double(), torch.full_like(x, 0.999).double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)
    assert bool(gradient.isfinite().all())


# Derivatives and transforms


@pytest.mark.parametrize("function", [ssim, d_ssim, l1_dssim])
def test_derivatives(function: Any) -> None:
    x, y = (p.requires_grad_() for p in pictures(5, 6, 2))
    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))


def test_samples_map_one_by_one() -> None:
    x, y = pictures(3, 6, 7, 3)
    torch.testing.assert_close(
        torch.func.vmap(ssim)(x, y), torch.stack([ssim(a, b) for a, b in zip(x, y, strict=True)])
    )
    gradients = torch.func.vmap(torch.func.grad(d_ssim))(x, y)
    for found, a, b in zip(gradients, x, y, strict=True):
        torch.testing.assert_close(found, torch.func.grad(d_ssim)(a, b))


def test_descent_restores_a_picture() -> None:
    target, _ = pictures(16, 15, 3, dtype=torch.float32)
    image = torch.full_like(target, 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([image], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        l1_dssim(image, target).backward()
        optimizer.step()
    assert ssim(image, target).item() > 0.98


def test_shapes_alone_on_the_meta_device() -> None:
    x = torch.empty(2, 300, 200, 3, device="meta")
    assert ssim(x, x, reduction="none").shape == x.shape
    assert l1_dssim(x, x).shape == ()


def test_an_empty_batch_has_no_loss() -> None:
    x = torch.zeros(0, 4, 5, 3, requires_grad=True)
    assert d_ssim(x, x.detach(), reduction="sum").item() == 0
    assert d_ssim(x, x.detach(), reduction="none").shape == x.shape
    assert d_ssim(x, x.detach()).isnan()  # the mean of nothing, as in torch.nn


# Modules and errors


def test_modules_are_the_functions() -> None:
    x, y = pictures(2, 9, 8, 3)
    assert torch.equal(SSIMLoss()(x, y), d_ssim(x, y))
    assert torch.equal(L1DSSIMLoss()(x, y), l1_dssim(x, y))
    planes = (255 * x.movedim(-1, 1), 255 * y.movedim(-1, 1))
    options: dict[str, Any] = {"data_range": 255.0, "channels_first": True, "reduction": "sum"}
    torch.testing.assert_close(SSIMLoss(**options)(*planes), d_ssim(x, y, reduction="sum"))
    mixed = L1DSSIMLoss(0.3, **options)
    torch.testing.assert_close(mixed(*planes), l1_dssim(*planes, ssim_lambda=0.3, **options))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(mixed)))
    assert torch.equal(twin(*planes), mixed(*planes))
    assert isinstance(zoo.create("loss", "ssim", reduction="none"), SSIMLoss)
    assert zoo.create("loss", "l1_dssim").ssim_lambda == 0.2


def test_modules_tell_of_their_options() -> None:
    assert repr(SSIMLoss()) == "SSIMLoss(data_range=1, channels_first=False, reduction='mean')"
    assert repr(L1DSSIMLoss(0.5, channels_first=True)) == (
        "L1DSSIMLoss(ssim_lambda=0.5, data_range=1, channels_first=True, reduction='mean')"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_range": 0.0}, "data_range must be positive and finite, got 0.0"),
        ({"data_range": math.nan}, "data_range must be positive and finite, got nan"),
        ({"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ({"ssim_lambda": 1.5}, r"ssim_lambda must lie in \[0, 1\], got 1.5"),
        ({"ssim_lambda": math.nan}, r"ssim_lambda must lie in \[0, 1\], got nan"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    x, y = pictures(4, 4, 3)
    with pytest.raises(ValueError, match=f"^L1DSSIMLoss: {message}"):
        L1DSSIMLoss(**options)
    with pytest.raises(ValueError, match=f"^l1_dssim: {message}"):
        l1_dssim(x, y, **options)
    if "ssim_lambda" not in options:
        with pytest.raises(ValueError, match=f"^SSIMLoss: {message}"):
            SSIMLoss(**options)
        for function in (ssim, d_ssim):
            with pytest.raises(ValueError, match=f"^{function.__name__}: {message}"):
                function(x, y, **options)


@pytest.mark.parametrize(
    ("shapes", "channels_first", "message"),
    [
        (((4, 5, 3), (4, 5, 1)), False, r"one shape \[..., H, W, C\] .* got \[4, 5, 3\] and \[4, 5, 1\]"),
        (((4, 5), (4, 5)), False, r"one shape \[..., H, W, C\] .* got \[4, 5\] and \[4, 5\]"),
        (((3, 4, 5), (1, 3, 4, 5)), True, r"one shape \[..., C, H, W\] .* got \[3, 4, 5\] and \[1, 3, 4, 5\]"),
        (((2, 0, 5, 3), (2, 0, 5, 3)), False, "at least one pixel"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[Any, Any], channels_first: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssim(torch.zeros(shapes[0]), torch.zeros(shapes[1]), channels_first=channels_first)


def test_bytes_are_refused() -> None:
    x, _ = pictures(4, 4, 3)
    with pytest.raises(TypeError, match=r"ssim: pictures must be floating point, got torch.float64 and torch.uint8"):
        ssim(x, (255 * x).to(torch.uint8))
