"""Small and usual networks for pictures, and how a classifier is told which one it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ComponentArgumentError, UnknownComponentError
from ..norms import EvoNorm
from ..registry import did_you_mean, factory
from ..spec import ActivationSpec, NormSpec

BackboneSpec = str | dict[str, Any] | Callable[..., Any]


class PlainCNN(nn.Module):
    """Three 3x3 convolutions (32, 64 and 64 channels, the last two of stride 2) and two linear layers, no norm.

    Small enough for adversarial training on a CPU, and free of batch statistics: an attack sees what is trained. He
    initialisation; the weights of the last layer start with a standard deviation of 0.05, near the uniform prediction.

    Args:
        num_classes: outputs.
        in_channels: channels of a picture.
        size: height and width of a picture, which the first linear layer is made for.
        act: activation, by registry name, dotted path or mapping, or a class.

    Shape:
        [B, in_channels, size, size] -> [B, num_classes].

    Raises:
        ValueError: if `size` is below 1; in forward, for pictures of another size.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, *, size: int = 32, act: ActivationSpec = nn.ReLU
    ) -> None:
        super().__init__()
        _check_size(type(self).__name__, size)
        make = factory("activation", act)
        self.in_channels, self.size = in_channels, size
        side = -(-size // 4)  # each stride rounds up
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1),
            make(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            make(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            make(),
            nn.Flatten(),
            nn.Linear(64 * side**2, 128),
            make(),
        )
        self.head = nn.Linear(128, num_classes)
        for layer in self.features:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                _he_(layer, "fan_in")
        nn.init.normal_(self.head.weight, std=0.05)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        _check_pictures(self, images)
        return self.head(self.features(images))


class MLP(nn.Module):
    """Linear layers with an activation between, over all pixels of a picture.

    Args:
        num_classes: outputs.
        in_channels: channels of a picture.
        size: height and width of a picture.
        hidden: widths of the hidden layers.
        act: activation, by registry name, dotted path or mapping, or a class.

    Shape:
        [B, in_channels, size, size] -> [B, num_classes].

    Raises:
        ValueError: if `size` or a width is below 1; in forward, for pictures of another size.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        *,
        size: int = 8,
        hidden: Sequence[int] = (256, 256),
        act: ActivationSpec = nn.ReLU,
    ) -> None:
        super().__init__()
        _check_size(type(self).__name__, size)
        if any(width < 1 for width in hidden):
            raise ValueError(f"MLP: every hidden width must be at least 1, got {list(hidden)}")
        make = factory("activation", act)
        self.in_channels, self.size = in_channels, size
        widths = [in_channels * size**2, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), make()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(self, images: Tensor) -> Tensor:
        _check_pictures(self, images)
        return self.layers(images)


class SmallVGG(nn.Module):
    """Four 3x3 convolutions with norm and activation, a 2x2 maximum behind the first two, and two linear layers.

    Made to be explained: the last map has a quarter of the picture's height and width, fine enough for a heat map, and
    behind it a 4x4 maximum and a hidden layer leave nothing linear. The last map is the output of `features`.

    Args:
        num_classes: outputs.
        in_channels: channels of a picture.
        size: height and width of a picture, which the first linear layer is made for.
        widths: channels of the four convolutions.
        hidden: width of the hidden layer.
        act, norm: activation and normalisation, by registry name, dotted path or mapping, or a class.

    Shape:
        [B, in_channels, size, size] -> [B, num_classes].

    Raises:
        ValueError: if `size` or a width is below 1, or there are not four widths; in forward, for pictures of another
            size.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        size: int = 64,
        widths: Sequence[int] = (16, 32, 64, 64),
        hidden: int = 64,
        act: ActivationSpec = nn.ReLU,
        norm: NormSpec = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        _check_size(type(self).__name__, size)
        if len(widths) != 4 or min(*widths, hidden) < 1:
            raise ValueError(
                f"SmallVGG: widths must be four, and every width at least 1, got {list(widths)} and hidden {hidden}"
            )
        make_act, make_norm = factory("activation", act), factory("norm", norm)
        self.in_channels, self.size = in_channels, size
        blocks = []
        for i, (before, after) in enumerate(pairwise([in_channels, *widths])):
            block = [nn.Conv2d(before, after, 3, padding=1, bias=False), make_norm(after), make_act()]
            if i < 2:
                block.append(nn.MaxPool2d(2, ceil_mode=True))
            blocks.append(nn.Sequential(*block))
        self.features = nn.Sequential(*blocks)
        self.pool = nn.MaxPool2d(4, ceil_mode=True)
        side = -(-size // 16)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(widths[-1] * side**2, hidden), make_act(), nn.Linear(hidden, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        _check_pictures(self, images)
        return self.head(self.pool(self.features(images)))


class PreActNet(nn.Module):
    """A 3x3 stem and stages of pre-activation blocks; each stage but the first halves the picture.

    A block that changes the shape takes its shortcut behind the first activation, as in the residual networks this
    one is the base of; :class:`zoo.tasks.classify.SmallResNet` takes it before.

    Args:
        num_classes: outputs.
        in_channels: channels of a picture.
        stem: channels of the stem.
        stages: channels of each stage.
        blocks: blocks a stage.
        act, norm: activation and normalisation, by registry name, dotted path or mapping, or a class.

    Shape:
        [B, in_channels, H, W] -> [B, num_classes].
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stem: int,
        stages: Sequence[int],
        blocks: int,
        act: ActivationSpec,
        norm: NormSpec,
    ) -> None:
        super().__init__()
        make_act, make_norm = factory("activation", act), factory("norm", norm)
        self.stem = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        body: list[nn.Module] = []
        before = stem
        for stage, after in enumerate(stages):
            for i in range(blocks):
                body.append(PreActBlock(before, after, 2 if stage and i == 0 else 1, make_act, make_norm))
                before = after
        self.blocks = nn.Sequential(*body)
        self.norm, self.act = make_norm(before), make_act()
        self.head = nn.Linear(before, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                _he_(layer, "fan_out")
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = self.act(self.norm(self.blocks(self.stem(images))))
        return self.head(features.mean((2, 3)))


class PreActBlock(nn.Module):
    """With a = act(norm(x)): shortcut(x or a) + conv(act(norm(conv(a))))."""

    def __init__(
        self, before: int, after: int, stride: int, act: Callable[..., nn.Module], norm: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.enter = nn.Sequential(norm(before), act())
        self.branch = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            norm(after),
            act(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
        )
        same = before == after and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        return (x if self.shortcut is None else self.shortcut(entered)) + self.branch(entered)


class WideResNet(PreActNet):
    """WRN-depth-width, with SiLU as the adversarial training of Gowal et al. has it; ReLU is `act=torch.nn.ReLU`.

    Args:
        num_classes: outputs.
        in_channels: channels of a picture.
        depth: layers, 6 n + 4.
        width: times 16, 32 and 64 channels.
        act, norm: activation and normalisation, by registry name, dotted path or mapping, or a class.

    Shape:
        [B, in_channels, H, W] -> [B, num_classes].

    Raises:
        ValueError: if `depth` is not 6 n + 4, or `width` below 1.

    Source:
        Zagoruyko and Komodakis, Wide Residual Networks, 2016, arXiv:1605.07146, table 1; Gowal et al., Uncovering the
        Limits of Adversarial Training, 2020, arXiv:2010.03593, for SiLU.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        depth: int = 28,
        width: int = 10,
        act: ActivationSpec = nn.SiLU,
        norm: NormSpec = nn.BatchNorm2d,
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WideResNet: depth must be 6 n + 4, e.g. 16, 28 or 34, got {depth}")
        if width < 1:
            raise ValueError(f"WideResNet: width must be at least 1, got {width}")
        stages = [16 * width, 32 * width, 64 * width]
        super().__init__(num_classes, in_channels, 16, stages, (depth - 4) // 6, act, norm)


class PreActResNet18(PreActNet):
    """Pre-activation ResNet-18 for small pictures: 3x3 stem, four stages of two blocks, no pooling before the last.

    Args:
        num_classes: outputs.
        in_channels: channels of a picture.
        act, norm: activation and normalisation, by registry name, dotted path or mapping, or a class.

    Shape:
        [B, in_channels, H, W] -> [B, num_classes].

    Source:
        He et al., Identity Mappings in Deep Residual Networks, 2016, arXiv:1603.05027, section 3.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        act: ActivationSpec = nn.ReLU,
        norm: NormSpec = nn.BatchNorm2d,
    ) -> None:
        super().__init__(num_classes, in_channels, 64, [64, 128, 256, 512], 2, act, norm)


BACKBONES: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "plain_cnn": PlainCNN,
    "small_vgg": SmallVGG,
    "preact_resnet18": PreActResNet18,
    "wide_resnet": WideResNet,
}


def build_backbone(
    spec: BackboneSpec,
    num_classes: int,
    in_channels: int,
    act: Callable[..., nn.Module] | None = None,
    norm: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """The network a config asks for.

    Args:
        spec: a name of :data:`BACKBONES` or of timm, a dotted path, `{name: ..., argument: value}` with a name of
            :data:`BACKBONES`, `{class_path: ..., init_args: {...}}`, or a callable. Other than timm's, it is called
            with the keywords `num_classes` and `in_channels`.
        num_classes, in_channels: of the data.
        act, norm: make an activation and a normalisation; handed on when given.

    Raises:
        ValueError: if neither we nor timm have a network of that name.
        UnknownComponentError: if a mapping's name or a path leads nowhere.
        ComponentArgumentError: if an argument is not one the network takes, or belongs to the classifier.
    """
    given: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    given |= {name: layer for name, layer in (("act", act), ("norm", norm)) if layer is not None}
    if callable(spec):
        return spec(**given)
    path, arguments = _path(spec)
    if path is None:
        return _timm_model(str(spec), num_classes, in_channels, act, norm)
    if twice := sorted(given.keys() & arguments):
        raise ComponentArgumentError(
            f"the backbone is given {' and '.join(twice)} by the classifier; say it there, as model.{twice[0]}"
        )
    # pyrefly: ignore[bad-argument-type]  # no kind of the registry: the word is for what it says
    return factory("backbone", {"class_path": path, "init_args": {**arguments, **given}})()


def _path(spec: str | Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Dotted path and arguments of the network; no path for a model of timm."""
    if isinstance(spec, str):
        if spec in BACKBONES:
            return _dotted(spec), {}
        import timm

        if timm.is_model(spec):
            return None, {}
        if "." in spec:
            return spec, {}
        known = [*BACKBONES, *timm.list_models()]
        raise ValueError(
            f"ImageClassifier: timm has no model {spec!r}.{did_you_mean(spec, known)} Ours are {', '.join(BACKBONES)}."
        )
    if not isinstance(spec, Mapping) or ("class_path" in spec) == ("name" in spec):
        raise ComponentArgumentError(f"a backbone is a name, or a mapping with either name or class_path, got {spec!r}")
    arguments = dict(spec)
    if "class_path" in arguments:
        path, more = arguments.pop("class_path"), dict(arguments.pop("init_args", None) or {})
        if arguments:
            raise ComponentArgumentError(
                f"a backbone given by class_path takes only init_args beside it, got {', '.join(map(repr, arguments))}"
            )
        return path, more
    name = arguments.pop("name")
    if name not in BACKBONES:
        raise UnknownComponentError(
            f"no backbone of ours is called {name!r}.{did_you_mean(str(name), BACKBONES)} Available:"
            f" {', '.join(BACKBONES)}. A model of timm goes by its name alone, any other class by class_path."
        )
    return _dotted(name), arguments


def _dotted(name: str) -> str:
    return f"{__name__}.{BACKBONES[name].__qualname__}"


def _timm_model(
    name: str,
    num_classes: int,
    in_channels: int,
    act: Callable[..., nn.Module] | None,
    norm: Callable[..., nn.Module] | None,
) -> nn.Module:
    import timm

    given: dict[str, Any] = {k: v for k, v in (("act_layer", act), ("norm_layer", norm)) if v is not None}
    if norm is not None and _is_evonorm(norm):
        # of layers with an activation inside, timm's factories know those of timm alone, but take any function
        given["norm_layer"] = lambda *args, **kwargs: norm(*args, **kwargs)
    return timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **given)


def _is_evonorm(norm: Callable[..., nn.Module]) -> bool:
    made = norm.func if isinstance(norm, partial) else norm
    return isinstance(made, type) and issubclass(made, EvoNorm)


@torch.no_grad()
def _he_(layer: nn.Conv2d | nn.Linear, mode: Literal["fan_in", "fan_out"]) -> None:
    nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
    if layer.bias is not None:
        layer.bias.zero_()


def _check_size(name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{name}: size must be at least 1, got {size}")


def _check_pictures(net: PlainCNN | MLP | SmallVGG, images: Tensor) -> None:
    expected = (net.in_channels, net.size, net.size)
    if tuple(images.shape[1:]) != expected:
        raise ValueError(
            f"{type(net).__name__} was made for pictures of {net.in_channels} x {net.size} x {net.size}, got"
            f" {' x '.join(map(str, images.shape[1:]))}; give it size= and the classifier in_channels= of the data"
        )
