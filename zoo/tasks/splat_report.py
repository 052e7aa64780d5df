"""Pictures of a fitted scene: held-out views beside their truth, and a ride around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..splat.cameras import camera_positions, look_at

_SIDE = 192  # pixels that a small picture is enlarged to
_GAIN = 4  # of the differences
_FRAMES, _MILLISECONDS = 48, 80


def draw_comparison(truth: Tensor, rendered: Tensor, path: Path) -> None:
    """A column a view: truth, rendering and four times their difference; pictures [V, H, W, 3] in [0, 1]."""
    difference = ((truth - rendered).abs() * _GAIN).clamp(0, 1)
    rows = [torch.cat(list(pictures), 1) for pictures in (truth, rendered, difference)]
    _image(torch.cat(rows, 0), _enlarged(truth.shape[1])).save(path)


def draw_orbit(render: Callable[[Tensor, Tensor], Tensor], viewmats: Tensor, K: Tensor, folder: Path) -> None:
    """`orbit.gif`: the scene from cameras on a circle as far and as high as the given ones.

    Args:
        render: viewmats [1, 4, 4] and Ks [1, 3, 3] to pictures [1, H, W, 3] in [0, 1].
        viewmats: [V, 4, 4] of the training views.
        K: [3, 3] of one.
        folder: where the file goes.
    """
    frames = []
    for viewmat in ride_around(viewmats, _FRAMES):
        picture = render(viewmat[None], K[None])[0].cpu()
        frames.append(_image(picture, _enlarged(picture.shape[0])))
    frames[0].save(folder / "orbit.gif", save_all=True, append_images=frames[1:], duration=_MILLISECONDS, loop=0)


def ride_around(viewmats: Tensor, count: int) -> Tensor:
    """Cameras [count, 4, 4] on the circle around what the given ones [V, 4, 4] look at.

    The middle is the point nearest to all optical axes, up is the mean of their up, and radius and height are means,
    too.
    """
    places = camera_positions(viewmats)
    axes, up = viewmats[:, 2, :3], -viewmats[:, 1, :3].mean(0)
    up = up / up.norm()
    across = torch.eye(3).to(axes) - axes[:, :, None] * axes[:, None, :]
    # Parallel axes have no nearest point: the least squares solution of smallest norm then does.
    system, right = across.sum(0), (across @ places[:, :, None]).sum(0)
    middle = (torch.linalg.pinv(system) @ right).squeeze(-1)
    arms = places - middle
    height = (arms @ up).mean()
    flat = arms - (arms @ up)[:, None] * up
    radius = flat.norm(dim=-1).mean()
    first = flat[0] / flat[0].norm()
    second = torch.linalg.cross(up, first)
    angles = torch.arange(count).to(places) * (2 * math.pi / count)
    eyes = middle + height * up + radius * (angles.cos()[:, None] * first + angles.sin()[:, None] * second)
    return look_at(eyes, middle, up)


def _enlarged(side: int) -> int:
    return max(1, _SIDE // side)


def _image(picture: Tensor, times: int) -> Image.Image:
    pixels = (picture * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(np.repeat(np.repeat(pixels, times, 0), times, 1))
