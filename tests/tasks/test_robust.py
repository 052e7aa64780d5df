"""Callbacks of robust training: evaluation under attack, averaged weights, ramps; and that a resume repeats the run."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zoo.attacks import PGDAttack, robust_accuracy
from zoo.cli import main
from zoo.engine.callbacks import LastCheckpoint
from zoo.errors import ComponentArgumentError, RunError
from zoo.tasks import EMA, AdversarialClassifier, ImageClassifier, LossRamp, RobustEval

NETWORK = {"num_classes": 4, "in_channels": 1, "backbone": {"name": "mlp", "size": 4, "hidden": [16]}}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def loader() -> DataLoader:
    """Forty pictures that no two classes share much of, ten a batch."""
    target = torch.arange(40) % 4
    pictures = 0.3 * torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    pictures[torch.arange(40), 0, target] += 0.4
    return DataLoader(TensorDataset(pictures, target), batch_size=10, generator=torch.Generator())


@pytest.fixture
def model(loader: DataLoader) -> ImageClassifier:
    """A classifier that is right about most pictures, and of some only as they are."""
    model = ImageClassifier(**NETWORK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(15):
        for pictures, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pictures), target).backward()
            optimizer.step()
    return model


def validated(model: L.LightningModule, loader: DataLoader, *callbacks: L.Callback) -> dict[str, float]:
    (found,) = L.Trainer(**QUIET, callbacks=list(callbacks)).validate(model, loader, verbose=False)  # type: ignore[arg-type]
    return dict(found)


# RobustEval


def test_robust_accuracy_is_that_of_all_pictures_together(model: ImageClassifier, loader: DataLoader) -> None:
    pictures, target = loader.dataset.tensors  # type: ignore[attr-defined]
    attack = PGDAttack.gowal_eval(eps=0.15, random_start=None)
    expected = robust_accuracy(model, pictures, target, attack)
    found = validated(model, loader, RobustEval({"eps": 0.15, "random_start": None}))
    assert found["val/robust_acc"] == pytest.approx(expected)
    assert 0.1 < expected < found["val/acc"]
    assert validated(model, loader, RobustEval(attack))["val/robust_acc"] == pytest.approx(expected)


def test_a_test_reports_test_figures(model: ImageClassifier, loader: DataLoader) -> None:
    trainer = L.Trainer(**QUIET, callbacks=[RobustEval({"eps": 0.1, "steps": 2})])  # type: ignore[arg-type]
    (found,) = trainer.test(model, loader, verbose=False)
    assert {"test/acc", "test/robust_acc"} <= set(found)


@pytest.mark.parametrize("samples", [1, 10, 13, 40, 99, None])
def test_the_first_pictures_are_attacked(samples: int | None, model: ImageClassifier, loader: DataLoader) -> None:
    pictures, target = loader.dataset.tensors  # type: ignore[attr-defined]
    target[:10] = 5  # of no class: always wrong
    model.num_classes = 6
    seen = []

    def margin(logits: Tensor, y: Tensor, _: Any) -> Tensor:
        seen.append(y)
        return logits.sum(1)

    callback = RobustEval({"eps": 1e-6, "steps": 1, "objective": margin, "keep_best": False}, max_samples=samples)
    callback.on_validation_epoch_start(
        SimpleNamespace(state=SimpleNamespace(fn="validate"), sanity_checking=False, world_size=1, global_rank=0), model
    )
    logged: list[tuple[float, int]] = []
    model.log_dict = lambda figures, batch_size, **_: logged.append((figures["val/robust_acc"], batch_size))  # type: ignore[method-assign]
    for batch in loader:
        callback.on_validation_batch_end(None, model, None, batch, 0)  # type: ignore[arg-type]
    count = min(samples or 40, 40)
    assert sum(n for _, n in logged) == count
    model.eval()
    right = (model(pictures[:count]).argmax(1) == target[:count]).float().mean()
    assert sum(acc * n for acc, n in logged) / count == pytest.approx(right.item())


def test_a_process_takes_its_share(model: ImageClassifier) -> None:
    callback = RobustEval(max_samples=10)
    for world, share in ((1, 10), (4, 3), (16, 1)):
        state = SimpleNamespace(fn="validate")
        trainer = SimpleNamespace(state=state, sanity_checking=False, world_size=world, global_rank=0)
        callback.on_validation_epoch_start(trainer, model)  # type: ignore[arg-type]
        assert callback._left == share


def test_evaluation_repeats_itself_and_draws_from_nowhere_else(model: ImageClassifier, loader: DataLoader) -> None:
    generator = torch.Generator().manual_seed(3)
    attack = PGDAttack(eps=0.15, steps=1, step_ratio=0.01, objective="ce", generator=generator)
    callback = RobustEval(attack)
    before = torch.get_rng_state(), generator.get_state()
    found = [validated(model, loader, callback)["val/robust_acc"] for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(generator.get_state(), before[1])
    assert attack.generator is generator
    drawn: dict[int, list[Tensor]] = {0: [], 1: []}
    for seed, starts in drawn.items():
        objective = lambda logits, y, clean, starts=starts: starts.append(logits.detach()) or logits.sum(1)  # noqa: E731
        validated(model, loader, RobustEval({"eps": 0.15, "steps": 1, "objective": objective}, seed=seed))
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_the_model_stays_as_it_was(model: ImageClassifier, loader: DataLoader) -> None:
    before = copy.deepcopy(model.state_dict())
    model.zero_grad()
    validated(model, loader, RobustEval({"eps": 0.1}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad and not p.is_inference() for p in model.parameters())


def test_the_worst_case_is_what_more_attacks_leave(model: ImageClassifier, loader: DataLoader) -> None:
    weak = {"eps": 0.15, "steps": 1, "step_size": 0.01, "step_decay": None, "random_start": None}
    alone = validated(model, loader, RobustEval(weak))
    both = validated(model, loader, RobustEval(weak, autoattack="mini"))
    assert "val/pgd_acc" not in alone
    assert both["val/pgd_acc"] == alone["val/robust_acc"]
    assert both["val/robust_acc"] < both["val/pgd_acc"]


def test_every_so_many_epochs_after_the_sanity_check(loader: DataLoader) -> None:
    seen = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(trainer.sanity_checking or "val/robust_acc" in trainer.callback_metrics)
            trainer._logger_connector._callback_metrics.clear()  # it keeps those of earlier epochs

    callbacks = [RobustEval({"eps": 0.1, "steps": 1}, every_n_epochs=2), Watch()]
    trainer = L.Trainer(**QUIET, callbacks=callbacks, max_epochs=4, enable_checkpointing=False)  # type: ignore[arg-type]
    trainer.fit(ImageClassifier(**NETWORK), loader, loader)
    assert seen == [True, False, True, False, True]


def test_the_sanity_check_is_not_attacked(loader: DataLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked = []
    monkeypatch.setattr("zoo.tasks.robust.evaluate_robustness", lambda *_: attacked.append(1))
    trainer = L.Trainer(**QUIET, callbacks=[RobustEval()], max_epochs=0, enable_checkpointing=False)  # type: ignore[arg-type]
    state = SimpleNamespace(fn="fit")
    model, (batch, *_) = ImageClassifier(**NETWORK), list(loader)
    callback = trainer.callbacks[0]  # type: ignore[attr-defined]
    for sanity_checking, count in ((True, 0), (False, 1)):
        facts = {"current_epoch": 0, "world_size": 1, "global_rank": 0}
        callback.on_validation_epoch_start(
            SimpleNamespace(state=state, sanity_checking=sanity_checking, **facts), model
        )
        if count:
            monkeypatch.setattr(model, "log_dict", lambda *_, **__: None)
            monkeypatch.setattr(
                "zoo.tasks.robust.evaluate_robustness", lambda *_: attacked.append(1) or {"worst_case": 0.0, "pgd": 0.0}
            )
        callback.on_validation_batch_end(None, model, None, batch, 0)
        assert len(attacked) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_epochs": 0}, "RobustEval: every_n_epochs must be at least 1, got 0"),
        ({"max_samples": 0}, "RobustEval: max_samples must be at least 1, got 0"),
        ({"autoattack": "some"}, "RobustEval: autoattack must be none, mini or full, got 'some'"),
    ],
)
def test_bad_arguments_of_an_evaluation_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustEval(**arguments)


class FakeAutoAttack:
    """The interface of the authors' package; it shifts every picture by eps, with a generator it seeds itself."""

    made: ClassVar[list[FakeAutoAttack]] = []

    def __init__(self, model: nn.Module, norm: str, eps: float, seed: int, verbose: bool, device: torch.device) -> None:
        self.model, self.norm, self.eps, self.seed = model, norm, eps, seed
        self.apgd_targeted, self.fab = SimpleNamespace(n_target_classes=9), SimpleNamespace(n_target_classes=9)
        assert (verbose, device.type) == (False, "cpu")
        self.made.append(self)

    def run_standard_evaluation(self, x: Tensor, y: Tensor, bs: int) -> Tensor:
        torch.manual_seed(self.seed)
        assert not torch.is_inference_mode_enabled()
        assert not self.model.training
        assert bs == len(x)
        x.requires_grad_()
        self.model(x).gather(1, y[:, None]).sum().backward()  # parameters must not collect this
        assert x.grad is not None
        return (x - self.eps * x.grad.sign()).clamp(0, 1)


def test_autoattack_is_called_as_its_package_wants(
    model: ImageClassifier, loader: DataLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("autoattack")
    package.AutoAttack = FakeAutoAttack  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "autoattack", package)
    monkeypatch.setattr(FakeAutoAttack, "made", [])
    weak = {"norm": "l2", "eps": 0.3, "steps": 1, "step_rule": "normalized", "step_size": 1e-6, "random_start": None}
    before = torch.get_rng_state()
    model.zero_grad()
    found = validated(model, loader, RobustEval(weak, autoattack="full", seed=5))
    assert found["val/robust_acc"] < found["val/pgd_acc"] == found["val/acc"]
    made = FakeAutoAttack.made[0]
    assert (made.norm, made.eps, made.seed) == ("L2", 0.3, 5)
    assert (made.apgd_targeted.n_target_classes, made.fab.n_target_classes) == (3, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_without_the_package_of_autoattack_its_origin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "autoattack", None)
    with pytest.raises(
        RunError, match="run pip install git.https://github.com/fra31/auto-attack, or take autoattack: m"
    ):
        RobustEval(autoattack="full")


# EMA


class Watch(L.Callback):
    """Weights after each step, and those in place while a validation runs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.steps.append(copy.deepcopy(pl_module.net.state_dict()))  # type: ignore[union-attr]

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(copy.deepcopy(pl_module.net.state_dict()))  # type: ignore[union-attr]


def test_weights_in_bfloat16_are_averaged_in_float32(loader: DataLoader) -> None:
    average, watch = EMA(0.9), Watch()
    model = ImageClassifier(num_classes=4, in_channels=1, width=4, depth=1)
    options = {**QUIET, "precision": "bf16-true"}
    trainer = L.Trainer(**options, callbacks=[average, watch], max_epochs=2, enable_checkpointing=False)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader)
    for name, weights in model.net.named_parameters():
        assert weights.dtype is torch.bfloat16
        expected = watch.steps[0][name].float()
        for t, step in enumerate(watch.steps[1:], start=1):
            kept = min(0.9, (1 + t) / (10 + t))
            expected = kept * expected + (1 - kept) * step[name].float()
        torch.testing.assert_close(weights.float(), expected, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9975])
def test_the_average_is_the_formula_and_buffers_are_current(decay: float, loader: DataLoader) -> None:
    watch = Watch()
    model = ImageClassifier(num_classes=4, in_channels=1, width=4, depth=1)  # with BatchNorm
    trainer = L.Trainer(**QUIET, callbacks=[EMA(decay), watch], max_epochs=2, enable_checkpointing=False)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader)
    assert len(watch.steps) == 8
    parameters = {name for name, _ in model.net.named_parameters()}
    average = {name: watch.steps[0][name].double() for name in parameters}
    for t, step in enumerate(watch.steps[1:], start=1):
        kept = min(decay, (1 + t) / (10 + t))
        average = {name: kept * value + (1 - kept) * step[name].double() for name, value in average.items()}
    for found in (watch.validated[-1], model.net.state_dict()):  # the model keeps the average in the end
        for name, value in found.items():
            if name in parameters:
                torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(value, watch.steps[-1][name]), name
    assert "blocks.0.branch.0.running_mean" in watch.steps[0]


@pytest.mark.parametrize("order", [1, -1])
def test_the_average_is_what_is_attacked(order: int, loader: DataLoader) -> None:
    robust = RobustEval({"eps": 0.1, "random_start": None})
    model = ImageClassifier(**NETWORK, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    callbacks = [robust, EMA(0.99)][::order]
    trainer = L.Trainer(**QUIET, callbacks=callbacks, max_epochs=3, enable_checkpointing=False)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader)
    logged = float(trainer.callback_metrics["val/robust_acc"])
    pictures, target = loader.dataset.tensors  # type: ignore[attr-defined]
    attack = PGDAttack.gowal_eval(eps=0.1, random_start=None)
    assert logged == pytest.approx(robust_accuracy(model, pictures, target, attack))  # the average, by now


def test_a_checkpoint_at_the_end_of_training_holds_both(loader: DataLoader, tmp_path: Path) -> None:
    """One that is written only there, of a run stopped between two saves."""
    last, watch = LastCheckpoint(str(tmp_path), every_n_train_steps=100), Watch()
    trainer = L.Trainer(**QUIET, callbacks=[EMA(0.9), watch, last], max_time={"hours": 1}, max_epochs=3)  # type: ignore[arg-type]
    watch.on_train_epoch_end = lambda *_: setattr(trainer, "should_stop", True)  # type: ignore[method-assign]
    model = ImageClassifier(**NETWORK, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    trainer.fit(model, loader, loader)
    found = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = {name: value for name, value in found["current_model_state"].items() if name.startswith("net.")}
    assert found["global_step"] == len(watch.steps) == 4
    for name, value in trained.items():
        assert torch.equal(value, watch.steps[-1][name.removeprefix("net.")])
        assert torch.equal(found["state_dict"][name], model.state_dict()[name])
        assert not torch.equal(found["state_dict"][name], value)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="EMA: decay must lie in .0, 1., got"):
        EMA(decay)


# LossRamp


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("linear", [1.0, 1.5, 2.0, 3.0, 3.0]), ("cosine", [1.0, 1 + (1 - 0.5**0.5), 2.0, 3.0, 3.0])],
)
def test_a_ramp_leads_from_start_to_end_and_stays(mode: Any, expected: list[float]) -> None:
    ramp = LossRamp("nu", 1.0, 3.0, mode=mode)
    assert [ramp.value(step, 4) for step in (0, 1, 2, 4, 9)] == pytest.approx(expected)


class Seen(L.Callback):
    def __init__(self) -> None:
        self.values: list[tuple[float, float, float]] = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        loss: Any = pl_module.loss
        self.values.append((loss.tau, loss.nu, loss.attack.eps))


def test_ramps_set_their_numbers_for_each_optimizer_step(loader: DataLoader) -> None:
    seen = Seen()
    loss = {"name": "adv_comp_sum", "attack": {"eps": 0.2, "steps": 1}}
    model = AdversarialClassifier(**NETWORK, loss=loss, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    ramps = [LossRamp("tau", 1.0, 2.0, share=0.5), LossRamp("nu", 0.0, 1.0, steps=2), LossRamp("eps", 0.1, 0.1)]
    more = {"max_epochs": 2, "accumulate_grad_batches": 2, "enable_checkpointing": False}
    L.Trainer(**QUIET, **more, callbacks=[*ramps, seen]).fit(model, loader, loader)  # type: ignore[arg-type]
    assert seen.values == [(1.0, 0.0, 0.1), (1.5, 0.5, 0.1), (2.0, 1.0, 0.1), (2.0, 1.0, 0.1)]


def test_a_loss_without_the_number_is_named(loader: DataLoader) -> None:
    ramp = {"start": 0.0, "end": 1.0}
    plain = ImageClassifier(**NETWORK)
    for what, message in (("nu", "CrossEntropyLoss has no nu"), ("eps", "CrossEntropyLoss has no eps")):
        trainer = L.Trainer(**QUIET, callbacks=[LossRamp(what, **ramp)], max_epochs=1, enable_checkpointing=False)  # type: ignore[arg-type]
        with pytest.raises(ComponentArgumentError, match=f"LossRamp: {message}; ramp a number that the loss has"):
            trainer.fit(plain, loader, loader)
    LossRamp("beta", **ramp)._set(AdversarialClassifier(**NETWORK, loss="trades"), 3.0)
    with pytest.raises(ComponentArgumentError, match="AdvCompSumLoss has no beta"):
        LossRamp("beta", **ramp)._set(AdversarialClassifier(**NETWORK), 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": "rho"}, "LossRamp: what must be one of tau, nu, beta, eps, got 'rho'"),
        ({"mode": "step"}, "LossRamp: mode must be linear or cosine, got 'step'"),
        ({"share": 0.0}, "LossRamp: share must lie in .0, 1., got 0.0"),
        ({"steps": 0}, "LossRamp: steps must be at least 1, got 0"),
    ],
)
def test_bad_arguments_of_a_ramp_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossRamp(**{"what": "nu", "start": 0.0, "end": 1.0, **arguments})


# All of it, from YAML


CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: -1
  max_steps: 18
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: EMA
      init_args: {decay: 0.9}
    - class_path: RobustEval
      init_args: {attack: {eps: 0.05, steps: 3}, max_samples: 12}
    - class_path: LossRamp
      init_args: {what: eps, start: 0.0, end: 0.05, steps: 8}
    - class_path: LossRamp
      init_args: {what: tau, start: 1.0, end: 1.5, steps: 10, mode: cosine}
best: {monitor: val/robust_acc, mode: max}
last: {every_n_train_steps: 4}
model:
  class_path: AdversarialClassifier
  init_args:
    num_classes: 4
    width: 4
    loss: {name: adv_comp_sum, nu: 0.1, attack: {eps: 0.05, steps: 2}}
    optimizer:
      class_path: torch.optim.SGD
      init_args: {lr: 0.2, momentum: 0.9, nesterov: true, weight_decay: 1.0e-4}
data:
  class_path: Shapes
  init_args: {size: 12, num_classes: 4, length: 48, val_length: 24, batch_size: 8}
"""


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


def test_a_stopped_run_resumes_to_the_same_bits_and_best_is_what_was_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("robust.yaml").write_text(CONFIG)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit = ["fit", "--config=robust.yaml"]
    assert main([*fit, f"--run_dir={whole}"]) == 0
    assert main([*fit, f"--run_dir={stopped}", "--trainer.max_steps=7"]) == 0  # inside an epoch and every ramp
    assert main([*fit, f"--run_dir={stopped}", "--ckpt_path=last"]) == 0
    assert rows(stopped) == rows(whole)
    found, expected = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (stopped, whole))
    assert found["global_step"] == expected["global_step"] == 18
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), (part, name)
    assert not torch.equal(
        expected["state_dict"]["net.head.weight"], expected["current_model_state"]["net.head.weight"]
    )

    best = max(row["val/robust_acc"] for row in rows(whole) if "val/robust_acc" in row)
    assert main(["validate", "--config=robust.yaml", f"--run_dir={whole}", "--ckpt_path=best"]) == 0
    (again,) = rows(whole, "evaluations.jsonl")
    assert again["val/robust_acc"] == best
    (then,) = [row for row in rows(whole) if row.get("val/robust_acc") == best][:1]
    assert (again["val/acc"], again["val/loss"]) == (then["val/acc"], pytest.approx(then["val/loss"]))
