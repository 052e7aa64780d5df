"""Functional forms of the components, under one roof: `import zoo.functional as F`."""

from .activations.polycom import poly_com, poly_norm, poly_norm_mul, poly_relu
from .norms.evonorm import evonorm_b, evonorm_s

__all__ = ["evonorm_b", "evonorm_s", "poly_com", "poly_norm", "poly_norm_mul", "poly_relu"]
