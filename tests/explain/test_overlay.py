"""Heat maps as pictures: golden pixels computed by hand, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.explain.colormaps import COLORMAPS, colormap
from zoo.explain.errors import CAMError
from zoo.explain.overlay import colorize, denormalize, grid, overlay

STEPS = torch.arange(256) / 255
LOW, HALF, HIGH = (48, 18, 59), (164, 252, 59), (122, 4, 2)  # turbo at 0, 1/2 and 1


def pixels(picture: Image.Image) -> Tensor:
    assert picture.mode == "RGB"
    return torch.from_numpy(np.array(picture))


def plain(level: int, height: int = 1, width: int = 1) -> Tensor:
    return torch.full((height, width, 3), level, dtype=torch.uint8)


def random_picture(*size: int) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", COLORMAPS)
def test_colour_maps_are_matplotlibs(name: str) -> None:
    of_matplotlib = matplotlib.colormaps[name]
    assert np.array_equal(colormap(name).numpy(), of_matplotlib(np.arange(256), bytes=True)[:, :3])
    values = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    values.view(-1)[:2] = torch.tensor([0.0, 1.0])
    expected = of_matplotlib(values.numpy(), bytes=True)[..., :3]
    assert np.array_equal(colorize(values, name).numpy(), expected)
    assert np.array_equal(colorize(values, of_matplotlib).numpy(), expected)


def test_any_colour_map_of_matplotlib_goes_by_name() -> None:
    few = matplotlib.colormaps["magma"].resampled(5)
    for cmap, table in (("magma", matplotlib.colormaps["magma"]), (few, few)):
        assert np.array_equal(colorize(STEPS, cmap).numpy(), table(STEPS.numpy(), bytes=True)[:, :3])


def test_drawing_needs_no_matplotlib() -> None:
    code = (
        "import sys, torch; from zoo.explain.overlay import grid\n"
        "grid(torch.rand(2, 3, 8, 8), torch.rand(2, 4, 4), ['a', 'b'])\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blend_by_hand() -> None:
    """100 and turbo, a quarter of it: (1 - 1/4) 100 + 1/4 heat, rounded."""
    image = plain(100, 1, 3)
    out = pixels(overlay(image, torch.tensor([[0.0, 0.5, 1.0]]), alpha=0.25))
    assert out.tolist() == [[[87, 80, 90], [116, 138, 90], [106, 76, 76]]]
    for pixel, heat in zip(out[0].tolist(), (LOW, HALF, HIGH), strict=True):
        assert pixel == [round(75 + c / 4) for c in heat]


def test_alpha_is_the_opacity_of_the_heat() -> None:
    image, heat = random_picture(6, 7, 3), torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixels(overlay(image, heat, alpha=0.0)), image)
    assert torch.equal(pixels(overlay(image, heat, alpha=1.0)), colorize(heat))
    between = 0.7 * image + 0.3 * colorize(heat)
    assert (pixels(overlay(image, heat, alpha=0.3)) - between).abs().max() <= 0.51


def test_a_map_without_evidence_tints_evenly() -> None:
    out = pixels(overlay(plain(200, 4, 4), torch.zeros(2, 2)))
    assert (out == torch.tensor([round(100 + c / 2) for c in LOW], dtype=torch.uint8)).all()


def test_the_map_is_resized_to_the_image() -> None:
    heat = torch.tensor([[0.0, 1.0]])
    out = pixels(overlay(plain(0, 1, 4), heat, alpha=1.0, cmap="gray"))
    assert out[0, :, 0].tolist() == [0, 64, 192, 255]  # of 256, 0, 1/4, 3/4 and all: cells, not corners, are aligned
    for size in ((3, 5), (40, 8), (64, 64)):
        large = torch.rand(size, generator=torch.Generator().manual_seed(0))
        expected = F.interpolate(large[None, None], (9, 12), mode="bilinear", align_corners=False)[0, 0]
        picture = overlay(plain(0, 9, 12), large, alpha=1.0)
        assert picture.size == (12, 9)
        assert torch.equal(pixels(picture), colorize(expected))


def test_blend_leaves_what_is_below_the_threshold() -> None:
    out = pixels(overlay(plain(100, 1, 3), torch.tensor([[0.49, 0.5, 1.0]]), alpha=1.0, threshold=0.5))
    assert out.tolist() == [[[100] * 3, list(HALF), list(HIGH)]]


def test_mask_by_hand() -> None:
    image, heat = plain(200, 1, 3), torch.tensor([[0.0, 0.25, 1.0]])
    assert pixels(overlay(image, heat, alpha=1.0, mode="mask"))[0, :, 0].tolist() == [0, 50, 200]
    assert pixels(overlay(image, heat, alpha=0.5, mode="mask"))[0, :, 0].tolist() == [100, 125, 200]
    assert pixels(overlay(image, heat, alpha=0.5, mode="mask", threshold=0.25))[0, :, 0].tolist() == [100, 200, 200]


def test_contour_by_hand() -> None:
    """A hot block of 3 x 3 keeps its middle; a hot edge of the picture has no line along it."""
    heat = torch.zeros(5, 7)
    heat[1:4, 1:4] = 0.6
    heat[:, 5:] = 1.0
    line = torch.tensor(
        [
            [0, 0, 0, 0, 0, 1, 0],
            [0, 1, 1, 1, 0, 1, 0],
            [0, 1, 0, 1, 0, 1, 0],
            [0, 1, 1, 1, 0, 1, 0],
            [0, 0, 0, 0, 0, 1, 0],
        ],
        dtype=torch.bool,
    )
    out = pixels(overlay(plain(9, 5, 7), heat, alpha=1.0, mode="contour"))
    assert (out[line] == torch.tensor(HALF, dtype=torch.uint8)).all()
    assert (out[~line] == 9).all()
    line[:, :4] = False
    high = pixels(overlay(plain(9, 5, 7), heat, alpha=0.5, mode="contour", threshold=0.8))
    half_way = [round(4.5 + c / 2) for c in colorize(torch.tensor(0.8)).tolist()]
    assert (high[line] - torch.tensor(half_way)).abs().max() <= 1
    assert (high[~line] == 9).all()


def test_lines_of_large_pictures_are_thicker() -> None:
    heat = torch.zeros(300, 300)
    heat[:, 100:] = 1.0
    out = pixels(overlay(plain(0, 300, 300), heat, alpha=1.0, mode="contour"))
    assert out[150].any(-1).nonzero().flatten().tolist() == [100, 101, 102]


def test_every_kind_of_image_is_taken() -> None:
    colour, heat = random_picture(5, 6, 3), torch.full((2, 2), 0.5)
    expected = pixels(overlay(colour, heat))
    opaque = torch.cat([colour, plain(255, 5, 6)[..., :1]], -1)
    reversed_twice = np.ascontiguousarray(colour.numpy()[:, ::-1])[:, ::-1]
    assert reversed_twice.strides[1] < 0
    read_only = colour.numpy().copy()
    read_only.setflags(write=False)
    first = colour.permute(2, 0, 1)
    floating = [first.to(dtype) / 255 for dtype in (torch.float32, torch.float64)]
    pil = [Image.fromarray(colour.numpy()), Image.fromarray(opaque.numpy())]
    for image in (
        first, colour.numpy(), reversed_twice, read_only, opaque, opaque.permute(2, 0, 1), *floating,
        floating[0].requires_grad_(), floating[1].numpy(), floating[0].permute(1, 2, 0), *pil,
    ):  # fmt: skip
        assert torch.equal(pixels(overlay(image, heat)), expected)

    grey = colour[..., 0]
    expected = pixels(overlay(grey[..., None].expand(-1, -1, 3), heat))
    pil = [Image.fromarray(grey.numpy()), Image.fromarray(grey.numpy()).convert("P")]
    for image in (grey, grey[None], grey[..., None], grey.numpy(), grey / 255.0, grey[None] / 255.0, *pil):
        assert torch.equal(pixels(overlay(image, heat)), expected)


def test_an_array_with_channels_at_either_end() -> None:
    both = random_picture(3, 5, 3)
    assert torch.equal(pixels(overlay(both, torch.zeros(1, 1), alpha=0)), both)
    assert torch.equal(pixels(overlay(both / 255.0, torch.zeros(1, 1), alpha=0)), both.permute(1, 2, 0))


def test_what_is_transparent_is_white() -> None:
    image = torch.tensor([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], dtype=torch.uint8)
    grey = Image.fromarray(image[..., [0, 3]].numpy(), "LA")
    for given in (image, Image.fromarray(image.numpy()), image.permute(2, 0, 1) / 255.0):
        assert pixels(overlay(given, torch.zeros(1, 1), alpha=0)).tolist() == [[[255] * 3, [10, 20, 30], [204] * 3]]
    assert pixels(overlay(grey, torch.zeros(1, 1), alpha=0))[0, :, 0].tolist() == [255, 10, 204]


def test_maps_of_any_floating_point_and_arrays() -> None:
    heat = torch.tensor([[0.0, 0.5], [0.25, 1.0]])
    expected = pixels(overlay(plain(50, 4, 4), heat))
    for given in (heat.double(), heat.bfloat16(), heat.numpy(), heat.clone().requires_grad_(), heat + 5e-6):
        assert torch.equal(pixels(overlay(plain(50, 4, 4), given)), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"map": torch.tensor([[0.0, float("nan")]])}, "the map has NaN; look at what it was made from"),
        ({"map": torch.tensor([[0.0, 3.5]])}, "the map must lie in [0, 1], got 0 to 3.5; divide it by its maximum"),
        ({"map": torch.tensor([[-0.5, 1.0]])}, "the map must lie in [0, 1], got -0.5 to 1;"),
        ({"map": torch.tensor([[float("inf")]])}, "the map must lie in [0, 1], got inf to inf;"),
        ({"map": torch.zeros(1, 2, 2)}, "overlay: the map must be [h, w], got (1, 2, 2)"),
        ({"map": torch.zeros(0, 2)}, "overlay: the map must be [h, w], got (0, 2)"),
        ({"alpha": 1.5}, "overlay: alpha is an opacity in [0, 1], got 1.5"),
        ({"alpha": float("nan")}, "overlay: alpha is an opacity in [0, 1], got nan"),
        ({"mode": "heat"}, "overlay: mode is blend, mask or contour, got 'heat'"),
        ({"threshold": 2}, "overlay: threshold must lie in [0, 1] as the map does, got 2"),
        ({"cmap": "tubro"}, "neither we nor matplotlib have a colour map 'tubro'. Did you mean 'turbo'"),
        ({"cmap": 3}, "cmap is a name or a colour map of matplotlib, got int"),
        ({"image": torch.randn(3, 4, 4) * 9}, "an image in floating point lies in [0, 1], got"),
        ({"image": torch.full((4, 4), float("nan"))}, "an image in floating point lies in [0, 1], got nan to nan"),
        (
            {"image": torch.zeros(4, 4, dtype=torch.int64)},
            "an image is uint8, or floating point in [0, 1], got torch.i",
        ),
        (
            {"image": torch.zeros(2, 5, 5)},
            "an image is [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, got (2,",
        ),
        ({"image": torch.zeros(1, 3, 4, 4)}, "with 1, 3 or 4 channels, got (1, 3, 4, 4)"),
        ({"image": Image.new("I;16", (4, 4))}, "an image of mode I;16 has no fixed range; convert it to 8 bits"),
        ({"image": Image.new("F", (4, 4))}, "an image of mode F has no fixed range; convert it to 8 bits a channel"),
    ],
)
def test_what_cannot_be_laid_over_is_said(given: dict, message: str) -> None:
    with pytest.raises(CAMError) as error:
        overlay(**{"image": plain(0, 4, 4), "map": torch.zeros(2, 2), **given})
    assert message in str(error.value)


def test_a_grid_lays_overlays_beside_their_image() -> None:
    images, maps = random_picture(2, 130, 140, 3), torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    picture = grid(images, maps, alpha=0.25, cmap="viridis", mode="contour", threshold=0.7)
    assert picture.size == (4 * 144 + 4, 2 * 134 + 4)
    out = pixels(picture)
    for i in range(2):
        tiles = [images[i], *(pixels(overlay(images[i], m, 0.25, "viridis", "contour", 0.7)) for m in maps[i])]
        for j, tile in enumerate(tiles):
            x, y = 4 + 144 * j, 4 + 134 * i
            assert torch.equal(out[y : y + 130, x : x + 140], tile)
            out[y : y + 130, x : x + 140] = 255
    assert (out == 255).all()  # between them, white


def test_a_grid_takes_one_map_an_image_and_lists() -> None:
    images, maps = random_picture(2, 130, 130, 3), torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(1))
    expected = pixels(grid(images, maps))
    assert expected.shape == (2 * 134 + 4, 2 * 134 + 4, 3)
    for given in (list(maps), [[m] for m in maps], maps[:, None], [m[None] for m in maps]):
        assert torch.equal(pixels(grid([Image.fromarray(i.numpy()) for i in images], given)), expected)


def test_a_grid_of_pictures_alone_is_nearly_square() -> None:
    images = list(random_picture(5, 128, 128, 3))
    assert grid(images).size == (3 * 132 + 4, 2 * 132 + 4)
    assert grid(images, cols=5).size == (5 * 132 + 4, 132 + 4)
    assert grid(images, cols=9).size == (5 * 132 + 4, 132 + 4)


def test_small_pictures_of_a_grid_are_enlarged_and_others_centred() -> None:
    small, large = random_picture(30, 60, 3), random_picture(200, 150, 3)
    out = pixels(grid([small, large]))
    assert out.shape == (208, 2 * 304 + 4, 3)
    enlarged = small.repeat_interleave(5, 0).repeat_interleave(5, 1)
    assert torch.equal(out[4 + 25 : 4 + 175, 4:304], enlarged)
    assert torch.equal(out[4:204, 308 + 75 : 308 + 225], large)


def test_titles_stand_over_their_tiles() -> None:
    images, maps = plain(0, 128, 128)[None].repeat(2, 1, 1, 1), torch.zeros(2, 4, 4)
    untitled, titled = grid(images, maps), grid(images, maps, ["image", "heat"])
    strip = (titled.height - untitled.height) // 2
    assert 11 < strip < 24
    out = pixels(titled).float()
    above = [out[4 + (132 + strip) * i :][: strip - 2, 4:] for i in range(2)]
    assert torch.equal(above[0], above[1])
    inks = [(255 - above[0][:, 132 * j : 132 * j + 128]).sum() for j in range(2)]
    assert min(inks) > 0
    assert inks[0] != inks[1]
    each = pixels(grid(images, maps, ["image", "heat", "image", "heat"])).float()
    assert torch.equal(each, out)
    blank = pixels(grid(images, maps, ["image", "", "", "heat"])).float()
    assert (blank[4 : 2 + strip, 136:264] == 255).all()


def test_a_title_that_is_too_long_is_cut() -> None:
    images = plain(255, 128, 128)[None].repeat(2, 1, 1, 1)
    out = pixels(grid(images, titles=["W" * 100, ""]))
    assert (out[:, 132:] == 255).all()
    assert (out[:, 100:132] < 255).any()
    assert torch.equal(pixels(grid(images, titles=["W" * 200, ""])), out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": []}, "grid: give at least one image"),
        ({"maps": torch.zeros(3, 2, 2)}, "grid: give the maps of each image, got 2 image(s) and 3 entries of maps"),
        ({"cols": 0}, "grid: cols must be at least 1, got 0"),
        (
            {"maps": [torch.zeros(1, 2, 2), torch.zeros(2, 2, 2)]},
            "grid: give every image the same number of maps, got [1, 2]",
        ),
        (
            {"maps": torch.zeros(2, 2, 2, 2), "titles": ["a"]},
            "grid: give 6 titles, one a tile, or 3 for every image, got 1",
        ),
    ],
)
def test_what_makes_no_grid_is_said(given: dict, message: str) -> None:
    with pytest.raises(CAMError) as error:
        grid(**{"images": [plain(0, 4, 4)] * 2, **given})
    assert str(error.value) == message


def test_denormalize_undoes_what_the_network_sees() -> None:
    picture = random_picture(2, 3, 5, 4)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    seen = (picture / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.equal(denormalize(seen, mean, std), picture)
    assert torch.equal(denormalize(seen[0].double(), torch.tensor(mean), list(std)), picture[0])
    assert torch.equal(denormalize((picture / 255 - 0.5) / 0.25, 0.5, 0.25), picture)
    assert denormalize(torch.tensor([[[-9.0, 9.0, 0.0]]]), 0.5, 1.0).tolist() == [[[0, 255, 128]]]
