"""Lightning modules: what the components are trained on."""

from .classify import ImageClassifier
from .gan import ConditionalGAN
from .lm import LanguageModel
from .optim import WarmupCosine, WarmupMultiStep

__all__ = ["ConditionalGAN", "ImageClassifier", "LanguageModel", "WarmupCosine", "WarmupMultiStep"]
