"""The network is left as it was, whatever surrounds or interrupts the call."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from tests.explain import brute
from zoo.explain import CAMError, GradCAM, GradCAMpp, Select, SmoothGradCAMpp
from zoo.explain.errors import InferenceParameters

EXPLAINERS = (GradCAM, GradCAMpp, SmoothGradCAMpp)


def messy() -> nn.Module:
    """Some parameters frozen, some with gradients, some layers in training."""
    model = brute.network()
    model.head.requires_grad_(False)
    model.tail.train()
    model.tail[1].eval()
    model.tail[0].weight.grad = torch.ones_like(model.tail[0].weight)
    model.tail.insert(3, nn.Dropout(0.5))
    return model


def state(model: nn.Module) -> dict:
    hooks = {
        name: {kind: dict(value) for kind, value in vars(m).items() if "hooks" in kind and value is not None}
        for name, m in model.named_modules()
    }
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "requires": {k: p.requires_grad for k, p in model.named_parameters()},
        "grads": {k: p.grad for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in model.named_modules()},
        "hooks": hooks,
        "grad mode": torch.is_grad_enabled(),
        "rng": torch.get_rng_state(),
    }


def same(before: dict, after: dict) -> None:
    for part in ("requires", "training", "hooks", "grad mode"):
        assert before[part] == after[part], part
    assert all(before["grads"][k] is after["grads"][k] for k in before["grads"])
    assert all(torch.equal(before["tensors"][k], after["tensors"][k]) for k in before["tensors"])
    assert torch.equal(before["rng"], after["rng"])


@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_a_call_leaves_everything_as_it_was(explainer: type) -> None:
    model, x = messy(), brute.images(2)
    before, kept = state(model), x.clone()
    result = explainer(model, "head")(x)
    same(before, state(model))
    assert torch.equal(x, kept)
    assert not result.maps["head"].requires_grad
    assert not result.scores.requires_grad
    assert not result.logits.requires_grad


@pytest.mark.parametrize("where", ["target", "layer", "interrupt"])
def test_an_error_leaves_everything_as_it_was(where: str) -> None:
    model, x = messy(), brute.images(2)
    calls = []

    def target(scores: Tensor) -> Tensor:
        calls.append(len(scores))
        if len(calls) == 2:
            raise KeyboardInterrupt if where == "interrupt" else RuntimeError("stop")
        return scores[:, 0]

    if where == "layer":
        model.tail[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    before = state(model)
    with pytest.raises(KeyboardInterrupt if where == "interrupt" else RuntimeError):
        SmoothGradCAMpp(model, "head", n_samples=6, chunk_size=4)(x, target)
    same(before, state(model))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_every_grad_mode(around) -> None:
    model, x = brute.network(), brute.images(2)
    expected = SmoothGradCAMpp(model, "head", n_samples=3)(x, 1).maps["head"]
    with around():
        inner = brute.images(2)  # an inference tensor in inference mode
        result = SmoothGradCAMpp(model, "head", n_samples=3)(inner, 1)
        assert torch.is_inference_mode_enabled() == (around is torch.inference_mode)
    assert torch.equal(result.maps["head"], expected)


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = brute.network()
    with pytest.raises(InferenceParameters, match="outside torch.inference_mode"):
        SmoothGradCAMpp(model, "head")


def test_inside_autocast_nothing_is_rounded() -> None:
    model, x = brute.network().float(), brute.images().float()
    expected = SmoothGradCAMpp(model, "head", n_samples=3)(x, 1).maps["head"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = SmoothGradCAMpp(model, "head", n_samples=3)(x, 1)
    assert torch.equal(result.maps["head"], expected)


def test_asked_for_autocast_is_one() -> None:
    model, x = brute.network().float(), brute.images().float()
    seen = []
    model.tail[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    rough = GradCAMpp(model, "head", autocast=torch.bfloat16).heatmap(x, 1)
    assert seen == [torch.bfloat16]
    exact = GradCAMpp(model, "head").heatmap(x, 1)
    assert float(torch.corrcoef(torch.stack([rough.flatten(), exact.flatten()]))[0, 1]) > 0.98


def test_frozen_and_in_parallel_wrappers() -> None:
    model, x = brute.network(), brute.images(2)
    expected = SmoothGradCAMpp(model, "head", n_samples=3)(x, 1).maps["head"]
    frozen = brute.network().requires_grad_(False)
    assert torch.equal(SmoothGradCAMpp(frozen, "head", n_samples=3)(x, 1).maps["head"], expected)
    wrapped = nn.DataParallel(model)
    assert torch.equal(SmoothGradCAMpp(wrapped, "head", n_samples=3)(x, 1).maps["head"], expected)


@pytest.mark.parametrize("how", ["function", "method"])
def test_after_compilation(how: str) -> None:
    model, x = brute.network(), brute.images(2)
    expected = SmoothGradCAMpp(model, "head", n_samples=3)(x, 1).maps["head"]
    torch.compiler.reset()
    if how == "function":
        compiled = torch.compile(model, backend="eager")
        layer = "_orig_mod.head"
    else:
        model.compile(backend="eager")
        compiled, layer = model, "head"
    with torch.no_grad():
        compiled(x)  # compiled before hooks exist
    found = SmoothGradCAMpp(compiled, [model.head], n_samples=3)(x, 1).maps
    assert list(found) == [layer]
    assert torch.equal(found[layer], expected)


def test_the_activation_is_kept_from_layers_that_work_in_place() -> None:
    """As DenseNet has it: a normalisation, then relu in place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(196, 3))
    model.double().eval()
    x = brute.images(1)
    parts = GradCAM(model, "1")(x, 1).maps["1"]
    leaf = model[1](model[0](x)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model[4](leaf.relu().flatten(1))[0, 1], leaf)
    assert float(leaf.detach().min()) < -0.5
    expected = (slope.mean((2, 3), keepdim=True) * leaf).sum(1).relu()
    torch.testing.assert_close(parts, expected.detach())


def test_several_layers_in_one_pass() -> None:
    model, x = brute.network(), brute.images(2)
    parts = Select(reduce="none")  # before the relu: the signed layer has nothing to say for the class
    options = {"n_samples": 3, "linear_tail": "sample"}
    both = SmoothGradCAMpp(model, ["tail.0", "head"], **options)(x, 2, select=parts)
    assert list(both.maps) == ["tail.0", "head"]
    for name in ("head", "tail.0"):
        one = SmoothGradCAMpp(model, name, **options)(x, 2, select=parts)
        torch.testing.assert_close(both.maps[name], one.maps[name])
    assert both.n_forwards == 4


class Branches(nn.Module):
    """Two branches that do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left(x).relu() * self.right(x).relu()).mean((2, 3)))


def test_parallel_branches() -> None:
    model, x = Branches().double(), brute.images(2)
    both = GradCAM(model, ["left", "right"])(x, 1)
    for name in ("left", "right"):
        torch.testing.assert_close(both.maps[name], GradCAM(model, name)(x, 1).maps[name])


@pytest.mark.slow
def test_calls_leave_nothing_in_memory() -> None:
    model, x = brute.network().float(), brute.images(2).float()
    cam = SmoothGradCAMpp(model, "head", n_samples=4)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    cam.heatmap(x, 1)
    before = tensors()
    for _ in range(200):
        cam.heatmap(x, 1)
    assert tensors() <= before
    assert not any(m._forward_hooks for m in model.modules())


def test_passes_are_halved_until_they_fit() -> None:
    model, x = brute.network(), brute.images(3)
    expected = SmoothGradCAMpp(model, "head", n_samples=4)(x, 1).maps["head"]
    sizes = []

    def narrow(_: nn.Module, inputs: tuple) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("no room")

    handle = model.register_forward_pre_hook(narrow)
    result = SmoothGradCAMpp(model, "head", n_samples=4)(x, 1)
    handle.remove()
    torch.testing.assert_close(result.maps["head"], expected)
    assert sizes[:3] == [6, 3, 1]
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):
        SmoothGradCAMpp(model, "head")(x, 1)


def test_errors_are_of_one_kind() -> None:
    model = brute.network()
    with pytest.raises(CAMError):
        GradCAM(model, "nowhere")
