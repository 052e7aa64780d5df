"""What the battery of `test_components.py` builds and feeds: at least one case for every row of the catalog.

To add a component, add its row to `zoo/catalog.py` and a case here; nothing else is needed for the battery to run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import zoo

Inputs = Callable[[torch.Generator], tuple[Any, ...]]
Shape = tuple[int, ...]


def floats(*shapes: Shape) -> Inputs:
    """Standard normal float64 tensors; the battery casts them to the dtype it tests."""
    return lambda generator: tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@dataclass(frozen=True)
class Case:
    """One way to build and call a component.

    Args:
        kind: of the catalog row.
        name: of the catalog row.
        inputs: makes the arguments of forward, floating-point ones in float64, small enough for gradcheck.
        state: the golden list: every key of the state dict and its shape. A change here breaks users' checkpoints.
        output: shape of the result.
        kwargs: of the constructor.
        label: tells several cases of one row apart.
        empty: makes arguments without rows, or None where the component has no such thing.
        vmap: axis-0 batches of the arguments may be mapped one by one.
        loose: factor on the low-precision tolerance: how many times intermediate results are rounded.
    """

    kind: str
    name: str
    inputs: Inputs
    state: dict[str, Shape]
    output: Shape
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    empty: Inputs | None = None
    vmap: bool = True
    loose: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}-{self.label}" if self.label else self.name

    @property
    def placed(self) -> bool:
        """Whether the constructor takes device and dtype: not that of a loss without parameters, as in torch.nn."""
        return "dtype" in inspect.signature(zoo.get(self.kind, self.name)).parameters  # type: ignore[arg-type]

    def build(self, **more: Any) -> torch.nn.Module:
        """The component, with further constructor arguments."""
        if not self.placed:
            more = {name: value for name, value in more.items() if name not in ("device", "dtype")}
        return zoo.create(self.kind, self.name, **{**self.kwargs, **more})  # type: ignore[arg-type]

    def arguments(self, dtype: torch.dtype = torch.float64, make: Inputs | None = None) -> tuple[Any, ...]:
        """The arguments of forward, the floating-point ones in a dtype; the same numbers at every call."""
        made = (make or self.inputs)(torch.Generator().manual_seed(20))
        return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in made)


_ROWS, _IMAGE = (3, 5, 7), (2, 5, 3, 4)
_THREE = {"weight": (3,), "bias": (1,)}


def _activation(name: str, label: str = "", shape: Shape = _ROWS, **more: Any) -> Case:
    state = more.pop("state", _THREE)
    empty = floats((0, *shape[1:]))
    return Case("activation", name, floats(shape), state, shape, more, label=label, empty=empty)


def _glu(label: str = "", **more: Any) -> Case:
    shapes = (_ROWS, _ROWS, _ROWS[:-1])
    return Case("layer", "polynorm_glu", floats(*shapes), _THREE, _ROWS, more, label, floats((0, 7), (0, 7), (0,)))


def _grouped(generator: torch.Generator) -> tuple[Any, ...]:
    return *floats((6, 7), (6, 7), (6,))(generator), torch.tensor([2, 0, 4])


def _no_groups(generator: torch.Generator) -> tuple[Any, ...]:
    return *floats((0, 7), (0, 7), (0,))(generator), torch.tensor([0, 0, 0])


_MAPS = (3, 6, 2, 3)
_AFFINE = {"weight": (6,), "bias": (6,)}


def _evonorm(
    name: str, label: str = "", shape: Shape = _MAPS, state: dict[str, Shape] | None = None, **more: Any
) -> Case:
    """On six channels. A layer wants a batch, so that samples cannot be mapped one by one."""
    batch = "b" in name.removeprefix("evonorm") or more.get("variant", "s")[0] == "b"
    if state is None:
        state = {**_AFFINE, **({"v": (6,)} if "0" in name else {}), **({"running_var": (6,)} if batch else {})}
    arguments = {"num_features": 6, **({} if batch else {"groups": 3}), **more}
    empty = floats((0, *shape[1:]))
    return Case("norm", name, floats(shape), state, shape, arguments, label, empty, vmap=False)


def _conditional(label: str, variant: str, state: dict[str, Shape]) -> Case:
    arguments = {"num_features": 6, "cond_dim": 2, "variant": variant, "groups": 3}
    linear = {"gain.weight": (6, 2), "shift.weight": (6, 2)}
    inputs, empty = floats(_MAPS, (3, 2)), floats((0, *_MAPS[1:]), (0, 2))
    state = {**state, **linear}
    # scale and shift are rounded before the layer multiplies by them
    return Case("norm", "conditional_evonorm", inputs, state, _MAPS, arguments, label, empty, vmap=False, loose=4.0)


def _scored(*shape: int, classes: int = 0) -> Inputs:
    """Scores or features, and a class for each row; the second axis holds the classes unless they are counted."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        rows = shape[:-1] if classes else shape[:1] + shape[2:]
        return *floats(shape)(generator), torch.randint(classes or shape[1], rows, generator=generator)

    return make


def _rejected(generator: torch.Generator) -> tuple[Any, ...]:
    scores, rejector = floats((4, 5), (4,))(generator)
    return scores, rejector, torch.randint(5, (4,), generator=generator)


def _pictures(*shape: int) -> Inputs:
    """Two pictures with values in [0, 1]."""
    return lambda generator: tuple(torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def _comp_sum(name: str, label: str = "", shape: Shape = (4, 5), **more: Any) -> Case:
    arguments = {"reduction": "none", **more}
    # of [N, C, d] one sample is [C, d], which is [N, C] to the loss
    return Case(
        "loss", name, _scored(*shape), {"tau_state": ()}, shape[:1] + shape[2:], arguments, label, vmap=len(shape) == 2
    )


CASES: tuple[Case, ...] = (
    _comp_sum("comp_sum", tau=1.3),
    _comp_sum("comp_sum", "cross_entropy_image", (2, 3, 2, 4), tau=1.0),
    _comp_sum("comp_sum", "rho_logistic", tau=0.0, aux="rho_logistic", rho=0.5),
    _comp_sum("comp_sum", "formula", tau=0.5, max_weight=4.0, backend="eager"),
    _comp_sum("comp_sum", "smoothed", tau=1.2, label_smoothing=0.2),
    _comp_sum("comp_sum", "normalized", tau=1.4, normalized=True),
    _comp_sum("comp_sum", "truncated", tau=1.7, truncation=0.15),
    _comp_sum("sum_exponential"),
    _comp_sum("logistic"),
    _comp_sum("gce"),
    _comp_sum("alpha_loss", alpha=0.8),
    _comp_sum("mae"),
    Case(
        "loss", "predictor_rejector", _rejected, {}, (4,), {"cost": 0.3, "alpha": 1.5, "reduction": "none"}, vmap=False
    ),
    Case(
        "loss",
        "linear_comp_sum",
        _scored(4, 6, classes=5),
        {"tau_state": (), "linear.weight": (5, 6), "linear.bias": (5,)},
        (4,),
        {"in_features": 6, "num_classes": 5, "tau": 1.3, "bias": True, "reduction": "none", "chunk_size": 3},
        loose=4.0,
    ),
    Case("loss", "ssim", _pictures(2, 6, 13, 3), {}, (), vmap=False),
    Case("loss", "ssim", _pictures(2, 1, 4, 5, 3), {}, (2, 1, 4, 5, 3), {"reduction": "none"}, label="map"),
    Case("loss", "l1_dssim", _pictures(2, 6, 7, 3), {}, (), vmap=False),
    Case(
        "loss",
        "l1_dssim",
        _pictures(2, 1, 3, 4, 5),
        {},
        (2, 1, 3, 4, 5),
        {"ssim_lambda": 0.7, "channels_first": True, "reduction": "none"},
        label="planes",
    ),
    *(_evonorm(f"evonorm_{variant}") for variant in ("b0", "b1", "b2", "s0", "s1", "s2", "s0a", "s1a", "s2a")),
    _evonorm("evonorm_s0a", "linear", apply_act=False, state=_AFFINE),
    _evonorm("evonorm_s0", "affine_only", apply_act=False, state=_AFFINE),
    _evonorm("evonorm", "rows", (4, 6), {**_AFFINE, "v": (6,)}, variant="s0", groups=2),
    _evonorm("evonorm", "volume", (2, 6, 2, 1, 2), {**_AFFINE, "v": (6,), "running_var": (6,)}, variant="b0"),
    _evonorm("evonorm", "formula", (3, 6, 4), {**_AFFINE, "running_var": (6,)}, variant="b2", backend="eager"),
    _conditional("s0", "s0", {"norm.v": (6,)}),
    _conditional("b1", "b1", {"norm.running_var": (6,)}),
    _activation("polyrelu"),
    _activation("polyrelu", "order1_image", _IMAGE, order=1, bias=False, state={"weight": (1,)}),
    _activation("polynorm"),
    _activation(
        "polynorm", "channels_l2_order4", _IMAGE, order=4, dim=1, norm="l2", state={"weight": (4,), "bias": (1,)}
    ),
    _activation("polynorm", "mapped", coeff_map="sigmoid", bias_clamp=0.5, out_scale=0.5),
    _activation("polynorm", "formula", backend="eager"),
    _activation("polyprelu", state={**_THREE, "slope": (1,)}),
    _activation("polyrelunorm"),
    _activation("polycom"),
    _activation("polycom", "silu_powers", rho="silu", kind=2, order=2, state={"weight": (2,), "bias": (1,)}),
    _activation("polycom", "norm_first", rho="norm"),
    _glu(),
    _glu("clamped", clamp=1.0, coeff_map="abs"),
    Case(
        "layer",
        "polynorm_glu",
        _grouped,
        {"weight": (3, 3), "bias": (3, 1)},
        (6, 7),
        {"num_groups": 3},
        label="experts",
        empty=_no_groups,
        vmap=False,
    ),
    Case(
        "layer",
        "poly_ffn",
        floats((3, 5, 4)),
        {"up.weight": (16, 4), "act.weight": (3,), "act.bias": (1,), "down.weight": (4, 16)},
        (3, 5, 4),
        {"dim": 4},
        empty=floats((0, 4)),
        loose=8.0,
    ),
    Case(
        "layer",
        "poly_ffn",
        floats((3, 5, 4)),
        {
            "gate.weight": (8, 4),
            "gate.bias": (8,),
            "up.weight": (8, 4),
            "up.bias": (8,),
            "down.weight": (4, 8),
            "down.bias": (4,),
        },
        (3, 5, 4),
        {"dim": 4, "hidden": 8, "act": "torch.nn.SiLU", "gated": True, "bias": True},
        label="swiglu",
        empty=floats((0, 4)),
        loose=8.0,
    ),
)
