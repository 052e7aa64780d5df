"""The state a model is in while it is attacked, and its return to what it was, module by module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

Statistics = Literal["eval", "batch", "train"]

STATISTICS = ("eval", "batch", "train")


def keeps_statistics(layer: nn.Module) -> bool:
    """Whether a layer keeps running statistics: BatchNorm, EvoNorm-B, and what other libraries make of them.

    Told by the buffers such a layer owns, so that those of no common base class count, too.
    """
    return any(layer._buffers.get(name) is not None for name in ("running_mean", "running_var"))


@contextlib.contextmanager
def untouched_statistics(model: nn.Module) -> Iterator[None]:
    """Let a model run as it is, in training, say, but leave its running statistics as they are.

    The layers that would update them work on copies meanwhile. Writing the old values back afterwards would destroy
    what a graph recorded inside keeps for its backward. Without such layers it costs nothing.

    Args:
        model: any module; layers in evaluation need no protection.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> with untouched_statistics(model):
        ...     loss = model(torch.rand(4, 2)).sum()
        >>> loss.backward()
        >>> model[1].num_batches_tracked
        tensor(0)
    """
    held: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    try:
        for layer in model.modules():
            if layer.training and keeps_statistics(layer):
                held.append((layer, dict(layer._buffers)))
                for name, buffer in held[-1][1].items():
                    layer._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for layer, buffers in held:
            layer._buffers.update(buffers)


@contextlib.contextmanager
def attack_mode(model: nn.Module, bn: Statistics) -> Iterator[None]:
    """Training flags and statistics for the time of an attack; each module gets its own flag back, whatever happens.

    Args:
        model: any module.
        bn: "eval", the whole model in evaluation; "batch", everything in evaluation but layers in training that keep
            running statistics: they normalise by the batch and leave those alone; "train", the model as it is, which
            updates them. A layer that is in evaluation already, as every one of a model under test or a frozen one of
            a model in training, stays there.

    Raises:
        ValueError: if `bn` is none of these.
    """
    check_statistics(bn, "attack_mode")
    if bn == "train":
        yield
        return
    flags = [(layer, layer.training) for layer in model.modules()]
    with untouched_statistics(model) if bn == "batch" else contextlib.nullcontext():
        try:
            # train() and eval() are not asked: models override them to keep parts frozen
            for layer, training in flags:
                layer.training = training and bn == "batch" and keeps_statistics(layer)
            yield
        finally:
            for layer, training in flags:
                layer.training = training


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient meanwhile, so that a backward to the input keeps nothing for them.

    A graph recorded before still reaches them afterwards.

    Args:
        model: any module.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel.

    Each pass through the wrapper sends rank 0's buffers to all: it would overwrite the others', and wait for ranks
    whose attacks are over.
    """
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextlib.contextmanager
def attacking(model: nn.Module, bn: Statistics, freeze: bool, device: torch.device, of: str) -> Iterator[nn.Module]:
    """Everything an attack needs around it, whoever calls it: gradients of the input in full precision.

    Args:
        model: the model, or a DistributedDataParallel of it.
        bn: see :func:`attack_mode`.
        freeze: see :func:`frozen`.
        device: whose autocast is suspended; forward passes turn it on themselves.
        of: who asks, for messages.

    Yields:
        The model to call.

    Raises:
        TypeError: if the model is no module.
        RuntimeError: if its parameters were made in inference mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{of}: the model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise RuntimeError(
            f"{of}: gradients cannot pass parameters made in inference mode; build or load the model outside"
            " torch.inference_mode()"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # turns gradients on, too, under no_grad
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(attack_mode(model, bn))
        if freeze:
            stack.enter_context(frozen(model))
        yield model


def check_statistics(bn: str, of: str) -> None:
    """Raises:
    ValueError: if `bn` is none of the three.
    """
    if bn not in STATISTICS:
        raise ValueError(f"{of}: bn must be one of {', '.join(STATISTICS)}, got {bn!r}")
