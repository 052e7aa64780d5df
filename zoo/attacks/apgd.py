"""Auto-PGD: an attack of evaluation that finds its own step size, and the pair of them that small evaluations use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .ball import Ball, Norm, check_radius, unit
from .modes import Statistics, attacking, check_statistics
from .objectives import ce, dlr, dlr_targeted, is_correct
from .scores import Scores, active_autocast, prepared

Loss = Literal["ce", "dlr", "dlr_targeted"]

_MOMENTUM = 0.75  # section 3.1


@dataclasses.dataclass
class APGDAttack:
    """Projected ascent with momentum that, where it stops rising, halves its steps and returns to its best point.

    `attack(model, x, y)` returns the attacked inputs: a misclassified point where one was found, else the one of the
    largest loss. Samples that are misclassified as they are come back unchanged, and one that has been fooled costs
    nothing further.

    Args:
        norm: "linf" or "l2".
        eps: radius, in the unit of x (8/255).
        steps: gradient steps a run (100).
        restarts: runs, of "dlr_targeted" for each target class.
        loss: "ce"; "dlr", which does not vanish for confident models and needs 3 classes; or "dlr_targeted", towards
            each of the most likely wrong classes in turn, the strongest and slowest, which needs 4.
        n_target_classes: how many those are at most (9).
        rho: share of the steps that have to rise, or the step is halved (0.75).
        bounds: of valid inputs, or None. x outside is refused.
        bn: see :func:`zoo.attacks.modes.attack_mode`; the samples still attacked become fewer, so that a batch's
            statistics would change meanwhile.
        preprocess: called on each input before the model, for a normalisation that is not inside.
        autocast_dtype: dtype of an autocast around the model; None leaves the caller's.
        generator: source of the starting points, on any device; None for the global one.

    Shape:
        model: [N, ...] -> [N, C] scores, not probabilities.

    Raises:
        ValueError: if an argument is out of range; when called, also if x is outside the bounds, y is no [N], or the
            loss needs more classes.
        RuntimeError: when called, if the model was made in inference mode.

    Source:
        Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", ICML 2020, arXiv:2003.01690, algorithm 1. Starts are uniform in the ball.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(2, 1, 4, 4), torch.tensor([0, 2])
        >>> zoo.attacks.APGDAttack("l2", 0.5, steps=10)(model, x, y).shape
        torch.Size([2, 1, 4, 4])
    """

    norm: Norm = "linf"
    eps: float = 8 / 255
    steps: int = 100
    restarts: int = 1
    loss: Loss = "ce"
    _: dataclasses.KW_ONLY
    n_target_classes: int = 9
    rho: float = 0.75
    bounds: tuple[float, float] | None = (0.0, 1.0)
    bn: Statistics = "eval"
    preprocess: Callable[[Tensor], Tensor] | None = None
    autocast_dtype: torch.dtype | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self._check()

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Attacked inputs [N, ...], typed and laid out like x, without a graph.

        Args:
            model: [N, ...] -> [N, C] scores.
            x: [N, ...] inputs.
            y: [N] classes.
        """
        self._check()
        of = type(self).__name__
        if not isinstance(y, Tensor):
            raise ValueError(f"{of}: needs the classes y, got {type(y).__name__}")
        autocast_dtype = self.autocast_dtype or active_autocast(x.device)
        with attacking(model, self.bn, True, x.device, of) as inner:
            x, classes, work = prepared(x, y, self.bounds, of)
            assert classes is not None
            if self.eps == 0 or x.numel() == 0:
                return x
            scores = Scores(inner, x.dtype, self.preprocess, autocast_dtype, of)
            with torch.no_grad():
                clean = scores(work)
            resisting, x_adv = is_correct(clean, classes), work.clone()
            largest = work.new_full((len(work),), -math.inf)
            for target in self._targets(clean, classes) * self.restarts:
                left = resisting.nonzero().squeeze(1)  # host sync: once a run
                if len(left) == 0:
                    break
                ball = Ball(work[left], self.eps, self.norm, self.bounds, self.generator)
                of_left = None if target is None else target[left]
                found, loss, fooled = self._run(scores, ball, classes[left], of_left)
                better = fooled | (loss > largest[left])
                x_adv[left] = torch.where(_over(better, found), found, x_adv[left])
                largest[left] = torch.where(better, loss, largest[left])
                resisting[left[fooled]] = False
            return x_adv.to(x.dtype)

    def _targets(self, clean: Tensor, y: Tensor) -> list[Tensor | None]:
        """The classes to reach, one [N] a run: the most likely wrong ones, each sample's in its own order."""
        if self.loss != "dlr_targeted":
            return [None]
        others = clean.scatter(1, y.unsqueeze(1), -math.inf).argsort(1, descending=True)
        return list(others[:, : min(self.n_target_classes, clean.shape[1] - 1)].unbind(1))

    def _run(self, scores: Scores, ball: Ball, y: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One run: points, losses [N], and whether the point is misclassified; the best point where none is."""
        points, losses = ball.x.clone(), ball.x.new_full((len(ball.x),), -math.inf)
        fooled = torch.zeros(len(ball.x), dtype=torch.bool, device=ball.x.device)
        rows = torch.arange(len(ball.x), device=ball.x.device)  # of the samples in the climb
        point, fallback = ball.start("uniform"), unit(ball.noise())
        at = self._look(scores, point, y, target)
        climb = _Climb(point, *at, ball.eps, fallback, y, target)
        checkpoints, last = {*_checkpoints(self.steps), self.steps}, 0
        for index in range(1, self.steps + 1):
            ahead = climb.ahead(ball, first=index == 1)
            climb.move(ahead, *self._look(scores, ahead, climb.y, climb.target))
            if index not in checkpoints:
                continue
            points[rows] = torch.where(_over(climb.fooled, point), climb.hit, climb.best)
            losses[rows], fooled[rows] = climb.best_value, climb.fooled
            climb.halve_where(self.rho * (index - last))
            last = index
            left = (~climb.fooled).nonzero().squeeze(1)  # host sync: about ten times a run
            if len(left) == 0:
                break
            if len(left) < len(rows):
                rows, ball, climb = rows[left], ball.of(left), climb.of(left)
        return points, losses, fooled

    def _look(self, scores: Scores, point: Tensor, y: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient and misclassification of points, [N], [N, ...], [N]."""
        point = point.detach().requires_grad_()
        logits = scores(point)
        if target is not None:
            values = dlr_targeted(logits, y, target)
        else:
            values = (ce if self.loss == "ce" else dlr)(logits, y)
        (gradient,) = torch.autograd.grad(values.sum(), point)
        # else a NaN would become a point, and count as fooled
        return values.detach(), gradient.nan_to_num(0.0), ~is_correct(logits.detach(), y)

    def _check(self) -> None:
        of = type(self).__name__
        for name, known in (("norm", get_args(Norm)), ("loss", get_args(Loss))):
            if getattr(self, name) not in known:
                raise ValueError(f"{of}: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_statistics(self.bn, of)
        check_radius(self.eps, self.bounds, of)
        for name in ("steps", "restarts", "n_target_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{of}: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.rho < 1:
            raise ValueError(f"{of}: rho must lie in (0, 1), got {self.rho}")


class _Climb:
    """Where each sample of a run is, where it has been best, and how it got on since the last checkpoint."""

    def __init__(
        self,
        point: Tensor,
        value: Tensor,
        gradient: Tensor,
        fooled: Tensor,
        eps: float,
        fallback: Tensor,
        y: Tensor,
        target: Tensor | None,
    ) -> None:
        self.point, self.before, self.value, self.gradient = point, point, value, gradient
        self.best, self.best_gradient, self.best_value = point, gradient, value
        self.hit, self.fooled = point, fooled
        self.size = torch.full_like(value, 2 * eps)
        self.rises, self.halved, self.checked_value = torch.zeros_like(value), torch.zeros_like(fooled), self.best_value
        self.fallback, self.y, self.target = fallback, y, target

    def of(self, samples: Tensor) -> _Climb:
        """Some of the samples."""
        part = object.__new__(_Climb)
        part.__dict__ = {name: None if held is None else held[samples] for name, held in self.__dict__.items()}
        return part

    def ahead(self, ball: Ball, first: bool) -> Tensor:
        """The next point: a projected step, and but for the first some of the way that the last one went."""
        direction = self.gradient.sign() if ball.norm == "linf" else unit(self.gradient, self.fallback)
        target = ball.project(self.point + _over(self.size, self.point) * direction)
        if first:
            return target
        return ball.project(
            self.point + _MOMENTUM * (target - self.point) + (1 - _MOMENTUM) * (self.point - self.before)
        )

    def move(self, point: Tensor, value: Tensor, gradient: Tensor, wrong: Tensor) -> None:
        """Go there."""
        self.rises = self.rises + (value > self.value)
        self.before, self.point, self.value, self.gradient = self.point, point, value, gradient
        rose = value > self.best_value
        self.best = torch.where(_over(rose, point), point, self.best)
        self.best_gradient = torch.where(_over(rose, point), gradient, self.best_gradient)
        self.best_value = torch.where(rose, value, self.best_value)
        self.hit = torch.where(_over(wrong & ~self.fooled, point), point, self.hit)
        self.fooled = self.fooled | wrong

    def halve_where(self, enough: float) -> None:
        """At a checkpoint, conditions 1 and 2 of section 3.2: half the step, from the best point, where it got stuck.

        Args:
            enough: how many of the steps since the last one have to rise.
        """
        halve = (self.rises < enough) | (~self.halved & (self.best_value <= self.checked_value))
        self.size = torch.where(halve, self.size / 2, self.size)
        self.point = torch.where(_over(halve, self.point), self.best, self.point)
        self.gradient = torch.where(_over(halve, self.point), self.best_gradient, self.gradient)
        self.value = torch.where(halve, self.best_value, self.value)
        self.rises, self.halved, self.checked_value = torch.zeros_like(self.rises), halve, self.best_value


def _over(of_samples: Tensor, like: Tensor) -> Tensor:
    """[N] as something that multiplies [N, ...]."""
    return of_samples.view(-1, *(1,) * (like.ndim - 1))


def _checkpoints(steps: int) -> list[int]:
    """Steps after which progress is judged, section 3.2: shares 0.22, 0.41, ... of them, ever closer up to 0.06."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(share * steps - 1e-9) for share in shares[1:-1]]


def mini_autoattack(
    eps: float, norm: Norm = "linf", *, steps: int = 100, bounds: tuple[float, float] | None = (0.0, 1.0)
) -> dict[str, APGDAttack]:
    """APGD on the cross-entropy, then on the targeted DLR loss: the two of AutoAttack that find nearly all it finds.

    Args:
        eps: radius, in the unit of x.
        norm: "linf" or "l2".
        steps: of each run (100, AutoAttack's).
        bounds: of valid inputs, or None.

    Returns:
        {"apgd-ce": ..., "apgd-t": ...}, for :func:`zoo.attacks.evaluate_robustness`; apgd-t needs 4 classes.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Croce and Hein, ICML 2020, arXiv:2003.01690, section 5; their FAB and Square attacks are left out.

    Example:
        >>> list(zoo.attacks.mini_autoattack(8 / 255))
        ['apgd-ce', 'apgd-t']
    """
    return {
        "apgd-ce": APGDAttack(norm, eps, steps, bounds=bounds),
        "apgd-t": APGDAttack(norm, eps, steps, loss="dlr_targeted", bounds=bounds),
    }
