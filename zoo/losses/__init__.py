"""Losses. Files: `comp_sum/` the family, `theory.py` its bounds, `targets.py` and `abstention.py` tasks made of it,
`adversarial.py`, and `photometric.py` for rendered pictures."""

from .abstention import PredictorRejectorLoss, predictor_rejector_loss
from .adversarial import (
    AdvCompSumLoss,
    AdvLossOutput,
    PGDATLoss,
    PSALLoss,
    SmoothAdversarialCompSumLoss,
    TradesLoss,
    score_difference_norm,
    smooth_adversarial_comp_sum_loss,
)
from .comp_sum import (
    AlphaLoss,
    CompSumLoss,
    GeneralizedCrossEntropyLoss,
    LinearCompSumLoss,
    LogisticLoss,
    MeanAbsoluteErrorLoss,
    SumExponentialLoss,
    comp_sum_from_nll,
    comp_sum_loss,
    linear_comp_sum_loss,
    tau_from_q,
)
from .photometric import L1DSSIMLoss, SSIMLoss, d_ssim, l1_dssim, ssim

__all__ = [
    "AdvCompSumLoss",
    "AdvLossOutput",
    "AlphaLoss",
    "CompSumLoss",
    "GeneralizedCrossEntropyLoss",
    "L1DSSIMLoss",
    "LinearCompSumLoss",
    "LogisticLoss",
    "MeanAbsoluteErrorLoss",
    "PGDATLoss",
    "PSALLoss",
    "PredictorRejectorLoss",
    "SSIMLoss",
    "SmoothAdversarialCompSumLoss",
    "SumExponentialLoss",
    "TradesLoss",
    "comp_sum_from_nll",
    "comp_sum_loss",
    "d_ssim",
    "l1_dssim",
    "linear_comp_sum_loss",
    "predictor_rejector_loss",
    "score_difference_norm",
    "smooth_adversarial_comp_sum_loss",
    "ssim",
    "tau_from_q",
]
