"""What the theory of comp-sum losses says in numbers: consistency bounds, least risks, optimal scores, gaps.

Plain functions for reports and logs. A float gives a float, a tensor a float64 tensor of its shape (on its device); the
order tau and the number of classes n are numbers. Nothing carries a gradient.

Notation: T is the transform with T(zero-one regret) <= surrogate regret, its inverse turns a surrogate regret into a
bound on the zero-one regret. a = 1 - tau and e = 1 / (2 - tau) throughout.
"""

from __future__ import annotations

import math
from typing import TypeVar, cast

import torch
from torch import Tensor

from .comp_sum.functional import check_tau
from .comp_sum.reference import phi_of_nll

__all__ = [
    "phi_tau",
    "phi_tau_inv",
    "h_consistency_transform",
    "gamma",
    "gamma_upper",
    "min_conditional_risk",
    "bayes_scores",
    "minimizability_gap_upper",
    "zero_one_bound",
]

Real = TypeVar("Real", float, Tensor)

_SUM_TOLERANCE = 1e-4  # softmax rows of a thousand classes in float32 add up to 1 within this
_HALVINGS = 64  # of an interval of at most 750 in log beta: 4e-17


@torch.no_grad()
def phi_tau(u: Real, tau: float) -> Real:
    """((1 + u)^(1 - tau) - 1) / (1 - tau), and log(1 + u) at tau = 1: the loss as a function of u = 1 / p - 1.

    Concave and non-decreasing in u with slope 1 at 0, non-increasing in tau.

    Args:
        u: >= 0, infinity included.
        tau: >= 0, order of the loss.

    Returns:
        Like u; at most 1 / (tau - 1) for tau > 1.

    Raises:
        ValueError: if u is negative or NaN, or tau is negative or not finite.

    Source:
        The family of Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML
        2023, arXiv:2304.07288.

    Example:
        >>> phi_tau(3.0, 0.5)  # 2 (p^-1/2 - 1) at p = 1/4
        2.0
    """
    tau = check_tau(tau, "phi_tau")
    return _like(u, phi_of_nll(torch.log1p(_nonnegative(u, "phi_tau", "u")), tau))


@torch.no_grad()
def phi_tau_inv(value: Real, tau: float) -> Real:
    """u with phi_tau(u) = value: (1 + (1 - tau) value)^(1 / (1 - tau)) - 1, and exp(value) - 1 at tau = 1.

    Args:
        value: >= 0, and at most 1 / (tau - 1), the limit of the loss, for tau > 1; there u is infinite.
        tau: >= 0, order of the loss.

    Returns:
        Like value.

    Raises:
        ValueError: if value is out of range, or tau is negative or not finite.

    Source:
        See :func:`phi_tau`.

    Example:
        >>> phi_tau_inv(2.0, 0.5)
        3.0
    """
    tau = check_tau(tau, "phi_tau_inv")
    x = _nonnegative(value, "phi_tau_inv", "value")
    a = 1 - tau
    if a == 0:
        return _like(value, torch.expm1(x))
    if a < 0 and bool((x > -1 / a).any()):
        raise ValueError(
            f"phi_tau_inv: a loss of order tau={tau} is at most 1 / (tau - 1) = {-1 / a:.6g}, got {x.max().item():.6g}"
        )
    return _like(value, torch.expm1(torch.log1p(a * x) / a))


@torch.no_grad()
def h_consistency_transform(beta: Real, tau: float, n: int) -> Real:
    """T with T(zero-one regret) <= surrogate regret: increasing and convex, T(0) = 0.

    With M = ((1 + beta)^e + (1 - beta)^e) / 2 it is::

        2^a (1 - M^(2 - tau)) / a                                            for tau < 1,
        ((1 + beta) log(1 + beta) + (1 - beta) log(1 - beta)) / 2            for tau = 1, the limit from both sides,
        (M^(2 - tau) - 1) / ((tau - 1) n^(tau - 1))                          for 1 < tau < 2,
        beta / ((tau - 1) n^(tau - 1))                                       from tau = 2 on.

    No larger function would do for tau <= 1, for two classes and tau <= 2, and for tau = 2 up to beta = 1 / (n - 1);
    elsewhere there is room to spare.

    Args:
        beta: in [0, 1], a zero-one regret.
        tau, n: order of the loss, >= 0, and number of classes, >= 2.

    Returns:
        Like beta.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Believed to be the transformation of Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288; derived anew, and compared
        with a minimisation over distributions and scores in the tests.

    Example:
        >>> h_consistency_transform(1.0, tau=1, n=10)  # log 2
        0.6931471805599453
    """
    tau, n = check_tau(tau, "h_consistency_transform"), _check_classes(n, "h_consistency_transform")
    b = _nonnegative(beta, "h_consistency_transform", "beta")
    if bool((b > 1).any()):
        raise ValueError(
            f"h_consistency_transform: beta is a difference of probabilities, in [0, 1], got {b.max().item():.6g}"
        )
    return _like(beta, _transform(b, tau, n))


@torch.no_grad()
def gamma(regret: Real, tau: float, n: int) -> Real:
    """The bound on the zero-one regret that a surrogate regret gives: the inverse of :func:`h_consistency_transform`.

    Found by bisection, to 1e-12 relative.

    Args:
        regret: >= 0, of the loss of order tau.
        tau, n: order of the loss, >= 0, and number of classes, >= 2.

    Returns:
        Like regret, in [0, 1]. Where the transform reaches less than regret it says nothing: 1.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        See :func:`h_consistency_transform`.

    Example:
        >>> round(gamma(0.02, tau=1, n=10), 4)
        0.1993
    """
    tau, n = check_tau(tau, "gamma"), _check_classes(n, "gamma")
    t = _nonnegative(regret, "gamma", "regret")
    if tau >= 2:
        return _like(regret, _linear_upper(t, tau, n).clamp(max=1))
    most = _transform(torch.ones((), dtype=torch.float64, device=t.device), tau, n)
    # In the logarithm, so that tiny regrets are as exact as large ones. T is convex and 0 at 0: T(beta) <= beta T(1)
    # gives the lower end, which is the upper one where regret is more than T(1).
    low, high = torch.log(t / most).clamp(max=0), torch.zeros_like(t)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = _transform(middle.exp(), tau, n) < t
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return _like(regret, ((low + high) / 2).exp())


@torch.no_grad()
def gamma_upper(regret: Real, tau: float, n: int) -> Real:
    """A closed form above :func:`gamma`, to see how it grows; not cut off at 1.

    sqrt(2^tau (2 - tau) t) for tau <= 1, sqrt(2 n^(tau - 1) t) for 1 <= tau < 2 and (tau - 1) n^(tau - 1) t from 2 on.
    There is no factor 2 - tau in the second: with one it falls below :func:`gamma`.

    Args:
        regret: t, >= 0, of the loss of order tau.
        tau, n: order of the loss, >= 0, and number of classes, >= 2.

    Returns:
        Like regret.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Believed to be in Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288; compared with :func:`gamma` in the tests.

    Example:
        >>> gamma_upper(0.02, tau=1, n=10)
        0.2
    """
    tau, n = check_tau(tau, "gamma_upper"), _check_classes(n, "gamma_upper")
    t = _nonnegative(regret, "gamma_upper", "regret")
    if tau >= 2:
        return _like(regret, _linear_upper(t, tau, n))
    factor = 2**tau * (2 - tau) if tau <= 1 else 2 * n ** (tau - 1)
    return _like(regret, torch.sqrt(factor * t))


@torch.no_grad()
def min_conditional_risk(probabilities: Tensor, tau: float) -> Tensor:
    """Least expected loss under a distribution of the label: ((sum_k p_k^e)^(2 - tau) - 1) / (1 - tau).

    The entropy at tau = 1, 1 / (2 - tau) being 1; (1 - max p) / (tau - 1) from tau = 2 on.

    Args:
        probabilities: [..., n], each row >= 0 with sum 1 (within 1e-4; it is divided by its sum).
        tau: >= 0, order of the loss.

    Returns:
        [...], float64.

    Raises:
        ValueError: if the rows are no distributions, or tau is negative or not finite.
        TypeError: if probabilities is no floating-point tensor.

    Source:
        Derived from :func:`phi_tau` with a Lagrange multiplier.

    Example:
        >>> min_conditional_risk(torch.tensor([0.5, 0.25, 0.25]), tau=1) / math.log(2)  # bits
        tensor(1.5000, dtype=torch.float64)
    """
    tau = check_tau(tau, "min_conditional_risk")
    p = _distributions(probabilities, "min_conditional_risk")
    a = 1 - tau
    if a == 0:
        return torch.special.entr(p).sum(-1)
    if tau <= 1.5:
        # sum p^e - 1 = sum p (p^(e - 1) - 1): keeps its digits where tau is near 1 and both sides of the minus near 1
        excess = torch.where(p > 0, p * torch.expm1(-a / (2 - tau) * p.log()), 0).sum(-1)
        return torch.expm1((2 - tau) * torch.log1p(excess)) / a
    # the largest taken out: near tau = 2 the powers underflow, from there on nothing else is left
    top, where = p.max(-1)
    exponent = top.log()
    if tau < 2:
        ratio = (p / top.unsqueeze(-1)) ** (1 / (2 - tau))
        exponent = exponent + (2 - tau) * torch.log1p(ratio.scatter(-1, where.unsqueeze(-1), 0).sum(-1))
    return torch.expm1(exponent) / a


@torch.no_grad()
def bayes_scores(probabilities: Tensor, tau: float) -> Tensor:
    """Scores of least expected loss, log p / (2 - tau), up to a constant.

    Backwards it corrects calibration: a model trained with order tau estimates p by `softmax(scores * (2 - tau))`. The
    plain softmax is too sharp for tau > 1, too flat for tau < 1.

    Args:
        probabilities: [..., n], each row >= 0 with sum 1 (within 1e-4; it is divided by its sum).
        tau: in [0, 2). From 2 on the best scores are infinite.

    Returns:
        [..., n], float64; -inf where a probability is 0.

    Raises:
        ValueError: if the rows are no distributions, or tau is out of range.
        TypeError: if probabilities is no floating-point tensor.

    Source:
        Derived together with :func:`min_conditional_risk`.

    Example:
        >>> scores = bayes_scores(torch.tensor([0.7, 0.3]), tau=1.5)
        >>> scores.softmax(-1)
        tensor([0.8448, 0.1552], dtype=torch.float64)
        >>> (0.5 * scores).softmax(-1)
        tensor([0.7000, 0.3000], dtype=torch.float64)
    """
    tau = check_tau(tau, "bayes_scores")
    if tau >= 2:
        raise ValueError(f"bayes_scores: tau must be below 2, where the best scores become infinite, got {tau}")
    return _distributions(probabilities, "bayes_scores").log() / (2 - tau)


@torch.no_grad()
def minimizability_gap_upper(best_risk: Real, least: Real, tau: float) -> Real:
    """phi_tau(best_risk) - phi_tau(least): a bound on the minimizability gap of order tau from figures of order 0.

    The gap is the best risk in a class of models minus the mean, over inputs, of the best value at each input. phi_tau
    is concave and, where every input has one label, commutes with the infimum at an input: so two figures of the
    sum-exponential loss bound the gap of every order. The bound does not increase with tau.

    Args:
        best_risk: of the sum-exponential loss (tau = 0) in the class, >= least.
        least: >= 0, what the sum-exponential loss is at least at every input: (n - 1) exp(-2 L) for scores in [-L, L].
            A mean over inputs whose best values differ will not do, nor will labels with noise: both bend the
            inequality the other way.
        tau: >= 0, order of the loss.

    Returns:
        Like best_risk and least; a tensor of the broadcast shape if one of them is one.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Believed to be in Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288; derived anew with its conditions.

    Example:
        >>> least = 9 * math.exp(-2 * 3.0)  # ten classes, scores in [-3, 3]
        >>> [round(minimizability_gap_upper(0.5, least, tau), 3) for tau in (0, 1, 2)]
        [0.478, 0.383, 0.312]
    """
    tau = check_tau(tau, "minimizability_gap_upper")
    risk = _nonnegative(best_risk, "minimizability_gap_upper", "best_risk")
    start = _nonnegative(least, "minimizability_gap_upper", "least")
    if not bool(((risk >= start) & risk.isfinite()).all()):
        raise ValueError(
            "minimizability_gap_upper: best_risk must be finite and not below least,"
            f" got {_shown(risk)} and {_shown(start)}"
        )
    # phi_tau from `least` on is phi_tau from 0 on, stretched: no difference of nearly equal numbers
    steps = phi_of_nll(torch.log1p((risk - start) / (1 + start)), tau)
    return _like(best_risk + least, (1 + start) ** (1 - tau) * steps)


@torch.no_grad()
def zero_one_bound(risk: Real, best_risk: Real, gap: Real, tau: float, n: int) -> Real:
    """gamma(risk - best_risk + gap): what the risk of the loss guarantees for the error rate.

    The error rate of the model, minus the best in its class, plus the minimizability gap of the zero-one loss, is at
    most this. Unlike the risks of different orders, these bounds can be compared.

    Args:
        risk: of the loss of order tau, of the model.
        best_risk: the least in the class of models, or something below it, as 0.
        gap: minimizability gap of the loss, or something above it, as :func:`minimizability_gap_upper`.
        tau, n: order of the loss, >= 0, and number of classes, >= 2.

    Returns:
        In [0, 1]; a tensor of the broadcast shape if one of risk, best_risk and gap is one.

    Raises:
        ValueError: if an argument is out of range, or risk - best_risk + gap is negative.

    Source:
        The H-consistency bound of Mao, Mohri, Zhong, ICML 2023, arXiv:2304.07288, with :func:`gamma`.

    Example:
        >>> round(zero_one_bound(0.05, 0.03, 0.0, tau=1, n=10), 4)
        0.1993
    """
    regret = risk - best_risk + gap
    if not bool((_float64(regret) >= 0).all()):
        raise ValueError(
            "zero_one_bound: risk - best_risk + gap must not be negative,"
            f" got {_shown(_float64(regret))}; best_risk must be the least of the class"
        )
    return gamma(regret, tau, n)


def _transform(b: Tensor, tau: float, n: int) -> Tensor:
    """The transform of a float64 b in [0, 1], to a few units in the last place also near b = 0, tau = 1 and tau = 2."""
    a = 1 - tau
    if tau >= 2:
        return b * math.exp(a * math.log(n)) / -a
    odds = torch.atanh(b)
    if a == 0:
        # Small b: no difference of nearly equal terms. Large b: nothing infinite.
        near_0 = b * odds + torch.log1p(-b * b) / 2
        near_1 = (torch.special.xlog1py(1 + b, b) + torch.special.xlog1py(1 - b, -b)) / 2
        return torch.where(b < 0.5, near_0, near_1)
    # exponent = (2 - tau) log M. With f = e - 1 = -a e,
    # M = (1 - b^2)^(f / 2) (cosh(f atanh b) + b sinh(f atanh b)), which keeps its digits for small b and small a, ...
    e = 1 / (2 - tau)
    f = -a * e
    small = abs(f) * odds <= 1
    turn, c = torch.where(small, f * odds, 0), torch.where(small, b, 0)
    spread = torch.where(c < 0.5, torch.log1p(-c * c), torch.log1p(c) + torch.log1p(-c))  # log(1 - b^2)
    near_0 = f / 2 * spread + torch.log1p(2 * torch.sinh(turn / 2).square() + c * torch.sinh(turn))
    # ... and M = (1 + b)^e (1 + ((1 - b) / (1 + b))^e) / 2, which cannot overflow. The logarithm of its first factor is
    # written so that nothing cancels: for tau near 1, where b is near 1 here, and for tau near 2.
    first = torch.log1p((b - 1) / 2) - a * math.log(2) if tau < 1.5 else torch.log1p(b) - (2 - tau) * math.log(2)
    near_1 = first + (2 - tau) * torch.log1p(((1 - b) / (1 + b)) ** e)
    exponent = torch.where(small, (2 - tau) * near_0, near_1)
    return (2 if tau < 1 else n) ** a * torch.expm1(exponent) / -a


def _linear_upper(t: Tensor, tau: float, n: int) -> Tensor:
    """(tau - 1) n^(tau - 1) t, through logarithms: the power alone overflows for large tau."""
    return (t.log() + math.log(tau - 1) + (tau - 1) * math.log(n)).exp()


def _float64(x: float | Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def _like(x: Real, result: Tensor) -> Real:
    """The result as what came in: a float, or a tensor."""
    return cast(Real, result if isinstance(x, Tensor) else result.item())


def _nonnegative(x: float | Tensor, of: str, name: str) -> Tensor:
    value = _float64(x)
    if not bool((value >= 0).all()):
        raise ValueError(f"{of}: {name} must not be negative or NaN, got {_shown(value)}")
    return value


def _check_classes(n: int, of: str) -> int:
    if not n >= 2:
        raise ValueError(f"{of}: n, the number of classes, must be at least 2, got {n}")
    return n


def _distributions(probabilities: Tensor, of: str) -> Tensor:
    if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point():
        what = probabilities.dtype if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise TypeError(f"{of}: probabilities must be a floating-point tensor [..., n], got {what}")
    p = probabilities.to(torch.float64)
    if p.ndim == 0 or p.shape[-1] == 0:
        raise ValueError(f"{of}: probabilities must have the classes last, [..., n], got shape {tuple(p.shape)}")
    total = p.sum(-1, keepdim=True)
    if not bool((p >= 0).all()) or not bool(((total - 1).abs() <= _SUM_TOLERANCE).all()):
        raise ValueError(
            f"{of}: each row of probabilities must be >= 0 with sum 1, got a least entry of {p.min().item():.6g} and"
            f" sums from {total.min().item():.6g} to {total.max().item():.6g}"
        )
    return p / total


def _shown(x: Tensor) -> str:
    """The number, or the range of a tensor's numbers."""
    return f"{x.item():.6g}" if x.numel() == 1 else f"values from {x.min().item():.6g} to {x.max().item():.6g}"
