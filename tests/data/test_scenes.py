"""Scenes: what is in them, what a malformed one is told, and the order in which views come."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from zoo.data import PlanarPicture, ProceduralScene
from zoo.data.scenes import (
    Scene,
    ViewBatches,
    boxes,
    planar_picture,
    random_solids,
    sample_surface,
)
from zoo.errors import DataError
from zoo.splat.cameras import camera_positions, intrinsics, orbit, project_points

SHAPES = ("rectangle", "disc", "gaussian", "anisotropic_gaussian", "triangle", "star")


@pytest.fixture(scope="module")
def small() -> ProceduralScene:
    data = ProceduralScene(size=16, views=5, test_views=3, supersample=2, steps_per_epoch=7)
    data.setup("fit")
    return data


def test_boxes_are_those_of_the_recipe():
    first, second, slab = boxes()
    for thing, centre, half, angle in (
        (first, (-0.5, -0.3, -0.2), (0.45, 0.35, 0.5), 0.4),
        (second, (0.5, 0.4, 0.1), (0.3, 0.4, 0.3), -0.7),
        (slab, (0, 0, -0.75), (1.1, 1.1, 0.06), 0),
    ):
        cos, sin = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]).double()
        local = (thing.vertices - torch.tensor(centre).double()) @ turn
        assert_close(local.abs(), torch.tensor(half).double().expand(8, 3), atol=1e-7, rtol=0)
    assert first.colors[::2].tolist() == [[0.9, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.3, 0.9]]
    assert second.colors[1::2].tolist() == [[0.95, 0.85, 0.2], [0.2, 0.8, 0.85], [0.8, 0.3, 0.8]]
    assert slab.colors[::2].tolist() == [[0.55, 0.5, 0.45], [0.5, 0.5, 0.5], [0.75, 0.75, 0.7]]


def test_cameras_are_those_of_the_recipe(small):
    for indexes, n in ((small.scene.train, 5), (small.scene.test, 3)):
        viewmats = small.scene.viewmats[list(indexes)].double()
        x, y, z = camera_positions(viewmats).unbind(-1)
        assert_close((x**2 + y**2 + z**2).sqrt(), torch.full((n,), 3.2).double(), atol=1e-5, rtol=0)
        sector = (torch.atan2(y, x) % (2 * math.pi)) / (2 * math.pi) * n
        assert sector.floor().tolist() == list(range(n))
        height = (torch.asin(z / 3.2) - 0.25) / 0.7
        assert bool(((height > 0) & (height < 1)).all())
        assert bool(((height - sector % 1).abs() > 1e-3).all())  # a random number of its own
        centre, _ = project_points(torch.zeros(1, 3).double(), viewmats, small.scene.Ks[list(indexes)].double())
        assert_close(centre[:, 0], torch.full((n, 2), 8.0).double(), atol=1e-5, rtol=0)
    assert torch.equal(small.scene.Ks[3], torch.tensor([[1.3 * 16, 0, 8], [0, 1.3 * 16, 8], [0, 0, 1]]))
    assert small.scene.extent == pytest.approx(3.4, abs=0.4)
    assert small.scene.background == (1.0, 1.0, 1.0)


def test_pictures_show_the_boxes_where_the_cameras_see_them(small):
    scene = small.scene
    top = torch.tensor([[-0.5, -0.3, 0.3], [0.5, 0.4, 0.4]])  # the middles of the tops
    colors = torch.tensor([[0.2, 0.3, 0.9], [0.8, 0.3, 0.8]])
    seen = 0
    for view in range(len(scene)):
        places, _ = project_points(top, scene.viewmats[view], scene.Ks[view])
        for (x, y), color in zip(places.long().tolist(), colors, strict=True):
            seen += bool((scene.images[view, y, x] - color).abs().max() < 1e-6)
    assert seen >= 12  # of 16: a box may hide the other, and an edge may cross the pixel


def test_a_seed_gives_one_scene_and_its_parts_do_not_disturb_each_other(small):
    options = {"size": 16, "views": 5, "test_views": 3, "supersample": 2}
    same, other = ProceduralScene(**options).scene, ProceduralScene(**options, seed=1).scene
    for name in ("images", "viewmats", "points", "colors"):
        assert torch.equal(getattr(small.scene, name), getattr(same, name))
        assert not torch.equal(getattr(small.scene, name), getattr(other, name))
    more = ProceduralScene(**{**options, "views": 6, "num_points": 7}).scene
    assert torch.equal(more.images[list(more.test)], small.scene.images[list(small.scene.test)])
    even = ProceduralScene(**{**options, "views": 3}).scene
    assert not torch.equal(even.viewmats[:3], even.viewmats[3:])  # training and test rings differ
    fewer = ProceduralScene(**{**options, "test_views": 2}).scene
    assert torch.equal(fewer.points, same.points)
    assert torch.equal(fewer.images[:5], same.images[:5])


def test_a_scene_draws_nothing_from_the_global_stream():
    before = torch.get_rng_state()
    data = ProceduralScene("solids", size=4, views=2, test_views=1, supersample=1)
    list(data.train_dataloader()), list(data.val_dataloader()), PlanarPicture(num_points=3).scene
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", range(4))
def test_random_solids_stand_apart_on_their_slab(seed):
    *things, slab = random_solids(seed)
    assert [len(thing.faces) for thing in things[::4]] == [4, 4, 4]  # tetrahedra
    assert [len(thing.faces) for thing in things[3::4]] == [8, 8]  # octahedra
    for thing in things:
        assert float(thing.vertices[:, 2].min()) == pytest.approx(-0.69, abs=1e-9)
        assert float(thing.vertices[:, :2].abs().max()) < 1.1
    middles = torch.stack([(thing.vertices.amax(0) + thing.vertices.amin(0))[:2] / 2 for thing in things])
    assert torch.pdist(middles).min() > 0.1
    samples = [sample_surface([thing], 200, torch.Generator().manual_seed(0))[0] for thing in things]
    for i, thing in enumerate(things):
        for j, points in enumerate(samples):
            assert i == j or not thing.contains(points).any()
    assert_close(slab.offsets[-1], torch.tensor(-0.69).double(), atol=1e-7, rtol=0)


def test_random_solids_follow_their_seed_and_fit_in_any_number():
    assert all(torch.equal(a.vertices, b.vertices) for a, b in zip(random_solids(5), random_solids(5), strict=True))
    assert not torch.equal(random_solids(5)[0].vertices, random_solids(6)[0].vertices)
    assert len(random_solids(0, 40)) == 41
    with pytest.raises(DataError, match="count must be at least 1, got 0"):
        random_solids(0, 0)


def test_solids_and_a_black_background():
    scene = ProceduralScene("solids", size=24, views=2, test_views=1, background="black", num_points=50).scene
    assert scene.background == (0.0, 0.0, 0.0)
    assert torch.equal(scene.images[0, 0, 0], torch.zeros(3))
    assert len(scene.images.flatten(0, 2).unique(dim=0)) > 30


# Flat pictures


def test_flat_shapes_have_their_areas():
    star = 5 * 0.8 * 0.32 * math.sin(math.pi / 5)  # ten triangles between a tip, a notch and the middle
    gaussian = 2 * math.pi * 0.3**2
    areas = (4 * 0.7 * 0.4, math.pi * 0.65**2, gaussian, 2 * math.pi * 0.4 * 0.15, 0.75**2 * 3**1.5 / 4, star)
    for shape, area in zip(SHAPES, areas, strict=True):
        picture = planar_picture(shape)
        assert picture.shape == (64, 64, 3)
        assert torch.equal(picture[..., 0], picture[..., 2])
        assert 4 * float(picture.mean()) == pytest.approx(area, rel=0.03 if "gaussian" in shape else 0.006)


def test_flat_shapes_stand_upright():
    for shape in ("rectangle", "disc", "gaussian", "triangle", "star"):
        picture = planar_picture(shape)
        assert_close(picture, picture.flip(1))  # left is right
    for shape in ("triangle", "star"):
        rows = planar_picture(shape)[..., 0].sum(1)
        assert rows[:30].argmax() > rows[:30].nonzero()[0]  # a tip on top
        assert rows.nonzero()[0] < 64 - 1 - rows.nonzero()[-1]
    # 30 degrees from x towards y, which points down
    x, y = torch.meshgrid(*[(torch.arange(64) + 0.5) / 32 - 1] * 2, indexing="xy")
    weight = planar_picture("anisotropic_gaussian")[..., 0]
    covariance = torch.stack([(weight * a * b).sum() for a, b in ((x, x), (x, y), (y, y))]) / weight.sum()
    angle = 0.5 * math.atan2(2 * covariance[1], covariance[0] - covariance[2])
    assert angle == pytest.approx(math.pi / 6, abs=0.02)


def test_edges_of_flat_shapes_have_their_share():
    # The right edge at 0.7 lies at 54.4 of 64 pixels: with 5 points a pixel, 2 of 5 columns of points are white.
    assert_close(planar_picture("rectangle", supersample=5)[32, 54], torch.full((3,), 0.4).double())
    assert_close(planar_picture("gaussian", 64, 1)[40, 20, 0].item(), math.exp(-(((11.5**2 + 8.5**2) / 32**2) / 0.18)))


def test_the_plane_at_one_fills_a_flat_picture():
    data = PlanarPicture("disc", size=20, num_points=30, steps_per_epoch=3)
    scene = data.scene
    corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [0, 1, 1]])
    places, depths = project_points(corners, scene.viewmats[0], scene.Ks[0])
    assert torch.equal(places, torch.tensor([[0.0, 0], [20, 0], [10, 20]]))
    assert torch.equal(depths, torch.ones(3))
    assert torch.equal(scene.points[:, 2], torch.ones(30))
    assert 0.3 < scene.points[:, :2].abs().max() <= 0.5
    assert (scene.train, scene.test, scene.extent, scene.names) == ((0,), (0,), 1.0, ("disc",))
    assert torch.equal(PlanarPicture().scene.points, torch.tensor([[0.0, 0, 1]]))
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    assert all(torch.equal(batch["image"][0], scene.images[0]) for batch in [*batches, *data.val_dataloader()])


# The record


def _scene(**changes: Any) -> Scene:
    images = torch.rand(3, 4, 5, 3)
    cameras = orbit(3, 2.0, 0.3), intrinsics(4.0, 5, 4).repeat(3, 1, 1)
    scene = Scene(images, *cameras, torch.rand(6, 3), torch.rand(6, 3), (0, 2), (1,))
    return replace(scene, **changes) if changes else scene


def test_a_scene_fills_in_its_names_and_extent():
    scene = _scene()
    assert len(scene) == 3
    assert scene.names == ("view_000", "view_001", "view_002")
    first, _, third = camera_positions(scene.viewmats)
    assert scene.extent == pytest.approx(1.1 * float((first - third).norm()) / 2)  # of the training views alone
    assert scene.size(1) == (4, 5)
    assert repr(scene) == f"Scene(views=3, train=2, test=1, width=5, height=4, points=6, extent={scene.extent:.4g})"
    assert replace(scene, extent=7.0).extent == 7.0
    with pytest.raises(FrozenInstanceError):
        scene.extent = 1.0


def test_bytes_and_wide_numbers_come_out_as_float32():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(3, 4, 5, 3)
    scene = _scene(images=images, viewmats=orbit(3, 2.0, 0.3, dtype=torch.float64))
    view = scene.view(2)
    assert_close(view["image"], torch.tensor([0.0, 0.2, 1]).expand(4, 5, 3))
    assert {name: value.dtype for name, value in view.items()} == {
        "image": torch.float32, "viewmat": torch.float32, "K": torch.float32, "index": torch.int64
    }  # fmt: skip
    assert view["index"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.rand(3, 3, 4, 5)}, r"images must be \[V, H, W, 3\].*got torch.float32 \[3, 3, 4, 5\]"),
        ({"images": torch.zeros(3, 4, 5, 3, dtype=torch.int64)}, "uint8 or floating point, got torch.int64"),
        ({"images": torch.empty(0, 4, 5, 3)}, "images must be"),
        ({"images": torch.full((3, 4, 5, 3), 255.0)}, r"images must lie in \[0, 1\], got 255 to 255"),
        ({"images": torch.full((3, 4, 5, 3), math.nan)}, r"images must lie in \[0, 1\], got nan"),
        ({"viewmats": torch.eye(4)}, r"viewmats must be floating point \[3, 4, 4\], got torch.float32 \[4, 4\]"),
        ({"viewmats": 2 * torch.eye(4).repeat(3, 1, 1)}, "rigid motions.*that of view 0 is not"),
        ({"viewmats": torch.diag(torch.tensor([1.0, -1, 1, 1])).repeat(3, 1, 1)}, "rigid motions"),
        ({"viewmats": orbit(3, 2.0, 0.3).mT.contiguous()}, "rigid motions"),
        ({"viewmats": torch.cat([torch.eye(4)[None], torch.full((2, 4, 4), math.nan)])}, "that of view 1 is not"),
        ({"Ks": torch.eye(3).repeat(2, 1, 1)}, r"Ks must be floating point \[3, 3, 3\], got torch.float32 \[2, 3, 3\]"),
        ({"Ks": torch.zeros(3, 3, 3)}, r"positive focal lengths, got \[0.0, 0.0\] for view 0"),
        ({"points": torch.rand(6, 2)}, r"points must be floating point \[P, 3\] with P >= 1"),
        ({"points": torch.empty(0, 3), "colors": torch.empty(0, 3)}, "draw random points"),
        ({"points": torch.full((6, 3), math.inf)}, "points must be finite"),
        ({"colors": torch.rand(5, 3)}, "colors must be one a point, 6, got 5"),
        ({"colors": torch.full((6, 3), 2.0)}, r"colors must lie in \[0, 1\]"),
        ({"train": (0, 3)}, r"train must name views 0 to 2, got \[3\]"),
        ({"train": ()}, "train must name a view or more, got none"),
        ({"test": (-1,)}, r"test must name views 0 to 2, got \[-1\]"),
        ({"test": (1, 1)}, "test must name each view once"),
        ({"names": ("a",)}, "names must hold one a view, 3, got 1"),
        ({"extent": math.inf}, "extent must be finite and not negative, got inf"),
        ({"background": (2.0, 0.0, 0.0)}, r"background must be 3 numbers in \[0, 1\] or None, got \(2.0, 0.0, 0.0\)"),
    ],
)  # fmt: skip
def test_malformed_scenes_are_refused(changes, message):
    with pytest.raises(DataError, match=rf"^Scene: .*{message}"):
        _scene(**changes)


# The order of the views


def _indexes(loader: Any, epoch: int | None = None) -> list[int]:
    if epoch is not None:
        loader.batch_sampler.set_epoch(epoch)
    return [index for batch in loader for index in batch["index"].tolist()]


def test_batches_are_dictionaries(small):
    data = ProceduralScene(size=16, views=5, test_views=3, supersample=2, batch_size=2, steps_per_epoch=4)
    batch = next(iter(data.train_dataloader()))
    shapes = {"image": (2, 16, 16, 3), "viewmat": (2, 4, 4), "K": (2, 3, 3), "index": (2,)}
    assert {name: tuple(value.shape) for name, value in batch.items()} == shapes
    for row, index in enumerate(batch["index"].tolist()):
        assert torch.equal(batch["image"][row], small.scene.images[index])
        assert torch.equal(batch["viewmat"][row], small.scene.viewmats[index])
    assert [len(batch["index"]) for batch in data.val_dataloader()] == [1, 1, 1]
    assert _indexes(data.test_dataloader()) == _indexes(data.predict_dataloader()) == [5, 6, 7]


def test_permutations_follow_each_other_across_epochs(small):
    loader = small.train_dataloader()
    assert len(loader) == 7
    draws = [index for epoch in range(5) for index in _indexes(loader, epoch)]
    turns = [draws[i : i + 5] for i in range(0, 35, 5)]
    assert all(sorted(turn) == [0, 1, 2, 3, 4] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 4
    assert _indexes(loader, 3) == draws[21:28]  # an epoch is what it is, whatever came before it
    assert _indexes(small.train_dataloader(), 3) == draws[21:28]
    other = ProceduralScene(size=2, views=5, test_views=1, steps_per_epoch=35, seed=1)
    assert _indexes(other.train_dataloader()) != draws


def test_processes_share_the_draws():
    alone = [index for batch in ViewBatches(5, 12, 2, seed=3) for index in batch]
    processes = [ViewBatches(5, 4, 2, seed=3, rank=rank, world=3) for rank in range(3)]
    parts = [[index for batch in batches for index in batch] for batches in processes]
    assert [index for draws in zip(*parts, strict=True) for index in draws] == alone


def test_a_module_in_a_process_takes_its_part(small):
    data = ProceduralScene(size=2, views=5, test_views=3, steps_per_epoch=7)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    loader = data.train_dataloader()
    assert len(loader) == 7
    draws = [batch[0] for batch in ViewBatches(5, 14, 1, seed=0)]
    assert _indexes(loader) == draws[1::2]
    assert _indexes(data.val_dataloader()) == [6]


@pytest.mark.parametrize("done", range(1, 7))
def test_training_resumes_at_any_batch(small, done):
    whole = small.train_dataloader()
    expected = _indexes(whole, 2)
    whole.batch_sampler.set_epoch(2)
    batches = iter(whole)
    for _ in range(done):
        next(batches)
    state = whole.state_dict()
    assert state == {"epoch": 2, "done": done, "views": 5, "examples": 7, "batch_size": 1, "processes": 1}
    resumed = small.train_dataloader()
    resumed.load_state_dict(state)
    assert _indexes(resumed, 2) == expected[done:]
    assert _indexes(resumed, 3) == _indexes(small.train_dataloader(), 3)


def test_other_views_are_refused_inside_an_epoch(small):
    state = {"epoch": 0, "done": 3, "views": 6, "examples": 7, "batch_size": 1, "processes": 1}
    loader = small.train_dataloader()
    with pytest.raises(DataError, match=r"'views': 6.* the data is now .*'views': 5"):
        loader.load_state_dict(state)
    loader.load_state_dict({**state, "done": 0})


class _Recorder(L.LightningModule):
    """Notes the views it is given and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []
        self.judged: list[int] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen += batch["index"].tolist()
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.judged += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class _SaveAt(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loggers and workers
@pytest.mark.parametrize("stop", [3, 7, 12])
def test_lightning_resumes_in_the_middle_of_a_permutation(small, tmp_path, stop):
    def fit(ckpt_path: Path | None = None) -> _Recorder:
        recorder = _Recorder()
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            callbacks=None if ckpt_path else _SaveAt(tmp_path / "at.ckpt", stop),
        )
        trainer.fit(recorder, datamodule=small, ckpt_path=ckpt_path)
        return recorder

    whole = fit()
    assert whole.seen == [index for epoch in range(3) for index in _indexes(small.train_dataloader(), epoch)]
    assert whole.judged == [5, 6, 7] * 3
    assert fit(tmp_path / "at.ckpt").seen == whole.seen[stop:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProceduralScene("spheres"), "ProceduralScene: scene must be one of boxes, solids, got 'spheres'"),
        (lambda: ProceduralScene(background="red"), "ProceduralScene: background must be one of white, black, got 'r"),
        (lambda: ProceduralScene(size=0), "ProceduralScene: size must be at least 1, got 0"),
        (lambda: ProceduralScene(views=0), "ProceduralScene: views must be at least 1, got 0"),
        (lambda: ProceduralScene(test_views=0), "ProceduralScene: test_views must be at least 1, got 0"),
        (lambda: ProceduralScene(supersample=0), "ProceduralScene: supersample must be at least 1, got 0"),
        (lambda: ProceduralScene(num_points=0), "ProceduralScene: num_points must be at least 1, got 0"),
        (lambda: ProceduralScene(batch_size=0), "ProceduralScene: batch_size must be at least 1, got 0"),
        (lambda: ProceduralScene(steps_per_epoch=0), "ProceduralScene: steps_per_epoch must be at least 1, got 0"),
        (lambda: ProceduralScene(num_workers=-1), "ProceduralScene: num_workers must be at least 0, got -1"),
        (lambda: PlanarPicture("moon"), "PlanarPicture: shape must be one of rectangle, .*, star, got 'moon'"),
        (lambda: PlanarPicture(num_points=0), "PlanarPicture: num_points must be at least 1, got 0"),
        (lambda: planar_picture("moon"), "planar_picture: shape must be one of rectangle, .*, star, got 'moon'"),
        (lambda: planar_picture("star", 0), "planar_picture: size and supersample must be at least 1, got 0 and 8"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(DataError, match=f"^{message}"):
        make()
