"""Functional forms of the components, under one roof: `import zoo.functional as F`."""

from .activations.polycom import poly_com, poly_norm, poly_norm_mul, poly_relu

__all__ = ["poly_com", "poly_norm", "poly_norm_mul", "poly_relu"]
