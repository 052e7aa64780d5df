"""Lightning modules: what the components are trained on, and the callbacks that go with them."""

from .adversarial import AdversarialClassifier
from .backbones import MLP, PlainCNN, PreActResNet18, SmallVGG, WideResNet
from .classify import ImageClassifier
from .explain import CAMCallback
from .gan import ConditionalGAN
from .lm import LanguageModel
from .optim import WarmupCosine, WarmupMultiStep
from .robust import EMA, LossRamp, RobustEval
from .splat import ConvexSplatting, SplatRates

__all__ = [
    "AdversarialClassifier",
    "CAMCallback",
    "ConditionalGAN",
    "ConvexSplatting",
    "EMA",
    "ImageClassifier",
    "LanguageModel",
    "LossRamp",
    "MLP",
    "PlainCNN",
    "PreActResNet18",
    "RobustEval",
    "SmallVGG",
    "SplatRates",
    "WarmupCosine",
    "WarmupMultiStep",
    "WideResNet",
]
