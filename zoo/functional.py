"""Functional forms of the components, under one roof: `import zoo.functional as F`."""

from .activations.polycom import poly_com, poly_norm, poly_norm_mul, poly_relu
from .losses.abstention import predictor_rejector_loss
from .losses.adversarial import score_difference_norm, smooth_adversarial_comp_sum_loss
from .losses.comp_sum import comp_sum_from_nll, comp_sum_loss, linear_comp_sum_loss
from .losses.photometric import d_ssim, l1_dssim, ssim
from .norms.evonorm import evonorm_b, evonorm_s
from .splat import convex_hull_2d, convex_normals, rasterization_convex, spherical_harmonics

__all__ = [
    "comp_sum_from_nll",
    "comp_sum_loss",
    "convex_hull_2d",
    "convex_normals",
    "d_ssim",
    "evonorm_b",
    "evonorm_s",
    "l1_dssim",
    "linear_comp_sum_loss",
    "poly_com",
    "poly_norm",
    "poly_norm_mul",
    "poly_relu",
    "predictor_rejector_loss",
    "rasterization_convex",
    "score_difference_norm",
    "smooth_adversarial_comp_sum_loss",
    "spherical_harmonics",
    "ssim",
]
