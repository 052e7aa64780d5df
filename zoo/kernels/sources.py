"""Kernel sources: where they lie, which files and defines a compiled kernel depends on, which variants there are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import KernelError

_PACKAGE = Path(__file__).resolve().parents[1]
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_EMULATOR = "common/emu.h"

ARCHITECTURES = ("75", "80", "86", "90", "100", "120")
"""Compute capabilities every kernel is compiled for in the tests; others are compiled when a device asks for them."""

SCALARS = {"float32": "float", "float64": "double", "bfloat16": "zoo::bf16", "float16": "zoo::half"}
"""Storage types of the kernels by torch's name for them."""

MOST_POWERS = 32
"""Highest order the PolyCom kernels take (kMostPowers of `polycom/math.h`)."""

ORDERS = range(1, 6)
"""Orders of the PolyCom kernels that are compiled ahead of time; any other is compiled when first used."""


def folder() -> Path:
    """`cuda_kernels`: inside an installed package, else beside it in the repository."""
    installed = _PACKAGE / "_cuda_kernels"
    return installed if installed.is_dir() else _PACKAGE.parent / "cuda_kernels"


@dataclass(frozen=True)
class Unit:
    """One source with one set of defines: what becomes one cubin.

    Args:
        source: below `cuda_kernels`, e.g. "polycom/poly_norm.cu".
        dtype: storage type by torch's name, "float32".
        variant: what tells it from others of that source and dtype, e.g. "order3".
        defines: macros and their values beside ZOO_SCALAR.
    """

    source: str
    dtype: str
    variant: str
    defines: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """For files and messages, e.g. "poly_norm-order3-bfloat16"."""
        return f"{Path(self.source).stem}-{self.variant}-{self.dtype}"

    @property
    def macros(self) -> list[str]:
        """NAME=value of everything that is defined."""
        return [f"ZOO_SCALAR={SCALARS[self.dtype]}", *(f"{macro}={value}" for macro, value in self.defines)]


@cache
def closure(source: str) -> dict[str, str]:
    """The text of a source and of every header it includes, by name below `cuda_kernels`.

    The emulator's header is left out: no compiled kernel holds any of it.
    """
    found: dict[str, str] = {}
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name in found or name == _EMULATOR:
            continue
        path = folder() / name
        if not path.is_file():
            raise KernelError(f"no kernel source {name!r} in {folder()}; reinstall paperzoo")
        found[name] = path.read_text()
        for included in _INCLUDE.findall(found[name]):
            beside = (Path(name).parent / included).as_posix()
            waiting.append(beside if (folder() / beside).is_file() else included)
    return found


def fingerprint(texts: dict[str, str], *facts: object) -> str:
    """Sixteen characters that change with any source or fact."""
    digest = hashlib.sha256(repr(facts).encode())
    for name in sorted(texts):
        digest.update(f"\0{name}\0{texts[name]}".encode())
    return digest.hexdigest()[:16]


def units(orders: Sequence[int] = ORDERS) -> Iterator[Unit]:
    """Every variant that is compiled ahead of time."""
    for dtype in SCALARS:
        for order in orders:
            yield poly_relu_unit(dtype, order)
            for gated in (False, True):
                yield poly_norm_unit(dtype, order, gated)
        yield evonorm_moments_unit(dtype)
        yield evonorm_s_unit(dtype)
        for variant in range(3):
            yield evonorm_b_unit(dtype, variant)
        yield comp_sum_unit(dtype)


@dataclass(frozen=True)
class RowPlan:
    """How `poly_norm.cu` shares a row among threads: elements a thread keeps in registers, and the largest block."""

    forward_items: int
    forward_threads: int
    backward_items: int
    backward_threads: int


def row_plan(dtype: str, gated: bool) -> RowPlan:
    """Registers decide: 64 a thread in a block of 1024, 128 in one of 512."""
    return RowPlan(32, 512, 16, 512 if gated or dtype == "float64" else 1024)


@cache
def poly_norm_unit(dtype: str, order: int, gated: bool) -> Unit:
    """PolyNorm or its gated form."""
    plan = row_plan(dtype, gated)
    defines = {
        "ZOO_ORDER": order,
        "ZOO_GATED": int(gated),
        "ZOO_FORWARD_ITEMS": plan.forward_items,
        "ZOO_FORWARD_THREADS": plan.forward_threads,
        "ZOO_BACKWARD_ITEMS": plan.backward_items,
        "ZOO_BACKWARD_THREADS": plan.backward_threads,
    }
    return Unit("polycom/poly_norm.cu", dtype, f"order{order}{'-gated' if gated else ''}", tuple(defines.items()))


@cache
def poly_relu_unit(dtype: str, order: int) -> Unit:
    """PolyReLU."""
    return Unit("polycom/poly_relu.cu", dtype, f"order{order}", (("ZOO_ORDER", order),))


@cache
def evonorm_moments_unit(dtype: str) -> Unit:
    """Means and variances of the EvoNorm layers."""
    return Unit("evonorm/moments.cu", dtype, "evonorm")


@cache
def evonorm_s_unit(dtype: str) -> Unit:
    """EvoNorm S0, S1 and S2."""
    return Unit("evonorm/evonorm_s.cu", dtype, "s012")


@cache
def evonorm_b_unit(dtype: str, variant: int) -> Unit:
    """EvoNorm B0, B1 or B2."""
    return Unit("evonorm/evonorm_b.cu", dtype, f"b{variant}", (("ZOO_VARIANT", variant),))


@cache
def comp_sum_unit(dtype: str) -> Unit:
    """Comp-sum losses and their gradients, with the classes last or the positions."""
    return Unit("comp_sum/comp_sum.cu", dtype, "rows-planes")
