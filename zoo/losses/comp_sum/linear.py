"""linear_comp_sum_loss: the last linear layer and its loss together, a few rows at a time.

The scores of all rows never exist at once. A chunk of rows is multiplied out, its gradient taken, and that gradient
multiplied into those of the features and of the matrix before the next chunk comes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.ops import compute_dtype, prefers_formula, prepare
from .functional import Backend, Reduction, check_classes, check_reduction, check_smoothing, check_tau, comp_sum_loss
from .ops import comp_sum_backward, comp_sum_forward

_CHUNK_BYTES = 8 * 2**20  # of a chunk's scores
_FEWEST_ROWS = 64  # each chunk reads and writes the matrix's gradient once: a few rows at a time would do little else


def linear_comp_sum_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    tau: float = 1.0,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """comp_sum_loss(input @ linear_weight.T + linear_bias, target, tau) without the scores of all rows in memory.

    Extra memory is that of one chunk of scores and, for reductions to a scalar, of the gradients, which the forward
    makes (three matrix products in all; "none" takes four: its backward computes the scores again).

    Args:
        input: [..., D] features.
        linear_weight: [C, D] one row a class.
        target: classes [...], of any integer dtype.
        tau: >= 0, one for all rows.
        linear_bias: [C] or None.
        weight, ignore_index, reduction, label_smoothing: as for :func:`comp_sum_loss`.
        chunk_size: rows at a time; None for as many as make 8 MiB of scores, at least 64.
        backend: "auto", or "eager" for the plain composition, which torch.export and torch.func also use.

    Returns:
        A scalar, or [...] for reduction "none"; float64 for float64 features, else float32.

    Raises:
        ValueError: if shapes or options do not fit.
        TypeError: if target is not integer.
        IndexError: if a class is out of range (on the CPU).

    Source:
        As :func:`comp_sum_loss`.

    Example:
        >>> features, head = torch.ones(3, 4), torch.zeros(5, 4)
        >>> linear_comp_sum_loss(features, head, torch.tensor([0, 1, 4]), tau=2)
        tensor(0.8000)
    """
    target = _check(input, linear_weight, linear_bias, target, weight, label_smoothing, chunk_size)
    tau = check_tau(tau, "linear_comp_sum_loss")
    check_reduction(reduction, "linear_comp_sum_loss")
    shape, target = target.shape, target.reshape(-1).long()
    check_classes(target, linear_weight.shape[0], ignore_index)
    features = input.reshape(-1, input.shape[-1])
    # Under torch.compile the composition as well: a loop over chunks would be unrolled.
    if prefers_formula("linear_comp_sum_loss", backend, input.device.type) or torch.compiler.is_compiling():
        options: dict[str, Any] = {
            "weight": weight,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "backend": backend,
        }
        scores = F.linear(features, linear_weight, linear_bias)
        loss = comp_sum_loss(scores, target, tau, reduction=reduction, **options)
        return loss.reshape(shape) if reduction == "none" else loss
    prepare(input)
    device = input.device.type
    if torch.is_autocast_enabled(device):  # here, where autograd sees the cast: inside it would be repeated by chunk
        low = torch.get_autocast_dtype(device)
        features, linear_weight = features.to(low), linear_weight.to(low)
        linear_bias = None if linear_bias is None else linear_bias.to(low)
    kept = target != ignore_index
    dtype = compute_dtype(features.dtype)
    if weight is None:
        factor = kept.to(dtype)
    else:
        factor = torch.where(kept, weight.to(dtype)[target.clamp(0, len(weight) - 1)], 0)
    total = factor.sum()
    problem = _Problem(target, factor, weight, tau, ignore_index, label_smoothing, _rows(linear_weight, chunk_size))
    with torch.autocast(device, enabled=False):
        if reduction == "none":
            return _Rows.apply(problem, features, linear_weight, linear_bias).reshape(shape)
        scale = torch.ones_like(total) if reduction == "sum" else 1 / total
        return _Total.apply(problem, scale, features, linear_weight, linear_bias)


def _rows(linear_weight: Tensor, chunk_size: int | None) -> int:
    per_row = linear_weight.shape[0] * compute_dtype(linear_weight.dtype).itemsize
    return chunk_size or max(_FEWEST_ROWS, _CHUNK_BYTES // max(1, per_row))


class _Problem:
    """What is not differentiated: targets and options, and the loss and gradient of a chunk of scores."""

    def __init__(
        self,
        target: Tensor,
        factor: Tensor,
        weight: Tensor | None,
        tau: float,
        ignore_index: int,
        label_smoothing: float,
        chunk: int,
    ) -> None:
        self.target, self.factor, self.weight, self.tau = target, factor, weight, tau
        self.ignore_index, self.label_smoothing, self.chunk = ignore_index, label_smoothing, chunk

    def chunks(self) -> list[slice]:
        return [slice(first, first + self.chunk) for first in range(0, len(self.target), self.chunk)]

    def losses(self, rows: slice, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted loss of each row, and the statistics its gradient needs."""
        loss, statistics = comp_sum_forward(
            scores.unsqueeze(2), self.target[rows, None], None, self.tau, float("inf"), self.ignore_index
        )
        return loss.squeeze(1) * self.factor[rows], statistics

    def slope(self, rows: slice, scores: Tensor, statistics: Tensor, grad: Tensor) -> Tensor:
        """Gradient for the scores, given that for the weighted losses."""
        arguments = (scores.unsqueeze(2), self.target[rows, None], statistics, None, self.tau, float("inf"))
        return comp_sum_backward((grad * self.factor[rows])[:, None], *arguments, self.ignore_index).squeeze(2)

    def both(self, rows: slice, scores: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weighted losses of a chunk and, where `grad` is given, its gradient for the scores."""
        if not self.label_smoothing:
            loss, statistics = self.losses(rows, scores)
            return loss, None if grad is None else self.slope(rows, scores, statistics, grad)
        with torch.set_grad_enabled(grad is not None):
            scores = scores.detach().requires_grad_(grad is not None)
            loss = self.formula(scores, rows)
            slope = None if grad is None else torch.autograd.grad(loss, scores, grad)[0]
        return loss.detach(), slope

    def formula(self, scores: Tensor, rows: slice = slice(None)) -> Tensor:
        """The weighted losses as autograd sees them."""
        return comp_sum_loss(
            scores,
            self.target[rows],
            self.tau,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )


class _Gradients:
    """Gradients of features, matrix and bias, added up chunk by chunk in the compute dtype."""

    def __init__(self, features: Tensor, matrix: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        self.features, self.matrix, self.bias = features, matrix, bias
        dtype = compute_dtype(matrix.dtype)
        self.of_features = torch.empty_like(features) if wanted[0] else None
        # nothing is added to zeros where the first chunk can write: the matrix is large
        self.written = not len(features) or dtype is not matrix.dtype
        make = torch.zeros_like if self.written else torch.empty_like
        self.of_matrix = make(matrix, dtype=dtype) if wanted[1] else None
        self.of_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and wanted[2] else None

    def add(self, rows: slice, slope: Tensor) -> None:
        if self.of_features is not None:
            torch.mm(slope, self.matrix, out=self.of_features[rows])
        if self.of_matrix is not None:
            if self.of_matrix.dtype is slope.dtype:
                self.of_matrix.addmm_(slope.t(), self.features[rows], beta=int(self.written))
            else:
                self.of_matrix += slope.t() @ self.features[rows]
            self.written = True
        if self.of_bias is not None:
            self.of_bias += slope.sum(0, dtype=self.of_bias.dtype)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        of_matrix = None if self.of_matrix is None else self.of_matrix.to(self.matrix.dtype)
        of_bias = None if self.of_bias is None or self.bias is None else self.of_bias.to(self.bias.dtype)
        return self.of_features, of_matrix, of_bias


class _Total(torch.autograd.Function):
    """scale * the sum of the weighted losses, its gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, problem: _Problem, scale: Tensor, features: Tensor, matrix: Tensor, bias: Tensor | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        gradients = _Gradients(features, matrix, bias, wanted) if any(wanted) else None
        total = torch.zeros((), dtype=compute_dtype(features.dtype), device=features.device)
        for rows in problem.chunks():
            scores = F.linear(features[rows], matrix, bias)
            grad = None if gradients is None else scale.expand(len(scores))
            loss, slope = problem.both(rows, scores, grad)
            total += loss.sum()
            if gradients is not None and slope is not None:
                gradients.add(rows, slope)
        ctx.problem = problem
        ctx.save_for_backward(scale, features, matrix, bias, *(gradients.result() if gradients else (None,) * 3))
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scale, features, matrix, bias, *made = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, *_differentiable(ctx.problem, grad * scale, features, matrix, bias)
        return None, None, *(None if t is None else t * grad.to(t.dtype) for t in made)


class _Rows(torch.autograd.Function):
    """The weighted loss of each row; the backward computes the scores again."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, features: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        losses = [problem.both(rows, F.linear(features[rows], matrix, bias), None)[0] for rows in problem.chunks()]
        ctx.problem = problem
        ctx.save_for_backward(features, matrix, bias)
        return torch.cat(losses) if losses else features.new_zeros(0, dtype=compute_dtype(features.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        features, matrix, bias = ctx.saved_tensors
        problem = ctx.problem
        if torch.is_grad_enabled():
            return None, *_differentiable(problem, grad, features, matrix, bias)
        gradients = _Gradients(features, matrix, bias, ctx.needs_input_grad[1:])
        for rows in problem.chunks():
            scores = F.linear(features[rows], matrix, bias)
            _, slope = problem.both(rows, scores, grad[rows])
            assert slope is not None
            gradients.add(rows, slope)
        return None, *gradients.result()


def _differentiable(
    problem: _Problem, grad: Tensor, features: Tensor, matrix: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients with a graph behind them, for second derivatives: through all scores at once."""
    sources = [t.view_as(t) if t is not None and t.requires_grad else t for t in (features, matrix, bias)]
    wanted = [t for t in sources if t is not None and t.requires_grad]
    losses = problem.formula(F.linear(*sources))  # type: ignore[arg-type]
    found = iter(torch.autograd.grad(losses, wanted, grad.expand_as(losses), create_graph=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in sources)


def _check(
    input: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    chunk_size: int | None,
) -> Tensor:
    name = "linear_comp_sum_loss"
    if not input.is_floating_point() or input.ndim == 0:
        raise ValueError(f"{name}: input must be [..., D] floating point, got {input.dtype} {tuple(input.shape)}")
    if matrix.ndim != 2 or matrix.shape[1] != input.shape[-1] or matrix.shape[0] == 0:
        raise ValueError(
            f"{name}: linear_weight must be [classes, {input.shape[-1]}] for features {tuple(input.shape)}, got"
            f" {tuple(matrix.shape)}"
        )
    classes = matrix.shape[0]
    for of, tensor in (("linear_bias", bias), ("weight", weight)):
        if tensor is not None and tensor.shape != (classes,):
            raise ValueError(f"{name}: {of} must have shape ({classes},), got {tuple(tensor.shape)}")
    if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
        raise TypeError(f"{name}: target must hold integer classes, got {target.dtype}; weights go to comp_sum_loss")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"{name}: features {tuple(input.shape)} need classes of shape {tuple(input.shape[:-1])}, got"
            f" {tuple(target.shape)}"
        )
    check_smoothing(label_smoothing, name)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be at least 1, got {chunk_size}")
    return target
