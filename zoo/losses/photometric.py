"""How far a rendered picture is from a photograph: structural similarity (SSIM), and the mix of it with L1.

Pictures are channels last, [..., H, W, C], as renderers return them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.ops import compute_dtype, full_precision
from .comp_sum.functional import Reduction, check_reduction, reduce

__all__ = ["L1DSSIMLoss", "SSIMLoss", "d_ssim", "l1_dssim", "ssim"]

# Wang et al. 2004: an 11 x 11 Gaussian window of standard deviation 1.5, and the constants K1 and K2.
_RADIUS, _SIGMA = 5, 1.5
_K1, _K2 = 0.01, 0.03


def ssim(
    image: Tensor,
    target: Tensor,
    *,
    data_range: float = 1.0,
    channels_first: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """(2 mu_x mu_y + C1) (2 s_xy + C2) / ((mu_x^2 + mu_y^2 + C1) (s_x^2 + s_y^2 + C2)): 1 where both pictures agree.

    Means, variances and the covariance of each pixel and channel are taken under a Gaussian window of 11 x 11 pixels
    and standard deviation 1.5, with zeros outside the picture; a picture may be smaller than the window.
    C1 = (0.01 data_range)^2, C2 = (0.03 data_range)^2.

    Args:
        image: [..., H, W, C] in [0, data_range], floating point.
        target: same shape. Gradients flow to both.
        data_range: > 0, largest value of a pixel.
        channels_first: pictures are [..., C, H, W] instead.
        reduction: "mean" over everything, "sum", or "none" for a map.

    Returns:
        A scalar, or a map shaped like `image`, of values in [-1, 1]; float64 where one of the pictures is, else
        float32.

    Raises:
        TypeError: if a picture is not floating point.
        ValueError: if shapes, data_range or reduction do not fit.

    Source:
        Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity",
        IEEE TIP 2004, eq. 13. Zeros outside the picture and the mean over all pixels are those of Gaussian splatting
        (Kerbl et al. 2023) and its successors; torchmetrics mirrors the picture at its border and scikit-image leaves
        the border out, so that their figures differ, by about 1e-3.

    Example:
        >>> picture = torch.full((16, 16, 3), 0.5)
        >>> ssim(picture, picture)
        tensor(1.)
    """
    loss = _d_ssim_map(*_prepared("ssim", image, target, data_range, channels_first, reduction), data_range)
    return _finished(1 - loss, channels_first, reduction)


def d_ssim(
    image: Tensor,
    target: Tensor,
    *,
    data_range: float = 1.0,
    channels_first: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """1 - SSIM, a loss in [0, 2]; not halved, as some define it.

    It is not computed as a difference from 1, so that it keeps its relative precision where pictures nearly agree.

    Args:
        image: [..., H, W, C] in [0, data_range], floating point.
        target: same shape. Gradients flow to both.
        data_range: > 0, largest value of a pixel.
        channels_first: pictures are [..., C, H, W] instead.
        reduction: "mean" over everything, "sum", or "none" for a map.

    Returns:
        A scalar, or a map shaped like `image`; float64 where one of the pictures is, else float32.

    Raises:
        TypeError: if a picture is not floating point.
        ValueError: if shapes, data_range or reduction do not fit.

    Source:
        Wang et al., IEEE TIP 2004, eq. 13; see :func:`ssim` for the border.

    Example:
        >>> d_ssim(torch.zeros(16, 16, 3), torch.zeros(16, 16, 3))
        tensor(0.)
    """
    loss = _d_ssim_map(*_prepared("d_ssim", image, target, data_range, channels_first, reduction), data_range)
    return _finished(loss, channels_first, reduction)


def l1_dssim(
    image: Tensor,
    target: Tensor,
    *,
    ssim_lambda: float = 0.2,
    data_range: float = 1.0,
    channels_first: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """(1 - lambda) abs(x - y) + lambda (1 - SSIM(x, y)): what scenes of splats are fitted by.

    Args:
        image: [..., H, W, C] in [0, data_range], floating point.
        target: same shape. Gradients flow to both.
        ssim_lambda: lambda in [0, 1], share of 1 - SSIM (0.2).
        data_range: > 0, largest value of a pixel. It scales SSIM's constants only, not the L1 term.
        channels_first: pictures are [..., C, H, W] instead.
        reduction: "mean" over everything, "sum", or "none" for a map.

    Returns:
        A scalar, or a map shaped like `image`; float64 where one of the pictures is, else float32.

    Raises:
        TypeError: if a picture is not floating point.
        ValueError: if shapes, ssim_lambda, data_range or reduction do not fit.

    Source:
        Held et al., "3D Convex Splatting: Radiance Field Rendering with 3D Smooth Convexes", CVPR 2025,
        arXiv:2411.14974, without its mask term; the same two terms and lambda in Kerbl et al., "3D Gaussian Splatting
        for Real-Time Radiance Field Rendering", 2023, arXiv:2308.04079.

    Example:
        >>> l1_dssim(torch.ones(16, 16, 3), torch.zeros(16, 16, 3), ssim_lambda=0.0)
        tensor(1.)
    """
    _check_lambda("l1_dssim", ssim_lambda)
    image, target = _prepared("l1_dssim", image, target, data_range, channels_first, reduction)
    loss = (1 - ssim_lambda) * (image - target).abs()
    if ssim_lambda:
        loss = loss + ssim_lambda * _d_ssim_map(image, target, data_range)
    return _finished(loss, channels_first, reduction)


class SSIMLoss(nn.Module):
    """1 - SSIM of pictures, 0 where they agree; see :func:`d_ssim`.

    Args:
        data_range: > 0, largest value of a pixel (1).
        channels_first: pictures are [..., C, H, W] instead of [..., H, W, C].
        reduction: "mean", "sum" or "none".

    Shape:
        two pictures [..., H, W, C] -> scalar, or [..., H, W, C] for reduction "none".

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Wang et al., IEEE TIP 2004, eq. 13; see :func:`ssim` for the border.

    Example:
        >>> loss = zoo.create("loss", "ssim")
        >>> loss(torch.zeros(16, 16, 3), torch.zeros(16, 16, 3))
        tensor(0.)
    """

    def __init__(self, *, data_range: float = 1.0, channels_first: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(type(self).__name__, data_range, reduction)
        self.data_range, self.channels_first, self.reduction = data_range, channels_first, reduction

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        options = {"data_range": self.data_range, "channels_first": self.channels_first, "reduction": self.reduction}
        return d_ssim(image, target, **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"data_range={self.data_range:g}, channels_first={self.channels_first}, reduction={self.reduction!r}"


class L1DSSIMLoss(nn.Module):
    """(1 - lambda) L1 + lambda (1 - SSIM), the loss scenes of splats are fitted by; see :func:`l1_dssim`.

    Args:
        ssim_lambda: in [0, 1], share of 1 - SSIM (0.2).
        data_range: > 0, largest value of a pixel (1).
        channels_first: pictures are [..., C, H, W] instead of [..., H, W, C].
        reduction: "mean", "sum" or "none".

    Shape:
        two pictures [..., H, W, C] -> scalar, or [..., H, W, C] for reduction "none".

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Held et al., "3D Convex Splatting: Radiance Field Rendering with 3D Smooth Convexes", CVPR 2025,
        arXiv:2411.14974, without its mask term.

    Example:
        >>> loss = zoo.L1DSSIMLoss()
        >>> image = torch.rand(1, 16, 16, 3, requires_grad=True)
        >>> loss(image, torch.rand(1, 16, 16, 3)).backward()
    """

    def __init__(
        self,
        ssim_lambda: float = 0.2,
        *,
        data_range: float = 1.0,
        channels_first: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_lambda(type(self).__name__, ssim_lambda)
        _check_options(type(self).__name__, data_range, reduction)
        self.ssim_lambda = ssim_lambda
        self.data_range, self.channels_first, self.reduction = data_range, channels_first, reduction

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        options = {"data_range": self.data_range, "channels_first": self.channels_first, "reduction": self.reduction}
        return l1_dssim(image, target, ssim_lambda=self.ssim_lambda, **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return (
            f"ssim_lambda={self.ssim_lambda:g}, data_range={self.data_range:g}, channels_first={self.channels_first},"
            f" reduction={self.reduction!r}"
        )


def _d_ssim_map(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """1 - SSIM of each pixel and channel, [..., H, W, C] -> same.

    The two factors of SSIM are 1 - a and 1 - b with the difference d = x - y:

        a = mu_d^2 / (mu_x^2 + mu_y^2 + C1),   b = s_d^2 / (s_x^2 + s_y^2 + C2)

    so 1 - SSIM = a + b - a b without a difference from 1, four maps are blurred instead of five, and the numerator of
    b cancels in d, not in x and y. Variances are not clamped at 0: they fall below by rounding only, by about 1e-7 of
    the square of the data range against C2 = 9e-4 of it.
    """
    d = x - y
    maps = _blurred(torch.cat([x, d, x * x + y * y, d * d], -1))
    mean_x, mean_d, squares, square_d = maps.chunk(4, -1)
    mean_y = mean_x - mean_d
    means, mean_d = mean_x.square() + mean_y.square(), mean_d.square()
    a = mean_d / (means + (_K1 * data_range) ** 2)
    b = (square_d - mean_d) / (squares - means + (_K2 * data_range) ** 2)
    return a + b - a * b


def _blurred(maps: Tensor) -> Tensor:
    """Each channel under the Gaussian window, zeros outside; [..., H, W, D] -> same, D > 1."""
    steps = torch.arange(-_RADIUS, _RADIUS + 1, device=maps.device, dtype=maps.dtype)
    window = (-(steps / _SIGMA).square() / 2).softmax(0)
    lead, channels = maps.shape[:-3], maps.shape[-1]
    planes = maps.flatten(0, -4) if lead else maps.unsqueeze(0)
    planes = planes.contiguous().permute(0, 3, 1, 2)
    if planes.is_cuda:
        # channels last would go to cuDNN and its TF32, whose three digits are too few for variances
        planes = planes.contiguous()
    # one row, then one column a channel: on CPUs this layout is several times as fast as planes of pixels
    row = window.view(1, 1, 1, -1).repeat(channels, 1, 1, 1)
    with full_precision(maps.device.type):
        planes = F.conv2d(planes, row, padding=(0, _RADIUS), groups=channels)
        planes = F.conv2d(planes, row.transpose(2, 3), padding=(_RADIUS, 0), groups=channels)
    return planes.permute(0, 2, 3, 1).reshape(maps.shape)


def _prepared(
    of: str, image: Tensor, target: Tensor, data_range: float, channels_first: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """Both pictures checked, channels last, in the dtype of the arithmetic."""
    _check_options(of, data_range, reduction)
    if not image.is_floating_point() or not target.is_floating_point():
        raise TypeError(
            f"{of}: pictures must be floating point, got {image.dtype} and {target.dtype}; divide bytes by 255"
        )
    if image.shape != target.shape or image.ndim < 3 or 0 in image.shape[-3:]:
        axes = "[..., C, H, W]" if channels_first else "[..., H, W, C]"
        raise ValueError(
            f"{of}: both pictures must have one shape {axes} with at least one pixel, got {list(image.shape)} and"
            f" {list(target.shape)}"
        )
    dtype = compute_dtype(torch.promote_types(image.dtype, target.dtype))
    image, target = image.to(dtype), target.to(dtype)
    return (image.movedim(-3, -1), target.movedim(-3, -1)) if channels_first else (image, target)


def _finished(loss: Tensor, channels_first: bool, reduction: Reduction) -> Tensor:
    if reduction == "none" and channels_first:
        return loss.movedim(-1, -3)
    return reduce(loss, loss.numel(), reduction)


def _check_options(of: str, data_range: float, reduction: str) -> None:
    if not 0 < data_range < math.inf:
        raise ValueError(f"{of}: data_range must be positive and finite, got {data_range}")
    check_reduction(reduction, of)


def _check_lambda(of: str, ssim_lambda: float) -> None:
    if not 0 <= ssim_lambda <= 1:
        raise ValueError(f"{of}: ssim_lambda must lie in [0, 1], got {ssim_lambda}")
