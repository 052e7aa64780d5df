"""Options, selections and what a result is good for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.explain import brute
from zoo.explain import (
    CAMError,
    CAMResult,
    CAMWarning,
    FeatureMaps,
    GradCAM,
    GradCAMpp,
    Neurons,
    Select,
    SmoothGradCAMpp,
)
from zoo.explain.errors import EmptySelection, TargetCount, UnknownLayer
from zoo.explain.formulas import normalised


def result(**options) -> CAMResult:
    return SmoothGradCAMpp(brute.network(), ["head"], n_samples=2)(brute.images(2), 1, **options)


# Sizes


def test_sizes_of_heatmaps() -> None:
    found = result()
    maps = found.maps["head"]
    enlarged = F.interpolate(maps[None], (9, 9), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found.heatmap(), enlarged / enlarged.amax((1, 2), keepdim=True))
    torch.testing.assert_close(found.heatmap(size=None), maps / maps.amax((1, 2), keepdim=True))
    assert found.heatmap(size=(5, 7)).shape == (2, 5, 7)
    assert result(size=None).heatmap().shape == (2, 4, 4)
    assert result(size=(5, 7)).heatmap("head", size="input").shape == (2, 9, 9)


def test_normalisations() -> None:
    maps = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]], [[2.0, 2.0]]])
    assert normalised(maps, "max", 2).tolist() == [[[pytest.approx(1 / 3), 1.0]], [[0.0, 0.0]], [[1.0, 1.0]]]
    assert normalised(maps, "minmax", 2).tolist() == [[[0.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]
    assert normalised(maps, "none", 2) is maps
    model, x = brute.network(), brute.images(2)
    plain = GradCAMpp(model, "head", normalize="none").heatmap(x, 1, size=None)
    assert torch.equal(plain, GradCAMpp(model, "head")(x, 1).maps["head"])


def test_a_map_of_zeros_is_told_and_stays_zero() -> None:
    model, x = brute.network(), brute.images(2)
    with torch.no_grad():
        model.tail[-1].weight[1] = -model.tail[-1].weight[1].abs() * 0 - 1.0
        model.tail[0].weight.abs_()
    with pytest.warns(CAMWarning, match="some map is 0 everywhere"):
        found = GradCAM(model, "head")(x, 1)
    assert not found.valid.any()
    assert not found.heatmap().any()


# Several layers


@pytest.mark.parametrize("fuse", ["mean", "max", "product", lambda maps: maps[0] * 2 + maps[1]])
def test_fusion(fuse) -> None:
    model, x = brute.network(), brute.images(2)
    names = ["head", "head.0"]
    found = GradCAM(model, names)(x, 1, fuse=fuse)
    same = torch.stack([found.heatmap(name, "input") for name in names])
    by_hand = {"mean": same.mean(0), "max": same.amax(0), "product": same[0] * same[1]}
    expected = by_hand[fuse] if isinstance(fuse, str) else fuse(same)
    torch.testing.assert_close(found.fused, expected / expected.amax((1, 2), keepdim=True))
    assert found.heatmap() is found.fused
    small = GradCAM(model, names)(x, 1, fuse=fuse, size=None)
    assert small.fused.shape == (2, 4, 4)
    assert small.heatmap(size=(6, 5)).shape == (2, 6, 5)


def test_layers_must_be_told_apart() -> None:
    model, x = brute.network(), brute.images(2)
    found = GradCAM(model, ["head", "head.0"])(x, 1)
    with pytest.raises(UnknownLayer, match="several layers were explained, name one of head, head.0, or fuse them"):
        found.heatmap()
    with pytest.raises(UnknownLayer, match="'tail' was not explained; there are head, head.0"):
        found.heatmap("tail")
    with pytest.raises(UnknownLayer, match="'tail' is not explained; there are head"):
        GradCAM(model, "head")(x, 1, select=Select(layer="tail"))
    with pytest.raises(UnknownLayer, match="'tail' is not explained"):
        GradCAM(model, "head").feature_maps(x[:1], 1, layer="tail")
    only = GradCAM(model, ["head", "head.0"])(x, 1, select=Select(FeatureMaps(top=2), layer="head"))
    assert torch.equal(only.maps["head.0"], found.maps["head.0"])
    assert not torch.equal(only.maps["head"], found.maps["head"])


# Files


def test_arrays_are_written(tmp_path: Path) -> None:
    found = result()
    found.save(tmp_path / "new" / "maps.npz")
    with np.load(tmp_path / "new" / "maps.npz") as arrays:
        assert set(arrays) == {"map/head", "scores", "log_scale", "effective_samples", "valid", "targets"}
        np.testing.assert_array_equal(arrays["map/head"], found.maps["head"].numpy())
    with pytest.raises(ValueError, match="maps.png is a picture and needs images="):
        found.save(tmp_path / "maps.png")


def test_pictures_are_written(tmp_path: Path) -> None:
    from PIL import Image

    found, pictures = result(), torch.rand(2, 3, 9, 9)
    overlays = found.overlay(pictures)
    assert [picture.size for picture in overlays] == [(9, 9)] * 2
    found.save(tmp_path / "maps.png", pictures)
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.width >= 18
    with pytest.raises(CAMError, match="these are the parts of a map"):
        result(select=Select(reduce="none")).overlay(pictures)
    several = SmoothGradCAMpp(brute.network(), "head", n_samples=2)(brute.images(2), [[0, 1], [1, 2]])
    assert len(several.overlay(pictures)) == 4


# What is refused


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (FeatureMaps([4]), "layer has maps 0 to 3, got 4"),
        (FeatureMaps([]), "no feature map is left of the layer's 4"),
        (FeatureMaps(slice(9, 12)), "no feature map is left"),
        (FeatureMaps(mask=torch.ones(3).bool()), r"mask must be \[4\] for this layer, got \(3,\)"),
        (FeatureMaps(mask=torch.zeros(4).bool()), "no feature map is left"),
        (Neurons(points=[(4, 0)]), r"points must lie in \[4, 4\] \(layer\), got \(4, 0\)"),
        (Neurons(points=[(1, 2, 3)]), r"points must lie in \[4, 4\]"),
        (Neurons(points=[(9, 0)], space="input"), r"points must lie in \[9, 9\] \(input\), got \(9, 0\)"),
        (Neurons(points=[]), "no neuron is left"),
        (Neurons(box=(2, 2, 2, 4)), r"box must be \(top, left, bottom, right\), half-open, inside \[4, 4\]"),
        (Neurons(box=(0, 0, 4)), "box must be"),
        (Neurons(mask=torch.ones(3, 4).bool()), r"mask must be \[4, 4\] or \[4, 4, 4\] for this layer, got \[3, 4\]"),
        (Neurons(mask=torch.zeros(4, 4).bool()), "no neuron is left"),
    ],
)
def test_empty_selections(select, message: str) -> None:
    with pytest.raises(EmptySelection, match=message):
        result(select=select)


def test_selections_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="give one of indices, mask and top"):
        FeatureMaps([1], top=2)
    with pytest.raises(EmptySelection, match="top must be at least 1"):
        FeatureMaps(top=0)
    with pytest.raises(ValueError, match="give one of points, box and mask"):
        Neurons()
    with pytest.raises(ValueError, match="space must be 'layer' or 'input', got 'image'"):
        Neurons(box=(0, 0, 1, 1), space="image")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a mask is one of the layer's cells"):
        Neurons(mask=torch.ones(4, 4), space="input")
    with pytest.raises(ValueError, match="neuron_weights must be"):
        Select(neuron_weights="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduce must be"):
        Select(reduce="mean")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="select must be a FeatureMaps, Neurons or Select, got list"):
        result(select=[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "n_samples must be at least 1, got 0"),
        ({"sigma": -0.1}, "sigma must be finite and not negative, got -0.1"),
        ({"eps": float("nan")}, "eps must be finite and not negative, got nan"),
        ({"noise": "gaussian"}, "noise must be one of relative, absolute, got 'gaussian'"),
        ({"noise_clip": (1, 0)}, r"noise_clip must be \(low, high\) or None"),
        ({"sample_weighting": "log"}, "sample_weighting must be one of auto, exp, uniform"),
        ({"alpha_numerator": "third"}, "alpha_numerator must be one of second, first"),
        ({"denominator": "abs"}, "denominator must be one of positive, signed"),
        ({"derivatives": "numeric"}, "derivatives must be one of closed_form, exact"),
        ({"linear_tail": "never"}, "linear_tail must be one of auto, sample"),
        ({"chunk_size": 0}, "chunk_size must be 'auto' or at least 1, got 0"),
        ({"normalize": "sum"}, "normalize must be one of max, minmax, none"),
        ({"layer_call": "second"}, "layer_call must be one of only, first, last"),
        ({"memory_format": "nhwc"}, "memory_format must be one of channels_last, preserve"),
        ({"reshape": "tokens"}, r"reshape must be 'auto' or a function to \[B, K, h, w\]"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"SmoothGradCAMpp: {message}"):
        SmoothGradCAMpp(brute.network(), "head", **options)


def test_inputs_that_are_none() -> None:
    cam = GradCAM(brute.network(), "head")
    with pytest.raises(TypeError, match="x must be a floating-point tensor as the model takes it, got torch.uint8"):
        cam(torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
    with pytest.raises(TypeError, match="got list"):
        cam([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must be \[B, C, H, W\].*got \[3, 9\]"):
        cam(torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"got \[0, 3, 9, 9\]"):
        cam(torch.zeros(0, 3, 9, 9))
    with pytest.raises(ValueError, match="GradCAM: fuse must be one of mean, max, product, got 'sum'"):
        cam(brute.images(), 1, fuse="sum")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        GradCAM(lambda x: x, "head")  # type: ignore[arg-type]
    with pytest.raises(TargetCount, match="one image and one target at a time, got 2 and 1"):
        cam.feature_maps(brute.images(2), 1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sigma'"):
        GradCAMpp(brute.network(), "head", sigma=0.1)  # type: ignore[call-arg]


def test_few_copies_that_count_are_told() -> None:
    model, x = brute.network(), brute.images()
    cam = SmoothGradCAMpp(model, "head", n_samples=16, sigma=3.0, output_fn=lambda s: 20 * s, linear_tail="sample")
    with pytest.warns(CAMWarning, match="of 16 noisy copies less than a quarter counts"):
        found = cam(x, 1)
    assert float(found.effective_samples) < 4


def test_sharded_models_are_refused() -> None:
    from zoo.explain.errors import ShardedModel

    model = brute.network()

    class DTensor(torch.nn.Parameter):
        pass

    weight = model.head[0].weight
    model.head[0].weight = DTensor(weight.detach())
    if type(model.head[0].weight).__name__ != "DTensor":
        model.head[0].weight.device_mesh = None  # what marks one
    with pytest.raises(ShardedModel, match="gather the model into one"):
        GradCAM(model, "head")


def heat(model, x: Tensor) -> Tensor:
    return GradCAMpp(model, "head").heatmap(x, 1)


def test_half_precision_models() -> None:
    model, x = brute.network().float(), brute.images().float()
    expected = heat(model, x)
    rough = heat(model.bfloat16(), x.bfloat16())
    assert rough.dtype is torch.float32
    assert float(torch.corrcoef(torch.stack([rough.flatten(), expected.flatten()]))[0, 1]) > 0.98
