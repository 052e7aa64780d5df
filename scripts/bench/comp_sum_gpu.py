"""The comp-sum losses' part of `scripts/gpu_check.py`: every kernel against the formula in float64, and its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.bench._gpu import Benchmark
from tests._numerics import assert_close
from zoo.functional import comp_sum_loss
from zoo.kernels.sources import SCALARS, Unit, comp_sum_unit
from zoo.losses.comp_sum.reference import comp_sum_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TAUS = (0.0, 0.7, 1.0, 1.3)
# One class and two, lanes of a warp, blocks, rows that begin inside a pack, few long ones; positions last.
SHAPES = (
    (5, 1),
    (1000, 2),
    (64, 63),
    (33, 1000),
    (9, 2049),
    (17, 32000),
    (3, 100003),
    (2, 21, 65, 67),
    (1, 1000, 5),
    (4, 2, 300, 301),
)
# A language model's head, one of the largest vocabularies, pixels with their classes last, and with them in planes.
BENCHMARK_SHAPES = ((8192, 32000), (1024, 128256), (2**20, 21), (16, 19, 512, 512))
TARGET_TIME = 0.55  # of F.cross_entropy's, forward and backward together, for the first shape
TARGET_SHARE = 0.75  # of the copy bandwidth
ROW_BYTES = 40  # target, loss and statistics in the forward; target, statistics and incoming gradient in the backward
IGNORED = -100

Check = tuple[str, Callable[[], None]]


def units() -> list[Unit]:
    """What is compiled before anything is timed."""
    return [comp_sum_unit(dtype) for dtype in SCALARS]


def _problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, targets of which some are ignored, and an incoming gradient."""
    scores = (3 * torch.randn(shape, device=device)).to(dtype)
    target = torch.randint(shape[1], shape[:1] + shape[2:], device=device)
    target.view(-1)[2::5] = IGNORED
    return scores, target, torch.randn_like(target, dtype=torch.float64 if dtype is torch.float64 else torch.float32)


def _compare(
    scores: Tensor, target: Tensor, grad: Tensor, tau: float | Tensor, max_weight: float | None = None
) -> None:
    exact, scores = scores.double().requires_grad_(), scores.detach().requires_grad_()
    cap = math.inf if max_weight is None else math.log(max_weight)
    wide = tau.double() if isinstance(tau, Tensor) else tau
    expected = comp_sum_reference(exact, target, wide, cap, IGNORED)
    # So that the largest slope of a row is about 1: half types have few numbers far from there.
    (slopes,) = torch.autograd.grad(expected.sum(), exact, retain_graph=True)
    grad = grad / slopes.abs().amax(1).to(grad.dtype).clamp(min=1e-30)
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    loss = comp_sum_loss(scores, target, tau, reduction="none", max_weight=max_weight)
    (ours,) = torch.autograd.grad(loss, scores, grad)
    half = scores.dtype in (torch.bfloat16, torch.float16)
    # The largest of a row may be all that counts of it: its rounding does not average out. Where tau = 0 the loss is
    # exp of a sum that has been rounded.
    for what, actual, exactly, loose in (
        ("loss", loss, expected, 10),
        ("gradient", ours, wanted, 1.35 if half else 10),
    ):
        try:
            assert_close(actual, exactly, loose=loose)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None


def checks(device: torch.device) -> Iterator[Check]:
    """Name and test of every kernel at every shape; a test raises AssertionError."""
    for dtype in DTYPES:
        label = str(dtype).removeprefix("torch.")
        for shape in SHAPES:

            def one_tau(shape=shape, dtype=dtype) -> None:
                scores, target, grad = _problem(shape, dtype, device)
                for tau in TAUS:
                    _compare(scores, target, grad, tau)

            def a_tau_each(shape=shape, dtype=dtype) -> None:
                scores, target, grad = _problem(shape, dtype, device)
                _compare(scores, target, grad, 0.5 + torch.rand_like(grad), 20.0)

            yield f"comp_sum {list(shape)} {label}", one_tau
            yield f"comp_sum {list(shape)} {label}, a tau each", a_tau_each

        def off_the_boundary(dtype=dtype) -> None:
            """A slice of a flat buffer is contiguous, and its first element lies anywhere."""
            scores, target, grad = _problem((9, 1001), dtype, device)
            moved = torch.empty(scores.numel() + 1, dtype=dtype, device=device)[1:].view(scores.shape).copy_(scores)
            _compare(moved, target, grad, 1.3)

        def no_numbers(dtype=dtype) -> None:
            """NaN and infinities stay in their rows; a class out of range is a NaN, on a GPU alone."""
            for shape in ((6, 50), (6, 5000), (1, 50, 6)):
                scores, target, grad = _problem(shape, dtype, device)
                rows = scores.movedim(1, -1).view(6, -1)  # of the same memory
                target.fill_(3)
                rows[0, 7], rows[1, 3], rows[2, 7], rows[3, 7], rows[3, 3] = (
                    torch.tensor([math.nan, math.inf, math.inf, -math.inf, -math.inf], device=device).to(dtype).unbind()
                )
                if device.type == "cuda":
                    target.view(-1)[5] = shape[1]
                leaf = scores.requires_grad_()
                loss = comp_sum_loss(leaf, target, 1.5, reduction="none")
                slopes = torch.autograd.grad(loss, leaf, grad)[0].movedim(1, -1).reshape(6, -1)
                wrong = [True, False, True, False, False, device.type == "cuda"]
                for found in (loss.detach().view(-1, 1), slopes):
                    assert found.isnan().any(1).tolist() == wrong, f"{shape}: NaN in {found.isnan().any(1).tolist()}"
                assert loss.view(-1)[1] == 0, "an infinite score of the target makes the loss 0"

        yield f"comp_sum off a 16-byte boundary {label}", off_the_boundary
        yield f"comp_sum NaN and infinities {label}", no_numbers

    def huge() -> None:
        classes = 4099
        rows = 8 * (2**31 // classes // 8 + 2)  # the last eight then begin where the first eight do in their packs
        if torch.cuda.mem_get_info(device)[0] < 8 * 2**31:
            return
        scores = torch.empty(rows, classes, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
        target = torch.randint(classes, (rows,), device=device)
        loss = comp_sum_loss(scores, target, 1.5, reduction="none")
        (slopes,) = torch.autograd.grad(loss.sum(), scores)
        last = scores[-8:].detach().clone().requires_grad_()
        alone = comp_sum_loss(last, target[-8:], 1.5, reduction="none")
        assert torch.equal(loss[-8:], alone)
        assert_close(slopes[-8:], torch.autograd.grad(alone.sum(), last)[0].double())

    if device.type == "cuda":
        yield "comp_sum beyond 2^31 scores", huge


def _both(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], object]:
    """Forward and backward of a loss."""

    def call(inputs: Any) -> object:
        scores, target = inputs
        return torch.autograd.grad(loss(scores, target), scores)

    return call


def _liger() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Liger-Kernel's cross-entropy where it is installed. It writes the gradient over the scores, so it comes last."""
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return None
    return liger_cross_entropy


def benchmarks() -> Iterator[Benchmark]:
    """The mean loss and its gradient, tau = 1.5, against cross-entropy."""
    liger = _liger()
    for shape in BENCHMARK_SHAPES:
        for dtype in (torch.bfloat16, torch.float32):

            def inputs(device: torch.device, shape=shape, dtype=dtype) -> tuple[Tensor, Tensor]:
                scores = torch.empty(shape, device=device, dtype=dtype).normal_().requires_grad_()
                return scores, torch.randint(shape[1], shape[:1] + shape[2:], device=device)

            calls = {
                "ours": _both(lambda scores, target: comp_sum_loss(scores, target, 1.5)),
                "cross_entropy": _both(F.cross_entropy),
                "cross_entropy_compiled": _both(torch.compile(F.cross_entropy, fullgraph=True, dynamic=False)),
            }
            rows_of_classes = len(shape) == 2
            if liger and rows_of_classes:
                calls["liger"] = _both(liger)
            yield Benchmark(
                "comp_sum",
                {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")},
                (3 * shape[1] * dtype.itemsize + ROW_BYTES) * (math.prod(shape) // shape[1]),
                inputs,
                calls,
                TARGET_SHARE,
                skipped={} if liger or not rows_of_classes else {"liger": "not installed"},
                target_ratios={"cross_entropy": 1 / TARGET_TIME} if shape == BENCHMARK_SHAPES[0] else {},
            )
