"""Timing on a GPU: events around every call, inputs that are not in L2, launches queued ahead; the device's ceilings.

A call is timed on the device alone. The stream is first given something to wait for, so that the calls behind it are
queued when it ends and the host's overhead is not in the figures; inputs take turns over more memory than the L2 cache
holds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[Any], object]

_COLD_BYTES = 256 * 2**20  # more than the L2 of any GPU so far, twice over for the largest
_MOST_SETS = 64


@dataclass(frozen=True)
class Benchmark:
    """One operation at one shape, for every rival.

    Args:
        name: of the operation, e.g. "poly_norm forward".
        facts: shape, dtype and the like, for the record.
        moved: bytes a perfect kernel reads and writes.
        inputs: makes one set of inputs on a device.
        rivals: what each does with a set, ours first; called once to prepare (compile), outside of the clock.
        target_share: of the measured copy bandwidth, what we promise.
        skipped: rivals that are not there, and why.
        target_ratios: by rival, its time over ours that we promise at least.
    """

    name: str
    facts: dict[str, Any]
    moved: int
    inputs: Callable[[torch.device], Any]
    rivals: dict[str, Call]
    target_share: float = 0.8
    skipped: dict[str, str] = field(default_factory=dict)
    target_ratios: dict[str, float] = field(default_factory=dict)


def sets_of(make: Callable[[torch.device], Any], device: torch.device, moved: int) -> list[Any]:
    """As many sets of inputs as are needed to keep each one out of the cache until its turn."""
    count = min(_MOST_SETS, max(2, -(-_COLD_BYTES // max(moved, 1)) + 1))
    return [make(device) for _ in range(count)]


def device_milliseconds(call: Call, sets: Sequence[Any], *, rounds: int = 5, calls: int = 12) -> list[float]:
    """Milliseconds of each call on the device.

    Args:
        call: what is timed.
        sets: inputs, taken in turn.
        rounds: times the queue is filled.
        calls: per round.
    """
    for inputs in list(sets)[:3]:
        call(inputs)
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(sets[0])
    ahead = (time.perf_counter() - start) * calls * 2  # how long the host takes to queue a round, generously
    torch.cuda.synchronize()
    times: list[float] = []
    turn = 0
    for _ in range(rounds):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        torch.cuda._sleep(int(2e9 * min(ahead, 0.1)))  # cycles, at about 2 GHz
        for begin, end in events:
            inputs = sets[turn % len(sets)]
            turn += 1
            begin.record()
            call(inputs)
            end.record()
        torch.cuda.synchronize()
        times += [begin.elapsed_time(end) for begin, end in events]
    return times


def ceilings(device: torch.device) -> dict[str, float]:
    """What this GPU can do: bytes a second of a copy (read and written), bfloat16 operations a second of a product."""
    free, _ = torch.cuda.mem_get_info(device)
    elements = int(min(2**30, free // 8)) // 2
    source = torch.ones(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(device_milliseconds(lambda _: target.copy_(source), [None], calls=5))
    size = 8192
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = statistics.median(device_milliseconds(lambda _: left @ right, [None], calls=5))
    return {
        "copy_bytes_per_s": 2 * source.untyped_storage().nbytes() / copy * 1e3,
        "bfloat16_flop_per_s": 2 * size**3 / product * 1e3,
    }


def run(
    benchmark: Benchmark,
    device: torch.device,
    copy_bytes_per_s: float,
    deadline: float,
    *,
    timer: Callable[[Call, Sequence[Any]], list[float]] = device_milliseconds,
) -> dict[str, Any]:
    """Times of every rival that runs before the deadline, and which share of the copy bandwidth ours reaches."""
    sets = sets_of(benchmark.inputs, device, benchmark.moved)
    skipped, table = dict(benchmark.skipped), {}
    for name, call in benchmark.rivals.items():
        if name != "ours" and time.monotonic() > deadline:
            skipped[name] = "out of time"
            continue
        try:
            call(sets[0])
            milliseconds = timer(call, sets)
        except (RuntimeError, TypeError) as error:  # a peer that cannot do this shape, or is out of memory
            if name == "ours":
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        low, middle, high = statistics.quantiles(milliseconds, n=4)
        table[name] = {"median_ms": round(middle, 5), "iqr_ms": round(high - low, 5)}
    ours = table["ours"]["median_ms"]
    for row in table.values():
        row["ratio_to_ours"] = round(row["median_ms"] / ours, 3)
    share = benchmark.moved / (ours / 1e3) / copy_bytes_per_s
    ratios = {
        name: {"target": round(least, 3), "met": table[name]["ratio_to_ours"] >= least}
        for name, least in benchmark.target_ratios.items()
        if name in table
    }
    return {
        "name": benchmark.name,
        **benchmark.facts,
        "moved_bytes": benchmark.moved,
        "share_of_copy": round(share, 3),
        "target_share": benchmark.target_share,
        "met": share >= benchmark.target_share,
        **({"target_ratios": ratios} if ratios else {}),
        "rivals": table,
        **({"skipped": skipped} if skipped else {}),
    }
