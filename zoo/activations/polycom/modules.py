"""The activations as modules; thin shells over `functional.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

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
from .functional import Backend, Norm, Rho, poly_com, poly_norm, poly_relu

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PolyReLU(nn.Module):
    """Learned polynomial of the rectified input: sum_p a_p max(0, x)^p; see :func:`poly_relu`.

    Args:
        order: highest power (3, sec. 2).
        bias: learn the constant term a_0.
        init: start value of every coefficient, or one a power from x^order down; 1 / order by default (sec. 2). The
            constant term starts at 0.
        backend: "auto" or "eager", see :func:`poly_relu`.
        inplace: accepted because timm's networks pass it, and never done: the backward needs x.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        any -> same. State: weight [order], bias [1].

    Raises:
        ValueError: if order, init or backend is out of range.

    Source:
        Zhuo et al., "Polynomial Composition Activations", ICLR 2025, arXiv:2411.03884, eq. 2.

    Example:
        >>> relu = PolyReLU(3, init=(0, 0, 1))
        >>> relu(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """

    def __init__(
        self,
        order: int = 3,
        *,
        bias: bool = True,
        init: Init = None,
        backend: Backend = "auto",
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._init = initial_coefficients("polyrelu", order, init)
        check_backend("polyrelu", backend)
        self.order, self.backend = order, backend
        self.weight, self.bias = empty_coefficients(order, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to the start values."""
        fill_coefficients(self.weight, self.bias, self._init)

    def forward(self, x: Tensor) -> Tensor:
        return poly_relu(x, self.weight, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        return f"order={self.order}" + ("" if self.bias is not None else ", bias=False")


class PolyNorm(nn.Module):
    """Learned sum of separately normalised powers: sum_p a_p x^p / rms(x^p); see :func:`poly_norm`.

    Args:
        order: highest power (3, sec. 2).
        eps: 1e-6 (the authors' code), added to the mean of the squared power.
        norm: "rms" as the authors trained, "l2" as they print.
        dim: axis that is normalised; 1 for [B, C, H, W].
        bias: learn the constant term a_0.
        init: start value of every stored coefficient, or one a power from x^order down; 1 / order by default (sec. 2).
            The constant term starts at 0.
        coeff_map: "sigmoid" or "abs" of the stored coefficients are the ones used; not in the paper.
        bias_clamp: bound on the magnitude of the constant term; not in the paper.
        out_scale: factor on the result; not in the paper.
        num_groups: sets of coefficients, e.g. one an expert; :meth:`forward` then needs tokens_per_expert.
        process_group: ranks that hold the shards of the normalised axis.
        backend: "auto" or "eager", see :func:`poly_norm`.
        inplace: accepted because timm's networks pass it, and never done: the backward needs x.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        [..., D] -> same. State: weight [order], bias [1]; with groups [num_groups, order] and [num_groups, 1].

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Zhuo et al., "Polynomial Composition Activations", ICLR 2025, arXiv:2411.03884, eq. 3; root mean square instead
        of the printed Euclidean norm, as in the authors' code.

    Example:
        >>> y = PolyNorm(2)(torch.tensor([[3.0, -3.0]]))  # x^2 becomes (1, 1), x becomes (1, -1); half of each
        >>> y.round(decimals=3).tolist()
        [[1.0, 0.0]]
    """

    def __init__(
        self,
        order: int = 3,
        eps: float = 1e-6,
        *,
        norm: Norm = "rms",
        dim: int = -1,
        bias: bool = True,
        init: Init = None,
        coeff_map: CoeffMap | None = None,
        bias_clamp: float | None = None,
        out_scale: float = 1.0,
        num_groups: int | None = None,
        process_group: ProcessGroup | None = None,
        backend: Backend = "auto",
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._init = initial_coefficients("polynorm", order, init)
        check_norm("polynorm", eps, norm)
        check_backend("polynorm", backend)
        check_coefficient_map("polynorm", coeff_map, bias_clamp, num_groups)
        self.order, self.eps, self.norm, self.dim = order, eps, norm, dim
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

    def forward(self, x: Tensor, tokens_per_expert: Tensor | Sequence[int] | None = None) -> Tensor:
        """PolyNorm of x.

        Args:
            x: [..., D].
            tokens_per_expert: [num_groups] consecutive rows of each group; only with num_groups.

        Raises:
            ValueError: if x does not fit, or tokens_per_expert is missing or unexpected.
        """
        check_tokens("polynorm", self.num_groups, tokens_per_expert)
        weight, bias = self.coefficients()
        return poly_norm(
            x,
            weight,
            bias,
            eps=self.eps,
            norm=self.norm,
            dim=self.dim,
            tokens_per_expert=tokens_per_expert,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        options = {
            "dim": (self.dim, -1),
            "bias": (self.bias is not None, True),
            "coeff_map": (self.coeff_map, None),
            "bias_clamp": (self.bias_clamp, None),
            "out_scale": (self.out_scale, 1.0),
            "num_groups": (self.num_groups, None),
        }
        return describe(self.order, self.eps, self.norm, options)


class PolyPReLU(nn.Module):
    """Learned polynomial of PReLU: sum_p a_p PReLU(x)^p with one learned slope; see :func:`poly_com`.

    Args:
        order: highest power.
        slope: start value of the slope for x < 0 (0.25, as PReLU).
        bias: learn the constant term a_0.
        init: see :class:`PolyReLU`.
        inplace: accepted because timm's networks pass it, and never done: the backward needs x.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        any -> same. State: weight [order], bias [1], slope [1].

    Raises:
        ValueError: if order or init is out of range.

    Source:
        Zhuo et al., arXiv:2411.03884, eq. 1 with rho = PReLU, from the paper's ablation.

    Example:
        >>> PolyPReLU(1, init=1.0)(torch.tensor([-4.0, 2.0])).tolist()
        [-1.0, 2.0]
    """

    def __init__(
        self,
        order: int = 3,
        *,
        slope: float = 0.25,
        bias: bool = True,
        init: Init = None,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._init = initial_coefficients("polyprelu", order, init)
        self.order, self._slope = order, slope
        self.weight, self.bias = empty_coefficients(order, bias, device=device, dtype=dtype)
        self.slope = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to the start values."""
        fill_coefficients(self.weight, self.bias, self._init)
        nn.init.constant_(self.slope, self._slope)

    def forward(self, x: Tensor) -> Tensor:
        return poly_com(x, self.weight, self.bias, rho="prelu", slope=self.slope)

    def extra_repr(self) -> str:
        return f"order={self.order}" + ("" if self.bias is not None else ", bias=False")


class PolyReLUNorm(PolyNorm):
    """PolyNorm of the rectified input: sum_p a_p N(max(0, x)^p).

    Takes the arguments of :class:`PolyNorm`.

    Shape:
        [..., D] -> same. State as :class:`PolyNorm`.

    Source:
        Zhuo et al., arXiv:2411.03884, eq. 1, from the paper's ablation. The order of ReLU and normalisation is not
        printed; we rectify first.

    Example:
        >>> PolyReLUNorm(1, init=1.0)(torch.tensor([[3.0, -1.0]])).tolist()
        [[1.4142134189605713, 0.0]]
    """

    def forward(self, x: Tensor, tokens_per_expert: Tensor | Sequence[int] | None = None) -> Tensor:
        """PolyNorm of relu(x); see :meth:`PolyNorm.forward`."""
        return super().forward(x.relu(), tokens_per_expert)


class PolyCom(nn.Module):
    """The general family: sum_p a_p rho(x)^p (kind 1) or sum_p a_p rho(x^p) (kind 2); see :func:`poly_com`.

    Args:
        rho: "relu", "prelu", "sigmoid", "silu", "norm", "relu_norm", or a function or module that keeps the shape.
        kind: 1 applies rho first, 2 takes powers first.
        order: highest power (3, sec. 2).
        eps: of "norm" and "relu_norm".
        norm: "rms" or "l2", of "norm" and "relu_norm".
        dim: axis that "norm" and "relu_norm" reduce.
        bias: learn the constant term a_0.
        init: see :class:`PolyReLU`.
        inplace: accepted because timm's networks pass it, and never done: the backward needs x.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        any -> same. State: weight [order], bias [1]; with rho="prelu" slope [1].

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Zhuo et al., "Polynomial Composition Activations", ICLR 2025, arXiv:2411.03884, eq. 1.

    Example:
        >>> PolyCom("sigmoid", kind=2, order=1, init=1.0)(torch.zeros(2)).tolist()
        [0.5, 0.5]
    """

    def __init__(
        self,
        rho: Rho | Callable[[Tensor], Tensor] = "relu",
        kind: Literal[1, 2] = 1,
        order: int = 3,
        *,
        eps: float = 1e-6,
        norm: Norm = "rms",
        dim: int = -1,
        bias: bool = True,
        init: Init = None,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._init = initial_coefficients("polycom", order, init)
        check_norm("polycom", eps, norm)
        names = ("relu", "prelu", "sigmoid", "silu", "norm", "relu_norm")
        if rho not in names and not callable(rho):
            raise ValueError(f"polycom: rho must be one of {', '.join(names)} or a function, got {rho!r}")
        if kind not in (1, 2):
            raise ValueError(f"polycom: kind must be 1 (rho first) or 2 (powers first), got {kind!r}")
        self.rho: Rho | Callable[[Tensor], Tensor] = rho
        self.kind: Literal[1, 2] = kind
        self.order = order
        self.eps, self.norm, self.dim = eps, norm, dim
        self.weight, self.bias = empty_coefficients(order, bias, device=device, dtype=dtype)
        self.slope = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if rho == "prelu" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to the start values."""
        fill_coefficients(self.weight, self.bias, self._init)
        if self.slope is not None:
            nn.init.constant_(self.slope, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return poly_com(
            x,
            self.weight,
            self.bias,
            rho=self.rho,
            kind=self.kind,
            slope=self.slope,
            eps=self.eps,
            norm=self.norm,
            dim=self.dim,
        )

    def extra_repr(self) -> str:
        rho = "" if isinstance(self.rho, nn.Module) else f"rho={self.rho!r}, "
        return f"{rho}kind={self.kind}, order={self.order}" + ("" if self.bias is not None else ", bias=False")
