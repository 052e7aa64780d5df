"""A metric that averages one value an image and counts the images without one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ImageAverage(Metric):
    """Mean over images of a value each; NaN, an image without a value, is counted and left out.

    Args:
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: images without a value so far, in this process alone.
    """

    full_state_update = False
    is_differentiable = False

    total: Tensor
    n_valid: Tensor
    n_invalid: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("n_valid", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("n_invalid", torch.tensor(0), dist_reduce_fx="sum")
        # A MetricCollection lets metrics whose states look alike after the first batch share them from then on; hit and
        # recall are often both 1. NaN is like nothing.
        self.add_state("unlike_others", torch.tensor(torch.nan), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        # states made in inference mode could not be changed outside
        with torch.inference_mode(False), torch.no_grad():
            values = values.to(self.total)
            missing = values.isnan()
            self.total = self.total + values.masked_fill(missing, 0).sum()
            self.n_valid = self.n_valid + (~missing).sum()
            self.n_invalid = self.n_invalid + missing.sum()

    def compute(self) -> Tensor:
        """The mean, NaN and a warning without a value."""
        if not bool(self.n_valid):  # host sync: once a result
            warnings.warn(
                f"{type(self).__name__}: NaN, for no image had a value; {int(self.n_invalid)} were left out, with maps"
                " of zeros alone, NaN in them, or nothing to compare with",
                UserWarning,
                stacklevel=2,
            )
            return torch.full_like(self.total, torch.nan)
        return self.total / self.n_valid

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def without_their_warning(*args: Any, **kwargs: Any) -> Any:
            with warnings.catch_warnings():  # ours says the same, and after all processes have been asked
                warnings.filterwarnings("ignore", ".*was called before the ``update`` method")
                return wrapped(*args, **kwargs)

        return without_their_warning
