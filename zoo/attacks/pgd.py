"""Projected gradient ascent: the attack inside adversarial training, and the quick one of evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..errors import ComponentArgumentError
from ..registry import did_you_mean
from ..warn import warn_once
from .ball import Ball, Norm, Start, StepRule, Steps, check_radius
from .modes import Statistics, attacking, check_statistics
from .objectives import NEED_CLEAN_LOGITS, OBJECTIVES, Objective, ObjectiveFunction
from .scores import Scores, active_autocast, prepared


class Perturbation(NamedTuple):
    """What an attack found.

    Args:
        x_adv: [N, ...] attacked inputs, without a graph.
        logits_adv: [N, C] their scores during the attack.
        objective: [N] what the attack maximised.
    """

    x_adv: Tensor
    logits_adv: Tensor
    objective: Tensor


@dataclasses.dataclass
class PGDAttack:
    """Projected gradient ascent on an objective, within a ball around each input.

    `attack(model, x, y)` returns the attacked inputs. Every argument is an attribute and may be set later: a ramp sets
    `attack.eps`. Parameters, their gradients and each module's training flag are left as they are, running statistics
    too unless bn="train".

    Args:
        norm: "linf" or "l2".
        eps: radius, in the unit of x (8/255).
        steps: gradient steps (10).
        step_size: length of a step, in the unit of x; or
        step_ratio: the same as a fraction of eps, which follows a ramp of it. Without either 2.5 / steps, 2/255 here.
        step_rule: "sign" of the gradient, its "normalized" direction, or "adam". None: sign in linf, normalized in l2.
        step_decay: factors by the share of the steps from which on they count: {0.5: 0.1, 0.75: 0.01} makes steps a
            tenth in the second half, a thousandth in the last quarter.
        random_start: "uniform" in the ball, "gaussian" of deviation 0.001 (TRADES), or None, from x itself, where
            "score_difference" and "kl" have no gradient.
        restarts: runs; the one of the largest objective counts, sample by sample. They run one after another: joined
            to one batch they would share the statistics of bn="batch".
        objective: "score_difference", "ce", "kl", "margin", "dlr", or a function (logits, y, clean_logits) -> [N] to
            maximise, see :mod:`zoo.attacks.objectives`.
        bounds: of valid inputs, or None. x outside is refused.
        bn: how layers with running statistics normalise, see :func:`zoo.attacks.modes.attack_mode`: "eval" by those,
            "batch" by the batch if they are in training, without an update; "train" with one. Dropout is off but with
            "train".
        freeze: parameters require no gradients meanwhile, which saves the memory of what only they need.
        keep_best: the best of all points of a run, not its last; for evaluation.
        preprocess: called on each input before the model, for a normalisation that is not inside.
        autocast_dtype: dtype of an autocast around the model; None leaves the caller's. Scores, objective and steps are
            in float32 all the same.
        generator: source of the starting points, on any device; None for the global one.

    Shape:
        model: [N, ...] -> [N, C] scores, not probabilities.

    Raises:
        ValueError: if an argument is out of range or does not fit another; when called, also if x is outside the
            bounds, or y is no [N].
        RuntimeError: when called, if the model was made in inference mode.

    Source:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv:1706.06083. The
        presets name theirs.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(2, 1, 4, 4), torch.tensor([0, 2])
        >>> x_adv = zoo.attacks.PGDAttack(eps=0.1, steps=5)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    norm: Norm = "linf"
    _: dataclasses.KW_ONLY
    eps: float = 8 / 255
    steps: int = 10
    step_size: float | None = None
    step_ratio: float | None = None
    step_rule: StepRule | None = None
    step_decay: Mapping[float, float] | None = None
    random_start: Start | None = "uniform"
    restarts: int = 1
    objective: Objective | ObjectiveFunction = "score_difference"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    bn: Statistics = "batch"
    freeze: bool = True
    keep_best: bool = False
    preprocess: Callable[[Tensor], Tensor] | None = None
    autocast_dtype: torch.dtype | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self._check()

    # Presets

    @classmethod
    def adv_comp_sum(cls, **overrides: Any) -> PGDAttack:
        """The defaults: linf 8/255, 10 steps, uniform start, score differences (Awasthi et al., AISTATS 2023).

        Their text gives no step size.
        """
        return _overridden({}, overrides, "PGDAttack.adv_comp_sum")

    @classmethod
    def gowal_train(cls, **overrides: Any) -> PGDAttack:
        """10 Adam steps of 0.1, 0.01 from the sixth on, up the KL divergence (Gowal et al. 2020, arXiv:2010.03593)."""
        preset = {"step_rule": "adam", "step_size": 0.1, "step_decay": {0.5: 0.1}, "objective": "kl"}
        return _overridden(preset, overrides, "PGDAttack.gowal_train")

    @classmethod
    def gowal_eval(cls, **overrides: Any) -> PGDAttack:
        """Their PGD-40 on the margin, for evaluation: 40 Adam steps of 0.1, 0.01 from the 21st, 1e-4 from the 31st on.

        Running statistics, and the best point found where theirs takes the last: at least as strong.
        """
        preset = {
            "steps": 40,
            "step_rule": "adam",
            "step_size": 0.1,
            "step_decay": {0.5: 0.1, 0.75: 0.01},
            "objective": "margin",
            "bn": "eval",
            "keep_best": True,
        }
        return _overridden(preset, overrides, "PGDAttack.gowal_eval")

    @classmethod
    def trades(cls, **overrides: Any) -> PGDAttack:
        """10 steps of 0.003 up the KL divergence from x + 0.001 N(0, 1), in evaluation (TRADES' code, CIFAR-10)."""
        preset = {"step_size": 0.003, "random_start": "gaussian", "objective": "kl", "bn": "eval"}
        return _overridden(preset, overrides, "PGDAttack.trades")

    @classmethod
    def madry(cls, **overrides: Any) -> PGDAttack:
        """10 steps of 2/255 up the cross-entropy, uniform start (Madry et al., arXiv:1706.06083)."""
        return _overridden({"step_size": 2 / 255, "objective": "ce"}, overrides, "PGDAttack.madry")

    @classmethod
    def fgsm_rs(cls, **overrides: Any) -> PGDAttack:
        """One step of 1.25 eps up the cross-entropy, uniform start (Wong et al., "Fast is better than free", 2020)."""
        return _overridden({"steps": 1, "step_ratio": 1.25, "objective": "ce"}, overrides, "PGDAttack.fgsm_rs")

    @classmethod
    def l2(cls, **overrides: Any) -> PGDAttack:
        """l2 128/255, 10 steps of 15/255 along the gradient, up the score differences."""
        return _overridden({"norm": "l2", "eps": 128 / 255, "step_size": 15 / 255}, overrides, "PGDAttack.l2")

    # The attack

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor | None = None, *, clean_logits: Tensor | None = None
    ) -> Tensor:
        """Attacked inputs [N, ...], typed and laid out like x, without a graph.

        Args:
            model: [N, ...] -> [N, C] scores.
            x: [N, ...] inputs.
            y: [N] classes; "kl" needs none.
            clean_logits: [N, C] scores of x, if they are there already, in the mode of the attack; "score_difference",
                "kl" and functions need them.
        """
        return self._attack(model, x, y, clean_logits, scored=False)[0]

    def perturb(
        self, model: nn.Module, x: Tensor, y: Tensor | None = None, *, clean_logits: Tensor | None = None
    ) -> Perturbation:
        """The same with the scores and the objective it ended at: one more forward pass."""
        return Perturbation(*self._attack(model, x, y, clean_logits, scored=True))

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor | None, clean_logits: Tensor | None, scored: bool
    ) -> tuple[Tensor, Any, Any]:
        self._check()
        of = type(self).__name__
        if y is None and self.objective in ("score_difference", "ce", "margin", "dlr"):
            raise ValueError(f"{of}: the objective {self.objective!r} needs the classes y, got None")
        autocast_dtype = self.autocast_dtype or active_autocast(x.device)
        with attacking(model, self.bn, self.freeze, x.device, of) as inner:
            x, y, work = prepared(x, y, self.bounds, of)
            if not scored and (self.eps == 0 or x.numel() == 0):
                return x, None, None
            scored = scored or self.restarts > 1 or self.keep_best
            scores = Scores(inner, x.dtype, self.preprocess, autocast_dtype, of)
            if self.random_start == "gaussian" and autocast_dtype is not None:
                warn_once(
                    "PGDAttack: 0.001 off the input, where random_start='gaussian' starts, gradients under autocast are"
                    " mostly rounding; use random_start='uniform'",
                    UserWarning,
                )
            value = self._objective(scores, work, y, clean_logits)
            ball = Ball(work, self.eps, self.norm, self.bounds, self.generator)
            best: tuple[Tensor, Any, Any] | None = None
            for _ in range(self.restarts if self.eps else 1):
                found = self._run(scores, value, ball, scored)
                best = found if best is None else better(best, found)
            assert best is not None
            return best[0].to(x.dtype), best[1], best[2]

    def _objective(
        self, scores: Scores, work: Tensor, y: Tensor | None, clean_logits: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """The objective as a function of scores alone."""
        function = OBJECTIVES[self.objective] if isinstance(self.objective, str) else self.objective
        if callable(self.objective) or self.objective in NEED_CLEAN_LOGITS:
            if clean_logits is None:
                with torch.no_grad():
                    clean_logits = scores(work)
            else:
                clean_logits = scores.checked(clean_logits.detach().clone(), len(work))
        else:
            clean_logits = None

        def value(logits: Tensor) -> Tensor:
            values = function(logits, y, clean_logits)
            if values.shape != logits.shape[:1]:
                raise ValueError(
                    f"PGDAttack: the objective must return one number a sample, [{len(logits)}], got shape"
                    f" {tuple(values.shape)}; do not average over the batch"
                )
            return values

        return value

    def _run(
        self, scores: Scores, value: Callable[[Tensor], Tensor], ball: Ball, scored: bool
    ) -> tuple[Tensor, Any, Any]:
        """One run: the point it ends at, or the best with keep_best, and if `scored` its scores and objective."""
        steps = self.steps if ball.eps else 0
        point = ball.start(self.random_start if steps else None)
        rule = self.step_rule or ("sign" if self.norm == "linf" else "normalized")
        step = Steps(rule, ball, self._step_lengths())
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for _ in range(steps):
            point.requires_grad_()
            logits = scores(point)
            values = value(logits)
            (gradient,) = torch.autograd.grad(values.sum(), point)
            point = point.detach()
            if self.keep_best:
                here = (point, logits.detach(), values.detach())
                best = here if best is None else better(best, here)
            # a sample of NaN scores stays where it is
            point = ball.project(step(point, gradient.nan_to_num(0.0)))
        if not scored:
            return point, None, None
        with torch.no_grad():
            logits = scores(point)
            here = (point, logits, value(logits))
        return here if best is None else better(best, here)

    def _step_lengths(self) -> list[float]:
        ratio = 2.5 / self.steps if self.step_ratio is None else self.step_ratio
        lengths = [self.eps * ratio if self.step_size is None else self.step_size] * self.steps
        for share, factor in (self.step_decay or {}).items():
            for index in range(math.ceil(share * self.steps), self.steps):
                lengths[index] *= factor
        return lengths

    def _check(self) -> None:
        of = type(self).__name__
        for name, known in (
            ("norm", get_args(Norm)),
            ("step_rule", (*get_args(StepRule), None)),
            ("random_start", (*get_args(Start), None)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{of}: {name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}"
                )
        if not callable(self.objective) and self.objective not in OBJECTIVES:
            raise ValueError(
                f"{of}: objective must be one of {', '.join(OBJECTIVES)}, or a function, got {self.objective!r}"
            )
        check_statistics(self.bn, of)
        check_radius(self.eps, self.bounds, of)
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{of}: {name} must be at least 1, got {getattr(self, name)}")
        if self.step_size is not None and self.step_ratio is not None:
            raise ValueError(
                f"{of}: give step_size or step_ratio, not both, got {self.step_size} and {self.step_ratio}"
            )
        for name in ("step_size", "step_ratio"):
            given = getattr(self, name)
            if given is not None and not 0 < given < math.inf:
                raise ValueError(f"{of}: {name} must be positive and finite, got {given}")
        for share, factor in (self.step_decay or {}).items():
            if not (0 < share < 1 and 0 < factor < math.inf):
                raise ValueError(
                    f"{of}: step_decay maps shares of the steps in (0, 1) to positive factors, got {share}: {factor}"
                )
        if self.random_start is None and self.objective in NEED_CLEAN_LOGITS:
            raise ValueError(
                f"{of}: the objective {self.objective!r} has no gradient at x itself; expected random_start 'uniform'"
                " or 'gaussian', got None"
            )

    def __repr__(self) -> str:
        shown = [repr(self.norm), f"eps={self.eps:.4g}", f"steps={self.steps}"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("norm", "eps", "steps") and value != field.default:
                shown.append(f"{field.name}={f'{value:.4g}' if isinstance(value, float) else repr(value)}")
        return f"PGDAttack({', '.join(shown)})"


def better(best: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of two points (x, scores, objective), sample by sample the one of the larger objective; NaN is the smallest."""
    wins = (other[2] > best[2]) | (best[2].isnan() & ~other[2].isnan())
    x, logits, values = (
        torch.where(wins.view(-1, *(1,) * (new.ndim - 1)), new, old) for old, new in zip(best, other, strict=True)
    )
    return x, logits, values


_PRESETS = ("adv_comp_sum", "gowal_train", "gowal_eval", "trades", "madry", "fgsm_rs", "l2")


def _overridden(preset: Mapping[str, Any], overrides: Mapping[str, Any], of: str) -> PGDAttack:
    """An attack of the preset's arguments with others in their places; a step size replaces a ratio and vice versa."""
    known = [field.name for field in dataclasses.fields(PGDAttack)]
    for name in overrides:
        if name not in known:
            raise ComponentArgumentError(f"{of}: PGDAttack has no argument {name!r}.{did_you_mean(name, known)}")
    arguments = dict(preset)
    for name, other in (("step_size", "step_ratio"), ("step_ratio", "step_size")):
        if overrides.get(name) is not None:
            arguments.pop(other, None)
    arguments |= overrides
    if isinstance(arguments.get("bounds"), list):  # as YAML has it
        arguments["bounds"] = tuple(arguments["bounds"])
    return PGDAttack(**arguments)


def make_attack(spec: PGDAttack | Mapping[str, Any] | None, default: PGDAttack) -> PGDAttack:
    """An attack as a config gives it.

    Args:
        spec: an attack; or arguments of :class:`PGDAttack`, upon those of the preset of the key "preset" or else of the
            default: {"preset": "trades", "eps": 0.1, "steps": 5}; or None for the default.
        default: what there is otherwise.

    Returns:
        The attack, a new one unless an attack was given.

    Raises:
        TypeError: if `spec` is none of these.
        ComponentArgumentError: if there is no such preset or argument.
        ValueError: if an argument is out of range.

    Example:
        >>> zoo.attacks.make_attack({"preset": "fgsm_rs", "eps": 0.1}, zoo.attacks.PGDAttack())
        PGDAttack('linf', eps=0.1, steps=1, step_ratio=1.25, objective='ce')
    """
    if isinstance(spec, PGDAttack):
        return spec
    if spec is not None and not isinstance(spec, Mapping):
        raise TypeError(
            f"make_attack: expected a PGDAttack, a mapping of its arguments or None, got {type(spec).__name__}"
        )
    overrides = dict(spec or {})
    preset = overrides.pop("preset", None)
    if preset is None:
        arguments = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
        return _overridden(arguments, overrides, "make_attack")
    if preset not in _PRESETS:
        raise ComponentArgumentError(f"make_attack: preset must be one of {', '.join(_PRESETS)}, got {preset!r}")
    return getattr(PGDAttack, preset)(**overrides)
