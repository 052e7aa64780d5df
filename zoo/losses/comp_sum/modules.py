"""The comp-sum losses as modules, under every name the family's members have elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .functional import (
    Aux,
    Backend,
    Reduction,
    check_aux,
    check_max_weight,
    check_reduction,
    check_smoothing,
    check_tau,
    comp_sum_loss,
    tau_from_q,
)
from .linear import linear_comp_sum_loss


class TunableLoss(nn.Module):
    """A loss whose tau can be set while it is in use, and is part of its state.

    The number that is used is a Python float: the branch at tau = 1 would wait for a GPU otherwise. The buffer beside
    it, `tau_state`, only carries it through checkpoints.
    """

    tau_state: Tensor

    def __init__(self, tau: float) -> None:
        super().__init__()
        self._tau = check_tau(tau, type(self).__name__)
        self.register_buffer("tau_state", torch.tensor(self._tau, dtype=torch.float64))
        self.register_load_state_dict_post_hook(_adopt_tau)

    def reset_parameters(self) -> None:
        """Fill the buffer of a module made on the meta device."""
        self.tau = self._tau

    @property
    def tau(self) -> float:
        """Member of the family; may be set, e.g. by :class:`zoo.tasks.LossRamp`."""
        return self._tau

    @tau.setter
    def tau(self, value: float) -> None:
        self._tau = check_tau(value, type(self).__name__)
        self.tau_state = torch.tensor(self._tau, dtype=torch.float64, device=self.tau_state.device)

    def _apply(self, fn: Any, recurse: bool = True) -> TunableLoss:
        super()._apply(fn, recurse)
        if self.tau_state.dtype is not torch.float64:  # .half() is meant for scores, not for this
            self.tau = self._tau
        return self


def _adopt_tau(loss: nn.Module, _: Any) -> None:
    assert isinstance(loss, TunableLoss)
    if not loss.tau_state.is_meta:
        loss.tau = float(loss.tau_state)


class CompSumLoss(TunableLoss):
    """Comp-sum loss of scores and targets; see :func:`comp_sum_loss` for the formula.

    Args:
        tau: >= 0, the member: 0 sum-exponential, 1 cross-entropy (default), 1 < tau < 2 generalised cross-entropy with
            q = tau - 1, 2 mean absolute error. `loss.tau = 1.5` changes it later; checkpoints hold it.
        weight: [C] factor of each class.
        ignore_index: target that contributes nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1], share of the target spread evenly over all classes.
        aux: "exp", "rho_logistic" or "rho_margin".
        rho: > 0, divides the score differences.
        max_weight: >= 1, bound on p^(tau - 1) for tau < 1, or None.
        zero_if_empty: 0 instead of NaN for the mean of nothing.
        normalized: over the sum of the losses of all classes, for tau >= 1.
        truncation: probability in (0, 1) below which the loss stays constant, or None.
        backend: "auto" or "eager", the plain formula.

    Shape:
        [N, C, ...] scores and [N, ...] classes (or [N, C, ...] weights) -> scalar, or [N, ...] for reduction "none".

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
        arXiv:2304.07288.

    Example:
        >>> loss = zoo.CompSumLoss(tau=1.5)
        >>> loss(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.)
    """

    weight: Tensor | None

    def __init__(
        self,
        tau: float = 1.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        aux: Aux = "exp",
        rho: float = 1.0,
        max_weight: float | None = None,
        zero_if_empty: bool = False,
        normalized: bool = False,
        truncation: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(tau)
        name = type(self).__name__
        check_reduction(reduction, name)
        check_aux(aux, rho, name)
        check_max_weight(max_weight, name)
        check_smoothing(label_smoothing, name)
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.aux, self.rho, self.max_weight, self.zero_if_empty = aux, rho, max_weight, zero_if_empty
        self.normalized, self.truncation, self.backend = normalized, truncation, backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return comp_sum_loss(
            input,
            target,
            self.tau,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            aux=self.aux,
            rho=self.rho,
            max_weight=self.max_weight,
            zero_if_empty=self.zero_if_empty,
            normalized=self.normalized,
            truncation=self.truncation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        told = f"tau={self.tau:g}"
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                told += f", {name}={value!r}"
        return told


_DEFAULTS = {
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "aux": "exp",
    "rho": 1.0,
    "max_weight": None,
    "zero_if_empty": False,
    "normalized": False,
    "truncation": None,
    "backend": "auto",
}


class SumExponentialLoss(CompSumLoss):
    """1 / p - 1 = sum_{j != y} exp(z_j - z_y): :class:`CompSumLoss` with tau = 0.

    Args:
        weight: [C] factor of each class.
        ignore_index: target that contributes nothing.
        reduction: "mean", "sum" or "none".
        max_weight: bound on the factor 1 / p, by which badly classified examples weigh more than in cross-entropy.
        backend: "auto" or "eager".

    Shape:
        [N, C, ...] and [N, ...] -> scalar, or [N, ...].

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288; the exponential form of Weston and Watkins, 1998.

    Example:
        >>> zoo.create("loss", "sum_exponential")(torch.zeros(1, 4), torch.tensor([0]))
        tensor(3.)
    """

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        max_weight: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            0.0,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            max_weight=max_weight,
            backend=backend,
        )


class LogisticLoss(CompSumLoss):
    """-log p, cross-entropy: :class:`CompSumLoss` with tau = 1.

    In float32 it keeps the loss of a confident row, 5e-17 at a margin of 38, where `F.cross_entropy` gives 0.

    Args:
        weight: [C] factor of each class.
        ignore_index: target that contributes nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        backend: "auto" or "eager".

    Shape:
        [N, C, ...] and [N, ...] or [N, C, ...] -> scalar, or [N, ...].

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288.

    Example:
        >>> zoo.create("loss", "logistic")(torch.zeros(1, 4), torch.tensor([0]))
        tensor(1.3863)
    """

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            1.0,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            backend=backend,
        )


class GeneralizedCrossEntropyLoss(CompSumLoss):
    """(1 - p^q) / q: :class:`CompSumLoss` with tau = 1 + q. Robust to wrong labels, slow where there are many classes.

    Args:
        q: in (0, 1]; 0.7 is the default of Zhang and Sabuncu, towards 0 it becomes cross-entropy.
        weight: [C] factor of each class.
        ignore_index: target that contributes nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        backend: "auto" or "eager".

    Shape:
        [N, C, ...] and [N, ...] or [N, C, ...] -> scalar, or [N, ...].

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Zhang and Sabuncu, "Generalized Cross Entropy Loss", NeurIPS 2018, arXiv:1805.07836, eq. 6; without their
        truncation.

    Example:
        >>> zoo.create("loss", "gce", q=0.5)(torch.zeros(1, 4), torch.tensor([0]))
        tensor(1.)
    """

    def __init__(
        self,
        q: float = 0.7,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            tau_from_q(q),
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            backend=backend,
        )


class AlphaLoss(CompSumLoss):
    """alpha / (alpha - 1) (1 - p^(1 - 1/alpha)): :class:`CompSumLoss` with tau = 2 - 1/alpha.

    Args:
        alpha: >= 1/2; 1/2 is the sum-exponential loss, 1 cross-entropy, infinity the mean absolute error.
        weight: [C] factor of each class.
        ignore_index: target that contributes nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        backend: "auto" or "eager".

    Shape:
        [N, C, ...] and [N, ...] or [N, C, ...] -> scalar, or [N, ...].

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Sypherd, Diaz, Cava, Dasarathy, Kairouz, Sankar, "A Tunable Loss Function for Robust Classification", IEEE
        Transactions on Information Theory 2022, arXiv:1906.02314. That it is this family was derived here.

    Example:
        >>> zoo.create("loss", "alpha_loss", alpha=2.0)(torch.zeros(1, 4), torch.tensor([0]))
        tensor(1.)
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        if not alpha >= 0.5:
            raise ValueError(f"AlphaLoss: alpha must be at least 1/2, got {alpha}")
        super().__init__(
            2 - 1 / alpha,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            backend=backend,
        )


class MeanAbsoluteErrorLoss(CompSumLoss):
    """1 - p, half the distance sum_k of softmax and one-hot target: :class:`CompSumLoss` with tau = 2.

    Args:
        weight: [C] factor of each class.
        ignore_index: target that contributes nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        backend: "auto" or "eager".

    Shape:
        [N, C, ...] and [N, ...] or [N, C, ...] -> scalar, or [N, ...].

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Ghosh, Kumar, Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks", AAAI 2017,
        arXiv:1712.09482; their sum of absolute differences is twice this.

    Example:
        >>> zoo.create("loss", "mae")(torch.zeros(1, 4), torch.tensor([0]))
        tensor(0.7500)
    """

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            2.0,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            backend=backend,
        )


class LinearCompSumLoss(TunableLoss):
    """A linear layer and the comp-sum loss of its scores, without the scores of all rows in memory.

    Args:
        in_features: D, width of the features.
        num_classes: C, rows of the matrix.
        tau: >= 0, as for :class:`CompSumLoss`.
        bias: whether the layer has one.
        weight: [C] factor of each class.
        ignore_index: target that contributes nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        chunk_size: rows at a time; None for as many as make 16 MiB of scores.
        backend: "auto" or "eager".
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        [..., D] features and [...] classes -> scalar, or [...] for reduction "none".

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288; initialised as `torch.nn.Linear`.

    Example:
        >>> head = zoo.LinearCompSumLoss(8, 1000, tau=1.2)
        >>> loss = head(torch.randn(4, 8), torch.tensor([1, 2, 3, 999]))
        >>> scores = head.linear(torch.randn(4, 8))
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        tau: float = 1.0,
        bias: bool = False,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        chunk_size: int | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tau)
        check_reduction(reduction, "LinearCompSumLoss")
        check_smoothing(label_smoothing, "LinearCompSumLoss")
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.chunk_size, self.backend = chunk_size, backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_comp_sum_loss(
            input,
            self.linear.weight,
            target,
            self.tau,
            linear_bias=self.linear.bias,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, reduction={self.reduction!r}"
