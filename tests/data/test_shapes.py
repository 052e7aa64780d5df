"""Shapes: what is drawn, where the boxes are, and that a picture depends on nothing but its seed, split and index."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.path import Path as Outline
from torch import Tensor

from zoo.data import Shapes
from zoo.data.shapes import CLASS_NAMES, Scene, _boxes, draw, polygon_distance
from zoo.errors import DataError

SPLITS = ("train", "val", "test")
POLYGON = [(0.9, 0.1), (0.1, 0.8), (-0.2, 0.2), (-0.9, 0.3), (-0.4, -0.6), (0.3, -0.6)]


def _scene(size: int, count: int = 8) -> Scene:
    """`count` turned copies of every class, one a picture, on a flat black ground."""
    classes = torch.arange(len(CLASS_NAMES)).repeat(count)[:, None]
    n = len(classes)
    u = torch.rand(n, 4, generator=torch.Generator().manual_seed(0))
    radius = size * (0.25 + 0.15 * u[:, :1])
    return Scene(
        classes=classes,
        centre=radius[..., None] + u[:, None, 1:3] * (size - 2 * radius[..., None]),
        radius=radius,
        angle=2 * math.pi * u[:, 3:],
        colour=torch.ones(n, 1, 3),
        background=torch.zeros(n, 3),
        grating=torch.zeros(n, 6),
        stroke=torch.zeros(n, 0, 5),
        stroke_colour=torch.zeros(n, 0, 3),
    )


def _tight_box(mask: Tensor) -> list[int]:
    rows, columns = mask.nonzero().unbind(1)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def test_polygon_distance_against_matplotlib_and_its_boundary():
    points = torch.rand(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.4 - 1.2
    distance = polygon_distance(points[:, 0], points[:, 1], POLYGON)
    assert torch.equal(distance < 0, torch.from_numpy(Outline(POLYGON).contains_points(points.numpy())))

    corners = torch.tensor(POLYGON, dtype=torch.float64)
    steps = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None, None]
    boundary = (corners + steps * (corners.roll(-1, 0) - corners)).flatten(0, 1)
    torch.testing.assert_close(distance.abs(), torch.cdist(points, boundary).amin(1), atol=1e-3, rtol=0)


def test_edges_are_anti_aliased_as_if_drawn_eight_times_larger():
    small, factor = 24, 8
    scene = _scene(small)
    large = scene._replace(centre=scene.centre * factor, radius=scene.radius * factor)
    covered = (draw(large, small * factor)[0][:, 0] >= 0.5).float()
    expected = torch.nn.functional.avg_pool2d(covered[:, None], factor)[:, 0]
    error = (draw(scene, small)[0][:, 0] - expected).abs()
    assert error.mean() < 0.005
    assert error.max() < 0.5  # at a corner, where the share is not linear in the distance


@pytest.mark.parametrize("size", [16, 32, 64])
def test_boxes_are_tight_around_what_is_drawn(size):
    pictures, boxes = draw(_scene(size), size)
    for picture, box in zip(pictures[:, 0], boxes[:, 0].tolist(), strict=True):
        assert _tight_box(picture >= 0.5) == box


def test_boxes_follow_the_outline_of_known_shapes():
    scene = _scene(64)
    _, boxes = draw(scene, 64)
    middle, radius, angle = scene.centre[:, 0], scene.radius, scene.angle
    quarter = math.pi / 2 * torch.arange(4) + math.pi / 4
    reach = {
        "circle": radius,
        "ring": radius,
        "square": radius * (angle + quarter).cos().abs().amax(1, keepdim=True),
        "frame": radius * (angle + quarter).cos().abs().amax(1, keepdim=True),
    }
    for name, half in reach.items():
        of_class = scene.classes[:, 0] == CLASS_NAMES.index(name)
        expected = torch.cat([middle - half, middle + half], dim=1)[of_class]
        # A pointed corner covers less than half of its last pixel.
        assert (boxes[of_class, 0] - expected).abs().max() <= (1 if name in ("circle", "ring") else 1.5)


def test_no_pixels_no_box():
    assert _boxes(torch.zeros(2, 3, 5, 7, dtype=torch.bool)).tolist() == [[[0] * 4] * 3] * 2


def test_classes_are_told_apart_by_their_outline():
    scene = _scene(32, count=1)
    pictures, _ = draw(scene._replace(radius=torch.full_like(scene.radius, 12.0), centre=scene.centre * 0 + 16), 32)
    flat = pictures[:, 0].flatten(1)
    union = torch.maximum(flat[:, None], flat).sum(-1)
    overlap = torch.minimum(flat[:, None], flat).sum(-1) / union
    assert (overlap - torch.eye(len(CLASS_NAMES))).max() < 0.9


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_picture_depends_on_seed_split_and_index_alone(multi_label):
    few = Shapes(length=5, multi_label=multi_label, clutter=2, seed=3).pictures("train")
    many = Shapes(length=300, multi_label=multi_label, clutter=2, seed=3).pictures("train")
    other = Shapes(length=300, multi_label=multi_label, clutter=2, seed=4).pictures("train")
    for i in range(5):
        for a, b in zip(few[i], many[i], strict=True):
            assert torch.equal(a, b)
    assert not any(torch.equal(a, b) for a, b in zip(many.pictures, other.pictures, strict=True))


def test_no_picture_appears_twice_in_any_split():
    # With its class drawn too, a picture is nothing but its random numbers; 300 are drawn in more than one go.
    data = Shapes(size=16, multi_label=True, max_objects=1, noise=0, length=300, val_length=300)
    pictures = torch.cat([data.pictures(split).pictures for split in SPLITS])
    assert len(pictures.unique(dim=0)) == 900


def test_scenes_do_not_change_between_releases():
    data = Shapes(num_classes=4, multi_label=True, max_objects=2, return_boxes=True, length=4)
    objects = [data.pictures("train")[i][2] for i in range(4)]
    assert [o["labels"].tolist() for o in objects] == [[3, -1], [3, -1], [3, 1], [3, 0]]
    assert [o["boxes"].tolist() for o in objects] == [
        [[17, 18, 28, 29], [0, 0, 0, 0]],
        [[17, 4, 28, 14], [0, 0, 0, 0]],
        [[20, 4, 29, 14], [19, 18, 30, 28]],
        [[4, 1, 16, 13], [17, 5, 28, 15]],
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_what_the_docstring_says(num_workers):
    data = Shapes(size=24, num_classes=5, length=40, val_length=10, batch_size=8, num_workers=num_workers)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    for pictures, targets in batches:
        assert pictures.shape == (8, 3, 24, 24)
        assert pictures.dtype == torch.float32
        assert 0 <= pictures.min() < pictures.max() <= 1
        assert targets.dtype == torch.int64
        assert targets.shape == (8,)
    assert sorted(torch.cat([targets for _, targets in batches]).tolist()) == [i for i in range(5) for _ in range(8)]
    assert data.class_names == ("circle", "square", "triangle", "cross", "ring")


def test_workers_and_processes_do_not_change_the_pictures():
    alone = Shapes(length=16, val_length=10, batch_size=4, size=16)
    helped = Shapes(length=16, val_length=10, batch_size=4, size=16, num_workers=2)
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for (a, b), (c, d) in zip(getattr(alone, name)(), getattr(helped, name)(), strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)


def test_several_labels_and_their_boxes():
    data = Shapes(
        size=48,
        num_classes=4,
        multi_label=True,
        max_objects=4,
        return_boxes=True,
        length=400,
        val_length=8,
        batch_size=50,
    )
    counts, repeated = [], False
    for pictures, targets, objects in data.train_dataloader():
        boxes, labels = objects["boxes"], objects["labels"]
        assert (boxes.shape, boxes.dtype) == ((50, 4, 4), torch.int64)
        assert (labels.shape, labels.dtype) == ((50, 4), torch.int64)
        assert (targets.shape, targets.dtype) == ((50, 4), torch.float32)
        assert pictures.shape == (50, 3, 48, 48)
        there = labels >= 0
        counts += there.sum(1).tolist()
        for row, target in zip(labels.tolist(), targets, strict=True):
            found = [label for label in row if label >= 0]
            assert target.nonzero().flatten().tolist() == sorted(set(found))
            repeated |= len(set(found)) < len(found)
        assert (boxes[~there] == 0).all()
        x0, y0, x1, y1 = boxes[there].unbind(1)
        assert ((x0 >= 0) & (y0 >= 0) & (x1 <= 48) & (y1 <= 48) & (x1 - x0 >= 4) & (y1 - y0 >= 4)).all()
        occupied = torch.zeros(50, 48, 48)
        for picture, picture_boxes in zip(occupied, boxes.tolist(), strict=True):
            for x0, y0, x1, y1 in picture_boxes:
                picture[y0:y1, x0:x1] += 1
        assert occupied.max() == 1
    assert {n: counts.count(n) > 60 for n in set(counts)} == {1: True, 2: True, 3: True, 4: True}
    assert repeated


def test_shapes_that_are_not_turned_stand_upright():
    turned, upright = (Shapes(size=64, num_classes=2, length=40, noise=0, rotate=rotate) for rotate in (True, False))
    assert torch.equal(turned.pictures("train").classes, upright.pictures("train").classes)
    drawn = upright.pictures("train")
    squares = drawn.classes[:, 0] == 1
    for picture, (x0, y0, x1, y1) in zip(drawn.pictures[squares], drawn.boxes[squares, 0].tolist(), strict=True):
        square = picture[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].flatten(1)
        assert (square == square[:, :1]).all()  # filled to the corners of its box
    assert not torch.equal(turned.pictures("train").boxes, drawn.boxes)


@pytest.mark.parametrize(("same", "others"), [(2, 1), (3, 0), (1, 3)])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_repeated_shapes_are_of_one_class_beside_others(same, others, noise):
    data = Shapes(size=48, num_classes=4, multi_label=True, clutter=1, noise=noise)
    pictures, classes, boxes = data.repeated(300, same, others)
    assert (pictures.shape, pictures.dtype) == ((300, 3, 48, 48), torch.float32)
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert torch.equal(pictures, (pictures * 255).round() / 255)
    assert (classes.shape, boxes.shape) == ((300, same + others), (300, same + others, 4))
    assert (classes[:, :same] == classes[:, :1]).all()
    assert (classes[:, same:] != classes[:, :1]).all()
    assert (classes >= 0).all()
    for column in classes.T:
        assert column.bincount(minlength=4).min() > 40
    occupied = torch.zeros(300, 48, 48)
    for picture, picture_boxes in zip(occupied, boxes.tolist(), strict=True):
        for x0, y0, x1, y1 in picture_boxes:
            picture[y0:y1, x0:x1] += 1
    assert occupied.max() == 1
    assert (boxes[..., 2:] - boxes[..., :2]).min() >= 4
    again, _, _ = data.repeated(5, same, others)
    assert torch.equal(again, pictures[:5])


def test_boxes_of_repeated_shapes_hold_them():
    """Upright squares fill theirs, of a colour that is nowhere else."""
    data = Shapes(size=64, num_classes=2, noise=0, rotate=False)
    pictures, classes, boxes = data.repeated(40)
    for picture, numbers, around in zip(pictures, classes.tolist(), boxes.tolist(), strict=True):
        for number, (x0, y0, x1, y1) in zip(numbers, around, strict=True):
            inside = picture[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1]
            colour = inside[:, inside.shape[1] // 2, inside.shape[2] // 2, None, None]
            share = (inside == colour).all(0).float().mean().item()
            if number:
                assert share == 1
            else:
                assert 0.75 < share < 0.9  # a circle: pi / 4, and more without its outermost pixels


def test_repeated_shapes_that_cannot_be_drawn_are_refused():
    data = Shapes(size=32)
    with pytest.raises(DataError, match="Shapes: same must be at least 1 and others 0, got 0 and 1"):
        data.repeated(3, same=0)
    with pytest.raises(DataError, match="Shapes: same must be at least 1 and others 0, got 2 and -1"):
        data.repeated(3, others=-1)
    with pytest.raises(DataError, match="size must be at least 36 pixels for 5 object.s., got 32"):
        data.repeated(3, same=5, others=0)


def test_one_label_has_one_box():
    data = Shapes(length=8, return_boxes=True)
    for i in range(8):
        picture, target, objects = data.pictures("train")[i]
        assert objects["labels"].tolist() == [int(target)]
        assert objects["boxes"].shape == (1, 4)
        x0, y0, x1, y1 = objects["boxes"][0].tolist()
        assert picture[:, y0:y1, x0:x1].numel() > 0


@pytest.mark.parametrize("length", [60, 61, 119])
def test_classes_are_balanced_in_every_split_and_shard(length):
    data = Shapes(size=16, num_classes=6, length=length, val_length=length)
    for split in SPLITS:
        classes = data.pictures(split).classes[:, 0]
        counts = classes.bincount(minlength=6)
        assert counts.max() - counts.min() <= 1
        for rank in range(2):
            shard = classes[rank::2].bincount(minlength=6)
            assert shard.max() - shard.min() <= 3


def test_colour_does_not_tell_the_class():
    data = Shapes(size=16, length=3000, noise=0.05)
    pictures = data.pictures("train")
    mean = pictures.pictures.float().mean((2, 3)) / 255
    by_class = torch.stack([mean[pictures.classes[:, 0] == c].mean(0) for c in range(6)])
    assert (by_class - mean.mean(0)).abs().max() < 5 * mean.std() / math.sqrt(500)


def test_shapes_stand_out_from_their_background():
    data = Shapes(length=200, noise=0, return_boxes=True)
    for i in range(200):
        picture, _, objects = data.pictures("train")[i]
        x0, y0, x1, y1 = objects["boxes"][0].tolist()
        inside = picture[:, y0:y1, x0:x1].flatten(1)
        colours, counts = (inside * 255).round().long().unique(dim=1, return_counts=True)
        fill = colours[:, counts.argmax(), None] / 255  # the only colour without stripes
        border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
        assert (border - fill).abs().amax(0).median() > 0.14


@pytest.mark.parametrize("option", ["noise", "clutter"])
def test_noise_and_clutter_leave_the_objects_alone(option):
    plain, disturbed = ({"noise": 0.0}, {"noise": 0.2}) if option == "noise" else ({}, {"clutter": 5})
    a = Shapes(length=20, **plain).pictures("train")
    b = Shapes(length=20, **disturbed).pictures("train")
    assert torch.equal(a.classes, b.classes)
    assert torch.equal(a.boxes, b.boxes)
    difference = (a.pictures.float() - b.pictures.float()) / 255
    assert (difference.flatten(1).std(1) > 0.02).all()


def test_drawing_leaves_the_global_random_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Shapes(length=20, multi_label=True, clutter=2).setup()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("stage", "splits"), [("fit", {"train", "val"}), ("validate", {"val"}), ("test", {"test"}), (None, set(SPLITS))]
)
def test_a_stage_draws_what_it_needs_once(stage, splits):
    data = Shapes(length=4, val_length=2)
    data.setup(stage)
    first = dict(data._drawn)
    assert set(first) == splits
    data.setup(stage)
    assert all(data.pictures(split) is drawn for split, drawn in first.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 11}, "Shapes: size must be at least 12 pixels for 1 object(s), got 11"),
        ({"size": 23, "multi_label": True}, "Shapes: size must be at least 24 pixels for 3 object(s), got 23"),
        (
            {"size": 32, "multi_label": True, "max_objects": 5},
            "Shapes: size must be at least 36 pixels for 5 object(s), got 32",
        ),
        ({"num_classes": 1}, "Shapes: num_classes must be 2 to 10, got 1"),
        ({"num_classes": 11}, "Shapes: num_classes must be 2 to 10, got 11"),
        ({"max_objects": 0}, "Shapes: max_objects must be 1 to 9, got 0"),
        ({"max_objects": 10}, "Shapes: max_objects must be 1 to 9, got 10"),
        ({"length": 0}, "Shapes: length must be at least 1, got 0"),
        ({"val_length": 0}, "Shapes: val_length must be at least 1, got 0"),
        ({"batch_size": 0}, "Shapes: batch_size must be at least 1, got 0"),
        ({"clutter": -1}, "Shapes: clutter must not be negative, got -1"),
        ({"num_workers": -1}, "Shapes: num_workers must not be negative, got -1"),
        ({"noise": -0.1}, "Shapes: noise must be finite and not negative, got -0.1"),
        ({"noise": math.nan}, "Shapes: noise must be finite and not negative, got nan"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(DataError) as error:
        Shapes(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("max_objects", range(1, 10))
def test_every_number_of_objects_fits_the_smallest_picture(max_objects):
    side = math.ceil(math.sqrt(max_objects))
    data = Shapes(size=12 * side, num_classes=10, multi_label=True, max_objects=max_objects, length=50)
    drawn = data.pictures("train")
    there = drawn.classes >= 0
    x0, y0, x1, y1 = drawn.boxes[there].unbind(1)
    assert ((x1 > x0) & (y1 > y0)).all()
    assert set(there.sum(1).tolist()) == set(range(1, max_objects + 1))
