"""Inference: a layer that normalises nothing disappears into the convolution before it."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .modules import EvoNorm

Conv = TypeVar("Conv", nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_into_conv(conv: Conv, norm: EvoNorm) -> Conv:
    """One convolution for a convolution and the affine-only EvoNorm behind it; see `torch.nn.utils.fuse_conv_bn_eval`.

    Args:
        conv: not changed.
        norm: with apply_act=False, weight and bias of its own; others depend on their input and cannot be folded.

    Returns:
        A new convolution in the mode of `conv`.

    Raises:
        ValueError: if the layer normalises or activates, or the channels do not fit.

    Example:
        >>> conv, norm = nn.Conv2d(3, 8, 1), EvoNorm(8, apply_act=False)
        >>> x = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(fold_into_conv(conv, norm)(x), norm(conv(x)), atol=1e-6)
        True
    """
    if norm.apply_act or norm.normalize_when_linear or norm.weight is None:
        raise ValueError(f"fold_into_conv: expected an affine-only layer, apply_act=False, got {norm}")
    if conv.out_channels != norm.num_features:
        raise ValueError(
            f"fold_into_conv: expected a layer of the {conv.out_channels} channels of the convolution, got one of "
            f"{norm.num_features}"
        )
    folded = copy.deepcopy(conv)
    mean, variance = torch.zeros_like(norm.weight), torch.ones_like(norm.weight)
    transposed = isinstance(conv, _ConvTransposeNd)
    folded.weight, folded.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, 0.0, norm.weight, norm.bias, transposed
    )
    return folded
