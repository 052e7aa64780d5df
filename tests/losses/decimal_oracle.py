"""The comp-sum family from its definition, in decimal arithmetic of 60 digits: nothing of torch, no stable form."""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from decimal import Decimal

_CONTEXT = decimal.Context(prec=60, Emax=10**9, Emin=-(10**9))


def comp_sum(scores: Sequence[float], target: int, tau: float) -> tuple[Decimal, list[Decimal]]:
    """Loss and gradient of one row: Phi(u) = ((1 + u)^(1 - tau) - 1) / (1 - tau), u = sum_{j != y} exp(z_j - z_y).

    dPhi/dz_j = (1 + u)^-tau exp(z_j - z_y) for j != y, and minus their sum at y.
    """
    with decimal.localcontext(_CONTEXT) as context:
        context.traps[decimal.Underflow] = context.traps[decimal.Subnormal] = False
        z = [Decimal(score) for score in scores]
        terms = [Decimal(0) if j == target else (z[j] - z[target]).exp() for j in range(len(z))]
        u, a = sum(terms, Decimal(0)), 1 - Decimal(tau)
        one_plus = 1 + u
        if one_plus == 1:
            loss = u - Decimal(tau) * u * u / 2  # to first orders: u is below 1e-60
        elif a == 0:
            loss = one_plus.ln()
        else:
            loss = ((a * one_plus.ln()).exp() - 1) / a
        slope = (-Decimal(tau) * one_plus.ln()).exp()
        gradient = [slope * term for term in terms]
        gradient[target] = -sum(gradient, Decimal(0))
        return loss, gradient


def as_float(value: Decimal) -> float:
    """The nearest float64; inf where there is none."""
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)
