"""Losses of adversarial training: smooth adversarial comp-sum and PSAL, and TRADES and PGD-AT to compare with.

The functions take scores that are there already; the modules run the attack themselves. A module is called as
`loss(model, x, y)` in the place of `loss(model(x), y)`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import PGDAttack, make_attack
from ..attacks.modes import untouched_statistics
from ..kernels.ops import compute_dtype
from .comp_sum.functional import Aux, Reduction, check_aux, check_reduction, comp_sum_loss, reduce
from .comp_sum.modules import TunableLoss

Attack = PGDAttack | Mapping[str, Any] | None
Statistics = Literal["adversarial", "clean", "both"]


def score_difference_norm(input_adv: Tensor, input: Tensor, target: Tensor, *, squared: bool = False) -> Tensor:
    """norm(D(x') - D(x)), D_j = z_y - z_j over j != y: how far an attack moves the target's lead over the others.

    Args:
        input_adv: [N, C, ...] scores of the attacked inputs.
        input: same shape, scores of the clean ones. Gradients flow to both.
        target: classes [N, ...], of any integer dtype.
        squared: the square instead; its slope vanishes with the difference, the norm's does not.

    Returns:
        [N, ...], float64 for float64 scores, else float32. Where both scores agree the norm has gradient 0.

    Raises:
        ValueError: if the shapes do not fit.

    Source:
        Awasthi, Mao, Mohri, Zhong, "Theoretically Grounded Loss Functions and Algorithms for Adversarial Robustness",
        AISTATS 2023, PMLR 206.

    Example:
        >>> clean, attacked = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
        >>> score_difference_norm(attacked, clean, torch.tensor([0]), squared=True)
        tensor([10.])
    """
    if input_adv.shape != input.shape or input.ndim < 2 or target.shape != input.shape[:1] + input.shape[2:]:
        raise ValueError(
            "score_difference_norm: both scores must be [N, C, ...] and target [N, ...], got"
            f" {tuple(input_adv.shape)}, {tuple(input.shape)} and {tuple(target.shape)}"
        )
    dtype = compute_dtype(input.dtype)
    moved = input_adv.to(dtype) - input.to(dtype)
    # not expanded into sums of squares, which would cancel; entry y is exactly 0
    square = (moved.gather(1, target.long().unsqueeze(1)) - moved).square().sum(1)
    if squared:
        return square
    still = square == 0
    return torch.where(still, 0, torch.where(still, 1, square).sqrt())


def smooth_adversarial_comp_sum_loss(
    input: Tensor,
    input_adv: Tensor,
    target: Tensor,
    *,
    tau: float | Tensor = 1.0,
    rho: float = 1.0,
    nu: float = 1.0,
    squared: bool = False,
    aux: Aux = "exp",
    reduction: Reduction = "mean",
) -> Tensor:
    """comp_sum_loss(z / rho, y, tau) + nu norm(D(x') - D(x)), given the scores z of x and z' of x'; no attack inside.

    It bounds the adversarial comp-sum loss with the rho-margin from above where nu >= sqrt(C - 1) / rho. The default,
    nu = 1, is below that: the paper's experiments use it, the guarantee does not cover it.

    With scores measured in units of rho only one number is left, the strength: nu rho^2 where squared, else nu rho.

    Args:
        input: [N, C, ...] scores of the clean inputs.
        input_adv: same shape, scores of the attacked ones. Gradients flow to both.
        target: classes [N, ...], of any integer dtype.
        tau: member of the comp-sum family (1, cross-entropy).
        rho: > 0, scale of the score differences in the first term (1 on CIFAR-10, 0.3 on CIFAR-100).
        nu: >= 0, weight of the second (1 on CIFAR-10, 6 on CIFAR-100).
        squared: square the norm, as the paper's experiments do. The plain norm with nu = 1 can make all scores equal
            early in training.
        aux: "exp", or "rho_logistic" (PSAL on CIFAR-10 and SVHN).
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or [N, ...]; float64 for float64 scores, else float32.

    Raises:
        ValueError: if shapes or options do not fit.

    Source:
        Awasthi et al., AISTATS 2023, PMLR 206 (tau = 0); Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288.

    Example:
        >>> scores = torch.zeros(2, 4)
        >>> smooth_adversarial_comp_sum_loss(scores, scores, torch.tensor([0, 1]))
        tensor(1.3863)
    """
    check_reduction(reduction, "smooth_adversarial_comp_sum_loss")
    check_nu(nu, "smooth_adversarial_comp_sum_loss")
    loss = comp_sum_loss(input, target, tau, aux=aux, rho=rho, reduction="none")
    loss = loss + nu * score_difference_norm(input_adv, input, target, squared=squared)
    return reduce(loss, loss.numel(), reduction)


def check_nu(nu: float, of: str) -> float:
    """nu as a float.

    Raises:
        ValueError: if it is negative, NaN or infinite.
    """
    if not 0 <= nu < math.inf:
        raise ValueError(f"{of}: nu must be finite and not negative, got {nu}")
    return float(nu)


class AdvLossOutput(NamedTuple):
    """What a loss of adversarial training returns.

    Args:
        loss: to be minimised; clean_loss + weight * penalty.
        clean_loss: its first term. Of PGD-AT the loss itself, taken where the attack ended.
        penalty: its second term before the weight, a mean or sum as asked for; 0 for PGD-AT.
        logits: [N, C] scores of the clean inputs, with their graph; None for PGD-AT, which does not need them.
        logits_adv: [N, C] scores of the attacked inputs, with their graph.
        x_adv: the attacked inputs.
    """

    loss: Tensor
    clean_loss: Tensor
    penalty: Tensor
    logits: Tensor | None
    logits_adv: Tensor
    x_adv: Tensor


def _updating(model: nn.Module, updates: bool) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if updates else untouched_statistics(model)


class SmoothAdversarialCompSumLoss(TunableLoss):
    """Comp-sum loss of clean inputs plus nu times how far an attack moves their score differences.

    `loss(model, x, y)` takes the clean scores, attacks x with them, scores what the attack found and returns an
    :class:`AdvLossOutput`. The model is called twice and the attack's steps more.

    Args:
        attack: :class:`zoo.attacks.PGDAttack`, or its arguments as a mapping ({"eps": 0.1, "steps": 5}), or None for
            :meth:`zoo.attacks.PGDAttack.adv_comp_sum`: linf 8/255, 10 steps, uniform start.
        tau: >= 0, member of the comp-sum family (1). `loss.tau = 0.5` changes it later; checkpoints hold it.
        rho: > 0, scale of the score differences in the first term.
        nu: >= 0, weight of the second; may be set later. Only the strength matters beside tau: nu rho^2 where squared,
            else nu rho. The paper's is 1 on CIFAR-10; small networks want less.
        squared: square the norm, as the paper's experiments do; False is its definition.
        aux: "exp", "rho_logistic" or "rho_margin", of the first term.
        statistics: whose pass updates the running statistics of normalisations in training: "adversarial" as Gowal et
            al. 2020 (default), "clean", or "both".
        reduction: "mean", "sum" or "none".

    Shape:
        x [N, ...], y [N] -> :class:`AdvLossOutput`; `model(x)` is [N, C].

    Raises:
        ValueError: if an argument is out of range, or x outside the attack's bounds.

    Source:
        Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288; Awasthi, Mao, Mohri, Zhong, AISTATS 2023, PMLR 206.

    Example:
        >>> model, loss = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)), zoo.AdvCompSumLoss()
        >>> out = loss(model, torch.rand(2, 1, 4, 4), torch.tensor([0, 2]))
        >>> out.loss.backward()
    """

    def __init__(
        self,
        attack: Attack = None,
        *,
        tau: float = 1.0,
        rho: float = 1.0,
        nu: float = 1.0,
        squared: bool = False,
        aux: Aux = "exp",
        statistics: Statistics = "adversarial",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(tau)
        name = type(self).__name__
        check_aux(aux, rho, name)
        check_reduction(reduction, name)
        if statistics not in ("adversarial", "clean", "both"):
            raise ValueError(f"{name}: statistics must be 'adversarial', 'clean' or 'both', got {statistics!r}")
        self.attack = make_attack(attack, PGDAttack.adv_comp_sum())
        self.rho, self.nu, self.squared, self.aux = rho, check_nu(nu, name), squared, aux
        self.statistics, self.reduction = statistics, reduction

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, *, clean_logits: Tensor | None = None) -> AdvLossOutput:
        if clean_logits is None:
            with _updating(model, self.statistics != "adversarial"):
                clean_logits = model(x)
        # those of a model in training are the attack's own where that normalises by the batch too
        same = not model.training or self.attack.bn != "eval"
        x_adv = self.attack(model, x, y, clean_logits=clean_logits.detach() if same else None)
        with _updating(model, self.statistics != "clean"):
            logits_adv = model(x_adv)
        clean = comp_sum_loss(clean_logits, y, self.tau, aux=self.aux, rho=self.rho, reduction="none")
        penalty = score_difference_norm(logits_adv, clean_logits, y, squared=self.squared)
        clean, penalty = (reduce(term, term.numel(), self.reduction) for term in (clean, penalty))
        return AdvLossOutput(clean + self.nu * penalty, clean, penalty, clean_logits, logits_adv, x_adv)

    def extra_repr(self) -> str:
        told = f"{self.attack!r}, tau={self.tau:g}, rho={self.rho:g}, nu={self.nu:g}, squared={self.squared}"
        return told if self.aux == "exp" else f"{told}, aux={self.aux!r}"


class AdvCompSumLoss(SmoothAdversarialCompSumLoss):
    """ADV-COMP-SUM: :class:`SmoothAdversarialCompSumLoss` with the squared norm; at tau = 1 cross-entropy plus penalty.

    Args:
        attack: as there.
        tau: >= 0 (1).
        rho: > 0 (1).
        nu: >= 0 (1).
        statistics: as there.
        reduction: "mean", "sum" or "none".

    Shape:
        x [N, ...], y [N] -> :class:`AdvLossOutput`; `model(x)` is [N, C].

    Raises:
        ValueError: if an argument is out of range, or x outside the attack's bounds.

    Source:
        Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288.

    Example:
        >>> zoo.create("loss", "adv_comp_sum", attack={"eps": 4 / 255}, nu=0.3).squared
        True
    """

    def __init__(
        self,
        attack: Attack = None,
        *,
        tau: float = 1.0,
        rho: float = 1.0,
        nu: float = 1.0,
        statistics: Statistics = "adversarial",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(attack, tau=tau, rho=rho, nu=nu, squared=True, statistics=statistics, reduction=reduction)


class PSALLoss(SmoothAdversarialCompSumLoss):
    """PSAL: sum_j log2(1 + exp(-(z_y - z_j) / rho)) plus nu times the squared norm.

    Args:
        attack: as for :class:`SmoothAdversarialCompSumLoss`.
        rho: > 0 (1 on CIFAR-10 and SVHN).
        nu: >= 0 (1 on CIFAR-10 and SVHN).
        statistics: as for :class:`SmoothAdversarialCompSumLoss`.
        reduction: "mean", "sum" or "none".

    Shape:
        x [N, ...], y [N] -> :class:`AdvLossOutput`; `model(x)` is [N, C].

    Raises:
        ValueError: if an argument is out of range, or x outside the attack's bounds.

    Source:
        Awasthi, Mao, Mohri, Zhong, AISTATS 2023, PMLR 206. On CIFAR-100 it takes rho = 0.3, nu = 6 and the exponential:
        `SmoothAdversarialCompSumLoss(tau=0, rho=0.3, nu=6, squared=True)`.

    Example:
        >>> zoo.create("loss", "psal").aux
        'rho_logistic'
    """

    def __init__(
        self,
        attack: Attack = None,
        *,
        rho: float = 1.0,
        nu: float = 1.0,
        statistics: Statistics = "adversarial",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            attack,
            tau=0.0,
            rho=rho,
            nu=nu,
            squared=True,
            aux="rho_logistic",
            statistics=statistics,
            reduction=reduction,
        )


class TradesLoss(nn.Module):
    """TRADES: cross-entropy of clean inputs plus beta times KL(softmax(z) || softmax(z')).

    Args:
        attack: as for :class:`SmoothAdversarialCompSumLoss`; None for :meth:`zoo.attacks.PGDAttack.trades`: 10 steps of
            0.003 in evaluation mode, from x plus a little noise.
        beta: >= 0, weight of the second term (6); may be set later.

    Shape:
        x [N, ...], y [N] -> :class:`AdvLossOutput`; `model(x)` is [N, C].

    Raises:
        ValueError: if beta is negative, or x outside the attack's bounds.

    Source:
        Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, "Theoretically Principled Trade-off between Robustness and Accuracy",
        ICML 2019, arXiv:1901.08573. Their code calls the model once more for scores it has, and leaves it in training
        mode; results are the same without.

    Example:
        >>> zoo.create("loss", "trades", beta=3.0).beta
        3.0
    """

    def __init__(self, attack: Attack = None, *, beta: float = 6.0) -> None:
        super().__init__()
        if not 0 <= beta < math.inf:
            raise ValueError(f"TradesLoss: beta must be finite and not negative, got {beta}")
        self.attack = make_attack(attack, PGDAttack.trades())
        self.beta = float(beta)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, *, clean_logits: Tensor | None = None) -> AdvLossOutput:
        # The attack first, and on its own scores where it normalises otherwise than training does. With the running
        # statistics it must see those from before this step.
        logits = clean_logits
        if logits is None and self.attack.bn != "eval":
            logits = model(x)
        same = logits is not None and (not model.training or self.attack.bn != "eval")
        x_adv = self.attack(model, x, y, clean_logits=logits.detach() if logits is not None and same else None)
        if logits is None:
            logits = model(x)
        logits_adv = model(x_adv)
        dtype = compute_dtype(logits.dtype)
        clean = F.cross_entropy(logits.to(dtype), y.long())
        log_clean, log_adv = (F.log_softmax(z, 1, dtype=dtype) for z in (logits, logits_adv))
        penalty = F.kl_div(log_adv, log_clean, reduction="batchmean", log_target=True)
        return AdvLossOutput(clean + self.beta * penalty, clean, penalty, logits, logits_adv, x_adv)

    def extra_repr(self) -> str:
        return f"{self.attack!r}, beta={self.beta:g}"


class PGDATLoss(nn.Module):
    """Cross-entropy of the attacked inputs alone: adversarial training.

    Args:
        attack: as for :class:`SmoothAdversarialCompSumLoss`; None for :meth:`zoo.attacks.PGDAttack.madry`: 10 steps of
            2/255 up the cross-entropy, uniform start.

    Shape:
        x [N, ...], y [N] -> :class:`AdvLossOutput`; `model(x)` is [N, C]. `logits` is None unless they are given.

    Raises:
        ValueError: if x lies outside the attack's bounds.

    Source:
        Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
        2018, arXiv:1706.06083, eq. 2.1.

    Example:
        >>> zoo.create("loss", "pgd_at").attack.steps
        10
    """

    def __init__(self, attack: Attack = None) -> None:
        super().__init__()
        self.attack = make_attack(attack, PGDAttack.madry())

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, *, clean_logits: Tensor | None = None) -> AdvLossOutput:
        x_adv = self.attack(model, x, y, clean_logits=None if clean_logits is None else clean_logits.detach())
        logits_adv = model(x_adv)
        loss = F.cross_entropy(logits_adv.to(compute_dtype(logits_adv.dtype)), y.long())
        return AdvLossOutput(loss, loss, torch.zeros_like(loss), clean_logits, logits_adv, x_adv)

    def extra_repr(self) -> str:
        return repr(self.attack)
