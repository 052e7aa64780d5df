"""What attacks maximise: one number a sample, of its scores.

All take (logits, y, clean_logits), [N, C] scores of the attacked inputs, [N] classes and [N, C] scores of the clean
inputs, in float32 or float64, and return [N]. Each sample's depends on its own row alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Literal["score_difference", "ce", "kl", "margin", "dlr"]
ObjectiveFunction = Callable[[Tensor, Any, Any], Tensor]


def score_difference(logits: Tensor, y: Tensor, clean_logits: Tensor) -> Tensor:
    """sum_j ((z'_y - z'_j) - (z_y - z_j))^2: how far the target's lead over each class has moved, either way.

    The square has the same maximiser as the norm of the smooth adversarial comp-sum loss, and a gradient without a
    root. At the clean input it is 0.
    """
    moved = logits - clean_logits
    return (moved.gather(1, y.unsqueeze(1)) - moved).square().sum(1)


def ce(logits: Tensor, y: Tensor, clean_logits: Tensor | None = None) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(logits, y, reduction="none")


def kl(logits: Tensor, y: Tensor | None, clean_logits: Tensor) -> Tensor:
    """KL(softmax(z) || softmax(z')), TRADES' objective; needs no y. At the clean input its gradient is 0."""
    return F.kl_div(logits.log_softmax(1), clean_logits.log_softmax(1), reduction="none", log_target=True).sum(1)


def margin(logits: Tensor, y: Tensor, clean_logits: Tensor | None = None) -> Tensor:
    """max_{j != y} z_j - z_y: positive where the sample is misclassified."""
    return _best_other(logits, y) - _of_class(logits, y)


def dlr(logits: Tensor, y: Tensor, clean_logits: Tensor | None = None) -> Tensor:
    """(max_{j != y} z_j - z_y) / (z_(1) - z_(3)), z_(k) the k-th largest: invariant to shifts and scales of the scores.

    Raises:
        ValueError: if there are fewer than 3 classes.

    Source:
        Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", ICML 2020, arXiv:2003.01690, eq. 6.
    """
    _check_classes(logits, 3, "dlr")
    top = logits.topk(3).values
    return margin(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(torch.finfo(logits.dtype).tiny)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), towards a class t of each sample.

    Args:
        logits: [N, C].
        y: [N] classes.
        target: [N] classes to reach.

    Raises:
        ValueError: if there are fewer than 4 classes.

    Source:
        Croce and Hein, ICML 2020, arXiv:2003.01690, eq. 7.
    """
    _check_classes(logits, 4, "dlr_targeted")
    top = logits.topk(4).values
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return (_of_class(logits, target) - _of_class(logits, y)) / scale.clamp_min(torch.finfo(logits.dtype).tiny)


OBJECTIVES: dict[str, ObjectiveFunction] = {
    "score_difference": score_difference,
    "ce": ce,
    "kl": kl,
    "margin": margin,
    "dlr": dlr,
}
NEED_CLEAN_LOGITS = ("score_difference", "kl")  # and have no gradient where the attacked scores are the clean ones


def is_correct(logits: Tensor, y: Tensor) -> Tensor:
    """[N], whether y has the largest score; not where a score is NaN."""
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)


def _of_class(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y.unsqueeze(1)).squeeze(1)


def _best_other(logits: Tensor, y: Tensor) -> Tensor:
    """The largest score but y's; of several equal ones one alone has a gradient."""
    return logits.scatter(1, y.unsqueeze(1), -torch.inf).max(1).values


def _check_classes(logits: Tensor, least: int, of: str) -> None:
    if logits.shape[1] < least:
        raise ValueError(
            f"{of}: needs at least {least} classes to scale the margin, got {logits.shape[1]}; use 'ce' or 'margin'"
        )
