"""Normalisations of the zoo."""

from .evonorm import (
    ConditionalEvoNorm2d,
    EvoNorm,
    EvoNorm1d,
    EvoNorm2d,
    EvoNorm2dB0,
    EvoNorm2dB1,
    EvoNorm2dB2,
    EvoNorm2dS0,
    EvoNorm2dS0a,
    EvoNorm2dS1,
    EvoNorm2dS1a,
    EvoNorm2dS2,
    EvoNorm2dS2a,
    EvoNorm3d,
    convert_sync_evonorm,
    fold_into_conv,
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
    "EvoNorm2dS0a",
    "EvoNorm2dS1",
    "EvoNorm2dS1a",
    "EvoNorm2dS2",
    "EvoNorm2dS2a",
    "ConditionalEvoNorm2d",
    "convert_sync_evonorm",
    "fold_into_conv",
]
