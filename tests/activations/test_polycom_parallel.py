"""Tensor parallelism: two gloo processes, each with a part of the feature axis, against the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests._numerics import assert_close
from tests.activations.polycom_baselines import oracle_poly_norm
from zoo.activations.polycom import PolyNorm, PolyNormGLU

WIDTHS = (7, 4)  # uneven on purpose: D is a sum over ranks, not width times world size
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")


def _values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in {
            "x": (5, 11),
            "up": (5, 11),
            "grad": (5, 11),
            "scores": (5,),
            "weight": (3,),
            "bias": (1,),
        }.items()
    }
    made["x"][3] *= 1e9  # a row that must be rescaled by the same factor on all ranks, although
    made["x"][3, 7:] = 1e-3  # one rank sees nothing large
    return made


def _gradient_step(
    y: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, parameters: list[torch.Tensor]
) -> list[torch.Tensor]:
    """First derivatives, and those of a penalty on dx, in which the constant term has no part."""
    first = torch.autograd.grad(y, [x, *parameters], grad, create_graph=True)
    penalty = first[0][:3].square().sum()
    return [t.detach() for t in (*first, *torch.autograd.grad(penalty, [x, parameters[0]]))]


def _shard(rank: int) -> slice:
    return slice(0, WIDTHS[0]) if rank == 0 else slice(WIDTHS[0], None)


def _run(rank: int, folder: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        values = {name: value.to(dtype) for name, value in _values().items()}
        part = _shard(rank)
        results: dict[str, Any] = {}
        for norm in ("rms", "l2"):
            module = PolyNorm(norm=norm, process_group=dist.group.WORLD, dtype=dtype)
            module.load_state_dict({"weight": values["weight"], "bias": values["bias"]})
            x = values["x"][:, part].clone().requires_grad_()
            y = module(x)
            results[norm] = [y.detach(), *_gradient_step(y, values["grad"][:, part], x, list(module.parameters()))]
        glu = PolyNormGLU(process_group=dist.group.WORLD, dtype=dtype)
        glu.load_state_dict({"weight": values["weight"], "bias": values["bias"]})
        x, scores = values["x"][:, part].clone().requires_grad_(), values["scores"].clone().requires_grad_()
        y = glu(x, values["up"][:, part], scores)
        wanted = [x, *glu.parameters(), scores]
        results["glu"] = [y.detach(), *torch.autograd.grad(y, wanted, values["grad"][:, part])]
        torch.save(results, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_ranks_equal_one(tmp_path: Path, dtype: torch.dtype) -> None:
    mp.spawn(_run, (str(tmp_path), dtype), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    values = {name: value.to(dtype).double() for name, value in _values().items()}
    for norm in ("rms", "l2"):
        x, weight, bias = (values[name].clone().requires_grad_() for name in ("x", "weight", "bias"))
        y = oracle_poly_norm(x, weight, bias, norm=norm)
        expected = [y.detach(), *_gradient_step(y, values["grad"], x, [weight, bias])]
        _compare([rank[norm] for rank in ranks], expected, sharded={0, 1, 4})  # y, dx and the penalty's dx
    x, weight, bias, scores = (values[name].clone().requires_grad_() for name in ("x", "weight", "bias", "scores"))
    y = oracle_poly_norm(x, weight, bias) * values["up"] * scores[:, None]
    expected = [y.detach(), *torch.autograd.grad(y, [x, weight, bias, scores], values["grad"])]
    _compare([rank["glu"] for rank in ranks], expected, sharded={0, 1})


def _compare(ranks: list[list[torch.Tensor]], expected: list[torch.Tensor], sharded: set[int]) -> None:
    """Shards put together, and replicated gradients equal on both ranks, against the whole."""
    for i, wanted in enumerate(expected):
        if i in sharded:
            assert_close(torch.cat([rank[i] for rank in ranks], -1), wanted, loose=4)
        else:
            assert torch.equal(ranks[0][i], ranks[1][i])
            assert_close(ranks[0][i], wanted, loose=4)
