"""Which layer is explained, and how its output becomes maps."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.explain import brute
from zoo.explain import (
    CAMWarning,
    GradCAM,
    GradCAMpp,
    NHWCReshape,
    SegmentationTarget,
    SmoothGradCAMpp,
    TokenReshape,
)
from zoo.explain.errors import (
    ExactTooLarge,
    LayerCalledTwice,
    LayerNotReached,
    NotSpatial,
    ReshapeNeeded,
    UnknownLayer,
    ZeroGradient,
)

SIZE = 64
# model, its arguments, the layer chosen for it, cells of its map at 64 pixels
FAMILIES = [
    ("resnet18", {"zero_init_last": False}, "layer4.0", 2),
    ("resnet50", {"zero_init_last": False}, "layer4.1", 2),
    ("vgg11", {}, "features.19", 4),
    ("densenet121", {}, "features.denseblock4", 2),
    ("mobilenetv3_small_100", {}, "blocks.5", 2),
    ("tf_efficientnet_lite0", {}, "blocks.6", 2),
    ("convnext_atto", {}, "stages.3", 2),
    ("vit_tiny_patch16_224", {"img_size": SIZE}, "blocks.10", 4),
    ("swin_tiny_patch4_window7_224", {"img_size": SIZE}, "layers.3", 2),
    ("regnetx_002", {}, "s3", 4),
]


def made(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=10, **options).eval()


@pytest.mark.parametrize(("name", "options", "layer", "cells"), FAMILIES, ids=[row[0] for row in FAMILIES])
@pytest.mark.filterwarnings("ignore:.*0 everywhere")  # untrained networks
def test_families(name: str, options: dict, layer: str, cells: int) -> None:
    model, x = made(name, **options), torch.randn(2, 3, SIZE, SIZE)
    cam = SmoothGradCAMpp(model, n_samples=2)
    result = cam(x)
    assert cam.layers == [layer]
    assert result.maps[layer].shape == (2, cells, cells)
    assert result.linear_tail == {layer: False}
    assert result.heatmap().shape == (2, SIZE, SIZE)
    assert bool(result.heatmap().isfinite().all())


@pytest.mark.filterwarnings("ignore:.*0 everywhere")
@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_axes(dims: int) -> None:
    torch.manual_seed(0)
    conv, pool = ((nn.Conv1d, nn.AdaptiveAvgPool1d), None, (nn.Conv3d, nn.AdaptiveAvgPool3d))[dims - 1]
    model = nn.Sequential(conv(2, 4, 3), nn.ReLU(), conv(4, 5, 3), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(5, 3))
    cam = SmoothGradCAMpp(model, "1", n_samples=2)
    result = cam(torch.randn(2, 2, *(9,) * dims))
    assert result.maps["1"].shape == (2, *(7,) * dims)
    assert result.heatmap().shape == (2, *(9,) * dims)
    automatic = SmoothGradCAMpp(model, n_samples=2)
    automatic(torch.randn(2, 2, *(9,) * dims))
    assert automatic.layers == ["2"]  # behind the second convolution relu and pooling follow, behind relu only pooling


def test_segmentation_network_of_torchvision() -> None:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    torch.manual_seed(0)
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    found = GradCAM(model, "classifier.0")(torch.randn(2, 3, 64, 64), SegmentationTarget(1))
    assert found.maps["classifier.0"].shape == (2, 4, 4)


def test_densenet_keeps_negative_activations() -> None:
    """The relu behind its last normalisation works in place."""
    from torchvision.models import densenet121

    torch.manual_seed(0)
    model = densenet121(weights=None, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model.features(x)
    assert float(expected.min()) < -1
    parts = GradCAM(model, "features.norm5").feature_maps(x, 1, top_k=1024)
    for part in parts[::100]:
        maps = expected[0, part.index]
        weight = (
            model.classifier.weight[1, part.index].detach() / 4 * (maps > 0).float().mean()
        )  # what relu lets through
        torch.testing.assert_close(part.map, maps * weight)


# Linear tails


def test_a_linear_tail_is_noticed_and_nothing_is_drawn() -> None:
    model, x = made("resnet18", zero_init_last=False), torch.randn(2, 3, SIZE, SIZE)
    expected = GradCAMpp(model, "layer4").heatmap(x)
    drawn = SmoothGradCAMpp(model, "layer4", n_samples=8, sigma=0.3, linear_tail="sample")(x)
    assert float((drawn.heatmap() - expected).abs().max()) <= 1e-6
    assert drawn.n_forwards == 9
    cam = SmoothGradCAMpp(model, "layer4", n_samples=8, sigma=0.3)
    with pytest.warns(CAMWarning, match="linear behind layer4.*this is Grad-CAM.*leave layers out"):
        first = cam(x)
    assert first.linear_tail == {"layer4": True}
    assert first.n_forwards == 3
    second = cam(x)
    assert second.n_forwards == 1
    assert second.linear_tail == {"layer4": True}
    for result in (first, second):
        assert torch.equal(result.heatmap(), expected)
        torch.testing.assert_close(result.log_scale, result.scores)


def test_a_function_of_linear_scores_is_looked_at_anew() -> None:
    """Behind a linear tail a product of scores is not linear."""
    model, x = made("resnet18", zero_init_last=False), torch.randn(1, 3, SIZE, SIZE)
    cam = SmoothGradCAMpp(model, "layer4", n_samples=2)
    with pytest.warns(CAMWarning, match="linear"):
        cam(x, 1)
    assert cam(x, lambda s: s[:, 1] * s[:, 2]).linear_tail == {"layer4": False}
    assert cam(x, lambda s: s[:, 1]).linear_tail == {"layer4": True}
    assert cam(x, lambda s: s[:, 1]).n_forwards == 3


def test_of_two_layers_one_may_have_a_linear_tail() -> None:
    model, x = made("resnet18", zero_init_last=False), torch.randn(1, 3, SIZE, SIZE)
    result = SmoothGradCAMpp(model, ["layer3", "layer4"], n_samples=3)(x, 1)
    assert result.linear_tail == {"layer3": False, "layer4": True}
    assert result.n_forwards == 5  # the image, three copies, another image


def test_the_deepest_layer_is_to_be_had() -> None:
    model, x = made("resnet18", zero_init_last=False), torch.randn(1, 3, SIZE, SIZE)
    cam = SmoothGradCAMpp(model, "last", n_samples=2)
    assert cam(x, 1).linear_tail == {"layer4.1": True}
    assert cam.layers == ["layer4.1"]
    cam.close()
    assert cam.layers is None


def test_a_network_without_another_layer_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    cam = SmoothGradCAMpp(model, n_samples=2)
    with pytest.warns(CAMWarning, match="linear behind every layer: smoothing changes nothing"):
        cam(torch.randn(1, 3, 8, 8), 1)
    assert cam.layers == ["0"]


# Names


def test_layers_by_name_and_as_modules() -> None:
    model, x = brute.network(), brute.images()
    for given in ("head", model.head, ["head"], [model.head]):
        assert list(GradCAM(model, given)(x, 1).maps) == ["head"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("haed", "no layer 'haed'. Did you mean 'head'"),
        ("", "no layer ''"),
        (nn.ReLU(), "the ReLU given as layer is not inside the model"),
        (["head", "head"], "'head' is given twice"),
        ([], "name at least one layer, or give None"),
    ],
)
def test_unknown_layers(layers, message: str) -> None:
    with pytest.raises(UnknownLayer, match=message):
        GradCAM(brute.network(), layers)


class Wandering(nn.Module):
    """A layer that runs twice, one that does not run, one without a map, one that is a dead end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.unused = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1)
        self.dead, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        self.dead(x)
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("conv", LayerCalledTwice, "runs layer 'conv' 2 times; say layer_call='first' or 'last'"),
        ("unused", LayerNotReached, "does not run layer 'unused'"),
        ("fc", NotSpatial, r"'fc' returns \(1, 3\), without a map"),
    ],
)
def test_layers_that_cannot_be_explained(layer: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        GradCAM(Wandering(), layer)(torch.randn(1, 3, 8, 8), 1)


def test_a_dead_end() -> None:
    from zoo.explain.errors import DisconnectedTarget

    with pytest.raises(DisconnectedTarget, match="does not depend on layer 'dead'"):
        GradCAM(Wandering(), ["conv", "dead"], layer_call="last")(torch.randn(1, 3, 8, 8), 1)


def test_which_call_counts() -> None:
    model, x = Wandering().double(), brute.images()
    once = model.conv(x).detach().requires_grad_()
    twice = model.conv(once.relu()).detach().requires_grad_()
    for call, leaf, score in (
        ("first", once, lambda t: model.fc(model.conv(t.relu()).relu().mean((2, 3)))),
        ("last", twice, lambda t: model.fc(t.relu().mean((2, 3)))),
    ):
        (slope,) = torch.autograd.grad(score(leaf)[0, 1], leaf)
        expected = (slope.mean((2, 3), keepdim=True) * leaf).sum(1).relu()
        found = GradCAM(model, "conv", layer_call=call)(x, 1).maps["conv"]
        torch.testing.assert_close(found, expected.detach())


def test_exact_derivatives_of_a_large_layer_are_refused() -> None:
    model, x = brute.network(), brute.images()
    with pytest.raises(ExactTooLarge, match="'head' has 64 neurons.*raise max_exact_elements"):
        GradCAMpp(model, "head", derivatives="exact", max_exact_elements=63)(x)


# Layouts


@pytest.mark.filterwarnings("ignore:.*0 everywhere")
def test_a_class_token_has_no_map() -> None:
    model, x = made("vit_tiny_patch16_224", img_size=SIZE), torch.randn(1, 3, SIZE, SIZE)
    with pytest.raises(ZeroGradient, match="hangs on no cell; name an earlier layer"):
        GradCAM(model, "blocks.11")(x, 1)
    by_norm = GradCAM(model, "blocks.11.norm1")(x, 1)
    assert by_norm.maps["blocks.11.norm1"].shape == (1, 4, 4)
    by_hand = GradCAM(model, "blocks.11.norm1", reshape=TokenReshape((4, 4), prefix=1))(x, 1)
    assert torch.equal(by_hand.maps["blocks.11.norm1"], by_norm.maps["blocks.11.norm1"])


@pytest.mark.parametrize(("shape", "prefix"), [((1, 17, 6), 1), ((1, 16, 6), 0), ((1, 18, 6), 2), ((1, 20, 6), 4)])
def test_grids_of_tokens(shape: tuple, prefix: int) -> None:
    from zoo.explain.reshape import resolve_reshape

    tokens = torch.arange(torch.Size(shape).numel()).view(shape).float()
    found = resolve_reshape("auto", "x", tokens, nn.Identity(), (32, 32))(tokens)
    assert torch.equal(found, tokens[:, prefix:].view(1, 4, 4, 6).permute(0, 3, 1, 2))


def test_grids_of_oblong_images() -> None:
    from zoo.explain.reshape import resolve_reshape

    tokens = torch.randn(1, 1 + 4 * 9, 5)
    found = resolve_reshape("auto", "x", tokens, nn.Identity(), (64, 144))(tokens)
    assert torch.equal(found, tokens[:, 1:].view(1, 4, 9, 5).permute(0, 3, 1, 2))
    known = nn.Identity()
    known.num_prefix_tokens = 0
    with pytest.raises(
        ReshapeNeeded, match=r"\(1, 37, 5\), in which the map cannot be told; give reshape=TokenReshape"
    ):
        resolve_reshape("auto", "x", tokens, known, (64, 144))


def test_channels_last_layers() -> None:
    from zoo.explain.reshape import resolve_reshape

    last = torch.randn(1, 7, 7, 96)
    assert isinstance(resolve_reshape("auto", "x", last, nn.Identity(), (224, 224)), NHWCReshape)
    assert torch.equal(NHWCReshape()(last), last.permute(0, 3, 1, 2))
    first = torch.randn(1, 96, 7, 7)
    assert torch.equal(resolve_reshape("auto", "x", first, nn.Identity(), (224, 224))(first), first)
    ambiguous, says = torch.randn(1, 7, 7, 7), nn.Identity()
    assert torch.equal(resolve_reshape("auto", "x", ambiguous, says, (224, 224))(ambiguous), ambiguous)
    says.output_fmt = "NHWC"
    assert isinstance(resolve_reshape("auto", "x", ambiguous, says, (224, 224)), NHWCReshape)


def test_a_single_cell_is_no_map() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(NotSpatial, match="holds no map of at least two cells"):
        GradCAM(model, "1")(torch.randn(1, 3, 8, 8), 1)


# Found by trying to break it


class TwoHeads(nn.Module):
    """Behind the layer the score of class 0 is linear, that of class 1 is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.first, self.second = nn.Linear(8, 1), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor, bend: bool = False) -> Tensor:
        mean = self.head(x).mean((2, 3))
        first = self.first(mean)
        return torch.cat([first.square() if bend else first, self.second(mean)], 1)


@pytest.mark.filterwarnings("ignore:.*linear behind", "ignore:.*0 everywhere")
def test_what_is_known_of_one_class_is_not_of_another() -> None:
    model, x = TwoHeads().double(), brute.images(2)
    cam = SmoothGradCAMpp(model, "head", sigma=1.0, sample_weighting="uniform")
    assert cam(x, 0).linear_tail == {"head": True}
    assert cam(x, 0).n_forwards == 1
    again = cam(x, 1)
    assert again.linear_tail == {"head": False}
    fresh = SmoothGradCAMpp(model, "head", sigma=1.0, sample_weighting="uniform")
    torch.testing.assert_close(again.maps["head"], fresh(x, 1).maps["head"])
    assert fresh(x, [0, 1]).linear_tail == {"head": False}  # one of the two is not
    assert cam(x, 0, forward_kwargs={"bend": True}).linear_tail == {"head": False}
    assert cam(x, 0).n_forwards == 1


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:.*0 everywhere")
def test_a_small_head_is_not_taken_for_linear(seed: int) -> None:
    """Behind an average, noise of mean 0 leaves on what is on."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.extend([nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)])
    x = torch.randn(1, 3, 16, 16) + 2 * torch.randn(1, 3, 1, 1)
    assert SmoothGradCAMpp(model, "1", n_samples=2)(x, 0).linear_tail == {"1": False}


class Windows(nn.Module):
    """A layer that sees windows of images as rows, and one whose output is a namedtuple."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.window, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.window(torch.cat([x[..., :4], x[..., 4:8]]))
        return self.fc(torch.cat(halves.chunk(2), -1).relu().mean((2, 3)))


def test_rows_that_are_not_images() -> None:
    with pytest.raises(NotSpatial, match="'window' returns 4 rows for 2 images: windows, or tokens before the batch"):
        GradCAM(Windows().double(), "window")(brute.images(2), 1)


class Features(NamedTuple):
    map: Tensor
    other: int


class Named(nn.Module):
    def forward(self, x: Tensor) -> Features:
        return Features(x.relu(), 1)


class Keeps(nn.Module):
    """Reads its features through a namedtuple, and again through a hook."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.named, self.fc = nn.Conv2d(3, 4, 3), Named(), nn.Linear(4, 3)
        self.kept: list[Tensor] = []
        self.conv.register_forward_hook(lambda _, __, out: self.kept.append(out))

    def forward(self, x: Tensor) -> Tensor:
        features = self.named(self.conv(x)).map
        return self.fc((features + self.kept.pop() ** 2).mean((2, 3)))


def test_namedtuples_and_hooks_of_the_models_own() -> None:
    model, x = Keeps().double(), brute.images(2)
    leaf = model.conv(x).detach().requires_grad_()
    model.kept.clear()
    (slope,) = torch.autograd.grad(model.fc((leaf.relu() + leaf**2).mean((2, 3)))[:, 1].sum(), leaf)
    expected = (slope.mean((2, 3), keepdim=True) * leaf).sum(1).relu().detach()
    torch.testing.assert_close(GradCAM(model, "conv")(x, 1).maps["conv"], expected)
    assert GradCAM(model, "named")(x, 1).maps["named"].shape == (2, 7, 7)


def test_prefix_tokens_may_come_later() -> None:
    from zoo.explain.reshape import resolve_reshape

    late = nn.Identity()
    late.num_prefix_tokens = 1
    tokens = torch.randn(1, 16, 5)
    assert repr(resolve_reshape("auto", "x", tokens, late, (64, 64))) == "TokenReshape(grid=(4, 4), prefix=0)"
    exact = resolve_reshape("auto", "x", torch.randn(1, 37, 5), nn.Identity(), (64, 128))
    assert repr(exact) == "TokenReshape(grid=(4, 8), prefix=5)"


def test_lazy_layers_and_second_names() -> None:
    from zoo.explain import CAMError

    with pytest.raises(CAMError, match="lazy layers that have not run; call it once"):
        GradCAM(nn.Sequential(nn.LazyConv2d(3, 3)), "0")
    model = brute.network()
    model.again = model.head
    assert list(GradCAM(model, "again").layers) == ["again"]


@pytest.mark.filterwarnings("ignore:.*0 everywhere")
def test_exact_derivatives_through_attention() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_heads=1, embed_dim=8, num_classes=3)
    result = GradCAMpp(model.double(), "blocks.0", derivatives="exact")(torch.randn(1, 3, 32, 32).double(), 1)
    assert result.maps["blocks.0"].shape == (1, 2, 2)


def test_every_target_is_probed() -> None:
    """Noise so small that no unit changes: only another input tells that the second image's class is not linear."""
    model, x = TwoHeads().double(), brute.images(2)
    found = SmoothGradCAMpp(model, "head", n_samples=2, sigma=1e-12)(x, [0, 1])
    assert found.linear_tail == {"head": False}


@pytest.mark.filterwarnings("ignore:.*0 everywhere")
def test_one_image_without_noise_does_not_speak_for_the_others() -> None:
    model, x = TwoHeads().double(), brute.images(2)
    x[1] = 0.5  # its range is 0, and so is its noise
    assert SmoothGradCAMpp(model, "head", n_samples=2, sigma=1.0)(x, 1).n_forwards == 3  # no probe


class Odd(nn.Module):
    """A good block, then one that runs twice, then one that sees windows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.good = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.twice = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.windows = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.good(x)))
        x = torch.cat(self.windows(torch.cat([x[..., :4], x[..., 4:8]])).chunk(2), -1)
        return self.fc(x.mean((2, 3)))


def test_the_choice_passes_over_what_cannot_be_explained() -> None:
    cam = SmoothGradCAMpp(Odd().double(), n_samples=2)
    cam(brute.images(1), 1)
    assert cam.layers == ["good"]
