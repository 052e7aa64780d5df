"""The state of a model during an attack, and afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests._numerics import assert_close
from tests.attacks.models import normalised, pictures
from zoo.attacks.modes import attack_mode, frozen, untouched_statistics
from zoo.norms import EvoNorm2d


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_mode_normalises_by_the_batch_without_dropout_and_leaves_frozen_layers_frozen() -> None:
    model, (x, _) = normalised(), pictures()
    wanted = normalised()
    wanted.load_state_dict(model.state_dict())
    wanted[4].eval()  # dropout; the rest in training
    expected = wanted(x)
    with attack_mode(model, "batch"):
        assert [layer.training for layer in model] == [False, True, True, False, False, False, False]
        assert torch.equal(model(x), expected)


def test_eval_mode_is_evaluation() -> None:
    model, (x, _) = normalised(), pictures()
    with attack_mode(model, "eval"):
        found = model(x)
    assert torch.equal(found, model.eval()(x))


def test_batch_mode_of_a_model_in_evaluation_is_evaluation() -> None:
    model, (x, _) = normalised().eval(), pictures()
    with attack_mode(model, "batch"):
        assert torch.equal(model(x), model(x[:3].repeat(2, 1, 1, 1))) is False
        assert_close(model(x)[:1], model(x[:1]))


def test_train_mode_changes_nothing_and_updates() -> None:
    model, (x, _) = normalised(), pictures()
    with attack_mode(model, "train"):
        assert [layer.training for layer in model] == [layer.training for layer in normalised()]
        model(x)
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("bn", ["eval", "batch"])
@pytest.mark.parametrize("fails", [False, True])
def test_flags_and_buffers_are_what_they_were(bn: str, fails: bool) -> None:
    model, (x, _) = normalised(), pictures()
    before, flags = _state(model), [layer.training for layer in model.modules()]
    held = dict(model.named_buffers())
    try:
        with attack_mode(model, bn):
            model(x)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert _same(model, before)
    assert flags == [layer.training for layer in model.modules()]
    assert all(buffer is held[name] for name, buffer in model.named_buffers())


def test_statistics_are_left_alone_and_the_graph_is_usable_afterwards() -> None:
    model, (x, _) = normalised(), pictures()
    before = _state(model)
    torch.manual_seed(1)
    with untouched_statistics(model):
        loss = model(x).square().sum()
        assert model[4].training
    assert _same(model, before)
    model(x)  # a pass that updates them comes between
    assert not _same(model, before)
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]

    model.load_state_dict(before)
    model.zero_grad()
    torch.manual_seed(1)
    model(x).square().sum().backward()
    assert all(
        torch.equal(gradient, parameter.grad) for gradient, parameter in zip(found, model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        EvoNorm2d(4, "b1"),
        EvoNorm2d(4, "b2", backend="eager"),
        EvoNorm2d(4, "b0", track_running_stats=False),
        EvoNorm2d(4, "s0"),
    ],
    ids=lambda layer: f"{type(layer).__module__.split('.')[0]}-{layer}",
)
def test_every_kind_of_statistics_is_left_alone(layer: nn.Module) -> None:
    if isinstance(layer, nn.SyncBatchNorm) and not torch.cuda.is_available():
        layer = nn.Sequential(layer)  # runs on GPUs only; what is held is tested all the same
        with untouched_statistics(layer):
            layer[0].running_var.zero_()
        assert layer[0].running_var.eq(1).all()
        return
    _check_statistics_are_left_alone(layer)


def test_statistics_of_layers_of_other_libraries_are_left_alone() -> None:
    _check_statistics_are_left_alone(pytest.importorskip("timm.layers").EvoNorm2dB0(4))


def _check_statistics_are_left_alone(layer: nn.Module) -> None:
    x = torch.randn(3, 4, 5, 5)
    expected_training = layer(x).detach()
    before = _state(layer)
    with attack_mode(layer, "batch"):
        assert_close(layer(x), expected_training)
    with untouched_statistics(layer):
        assert_close(layer(x), expected_training)
    assert _same(layer, before)


def test_layers_without_statistics_cost_nothing() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("mask", torch.ones(2))
    held = layer.mask
    with untouched_statistics(layer):
        assert layer.mask is held


def test_frozen_restores_each_parameter_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    loss = model(torch.ones(1, 2)).sum()

    def fail() -> None:
        with frozen(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    loss.backward()
    assert model[0].weight.grad is not None


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="bn must be one of eval, batch, train, got 'frozen'"):
        with attack_mode(nn.Linear(1, 1), "frozen"):
            pass
