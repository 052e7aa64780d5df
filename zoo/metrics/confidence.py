"""A model's confidence in a class: how metrics run a model, and leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.modes import attack_mode, unwrapped
from ..explain.targets import default_output
from ..kernels.ops import compute_dtype
from ..warn import warn_once

Scores = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Confidence:
    """The logarithm of the probability a model gives a class.

    Args:
        scores: "softmax", one class an image; "sigmoid", each class of its own, for multi-label models.
        output_fn: finds the scores before the softmax, [B, C], in what the model returns; None takes a tensor as it
            is, else `["logits"]`, `["out"]`, `.logits` or the first of a tuple.
        chunk_size: images a forward pass.

    Raises:
        ValueError: if scores is neither of the two, or chunk_size is no whole number above 0.
        TypeError: if output_fn cannot be called.
    """

    scores: Scores = "softmax"
    output_fn: Callable[[Any], Tensor] | None = None
    chunk_size: int = 32

    def __post_init__(self) -> None:
        if self.scores not in ("softmax", "sigmoid"):
            raise ValueError(f"scores must be 'softmax' or 'sigmoid', got {self.scores!r}")
        if self.output_fn is not None and not callable(self.output_fn):
            raise TypeError(
                f"output_fn must be a function of the model's output or None, got {type(self.output_fn).__name__}"
            )
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"chunk_size must be a whole number of at least 1, got {self.chunk_size!r}")

    def __call__(
        self, model: nn.Module, targets: Tensor, versions: int, made: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """[B, V] log-probabilities of the targets on V versions of B images, made a chunk at a time.

        Args:
            model: in evaluation meanwhile, each module with its own flag afterwards.
            targets: [B] classes.
            versions: V.
            made: (images [n], versions [n]), indices, -> [n, C, H, W].

        Raises:
            TypeError, ValueError: if the model's output is no [n, C] with the targets in it.
        """
        rows = torch.arange(len(targets) * versions, device=targets.device)
        found = []
        with evaluated(model, targets.device) as model:
            for chunk in rows.split(self.chunk_size):
                if not len(chunk):  # splitting nothing gives one empty part
                    break
                images, which = chunk // versions, chunk % versions
                found.append(self._of(model(made(images, which)), targets[images]))
        # outside of inference mode, for callers that go on with the values
        return torch.cat(found).clone().view(-1, versions) if found else torch.empty(0, versions, device=targets.device)

    def _of(self, output: Any, targets: Tensor) -> Tensor:
        output = default_output(output) if self.output_fn is None else self.output_fn(output)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            got = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"the model must return floating-point scores [B, C], got {got}; give output_fn=")
        if output.ndim != 2 or len(output) != len(targets):
            raise ValueError(
                f"the model must return scores [{len(targets)}, C], got shape {list(output.shape)}; give output_fn="
            )
        classes = output.shape[1]
        if not bool(((targets >= 0) & (targets < classes)).all()):  # host sync: once a forward pass
            raise ValueError(
                f"targets must be classes from 0 to {classes - 1}, got {int(targets.min())} to {int(targets.max())};"
                " does the model have another head?"
            )
        output = output.to(compute_dtype(output.dtype))
        if self.scores == "sigmoid":
            return F.logsigmoid(output).gather(1, targets[:, None])[:, 0]
        if classes == 1:
            raise ValueError("the softmax of a single score is always 1; for a model of one class say scores='sigmoid'")
        if bool((output >= 0).all()) and bool(((output.sum(1) - 1).abs() < 1e-2).all()):
            warn_once(
                "the model seems to return probabilities; the metrics want the scores before the softmax, and apply it"
                " themselves",
                UserWarning,
            )
        return output.log_softmax(1).gather(1, targets[:, None])[:, 0]


@contextlib.contextmanager
def evaluated(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The model in evaluation and inference mode, then as it was.

    Raises:
        TypeError: if it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(attack_mode(model, "eval"))
        stack.enter_context(torch.inference_mode())
        if torch.is_autocast_enabled(device.type):
            # a weight cast here must not be remembered: training cannot use what inference mode made
            stack.enter_context(
                torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)
            )
        yield model
