"""Components of recent papers as PyTorch modules.

    from zoo import PolyNorm                                # a class, typed, imported when asked for
    act = zoo.create("activation", "polynorm", order=3)     # by name, as a config does
    zoo.list("activation"), zoo.info("activation", "polynorm")

Importing this package imports neither torch nor Lightning.
"""

from __future__ import annotations

import builtins
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ComponentArgumentError, UnknownComponentError, ZooError
from .hub import load, save
from .registry import create, factory, get, info, list, register

if TYPE_CHECKING:  # what type checkers and editors see
    from . import functional as functional
    from .activations.polycom import PolyCom as PolyCom
    from .activations.polycom import PolyFFN as PolyFFN
    from .activations.polycom import PolyNorm as PolyNorm
    from .activations.polycom import PolyNormGLU as PolyNormGLU
    from .activations.polycom import PolyPReLU as PolyPReLU
    from .activations.polycom import PolyReLU as PolyReLU
    from .activations.polycom import PolyReLUNorm as PolyReLUNorm
    from .convert import convert_activation as convert_activation
    from .convert import convert_norm_act as convert_norm_act
    from .explain import GradCAM as GradCAM
    from .explain import GradCAMpp as GradCAMpp
    from .explain import SmoothGradCAMpp as SmoothGradCAMpp
    from .losses import AdvCompSumLoss as AdvCompSumLoss
    from .losses import AlphaLoss as AlphaLoss
    from .losses import CompSumLoss as CompSumLoss
    from .losses import GeneralizedCrossEntropyLoss as GeneralizedCrossEntropyLoss
    from .losses import L1DSSIMLoss as L1DSSIMLoss
    from .losses import LinearCompSumLoss as LinearCompSumLoss
    from .losses import LogisticLoss as LogisticLoss
    from .losses import MeanAbsoluteErrorLoss as MeanAbsoluteErrorLoss
    from .losses import PGDATLoss as PGDATLoss
    from .losses import PredictorRejectorLoss as PredictorRejectorLoss
    from .losses import PSALLoss as PSALLoss
    from .losses import SmoothAdversarialCompSumLoss as SmoothAdversarialCompSumLoss
    from .losses import SSIMLoss as SSIMLoss
    from .losses import SumExponentialLoss as SumExponentialLoss
    from .losses import TradesLoss as TradesLoss
    from .metrics import AverageDrop as AverageDrop
    from .metrics import DeletionAUC as DeletionAUC
    from .metrics import EnergyPointingGame as EnergyPointingGame
    from .metrics import GridPointingGame as GridPointingGame
    from .metrics import IncreaseInConfidence as IncreaseInConfidence
    from .metrics import InsertionAUC as InsertionAUC
    from .metrics import InstanceRecall as InstanceRecall
    from .metrics import PointingGame as PointingGame
    from .metrics import Road as Road
    from .metrics import Stability as Stability
    from .norms import ConditionalEvoNorm2d as ConditionalEvoNorm2d
    from .norms import EvoNorm as EvoNorm
    from .norms import EvoNorm1d as EvoNorm1d
    from .norms import EvoNorm2d as EvoNorm2d
    from .norms import EvoNorm2dB0 as EvoNorm2dB0
    from .norms import EvoNorm2dB1 as EvoNorm2dB1
    from .norms import EvoNorm2dB2 as EvoNorm2dB2
    from .norms import EvoNorm2dS0 as EvoNorm2dS0
    from .norms import EvoNorm2dS0a as EvoNorm2dS0a
    from .norms import EvoNorm2dS1 as EvoNorm2dS1
    from .norms import EvoNorm2dS1a as EvoNorm2dS1a
    from .norms import EvoNorm2dS2 as EvoNorm2dS2
    from .norms import EvoNorm2dS2a as EvoNorm2dS2a
    from .norms import EvoNorm3d as EvoNorm3d
    from .norms import convert_sync_evonorm as convert_sync_evonorm
    from .splat import ConvexModel as ConvexModel

__version__ = "0.1.0"

_Names = builtins.list[str]  # `list` is a function of ours here

_lazy = {
    "AdvCompSumLoss": "losses",
    "AlphaLoss": "losses",
    "AverageDrop": "metrics",
    "CompSumLoss": "losses",
    "ConditionalEvoNorm2d": "norms",
    "ConvexModel": "splat",
    "DeletionAUC": "metrics",
    "EnergyPointingGame": "metrics",
    "EvoNorm": "norms",
    "EvoNorm1d": "norms",
    "EvoNorm2d": "norms",
    "EvoNorm2dB0": "norms",
    "EvoNorm2dB1": "norms",
    "EvoNorm2dB2": "norms",
    "EvoNorm2dS0": "norms",
    "EvoNorm2dS0a": "norms",
    "EvoNorm2dS1": "norms",
    "EvoNorm2dS1a": "norms",
    "EvoNorm2dS2": "norms",
    "EvoNorm2dS2a": "norms",
    "EvoNorm3d": "norms",
    "GeneralizedCrossEntropyLoss": "losses",
    "GradCAM": "explain",
    "GradCAMpp": "explain",
    "GridPointingGame": "metrics",
    "IncreaseInConfidence": "metrics",
    "InsertionAUC": "metrics",
    "InstanceRecall": "metrics",
    "L1DSSIMLoss": "losses",
    "LinearCompSumLoss": "losses",
    "LogisticLoss": "losses",
    "MeanAbsoluteErrorLoss": "losses",
    "PGDATLoss": "losses",
    "PSALLoss": "losses",
    "PointingGame": "metrics",
    "PredictorRejectorLoss": "losses",
    "PolyCom": "activations.polycom",
    "PolyFFN": "activations.polycom",
    "PolyNorm": "activations.polycom",
    "PolyNormGLU": "activations.polycom",
    "PolyPReLU": "activations.polycom",
    "PolyReLU": "activations.polycom",
    "PolyReLUNorm": "activations.polycom",
    "Road": "metrics",
    "SSIMLoss": "losses",
    "SmoothAdversarialCompSumLoss": "losses",
    "SmoothGradCAMpp": "explain",
    "Stability": "metrics",
    "SumExponentialLoss": "losses",
    "TradesLoss": "losses",
    "convert_activation": "convert",
    "convert_norm_act": "convert",
    "convert_sync_evonorm": "norms",
}
_lazy_modules = ("functional",)

__all__ = [
    "ComponentArgumentError",
    "UnknownComponentError",
    "ZooError",
    "create",
    "factory",
    "functional",
    "get",
    "info",
    "list",
    "load",
    "register",
    "save",
    *_lazy,
]


def __getattr__(name: str) -> Any:
    if name in _lazy:
        found = getattr(import_module(f".{_lazy[name]}", __name__), name)
    elif name in _lazy_modules:
        found = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> _Names:
    return sorted({*globals(), *_lazy, *_lazy_modules})
