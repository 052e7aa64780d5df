"""Models inside something: LightningModule, torch.compile, DistributedDataParallel, and the flags they hand through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.attacks.models import normalised, pictures
from zoo.attacks import PGDAttack


def _attack() -> PGDAttack:
    return PGDAttack(eps=0.1, steps=3, generator=torch.Generator().manual_seed(0))


def _seeded() -> nn.Module:
    torch.manual_seed(0)
    return normalised()


def test_a_lightning_module_is_attacked_through_its_forward() -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _seeded()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    x, y = pictures()
    assert torch.equal(_attack()(Task(), x, y), _attack()(_seeded(), x, y))


def test_a_compiled_model_is_attacked_like_the_plain_one() -> None:
    x, y = pictures()
    model = _seeded()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x_adv = _attack()(compiled, x, y)
    torch.testing.assert_close(x_adv, _attack()(_seeded(), x, y))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [layer.training for layer in model] == [layer.training for layer in normalised()]
    compiled(x)  # and still learns its statistics outside
    assert model[1].num_batches_tracked == 1
    torch.compiler.reset()


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_a_data_parallel_model_is_attacked_and_trains_on(tmp_path: Path) -> None:
    x, y = pictures()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(_seeded())
        calls: list[int] = []
        model.register_forward_hook(lambda *_: calls.append(1))
        first = _attack()(model, x, y)
        assert calls == []  # passes through the wrapper talk to the other ranks
        for _ in range(2):
            model(_attack()(model, x, y)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
    assert torch.equal(first, _attack()(_seeded(), x, y))
