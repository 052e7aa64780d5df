"""The conditional GAN: its penalty, its distance, its average, and that a killed run resumes to the same bits."""

from __future__ import annotations

import copy
import json
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.engine.forked import run_jobs
from tests.engine.test_resume import KILLED, assert_same_run, kill_at
from zoo.data import Shapes
from zoo.errors import DataError
from zoo.norms import ConditionalEvoNorm2d, EvoNorm2d
from zoo.tasks import ConditionalGAN
from zoo.tasks.gan import Discriminator, r1_penalty, sliced_wasserstein

TINY = {"num_classes": 3, "size": 12, "latent": 4, "width": 4}

# 8 batches an epoch, 16 steps.
SMALL = [
    "fit",
    "--config=gan/shapes_r1",
    "--config=_parts/quiet",
    "--trainer.max_steps=16",
    "--trainer.val_check_interval=8",
    "--trainer.log_every_n_steps=1",
    "--last.every_n_train_steps=3",
    *(f"--model.{name}={value}" for name, value in TINY.items()),
    "--data.size=12",
    "--data.num_classes=3",
    "--data.length=48",
    "--data.val_length=12",
    "--data.batch_size=6",
    "--model.norm.groups=2",
]


def pictures(length: int, seed: int = 0, **options: object) -> tuple[Tensor, Tensor]:
    data = Shapes(size=16, length=length, seed=seed, **options).pictures("train")  # type: ignore[arg-type]
    return data.pictures.float() / 255, data.classes[:, 0]


def test_the_layers_are_evonorms_of_each_picture_alone() -> None:
    model = ConditionalGAN(**TINY)
    assert sum(isinstance(m, ConditionalEvoNorm2d) for m in model.generator.modules()) == 5
    assert sum(isinstance(m, EvoNorm2d) for m in model.discriminator.modules()) == 5
    batch, classes = torch.rand(4, 3, 12, 12), torch.tensor([0, 1, 2, 0])
    together = model.discriminator(batch, classes)
    alone = torch.cat([model.discriminator(batch[i : i + 1], classes[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone)
    made = model(torch.randn(4, 4), classes)
    assert made.shape == (4, 3, 12, 12)
    assert 0 <= made.min() < made.max() <= 1


def test_the_penalty_is_the_squared_gradient_of_each_score() -> None:
    weight = torch.randn(3, 12, 12)
    batch = torch.rand(5, 3, 12, 12, requires_grad=True)
    factor = torch.arange(1.0, 6.0)  # another gradient for each picture
    score = factor * (batch * weight).sum((1, 2, 3))
    torch.testing.assert_close(r1_penalty(score, batch), (factor.square() * weight.square().sum()).mean())


@pytest.mark.parametrize("variant", ["s0", "s1", "s2"])
def test_the_penalty_is_differentiated_through_the_norms(variant: str) -> None:
    """Its gradient in float64 against differences, along a random direction of all parameters."""
    net = Discriminator(3, 4, nn.Identity, lambda c: EvoNorm2d(c, variant, groups=2)).double()
    batch = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0, 2])
    parameters = dict(net.named_parameters())

    def penalty(values: dict[str, Tensor]) -> Tensor:
        return r1_penalty(torch.func.functional_call(net, values, (batch, classes)), batch)

    gradients = torch.autograd.grad(penalty(parameters), list(parameters.values()), allow_unused=True)
    constant = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    assert constant == ["trunk.3.bias", "score.bias"]  # added behind the last non-linear layer
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    slope = sum((g * directions[n]).sum() for n, g in zip(parameters, gradients, strict=True) if g is not None)
    step = 1e-5
    ends = [
        penalty({n: (p + sign * step * directions[n]).detach().requires_grad_() for n, p in parameters.items()})
        for sign in (1, -1)
    ]
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-5, atol=0)


def test_the_distance_tells_pictures_apart() -> None:
    real, _ = pictures(300)
    other, _ = pictures(300, seed=1)
    floor = sliced_wasserstein(real, other)
    assert sliced_wasserstein(real, real[torch.randperm(300)]) == 0
    noise = torch.rand_like(real)
    grey = real.mean((2, 3), keepdim=True).expand_as(real)  # the colours of the pictures and no shape
    shuffled = real.flatten(2)[:, :, torch.randperm(256)].view_as(real)
    for fake in (noise, grey, shuffled, 1 - 0.5 * real):
        assert sliced_wasserstein(real, fake) > 2 * floor


def test_the_distance_tells_classes_apart_by_their_edges() -> None:
    real, classes = pictures(800, num_classes=4, noise=0.0)
    circles, crosses = real[classes == 0], real[classes == 3]
    same = sliced_wasserstein(circles[:100], circles[100:])
    assert sliced_wasserstein(circles[:100], crosses[:100]) > 1.3 * same


def test_the_average_follows_the_generator() -> None:
    model = ConditionalGAN(**TINY, variant="b0", ema_decay=0.9)
    before = [p.clone() for p in model.average.parameters()]
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(1)
    model.generator.norm.norm.running_var.fill_(3)  # type: ignore[union-attr]
    model._update_average()
    for was, now in zip(before, model.average.parameters(), strict=True):
        torch.testing.assert_close(now, was + 0.1)
        assert not now.requires_grad
    assert (model.average.norm.norm.running_var == 3).all()  # type: ignore[union-attr]


def test_samples_are_of_the_average_and_draw_nothing_from_the_global_stream() -> None:
    model = ConditionalGAN(**TINY, variant="b0")
    classes = torch.tensor([0, 1, 2])
    before = torch.get_rng_state()
    found = model.sample(classes)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for p in model.generator.parameters():
            p.zero_()
    assert torch.equal(model.sample(classes), found)
    assert not torch.equal(model.sample(classes, seed=1), found)
    assert model.average.training
    assert (model.average.norm.norm.running_var == 1).all()  # type: ignore[union-attr]


def test_the_losses_are_those_of_the_papers() -> None:
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.25])
    hinge = ConditionalGAN(**TINY, loss="hinge")._discriminator_loss(real, fake)
    torch.testing.assert_close(hinge, torch.tensor(0.5 / 2 + 1.25 / 2))
    logistic = ConditionalGAN(**TINY)._discriminator_loss(real, fake)
    torch.testing.assert_close(logistic, -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()))


def test_a_penalty_every_few_steps_weighs_so_much_more() -> None:
    """The first step of plain gradient descent, against the loss written out."""
    still, moving = partial(torch.optim.SGD, lr=0.0), partial(torch.optim.SGD, lr=1.0)
    model = ConditionalGAN(**TINY, r1_gamma=2.0, r1_every=3, optimizer=still, discriminator_optimizer=moving)
    nn.init.zeros_(model.generator.last.weight)  # every generated picture is the same, whatever the noise
    real, classes = torch.rand(4, 3, 12, 12), torch.tensor([0, 1, 2, 0])
    net = copy.deepcopy(model.discriminator)
    with torch.no_grad():
        fake = model.generator(torch.randn(4, 4), classes)
    scaled = (2 * real - 1).requires_grad_()
    score = net(scaled, classes)
    loss = (-score).exp().log1p().mean() + net(fake, classes).exp().log1p().mean()
    (loss + 2.0 / 2 * 3 * r1_penalty(score, scaled)).backward()

    loader = DataLoader(list(zip(real, classes, strict=True)), batch_size=4)
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_steps=1, accelerator="cpu", num_sanity_val_steps=0, limit_val_batches=0, **off).fit(
        model, loader, loader
    )
    for before, after in zip(net.parameters(), model.discriminator.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - before.grad)


@pytest.mark.slow
def test_a_run_trains_resumes_to_the_same_bits_and_reports(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("whole", "killed", "plain")}
    for folder in folders.values():
        folder.mkdir()
    jobs = [
        (folders["whole"], SMALL),
        (folders["killed"], [*SMALL, *kill_at(11)]),
        (folders["killed"], [*SMALL, "--ckpt_path=last"]),
        (folders["plain"], [*SMALL, "--model.r1_gamma=0", "--model.norm=null", "--model.act=torch.nn.ReLU"]),
    ]
    assert run_jobs(jobs) == [0, KILLED, 0, 0], "\n".join((f / "log.txt").read_text()[-3000:] for f in folders.values())
    assert KILLED == -signal.SIGKILL
    runs = {name: folder / "runs/shapes_r1" for name, folder in folders.items()}
    assert_same_run(runs["killed"], runs["whole"])

    rows = [json.loads(line) for line in (runs["whole"] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "g/loss" in row] == list(range(16))  # a step a batch, for two optimizers
    penalties = [row["d/r1"] for row in rows if "g/loss" in row]
    assert penalties == [penalties[step - step % 4] for step in range(16)]  # the last one, until the next
    assert len(set(penalties)) == 4
    assert min(penalties) > 0
    assert [row["step"] for row in rows if "val/swd" in row] == [7, 15]
    assert not any("d/r1" in row for row in map(json.loads, (runs["plain"] / "metrics.jsonl").read_text().splitlines()))
    state = torch.load(runs["whole"] / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 16
    for optimizer in state["optimizer_states"]:
        assert {float(moments["step"]) for moments in optimizer["state"].values()} == {16.0}
    assert (runs["whole"] / "report/samples.png").stat().st_size > 1000
    assert json.loads((runs["whole"] / "report/result.json").read_text())["best"]["metric"] == "val/swd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 18}, "size must be a multiple of 4 from 8 on, got 18"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"r1_every": 0}, "r1_every must be at least 1, got 0"),
        ({"r1_gamma": -1.0}, "r1_gamma must not be negative, got -1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"loss": "wasserstein"}, "loss must be non_saturating or hinge, got 'wasserstein'"),
        ({"norm": "evonorm_b0"}, "norm must take statistics of each picture alone.*got 'evonorm_b0'"),
        ({"norm": "torch.nn.BatchNorm2d"}, "norm must take statistics of each picture alone"),
    ],
)
def test_what_it_cannot_be_built_from_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionalGAN(**{**TINY, **arguments})


@pytest.mark.parametrize("name", ["num_classes", "size"])
def test_data_that_do_not_fit_are_refused(name: str) -> None:
    model = ConditionalGAN(**TINY)
    data = SimpleNamespace(**{"num_classes": 3, "size": 12, name: 16})
    model.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    with pytest.raises(DataError, match=f"the data has {name} 16, the model {TINY[name]}; give model.{name} and"):
        model.setup("fit")
