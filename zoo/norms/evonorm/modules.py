"""The EvoNorm layers: one class for any rank, its spatial ranks, the conditional form, synchronisation of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...kernels.ops import compute_dtype
from .functional import Act, Backend, evonorm_b, evonorm_s
from .reference import VARIANTS_B, VARIANTS_S

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Variant = Literal["b0", "b1", "b2", "s0", "s1", "s2"]

_OTHER_NAMES = {"gamma": "weight", "beta": "bias"}  # of other implementations


def divisor_groups(channels: int, groups: int) -> int:
    """The largest divisor of `channels` not above `groups`, as the authors' code lowers 32 for narrow layers."""
    return next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0)


class EvoNorm(nn.Module):
    """Normalisation and activation in one layer, found by evolution. Put no activation behind it.

    B layers take the variance of the batch in training and a running one in evaluation, S layers statistics of each
    sample alone; see :func:`zoo.functional.evonorm_b` and :func:`zoo.functional.evonorm_s` for the formulas.

    Args:
        num_features: channels C.
        variant: "b0", "b1", "b2", "s0", "s1" or "s2".
        apply_act: False gives the layer that follows no activation in the paper's networks: weight * x + bias, nothing
            normalised.
        groups: groups of channels of S layers, lowered to the largest divisor of C not above it (32, authors' code).
        group_size: channels a group instead; divides C.
        eps: added to every variance and mean square (1e-5, authors' code).
        momentum: of the running variance (0.1, a decay of 0.9 in the authors' code).
        affine: learn weight and bias; without, `forward` takes them, one set a sample if wanted.
        zero_init: weight starts at 0, for the last norm of a residual branch.
        normalize_when_linear: S layers with apply_act=False divide by the deviation all the same, as timm's S0a, S1a,
            S2a do.
        unbiased_running_var: move the running variance towards the unbiased one, as timm and BatchNorm do.
        track_running_stats: keep a running variance; without, B layers use the batch in evaluation, too.
        process_group: ranks whose joint batch has the variance in training; "world" for all of them, None for this rank
            alone. Batches may differ in size.
        backend: "auto" or "eager", see :func:`zoo.functional.evonorm_s`.
        device: of the parameters and the running variance.
        dtype: of the parameters; the running variance is float32 where it is narrower.

    Shape:
        [N, C, ...] -> same.

    Raises:
        ValueError: if an argument does not fit another, or the input is no [N, C, ...].

    Source:
        Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020, arXiv:2004.02967.

    Example:
        >>> EvoNorm(8, "s0", groups=4)(torch.zeros(2, 8, 5)).shape
        torch.Size([2, 8, 5])
    """

    _ranks: ClassVar[tuple[int, ...]] = ()

    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        variant: Variant = "s0",
        *,
        apply_act: bool = True,
        groups: int = 32,
        group_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        zero_init: bool = False,
        normalize_when_linear: bool = False,
        unbiased_running_var: bool = False,
        track_running_stats: bool = True,
        process_group: ProcessGroup | Literal["world"] | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._check(num_features, variant, groups, group_size, eps, momentum, normalize_when_linear)
        self.num_features, self.variant, self.apply_act = num_features, variant, apply_act
        self.groups = num_features // group_size if group_size else divisor_groups(num_features, groups)
        self.eps, self.momentum, self.affine, self.zero_init = eps, momentum, affine, zero_init
        self.normalize_when_linear, self.unbiased_running_var = normalize_when_linear, unbiased_running_var
        self.process_group, self.backend = process_group, backend

        def parameter(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if wanted else None

        self.weight, self.bias = parameter(affine), parameter(affine)
        self.v = parameter(apply_act and variant in ("b0", "s0"))
        tracked = variant in VARIANTS_B and track_running_stats
        given = torch.get_default_dtype() if dtype is None else dtype
        running_var = torch.ones(num_features, device=device, dtype=compute_dtype(given)) if tracked else None
        self.register_buffer("running_var", running_var)
        self.reset_parameters()

    def _check(
        self,
        num_features: int,
        variant: str,
        groups: int,
        group_size: int | None,
        eps: float,
        momentum: float,
        normalize_when_linear: bool,
    ) -> None:
        name = type(self).__name__
        if num_features < 1:
            raise ValueError(f"{name}: num_features must be at least 1, got {num_features}")
        if variant not in VARIANTS_B + VARIANTS_S:
            raise ValueError(f"{name}: variant must be one of {', '.join(VARIANTS_B + VARIANTS_S)}, got {variant!r}")
        if group_size is not None and (group_size < 1 or num_features % group_size):
            raise ValueError(f"{name}: group_size must divide num_features {num_features}, got {group_size}")
        if groups < 1:
            raise ValueError(f"{name}: groups must be at least 1, got {groups}")
        if not eps >= 0:
            raise ValueError(f"{name}: eps must not be negative, got {eps}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"{name}: momentum must lie in [0, 1], got {momentum}")
        if normalize_when_linear and variant in VARIANTS_B:
            raise ValueError(f"{name}: normalize_when_linear belongs to S layers, got variant {variant!r}")

    def reset_parameters(self) -> None:
        """v = 1, weight = 1 (0 with zero_init), bias = 0, running variance = 1."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.zero_init else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.v is not None:
            nn.init.ones_(self.v)
        if self.running_var is not None:
            self.running_var.fill_(1.0)

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The layer; weight and bias, [C] or one set a sample [N, C], only with affine=False."""
        self._check_input(x)
        if self.affine:
            if weight is not None or bias is not None:
                raise ValueError(
                    f"{type(self).__name__}: expected no weight and bias, as it has its own; build it with affine=False"
                )
            weight, bias = self.weight, self.bias
        if not self.apply_act and not self.normalize_when_linear:
            return _scaled(x, weight, bias)
        if self.variant in VARIANTS_S:
            moment = "rms" if self.variant == "s2" else "var"
            act: Act = "none" if not self.apply_act else "swish_v" if self.v is not None else "silu"
            arguments = (x, self.v, weight, bias, self.groups, self.eps)
            return evonorm_s(*arguments, moment=moment, act=act, backend=self.backend)
        variant: Any = self.variant
        return evonorm_b(
            x,
            self.v,
            weight,
            bias,
            self.running_var,
            self.training,
            self.momentum,
            self.eps,
            variant=variant,
            unbiased_running_var=self.unbiased_running_var,
            process_group=self._group(),
            backend=self.backend,
        )

    def _group(self) -> ProcessGroup | None:
        """The ranks to share statistics with; None where there is only this one, or nothing was initialised."""
        if self.process_group is None or not (self.training or self.running_var is None):
            return None
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if isinstance(self.process_group, str) else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def _check_input(self, x: Tensor) -> None:
        name = type(self).__name__
        if (self._ranks and x.ndim not in self._ranks) or x.ndim < 2:
            wanted = " or ".join(map(str, self._ranks)) or "2 or more"
            raise ValueError(
                f"{name}: expected an input of {wanted} dimensions, [N, C, ...], got {x.ndim}, shape {tuple(x.shape)}"
            )
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"{name}: expected {self.num_features} channels, got {x.shape[1]} in an input of shape {tuple(x.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EvoNorm:
        before = self.running_var
        super()._apply(fn, recurse)
        after = self.running_var
        # In 16 bits the running variance stops moving long before it has arrived.
        if after is not None and before is not None and after.dtype in (torch.float16, torch.bfloat16):
            self.running_var = before.to(device=after.device)
        return self

    def _load_from_state_dict(  # pyrefly: ignore[bad-override]  # the rest is passed on as it comes
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Takes the names and shapes of other implementations, too: gamma and beta, [1, C, 1, 1]."""
        for other, ours in _OTHER_NAMES.items():
            if prefix + other in state_dict and prefix + ours not in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + other)
        for name in ("weight", "bias", "v", "running_var"):
            value = state_dict.get(prefix + name)
            if value is not None and value.ndim > 1 and value.numel() == self.num_features:
                state_dict[prefix + name] = value.reshape(self.num_features)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        facts = [f"{self.num_features}, {self.variant!r}"]
        if self.variant in VARIANTS_S:
            facts.append(f"groups={self.groups}")
        facts.append(f"eps={self.eps}")
        facts += [
            f"{name}={value}"
            for name, value, usual in (
                ("momentum", self.momentum, 0.1),
                ("apply_act", self.apply_act, True),
                ("affine", self.affine, True),
                ("normalize_when_linear", self.normalize_when_linear, False),
                ("backend", self.backend, "auto"),
            )
            if value != usual
        ]
        return ", ".join(facts)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight * x + bias."""
    ends = (1,) * (x.ndim - 2)
    dtype = compute_dtype(x.dtype)
    y = x.to(dtype)
    for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            y = combine(y, parameter.to(dtype).reshape(*parameter.shape, *ends))
    return y.to(x.dtype)


class EvoNorm1d(EvoNorm):
    """:class:`EvoNorm` for [N, C] and [N, C, L]."""

    _ranks = (2, 3)


class EvoNorm2d(EvoNorm):
    """:class:`EvoNorm` for [N, C, H, W]."""

    _ranks = (4,)


class EvoNorm3d(EvoNorm):
    """:class:`EvoNorm` for [N, C, D, H, W]."""

    _ranks = (5,)


class ConditionalEvoNorm2d(nn.Module):
    """EvoNorm whose scale and shift are linear in a condition: 1 + W_g c and W_b c, one set a sample.

    Args:
        num_features: channels C.
        cond_dim: length D of the condition.
        variant: "b0", "b1", "b2", "s0", "s1" or "s2".
        groups: of S layers, see :class:`EvoNorm`.
        group_size: of S layers, see :class:`EvoNorm`.
        eps: added to every variance and mean square.
        momentum: of the running variance.
        process_group: see :class:`EvoNorm`.
        backend: see :class:`EvoNorm`.
        device: of the parameters and the running variance.
        dtype: of the parameters; the running variance is float32 where it is narrower.

    Shape:
        [N, C, H, W] and [N, D] -> [N, C, H, W].

    Raises:
        ValueError: as :class:`EvoNorm2d`, and if the condition is no [N, D].

    Source:
        Liu et al., arXiv:2004.02967, put EvoNorm in BigGAN in place of its conditional BatchNorm and ReLU; the linear
        maps are BigGAN's (Brock et al., 2019, arXiv:1809.11096, app. B).

    Example:
        >>> ConditionalEvoNorm2d(8, 3)(torch.zeros(2, 8, 4, 4), torch.zeros(2, 3)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        cond_dim: int,
        variant: Variant = "s0",
        *,
        groups: int = 32,
        group_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        process_group: ProcessGroup | Literal["world"] | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = EvoNorm2d(
            num_features,
            variant,
            groups=groups,
            group_size=group_size,
            eps=eps,
            momentum=momentum,
            affine=False,
            process_group=process_group,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.cond_dim = cond_dim
        self.gain = nn.Linear(cond_dim, num_features, bias=False, device=device, dtype=dtype)
        self.shift = nn.Linear(cond_dim, num_features, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with deviation 0.02, one of BigGAN's initialisations; v as in :class:`EvoNorm`."""
        self.norm.reset_parameters()
        for linear in (self.gain, self.shift):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x [N, C, H, W], cond [N, D]."""
        if cond.shape != (x.shape[0], self.cond_dim):
            raise ValueError(
                f"ConditionalEvoNorm2d: expected a condition of shape {(x.shape[0], self.cond_dim)}, got "
                f"{tuple(cond.shape)}"
            )
        return self.norm(x, 1 + self.gain(cond), self.shift(cond))


def convert_sync_evonorm(module: nn.Module, process_group: ProcessGroup | Literal["world"] = "world") -> nn.Module:
    """Let every B layer inside take the variance of the joint batch of all ranks, in place.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` knows BatchNorm alone and passes EvoNorm by without a word.

    Args:
        module: a model.
        process_group: the ranks; all of them by default.

    Returns:
        The module.

    Raises:
        ValueError: if there is no EvoNorm-B layer of the zoo in it.
    """
    found = [part for part in module.modules() if isinstance(part, EvoNorm) and part.variant in VARIANTS_B]
    if not found:
        raise ValueError(
            f"convert_sync_evonorm: expected EvoNorm-B layers of the zoo, found none in {type(module).__name__}; "
            "convert other implementations with zoo.convert.convert_norm_act first"
        )
    for part in found:
        part.process_group = process_group
    return module
