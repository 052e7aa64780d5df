"""Fit splatting primitives to pictures with known cameras."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam

from ..data.scenes import Scene
from ..errors import DataError, RunError
from ..losses.photometric import l1_dssim, ssim
from ..registry import factory
from ..spec import RendererSpec
from ..splat.convex.model import ConvexModel
from ..splat.convex.start import Start
from .splat_report import draw_comparison, draw_orbit

SHOWN = 4  # held-out views in the report
NOMINAL_EXTENT = 5.0  # of a scene in the units of COLMAP, for which the paper's learning rates were chosen


@dataclass(frozen=True)
class SplatRates:
    """Learning rates, one a parameter; 0 freezes it.

    Args:
        points: of the points, at the start (5e-4), in world units: not multiplied by the size of the scene.
        points_last: of the points at the end, reached log-linearly (5e-6).
        sh0: of the constant colour (2.5e-3).
        shN: of the other harmonics (1.25e-4).
        opacity_logit: 1e-2.
        log_delta: 5e-3.
        log_sigma: 4.5e-3.
        mask: 1e-2.

    Raises:
        ValueError: if one is negative.

    Source:
        Held et al. 2025, arXiv:2411.14974, supplement and authors' code, light profile.
    """

    points: float = 5e-4
    points_last: float = 5e-6
    sh0: float = 2.5e-3
    shN: float = 1.25e-4
    opacity_logit: float = 1e-2
    log_delta: float = 5e-3
    log_sigma: float = 4.5e-3
    mask: float = 1e-2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"SplatRates: {field.name} must be finite and not negative, got {value}")
        if self.points > 0 and self.points_last == 0:
            raise ValueError("SplatRates: points_last must be positive, as the rate decays by a factor a step, got 0")


_START, _RATES = Start(), SplatRates()


class ConvexSplatting(L.LightningModule):
    """Fit smooth convexes to pictures of a scene.

    The model starts from the points of the data's scene. One Adam a parameter, as strategies that change the number of
    primitives expect. Validation logs, as means over the held-out views, `val/psnr` in dB, `val/psnr_8bit` of pictures
    rounded to 8 bits, `val/ssim` (11 x 11 Gaussian window, zeros beyond the border), and `time/val_fps`.

    The report holds `renders.png`, truth, rendering and four times their difference for a few held-out views, and
    `orbit.gif`, a ride around the scene.

    Args:
        model: renderer to fit, without convexes: those come from the data.
        start: size, opacity, smoothness and sharpness of the convexes that are put at the points of the scene.
        rates: learning rates of the parameters.
        ssim_lambda: weight of 1 - SSIM beside 1 - ssim_lambda of the L1 distance (0.2).
        mask_weight: of the mean of sigmoid(mask) (0.0005).
        opacity_weight: of the mean opacity; not in the paper.
        size_weight: of the mean distance of a convex's points from their centre, in world units; not in the paper.
        sh_every: steps from one degree of the harmonics to the next (1000).
        decay_steps: steps over which the rate of the points decays; None for the length of the run.
        points_rate_scale: "absolute" as published, or "scene": times the scene's extent over 5, for data that is not in
            the units of COLMAP.
        scale_by_batch: adjust learning rates, betas and eps to the number of views in a batch, as gsplat does.
        near_mode: "cull" or "clip", see :func:`zoo.splat.rasterization_convex`.
        depth_grad: whether the depth that scales delta and sigma is differentiated.

    Shape:
        batch of image [B, H, W, 3], viewmat [B, 4, 4] and K [B, 3, 3] -> rgb [B, H, W, 3].

    Raises:
        ValueError: if an argument is out of range.
        RunError: if there is more than one process.
        DataError: if the data has no scene.

    Source:
        Held et al., 3D Convex Splatting, 2025, arXiv:2411.14974, section 3 and supplement.
    """

    def __init__(
        self,
        model: RendererSpec = "convex_splat",
        start: Start = _START,
        rates: SplatRates = _RATES,
        ssim_lambda: float = 0.2,
        mask_weight: float = 5e-4,
        opacity_weight: float = 0.0,
        size_weight: float = 0.0,
        sh_every: int = 1000,
        decay_steps: int | None = None,
        points_rate_scale: str = "absolute",
        scale_by_batch: bool = False,
        near_mode: str = "cull",
        depth_grad: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= ssim_lambda <= 1:
            raise ValueError(f"ConvexSplatting: ssim_lambda must lie in [0, 1], got {ssim_lambda}")
        weights = {"mask_weight": mask_weight, "opacity_weight": opacity_weight, "size_weight": size_weight}
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"ConvexSplatting: {name} must be finite and not negative, got {value}")
        if sh_every < 1 or (decay_steps is not None and decay_steps < 1):
            raise ValueError(
                f"ConvexSplatting: sh_every and decay_steps must be at least 1, got {sh_every} and {decay_steps}"
            )
        if points_rate_scale not in ("absolute", "scene"):
            raise ValueError(f"ConvexSplatting: points_rate_scale must be absolute or scene, got {points_rate_scale!r}")
        if near_mode not in ("cull", "clip"):
            raise ValueError(f"ConvexSplatting: near_mode must be cull or clip, got {near_mode!r}")
        self.save_hyperparameters(ignore=("start", "rates"))
        self.automatic_optimization = False
        made = factory("renderer", model)()
        if not isinstance(made, ConvexModel):
            raise ValueError(f"ConvexSplatting: model must be a convex_splat, got a {type(made).__name__}")
        if made.num_convexes:
            raise ValueError(
                f"ConvexSplatting: model must be without convexes, which come from the data, got {made.num_convexes};"
                " leave num_convexes out"
            )
        self.model = made
        self.start, self.rates = start, rates
        self.ssim_lambda, self.mask_weight = ssim_lambda, mask_weight
        self.opacity_weight, self.size_weight = opacity_weight, size_weight
        self.sh_every, self.decay_steps, self.points_rate_scale = sh_every, decay_steps, points_rate_scale
        self.scale_by_batch, self.near_mode, self.depth_grad = scale_by_batch, near_mode, depth_grad
        self._held_out: list[tuple[Tensor, Tensor]] = []

    # What is fitted

    @property
    def scene(self) -> Scene:
        """The scene of the data."""
        scene = getattr(getattr(self.trainer, "datamodule", None), "scene", None)
        if not isinstance(scene, Scene):
            raise DataError(
                "ConvexSplatting: the data must have a scene, as ProceduralScene and PlanarPicture have, got"
                f" {type(getattr(self.trainer, 'datamodule', None)).__name__}"
            )
        return scene

    def setup(self, stage: str) -> None:
        """Put convexes at the points of the scene, unless there are some; a checkpoint replaces them."""
        if self.trainer.world_size > 1:
            raise RunError(
                f"ConvexSplatting trains in one process, got {self.trainer.world_size}; set trainer.devices to 1"
            )
        if self.trainer.precision == "16-mixed":
            raise RunError(
                "ConvexSplatting renders in full precision and scales no gradients, got precision 16-mixed; set"
                " trainer.precision to 32-true"
            )
        scene = self.scene
        if self.points_rate_scale == "scene" and not scene.extent:
            raise DataError(
                "points_rate_scale: scene needs a scene with an extent, but its training cameras stand in one place;"
                " set it to absolute"
            )
        if self.model.num_convexes:
            return
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        try:
            self.model.initialise(scene.points, scene.colors, **asdict(self.start), generator=generator)
        except (TypeError, ValueError) as error:
            raise DataError(f"the points of the scene cannot be started from: {error}") from None
        if not self.model.reference_focal:
            self.model.fit_reference_focal(scene.Ks[list(scene.train)])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Any number of convexes may come, but of the same kind.

        Raises:
            RunError: if they have another number of points or of harmonics.
        """
        for name in ("points", "shN"):
            saved, own = checkpoint["state_dict"].get(f"model.{name}"), self.model.get_parameter(name)
            if isinstance(saved, Tensor) and saved.shape[1:] != own.shape[1:]:
                raise RunError(
                    f"the checkpoint's {name} are {list(saved.shape)}, those of this config {list(own.shape)}; give"
                    " model.k, model.sh_degree and model.planar as they were"
                )

    def forward(self, batch: dict[str, Tensor], render_mode: Any = "RGB") -> dict[str, Any]:
        """Render the views of a batch; see :class:`zoo.splat.ConvexModel`."""
        height, width = batch["image"].shape[1:3]
        return self._render(batch["viewmat"], batch["K"], width, height, render_mode)

    def _render(
        self, viewmats: Tensor, Ks: Tensor, width: int, height: int, render_mode: Any = "RGB"
    ) -> dict[str, Any]:
        behind = self.scene.background if self.model.background is None else None  # the model's own goes first
        viewmats, Ks = viewmats.to(self.model.points), Ks.to(self.model.points)
        backgrounds = None if behind is None else viewmats.new_tensor(behind).expand(len(viewmats), 3)
        return self.model(
            viewmats,
            Ks,
            width,
            height,
            backgrounds=backgrounds,
            render_mode=render_mode,
            near_mode=self.near_mode,
            depth_grad=self.depth_grad,
        )

    # Training

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        step = self.trainer.global_step
        if step and step % self.sh_every == 0:
            self.model.one_up_sh_degree()
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self._set_rates(optimizers, step)
        terms = self._loss(batch, self(batch)["rgb"])
        loss = torch.stack(list(terms.values())).sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        # Lightning counts the steps of its own optimizers, and this is one step: the others are stepped bare.
        for optimizer in optimizers[1:]:
            optimizer.optimizer.step()
        optimizers[0].step()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("convexes", float(self.model.num_convexes), prog_bar=True)
        if len(terms) > 1:
            self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})

    def _loss(self, batch: dict[str, Tensor], rgb: Tensor) -> dict[str, Tensor]:
        """The weighted terms."""
        image, share = batch["image"], self.ssim_lambda
        terms = {"photometric": l1_dssim(rgb, image, ssim_lambda=share) if share else F.l1_loss(rgb, image)}
        if self.mask_weight:
            terms["mask"] = self.mask_weight * self.model.mask.sigmoid().mean()
        if self.opacity_weight:
            terms["opacity"] = self.opacity_weight * self.model.opacity.mean()
        if self.size_weight:
            vertices = self.model.vertices
            arms = vertices - vertices.mean(1, keepdim=True)
            terms["size"] = self.size_weight * (arms.square().sum(-1) + 1e-12).sqrt().mean()
        return terms

    def configure_optimizers(self) -> list[Adam]:
        """One Adam for each parameter that has a rate, its name in the group."""
        views = getattr(getattr(self.trainer, "datamodule", None), "batch_size", 1) if self.scale_by_batch else 1
        made = []
        for name, parameter in self.model.named_parameters():
            rate = getattr(self.rates, name)
            parameter.requires_grad_(rate > 0)
            if rate > 0 and parameter.numel():
                group = {"params": [parameter], "name": name, "lr": rate * math.sqrt(views)}
                betas = (max(0.0, 1 - views * 0.1), max(0.0, 1 - views * 0.001))
                made.append(Adam([group], eps=1e-15 / math.sqrt(views), betas=betas, fused=True))
        if not made:
            raise RunError("ConvexSplatting: every rate is 0, so there is nothing to train; give one above 0")
        return made

    def _set_rates(self, optimizers: list[Any], step: int) -> None:
        for optimizer in optimizers:
            group = optimizer.param_groups[0]
            if group["name"] == "points":
                group["lr"] = self.points_rate(step)

    def points_rate(self, step: int) -> float:
        """Learning rate of the points at a step: from the first to the last, by the same factor every step."""
        length = self.decay_steps or int(self.trainer.estimated_stepping_batches)
        share = min(1.0, step / max(1, length))
        rate = math.exp((1 - share) * math.log(self.rates.points) + share * math.log(self.rates.points_last))
        if self.points_rate_scale == "scene":
            rate *= self.scene.extent / NOMINAL_EXTENT
        views = getattr(self.trainer.datamodule, "batch_size", 1) if self.scale_by_batch else 1  # type: ignore[attr-defined]
        return rate * math.sqrt(views)

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        self._held_out = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def on_test_epoch_start(self) -> None:
        self._held_out = []

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        image = batch["image"]
        begin = time.perf_counter()
        rgb = self(batch)["rgb"].clamp(0, 1)
        if rgb.is_cuda:
            torch.cuda.synchronize(rgb.device)
        fps = len(image) / max(1e-9, time.perf_counter() - begin)
        values = {
            "psnr": psnr(rgb, image),
            "psnr_8bit": psnr((rgb * 255).round() / 255, image),
            "ssim": ssim(rgb, image),
        }
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, batch_size=len(image))
        self.log(f"time/{stage}_fps", fps, batch_size=len(image))
        if len(self._held_out) < SHOWN:
            self._held_out.append((image[0].cpu(), rgb[0].detach().cpu()))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Pictures [B, H, W, 3] in [0, 1]."""
        return self(batch)["rgb"].clamp(0, 1)

    @torch.no_grad()
    def write_report(self, folder: Path) -> dict[str, Any]:
        """Held-out views beside their truth, a ride around the scene, and the number of convexes."""
        if self._held_out:
            truth, rendered = (torch.stack(parts) for parts in zip(*self._held_out, strict=True))
            draw_comparison(truth, rendered, folder / "renders.png")
        scene = self.scene
        if len(scene.train) >= 3:
            train = list(scene.train)
            height, width = scene.size(train[0])
            render = lambda viewmats, K: self._render(viewmats, K, width, height)["rgb"].clamp(0, 1)  # noqa: E731
            draw_orbit(render, scene.viewmats[train].to(self.device), scene.Ks[train[0]].to(self.device), folder)
        return {"convexes": self.model.num_convexes}


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Mean over pictures of the peak signal-to-noise ratio in dB of [B, H, W, 3] in [0, 1]."""
    error = (image - target).square().flatten(1).mean(1)
    return (-10 * error.clamp(min=1e-12).log10()).mean()
