"""PolyNorm as the gate of a linear unit, and the feed-forward block around any activation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...registry import factory
from ...spec import ActivationSpec
from .coefficients import (
    CoeffMap,
    Init,
    check_backend,
    check_coefficient_map,
    check_norm,
    check_tokens,
    describe,
    empty_coefficients,
    fill_coefficients,
    initial_coefficients,
    mapped_coefficients,
)
from .functional import Backend, Norm, poly_norm_mul

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PolyNormGLU(nn.Module):
    """Gated unit PolyNorm(gate) * up * scores; see :func:`poly_norm_mul`.

    Args:
        order: highest power (3, sec. 2).
        eps: see :class:`PolyNorm`.
        norm: see :class:`PolyNorm`.
        clamp: bound on the magnitudes of gate and up, applied first; None leaves them.
        bias: see :class:`PolyNorm`.
        init: see :class:`PolyNorm`.
        coeff_map: see :class:`PolyNorm`.
        bias_clamp: see :class:`PolyNorm`.
        out_scale: see :class:`PolyNorm`.
        num_groups: see :class:`PolyNorm`.
        process_group: see :class:`PolyNorm`.
        backend: see :class:`PolyNorm`.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        [..., D], [..., D] -> [..., D]. State as :class:`PolyNorm`.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Zhuo et al., arXiv:2411.03884, eq. 3, on the gate of a GLU as later models use it; the paper's own feed-forward
        has no gate.

    Example:
        >>> glu = PolyNormGLU(1, init=1.0, norm="l2")
        >>> glu(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0]])).tolist()
        [[6.0, 0.0]]
    """

    def __init__(
        self,
        order: int = 3,
        eps: float = 1e-6,
        *,
        norm: Norm = "rms",
        clamp: float | None = None,
        bias: bool = True,
        init: Init = None,
        coeff_map: CoeffMap | None = None,
        bias_clamp: float | None = None,
        out_scale: float = 1.0,
        num_groups: int | None = None,
        process_group: ProcessGroup | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._init = initial_coefficients("polynorm_glu", order, init)
        check_norm("polynorm_glu", eps, norm)
        check_backend("polynorm_glu", backend)
        check_coefficient_map("polynorm_glu", coeff_map, bias_clamp, num_groups)
        if clamp is not None and not clamp > 0:
            raise ValueError(f"polynorm_glu: clamp must be positive or None, got {clamp}")
        self.order, self.eps, self.norm, self.clamp = order, eps, norm, clamp
        self.coeff_map, self.bias_clamp, self.out_scale = coeff_map, bias_clamp, out_scale
        self.num_groups, self.process_group, self.backend = num_groups, process_group, backend
        self.weight, self.bias = empty_coefficients(order, bias, num_groups, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to the start values."""
        fill_coefficients(self.weight, self.bias, self._init)

    def coefficients(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias the formula uses: the stored ones after coeff_map, bias_clamp and out_scale."""
        return mapped_coefficients(self.weight, self.bias, self.coeff_map, self.bias_clamp, self.out_scale)

    def forward(
        self,
        gate: Tensor,
        up: Tensor,
        scores: Tensor | None = None,
        tokens_per_expert: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """PolyNorm(gate) * up * scores.

        Args:
            gate: [..., D].
            up: [..., D].
            scores: [...] one factor a row, e.g. a router's.
            tokens_per_expert: [num_groups] consecutive rows of each group; only with num_groups.

        Raises:
            ValueError: if the shapes do not fit, or tokens_per_expert is missing or unexpected.
        """
        check_tokens("polynorm_glu", self.num_groups, tokens_per_expert)
        weight, bias = self.coefficients()
        return poly_norm_mul(
            gate,
            up,
            weight,
            bias,
            eps=self.eps,
            norm=self.norm,
            clamp=self.clamp,
            scores=scores,
            tokens_per_expert=tokens_per_expert,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        options = {
            "clamp": (self.clamp, None),
            "bias": (self.bias is not None, True),
            "coeff_map": (self.coeff_map, None),
            "bias_clamp": (self.bias_clamp, None),
            "out_scale": (self.out_scale, 1.0),
            "num_groups": (self.num_groups, None),
        }
        return describe(self.order, self.eps, self.norm, options)


class PolyFFN(nn.Module):
    """Transformer feed-forward: down(act(up(x))), or gated down(act(gate(x)) * up(x)).

    Args:
        dim: width of the input and output.
        hidden: width between; 4 * dim plain, 8/3 * dim gated, rounded up to a multiple of 8, so that two matrices and
            three have the same number of parameters (96: 384 and 256).
        act: the activation, by registry name, mapping, dotted path, or as a class or function that builds it.
        gated: multiply by a second projection, as SwiGLU does with act="torch.nn.SiLU".
        bias: constant terms of the projections (the paper's models have none).
        drop: dropout rate after the activation; the paper uses none.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        [..., dim] -> [..., dim].

    Raises:
        ValueError: if dim, hidden or drop is out of range.
        TypeError: if act is a module instead of something that builds one.
        UnknownComponentError: if act names nothing.

    Source:
        Zhuo et al., arXiv:2411.03884, sec. 2: PolyNorm takes the place of the activation of a feed-forward without
        gate, whose width is 3/2 of the gated one.

    Example:
        >>> PolyFFN(96, act="polyrelu")(torch.zeros(2, 96)).shape
        torch.Size([2, 96])
        >>> PolyFFN(96, act="torch.nn.SiLU", gated=True).hidden
        256
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        act: ActivationSpec = "polynorm",
        *,
        gated: bool = False,
        bias: bool = False,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or (hidden is not None and hidden < 1):
            raise ValueError(f"poly_ffn: dim and hidden must be >= 1, got dim={dim}, hidden={hidden}")
        if not 0 <= drop < 1:
            raise ValueError(f"poly_ffn: drop must be in [0, 1), got {drop}")
        if hidden is None:
            hidden = -(-8 * dim // 24) * 8 if gated else 4 * dim
        self.dim, self.hidden, self.gated = dim, hidden, gated
        self.gate = nn.Linear(dim, hidden, bias, device=device, dtype=dtype) if gated else None
        self.up = nn.Linear(dim, hidden, bias, device=device, dtype=dtype)
        self.act = _build_activation(act, device, dtype)
        self.drop = nn.Dropout(drop) if drop else None
        self.down = nn.Linear(hidden, dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(h if self.drop is None else self.drop(h))


def _build_activation(
    spec: str | dict[str, Any] | Callable[..., Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    """The activation, on the device and in the dtype where its constructor takes them."""
    if isinstance(spec, nn.Module):
        raise TypeError(f"poly_ffn: act must be a name, a class or a function that builds the activation, got {spec!r}")
    build = factory("activation", spec)
    try:
        takes = inspect.signature(build).parameters
    except ValueError:  # a builtin without a signature
        takes = {}
    options = {"device": device, "dtype": dtype}
    return build(**{name: value for name, value in options.items() if name in takes and value is not None})
