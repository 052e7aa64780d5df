"""EvoNorm (Liu et al., NeurIPS 2020, arXiv:2004.02967): normalisation and activation in one layer, found by evolution.

S layers divide by statistics of each sample's groups of channels and need no state: they train at batch size 1. B
layers divide by the larger of the batch deviation and a term of the sample, and keep a running variance, which stays in
float32 when a model is cast to 16 bits. Put no activation behind either, and no weight decay on their parameters.

Nothing is subtracted from the numerator, so outputs are not of zero mean. Conversion is for training from scratch or
fine-tuning: gamma and beta of a trained BatchNorm mean something else here.

Files: `reference.py` the formulas, `eager.py` their closed-form gradients and the contract of the ops, `ops.py` the ops
with autograd, `cuda.py` the host side of the kernels, `functional.py` checks and layout, `synchronised.py` statistics
over several processes, `modules.py` the layers, `timm_layers.py` the same under timm's names, `folding.py`
inference.
"""

from .folding import fold_into_conv
from .functional import evonorm_b, evonorm_s
from .modules import ConditionalEvoNorm2d, EvoNorm, EvoNorm1d, EvoNorm2d, EvoNorm3d, convert_sync_evonorm
from .timm_layers import (
    EvoNorm2dB0,
    EvoNorm2dB1,
    EvoNorm2dB2,
    EvoNorm2dS0,
    EvoNorm2dS0a,
    EvoNorm2dS1,
    EvoNorm2dS1a,
    EvoNorm2dS2,
    EvoNorm2dS2a,
)

__all__ = [
    "EvoNorm",
    "EvoNorm1d",
    "EvoNorm2d",
    "EvoNorm3d",
    "EvoNorm2dB0",
    "EvoNorm2dB1",
    "EvoNorm2dB2",
    "EvoNorm2dS0",
    "EvoNorm2dS1",
    "EvoNorm2dS2",
    "EvoNorm2dS0a",
    "EvoNorm2dS1a",
    "EvoNorm2dS2a",
    "ConditionalEvoNorm2d",
    "convert_sync_evonorm",
    "fold_into_conv",
    "evonorm_b",
    "evonorm_s",
]
