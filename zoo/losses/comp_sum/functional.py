"""comp_sum_loss: checks, layout, and the choice between op and formula.

Why a file of its own: the ops see only [B, C, S] and rows without weights; what `F.cross_entropy` takes is turned into
those here, and its rules for weights and means are applied to what comes back.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.ops import compute_dtype, prefers_formula, prepare, transformed
from ...warn import warn_once
from .ops import fused_comp_sum
from .reference import comp_sum_reference, phi_of_nll, soft_comp_sum_reference

Reduction = Literal["mean", "sum", "none"]
Aux = Literal["exp", "rho_logistic", "rho_margin"]
Backend = Literal["auto", "eager"]


def comp_sum_loss(
    input: Tensor,
    target: Tensor,
    tau: float | Tensor = 1.0,
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
) -> Tensor:
    """((1 + u)^(1 - tau) - 1) / (1 - tau), u = sum_{j != y} exp(z_y - z_j)^-1; cross-entropy, log(1 + u), at tau = 1.

    tau = 0 is the sum-exponential loss, 1 cross-entropy, 1 < tau < 2 generalised cross-entropy with q = tau - 1, 2 the
    mean absolute error 1 - p. The gradient is that of cross-entropy times p^(tau - 1), p the target's probability.
    Shapes, weights, smoothing and means follow `torch.nn.functional.cross_entropy`.

    Args:
        input: [C], [N, C] or [N, C, d1, ...] scores (logits), floating point.
        target: classes, [], [N] or [N, d1, ...], of any integer dtype; or one weight >= 0 a class, shaped like input
            and floating point. Weights need not sum to 1: the loss is sum_k target_k l(input, k).
        tau: >= 0. A tensor is broadcast to the loss of each element, one a sample or token, and may require a gradient.
        weight: [C] factor of each class.
        ignore_index: target that contributes nothing; without meaning where targets are weights.
        reduction: "mean" divides by the sum of the targets' weights (by the number of elements where targets are
            weights), "sum", or "none".
        label_smoothing: in [0, 1], share of the target spread evenly over all classes. Below tau = 1 improbable classes
            weigh so much that it rarely helps; that warns once.
        aux: "exp" is the comp-sum family. "rho_logistic" sums log2(1 + exp(-(z_y - z_j) / rho)) (AISTATS 2023, base 2),
            "rho_margin" min(max(0, 1 - (z_y - z_j) / rho), 1), which is flat in parts; both for class targets only.
        rho: > 0, divides the score differences.
        max_weight: >= 1, bound on the factor p^(tau - 1) for tau < 1: where it would be exceeded the loss goes on
            linearly in -log p. None for no bound.
        zero_if_empty: 0, with a gradient of 0, instead of NaN for the mean of nothing.
        normalized: over the sum of the losses of all classes (Ma et al., "Normalized Loss Functions for Deep Learning
            with Noisy Labels", ICML 2020, arXiv:2006.13554); for class targets and tau >= 1.
        truncation: in (0, 1): where p is less the loss stays what it is there, and such a sample has no gradient (Zhang
            and Sabuncu 2018); for class targets.
        backend: "auto" runs the fused closed form, which keeps the scores and two numbers a row for the backward;
            "eager" the plain formula in PyTorch. torch.export and torch.func use the formula.

    Returns:
        A scalar, or for reduction "none" the loss of each target; float64 for float64 scores, else float32. A NaN among
        the scores of a row makes that row NaN; so does +inf, but at the target, where the loss is 0. A score of -inf
        takes its class out. On CUDA a class out of range makes its row NaN.

    Raises:
        ValueError: if shapes, tau, rho, max_weight, label_smoothing, reduction or aux do not fit.
        TypeError: if target is bool or complex, or input no floating point.
        IndexError: if a class is out of range (on the CPU); the message names the first.

    Source:
        Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
        arXiv:2304.07288. No normalisation constant is used: members are compared as they are.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> comp_sum_loss(scores, torch.tensor([0, 1]), tau=1.5, reduction="none")
        tensor([0.1230, 0.2900])
    """
    input, target, flat = _check(input, target)
    soft = target.is_floating_point()
    tau = _check_tau(tau, target.shape[:1] + target.shape[2:] if soft else target.shape, input)
    _check_options(input, weight, reduction, label_smoothing, aux, rho, max_weight, soft)
    if normalized or truncation is not None:
        _check_changes(tau, normalized, truncation, aux, soft or bool(label_smoothing))
    cap = math.inf if max_weight is None else math.log(max_weight)
    if label_smoothing and (tau < 1 if isinstance(tau, float) else False):
        warn_once(
            "comp_sum_loss: label smoothing with tau < 1 weighs the least probable classes most; use tau >= 1, or"
            " max_weight",
            UserWarning,
        )
    if aux == "exp" and rho != 1:
        input = input / rho
    if soft:
        loss, total = _of_weights(input, target, tau, weight, label_smoothing, cap)
    else:
        changes = (normalized, truncation)
        loss, total = _of_classes(
            input, target, tau, weight, ignore_index, label_smoothing, aux, rho, cap, changes, backend
        )
    return reduce(loss.squeeze(0) if flat else loss, total, reduction, zero_if_empty)


def comp_sum_from_nll(nll: Tensor, tau: float | Tensor, *, max_weight: float | None = None) -> Tensor:
    """The comp-sum loss of rows whose cross-entropy -log p is known, from whatever kernel.

    The chain rule supplies the factor p^(tau - 1), so the gradient is right for every differentiable nll.

    Args:
        nll: any shape, >= 0: the result of a cross-entropy with reduction "none".
        tau, max_weight: as for :func:`comp_sum_loss`; a tensor tau is broadcast against nll.

    Returns:
        Shaped like nll; float64 for float64, else float32.

    Raises:
        ValueError: if tau or max_weight is out of range.
        TypeError: if nll is no floating point.

    Source:
        Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288.

    Example:
        >>> comp_sum_from_nll(torch.tensor([0.5, 2.0]), tau=2)
        tensor([0.3935, 0.8647])
    """
    if not nll.is_floating_point():
        raise TypeError(f"comp_sum_from_nll: nll must be floating point, got {nll.dtype}")
    check_max_weight(max_weight, "comp_sum_from_nll")
    tau = check_tau(tau, "comp_sum_from_nll") if not isinstance(tau, Tensor) else tau
    return phi_of_nll(nll.to(compute_dtype(nll.dtype)), tau, math.inf if max_weight is None else math.log(max_weight))


def tau_from_q(q: float) -> float:
    """tau of generalised cross-entropy, (1 - p^q) / q: q + 1.

    Args:
        q: in (0, 1].

    Raises:
        ValueError: if q is out of range.

    Source:
        Zhang and Sabuncu, "Generalized Cross Entropy Loss", NeurIPS 2018, arXiv:1805.07836, eq. 6.
    """
    if not 0 < q <= 1:
        raise ValueError(f"q must lie in (0, 1], got {q}; q -> 0 is cross-entropy, tau=1")
    return 1 + q


def row_losses(
    input: Tensor, target: Tensor, tau: float | Tensor, cap: float, ignore_index: int, backend: Backend
) -> Tensor:
    """l_tau of each element with a class for a target, without weights: the one place where op or formula is chosen."""
    if prefers_formula("comp_sum_loss", backend, input.device.type):
        return comp_sum_reference(input, target, tau, cap, ignore_index)
    scores, rows = _as_rows(input, target)
    taus = _as_rows(input, tau)[1] if isinstance(tau, Tensor) else None
    arguments = (scores, rows, taus, 1.0 if isinstance(tau, Tensor) else tau, cap, ignore_index)
    if torch.compiler.is_compiling():
        loss = torch.ops.zoo.comp_sum(*arguments)[0]
    else:
        prepare(input)
        loss = fused_comp_sum(*arguments)
    return loss.reshape(target.shape)


def reduce(loss: Tensor, total: Tensor | float, reduction: Reduction, zero_if_empty: bool = False) -> Tensor:
    """The loss of each element as asked for; `total` is what the mean divides by."""
    if reduction == "none":
        return loss
    loss = loss.sum()
    if reduction == "sum":
        return loss
    if not zero_if_empty:
        return loss / total
    if isinstance(total, Tensor):
        return loss / torch.where(total == 0, 1, total)
    return loss / (total or 1)


def check_tau(tau: float, of: str) -> float:
    """tau as a float.

    Raises:
        ValueError: if it is negative, NaN or infinite.
    """
    if not (0 <= tau < math.inf):
        raise ValueError(f"{of}: tau must be finite and not negative, got {tau}")
    return float(tau)


def _as_rows(input: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scores as [B, C, S] and what belongs to their rows as [B, S], contiguous; without a copy for a dense layout."""
    last = input.movedim(1, -1)
    if last.is_contiguous():
        return last.reshape(-1, input.shape[1], 1), rows.reshape(-1, 1)
    if input.ndim == 2 and input.t().is_contiguous():
        return input.t().unsqueeze(0).contiguous(), rows.unsqueeze(0)
    return input.reshape(*input.shape[:2], -1).contiguous(), rows.reshape(input.shape[0], -1).contiguous()


def _of_classes(
    input: Tensor,
    target: Tensor,
    tau: float | Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    aux: Aux,
    rho: float,
    cap: float,
    changes: tuple[bool, float | None],
    backend: Backend,
) -> tuple[Tensor, Tensor | int]:
    """Loss of each element, and the sum of the weights of those that count."""
    target = target.long()
    every = check_classes(target, input.shape[1], ignore_index)
    plain = weight is None and not label_smoothing and aux == "exp" and changes == (False, None)
    if every and plain:  # no mask, no sum of it
        return row_losses(input, target, tau, cap, ignore_index, backend), target.numel()
    kept = target != ignore_index
    if aux == "exp":
        loss = row_losses(input, target, tau, cap, ignore_index, backend)
    else:
        u = _auxiliary_sum(input, torch.where(kept, target, 0), aux, rho)
        loss = torch.where(kept, phi_of_nll(torch.log1p(u), tau, cap), 0)
    loss = _changed(loss, input, tau, cap, *changes)
    if weight is None:
        total = kept.sum()
    else:
        weight = weight.to(loss.dtype)
        # clamped: a class out of range is a NaN row on CUDA, not an abort
        factor = torch.where(kept, weight[target.clamp(0, len(weight) - 1)], 0)
        loss, total = loss * factor, factor.sum()
    if label_smoothing:
        nll = -F.log_softmax(input, 1, dtype=loss.dtype)
        spread = phi_of_nll(nll, tau.unsqueeze(1) if isinstance(tau, Tensor) else tau, cap)
        if weight is not None:
            spread = spread * weight.view(-1, *[1] * (input.ndim - 2))
        spread = torch.where(kept.unsqueeze(1), spread, 0).sum(1)
        loss = (1 - label_smoothing) * loss + label_smoothing / input.shape[1] * spread
    return loss, total


def _of_weights(
    input: Tensor, target: Tensor, tau: float | Tensor, weight: Tensor | None, label_smoothing: float, cap: float
) -> tuple[Tensor, float]:
    classes = input.shape[1]
    target = target.to(compute_dtype(input.dtype))
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing / classes
    if weight is not None:
        target = target * weight.to(target.dtype).view(-1, *[1] * (input.ndim - 2))
    return soft_comp_sum_reference(input, target, tau, cap), input.numel() // classes


def _changed(
    loss: Tensor, input: Tensor, tau: float | Tensor, cap: float, normalized: bool, truncation: float | None
) -> Tensor:
    """The loss of each element, over that of all classes, or bounded."""
    if normalized:
        loss = loss / soft_comp_sum_reference(input, (input > -math.inf).to(loss.dtype), tau, cap)
    if truncation is not None:
        bound = phi_of_nll(loss.new_tensor(-math.log(truncation)), tau, cap)
        loss = torch.minimum(loss, bound)
    return loss


def _auxiliary_sum(input: Tensor, target: Tensor, aux: Aux, rho: float) -> Tensor:
    """sum_{j != y} Phi((z_y - z_j) / rho)."""
    index = target.unsqueeze(1)
    input = input.to(compute_dtype(input.dtype))
    differences = (input.gather(1, index) - input) / rho
    # softplus cuts exp(-s) off from s = 20 on, -logsigmoid does not
    phi = -F.logsigmoid(differences) / math.log(2) if aux == "rho_logistic" else (1 - differences).clamp(0, 1)
    classes = torch.arange(input.shape[1], device=input.device).view(-1, *[1] * (input.ndim - 2))
    return phi.masked_fill(classes == index, 0).sum(1)


def _check(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Scores with a batch axis, targets likewise, and whether that axis was added."""
    if not input.is_floating_point():
        raise TypeError(f"comp_sum_loss: input must be floating-point scores, got {input.dtype}")
    if input.ndim == 0:
        raise ValueError("comp_sum_loss: input must be [C], [N, C] or [N, C, d1, ...], got a scalar")
    if target.dtype is torch.bool or target.is_complex():
        raise TypeError(
            f"comp_sum_loss: target must be integer classes or floating-point weights, got {target.dtype};"
            " convert it with .long() or .to(input.dtype)"
        )
    flat = input.ndim == 1
    classes = input.shape[0] if flat else input.shape[1]
    if classes == 0:
        raise ValueError(f"comp_sum_loss: input must have at least one class, got shape {tuple(input.shape)}")
    expected = input.shape if target.is_floating_point() else input.shape[:0] if flat else _rows_of(input)
    if target.shape != expected:
        what = "weights like input" if target.is_floating_point() else "classes"
        raise ValueError(
            f"comp_sum_loss: input {tuple(input.shape)} needs {what} of shape {tuple(expected)}, got"
            f" {tuple(target.shape)}"
        )
    return (input.unsqueeze(0), target.unsqueeze(0), True) if flat else (input, target, False)


def _rows_of(input: Tensor) -> torch.Size:
    return input.shape[:1] + input.shape[2:]


def _check_tau(tau: float | Tensor, shape: torch.Size, input: Tensor) -> float | Tensor:
    """A float, or a tensor in the compute dtype shaped like the loss."""
    if not isinstance(tau, Tensor):
        return check_tau(tau, "comp_sum_loss")
    readable = tau.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()
    if readable and not bool(((tau >= 0) & tau.isfinite()).all()):
        raise ValueError(f"comp_sum_loss: every tau must be finite and not negative, got {tau.detach().tolist()}")
    if readable and tau.ndim == 0 and not tau.requires_grad:
        return float(tau)
    try:
        return tau.to(input.device, compute_dtype(input.dtype)).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"comp_sum_loss: tau {tuple(tau.shape)} does not broadcast to the loss of each element, {tuple(shape)}"
        ) from None


def _check_options(
    input: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    aux: str,
    rho: float,
    max_weight: float | None,
    soft: bool,
) -> None:
    if weight is not None and weight.shape != (input.shape[1],):
        raise ValueError(
            f"comp_sum_loss: weight must hold one factor a class, {input.shape[1]}, got shape {tuple(weight.shape)}"
        )
    check_reduction(reduction, "comp_sum_loss")
    check_smoothing(label_smoothing, "comp_sum_loss")
    check_aux(aux, rho, "comp_sum_loss")
    if aux != "exp" and (soft or label_smoothing):
        raise ValueError(
            f"comp_sum_loss: aux={aux!r} takes classes for targets, without label smoothing; use aux='exp'"
        )
    check_max_weight(max_weight, "comp_sum_loss")


def _check_changes(tau: float | Tensor, normalized: bool, truncation: float | None, aux: str, of_weights: bool) -> None:
    if of_weights or aux != "exp":
        raise ValueError(
            "comp_sum_loss: normalized and truncation take classes for targets, without label smoothing, and aux='exp'"
        )
    if normalized and truncation is not None:
        raise ValueError("comp_sum_loss: give normalized or truncation, not both")
    if normalized and isinstance(tau, float) and tau < 1:
        raise ValueError(f"comp_sum_loss: normalized takes tau >= 1, got {tau}: below, the sum of all losses overflows")
    if truncation is not None and not 0 < truncation < 1:
        raise ValueError(f"comp_sum_loss: truncation must lie in (0, 1), got {truncation}")


def check_reduction(reduction: str, of: str) -> None:
    """Raises ValueError for an unknown word."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{of}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_aux(aux: str, rho: float, of: str) -> None:
    """Raises ValueError for an unknown function or a rho that is not positive."""
    if aux not in ("exp", "rho_logistic", "rho_margin"):
        raise ValueError(f"{of}: aux must be 'exp', 'rho_logistic' or 'rho_margin', got {aux!r}")
    if not 0 < rho < math.inf:
        raise ValueError(f"{of}: rho must be positive and finite, got {rho}")


def check_smoothing(label_smoothing: float, of: str) -> None:
    """Raises ValueError for a share outside [0, 1]."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{of}: label_smoothing must lie in [0, 1], got {label_smoothing}")


def check_max_weight(max_weight: float | None, of: str) -> None:
    """Raises ValueError for a bound below 1."""
    if max_weight is not None and not max_weight >= 1:
        raise ValueError(f"{of}: max_weight must be at least 1, got {max_weight}")


def check_classes(target: Tensor, classes: int, ignore_index: int) -> bool:
    """Whether it is known that no target is ignored.

    Raises:
        IndexError: that names the first class out of range and its place; on the CPU only.
    """
    if target.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        return False  # reading it would wait for the device, or break the graph
    if not target.numel():
        return True
    low, high = map(int, target.aminmax())  # the usual case in one pass
    if low >= 0 and high < classes:
        return not low <= ignore_index <= high
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise IndexError(
            f"comp_sum_loss: target{place} is {int(target[tuple(place)])}, but there are {classes} classes;"
            f" give classes in [0, {classes}), or ignore_index, {ignore_index}"
        )
    return False
