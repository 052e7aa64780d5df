"""The adversarial classifier: what is attacked, what is logged, what is refused, and that it resists."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from zoo.attacks import PGDAttack, robust_accuracy
from zoo.data import Digits
from zoo.errors import DataError, UnknownComponentError
from zoo.losses import AdvCompSumLoss, AdvLossOutput, PGDATLoss, PSALLoss, SmoothAdversarialCompSumLoss, TradesLoss
from zoo.tasks import AdversarialClassifier, ImageClassifier

LOSSES = {
    "adv_comp_sum": AdvCompSumLoss,
    "smooth_adv_comp_sum": SmoothAdversarialCompSumLoss,
    "psal": PSALLoss,
    "trades": TradesLoss,
    "pgd_at": PGDATLoss,
}
SMALL = {"num_classes": 4, "in_channels": 1, "backbone": {"name": "mlp", "size": 4, "hidden": [8]}}


def small(loss: object = "adv_comp_sum", **options: object) -> AdversarialClassifier:
    return AdversarialClassifier(**{**SMALL, "loss": loss, **options})  # type: ignore[arg-type]


def batch(n: int = 6, channels: int = 1) -> tuple[Tensor, Tensor]:
    return torch.rand(n, channels, 4, 4), torch.arange(n) % 4


def logged(model: AdversarialClassifier) -> dict[str, Tensor]:
    """What one training step logs."""
    seen: dict[str, Tensor] = {}
    model.log_dict = lambda figures, **_: seen.update(figures)  # type: ignore[method-assign]
    seen["returned"] = model.training_step(batch(), 0)
    return seen


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_goes_by_name_and_mapping_and_trains(name: str) -> None:
    assert type(small(name).loss) is LOSSES[name]
    model = small({"name": name, "attack": {"eps": 0.2, "steps": 2, "step_ratio": 0.5}})
    assert (model.loss.attack.eps, model.loss.attack.steps) == (0.2, 2)
    figures = logged(model)
    figures["returned"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_training_step_logs_the_parts_of_the_loss() -> None:
    for name, parts in (("adv_comp_sum", {"acc"}), ("pgd_at", set())):  # PGD-AT never sees the clean pictures
        figures = logged(small({"name": name, "attack": {"eps": 0.3}}))
        named = {"loss", "clean_loss", "penalty", "adv_acc", *parts}
        assert set(figures) == {"returned", *(f"train/{figure}" for figure in named)}
        assert not any(value.requires_grad for figure, value in figures.items() if figure != "returned")
        torch.testing.assert_close(figures["returned"].detach(), figures["train/loss"])


def test_accuracies_of_the_batch_are_clean_and_attacked() -> None:
    model = small()
    target = batch()[1]
    right, wrong = F.one_hot(target, 4).float(), F.one_hot((target + 1) % 4, 4).float()
    half = torch.where((torch.arange(6) < 3)[:, None], right, wrong)
    zero = torch.zeros(())
    model.loss.forward = lambda *_: AdvLossOutput(zero, zero, zero, right, half, zero)  # type: ignore[method-assign]
    figures = logged(model)
    assert (figures["train/acc"], figures["train/adv_acc"]) == (1.0, 0.5)


def test_pictures_are_attacked_in_their_own_unit_whatever_the_network_sees() -> None:
    given = {"in_channels": 3, "mean": [0.1, 0.5, 0.9], "std": [0.1, 0.2, 0.4]}
    model = small({"name": "adv_comp_sum", "attack": {"eps": 0.25, "steps": 3}}, **given)
    pictures, target = batch(channels=3)
    out = model.loss(model, pictures, target)
    assert 0 <= out.x_adv.min() <= out.x_adv.max() <= 1
    moved = (out.x_adv - pictures).abs().amax((0, 2, 3))
    torch.testing.assert_close(moved, torch.full((3,), 0.25))
    centred = (out.x_adv - torch.tensor(given["mean"]).view(3, 1, 1)) / torch.tensor(given["std"]).view(3, 1, 1)
    torch.testing.assert_close(out.logits_adv, model.net(centred))


def test_validation_reports_cross_entropy_whatever_the_loss() -> None:
    model = small({"name": "psal", "nu": 5.0})
    pictures, target = batch()
    loader = DataLoader(TensorDataset(pictures, target), batch_size=4)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(model, loader, verbose=False)
    with torch.no_grad():
        logits = model(pictures)
    assert found["val/loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert found["val/acc"] == pytest.approx((logits.argmax(1) == target).float().mean().item())


def test_a_loss_that_runs_no_attack_is_refused() -> None:
    for loss in ("torch.nn.CrossEntropyLoss", {"name": "comp_sum", "tau": 1.5}):
        with pytest.raises(ValueError, match="Loss runs no attack; take adv_comp_sum, trades or pgd_at, or train with"):
            small(loss)
    with pytest.raises(ValueError, match="loss must be given, e.g. adv_comp_sum, got None"):
        small(None)
    with pytest.raises(UnknownComponentError, match="no loss is called 'trade'. Did you mean 'trades'"):
        small("trade")


def test_the_plain_classifier_refuses_a_loss_that_attacks() -> None:
    with pytest.raises(
        ValueError, match="ImageClassifier: TradesLoss attacks the model it is given; train with class_p"
    ):
        ImageClassifier(loss="trades")


@pytest.mark.parametrize(
    ("mean", "std", "refused"),
    [((0.0,) * 3, (1.0,) * 3, False), ((0.0, 0.0, 0.1), (1.0,) * 3, True), ((0.0,) * 3, (1.0, 1.0, 0.5), True)],
)
def test_a_data_module_that_normalises_is_refused(mean: tuple, std: tuple, refused: bool) -> None:
    model = small()
    data = SimpleNamespace(num_classes=4, channels=1, mean=mean, std=std)
    model.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    if refused:
        with pytest.raises(
            DataError, match="normalises its pictures .* needs them in .0, 1.; give the data mean 0 and"
        ):
            model.setup("fit")
    else:
        model.setup("fit")


def test_pictures_outside_the_bounds_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match="x must lie within bounds .* a normalised input?"):
        model.training_step((torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])), 0)


def test_a_checkpoint_holds_the_loss(tmp_path: Path) -> None:
    model = small({"name": "smooth_adv_comp_sum", "nu": 0.2, "attack": {"eps": 0.1}})
    model.loss.tau = 1.5
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = AdversarialClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert (again.loss.tau, again.loss.nu, again.loss.attack.eps) == (1.5, 0.2, 0.1)
    pictures = batch()[0]
    assert torch.equal(again(pictures), model(pictures))


def test_adversarial_training_resists_what_standard_training_does_not() -> None:
    """A short form of configs/robust/digits_advcompsum.yaml."""
    pytest.importorskip("sklearn", reason="needs the digits extra")
    data = Digits(batch_size=64, train_size=1297)
    network = {"num_classes": 10, "in_channels": 1, "backbone": {"name": "plain_cnn", "size": 8}}
    attack = {"eps": 0.1, "steps": 2, "step_ratio": 0.6}
    models = {
        "attacked": AdversarialClassifier(**network, loss={"name": "adv_comp_sum", "nu": 0.1, "attack": attack}),
        "standard": ImageClassifier(**network),
    }
    pictures, target = data.val_set[:120]
    clean, robust = {}, {}
    for name, model in models.items():
        model.log_dict = model.log = lambda *_, **__: None  # type: ignore[method-assign]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        for step, training in zip(range(120), (b for _ in range(6) for b in data.train_dataloader()), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * min(1, (step + 1) / 20) * (1 - step / 120)
            optimizer.zero_grad()
            model.training_step(training, 0).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        clean[name] = robust_accuracy(model, pictures, target)
        generator = torch.Generator().manual_seed(0)
        robust[name] = robust_accuracy(model, pictures, target, PGDAttack.gowal_eval(eps=0.1, generator=generator))
    assert min(clean.values()) >= 0.9
    assert robust["attacked"] >= robust["standard"] + 0.1
