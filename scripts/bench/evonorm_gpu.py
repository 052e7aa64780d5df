"""EvoNorm's part of `scripts/gpu_check.py`: every kernel against the float64 oracle, and against its rivals' times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.layers import EvoNorm2dS0 as EvoNorm2dS0OfTimm
from torch import Tensor, nn

from scripts.bench._gpu import Benchmark
from scripts.bench.evonorm import LAYOUTS, groups_of, rivals
from tests._numerics import assert_close
from tests.norms.evonorm_baselines import oracle_b, oracle_s
from zoo.functional import evonorm_b, evonorm_s
from zoo.kernels.sources import SCALARS, Unit, evonorm_b_unit, evonorm_moments_unit, evonorm_s_unit
from zoo.norms import EvoNorm2dS0

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Groups that fit on chip and that do not, ragged and few large planes, groups of one, more channels than a block has.
SHAPES = (
    (2, 8, 5, 7),
    (4, 64, 56, 56),
    (8, 24, 33, 31),
    (2, 144, 9, 9),
    (1, 40, 200, 334),
    (3, 300, 1, 1),
)
# Stem and stages of a ResNet-50 at the batch sizes of training, in bfloat16.
BENCHMARK_SHAPES = ((128, 256, 56, 56), (256, 64, 112, 112), (128, 512, 28, 28))
# Of BN+SiLU's time, forward and backward together: S0 and B0 on [N, C, H, W], anything in channels_last.
TARGET_TIMES = {("s0", "contiguous"): 0.6, ("b0", "contiguous"): 0.8}
TARGET_TIME_CHANNELS_LAST = 0.9
NETWORK, PICTURES = "resnetv2_50d", (64, 3, 224, 224)
TARGET_SHARE = 0.75  # of the copy bandwidth, for each pass

Check = tuple[str, Callable[[], None]]


def units() -> list[Unit]:
    """What is compiled before anything is timed."""
    return [
        unit
        for dtype in SCALARS
        for unit in (evonorm_moments_unit(dtype), evonorm_s_unit(dtype), *(evonorm_b_unit(dtype, k) for k in range(3)))
    ]


def _compare(function: Callable[..., Tensor], oracle: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    leaves = [t.detach().requires_grad_() for t in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, expected = function(*leaves), oracle(*exact)
    # A gradient that goes along with y: of noise alone the parameters' gradients would be sums that cancel.
    grad = (torch.randn_like(expected) + expected.detach() + 1).to(y.dtype)
    ours, wanted = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, exact, grad.double())
    for what, actual, exactly in zip(
        ("y", "dx", "dv", "dweight", "dbias"), (y, *ours), (expected, *wanted), strict=True
    ):
        half = actual.dtype in (torch.bfloat16, torch.float16)
        try:
            assert_close(actual, exactly, loose=1 if half else 4 if actual.ndim > 1 else 50)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None


def checks(device: torch.device) -> Iterator[Check]:
    """Name and test of every kernel at every shape; a test raises AssertionError."""
    for dtype in DTYPES:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        label = str(dtype).removeprefix("torch.")
        for shape in SHAPES:
            for layout, memory_format in LAYOUTS.items():

                def tensors(shape=shape, dtype=dtype, wide=wide, memory_format=memory_format) -> list[Tensor]:
                    x = (2 * torch.randn(shape, device=device) + 0.5).to(dtype).to(memory_format=memory_format)
                    return [x, *(1 + torch.rand(shape[1], device=device, dtype=wide) for _ in range(3))]

                def s_layers(shape=shape, tensors=tensors) -> None:
                    groups = groups_of(shape[1])
                    _compare(
                        lambda x, v, w, b: evonorm_s(x, v, w, b, groups, 1e-3),
                        lambda x, v, w, b: oracle_s(x, v, w, b, groups, eps=1e-3),
                        tensors(),
                    )
                    _compare(
                        lambda x, v, w, b: evonorm_s(x, v, w, b, groups // 2 or 1, moment="rms"),
                        lambda x, v, w, b: oracle_s(x, v, w, b, groups // 2 or 1, rms=True),
                        tensors(),
                    )

                def b_layers(tensors=tensors) -> None:
                    for variant in ("b0", "b1", "b2"):
                        # v has no part in B1 and B2, and a gradient of zero
                        _compare(
                            lambda x, v, w, b, variant=variant: evonorm_b(
                                x, v if variant == "b0" else None, w, b + 0 * v, None, True, variant=variant
                            ),
                            lambda x, v, w, b, variant=variant: oracle_b(x, v, w, b + 0 * v, None, variant=variant),
                            tensors(),
                        )

                yield f"evonorm_s {list(shape)} {label} {layout}", s_layers
                yield f"evonorm_b {list(shape)} {label} {layout}", b_layers


def _both(module: nn.Module, function: Callable[[Tensor], Tensor] | None = None) -> Callable[[Any], object]:
    """Forward and backward of a module, or of what was made of it; it goes where its input is."""

    def call(inputs: Any) -> object:
        x, grad = inputs
        module.to(x.device)
        return torch.autograd.grad((function or module)(x), [x, *module.parameters()], grad)

    return call


def _training_step(norm_layer: Any) -> Callable[[Any], object]:
    """Forward and backward of timm's ResNet under autocast; built at the first call."""
    built: list[nn.Module] = []

    def call(inputs: Any) -> object:
        import timm

        (x,) = inputs
        if not built:
            built.append(timm.create_model(NETWORK, norm_layer=norm_layer).to(x.device))
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = built[0](x).float().square().mean()
        return torch.autograd.grad(loss, list(built[0].parameters()))

    return call


def benchmarks() -> Iterator[Benchmark]:
    """S0 and B0 in bfloat16, forward and backward together, as BN+SiLU is timed; a training step of a whole network."""
    for shape in BENCHMARK_SHAPES:
        size = 2 * shape[0] * shape[1] * shape[2] * shape[3]
        for layout, memory_format in LAYOUTS.items():

            def inputs(device: torch.device, shape=shape, memory_format=memory_format) -> tuple[Tensor, ...]:
                x, grad = (
                    torch.randn(shape, device=device, dtype=torch.bfloat16).to(memory_format=memory_format)
                    for _ in range(2)
                )
                return x.requires_grad_(), grad

            for layer in ("s0", "b0"):
                modules = rivals(layer, shape[1])
                passes = 5 if layer == "s0" and layout == "contiguous" else 8
                target = TARGET_TIMES.get((layer, layout), TARGET_TIME_CHANNELS_LAST)
                facts = {"shape": list(shape), "dtype": "bfloat16", "layout": layout}
                calls = {name: _both(module) for name, module in modules.items()}
                theirs = modules["timm_compiled"]
                calls["timm_compiled"] = _both(theirs, torch.compile(theirs, fullgraph=True, dynamic=False))
                ratios = {"bn_silu": 1 / target}
                moved = passes * size
                yield Benchmark(f"evonorm_{layer}", facts, moved, inputs, calls, TARGET_SHARE, target_ratios=ratios)
    steps = {
        "ours": _training_step(lambda *args, **kwargs: EvoNorm2dS0(*args, **kwargs)),
        "batchnorm": _training_step(BatchNormAct2d),
        "timm": _training_step(EvoNorm2dS0OfTimm),
    }
    yield Benchmark(
        f"{NETWORK} training step",
        {"shape": list(PICTURES), "dtype": "bfloat16", "layout": "contiguous"},
        4 * math.prod(PICTURES),  # of the pictures: no share of the bandwidth is promised for a network
        lambda device: (torch.randn(PICTURES, device=device),),
        steps,
        0.0,
        target_ratios={"batchnorm": 0.9},
    )
