"""The model as an attack sees it: inputs as it wants them, scores in full precision, and the checks of both.

Why a file of its own: PGD, APGD and the evaluation share it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..kernels.ops import compute_dtype
from ..warn import warn_once

_seen: WeakSet[nn.Module] = WeakSet()  # models whose scores were looked at


class Scores:
    """A model's scores, [N, C] in float32 or float64.

    Args:
        model: the model.
        dtype: what its inputs are cast to.
        preprocess: applied to them first.
        autocast_dtype: of an autocast around the model, or None.
        of: who asks, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        preprocess: Callable[[Tensor], Tensor] | None,
        autocast_dtype: torch.dtype | None,
        of: str,
    ) -> None:
        self.model, self.dtype, self.preprocess, self.of = model, dtype, preprocess, of
        self.autocast_dtype = autocast_dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Scores of x, with a graph where gradients are on."""
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.autocast_dtype is not None:
            # a weight cast here, without a graph perhaps, must not be remembered for the caller's passes
            context = torch.autocast(x.device.type, dtype=self.autocast_dtype, cache_enabled=False)
        with context:
            x = x.to(self.dtype)
            logits = self.model(x if self.preprocess is None else self.preprocess(x))
        return self.checked(logits, len(x))

    def checked(self, logits: Tensor, samples: int) -> Tensor:
        """Scores in the dtype to compute in.

        Raises:
            ValueError: if they are no [N, C].
        """
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != samples:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"{self.of}: scores must be a tensor [{samples}, C], got {got}")
        if self.model not in _seen:  # host sync: once a model
            _seen.add(self.model)
            _warn_of_probabilities(logits.detach())
        return logits.to(compute_dtype(logits.dtype))


def active_autocast(device: torch.device) -> torch.dtype | None:
    """The dtype of the caller's autocast, or None without one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _warn_of_probabilities(logits: Tensor) -> None:
    if logits.numel() and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-2).all()):
        warn_once(
            "the model under attack seems to return probabilities; attacks want the scores before the softmax, whose"
            " gradients vanish",
            UserWarning,
        )


def prepared(
    x: Tensor, y: Tensor | None, bounds: tuple[float, float] | None, of: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A copy of x and y that gradients may pass, and x in the dtype to compute in.

    Raises:
        ValueError: if x is not floating point, or y is no [N] of integers.
        DataError: a ValueError, too, if x lies outside the bounds.
    """
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"{of}: x must be floating point, [N, ...], got {x.dtype} of shape {tuple(x.shape)}")
    if y is not None:
        if y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex() or y.dtype is torch.bool:
            raise ValueError(
                f"{of}: y must be classes, [{len(x)}] of integers, got {y.dtype} of shape {tuple(y.shape)}"
            )
        y = y.detach().to(x.device, torch.long, copy=True)
    x = x.detach().clone()
    if bounds is not None and x.numel():
        low, high = (float(end) for end in x.aminmax())  # host sync: once an attack
        if not (low >= bounds[0] - 1e-6 and high <= bounds[1] + 1e-6):
            raise DataError(
                f"{of}: x must lie within bounds {bounds}, got values from {low:.4g} to {high:.4g}; a normalised input?"
                " put the normalisation into the model or preprocess=, or give other bounds"
            )
    return x, y, x.to(compute_dtype(x.dtype))
