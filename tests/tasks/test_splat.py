"""ConvexSplatting: its losses, rates and report, and that a killed run resumes to the same bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from tests.engine.forked import run_jobs
from tests.engine.test_resume import KILLED, assert_same_run, kill_at
from zoo.cli import main
from zoo.data import PlanarPicture, ProceduralScene
from zoo.errors import DataError, RunError
from zoo.losses.photometric import ssim
from zoo.splat import ConvexModel
from zoo.splat.cameras import camera_positions, intrinsics, orbit
from zoo.splat.convex.start import Start
from zoo.tasks import ConvexSplatting, SplatRates
from zoo.tasks.splat import psnr
from zoo.tasks.splat_report import draw_comparison, ride_around

TOY = Start(sigma=0.1, opacity=0.5, min_radius=0.08, max_radius=0.5)
TOY_RATES = SplatRates(2e-2, 4e-4, log_delta=1e-2, log_sigma=2e-2, opacity_logit=2e-2, sh0=2e-2, mask=0)
SMALL = [
    "fit",
    "--config=splat/boxes_cpu",
    "--config=_parts/quiet",
    "--trainer.max_steps=16",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.log_every_n_steps=1",
    "--last.every_n_train_steps=3",
    "--data.size=16",
    "--data.views=5",
    "--data.test_views=2",
    "--data.num_points=6",
    "--data.steps_per_epoch=8",
    "--model.sh_every=5",
    "--model.model.sh_degree=2",
]


def tiny(**options: object) -> ProceduralScene:
    chosen = {"size": 16, "views": 4, "test_views": 2, "num_points": 6, "steps_per_epoch": 8, **options}
    return ProceduralScene(**chosen)  # type: ignore[arg-type]


def fit(task: ConvexSplatting, data: L.LightningDataModule, steps: int, **options: object) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(task, datamodule=data)
    return trainer


def stub(task: ConvexSplatting, **trainer: object) -> ConvexSplatting:
    """The task with as much of a trainer as a method asks for."""
    task._trainer = SimpleNamespace(**trainer)  # type: ignore[assignment]
    task._fabric = None
    return task


def test_it_starts_from_the_points_of_the_scene() -> None:
    data = tiny()
    task = ConvexSplatting({"name": "convex_splat", "k": 5, "sh_degree": 1}, start=TOY)
    stub(task, world_size=1, precision="32-true", datamodule=data).setup("fit")
    model, scene = task.model, data.scene
    assert model.num_convexes == 6
    torch.testing.assert_close(model.vertices.mean(1), scene.points.float(), atol=2e-1, rtol=0)
    torch.testing.assert_close(model.sigma, torch.full((6,), 0.1))
    torch.testing.assert_close(0.5 + 0.28209479177387814 * model.sh0[:, 0], scene.colors.float())
    assert model.reference_focal == pytest.approx(1.3 * 16, rel=1e-6)
    before = model.points.detach().clone()
    task.setup("validate")  # those it has stay
    assert torch.equal(model.points, before)


def test_the_loss_is_the_sum_of_its_weighted_terms() -> None:
    task = ConvexSplatting({"name": "convex_splat"}, mask_weight=0.5, opacity_weight=0.25, size_weight=2.0)
    task.model.initialise(torch.randn(7, 3), torch.rand(7, 3))
    rgb, image = torch.rand(1, 16, 16, 3), torch.rand(1, 16, 16, 3)
    terms = task._loss({"image": image}, rgb)
    arms = task.model.points - task.model.points.mean(1, keepdim=True)
    expected = {
        "photometric": 0.8 * (rgb - image).abs().mean() + 0.2 * (1 - ssim(rgb, image)),
        "mask": 0.5 * torch.sigmoid(torch.tensor(1.0)),
        "opacity": 0.25 * task.model.opacity.mean(),
        "size": 2 * arms.norm(dim=-1).mean(),
    }
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], msg=name)
    plain = ConvexSplatting({"name": "convex_splat"}, ssim_lambda=0.0, mask_weight=0.0)
    assert plain._loss({"image": image}, rgb) == {"photometric": F.l1_loss(rgb, image)}


def test_rates_decay_by_the_same_factor_every_step() -> None:
    task = stub(ConvexSplatting(), estimated_stepping_batches=30000)
    assert task.points_rate(0) == pytest.approx(5e-4)
    assert task.points_rate(15000) == pytest.approx(5e-5)
    assert task.points_rate(30000) == task.points_rate(40000) == pytest.approx(5e-6)
    assert stub(ConvexSplatting(decay_steps=100), estimated_stepping_batches=9).points_rate(100) == pytest.approx(5e-6)
    data = tiny(batch_size=4)
    scene = stub(ConvexSplatting(points_rate_scale="scene"), estimated_stepping_batches=9, datamodule=data)
    assert scene.points_rate(0) == pytest.approx(5e-4 * data.scene.extent / 5)
    batch = stub(ConvexSplatting(scale_by_batch=True), estimated_stepping_batches=9, datamodule=data)
    assert batch.points_rate(0) == pytest.approx(2 * 5e-4)
    batch.model.initialise(torch.randn(3, 3), torch.rand(3, 3))
    group = batch.configure_optimizers()[0].param_groups[0]
    assert group["lr"] == pytest.approx(1e-3)
    assert group["betas"] == pytest.approx((0.6, 0.996))
    assert group["eps"] == pytest.approx(5e-16)


def test_there_is_an_optimizer_for_each_rate_and_a_rate_of_zero_freezes() -> None:
    task = stub(ConvexSplatting(rates=SplatRates(mask=0, log_delta=0)), datamodule=None)
    task.model.initialise(torch.randn(3, 3), torch.rand(3, 3))
    optimizers = task.configure_optimizers()
    names = [optimizer.param_groups[0]["name"] for optimizer in optimizers]
    assert names == ["points", "log_sigma", "opacity_logit", "sh0", "shN"]
    assert all(optimizer.defaults["eps"] == 1e-15 for optimizer in optimizers)
    assert not task.model.mask.requires_grad
    assert not task.model.log_delta.requires_grad
    nothing = stub(ConvexSplatting(rates=SplatRates(0, 0, 0, 0, 0, 0, 0, 0)), datamodule=None)
    with pytest.raises(RunError, match="every rate is 0, so there is nothing to train; give one above 0"):
        nothing.configure_optimizers()


def test_a_step_is_one_step_and_degrees_go_up() -> None:
    task = ConvexSplatting({"name": "convex_splat", "sh_degree": 2}, start=TOY, sh_every=3)
    trainer = fit(task, tiny(), 8, limit_val_batches=0)
    assert trainer.global_step == 8
    assert task.model.active_sh_degree == 2  # after 3 and 6 steps
    assert all(p.grad is not None for p in task.model.parameters())


def test_a_short_fit_of_the_boxes_gets_somewhere() -> None:
    L.seed_everything(0, verbose=False)
    data = ProceduralScene(size=32, views=12, test_views=4, num_points=24, steps_per_epoch=200)
    task = ConvexSplatting({"name": "convex_splat", "sh_degree": 0}, TOY, TOY_RATES, ssim_lambda=0.0, mask_weight=0.0)
    trainer = fit(task, data, 200)
    (after,) = trainer.validate(task, datamodule=data, verbose=False)
    assert after["val/psnr"] > 18
    assert after["val/psnr_8bit"] == pytest.approx(after["val/psnr"], abs=0.1)
    assert 0 < after["val/ssim"] < 1


def test_a_planar_convex_fits_a_triangle() -> None:
    L.seed_everything(0, verbose=False)
    start = Start(sigma=0.1, opacity=0.5, min_radius=0.5, max_radius=0.5)
    model = {"name": "convex_splat", "sh_degree": 0, "planar": True}
    task = ConvexSplatting(model, start, TOY_RATES, ssim_lambda=0.0, mask_weight=0.0)
    data = PlanarPicture(shape="triangle", size=32, steps_per_epoch=300)
    trainer = fit(task, data, 300)
    (after,) = trainer.validate(task, datamodule=data, verbose=False)
    assert after["val/psnr"] > 25
    assert task.model.points.shape == (1, 6, 2)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    for folder in folders.values():
        folder.mkdir()
    jobs = [
        (folders["whole"], SMALL),
        (folders["killed"], [*SMALL, *kill_at(11)]),
        (folders["killed"], [*SMALL, "--ckpt_path=last"]),
    ]
    assert run_jobs(jobs) == [0, KILLED, 0], "\n".join((f / "log.txt").read_text()[-3000:] for f in folders.values())
    runs = {name: folder / "runs/boxes_cpu" for name, folder in folders.items()}
    assert_same_run(runs["killed"], runs["whole"])
    state = torch.load(runs["whole"] / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 16
    rows = [json.loads(line) for line in (runs["whole"] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(16))
    report = runs["whole"] / "report"
    assert json.loads((report / "result.json").read_text())["convexes"] == 6
    with Image.open(report / "orbit.gif") as orbit_gif:
        assert (orbit_gif.n_frames, orbit_gif.size) == (48, (192, 192))
    with Image.open(report / "renders.png") as renders:
        assert renders.size == (2 * 192, 3 * 192)


def test_a_checkpoint_brings_its_own_number_of_convexes() -> None:
    saved = ConvexSplatting({"name": "convex_splat", "sh_degree": 0})
    saved.model.initialise(torch.randn(9, 3), torch.rand(9, 3))
    task = ConvexSplatting({"name": "convex_splat", "sh_degree": 0}, start=TOY)
    stub(task, world_size=1, precision="32-true", datamodule=tiny()).setup("fit")
    task.load_state_dict(saved.state_dict())
    assert task.model.num_convexes == 9
    assert torch.equal(task.model.points, saved.model.points)


def test_a_checkpoint_of_another_kind_is_refused() -> None:
    saved = ConvexSplatting({"name": "convex_splat", "k": 4, "sh_degree": 0})
    task = ConvexSplatting({"name": "convex_splat", "sh_degree": 0})
    with pytest.raises(RunError, match="the checkpoint's points are .*, those of this config .*; give model.k"):
        task.on_load_checkpoint({"state_dict": saved.state_dict()})
    task.on_load_checkpoint({"state_dict": task.state_dict()})


def test_what_the_model_says_goes_before_the_scene() -> None:
    model = {"name": "convex_splat", "background": [0.0, 0.5, 1.0], "reference_focal": 7.0}
    task = stub(ConvexSplatting(model, start=TOY), world_size=1, precision="32-true", datamodule=tiny())
    task.setup("fit")
    assert task.model.reference_focal == 7
    away = orbit(1, 1.0, 0.0, (50.0, 0.0, 0.0))
    rgb = task._render(away, intrinsics(20.0, 2, 2)[None], 2, 2)["rgb"]
    assert torch.equal(rgb, torch.tensor([0.0, 0.5, 1.0]).expand(1, 2, 2, 3))


def test_it_renders_in_the_precision_of_the_model() -> None:
    task = stub(ConvexSplatting(start=TOY), world_size=1, precision="64-true", datamodule=tiny()).double()
    task.setup("fit")
    assert task(next(iter(tiny().train_dataloader())))["rgb"].dtype is torch.float64


def test_psnr_is_the_mean_over_pictures() -> None:
    image, target = torch.rand(3, 8, 8, 3), torch.rand(3, 8, 8, 3)
    one_by_one = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(image, target, strict=True)]
    torch.testing.assert_close(psnr(image, target), torch.stack(one_by_one).mean())
    assert psnr(image, image) == pytest.approx(120)


def test_the_ride_goes_around_what_the_cameras_see() -> None:
    middle = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    viewmats = orbit(7, 3.0, 0.6, middle, dtype=torch.float64)
    ride = ride_around(viewmats, 12)
    places = camera_positions(ride)
    torch.testing.assert_close(places, camera_positions(orbit(12, 3.0, 0.6, middle, dtype=torch.float64)))
    seen = (ride @ F.pad(middle, (0, 1), value=1.0)).squeeze(-1)
    torch.testing.assert_close(seen[:, :2], torch.zeros(12, 2, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(seen[:, 2], torch.full((12,), 3.0, dtype=torch.float64))


def test_parallel_cameras_have_a_ride_too() -> None:
    viewmats = torch.eye(4).repeat(3, 1, 1)
    viewmats[:, 0, 3] = torch.tensor([-1.0, 0.0, 2.0])
    assert ride_around(viewmats, 4).isfinite().all()


def test_a_comparison_has_truth_rendering_and_difference(tmp_path: Path) -> None:
    truth, rendered = torch.zeros(2, 4, 6, 3), torch.full((2, 4, 6, 3), 0.1)
    draw_comparison(truth, rendered, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * 6 * 48, 3 * 4 * 48)
        assert [image.getpixel((0, row * 4 * 48)) for row in range(3)] == [(0,) * 3, (26,) * 3, (102,) * 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssim_lambda": 1.5}, "ssim_lambda must lie in [0, 1], got 1.5"),
        ({"mask_weight": -1.0}, "mask_weight must be finite and not negative, got -1.0"),
        ({"opacity_weight": math.inf}, "opacity_weight must be finite and not negative, got inf"),
        ({"sh_every": 0}, "sh_every and decay_steps must be at least 1, got 0 and None"),
        ({"decay_steps": 0}, "sh_every and decay_steps must be at least 1, got 1000 and 0"),
        ({"points_rate_scale": "colmap"}, "points_rate_scale must be absolute or scene, got 'colmap'"),
        ({"near_mode": "cut"}, "near_mode must be cull or clip, got 'cut'"),
        ({"model": torch.nn.Identity}, "model must be a convex_splat, got a Identity"),
        (
            {"model": {"name": "convex_splat", "num_convexes": 5}},
            "model must be without convexes, which come from the data, got 5; leave num_convexes out",
        ),
    ],
)
def test_arguments_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ConvexSplatting(**options)
    assert str(caught.value) == f"ConvexSplatting: {message}"


def test_rates_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="SplatRates: sh0 must be finite and not negative, got -1.0"):
        SplatRates(sh0=-1.0)
    with pytest.raises(ValueError, match="points_last must be positive, as the rate decays by a factor a step, got 0"):
        SplatRates(points_last=0.0)


def test_data_without_a_scene_is_refused() -> None:
    task = stub(ConvexSplatting(), world_size=1, precision="32-true", datamodule=None)
    with pytest.raises(DataError, match="the data must have a scene, as ProceduralScene and PlanarPicture have, got"):
        task.setup("fit")
    with pytest.raises(RunError, match="trains in one process, got 2; set trainer.devices to 1"):
        stub(ConvexSplatting(), world_size=2).setup("fit")
    with pytest.raises(RunError, match="scales no gradients, got precision 16-mixed; set trainer.precision to 32-true"):
        stub(ConvexSplatting(), world_size=1, precision="16-mixed").setup("fit")
    alone = stub(
        ConvexSplatting(points_rate_scale="scene"), world_size=1, precision="32-true", datamodule=tiny(views=1)
    )
    with pytest.raises(DataError, match="needs a scene with an extent, but its training cameras stand in one place"):
        alone.setup("fit")


def test_a_mistake_on_the_command_line_is_one_sentence(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=splat/boxes_cpu", "--model.model.k=9", "--trainer.fast_dev_run=true"])
    assert stop.value.code == 2
    assert "error: ConvexModel: k must lie in [3, 8], got 9; the paper takes 6\n" in capsys.readouterr().err


def test_rendering_has_the_background_of_the_scene() -> None:
    data = tiny(background="white")
    task = stub(ConvexSplatting(start=TOY), world_size=1, precision="32-true", datamodule=data)
    task.setup("fit")
    away = orbit(1, 1.0, 0.0, (50.0, 0.0, 0.0))
    rgb: Tensor = task._render(away, intrinsics(20.0, 8, 8)[None], 8, 8)["rgb"]
    assert torch.equal(rgb, torch.ones(1, 8, 8, 3))
    assert isinstance(task.model, ConvexModel)
