"""Run a test on each implementation of an op: PyTorch's formula, closed form, CPU library, emulated kernel, GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.activations.polycom import cuda, eager, functional
from zoo.kernels import use_cpu_library
from zoo.kernels.emulation import SCHEDULES, EmulatedMachine, emulated
from zoo.losses.comp_sum import cuda as comp_sum_cuda
from zoo.losses.comp_sum import eager as comp_sum_eager
from zoo.losses.comp_sum import functional as comp_sum_functional
from zoo.norms.evonorm import cuda as evonorm_cuda
from zoo.norms.evonorm import eager as evonorm_eager
from zoo.norms.evonorm import functional as evonorm_functional

POLYCOM_OPS = ("poly_relu", "poly_norm", "poly_norm_mul")
# Op and the function of `eager.py` and `cuda.py` that is it.
EVONORM_OPS = {
    "evonorm_s": "evonorm_s_forward",
    **{
        name: name
        for name in ("evonorm_s_backward", "evonorm_moments", "evonorm_b_apply", "evonorm_b_sums", "evonorm_b_grad")
    },
}
COMP_SUM_OPS = {"comp_sum": "comp_sum_forward", "comp_sum_backward": "comp_sum_backward"}

IMPLEMENTATIONS = (
    "formula",
    "closed_form",
    "native",
    *(f"emulated_{schedule}" for schedule in SCHEDULES),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
"""For a fixture's `params`; :func:`running_on` switches to one of them."""


@contextlib.contextmanager
def registered(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the block, CPU tensors of `torch.ops.zoo.<name>` go to these functions."""
    use_cpu_library()  # now: loaded by the first call of an op it would take the place of these functions
    library = torch.library.Library("zoo", "IMPL")
    for name, function in functions.items():
        library.impl(name, function, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def closed_form() -> dict[str, Callable[..., Any]]:
    """The families' `eager.py` as implementation of their ops."""
    return {
        **{op: getattr(evonorm_eager, name) for op, name in EVONORM_OPS.items()},
        **{op: getattr(comp_sum_eager, name) for op, name in COMP_SUM_OPS.items()},
        "poly_relu": eager.poly_relu_forward,
        "poly_relu_backward": eager.poly_relu_backward,
        "poly_norm": eager.poly_norm_forward,
        "poly_norm_backward": lambda grad, x, weight, stats, eps, rms: eager.poly_norm_backward(
            grad, x, weight, stats, rms
        ),
        "poly_norm_mul": eager.poly_norm_mul_forward,
        "poly_norm_mul_backward": lambda grad, x, mul, weight, bias, scores, stats, eps, rms, clamp: (
            eager.poly_norm_mul_backward(grad, x, mul, weight, bias, scores, stats, rms, clamp)
        ),
    }


def kernels() -> dict[str, Callable[..., Any]]:
    """The host code of the CUDA kernels."""
    return {
        **{op: getattr(evonorm_cuda, name) for op, name in EVONORM_OPS.items()},
        **{op: getattr(comp_sum_cuda, name) for op, name in COMP_SUM_OPS.items()},
    } | {
        f"{op}{suffix}": getattr(cuda, f"{op}{host}")
        for op in POLYCOM_OPS
        for suffix, host in (("", "_forward"), ("_backward", "_backward"))
    }


@contextlib.contextmanager
def emulated_kernels(machine: EmulatedMachine) -> Iterator[EmulatedMachine]:
    """Within the block, the ops on CPU tensors run as CUDA kernels on an emulated machine."""
    with registered(kernels()), emulated(machine):
        yield machine


@contextlib.contextmanager
def running_on(implementation: str, folder: Path) -> Iterator[None]:
    """Within the block, zoo's functions use this implementation.

    Args:
        implementation: one of :data:`IMPLEMENTATIONS`.
        folder: for compiled emulated kernels.
    """
    with contextlib.ExitStack() as stack:
        if implementation == "formula":
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(functional, "_use_formula", lambda *_: True)
            patch.setattr(evonorm_functional, "prefers_formula", lambda *_: True)
            patch.setattr(comp_sum_functional, "prefers_formula", lambda *_: True)
        elif implementation == "closed_form":
            stack.enter_context(registered(closed_form()))
        elif implementation == "native":
            if not use_cpu_library():
                pytest.skip("no CPU library: needs a C++ compiler, and ZOO_KERNELS other than off")
        elif implementation == "cuda":
            stack.enter_context(torch.device("cuda"))  # where a test says nothing else, tensors are made there
        else:
            schedule = SCHEDULES[implementation.removeprefix("emulated_")]
            stack.enter_context(emulated_kernels(EmulatedMachine(folder, schedule)))
        yield
