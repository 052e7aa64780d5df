"""Comp-sum losses (Mao, Mohri, Zhong 2023, arXiv:2304.07288): cross-entropy, GCE, MAE and sum-exponential as one."""

from .functional import comp_sum_from_nll, comp_sum_loss, tau_from_q
from .linear import linear_comp_sum_loss
from .modules import (
    AlphaLoss,
    CompSumLoss,
    GeneralizedCrossEntropyLoss,
    LinearCompSumLoss,
    LogisticLoss,
    MeanAbsoluteErrorLoss,
    SumExponentialLoss,
)

__all__ = [
    "AlphaLoss",
    "CompSumLoss",
    "GeneralizedCrossEntropyLoss",
    "LinearCompSumLoss",
    "LogisticLoss",
    "MeanAbsoluteErrorLoss",
    "SumExponentialLoss",
    "comp_sum_from_nll",
    "comp_sum_loss",
    "linear_comp_sum_loss",
    "tau_from_q",
]
