"""Functional forms of the components, under one roof: `import zoo.functional as F`."""

from .activations.polycom import poly_com, poly_norm, poly_norm_mul, poly_relu
from .losses.abstention import predictor_rejector_loss
from .losses.adversarial import score_difference_norm, smooth_adversarial_comp_sum_loss
from .losses.comp_sum import comp_sum_from_nll, comp_sum_loss, linear_comp_sum_loss
from .norms.evonorm import evonorm_b, evonorm_s

__all__ = [
    "comp_sum_from_nll",
    "comp_sum_loss",
    "evonorm_b",
    "evonorm_s",
    "linear_comp_sum_loss",
    "poly_com",
    "poly_norm",
    "poly_norm_mul",
    "poly_relu",
    "predictor_rejector_loss",
    "score_difference_norm",
    "smooth_adversarial_comp_sum_loss",
]
