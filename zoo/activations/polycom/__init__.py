"""Polynomial composition activations: PolyReLU, PolyNorm and their family.

Zhuo et al., "Polynomial Composition Activations: Unleashing the Dynamics of Large Language Models", ICLR 2025,
arXiv:2411.03884. Coefficients are stored in descending order of power, `weight` [order] and `bias` [1], as in the
authors' code, so their checkpoints load unchanged. Keep one instance per layer, and keep both parameters out of weight
decay, as for any 1-D parameter.

The modules keep the dtype they are given, also under autocast. Regions compiled by torch.compile have no second
derivative in PyTorch: run models that need `create_graph=True` eagerly.

Files: `reference.py` the formulas, `eager.py` their closed-form gradients in cache-sized blocks, `ops.py` the ops with
autograd, `functional.py` checks and choice, `modules.py` the
activations over `coefficients.py`, `glu.py` the gated unit and the feed-forward block.
"""

from .functional import poly_com, poly_norm, poly_norm_mul, poly_relu
from .glu import PolyFFN, PolyNormGLU
from .modules import PolyCom, PolyNorm, PolyPReLU, PolyReLU, PolyReLUNorm

__all__ = [
    "PolyCom",
    "PolyFFN",
    "PolyNorm",
    "PolyNormGLU",
    "PolyPReLU",
    "PolyReLU",
    "PolyReLUNorm",
    "poly_com",
    "poly_norm",
    "poly_norm_mul",
    "poly_relu",
]
