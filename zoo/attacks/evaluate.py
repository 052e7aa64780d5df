"""Accuracy under attacks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .modes import attack_mode, unwrapped
from .objectives import is_correct
from .scores import Scores, active_autocast

_TAKEN = ("clean", "worst_case", "samples")


class Attack(Protocol):
    """(model, x, y) -> attacked inputs: :class:`PGDAttack`, :class:`APGDAttack`, or anything called like them."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, /) -> Tensor: ...


def robust_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | None = None,
    *,
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """The share of a batch that the model, in evaluation, classifies correctly both as it is and attacked.

    Args:
        model: [N, ...] -> [N, C] scores.
        x: [N, ...] inputs.
        y: [N] classes.
        attack: the attack; None for the accuracy without.
        preprocess: called on each input before the model; that of the attack.

    Returns:
        A number in [0, 1]; NaN of an empty batch.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(3, (8,))
        >>> robust = zoo.attacks.robust_accuracy(model, x, y, zoo.attacks.PGDAttack(eps=0.1))
        >>> robust <= zoo.attacks.robust_accuracy(model, x, y)
        True
    """
    attacks = {} if attack is None else {"attack": attack}
    found = evaluate_robustness(model, [(x, y)], attacks, preprocess=preprocess)
    return found["worst_case"]


def evaluate_robustness(
    model: nn.Module,
    loader: Iterable[Any],
    attacks: Mapping[str, Attack],
    max_samples: int | None = None,
    *,
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Accuracy of a model, in evaluation, without and under attacks in turn.

    Each attack gets the samples that all before it have left correct, so the figure under its name is what is robust
    against it and those before it, and the last one is the worst case.

    Args:
        model: [N, ...] -> [N, C] scores; moved nowhere, the batches go to its device.
        loader: batches (x, y, ...), or one after another in a list.
        attacks: by name, the cheap ones first.
        max_samples: only the first so many.
        preprocess: called on each input before the model; that of the attacks.

    Returns:
        {"clean": ..., a figure for each name..., "worst_case": ...}, in [0, 1] or NaN without samples, and "samples",
        how many there were: times that, figures are counts.

    Raises:
        ValueError: if an attack has a name of those three, or max_samples is below 1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
        >>> batches = [(torch.rand(8, 1, 4, 4), torch.randint(4, (8,)))]
        >>> list(zoo.attacks.evaluate_robustness(model, batches, zoo.attacks.mini_autoattack(0.1, steps=5)))
        ['clean', 'apgd-ce', 'apgd-t', 'worst_case', 'samples']
    """
    for name in _TAKEN:
        if name in attacks:
            raise ValueError(f"evaluate_robustness: {name!r} names a result already; give the attack another name")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"evaluate_robustness: max_samples must be at least 1 or None, got {max_samples}")
    inner = unwrapped(model)
    device = next((t.device for t in itertools.chain(inner.parameters(), inner.buffers())), None)
    left, samples = dict.fromkeys(("clean", *attacks), 0), 0
    with attack_mode(inner, "eval"), torch.no_grad():
        for batch in loader:
            x, y = batch[:2]
            if max_samples is not None:
                x, y = x[: max_samples - samples], y[: max_samples - samples]
            x, y = (t if device is None else t.to(device) for t in (x, y))
            samples += len(x)
            for name in left:
                x_adv = attacks[name](inner, x, y) if name != "clean" and len(x) else x
                scores = Scores(inner, x.dtype, preprocess, active_autocast(x.device), "evaluate_robustness")
                resists = is_correct(scores(x_adv), y)
                x, y = x[resists], y[resists]
                left[name] += len(x)
            if samples == max_samples:
                break
    report = {name: count / samples if samples else float("nan") for name, count in left.items()}
    return report | {"worst_case": report[list(report)[-1]], "samples": samples}
