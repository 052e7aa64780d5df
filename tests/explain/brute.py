"""Small networks cut by hand, and Smooth Grad-CAM++ from Y = exp(S) alone: no closed form, one neuron at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def network(act: Callable[[], nn.Module] = nn.ReLU, pool: type[nn.Module] = nn.AvgPool2d, seed: int = 0) -> nn.Module:
    """Head conv + act, named "head"; tail conv, norm, act, pool, linear; float64, in evaluation."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(5)
    model = nn.Sequential()
    model.add_module("head", nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()))
    model.add_module("tail", nn.Sequential(nn.Conv2d(4, 5, 2), norm, act(), pool(2), nn.Flatten(), nn.Linear(5, 3)))
    with torch.no_grad():
        for t in (norm.running_mean, norm.weight, norm.bias):
            t.copy_(torch.randn(5))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.rand(5) + 0.5)  # type: ignore[union-attr]
    return model.double().eval()


def images(count: int = 1, seed: int = 1) -> Tensor:
    """[count, 3, 9, 9]: maps of 4 x 4."""
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivatives(model: nn.Module, x: Tensor, target: int, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, and first to third derivative of exp(S - shift) for each of its neurons, [K, h, w] each, of one image."""
    maps = model.head(x).detach().requires_grad_()  # type: ignore[operator]
    y = (model.tail(maps)[0, target] - shift).exp()  # type: ignore[operator]
    (first,) = torch.autograd.grad(y, maps, create_graph=True)
    orders = [first.detach()[0].clone(), torch.zeros_like(maps[0]), torch.zeros_like(maps[0])]
    for i in range(maps.numel()):
        (second,) = torch.autograd.grad(first.flatten()[i], maps, create_graph=True)
        (third,) = torch.autograd.grad(second.flatten()[i], maps, retain_graph=True)
        orders[1].flatten()[i] = second.flatten()[i].detach()
        orders[2].flatten()[i] = third.flatten()[i]
    return maps.detach()[0], *(order.detach() for order in orders)  # type: ignore[return-value]


def smooth_map(
    model: nn.Module, x: Tensor, target: int, copies: list[Tensor], numerator: str = "second", shift: float = 0.0
) -> Tensor:
    """relu(sum_k w_k A_k), [h, w], of derivatives averaged over copies; alpha is 0 but for positive denominators."""
    activation = model.head(x).detach()[0]  # type: ignore[operator]
    found = [derivatives(model, copy, target, shift)[1:] for copy in copies]
    first, second, third = (torch.stack(order).mean(0) for order in zip(*found, strict=True))
    result = torch.zeros_like(activation[0])
    for k in range(len(activation)):
        weight = 0.0
        for i in range(activation.shape[1]):
            for j in range(activation.shape[2]):
                below = 2 * second[k, i, j] + activation[k].sum() * third[k, i, j]
                above = second[k, i, j] if numerator == "second" else first[k, i, j]
                if below > 0:
                    weight += float(above / below * first[k, i, j].clamp(min=0))
        result += weight * activation[k]
    return result.clamp(min=0)


def noisy(x: Tensor, n: int, sigma: float, seed: int = 0) -> list[Tensor]:
    """Copies of one image [1, ...] as the explainers draw them."""
    generator = torch.Generator().manual_seed(seed)
    spread = sigma * (x.max() - x.min())
    return [x + spread * torch.randn(x.shape[1:], generator=generator, dtype=x.dtype) for _ in range(n)]
