"""What may be explained, and what is said of what may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.explain import brute
from zoo.explain import ContrastTarget, DetectionTarget, GradCAM, GradCAMpp, SegmentationTarget, SmoothGradCAMpp, TopK
from zoo.explain.errors import (
    CAMWarning,
    DisconnectedTarget,
    NonFinite,
    TargetCount,
    TargetNotScalar,
    TargetOutOfRange,
)


def maps(model: nn.Module, x: Tensor, target, **options) -> Tensor:
    return SmoothGradCAMpp(model, "head", n_samples=3, sample_weighting="uniform", **options)(x, target).maps["head"]


def test_a_function_is_the_class_it_returns() -> None:
    model, x = brute.network(), brute.images(3)
    expected = maps(model, x, [2, 1, 0])
    functions = [lambda scores, c=c: scores[:, c] for c in (2, 1, 0)]
    torch.testing.assert_close(maps(model, x, functions), expected)
    torch.testing.assert_close(maps(model, x, lambda scores: scores[:, 2])[0], expected[0])


def test_contrast() -> None:
    model, x = brute.network(), brute.images(2)
    contrast = ContrastTarget(1, [0, 2], gamma=0.5)
    by_hand = lambda s: s[:, 1] - 0.25 * s[:, 0] - 0.25 * s[:, 2]  # noqa: E731
    torch.testing.assert_close(maps(model, x, contrast), maps(model, x, by_hand))


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.tail = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.tail(self.head(x).relu())}


def test_segmentation() -> None:
    model, x = Segmenter().double(), brute.images(2)
    mask = torch.zeros(9, 9)
    mask[2:5, 6:] = 1
    found = GradCAM(model, "head")(x, SegmentationTarget(1, mask)).maps["head"]
    leaf = model.head(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad((model.tail(leaf.relu())[:, 1] * mask).sum(), leaf)
    torch.testing.assert_close(found, (slope.mean((2, 3), keepdim=True) * leaf).sum(1).relu().detach())
    everywhere = GradCAM(model, "head")(x, SegmentationTarget(0)).maps["head"]
    ones = GradCAM(model, "head")(x, SegmentationTarget(0, torch.ones(9, 9))).maps["head"]
    torch.testing.assert_close(everywhere, ones)
    with pytest.raises(TargetNotScalar, match=r"map is \[9, 9\], the mask \[3, 3\]; give one of the map's size"):
        GradCAM(model, "head")(x, SegmentationTarget(1, torch.ones(3, 3)))
    with pytest.raises(TargetOutOfRange, match="classes 0 to 1, got 2"):
        GradCAM(model, "head")(x, SegmentationTarget(2))
    with pytest.raises(TargetNotScalar, match=r"needs scores \[2, C\], got shape \[2, 2, 9, 9\]; give output_fn="):
        GradCAM(model, "head")(x, 1)


class Detector(nn.Module):
    """Three boxes an image, whose scores come from the maps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        scores = self.fc(self.head(x).relu().mean((2, 3)))
        boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 5.0, 5.0], [4.0, 4.0, 8.0, 8.0]], dtype=x.dtype)
        return [{"boxes": boxes, "labels": torch.tensor([1, 1, 2]), "scores": s} for s in scores]


def test_detection() -> None:
    model, x = Detector().double(), brute.images(2)
    cam = GradCAM(model, "head")

    def of(i: int) -> Tensor:
        return cam(x, lambda found: torch.stack([one["scores"][i] for one in found])).maps["head"]

    torch.testing.assert_close(cam(x, DetectionTarget(1, (1, 1, 5, 4))).maps["head"], of(1))
    torch.testing.assert_close(cam(x, DetectionTarget(1, (0, 0, 4, 3))).maps["head"], of(0))
    torch.testing.assert_close(cam(x, DetectionTarget(2, (4, 4, 8, 8))).maps["head"], of(2))
    targets = [DetectionTarget(1, (0, 0, 4, 4)), DetectionTarget(2, (4, 4, 8, 8))]
    torch.testing.assert_close(cam(x, targets).maps["head"], torch.stack([of(0)[0], of(2)[1]]))
    nothing = DetectionTarget(1, (0, 0, 4, 4), iou=0.9)(
        [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}]
    )
    assert nothing.tolist() == [0.0]
    assert DetectionTarget(1, (0, 0, 8, 8))(model(x)).tolist() == [0.0, 0.0]
    with pytest.raises(TargetNotScalar, match='must return a list of {"boxes", "labels", "scores"}'):
        GradCAM(brute.network(), "head")(x, DetectionTarget(1, (0, 0, 4, 4)))


def test_detectors_of_torchvision() -> None:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, box_score_thresh=0.0, min_size=64, max_size=64
    ).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        (found,) = model(x)
    target = DetectionTarget(int(found["labels"][0]), found["boxes"][0].tolist())
    result = GradCAM(model, "backbone.body.16")(x, target)
    assert result.maps["backbone.body.16"].shape == (1, 2, 2)
    torch.testing.assert_close(result.scores, found["scores"][:1])


class Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("wrap", [lambda s: (s, None), Answer, lambda s: {"logits": s}])
def test_scores_are_found_in_what_models_return(wrap) -> None:
    model, x = brute.network(), brute.images(2)
    expected = maps(model, x, 1)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.tail = model.head, model.tail

        def forward(self, x: Tensor):
            return wrap(self.tail(self.head(x)))

    torch.testing.assert_close(maps(Wrapped(), x, 1), expected)


def test_outputs_of_several_tensors_are_kept_row_by_row() -> None:
    model, x = brute.network(), brute.images(3)
    cam = SmoothGradCAMpp(model, "head", n_samples=2, output_fn=lambda s: (s, {"twice": 2 * s}))
    result = cam(x, lambda found: found[1]["twice"][:, 1])
    scores = model(x)
    for i, (first, more) in enumerate(result.logits):
        assert not first.requires_grad
        torch.testing.assert_close(first, scores[i].detach())
        torch.testing.assert_close(more["twice"], 2 * scores[i].detach())
    torch.testing.assert_close(cam(x, [lambda found: found[0][:, 1]] * 3).scores, scores[:, 1].detach())


def test_further_arguments_follow_their_images() -> None:
    model, x = brute.network(), brute.images(3)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.tail = model.head, model.tail

        def forward(self, x: Tensor, factor: Tensor, power: int) -> Tensor:
            return self.tail(self.head(x) * factor[:, None, None, None] ** power)

    factor = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    cam = SmoothGradCAMpp(Scaled(), "head", n_samples=3, chunk_size=4)
    whole = cam(x, 1, forward_kwargs={"factor": factor, "power": 2}).maps["head"]
    for i in range(3):
        one = cam(x[i : i + 1], 1, forward_kwargs={"factor": factor[i : i + 1], "power": 2})
        torch.testing.assert_close(one.maps["head"][0], whole[i])
    automatic = SmoothGradCAMpp(Scaled(), n_samples=2)
    automatic(x, 1, forward_kwargs={"factor": factor, "power": 2})
    assert automatic.layers == ["head"]


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (3, TargetOutOfRange, "the model has classes 0 to 2, got 3"),
        (-1, TargetOutOfRange, "the model has classes 0 to 2, got -1"),
        ([0, 5], TargetOutOfRange, "got 5"),
        (TopK(4), TargetOutOfRange, "has 3 classes, 4 were asked for"),
        ([0, 1, 2], TargetCount, r"2 images take one class, \[2\] or \[2, T\] classes, got shape \[3\]"),
        (torch.zeros(2, 2, 1).long(), TargetCount, r"got shape \[2, 2, 1\]"),
        (torch.zeros(2, 0).long(), TargetCount, r"got shape \[2, 0\]"),
        ([lambda s: s[:, 0]] * 3, TargetCount, "3 functions for 2 images; give one an image"),
        (torch.zeros(2), TargetNotScalar, "classes must be integers, got torch.float32"),
        (lambda s: s, TargetNotScalar, r"must return one number a row, \[\d\], got shape \[\d, 3\]"),
        (lambda s: 1.0, TargetNotScalar, "got float"),
        (lambda s: s[:, 0] * float("nan"), NonFinite, "the score of image 0 is"),
        (lambda s: s[:, 0].detach(), DisconnectedTarget, "does not depend on layer 'head', or a part of the model"),
        (ContrastTarget(0, []), TargetCount, "others must name at least one class"),
        (ContrastTarget(0, [7]), TargetOutOfRange, "ContrastTarget: the model has classes 0 to 2, got 7"),
        (SegmentationTarget(0), TargetNotScalar, r"must return scores \[B, C, h, w\]"),
    ],
)
def test_what_cannot_be_explained_is_said(target, error: type, message: str) -> None:
    model, x = brute.network(), brute.images(2)
    with pytest.raises(error, match=message):
        SmoothGradCAMpp(model, "head")(x, target)


def test_topk_of_none() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        TopK(0)


def test_nan_weights_are_noticed() -> None:
    model, x = brute.network(), brute.images()
    with torch.no_grad():
        model.tail[0].weight[0] = float("nan")
    with pytest.raises(NonFinite, match="NaN or infinity"):
        GradCAM(model, "head")(x, 0)
    model = brute.network()
    with pytest.raises(NonFinite, match="gradient at layer 'head' is NaN or infinite"):
        GradCAMpp(model, "head", output_fn=lambda s: (s - s.detach()).sqrt() + 1)(x, 0)


def test_probabilities_are_warned_of_once() -> None:
    model, x = brute.network(), brute.images()
    cam = GradCAM(model, "head", output_fn=lambda s: s.softmax(1))
    with pytest.warns(CAMWarning, match="seems to return probabilities"):
        cam(x, 1)
    cam(x, 1)
