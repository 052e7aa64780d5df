"""The closed forms of PolyReLU and PolyNorm in plain PyTorch, without a graph: what the ops of `ops.py` run.

Why a file of its own: it is the third implementation beside `reference.py` (differentiable) and the native kernels, and
the one every device has. A pass over a large tensor costs a trip to memory, and the formulas need about fifteen; so
rows are taken in blocks small enough to stay in cache, and every step writes into a buffer that is reused. Nothing here
writes to an argument. All sums run in a fixed order, so two calls give the same bits.

Contract of the row ops, which native kernels keep too:
    x, grad and the outputs shaped like them are contiguous [R, D], D >= 1;
    weight is [order] or one set a row [R, order], in descending order of power; bias is [1], [R, 1] or None;
    stats is [order + 1, R] in the compute dtype: row k < order holds (mean(t^2p) + eps / scale^2p)^-1/2 of the power
    p = order - k, the last row 1 / scale, where t = x / scale and scale is `reference.row_scale`;
    parameter gradients come back in the compute dtype, shaped like the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels.ops import compute_dtype
from .reference import rescale_threshold, row_scale

# Of one buffer; three to five are alive at a time. PolyNorm of [512, 4096] float32, forward and backward on one EPYC
# core, takes 27, 17, 12.8, 10.5, 9.3 ms with blocks of 64, 128, 256, 512, 1024 KiB: smaller ones pay for calls, larger
# ones gain nothing and leave the caches of lesser machines. Other devices only need a bound on the temporary memory.
CPU_BLOCK_BYTES = 1024 * 1024
DEVICE_BLOCK_BYTES = 64 * 1024 * 1024


class _Workspace:
    """Reused buffers of one block of rows, and the blocks themselves."""

    def __init__(self, like: Tensor, rows: int, width: int, buffers: int) -> None:
        self.dtype = compute_dtype(like.dtype)
        budget = CPU_BLOCK_BYTES if like.device.type == "cpu" else DEVICE_BLOCK_BYTES
        self.rows, self.step = rows, min(max(1, budget // (width * self.dtype.itemsize)), max(1, rows))
        self._memory = torch.empty(buffers, self.step, width, dtype=self.dtype, device=like.device)

    def blocks(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """Each block of rows with its buffers."""
        for start in range(0, self.rows, self.step):
            stop = min(start + self.step, self.rows)
            yield slice(start, stop), list(self._memory[:, : stop - start].unbind())

    def upcast(self, block: Tensor, buffer: Tensor) -> Tensor:
        """The block in the compute dtype: itself, or a copy in the buffer."""
        return block if block.dtype is self.dtype else buffer.copy_(block)

    def target(self, block: Tensor, buffer: Tensor) -> Tensor:
        """Where to compute what ends up in `block`; follow with :meth:`store`."""
        return block if block.dtype is self.dtype else buffer

    def store(self, value: Tensor, block: Tensor) -> None:
        """Round into the block what was computed in :meth:`target`."""
        if block.dtype is not self.dtype:
            block.copy_(value)


def _weight_planes(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Coefficients as [order, rows, 1]."""
    weight = weight.to(dtype)
    planes = weight.t() if weight.ndim == 2 else weight.unsqueeze(-1).expand(-1, rows)
    return planes.unsqueeze(-1)


def _bias_column(bias: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor | None:
    """Constant terms as [rows, 1]."""
    return None if bias is None else bias.to(dtype).reshape(-1, 1).expand(rows, 1)


def _horner(t: Tensor, coefficients: Tensor, constant: Tensor | None, out: Tensor) -> Tensor:
    """sum_k coefficients[k] t^(n - k) + constant into `out`, which may not be `t`."""
    torch.mul(t, coefficients[0], out=out)
    for coefficient in coefficients[1:]:
        out.add_(coefficient).mul_(t)
    return out if constant is None else out.add_(constant)


def _power_sums(t: Tensor, sums: Tensor, square: Tensor, power: Tensor) -> None:
    """sums[k] = sum t^2p, p = order - k; leaves t^2 in `square`."""
    torch.mul(t, t, out=square)
    torch.sum(square, -1, out=sums[-1])
    previous = square
    for k in range(sums.shape[0] - 2, -1, -1):
        previous = torch.mul(previous, square, out=power)
        torch.sum(previous, -1, out=sums[k])


def _statistics(t: Tensor, stats: Tensor, eps: float, rms: bool, buffers: list[Tensor]) -> Tensor:
    """Fill one block of `stats`; returns the rows as they enter the polynomial, scaled where they must be.

    On the CPU the power sums themselves tell whether any row of the block is beyond the threshold. Elsewhere that would
    be a host sync, so the block is always scaled (by 1 for ordinary rows).
    """
    scaled, square, power = buffers
    sums, inverse, order = stats[:-1], stats[-1], stats.shape[0] - 1
    inverse.fill_(1.0)
    floor: float | Tensor = eps
    ordinary = False
    if t.device.type == "cpu":
        _power_sums(t, sums, square, power)
        ordinary = bool((sums[0] < rescale_threshold(order) ** (2 * order)).all())
    if not ordinary:
        torch.reciprocal(row_scale(torch.maximum(t.amax(-1), -t.amin(-1)), order), out=inverse)
        t = torch.mul(t, inverse.unsqueeze(-1), out=scaled)
        _power_sums(t, sums, square, power)
        floor = torch.stack([eps * inverse ** (2 * p) for p in range(order, 0, -1)])
    if rms:
        sums.div_(t.shape[-1])
    sums.add_(floor).rsqrt_()
    return t


def _row_gradient(t: Tensor, g: Tensor, k: Tensor, rho: Tensor, rms: bool, buffers: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradient of sum_p k_p t^p with k_p = w_p rho_p(t): (dt in buffers[0], rho_p S_p, S_0).

    dt_j = g_j sum_p p k_p t_j^(p-1) - t_j sum_p c_p t_j^(2p-2),  c_p = p k_p rho_p^2 S_p / D,  S_p = sum_j g_j t_j^p.
    """
    dt, square, power = buffers
    order = rho.shape[0]
    moments = torch.empty_like(rho)
    torch.mul(g, t, out=power)
    for k_index in range(order - 1, -1, -1):
        if k_index < order - 1:
            power.mul_(t)
        torch.sum(power, -1, out=moments[k_index])
    moments.mul_(rho)
    p = torch.arange(order, 0, -1, dtype=t.dtype, device=t.device).view(-1, 1, 1)
    slopes = p * k
    # rho_p S_p first: rho_p^3 alone leaves float32 for large rows.
    pull = slopes * (moments * rho / (t.shape[-1] if rms else 1)).unsqueeze(-1)
    if order > 1:
        _horner(t, slopes[:-1], slopes[-1], dt).mul_(g)
        torch.mul(t, t, out=square)
        _horner(square, pull[:-1], pull[-1], power)
        dt.addcmul_(power, t, value=-1)
    else:
        torch.mul(g, slopes[0], out=dt)
        dt.sub_(torch.mul(t, pull[0], out=power))
    return dt, moments, g.sum(-1)


def _parameter_gradients(moments: Tensor, sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise [order, R] and [R] to the shapes of weight and bias."""
    if weight.ndim == 2:
        return moments.t().contiguous(), sums.unsqueeze(-1)
    return moments.sum(-1), sums.sum(-1, keepdim=True)


def poly_norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """PolyNorm of the rows of x [R, D]: (y, stats), see the contract above."""
    (rows, width), order = x.shape, weight.shape[-1]
    work = _Workspace(x, rows, width, 4)
    y, stats = torch.empty_like(x), torch.empty(order + 1, rows, dtype=work.dtype, device=x.device)
    planes, constants = _weight_planes(weight, rows, work.dtype), _bias_column(bias, rows, work.dtype)
    for block, (out, *buffers) in work.blocks():
        t = _statistics(work.upcast(x[block], buffers[0]), stats[:, block], eps, rms, buffers)
        k = planes[:, block] * stats[:-1, block].unsqueeze(-1)
        target = work.target(y[block], out)
        work.store(_horner(t, k, None if constants is None else constants[block], target), y[block])
    return y, stats


def poly_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`poly_norm_forward`: (dx, dweight, dbias)."""
    (rows, width), order = x.shape, weight.shape[-1]
    work = _Workspace(x, rows, width, 5)
    dx = torch.empty_like(x)
    moments = torch.empty(order, rows, dtype=work.dtype, device=x.device)
    sums = torch.empty(rows, dtype=work.dtype, device=x.device)
    planes = _weight_planes(weight, rows, work.dtype)
    is_scaled = _is_scaled(stats)
    for block, (t_buffer, g_buffer, out, *buffers) in work.blocks():
        rho, inverse = stats[:-1, block], stats[-1, block].unsqueeze(-1)
        t, g = work.upcast(x[block], t_buffer), work.upcast(grad[block], g_buffer)
        if is_scaled:
            t = torch.mul(t, inverse, out=t_buffer)
        k, target = planes[:, block] * rho.unsqueeze(-1), work.target(dx[block], out)
        dt, moments[:, block], sums[block] = _row_gradient(t, g, k, rho, rms, [target, *buffers])
        work.store(dt.mul_(inverse) if is_scaled else dt, dx[block])
    return dx, *_parameter_gradients(moments, sums, weight)


def _is_scaled(stats: Tensor) -> bool:
    """Whether any row was scaled; only asked where the answer costs no host sync, else True."""
    return stats.device.type != "cpu" or bool((stats[-1] != 1).any())


def poly_norm_mul_forward(
    x: Tensor,
    mul: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    eps: float,
    rms: bool,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """PolyNorm(x) * mul * scores, x and mul [R, D] clamped first, scores [R]: (o, stats)."""
    (rows, width), order = x.shape, weight.shape[-1]
    work = _Workspace(x, rows, width, 5)
    o, stats = torch.empty_like(x), torch.empty(order + 1, rows, dtype=work.dtype, device=x.device)
    planes, constants = _weight_planes(weight, rows, work.dtype), _bias_column(bias, rows, work.dtype)
    factors = None if scores is None else scores.to(work.dtype).unsqueeze(-1)
    for block, (out, m_buffer, *buffers) in work.blocks():
        gate = _clamped(work.upcast(x[block], buffers[0]), clamp, buffers[0])
        t = _statistics(gate, stats[:, block], eps, rms, buffers)
        k = planes[:, block] * stats[:-1, block].unsqueeze(-1)
        target = work.target(o[block], out)
        _horner(t, k, None if constants is None else constants[block], target)
        target.mul_(_clamped(work.upcast(mul[block], m_buffer), clamp, m_buffer))
        if factors is not None:
            target.mul_(factors[block])
        work.store(target, o[block])
    return o, stats


def poly_norm_mul_backward(
    grad: Tensor,
    x: Tensor,
    mul: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    stats: Tensor,
    rms: bool,
    clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`poly_norm_mul_forward`: (dx, dmul, dweight, dbias, dscores)."""
    (rows, width), order = x.shape, weight.shape[-1]
    work = _Workspace(x, rows, width, 7)
    dx, dmul = torch.empty_like(x), torch.empty_like(mul)
    moments = torch.empty(order, rows, dtype=work.dtype, device=x.device)
    sums, dscores = (torch.empty(rows, dtype=work.dtype, device=x.device) for _ in range(2))
    planes, constants = _weight_planes(weight, rows, work.dtype), _bias_column(bias, rows, work.dtype)
    factors = None if scores is None else scores.to(work.dtype).unsqueeze(-1)
    is_scaled = _is_scaled(stats)
    for block, (t_buffer, m_buffer, g_buffer, out, m_out, *buffers) in work.blocks():
        rho, inverse = stats[:-1, block], stats[-1, block].unsqueeze(-1)
        t = _clamped(work.upcast(x[block], t_buffer), clamp, t_buffer)
        m = _clamped(work.upcast(mul[block], m_buffer), clamp, m_buffer)
        g = work.upcast(grad[block], g_buffer)
        if is_scaled:
            t = torch.mul(t, inverse, out=t_buffer)
        k, target = planes[:, block] * rho.unsqueeze(-1), work.target(dmul[block], m_out)
        _horner(t, k, None if constants is None else constants[block], target).mul_(g)
        torch.sum(torch.mul(target, m, out=buffers[0]), -1, out=dscores[block])
        g = torch.mul(g, m, out=g_buffer)
        if factors is not None:
            target.mul_(factors[block])
            g.mul_(factors[block])
        work.store(_masked(target, mul[block], clamp), dmul[block])
        target = work.target(dx[block], out)
        dt, moments[:, block], sums[block] = _row_gradient(t, g, k, rho, rms, [target, *buffers])
        work.store(_masked(dt.mul_(inverse) if is_scaled else dt, x[block], clamp), dx[block])
    return dx, dmul, *_parameter_gradients(moments, sums, weight), dscores


def _clamped(t: Tensor, clamp: float | None, buffer: Tensor) -> Tensor:
    return t if clamp is None else torch.clamp(t, -clamp, clamp, out=buffer)


def _masked(gradient: Tensor, argument: Tensor, clamp: float | None) -> Tensor:
    """No gradient beyond the clamp, in place."""
    return gradient if clamp is None else gradient.mul_(argument.to(gradient.dtype).abs() <= clamp)


def poly_relu_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Polynomial of relu(x) for contiguous x of any shape, weight [order], bias [1] or None."""
    y = torch.empty_like(x)
    source, result = x.view(-1, 1), y.view(-1, 1)
    work = _Workspace(x, x.numel(), 1, 2)
    weight, constant = weight.to(work.dtype), None if bias is None else bias.to(work.dtype)
    for block, (rectified, out) in work.blocks():
        torch.clamp_min(work.upcast(source[block], rectified), 0, out=rectified)
        target = work.target(result[block], out)
        work.store(_horner(rectified, weight, constant, target), result[block])
    return y


def poly_relu_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`poly_relu_forward`: (dx, dweight, dbias); the slope at 0 is 0, as torch has it for relu."""
    order, dx = weight.shape[0], torch.empty_like(x)
    source, cotangent, result = x.view(-1, 1), grad.view(-1, 1), dx.view(-1, 1)
    work = _Workspace(x, x.numel(), 1, 4)
    # One row of partial sums a block: sum g r^p for p = order .. 0; added up at the end in one fixed order.
    partial = torch.zeros(-(-work.rows // work.step), order + 1, dtype=work.dtype, device=x.device)
    slopes = weight.to(work.dtype) * torch.arange(order, 0, -1, dtype=work.dtype, device=x.device)
    for sums, (block, (rectified, g_buffer, power, out)) in zip(partial, work.blocks(), strict=True):
        torch.clamp_min(work.upcast(source[block], rectified), 0, out=rectified)
        g = work.upcast(cotangent[block], g_buffer)
        target = work.target(result[block], out)
        if order > 1:
            _horner(rectified, slopes[:-1], slopes[-1], target).mul_(g)
        else:
            torch.mul(g, slopes[0], out=target)
        # relu's own backward: 0 where rectified <= 0, vectorised where masked_fill_ is not; a NaN keeps its NaN.
        torch.ops.aten.threshold_backward.grad_input(target, rectified, 0, grad_input=target)
        work.store(target, result[block])
        sums[order] = g.sum()
        torch.mul(g, rectified, out=power)
        for k in range(order - 1, -1, -1):
            if k < order - 1:
                power.mul_(rectified)
            sums[k] = power.sum()
    totals = partial.sum(0)
    return dx, totals[:-1].clone(), totals[-1:].clone()
