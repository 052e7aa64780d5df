"""Synchronised statistics: two gloo processes with parts of a batch, one of them larger, against the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests._numerics import assert_close
from tests.norms.evonorm_baselines import oracle_b
from zoo.norms import EvoNorm2d, EvoNorm2dB0, EvoNorm2dS0, convert_sync_evonorm

SPLITS = {"unequal": slice(0, 2), "empty": slice(0, 0)}  # the samples of rank 0, of five
CASES = [
    (variant, backend, layout, split)
    for variant in ("b0", "b1", "b2")
    for backend, layout, split in (
        ("auto", torch.contiguous_format, "unequal"),
        ("auto", torch.channels_last, "unequal"),
        ("auto", torch.contiguous_format, "empty"),
        ("eager", torch.contiguous_format, "unequal"),
    )
]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")


def _values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (5, 4, 3, 3), "grad": (5, 4, 3, 3), "v": (4,), "weight": (4,), "bias": (4,)}
    made = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    made["x"][2:] += 3  # so that the parts of the batch have other means
    return made


def _derivatives(y: Tensor, grad: Tensor, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """First derivatives, and dx of a penalty on the first dx."""
    first = torch.autograd.grad(y, [x, *parameters], grad, create_graph=True)
    return [t.detach() for t in (*first, *torch.autograd.grad(first[0].square().sum(), x))]


def _run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        values, results = _values(), []
        for variant, backend, layout, split in CASES:
            part = SPLITS[split] if rank == 0 else slice(SPLITS[split].stop, None)
            layer = convert_sync_evonorm(EvoNorm2d(4, variant, backend=backend, dtype=torch.float64))
            layer.load_state_dict({name: values[name] for name, _ in layer.named_parameters()}, strict=False)
            x = values["x"][part].clone().contiguous(memory_format=layout).requires_grad_()
            y = layer(x)
            # Without create_graph the kernels serve, with it the formula.
            plain = torch.autograd.grad(layer(x), [x, *layer.parameters()], values["grad"][part])
            twice = _derivatives(y, values["grad"][part], x, list(layer.parameters()))
            before = layer.running_var.clone()
            layer(x[:0])  # empty on every rank
            assert torch.equal(layer.running_var, before)
            unbiased = EvoNorm2d(4, variant, unbiased_running_var=True, process_group="world", dtype=torch.float64)
            unbiased(x)
            results.append((y.detach(), plain, twice, layer.running_var, unbiased.running_var))
        torch.save(results, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.spawn(_run, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    values = _values()
    for case, first, second in zip(CASES, *ranks, strict=True):
        variant = case[0]
        x, weight, bias, v = (values[name].clone().requires_grad_() for name in ("x", "weight", "bias", "v"))
        parameters = [weight, bias, v] if variant == "b0" else [weight, bias]
        y = oracle_b(x, v if variant == "b0" else None, weight, bias, None, variant=variant)
        expected = _derivatives(y, values["grad"], x, parameters)
        assert_close(torch.cat([first[0], second[0]]), y.detach())
        for which in (1, 2):
            assert_close(torch.cat([first[which][0], second[which][0]]), expected[0])
            for ours, theirs, wanted in zip(first[which][1:], second[which][1:], expected[1:], strict=False):
                if ours.shape == (4,):  # data parallelism adds up what the ranks have
                    assert_close(ours + theirs, wanted)
        assert_close(torch.cat([first[2][-1], second[2][-1]]), expected[-1])
        variance, start = values["x"].var((0, 2, 3), correction=0), torch.ones(4, dtype=torch.float64)
        moved = start + 0.1 * (variance - start)
        for rank in (first, second):
            assert_close(rank[3], moved + 0.1 * (variance - moved))
            assert_close(rank[4], start + 0.1 * (values["x"].var((0, 2, 3), correction=1) - start))


def test_conversion_reaches_b_layers_alone() -> None:
    model = nn.Sequential(EvoNorm2dB0(4), nn.Sequential(EvoNorm2dS0(4), EvoNorm2dB0(4)))
    assert convert_sync_evonorm(model) is model
    assert [m.process_group for m in model.modules() if isinstance(m, EvoNorm2d)] == ["world", None, "world"]
    model(torch.randn(2, 4, 3, 3))  # one process and nothing initialised: its own batch
