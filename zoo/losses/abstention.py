"""A predictor and a rejector that learns beside it when not to answer.

The other way, one more class that means "no answer", is in `targets.py`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor, nn

from ..kernels.ops import compute_dtype
from .comp_sum.functional import Reduction, check_reduction, comp_sum_loss, reduce

Stage = Literal["single", "second"]

__all__ = ["PredictorRejectorLoss", "predictor_rejector_loss"]


def predictor_rejector_loss(
    input: Tensor,
    rejector: Tensor,
    target: Tensor,
    cost: float,
    *,
    alpha: float = 1.0,
    stage: Stage = "single",
    reduction: Reduction = "mean",
) -> Tensor:
    """(1 - p_y) exp(alpha r) + c exp(-alpha r), p = softmax(scores): an answer is given where r > 0, else c is paid.

    Args:
        input: [N, C, ...] scores of the predictor.
        rejector: [N, ...] r.
        target: classes [N, ...], of any integer dtype.
        cost: c in [0, 1], of not answering.
        alpha: > 0, steepness.
        stage: "single": both learn together. "second": the predictor is there already, and 1 where its answer is
            wrong takes the place of 1 - p_y; only the rejector learns.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or [N, ...]; float64 for float64 scores, else float32.

    Raises:
        ValueError: if shapes, cost, alpha, stage or reduction do not fit.
        IndexError: if a class is out of range (on the CPU).

    Source:
        Mao, Mohri, Zhong, "Predictor-Rejector Multi-Class Abstention", ALT 2024, PMLR 237, arXiv:2310.14772. The mean
        absolute error is the member of the comp-sum family their theory allows; the same alpha on both sides.

    Example:
        >>> predictor_rejector_loss(torch.zeros(1, 4), torch.zeros(1), torch.tensor([2]), cost=0.25)
        tensor(1.)
    """
    name = "predictor_rejector_loss"
    _check(name, cost, alpha, stage)
    check_reduction(reduction, name)
    if input.ndim < 2 or rejector.shape != target.shape or target.shape != input.shape[:1] + input.shape[2:]:
        raise ValueError(
            f"{name}: scores must be [N, C, ...], rejector and target [N, ...], got {list(input.shape)},"
            f" {list(rejector.shape)} and {list(target.shape)}"
        )
    wrong = comp_sum_loss(input, target, 2.0, reduction="none")
    if stage == "second":
        wrong = (input.argmax(1) != target).to(wrong.dtype)
    slope = alpha * rejector.to(compute_dtype(input.dtype))
    loss = wrong * slope.exp() + cost * (-slope).exp()
    return reduce(loss, loss.numel(), reduction)


class PredictorRejectorLoss(nn.Module):
    """Loss of a predictor's scores and a rejector's number; see :func:`predictor_rejector_loss`.

    Args:
        cost: in [0, 1], of not answering.
        alpha: > 0, steepness (1).
        stage: "single" or "second".
        reduction: "mean", "sum" or "none".

    Shape:
        [N, C, ...] scores, [N, ...] rejector, [N, ...] classes -> scalar, or [N, ...] for reduction "none".

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Mao, Mohri, Zhong, "Predictor-Rejector Multi-Class Abstention", ALT 2024, PMLR 237, arXiv:2310.14772.

    Example:
        >>> loss = zoo.create("loss", "predictor_rejector", cost=0.25)
        >>> loss(torch.zeros(1, 4), torch.zeros(1), torch.tensor([2]))
        tensor(1.)
    """

    def __init__(
        self, cost: float, *, alpha: float = 1.0, stage: Stage = "single", reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check(type(self).__name__, cost, alpha, stage)
        check_reduction(reduction, type(self).__name__)
        self.cost, self.alpha, self.stage, self.reduction = cost, alpha, stage, reduction

    def forward(self, input: Tensor, rejector: Tensor, target: Tensor) -> Tensor:
        options = {"alpha": self.alpha, "stage": self.stage, "reduction": self.reduction}
        return predictor_rejector_loss(input, rejector, target, self.cost, **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"cost={self.cost:g}, alpha={self.alpha:g}, stage={self.stage!r}, reduction={self.reduction!r}"


def _check(of: str, cost: float, alpha: float, stage: str) -> None:
    if not 0 <= cost <= 1:
        raise ValueError(f"{of}: cost must lie in [0, 1], got {cost}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"{of}: alpha must be positive and finite, got {alpha}")
    if stage not in get_args(Stage):
        raise ValueError(f"{of}: stage must be 'single' or 'second', got {stage!r}")
