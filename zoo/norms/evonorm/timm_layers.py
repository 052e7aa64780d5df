"""The nine layers under the names, constructors and state dicts of timm.

A timm model takes one as `norm_layer` behind a plain function, the only foreign thing its factory accepts:
`timm.create_model("resnetv2_50d_evos", norm_layer=lambda *args, **kwargs: EvoNorm2dS0(*args, **kwargs))`.

Arguments are those of :class:`zoo.norms.EvoNorm`, in timm's order. Four more are taken because timm's models pass them:
`act_layer`, which must be None (or SiLU for S1 and S2, which hold one) and makes `act_kwargs` idle, `inplace`, which
changes nothing since no layer writes into its input, and `drop_layer`, which must be None.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .functional import Backend
from .modules import EvoNorm2d, Variant


class _LayerB(EvoNorm2d):
    """Constructor of the B layers."""

    _variant: ClassVar[Variant]

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        *,
        unbiased_running_var: bool = False,
        process_group: Any = None,
        backend: Backend = "auto",
        act_layer: type[nn.Module] | None = None,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = False,
        drop_layer: type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            self._variant,
            apply_act=apply_act,
            momentum=momentum,
            eps=eps,
            unbiased_running_var=unbiased_running_var,
            process_group=process_group,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        _check_neighbours(self, act_layer, drop_layer)


class _LayerS(EvoNorm2d):
    """Constructor of the S layers."""

    _variant: ClassVar[Variant]
    _normalize_when_linear: ClassVar[bool] = False

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float | None = None,
        *,
        backend: Backend = "auto",
        act_layer: type[nn.Module] | None = None,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = False,
        drop_layer: type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            self._variant,
            groups=groups,
            group_size=group_size,
            apply_act=apply_act,
            eps=(1e-3 if self._normalize_when_linear else 1e-5) if eps is None else eps,
            normalize_when_linear=self._normalize_when_linear,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        _check_neighbours(self, act_layer, drop_layer)


def _check_neighbours(layer: EvoNorm2d, act_layer: type[nn.Module] | None, drop_layer: type[nn.Module] | None) -> None:
    name = type(layer).__name__
    if act_layer is not None and not (layer.variant in ("s1", "s2") and act_layer is nn.SiLU):
        raise ValueError(f"{name}: expected no act_layer, since it holds its activation, got {act_layer!r}")
    if drop_layer is not None:
        raise ValueError(f"{name}: expected no drop_layer, got {drop_layer!r}; put it between layers of the model")


class EvoNorm2dB0(_LayerB):
    """EvoNorm-B0: x / max(batch deviation, v x + instance deviation).

    eps is 1e-5 as in the authors' code; timm has 1e-3 here.

    Shape:
        [N, C, H, W] -> same.

    Source:
        Liu et al., NeurIPS 2020, arXiv:2004.02967.

    Example:
        >>> EvoNorm2dB0(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    _variant = "b0"


class EvoNorm2dB1(_LayerB):
    """EvoNorm-B1: x / max(batch deviation, (x + 1) instance root mean square).

    Shape:
        [N, C, H, W] -> same.

    Source:
        Liu et al., NeurIPS 2020, arXiv:2004.02967.

    Example:
        >>> EvoNorm2dB1(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    _variant = "b1"


class EvoNorm2dB2(_LayerB):
    """EvoNorm-B2: x / max(batch deviation, instance root mean square - x).

    Shape:
        [N, C, H, W] -> same.

    Source:
        Liu et al., NeurIPS 2020, arXiv:2004.02967.

    Example:
        >>> EvoNorm2dB2(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    _variant = "b2"


class EvoNorm2dS0(_LayerS):
    """EvoNorm-S0: x sigmoid(v x) / group deviation.

    Shape:
        [N, C, H, W] -> same.

    Source:
        Liu et al., NeurIPS 2020, arXiv:2004.02967.

    Example:
        >>> EvoNorm2dS0(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    _variant = "s0"


class EvoNorm2dS1(_LayerS):
    """EvoNorm-S1: x sigmoid(x) / group deviation.

    Shape:
        [N, C, H, W] -> same.

    Source:
        Liu et al., NeurIPS 2020, arXiv:2004.02967.

    Example:
        >>> EvoNorm2dS1(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    _variant = "s1"


class EvoNorm2dS2(_LayerS):
    """EvoNorm-S2: x sigmoid(x) / group root mean square.

    Shape:
        [N, C, H, W] -> same.

    Source:
        Liu et al., NeurIPS 2020, arXiv:2004.02967.

    Example:
        >>> EvoNorm2dS2(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    _variant = "s2"


class EvoNorm2dS0a(_LayerS):
    """timm's variant of S0: eps 1e-3, and x / group deviation where it applies no activation.

    Shape:
        [N, C, H, W] -> same.

    Source:
        timm, `layers/evo_norm.py`; the formula is that of Liu et al., arXiv:2004.02967.

    Example:
        >>> EvoNorm2dS0a(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    _variant = "s0"
    _normalize_when_linear = True


class EvoNorm2dS1a(_LayerS):
    """timm's variant of S1: eps 1e-3, and x / group deviation where it applies no activation.

    Shape:
        [N, C, H, W] -> same.

    Source:
        timm, `layers/evo_norm.py`; the formula is that of Liu et al., arXiv:2004.02967.

    Example:
        >>> EvoNorm2dS1a(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    _variant = "s1"
    _normalize_when_linear = True


class EvoNorm2dS2a(_LayerS):
    """timm's variant of S2: eps 1e-3, and x / group root mean square where it applies no activation.

    Shape:
        [N, C, H, W] -> same.

    Source:
        timm, `layers/evo_norm.py`; the formula is that of Liu et al., arXiv:2004.02967.

    Example:
        >>> EvoNorm2dS2a(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    _variant = "s2"
    _normalize_when_linear = True
