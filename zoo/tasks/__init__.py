"""Lightning modules: what the components are trained on."""

from .classify import ImageClassifier
from .lm import LanguageModel
from .optim import WarmupCosine

__all__ = ["ImageClassifier", "LanguageModel", "WarmupCosine"]
