"""The networks: sizes, initialisation, shapes, and how a classifier is told which one it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from zoo import PolyReLU
from zoo.errors import ComponentArgumentError, UnknownComponentError
from zoo.norms import EvoNorm2d
from zoo.tasks import MLP, ImageClassifier, PlainCNN, PreActResNet18, SmallVGG, WideResNet
from zoo.tasks.backbones import BACKBONES, PreActBlock, build_backbone


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("depth", "width", "millions"),
    [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (16, 8, 11.0), (22, 8, 17.2), (28, 10, 36.5)],
)
def test_wide_resnets_are_of_the_papers_size(depth: int, width: int, millions: float) -> None:
    """Zagoruyko and Komodakis, table 4."""
    with torch.device("meta"):
        assert round(parameters(WideResNet(10, depth=depth, width=width)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: WideResNet(10), 36_479_194),
        (lambda: PreActResNet18(10), 11_172_170),
        (lambda: MLP(10), 64 * 256 + 256 * 256 + 256 * 10 + 256 + 256 + 10),
        (lambda: SmallVGG(4), 27 * 16 + 144 * 32 + 288 * 64 + 576 * 64 + 2 * 176 + 1024 * 64 + 64 + 256 + 4),
        (lambda: PlainCNN(10, size=16), 27 * 32 + 288 * 64 + 576 * 64 + 1024 * 128 + 1280 + 32 + 64 + 64 + 128 + 10),
    ],
)
def test_parameters_are_counted(make: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        assert parameters(make()) == count


@pytest.mark.parametrize("size", [1, 6, 8, 15])
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_pictures_of_any_size_and_channels_are_taken(name: str, size: int) -> None:
    given = (
        {"size": size}
        if name in ("plain_cnn", "small_vgg", "mlp")
        else {"depth": 10, "width": 1}
        if name == "wide_resnet"
        else {}
    )
    net = build_backbone({"name": name, **given}, num_classes=7, in_channels=2).eval()
    assert net(torch.rand(2, 2, size, size)).shape == (2, 7)


@pytest.mark.parametrize("make", [PlainCNN, SmallVGG, MLP])
def test_pictures_of_another_shape_are_refused(make: type) -> None:
    net = make(10, in_channels=3, size=8)
    with pytest.raises(ValueError, match=f"{make.__name__} was made for pictures of 3 x 8 x 8, got 3 x 9 x 8; give it"):
        net(torch.rand(1, 3, 9, 8))


def test_plain_cnn_starts_as_the_recipe_has_it() -> None:
    net = PlainCNN(10, size=16)
    for layer in net.features:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
            assert not layer.bias.any()
    assert net.head.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert net.head.weight.abs().max() > 0.1  # normal: nn.Linear's own is uniform, and of nearly that deviation here
    assert not net.head.bias.any()
    assert [m.stride for m in net.features if isinstance(m, nn.Conv2d)] == [(1, 1), (2, 2), (2, 2)]


def test_the_last_map_of_a_small_vgg_is_fine_and_its_tail_not_linear() -> None:
    net = SmallVGG(4, size=64).eval()
    features = net.features(torch.rand(2, 3, 64, 64))
    assert features.shape == (2, 64, 16, 16)
    assert features.min() == 0  # behind an activation
    torch.testing.assert_close(net(x := torch.rand(2, 3, 64, 64)), net.head(net.pool(net.features(x))))

    def gradient(last: torch.Tensor) -> torch.Tensor:
        return torch.autograd.functional.jacobian(lambda a: net.head(net.pool(a))[0, 0], last)

    assert not torch.equal(gradient(torch.rand(1, 64, 16, 16)), gradient(torch.rand(1, 64, 16, 16)))


def test_a_small_vgg_takes_other_layers_and_widths() -> None:
    net = SmallVGG(5, in_channels=1, size=32, widths=[2, 3, 4, 6], hidden=7, act="torch.nn.GELU", norm="evonorm_b0")
    assert sum(isinstance(m, nn.GELU) for m in net.modules()) == 5
    assert [m.num_features for m in net.modules() if isinstance(m, EvoNorm2d)] == [2, 3, 4, 6]
    assert net(torch.rand(3, 1, 32, 32)).shape == (3, 5)


def test_residual_convolutions_keep_the_variance_of_gradients() -> None:
    net = WideResNet(10, depth=10, width=4)
    conv = net.blocks[0].branch[0]
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_a_block_that_changes_the_shape_takes_its_shortcut_behind_the_activation() -> None:
    block = PreActBlock(3, 5, 2, nn.ReLU, nn.BatchNorm2d).eval()
    block.branch[-1].weight.data.zero_()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(block(x), block.shortcut(block.enter[0](x).relu()))
    same = PreActBlock(3, 3, 1, nn.ReLU, nn.BatchNorm2d).eval()
    same.branch[-1].weight.data.zero_()
    torch.testing.assert_close(same(x), x)


def test_every_stage_but_the_first_halves_the_picture() -> None:
    for net, widths in ((PreActResNet18(10), [64, 128, 256, 512]), (WideResNet(10, depth=16, width=2), [32, 64, 128])):
        with torch.no_grad():
            x, shapes = net.stem(torch.rand(1, 3, 32, 32)), []
            for i, block in enumerate(net.blocks):
                x = block(x)
                if i % 2:
                    shapes.append((x.shape[1], x.shape[2]))
        assert shapes == [(width, 32 >> i) for i, width in enumerate(widths)]


def test_wide_resnet_has_silu_and_preact_resnet_relu() -> None:
    with torch.device("meta"):
        wide, preact = WideResNet(10), PreActResNet18(10)
        assert sum(isinstance(m, nn.SiLU) for m in wide.modules()) == 25
        assert sum(isinstance(m, nn.ReLU) for m in preact.modules()) == 17
        assert not any(isinstance(m, nn.SiLU) for m in preact.modules())


def test_the_classifiers_parts_reach_the_backbone() -> None:
    model = ImageClassifier(
        num_classes=4,
        in_channels=1,
        backbone={"name": "wide_resnet", "depth": 10, "width": 1},
        act="torch.nn.Identity",
        norm={"name": "evonorm_s0", "groups": 4},
    )
    assert sum(isinstance(m, EvoNorm2d) for m in model.modules()) == 7
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.SiLU)) for m in model.modules())
    assert isinstance(model.net, WideResNet)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    cnn = ImageClassifier(backbone={"name": "plain_cnn", "size": 8}, act={"name": "polyrelu", "order": 2})
    assert sum(isinstance(m, PolyReLU) for m in cnn.modules()) == 4


class Own(nn.Module):
    """A user's network."""

    def __init__(self, num_classes: int, in_channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.layer, self.scale = nn.Conv2d(in_channels, num_classes, 1), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.layer(x).mean((2, 3))


def test_any_class_goes_by_path_mapping_or_itself() -> None:
    path = f"{__name__}.Own"
    for spec, scale in ((path, 1.0), ({"class_path": path, "init_args": {"scale": 2.0}}, 2.0), (Own, 1.0)):
        net = ImageClassifier(num_classes=5, in_channels=2, backbone=spec).net
        assert isinstance(net, Own)
        assert (net.layer.in_channels, net.layer.out_channels, net.scale) == (2, 5, scale)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("plain_cn", ValueError, "timm has no model 'plain_cn'. Did you mean 'plain_cnn'"),
        (
            {"name": "wide_resne"},
            UnknownComponentError,
            "no backbone of ours is called 'wide_resne'. Did you mean 'wide_",
        ),
        ({"name": "resnet18"}, UnknownComponentError, "A model of timm goes by its name alone, any other class by"),
        ({"name": "mlp", "hiden": [3]}, ComponentArgumentError, "MLP has no argument 'hiden'. Did you mean 'hidden'?"),
        ({"name": "mlp", "num_classes": 3}, ComponentArgumentError, "is given num_classes by the classifier; say it"),
        ({"name": "mlp", "class_path": "a.B"}, ComponentArgumentError, "a mapping with either name or class_path"),
        ({"depth": 3}, ComponentArgumentError, "a mapping with either name or class_path, got {'depth': 3}"),
        ({"class_path": "torch.nn.Lin"}, UnknownComponentError, "no backbone at 'torch.nn.Lin': torch.nn has no 'Lin'"),
        ({"class_path": "torch.nn.ReLU"}, ComponentArgumentError, "torch.nn.ReLU has no argument 'num_classes'"),
        ({"class_path": "a.B", "size": 3}, ComponentArgumentError, "takes only init_args beside it, got 'size'"),
        (
            {"name": "wide_resnet", "depth": 27},
            ValueError,
            "WideResNet: depth must be 6 n + 4, e.g. 16, 28 or 34, got 27",
        ),
        ({"name": "wide_resnet", "width": 0}, ValueError, "WideResNet: width must be at least 1, got 0"),
        ({"name": "plain_cnn", "size": 0}, ValueError, "PlainCNN: size must be at least 1, got 0"),
        ({"name": "small_vgg", "size": 0}, ValueError, "SmallVGG: size must be at least 1, got 0"),
        (
            {"name": "small_vgg", "widths": [4, 4]},
            ValueError,
            "SmallVGG: widths must be four, and every width at least 1, got [4, 4] and hidden 64",
        ),
        ({"name": "small_vgg", "hidden": 0}, ValueError, "every width at least 1, got [16, 32, 64, 64] and hidden 0"),
        ({"name": "mlp", "hidden": [4, 0]}, ValueError, "MLP: every hidden width must be at least 1, got [4, 0]"),
    ],
)
def test_what_leads_nowhere_is_said(spec, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        ImageClassifier(backbone=spec)
    assert message in str(raised.value)


def test_a_norm_that_a_backbone_has_not_is_refused() -> None:
    with pytest.raises(ComponentArgumentError, match="PlainCNN has no argument 'norm'"):
        ImageClassifier(backbone="plain_cnn", norm="torch.nn.BatchNorm2d")


def test_a_checkpoint_builds_its_backbone_again(tmp_path: Path) -> None:
    model = ImageClassifier(
        num_classes=4, backbone={"name": "mlp", "size": 8, "hidden": [5]}, in_channels=1, mean=[0.5], std=[0.25]
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    pictures = torch.rand(3, 1, 8, 8)
    assert torch.equal(again(pictures), model(pictures))
