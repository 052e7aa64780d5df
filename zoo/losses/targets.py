"""Targets for answers that cost something: weights for the soft-target path of `comp_sum_loss`.

All are one construction. An answer k that costs c_k in [0, 1] gets the weight q_k = 1 - c_k, and the loss is
sum_k q_k l(scores, k): the scores of cheap answers rise. Not all answers need be classes: not to answer, or to ask an
expert, is one more entry with its own cost.

The weights do not sum to 1, and "mean" divides by the number of elements, as for every target of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["abstention_targets", "cost_sensitive_targets", "deferral_targets"]


def cost_sensitive_targets(costs: Tensor, target: Tensor | None = None) -> Tensor:
    """1 - costs: of each answer, given the label.

    Args:
        costs: with target, [L, K] the cost in [0, 1] of answer k where the label is y, rows and columns as in a
            confusion matrix; without, [N, K, ...] the cost of each answer for each sample.
        target: labels in [0, L), [N] or [N, d1, ...], of any integer dtype.

    Returns:
        Weights [N, K, ...], of the dtype of costs. Costs of 0 for the label and 1 for all else give the one-hot target.

    Raises:
        ValueError: if a cost is out of range, or costs is no matrix where there is a target.
        TypeError: if target is no integer tensor, or costs no floating point.
        IndexError: if a label is out of range (on the CPU); the message names it.

    Shape:
        [L, K], [N, d1, ...] -> [N, K, d1, ...]; [N, K, ...] -> same.

    Source:
        Believed to be the cost-sensitive form of Mao, Mohri, Zhong for structured prediction (NeurIPS 2023) and sets
        of varying size (NeurIPS 2024, arXiv:2407.07140); not compared with their text.

    Example:
        >>> grades = torch.arange(3.0)
        >>> costs = (grades[:, None] - grades).abs() / 2  # a near miss costs half
        >>> cost_sensitive_targets(costs, torch.tensor([0, 1]))
        tensor([[1.0000, 0.5000, 0.0000],
                [0.5000, 1.0000, 0.5000]])
    """
    _check_costs(costs, "cost_sensitive_targets", "costs")
    if target is None:
        if costs.ndim < 2:
            raise ValueError(f"cost_sensitive_targets: costs must be [N, K, ...], got shape {tuple(costs.shape)}")
        return 1 - costs
    if costs.ndim != 2:
        raise ValueError(
            f"cost_sensitive_targets: with a target costs must be a matrix [labels, answers], got shape"
            f" {tuple(costs.shape)}; leave target out for costs of each sample"
        )
    target = _check_target(target, costs.shape[0], "cost_sensitive_targets")
    return (1 - costs)[target].movedim(-1, 1)


def abstention_targets(target: Tensor, num_classes: int, cost: float | Tensor) -> Tensor:
    """onehot(y) + (1 - cost) onehot(num_classes): one more answer, not to answer, which costs the same for every label.

    A model with num_classes + 1 scores abstains where the last is largest. The best scores do so where no class is more
    probable than 1 - cost.

    Args:
        target: classes in [0, num_classes), [N] or [N, d1, ...], of any integer dtype.
        num_classes: without the answer that is added.
        cost: in [0, 1], of not answering; a tensor is broadcast against target, for a cost of each sample.

    Returns:
        Weights [N, num_classes + 1, ...], of the dtype of cost if it is a tensor, else the default dtype. With cost 1
        the one-hot target with a column of zeros.

    Raises:
        ValueError: if num_classes or a cost is out of range, or cost does not broadcast to target.
        TypeError: if target is no integer tensor, or cost a tensor that is no floating point.
        IndexError: if a class is out of range (on the CPU); the message names it.

    Shape:
        [N, d1, ...] -> [N, num_classes + 1, d1, ...].

    Source:
        The cost of an answer written into the weights. Believed to be the surrogate of Mao, Mohri, Zhong for abstention
        by scores; not compared with their text.

    Example:
        >>> abstention_targets(torch.tensor([0, 2]), 3, cost=0.25)
        tensor([[1.0000, 0.0000, 0.0000, 0.7500],
                [0.0000, 0.0000, 1.0000, 0.7500]])
    """
    target = _check_target(target, _check_num_classes(num_classes, "abstention_targets"), "abstention_targets")
    if isinstance(cost, Tensor):
        costs = cost.to(target.device)
    else:
        costs = torch.tensor(cost, dtype=torch.get_default_dtype(), device=target.device)
    _check_costs(costs, "abstention_targets", "cost")
    try:
        costs = costs.expand(target.shape)
    except RuntimeError:
        raise ValueError(
            f"abstention_targets: cost {tuple(costs.shape)} does not broadcast to target {tuple(target.shape)};"
            " give one number, or one a sample"
        ) from None
    return _with_answers(target, num_classes, costs.unsqueeze(1))


def deferral_targets(target: Tensor, num_classes: int, expert_costs: Tensor) -> Tensor:
    """onehot(y) + sum_j (1 - c_j) onehot(num_classes + j): one more answer an expert, to defer to it.

    A model with num_classes + E scores defers to expert j where score num_classes + j is largest.

    Args:
        target: classes in [0, num_classes), [N] or [N, d1, ...], of any integer dtype.
        num_classes: without the answers that are added.
        expert_costs: [N, E] or [N, E, d1, ...], in [0, 1]: what asking expert j costs for the sample, as 1 where it is
            wrong and its fee where it is right.

    Returns:
        Weights [N, num_classes + E, ...], of the dtype of expert_costs. One expert whose cost is constant is
        :func:`abstention_targets`.

    Raises:
        ValueError: if num_classes or a cost is out of range, or expert_costs does not fit target.
        TypeError: if target is no integer tensor, or expert_costs no floating point.
        IndexError: if a class is out of range (on the CPU); the message names it.

    Shape:
        [N, d1, ...], [N, E, d1, ...] -> [N, num_classes + E, d1, ...].

    Source:
        The cost of an answer written into the weights. Believed to be the surrogate of Mao, Mohri, Zhong for deferral
        to several experts; not compared with their text.

    Example:
        >>> experts = torch.tensor([[1, 0], [2, 2]])  # what two experts say
        >>> labels = torch.tensor([1, 2])
        >>> costs = (experts != labels[:, None]).float().clamp(min=0.25)  # a fee of 1/4
        >>> deferral_targets(labels, 3, costs)
        tensor([[0.0000, 1.0000, 0.0000, 0.7500, 0.0000],
                [0.0000, 0.0000, 1.0000, 0.7500, 0.7500]])
    """
    target = _check_target(target, _check_num_classes(num_classes, "deferral_targets"), "deferral_targets")
    _check_costs(expert_costs, "deferral_targets", "expert_costs")
    if expert_costs.ndim != target.ndim + 1 or expert_costs.shape[:1] + expert_costs.shape[2:] != target.shape:
        raise ValueError(
            f"deferral_targets: target {tuple(target.shape)} needs expert_costs with the experts second,"
            f" {(target.shape[0], 'E', *target.shape[1:])}, got {tuple(expert_costs.shape)}"
        )
    return _with_answers(target, num_classes, expert_costs)


def _with_answers(target: Tensor, num_classes: int, costs: Tensor) -> Tensor:
    """One-hot classes, then 1 - costs [N, more, ...]."""
    classes = torch.arange(num_classes, device=target.device).view(-1, *[1] * (target.ndim - 1))
    return torch.cat([(classes == target.unsqueeze(1)).to(costs.dtype), 1 - costs], 1)


def _check_num_classes(num_classes: int, of: str) -> int:
    if num_classes < 1:
        raise ValueError(f"{of}: num_classes must be at least 1, got {num_classes}")
    return num_classes


def _check_target(target: Tensor, num_classes: int, of: str) -> Tensor:
    """The target as int64."""
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        raise TypeError(f"{of}: target must hold classes in an integer tensor, got {target.dtype}")
    if target.ndim == 0:
        raise ValueError(f"{of}: target must be [N] or [N, d1, ...], got a single class; give it a batch axis")
    target = target.long()
    if target.device.type == "cpu":  # elsewhere reading it would wait for the device
        wrong = (target < 0) | (target >= num_classes)
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            raise IndexError(
                f"{of}: target{place} is {int(target[tuple(place)])}, but there are {num_classes} classes;"
                " leave out the elements that have none"
            )
    return target


def _check_costs(costs: Tensor, of: str, name: str) -> None:
    if not costs.is_floating_point():
        raise TypeError(f"{of}: {name} must be floating point, got {costs.dtype}")
    if costs.device.type == "cpu" and not bool(((costs >= 0) & (costs <= 1)).all()):
        raise ValueError(
            f"{of}: {name} must lie in [0, 1], got values from {costs.min().item():.6g} to {costs.max().item():.6g};"
            " divide them by the largest"
        )
