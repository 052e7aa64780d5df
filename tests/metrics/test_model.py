"""The model under a metric: in evaluation, in parts, and as it was afterwards; and what is said of a bad one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.metrics.cases import RUN_MODEL, network, pictures
from zoo.metrics import Road, average_drop, deletion_auc, road
from zoo.metrics.average import ImageAverage
from zoo.warn import warn_once

each = pytest.mark.parametrize("metric", RUN_MODEL, ids=lambda metric: metric.__name__)


class Wrapped(nn.Module):
    """Returns the scores inside of something."""

    def __init__(self, wrap: Callable[[Tensor], Any], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net, self.wrap = network(dtype), wrap
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Any:
        self.sizes.append(len(x))
        return self.wrap(self.net(x))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@each
def test_model_is_as_it_was(metric: type[ImageAverage]) -> None:
    model, random = network(), torch.get_rng_state()
    flags = [layer.training for layer in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes: list[tuple[bool, bool]] = []
    model[0].register_forward_hook(lambda *_: modes.append((model.training, torch.is_inference_mode_enabled())))
    x, heatmaps, targets = pictures()
    before = [t.clone() for t in (x, heatmaps, targets)]
    metric().update(model, x, heatmaps, targets)
    assert set(modes) == {(False, True)}
    assert [layer.training for layer in model.modules()] == flags
    assert flags.count(True) not in (0, len(flags))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip((x, heatmaps, targets), before, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    model(x).sum().backward()  # and it trains on


@each
def test_model_is_as_it_was_after_an_error(metric: type[ImageAverage]) -> None:
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("in the model")

    model = Wrapped(fail)
    flags = [layer.training for layer in model.modules()]
    with pytest.raises(RuntimeError, match="in the model"):
        metric().update(model, *pictures())
    assert [layer.training for layer in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@each
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_mode_of_gradients_will_do(metric: type[ImageAverage], mode: Callable[[], Any]) -> None:
    x, heatmaps, targets = pictures()
    function = RUN_MODEL[metric]
    expected = function(network(), x, heatmaps, targets)
    with mode():
        found = function(network(), x.clone(), heatmaps.clone(), targets.clone())
    assert torch.equal(found, expected)
    assert not expected.requires_grad
    assert not expected.is_inference()
    asks = function(network(), x.clone().requires_grad_(), heatmaps.clone().requires_grad_(), targets)
    assert torch.equal(asks, expected)


@each
def test_parts_make_no_difference(metric: type[ImageAverage]) -> None:
    x, heatmaps, targets = pictures()
    whole = RUN_MODEL[metric](network(), x, heatmaps, targets, chunk_size=1000)
    for size in (1, 3):
        model = Wrapped(lambda scores: scores)
        torch.testing.assert_close(RUN_MODEL[metric](model, x, heatmaps, targets, chunk_size=size), whole)
        assert max(model.sizes) == size
    alone = torch.cat(
        [RUN_MODEL[metric](network(), x[i : i + 1], heatmaps[i : i + 1], targets[i : i + 1]) for i in range(5)]
    )
    torch.testing.assert_close(alone, whole)


@each
@pytest.mark.parametrize(
    ("wrap", "output_fn"),
    [
        (Output, None),
        (lambda scores: {"logits": scores, "aux": 0}, None),
        (lambda scores: {"out": scores, "aux": 0}, None),
        (lambda scores: (scores, 0), None),
        (lambda scores: {"main": [0, scores]}, lambda output: output["main"][1]),
    ],
    ids=["attribute", "mapping", "torchvision", "tuple", "function"],
)
def test_scores_are_found(metric: type[ImageAverage], wrap: Callable[[Tensor], Any], output_fn: Any) -> None:
    plain, wrapped = metric(), metric(output_fn=output_fn)
    plain.update(network(), *pictures())
    wrapped.update(Wrapped(wrap), *pictures())
    assert torch.equal(wrapped.compute(), plain.compute())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_near(metric: type[ImageAverage], dtype: torch.dtype) -> None:
    x, heatmaps, targets = pictures()
    exact = RUN_MODEL[metric](network(), x, heatmaps, targets)
    found = RUN_MODEL[metric](network(dtype), x.to(dtype), heatmaps.to(dtype), targets)
    assert found.dtype is torch.float32
    if metric.__name__ != "IncreaseInConfidence":  # which is a step
        scale = 100 if metric.__name__ == "AverageDrop" else 1
        assert (found - exact).abs().max() < scale * (1e-5 if dtype is torch.float32 else 2e-2)
    mixed = RUN_MODEL[metric](network(dtype), x.to(dtype), heatmaps, targets)
    assert mixed.isfinite().all()


def test_autocast_leaves_nothing_behind() -> None:
    """A weight that autocast has cast in inference mode could not be trained on."""
    x, heatmaps, targets = pictures(torch.float32)
    model = network(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        deletion_auc(model, x, heatmaps, targets)
        model(x).float().sum().backward()
    assert model[0].weight.grad is not None


def test_no_usable_map_runs_no_model() -> None:
    x, heatmaps, targets = pictures()
    model = Wrapped(lambda scores: scores)
    for function in RUN_MODEL.values():
        assert function(model, x, heatmaps * 0, targets).isnan().tolist() == [True] * 5
        assert function(model, x[:0], heatmaps[:0], targets[:0]).shape == (0,)
    assert model.sizes == []


def test_a_model_that_returns_nan_gives_no_value() -> None:
    metric = Road()
    metric.update(Wrapped(lambda scores: scores * torch.nan), *pictures())
    assert metric.n_invalid == 5


def test_a_compiled_model_gives_the_same() -> None:
    compiled = torch.compile(network(), backend="eager")
    torch.testing.assert_close(average_drop(compiled, *pictures()), average_drop(network(), *pictures()))
    torch.compiler.reset()


def test_probabilities_are_noticed() -> None:
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="seems to return probabilities; the metrics want the scores before the soft"):
        average_drop(Wrapped(lambda scores: scores.softmax(1)), *pictures())
    warn_once.cache_clear()


X, HEATMAPS, TARGETS = pictures()
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": print}, TypeError, "the model must be a torch.nn.Module, got builtin_function_or_method"),
    ({"x": X.byte()}, TypeError, "x must be a floating-point tensor, got torch.uint8; normalise it as the model"),
    ({"x": [1]}, TypeError, "x must be a floating-point tensor, got list"),
    ({"x": X[0]}, ValueError, "x must be images [B, C, H, W], got shape [2, 6, 7]"),
    (
        {"heatmaps": HEATMAPS.bool()},
        TypeError,
        "heatmaps must be a floating-point tensor, got torch.bool; convert them",
    ),
    ({"heatmaps": None}, TypeError, "heatmaps must be a floating-point tensor, got NoneType"),
    ({"heatmaps": HEATMAPS[:, None]}, ValueError, "heatmaps must be [B, H, W], got shape [5, 1, 6, 7]; flatten or"),
    ({"heatmaps": HEATMAPS[:, :0]}, ValueError, "heatmaps must be [B, H, W], got shape [5, 0, 7]"),
    ({"heatmaps": HEATMAPS[:2]}, ValueError, "heatmaps must be one an image, [5, H, W], got [2, 6, 7]"),
    ({"targets": 1}, TypeError, "targets must be a tensor of integers, one class an image, got int"),
    ({"targets": TARGETS.float()}, TypeError, "targets must be a tensor of integers, one class an image, got torch.fl"),
    (
        {"targets": TARGETS[:, None]},
        ValueError,
        "targets must be one class an image, [5], got shape [5, 1]; for several",
    ),
    ({"targets": TARGETS + 1}, ValueError, "targets must be classes from 0 to 2, got"),
    ({"targets": TARGETS - 1}, ValueError, "targets must be classes from 0 to 2, got -1 to"),
    ({"model": Wrapped(lambda _: 3)}, TypeError, "return floating-point scores [B, C], got int; give output_fn="),
    ({"model": Wrapped(lambda s: s.long())}, TypeError, "floating-point scores [B, C], got torch.int64"),
    ({"model": Wrapped(lambda s: s[:, :, None])}, ValueError, "must return scores [5, C], got shape [5, 3, 1]; give"),
    ({"model": Wrapped(lambda s: s[:1])}, ValueError, "must return scores [5, C], got shape [1, 3]"),
    ({"scores": "logit"}, ValueError, "scores must be 'softmax' or 'sigmoid', got 'logit'"),
    ({"output_fn": "logits"}, TypeError, "output_fn must be a function of the model's output or None, got str"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be a whole number of at least 1, got 0"),
    ({"chunk_size": "auto"}, ValueError, "chunk_size must be a whole number of at least 1, got 'auto'"),
]
OF_ONE: list[tuple[Callable[..., Tensor], dict[str, Any], str]] = [
    (average_drop, {"heatmaps": 2 * HEATMAPS}, "heatmaps must lie in [0, 1], got 0 to 2; divide each by its maximum"),
    (average_drop, {"heatmaps": -HEATMAPS}, "heatmaps must lie in [0, 1], got -1 to"),
    (average_drop, {"space": "rgb"}, "space must be 'input' or 'pixels', got 'rgb'"),
    (average_drop, {"space": "pixels"}, "mean and std belong to space='pixels', which needs both"),
    (average_drop, {"space": "pixels", "mean": 0.5}, "mean and std belong to space='pixels', which needs both"),
    (average_drop, {"mean": 0.5, "std": 0.5}, "mean and std belong to space='pixels', which needs both"),
    (average_drop, {"space": "pixels", "mean": 0.5, "std": 0}, "std must be above 0, got 0"),
    (
        average_drop,
        {"space": "pixels", "mean": (1, 2, 3), "std": 1},
        "must be 1 or 2 numbers, as x has channels, got 3",
    ),
    (deletion_auc, {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    (deletion_auc, {"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
    (deletion_auc, {"baseline": "black"}, "baseline must be 'zero' or 'blur', got 'black'"),
    (deletion_auc, {"kernel": 4}, "kernel must be an odd number of pixels, got 4"),
    (deletion_auc, {"blur_sigma": 0.0}, "blur_sigma must be above 0, got 0.0"),
    (road, {"percentiles": ()}, "percentiles must be one or more numbers between 0 and 100, got ()"),
    (road, {"percentiles": (20, 100)}, "percentiles must be one or more numbers between 0 and 100, got (20, 100)"),
    (road, {"noise": -1.0}, "noise must be at least 0, got -1.0"),
]


def _call(function: Callable[..., Tensor], changed: dict[str, Any]) -> None:
    given = {"model": network(), "x": X, "heatmaps": HEATMAPS, "targets": TARGETS, "chunk_size": 5} | changed
    function(**given)


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_a_mistake_is_said(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    for function in (average_drop, deletion_auc, road):
        with pytest.raises(error, match=re.escape(message)):
            _call(function, changed)


@pytest.mark.parametrize(("function", "changed", "message"), OF_ONE)
def test_a_mistake_of_one_metric_is_said(
    function: Callable[..., Tensor], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _call(function, changed)


@pytest.mark.parametrize(("function", "changed", "message"), OF_ONE)
def test_options_are_looked_at_when_a_class_is_made(
    function: Callable[..., Tensor], changed: dict[str, Any], message: str
) -> None:
    if "heatmaps" in changed or "numbers, as x" in message:
        return
    (metric,) = (metric for metric, twin in RUN_MODEL.items() if twin is function)
    with pytest.raises(ValueError, match=re.escape(message)):
        metric(**changed)
