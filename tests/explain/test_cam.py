"""The maps against derivatives taken one neuron at a time, and what must not change them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.explain import brute
from zoo.explain import FeatureMaps, GradCAM, GradCAMpp, Neurons, Select, SmoothGradCAMpp, TopK, smooth_grad_cam_pp
from zoo.explain.formulas import combine, map_weights, pixel_weights


def close(actual: Tensor, expected: Tensor, most: float) -> None:
    """Largest difference over the largest value."""
    assert actual.shape == expected.shape
    assert float(expected.abs().max()) > 0
    assert float((actual - expected).abs().max() / expected.abs().max()) <= most


def literal(result, layer: str = "head") -> Tensor:
    """Maps with the factor e^M they are relative to."""
    maps = result.maps[layer]
    scale = result.log_scale.exp()
    return maps * scale.view(*scale.shape, *(1,) * (maps.ndim - scale.ndim))


# Against brute force


@pytest.mark.parametrize("pool", [nn.AvgPool2d, nn.MaxPool2d])
def test_powers_of_the_gradient_are_the_derivatives_of_a_piecewise_linear_tail(pool: type[nn.Module]) -> None:
    model, x = brute.network(pool=pool), brute.images()
    for target in range(3):
        maps, *orders = brute.derivatives(model, x, target)
        leaf = maps.unsqueeze(0).requires_grad_()
        score = model.tail(leaf)[0, target]
        (slope,) = torch.autograd.grad(score, leaf)
        for p, order in enumerate(orders, 1):
            close(score.exp().detach() * slope[0] ** p, order, 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
@pytest.mark.parametrize("numerator", ["second", "first"])
def test_smooth_map_is_that_of_averaged_derivatives(chunk_size: int, numerator: str) -> None:
    model, x = brute.network(), brute.images(2)
    cam = SmoothGradCAMpp(
        model, "head", n_samples=5, sigma=0.2, chunk_size=chunk_size, alpha_numerator=numerator, linear_tail="sample"
    )
    result = cam(x, [2, 1])
    for i, target in enumerate([2, 1]):
        one = x[i : i + 1]
        expected = brute.smooth_map(model, one, target, brute.noisy(one, 5, 0.2), numerator)
        close(literal(result)[i], expected, 1e-12)
    assert result.n_forwards == 6
    assert bool((result.effective_samples < 5).all())
    assert bool((result.effective_samples > 1).all())


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU])
def test_exact_derivatives_of_a_smooth_tail(act: type[nn.Module]) -> None:
    model, x = brute.network(act), brute.images()
    expected = brute.smooth_map(model, x, 1, brute.noisy(x, 3, 0.1))
    options = {"n_samples": 3, "sigma": 0.1}
    exact = literal(SmoothGradCAMpp(model, "head", derivatives="exact", **options)(x, 1))[0]
    close(exact, expected, 1e-9)
    closed = literal(SmoothGradCAMpp(model, "head", **options)(x, 1))[0]
    assert float((closed / closed.max() - expected / expected.max()).abs().max()) > 1e-2
    once = literal(GradCAMpp(model, "head", derivatives="exact")(x, 1))[0]
    close(once, brute.smooth_map(model, x, 1, [x]), 1e-9)


def test_grad_cam_is_the_mean_gradient() -> None:
    model, x = brute.network(), brute.images(3)
    leaf = model.head(x).detach().requires_grad_()
    scores = model.tail(leaf)
    classes = scores.argmax(1)
    (slope,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), leaf)
    expected = (slope.mean((2, 3), keepdim=True) * leaf).sum(1).relu()
    result = GradCAM(model, "head")(x)
    close(result.maps["head"], expected.detach(), 1e-13)
    assert torch.equal(result.targets, classes)
    close(result.scores, scores.amax(1).detach(), 1e-13)
    close(result.logits, scores.detach(), 1e-13)


def test_by_hand() -> None:
    """Two maps of 2 x 2, whole numbers, every step."""
    activation = torch.tensor([[[[1.0, 2.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]])
    first = torch.tensor([[[[[1.0, -1.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, -2.0]]]]])
    second, third = first**2, first**3
    total = torch.tensor([[[4.0, 2.0]]])
    alpha = pixel_weights(first, second, third, total)
    # 1 / (2 + 4), denominator 2 - 4 < 0, 4 / (8 + 32), 0 / 0; 1 / (2 + 2) twice, 0 / 0, denominator 8 - 16 < 0
    expected = torch.tensor([[[[[1 / 6, 0.0], [0.1, 0.0]], [[0.25, 0.25], [0.0, 0.0]]]]])
    torch.testing.assert_close(alpha, expected)
    signed = pixel_weights(first, second, third, total, denominator="signed")
    expected[0, 0, 0, 0, 1], expected[0, 0, 1, 1, 1] = -0.5, -0.5
    torch.testing.assert_close(signed, expected)
    printed = pixel_weights(first, second, third, total, numerator="first")
    torch.testing.assert_close(printed, torch.tensor([[[[[1 / 6, 0.0], [0.05, 0.0]], [[0.25, 0.25], [0.0, 0.0]]]]]))
    shifted = pixel_weights(first, second, third, total, eps=1.0)
    torch.testing.assert_close(shifted[0, 0, 0, 0, 0], torch.tensor(1 / 7))
    weights = map_weights(alpha, first)
    torch.testing.assert_close(weights, torch.tensor([[[1 / 6 + 0.2, 0.5]]]))
    raw = combine(weights, activation)
    torch.testing.assert_close(raw[0, 0], torch.tensor([[11 / 30 + 0.5, 22 / 30], [0.5, 11 / 30]]))


def test_one_copy_without_noise_is_grad_cam_pp() -> None:
    model, x = brute.network(), brute.images(2)
    pp = GradCAMpp(model, "head")(x)
    for n in (1, 4):
        smooth = SmoothGradCAMpp(model, "head", n_samples=n, sigma=0)(x)
        assert torch.equal(smooth.maps["head"], pp.maps["head"])
        assert smooth.n_forwards == 1
    for i in range(2):
        target = int(pp.targets[i])
        close(literal(pp)[i], brute.smooth_map(model, x[i : i + 1], target, [x[i : i + 1]]), 1e-12)


# Weights of the copies


@pytest.mark.parametrize("shift", [-500.0, 0.0, 500.0])
def test_exponential_weights_do_not_overflow(shift: float) -> None:
    model, x = brute.network(), brute.images()
    with torch.no_grad():
        model.tail[-1].bias += shift
    result = SmoothGradCAMpp(model, "head", n_samples=4, sigma=0.3)(x, 0)
    expected = brute.smooth_map(model, x, 0, brute.noisy(x, 4, 0.3), shift=shift + 3)
    close(result.maps["head"][0] * (result.log_scale - shift - 3).exp(), expected, 1e-10)


def test_a_constant_on_all_scores_changes_nothing() -> None:
    model, x = brute.network().float(), brute.images(2).float()
    before = SmoothGradCAMpp(model, "head", sigma=0.3)(x, 1)
    with torch.no_grad():
        model.tail[-1].bias += 40
    after = SmoothGradCAMpp(model, "head", sigma=0.3)(x, 1)
    close(after.maps["head"], before.maps["head"], 1e-4)
    torch.testing.assert_close(after.log_scale, before.log_scale + 40)


def test_uniform_weights() -> None:
    model, x = brute.network(), brute.images()
    copies = brute.noisy(x, 4, 0.3)
    slopes = []
    for copy in copies:
        leaf = model.head(copy).detach().requires_grad_()
        slopes.append(torch.autograd.grad(model.tail(leaf)[0, 1], leaf)[0])
    first, second, third = (torch.stack([s**p for s in slopes]).mean(0) for p in (1, 2, 3))
    activation = model.head(x).detach()
    below = 2 * second + activation.sum((2, 3), keepdim=True) * third
    alpha = torch.where(below > 0, second / below, 0)
    expected = ((alpha * first.relu()).sum((2, 3), keepdim=True) * activation).sum(1).relu()
    by_name = SmoothGradCAMpp(model, "head", n_samples=4, sigma=0.3, sample_weighting="uniform")(x, 1)
    close(by_name.maps["head"], expected, 1e-12)
    assert by_name.log_scale.tolist() == [0.0]
    assert by_name.effective_samples.tolist() == [4.0]
    function = SmoothGradCAMpp(model, "head", n_samples=4, sigma=0.3)(x, lambda scores: scores[:, 1])
    assert torch.equal(function.maps["head"], by_name.maps["head"])
    forced = SmoothGradCAMpp(model, "head", n_samples=4, sigma=0.3, sample_weighting="exp")(x, lambda s: s[:, 1])
    weighted = SmoothGradCAMpp(model, "head", n_samples=4, sigma=0.3)(x, 1)
    close(forced.maps["head"], weighted.maps["head"], 1e-12)


@pytest.mark.parametrize("factor", [1e-16, 1e-8, 1.0, 1e12])
def test_tiny_and_huge_gradients(factor: float) -> None:
    """Cubes of gradients of 1e-13 are no float32 numbers. alpha does hang on the scale of the scores, by sum A_k."""
    model, x = brute.network(), brute.images()

    def heatmap(dtype: torch.dtype) -> Tensor:
        cam = GradCAMpp(model.to(dtype), "head", output_fn=lambda scores: scores * factor)
        return cam.heatmap(x.to(dtype), 1).double()

    expected = heatmap(torch.float64)
    close(heatmap(torch.float32), expected, 1e-5)


def test_how_many_copies_count() -> None:
    """Also where the copy with the highest score is not the first."""
    model, x = brute.network(), brute.images()
    with torch.no_grad():
        weights = torch.stack([model(copy)[0] for copy in brute.noisy(x, 6, 0.5)]).exp()
    assert int((weights.argmax(0) > 0).sum()) >= 2
    found = SmoothGradCAMpp(model, "head", n_samples=6, sigma=0.5)(x, [[0, 1, 2]]).effective_samples
    torch.testing.assert_close(found, (weights.sum(0) ** 2 / (weights**2).sum(0)).view(1, 3))


def test_eps_is_in_the_unit_of_the_squared_gradient() -> None:
    model, x = brute.network(), brute.images()
    leaf = model.head(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.tail(leaf)[0, 1], leaf)
    below = 2 * slope**2 + leaf.sum((2, 3), keepdim=True) * slope**3 + 1e-3
    alpha = torch.where(below > 0, slope**2 / below, 0)
    expected = ((alpha * slope.relu()).sum((2, 3), keepdim=True) * leaf).sum(1).relu().detach()
    close(GradCAMpp(model, "head", eps=1e-3)(x, 1).maps["head"], expected, 1e-12)


# Noise


def test_noise_is_relative_to_the_range_of_each_image() -> None:
    model, x = brute.network(), brute.images(2)
    x[1] *= 7
    both = SmoothGradCAMpp(model, "head", n_samples=3, sigma=0.2)(x, 1)
    one = brute.smooth_map(model, x[1:], 1, brute.noisy(x[1:], 3, 0.2))
    close(literal(both)[1], one, 1e-11)
    absolute = SmoothGradCAMpp(model, "head", n_samples=3, sigma=0.5, noise="absolute")(x[1:], 1)
    spread = float(x[1].max() - x[1].min())
    close(literal(absolute)[0], brute.smooth_map(model, x[1:], 1, brute.noisy(x[1:], 3, 0.5 / spread)), 1e-11)


def test_clipped_noise() -> None:
    model, x = brute.network(), brute.images().clamp(-1, 1)
    copies = [copy.clamp(-1, 1) for copy in brute.noisy(x, 3, 0.3)]
    result = SmoothGradCAMpp(model, "head", n_samples=3, sigma=0.3, noise_clip=(-1, 1))(x, 1)
    close(literal(result)[0], brute.smooth_map(model, x, 1, copies), 1e-12)


def test_seeds() -> None:
    model, x = brute.network(), brute.images()

    def maps(seed) -> Tensor:
        return SmoothGradCAMpp(model, "head", n_samples=3, sigma=0.3, seed=seed)(x, 1).maps["head"]

    assert torch.equal(maps(0), maps(0))
    assert not torch.equal(maps(0), maps(1))
    assert not torch.equal(maps(None), maps(None))
    assert torch.equal(maps(torch.Generator().manual_seed(1)), maps(1))
    cam = SmoothGradCAMpp(model, "head", n_samples=3, sigma=0.3, seed=torch.Generator().manual_seed(1))
    assert not torch.equal(cam(x, 1).maps["head"], cam(x, 1).maps["head"])


def test_a_constant_image_has_no_noise() -> None:
    model = brute.network()
    x = torch.full((1, 3, 9, 9), 2.0, dtype=torch.float64)
    smooth = SmoothGradCAMpp(model, "head", n_samples=3, linear_tail="sample").heatmap(x, 0)
    close(smooth, GradCAMpp(model, "head").heatmap(x, 0), 1e-12)


# Batches


def test_neither_the_batch_nor_the_passes_change_a_map() -> None:
    model, x = brute.network(), brute.images(5)
    whole = SmoothGradCAMpp(model, "head", n_samples=4)(x)
    for chunk_size in (1, 3, 8, 100):
        again = SmoothGradCAMpp(model, "head", n_samples=4, chunk_size=chunk_size)(x)
        close(again.maps["head"], whole.maps["head"], 1e-12)
    for i in range(5):
        one = SmoothGradCAMpp(model, "head", n_samples=4)(x[i : i + 1])
        close(one.maps["head"][0], whole.maps["head"][i], 1e-12)


def test_several_targets_are_several_calls() -> None:
    model, x = brute.network(), brute.images(2)
    cam = SmoothGradCAMpp(model, "head", n_samples=3)
    several = cam(x, torch.tensor([[0, 2], [1, 0]]))
    assert several.maps["head"].shape == (2, 2, 4, 4)
    assert several.heatmap().shape == (2, 2, 9, 9)
    assert several.scores.shape == several.valid.shape == several.log_scale.shape == (2, 2)
    for t, classes in enumerate([[0, 1], [2, 0]]):
        one = cam(x, classes)
        close(several.maps["head"][:, t], one.maps["head"], 1e-12)
        close(several.scores[:, t], one.scores, 1e-12)
    top = cam(x, TopK(2))
    assert torch.equal(top.targets, model(x).topk(2).indices)
    close(top.maps["head"][:, 0], cam(x).maps["head"], 1e-12)


def test_the_class_is_that_of_the_image_without_noise() -> None:
    model, x = brute.network(), brute.images(4)
    result = SmoothGradCAMpp(model, "head", n_samples=6, sigma=2.0, chunk_size=3)(x)
    classes = model(x).argmax(1)
    assert torch.equal(result.targets, classes)
    named = SmoothGradCAMpp(model, "head", n_samples=6, sigma=2.0)(x, classes)
    close(result.maps["head"], named.maps["head"], 1e-12)


def test_one_shot_function() -> None:
    model, x = brute.network(), brute.images(2)
    expected = SmoothGradCAMpp(model, "head", n_samples=3).heatmap(x, 1)
    assert torch.equal(smooth_grad_cam_pp(model, x, "head", 1, n_samples=3), expected)
    assert float(expected.amax()) == 1
    assert expected.shape == (2, 9, 9)


# Parts


def test_parts_add_up_to_the_whole() -> None:
    model, x = brute.network(), brute.images(2)
    cam = SmoothGradCAMpp(model, "head", n_samples=3)
    parts = cam(x, 1, select=Select(reduce="none")).maps["head"]
    assert parts.shape == (2, 4, 4, 4)
    raw = parts.sum(1)
    close(cam(x, 1).maps["head"], raw.relu(), 1e-12)
    by_map = [cam(x, 1, select=Select(FeatureMaps(i), reduce="none")).maps["head"].sum(1) for i in ([0, 3], [1], [2])]
    close(sum(by_map), raw, 1e-12)  # type: ignore[arg-type]
    boxes = [(0, 0, 4, 1), (0, 1, 3, 4), (3, 1, 4, 4)]
    by_box = [cam(x, 1, select=Select(neurons=Neurons(box=box), reduce="none")).maps["head"].sum(1) for box in boxes]
    close(sum(by_box), raw, 1e-12)  # type: ignore[arg-type]


def test_selected_maps_and_neurons() -> None:
    model, x = brute.network(), brute.images(2)
    cam = GradCAMpp(model, "head")
    parts = cam(x, 1, select=Select(reduce="none")).maps["head"]
    for chosen in (FeatureMaps([1, 2]), FeatureMaps(slice(1, 3)), FeatureMaps(mask=torch.tensor([0, 1, 1, 0]).bool())):
        close(cam(x, 1, select=chosen).maps["head"], parts[:, 1:3].sum(1).relu(), 1e-12)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:3, 2] = True
    for neurons in (
        Neurons(box=(1, 2, 3, 3)),
        Neurons(points=[(1, 2), (2, 2)]),
        Neurons(mask=inside),
        Neurons(mask=inside.expand(4, 4, 4)),
        Neurons(points=[(3, 5), (6, 6)], space="input"),  # 9 pixels, 4 cells: floor(4 p / 9)
        Neurons(box=(3, 5, 5, 6), space="input"),
    ):
        found = cam(x, 1, select=neurons).maps["head"]
        if neurons.space == "input" and neurons.box is not None:
            assert found[:, 1, 2].gt(0).any()
            assert float(found[:, [0, 2, 3]].abs().max()) == 0
        else:
            close(found, (parts.sum(1) * inside).relu(), 1e-12)


def test_top_maps_are_those_that_contribute_most() -> None:
    model, x = brute.network(), brute.images(2)
    cam = GradCAMpp(model, "head")
    parts = cam(x, 1, select=Select(reduce="none")).maps["head"]
    shares = parts.sum((2, 3)).abs()
    best = shares.topk(2, 1).indices
    top = cam(x, 1, select=Select(FeatureMaps(top=2), reduce="none")).maps["head"]
    for i in range(2):
        close(top[i], parts[i][best[i]], 1e-12)
    ranked = cam.feature_maps(x[:1], 1, top_k=3)
    assert [one.index for one in ranked] == shares[0].topk(3).indices.tolist()
    close(ranked[0].map, parts[0, ranked[0].index], 1e-12)
    assert ranked[0].contribution == pytest.approx(float(shares[0].max()), rel=1e-12)


def test_neurons_that_also_make_the_weights() -> None:
    model, x = brute.network(), brute.images(2)
    cam = SmoothGradCAMpp(model, "head", n_samples=3)
    everything = Neurons(box=(0, 0, 4, 4))
    whole = cam(x, 1)
    selected = cam(x, 1, select=Select(neurons=everything, neuron_weights="selected"))
    close(selected.maps["head"], whole.maps["head"], 1e-12)
    half = Neurons(box=(0, 0, 2, 4))
    apart = cam(x, 1, select=Select(neurons=half, neuron_weights="selected")).maps["head"]
    shared = cam(x, 1, select=half).maps["head"]
    assert not torch.allclose(apart, shared)
    # of one map, the weights of its halves add up
    one = [
        cam(x, 1, select=Select(FeatureMaps([0]), Neurons(box=box), neuron_weights="selected", reduce="none"))
        for box in ((0, 0, 2, 4), (2, 0, 4, 4))
    ]
    activation = model.head(x).detach()[:, 0]
    halves = [activation[:, :2].sum((1, 2)), activation[:, 2:].sum((1, 2))]
    weights = [r.maps["head"].sum((1, 2, 3)) / h for r, h in zip(one, halves, strict=True)]
    both = cam(x, 1, select=Select(FeatureMaps([0]), reduce="none")).maps["head"].sum((1, 2, 3)) / sum(halves)
    torch.testing.assert_close(sum(weights), both)
