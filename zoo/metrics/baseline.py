"""What stands where a pixel was taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Space = Literal["input", "pixels"]


@dataclass(frozen=True)
class Baseline:
    """An image without its content: zeros, black, or blurred.

    Args:
        kind: "zero" or "blur".
        kernel: width of the Gaussian blur, pixels, odd.
        blur_sigma: its standard deviation, pixels.
        space: what "zero" means. "input", the model's input: with normalised images the mean of the dataset;
            "pixels", the image before (x - mean) / std: black.
        mean, std: of that normalisation, one number or one a channel; for "pixels" alone.

    Raises:
        ValueError: if one of them is none of these.
    """

    kind: Literal["zero", "blur"] = "zero"
    kernel: int = 11
    blur_sigma: float = 5.0
    space: Space = "input"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("zero", "blur"):
            raise ValueError(f"baseline must be 'zero' or 'blur', got {self.kind!r}")
        if not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of pixels, got {self.kernel!r}")
        if not 0 < self.blur_sigma < float("inf"):
            raise ValueError(f"blur_sigma must be above 0, got {self.blur_sigma}")
        if self.space not in ("input", "pixels"):
            raise ValueError(f"space must be 'input' or 'pixels', got {self.space!r}")
        if (self.space == "pixels") != (self.mean is not None) or (self.mean is None) != (self.std is None):
            raise ValueError(
                "mean and std belong to space='pixels', which needs both: they are those that normalised the input"
            )
        if self.std is not None and not bool((torch.as_tensor(self.std) > 0).all()):
            raise ValueError(f"std must be above 0, got {self.std}")

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W], or what broadcasts to it, typed like x.

        Raises:
            ValueError: if mean or std are of another number of channels.
        """
        if self.kind == "blur":
            return blurred(x, self.kernel, self.blur_sigma)
        if self.mean is None or self.std is None:
            return x.new_zeros(1, 1, 1, 1)
        mean, std = (self._by_channel(t, x) for t in (self.mean, self.std))
        return (-mean / std).view(1, -1, 1, 1).to(x.dtype)

    def _by_channel(self, value: float | Sequence[float], x: Tensor) -> Tensor:
        # of float64, so that black is as near as the input's dtype has it
        found = torch.as_tensor(value, dtype=torch.float64).flatten()
        if len(found) not in (1, x.shape[1]):
            raise ValueError(f"mean and std must be 1 or {x.shape[1]} numbers, as x has channels, got {len(found)}")
        return found.to(x.device)


def blurred(x: Tensor, kernel: int, sigma: float) -> Tensor:
    """Gaussian blur [B, C, H, W], down and then across; beyond the border the image goes on as at it."""
    work = torch.float64 if x.dtype is torch.float64 else torch.float32
    places = torch.arange(kernel, dtype=work, device=x.device) - kernel // 2
    weights = torch.exp(-(places**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    half = kernel // 2
    planes = F.pad(x.to(work).flatten(0, 1)[:, None], (half, half, half, half), mode="replicate")
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return planes.view_as(x).to(x.dtype)
