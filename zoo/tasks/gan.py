"""A small class-conditional GAN whose layers are normalised by EvoNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from ..errors import DataError
from ..norms import ConditionalEvoNorm2d
from ..registry import factory
from ..spec import ActivationSpec, NormSpec
from .classify import ResidualBlock
from .optim import build, decay_groups

COLUMNS = 10  # generated pictures of a class in the report


class ConditionalGAN(L.LightningModule):
    """Generate pictures of a given class.

    The discriminator is penalised by the squared gradient of its score at real pictures (R1), which makes it
    differentiate its normalisation twice. A step is one update of the discriminator, then one of the generator; the
    generator that is evaluated is an exponential moving average.

    Validation logs `val/swd`, the sliced Wasserstein distance between generated and held-out pictures, class by class,
    and `val/swd_real`, the same between two halves of the held-out ones: what a perfect generator would get.

    Args:
        num_classes: number of classes.
        size: height and width in pixels, a multiple of 4.
        latent: length of the noise vector.
        width: channels of the stage of full resolution; the others have twice and four times as many.
        variant: EvoNorm of the generator, e.g. "s0".
        groups: groups of channels of that EvoNorm.
        norm: normalisation of the discriminator, of each picture alone; None for none.
        act: activation of the discriminator; `torch.nn.Identity` beside an EvoNorm.
        loss: "non_saturating" logistic loss, or "hinge".
        r1_gamma: weight of the penalty, r1_gamma / 2 E|grad D(x)|^2; 0 for none.
        r1_every: steps between two penalties, each weighing so much more.
        ema_decay: of the moving average, a step.
        optimizer: optimizer of the generator, given parameter groups; see :func:`zoo.tasks.optim.decay_groups`.
        discriminator_optimizer: optimizer of the discriminator, likewise.

    Shape:
        [B, latent] noise and [B] classes -> [B, 3, size, size] pictures in [0, 1].

    Raises:
        ValueError: if an argument is out of range, or `norm` mixes the pictures of a batch.

    Source:
        Blocks and conditioning after Brock et al., BigGAN, 2019, arXiv:1809.11096; projection after Miyato and Koyama,
        2018, arXiv:1802.05637; R1 after Mescheder et al., 2018, arXiv:1801.04406, eq. 9; every few steps after Karras
        et al., StyleGAN2, 2020, arXiv:1912.04958, app. B.
    """

    def __init__(
        self,
        num_classes: int = 6,
        size: int = 16,
        latent: int = 32,
        width: int = 32,
        variant: Literal["b0", "b1", "b2", "s0", "s1", "s2"] = "s0",
        groups: int = 8,
        norm: NormSpec | None = "evonorm_s0",
        act: ActivationSpec = "torch.nn.Identity",
        loss: Literal["non_saturating", "hinge"] = "non_saturating",
        r1_gamma: float = 1.0,
        r1_every: int = 4,
        ema_decay: float = 0.99,
        optimizer: OptimizerCallable = torch.optim.Adam,
        discriminator_optimizer: OptimizerCallable = torch.optim.Adam,
    ) -> None:
        super().__init__()
        if size < 8 or size % 4:
            raise ValueError(f"ConditionalGAN: size must be a multiple of 4 from 8 on, got {size}")
        least = {"num_classes": num_classes, "latent": latent, "width": width, "r1_every": r1_every}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"ConditionalGAN: {name} must be at least 1, got {value}")
        if r1_gamma < 0:
            raise ValueError(f"ConditionalGAN: r1_gamma must not be negative, got {r1_gamma}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ConditionalGAN: ema_decay must lie in [0, 1), got {ema_decay}")
        if loss not in ("non_saturating", "hinge"):
            raise ValueError(f"ConditionalGAN: loss must be non_saturating or hinge, got {loss!r}")
        self.save_hyperparameters(ignore=("optimizer", "discriminator_optimizer"))
        self.automatic_optimization = False
        self.optimizer, self.discriminator_optimizer = optimizer, discriminator_optimizer
        self.num_classes, self.size, self.latent, self.loss = num_classes, size, latent, loss
        self.r1_gamma, self.r1_every, self.ema_decay = r1_gamma, r1_every, ema_decay

        self.generator = Generator(num_classes, size, latent, width, variant, groups)
        make_norm = _no_norm if norm is None else factory("norm", norm)
        self.discriminator = Discriminator(num_classes, width, factory("activation", act), make_norm)
        if any(getattr(part, "running_var", None) is not None for part in self.discriminator.modules()):
            raise ValueError(
                "ConditionalGAN: norm must take statistics of each picture alone, e.g. evonorm_s0, as the penalty is on"
                f" the gradient of one picture's score; got {norm!r}"
            )
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        # Logged between two penalties, too: it is in the state, so that a resumed run logs what the whole one did.
        self.register_buffer("last_penalty", torch.zeros(()))
        self.last_penalty: Tensor
        self._held_out: list[tuple[Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        for name, ours in (("num_classes", self.num_classes), ("size", self.size)):
            found = getattr(data, name, ours)
            if found != ours:
                raise DataError(
                    f"the data has {name} {found}, the model {ours}; give model.{name} and data.{name} the same value"
                )

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        return (self.average(noise, classes) + 1) / 2

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, classes = batch[0] * 2 - 1, batch[1]
        step = self.trainer.global_step
        generator_steps, discriminator_steps = self.optimizers()  # type: ignore[misc]

        with torch.no_grad():
            fake = self.generator(self._noise(len(real)), classes)
        penalised = self.r1_gamma > 0 and step % self.r1_every == 0
        real.requires_grad_(penalised)
        score = self.discriminator(real, classes)
        d_loss = self._discriminator_loss(score, self.discriminator(fake, classes))
        total = d_loss
        if penalised:
            penalty = r1_penalty(score, real)
            total = d_loss + self.r1_gamma / 2 * self.r1_every * penalty
            self.last_penalty.copy_(penalty.detach())
        discriminator_steps.zero_grad()
        self.manual_backward(total)
        # The bare optimizer: Lightning counts the steps of its own, and this run counts one a batch.
        discriminator_steps.optimizer.step()

        self.toggle_optimizer(generator_steps)
        score = self.discriminator(self.generator(self._noise(len(real)), classes), classes)
        g_loss = F.softplus(-score).mean() if self.loss == "non_saturating" else -score.mean()
        generator_steps.zero_grad()
        self.manual_backward(g_loss)
        generator_steps.step()
        self.untoggle_optimizer(generator_steps)
        self._update_average()
        self.log_dict({"g/loss": g_loss, "d/loss": d_loss}, prog_bar=True)
        if self.r1_gamma:
            self.log("d/r1", self.last_penalty)

    def on_validation_epoch_start(self) -> None:
        self._held_out = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._held_out.append((batch[0], batch[1]))

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        found, floor = self._distances()
        self.log_dict({"val/swd": found, "val/swd_real": floor}, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A picture of the class of every picture of the batch."""
        return self.sample(batch[1], seed=batch_idx)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            build("optimizer", self.optimizer, decay_groups(self.generator)),
            build("discriminator_optimizer", self.discriminator_optimizer, decay_groups(self.discriminator)),
        ]

    @torch.no_grad()
    def sample(self, classes: Tensor, seed: int = 0) -> Tensor:
        """Pictures in [0, 1] of the given classes, with a generator of its own so that training draws are not moved.

        Args:
            classes: int64 [B].
            seed: seed of the noise.

        Returns:
            [B, 3, size, size] pictures of the averaged generator.
        """
        noise = torch.randn(len(classes), self.latent, generator=torch.Generator().manual_seed(seed))
        was_training = self.average.training
        self.average.eval()
        pictures = self(noise.to(self.device), classes.to(self.device))
        self.average.train(was_training)
        return pictures

    def write_report(self, folder: Path) -> dict[str, Any]:
        """Generated pictures, a row a class, with held-out ones of the last validation beside them."""
        generated = self.sample(torch.arange(self.num_classes).repeat_interleave(COLUMNS))
        rows = list(generated.unflatten(0, (-1, COLUMNS)).cpu())
        real = [pictures[: COLUMNS // 2].cpu() for pictures in self._by_class()] if self._held_out else []
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        draw_samples(rows, real, list(names or map(str, range(self.num_classes))), folder / "samples.png")
        return {}

    def _noise(self, count: int) -> Tensor:
        return torch.randn(count, self.latent, device=self.device)

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        if self.loss == "hinge":
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    @torch.no_grad()
    def _update_average(self) -> None:
        for slow, fast in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.ema_decay)
        for slow, fast in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            slow.copy_(fast)

    def _by_class(self) -> list[Tensor]:
        pictures, classes = (torch.cat(parts) for parts in zip(*self._held_out, strict=True))
        return [pictures[classes == k] for k in range(self.num_classes)]

    def _distances(self) -> tuple[Tensor, Tensor]:
        """Means over the classes: generated to held-out pictures, and held-out ones to each other."""
        found = []
        for k, pictures in enumerate(self._by_class()):
            half = len(pictures) // 2
            if half:  # a class may be missing in a short validation
                generated = self.sample(torch.full((half,), k), seed=k)
                one, other = pictures[:half], pictures[half : 2 * half]
                found.append(torch.stack([sliced_wasserstein(one, generated), sliced_wasserstein(one, other)]))
        if not found:
            raise DataError("val/swd needs two held-out pictures of a class; validate on more")
        ours, floor = torch.stack(found).mean(0)
        return ours, floor


class Generator(nn.Module):
    """Noise and class to a picture in [-1, 1]: a linear map to a quarter of the size, two upsampling blocks.

    Args:
        num_classes: number of classes.
        size: height and width, a multiple of 4.
        latent: length of the noise.
        width: channels at full resolution.
        variant, groups: of the conditional EvoNorm.
    """

    def __init__(self, num_classes: int, size: int, latent: int, width: int, variant: Any, groups: int) -> None:
        super().__init__()
        cond_dim = 2 * latent  # the noise conditions every block, too, as in BigGAN
        self.start = size // 4
        self.embed = nn.Embedding(num_classes, latent)
        self.first = nn.Linear(cond_dim, 4 * width * self.start**2)
        self.blocks = nn.ModuleList(
            UpBlock(before, after, cond_dim, variant, groups)
            for before, after in ((4 * width, 2 * width), (2 * width, width))
        )
        self.norm = ConditionalEvoNorm2d(width, cond_dim, variant, groups=groups)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        cond = torch.cat([noise, self.embed(classes)], 1)  # [B, 2 latent]
        x = self.first(cond).unflatten(1, (-1, self.start, self.start))
        for block in self.blocks:
            x = block(x, cond)
        return self.last(self.norm(x, cond)).tanh()


class UpBlock(nn.Module):
    """shortcut(up(x)) + conv(norm(conv(up(norm(x))))), the norms with their activation and the condition."""

    def __init__(self, before: int, after: int, cond_dim: int, variant: Any, groups: int) -> None:
        super().__init__()
        self.norm1 = ConditionalEvoNorm2d(before, cond_dim, variant, groups=groups)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = ConditionalEvoNorm2d(after, cond_dim, variant, groups=groups)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        branch = self.conv1(F.interpolate(self.norm1(x, cond), scale_factor=2))
        # the shortcut is linear in a pixel: before the upsampling it costs a quarter
        return F.interpolate(self.shortcut(x), scale_factor=2) + self.conv2(self.norm2(branch, cond))


class Discriminator(nn.Module):
    """Picture in [-1, 1] and class to a score, by projection on the class.

    Args:
        num_classes: number of classes.
        width: channels at full resolution.
        act: makes an activation, called without arguments.
        norm: makes a normalisation, called with the number of channels.
    """

    def __init__(
        self, num_classes: int, width: int, act: Callable[..., nn.Module], norm: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            ResidualBlock(width, 2 * width, 2, act, norm),
            ResidualBlock(2 * width, 4 * width, 2, act, norm),
            norm(4 * width),
            act(),
        )
        self.score = nn.Linear(4 * width, 1)
        self.embed = nn.Embedding(num_classes, 4 * width)
        nn.init.normal_(self.embed.weight, std=(4 * width) ** -0.5)

    def forward(self, pictures: Tensor, classes: Tensor) -> Tensor:
        features = self.trunk(pictures).mean((2, 3))
        return self.score(features)[:, 0] + (features * self.embed(classes)).sum(1)  # [B]


def r1_penalty(score: Tensor, pictures: Tensor) -> Tensor:
    """Mean over the batch of the squared norm of the score's gradient for its picture, differentiable.

    Args:
        score: [B], each of its own picture alone.
        pictures: [B, ...] what it was computed from, requiring gradients.

    Source:
        Mescheder et al., Which Training Methods for GANs do actually Converge?, 2018, arXiv:1801.04406, eq. 9 without
        the factor gamma / 2.
    """
    (gradient,) = torch.autograd.grad(score.sum(), pictures, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def sliced_wasserstein(real: Tensor, fake: Tensor, directions: int = 128, patch: int = 7) -> Tensor:
    """Distance between two sets of pictures: the mean, over directions, between their sorted projections.

    Half of it is of whole pictures at half the size (what is where), half of patches of what that leaves out (edges).
    Both are scaled by the deviation of the real ones.

    Args:
        real: [N, 3, H, W].
        fake: [N, 3, H, W], as many.
        directions: random directions, the same in every call.
        patch: side of a patch.

    Returns:
        Scalar, 0 for equal sets.

    Source:
        Laplacian patches after Karras et al., Progressive Growing, 2018, arXiv:1710.10196, sec. 5; whole pictures ours.
    """
    found = []
    for a, b in zip(_descriptors(real, patch), _descriptors(fake, patch), strict=True):
        scale = a.std().clamp(min=1e-6)
        generator = torch.Generator().manual_seed(0)
        onto = F.normalize(torch.randn(a.shape[1], directions, generator=generator), dim=0).to(a)
        found.append(((a @ onto).sort(0).values - (b @ onto).sort(0).values).abs().mean() / scale)
    return torch.stack(found).mean()


def _descriptors(pictures: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    small = F.avg_pool2d(pictures, 2)
    detail = pictures - F.interpolate(small, scale_factor=2, mode="bilinear")
    patches = F.unfold(detail, patch, stride=patch // 2)  # [N, 3 patch^2, L]
    return small.flatten(1), patches.transpose(1, 2).flatten(0, 1)


def draw_samples(generated: Sequence[Tensor], real: Sequence[Tensor], names: Sequence[str], path: Path) -> None:
    """A row a class: generated pictures [K, 3, H, W], then held-out ones."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    blocks = [("generated", generated)] + ([("held out", real)] if real else [])
    widths = [max(map(len, rows)) for _, rows in blocks]
    figure = Figure(figsize=(1.2 + 0.5 * sum(widths), 0.6 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(blocks), squeeze=False, width_ratios=widths)[0]
    for axis, (title, rows), width in zip(axes, blocks, widths, strict=True):
        size = rows[0].shape[-1]
        sheet = torch.ones(len(rows), width, 3, size + 2, size + 2)
        for k, pictures in enumerate(rows):
            sheet[k, : len(pictures), :, 1:-1, 1:-1] = pictures
        axis.imshow(sheet.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy(), interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
    axes[0].set_yticks([(k + 0.5) * (generated[0].shape[-1] + 2) for k in range(len(names))], names)
    figure.savefig(path, dpi=120)


def _no_norm(channels: int) -> nn.Module:
    return nn.Identity()
