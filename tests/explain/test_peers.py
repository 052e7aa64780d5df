"""Where other libraries are right, or can be told to round as they do, the maps are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scripts.bench import explain as bench
from zoo.explain import GradCAM, GradCAMpp

LAYERS = ("layer3", "layer4")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return bench.network("resnet18")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return bench.images(bench.Case("plus", "resnet18", "layer4", images=2))


def by_grad_cam(name: str, model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Maps of pytorch-grad-cam, [B, H, W] from 0 to 1."""
    method = getattr(pytest.importorskip("pytorch_grad_cam"), name)
    with method(model=model, target_layers=[model.get_submodule(layer)]) as cam:
        return torch.from_numpy(cam(input_tensor=x, targets=None))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("name", "ours", "options"),
    [("GradCAM", GradCAM, {}), ("GradCAMPlusPlus", GradCAMpp, {"eps": 1e-6, "denominator": "signed"})],
)
def test_maps_of_pytorch_grad_cam(
    model: nn.Module, x: Tensor, layer: str, name: str, ours: Callable[..., Any], options: dict[str, Any]
) -> None:
    theirs = by_grad_cam(name, model, layer, x)
    found = ours(model, layer, normalize="minmax", **options).heatmap(x)
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)


def test_its_eps_is_not_small(model: nn.Module, x: Tensor) -> None:
    theirs = by_grad_cam("GradCAMPlusPlus", model, "layer4", x)
    exact = GradCAMpp(model, "layer4", normalize="minmax").heatmap(x)
    assert (exact - theirs).abs().max() > 0.01


@pytest.mark.parametrize("layer", LAYERS)
def test_grad_cam_of_torchcam(model: nn.Module, x: Tensor, layer: str) -> None:
    methods = pytest.importorskip("torchcam.methods")
    with methods.GradCAM(model, layer) as cam:
        scores = model(x)
        (theirs,) = cam(scores.argmax(1).tolist(), scores)
    found = GradCAM(model, layer, normalize="minmax")(x).heatmap(size=None)
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)
