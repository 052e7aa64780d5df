"""3D convex splatting as the formulas are written: one convex after the other, each over the whole picture.

The oracle of the tests and the slow side of the benchmarks. No tiles, no tricks, nothing shared with the other files;
every step is differentiated by autograd. A convex that is left out is never computed with, so nothing of it, not even
NaN, reaches a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_ALPHA = 0.99
LEAST_ALPHA = 1 / 255  # a convex is skipped at a pixel below this
LEAST_TRANSMITTANCE = 1e-4  # a pixel is finished before it falls below this
FLOOR = 1e-12  # of the two scales A and B
MOST_EXPONENT = 80.0  # of the sigmoid in float32
PIXEL_MARGIN = 1 / 64  # by which a box may miss a pixel's centre and still count it


@dataclass(frozen=True)
class Camera:
    """One view and the rules that it is taken by."""

    viewmat: Tensor  # [4, 4]
    K: Tensor  # [3, 3]
    width: int
    height: int
    near_plane: float = 0.01
    far_plane: float = 1e10
    radius_clip: float = 0.0
    reference_focal: float | None = None
    depth_grad: bool = True
    near_mode: str = "cull"


@dataclass(frozen=True)
class Footprint:
    """A convex that a camera sees. Vertices, lines and pixels are relative to `centre`, a constant."""

    centre: Tensor  # [2] projected mean of the points, pixels
    depth: Tensor  # []
    points2d: Tensor  # [K, 2] pixels; 0 for a point that is cut off
    vertices: Tensor  # [m, 2] of the hull, in its order
    lines: Tensor  # [m, 3] = A (n_u, n_v, c), from vertex j to vertex j + 1
    sharpness: Tensor  # [] = B
    radii: tuple[int, int]  # half extents of the box around all pixels with alpha >= 1/255, rounded up


def rasterization_convex_reference(
    points: Tensor,
    delta: Tensor,
    sigma: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    sh_degree: int | None = None,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    reference_focal: float | None = None,
    depth_grad: bool = True,
    near_mode: str = "cull",
    rasterize_mode: str = "classic",
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Render smooth convexes by a loop over cameras and convexes; arguments as of `rasterization_convex`.

    Args:
        points: [..., N, K, 3] world coordinates, float32 or float64.
        delta: [..., N] smoothness.
        sigma: [..., N] sharpness.
        opacities: [..., N].
        colors: [..., (C,) N, D], or with `sh_degree` [..., (C,) N, S, 3].
        viewmats: [..., C, 4, 4] world to camera.
        Ks: [..., C, 3, 3] pixels.
        width, height: of the pictures, pixels.
        near_plane, far_plane: depths that a convex must lie between.
        radius_clip: convexes whose box has no larger half side, in pixels, are left out.
        sh_degree: degrees of the harmonics that are used, 0 to 4; None for plain colors.
        backgrounds: [..., C, D], or None for 0.
        render_mode: "RGB", "D", "ED", "RGB+D" or "RGB+ED".
        reference_focal: focal length at which the parameters were learned, pixels.
        depth_grad: whether the depth that scales delta and sigma is differentiated.
        near_mode: "cull" or "clip".
        rasterize_mode: "classic".

    Returns:
        [..., C, H, W, X] colours, [..., C, H, W, 1] alphas, and means2d [..., C, N, 2], depths [..., C, N], points2d
        [..., C, N, K, 2], radii int32 [..., C, N, 2], hull_size int32 [..., C, N], all 0 where a convex is left out.

    Raises:
        NotImplementedError: for another `rasterize_mode`.

    Source:
        Held et al., 3D Convex Splatting, 2025, arXiv:2411.14974, section 3 and the supplement (scaling by depth).
    """
    if rasterize_mode != "classic":
        raise NotImplementedError(f"rasterization_convex_reference: only 'classic' is there, got {rasterize_mode!r}")
    leading, n, c = points.shape[:-3], points.shape[-3], viewmats.shape[-3]
    scenes = math.prod(leading)
    tail = 1 if sh_degree is None else 2
    if colors.ndim - tail == len(leading) + 1:  # the same for all cameras
        colors = colors.unsqueeze(len(leading)).expand(*leading, c, *colors.shape[len(leading) :])
    colors = colors.reshape(scenes, c, n, *colors.shape[-tail:])
    flat = [t.reshape(scenes, *t.shape[len(leading) :]) for t in (points, delta, sigma, opacities, viewmats, Ks)]
    pictures, alphas, metas = [], [], []
    for b in range(scenes):
        p, smooth, sharp, o, scene_viewmats, scene_Ks = (t[b] for t in flat)
        for i in range(c):
            camera = Camera(
                scene_viewmats[i],
                scene_Ks[i],
                width,
                height,
                near_plane,
                far_plane,
                radius_clip,
                reference_focal,
                depth_grad,
                near_mode,
            )
            behind = None if backgrounds is None else backgrounds.reshape(scenes, c, -1)[b, i]
            picture, alpha, meta = render_view(
                p, smooth, sharp, o, colors[b, i], camera, sh_degree, behind, render_mode
            )
            pictures.append(picture)
            alphas.append(alpha)
            metas.append(meta)

    def stacked(views: list[Tensor]) -> Tensor:
        return torch.stack(views).reshape(*leading, c, *views[0].shape)

    found: dict[str, Any] = {name: stacked([meta[name] for meta in metas]) for name in metas[0]}
    found |= {"width": width, "height": height, "n_cameras": c, "n_batches": scenes}
    return stacked(pictures), stacked(alphas), found


def render_view(
    points: Tensor,
    delta: Tensor,
    sigma: Tensor,
    opacities: Tensor,
    colors: Tensor,
    camera: Camera,
    sh_degree: int | None = None,
    background: Tensor | None = None,
    render_mode: str = "RGB",
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One scene seen by one camera.

    Args:
        points: [N, K, 3].
        delta, sigma, opacities: [N].
        colors: [N, D] or [N, S, 3].
        camera: the view.
        sh_degree: as above.
        background: [D] or None.
        render_mode: as above.

    Returns:
        [H, W, X], [H, W, 1] and what `view_meta` returns.
    """
    footprints: dict[int, Footprint] = {}
    for n in range(len(points)):
        found = footprint(points[n], delta[n], sigma[n], opacities[n], camera)
        if found is not None:
            footprints[n] = found
    meta = view_meta(footprints, points)
    # The key is the depth in float32 in every dtype; sorted() keeps the order of the index among equals.
    order = sorted(footprints, key=lambda n: footprints[n].depth.float().item())

    with_color, with_depth = render_mode.startswith("RGB"), render_mode.endswith("D")
    channels = (colors.shape[-1] if with_color else 0) + int(with_depth)
    values: dict[int, Tensor] = {}
    for n in order:
        parts = []
        if with_color:
            parts.append(colors[n] if sh_degree is None else seen_color(colors[n], points[n], camera, sh_degree))
        if with_depth:
            parts.append(footprints[n].depth[None])
        values[n] = torch.cat(parts)

    # Empty sums tie the picture to all inputs: what is not seen has gradient 0, also where nothing is.
    inputs = points, delta, sigma, opacities, colors, camera.viewmat
    nothing = points.new_zeros(channels) + sum(t[:0].sum() for t in inputs)
    picture, transmittance = composite(order, footprints, values, opacities, camera, nothing)
    alpha = 1 - transmittance[..., None]
    if with_color and background is not None:
        behind = torch.cat([background, background.new_zeros(int(with_depth))])  # nothing is behind the depth
        picture = picture + transmittance[..., None] * behind
    if render_mode.endswith("ED"):
        picture = torch.cat([picture[..., :-1], picture[..., -1:] / alpha.clamp(min=1e-10)], -1)
    return picture, alpha, meta


def composite(
    order: list[int],
    footprints: dict[int, Footprint],
    values: dict[int, Tensor],
    opacities: Tensor,
    camera: Camera,
    nothing: Tensor,
) -> tuple[Tensor, Tensor]:
    """Front to back, sum of values alpha T: [H, W, X] without the background, and the final T [H, W].

    Args:
        order: convexes from front to back.
        footprints: of each.
        values: [X] of each.
        opacities: [N].
        camera: the view.
        nothing: [X] zeros.
    """
    pixels = pixel_centres(camera, nothing)
    picture = nothing.expand(camera.height, camera.width, -1)
    transmittance = 1 + picture.sum(-1)  # ones, tied to the inputs as the picture is
    finished = torch.zeros_like(transmittance, dtype=torch.bool)
    for n in order:
        found = alpha_at(footprints[n], opacities[n], pixels)
        adds = ~finished & (found >= LEAST_ALPHA)
        finished = finished | (adds & (transmittance * (1 - found) < LEAST_TRANSMITTANCE))
        weighed = torch.where(adds & ~finished, found, 0.0)
        picture = picture + values[n] * (weighed * transmittance)[..., None]
        transmittance = transmittance * (1 - weighed)
    return picture, transmittance


def footprint(points: Tensor, delta: Tensor, sigma: Tensor, opacity: Tensor, camera: Camera) -> Footprint | None:
    """What a camera sees of one convex, None if that is nothing.

    Args:
        points: [K, 3] world.
        delta, sigma, opacity: [].
        camera: the view.
    """
    if not all(bool(t.isfinite().all()) for t in (points, delta, sigma, opacity)) or not 255 * opacity > 1:
        return None
    seen = to_camera(points, camera.viewmat)
    middle = to_camera(points.mean(0, keepdim=True), camera.viewmat)
    depth = middle[0, 2]
    # The centre decides in both modes: A and B are proportional to its depth, which has to be positive.
    if not camera.near_plane < depth < camera.far_plane:
        return None
    before = seen[:, 2] > camera.near_plane
    if not (before.any() if camera.near_mode == "clip" else before.all()):
        return None
    kept = clipped(seen, camera.near_plane)
    screen, centre = project(kept, camera.K), project(middle, camera.K)[0]
    relative = screen - centre.detach()
    if not relative.isfinite().all():
        return None
    vertices = relative[hull(relative)]
    if len(vertices) < 3 or not 0 < area(vertices) < math.inf:
        return None
    a, b = scales(depth, delta, sigma, camera)
    lines = a * line_forms(vertices)
    if not (lines.isfinite().all() and b.isfinite()):
        return None
    box = support_box(lines.tolist(), math.log(255 * opacity.item() - 1) / b.item())
    radii = None if box is None else box_radii(box, centre, camera)
    if radii is None or max(radii) <= camera.radius_clip:
        return None
    points2d = screen.new_zeros(len(points), 2)
    points2d[before] = screen[: int(before.sum())]
    return Footprint(centre, depth, points2d, vertices, lines, b, radii)


def to_camera(points: Tensor, viewmat: Tensor) -> Tensor:
    """R p + t: [K, 3] world to [K, 3] camera."""
    return points @ viewmat[:3, :3].T + viewmat[:3, 3]


def project(points: Tensor, K: Tensor) -> Tensor:
    """(fx x / z + cx, fy y / z + cy): [K, 3] camera to [K, 2] pixels."""
    x, y, z = points.unbind(-1)
    return torch.stack([K[0, 0] * x / z + K[0, 2], K[1, 1] * y / z + K[1, 2]], -1)


def clipped(points: Tensor, near: float) -> Tensor:
    """The points before the near plane, by index, then where edges from them to the others meet it.

    Their hull is the part of the polytope before the plane: its corners are corners of the polytope or lie on its
    edges, which are among all the segments.

    Args:
        points: [K, 3] camera.
        near: depth of the plane.

    Returns:
        [F + F G, 3] with F points before the plane and G behind it.
    """
    front, behind = points[points[:, 2] > near], points[~(points[:, 2] > near)]
    cuts = []
    for f in front:
        for g in behind:
            share = (near - f[2]) / (g[2] - f[2])
            cuts.append(f + share * (g - f))
    return torch.cat([front, torch.stack(cuts)]) if cuts else front


def hull(points: Tensor) -> list[int]:
    """Indices of the corners of the convex hull of [K, 2], positively oriented from the lowest (u, v).

    Monotone chain over the order (u, v, index); points on an edge are not corners, of equal points one is.
    """
    at = [tuple(p) for p in points.detach().tolist()]

    def turn(a: int, b: int, q: int) -> float:
        (au, av), (bu, bv), (qu, qv) = at[a], at[b], at[q]
        return (bu - au) * (qv - av) - (bv - av) * (qu - au)

    def chain(order: list[int]) -> list[int]:
        found: list[int] = []
        for k in order:
            while len(found) >= 2 and turn(found[-2], found[-1], k) <= 0:
                found.pop()
            found.append(k)
        return found

    order = sorted(range(len(at)), key=lambda k: (*at[k], k))
    lower, upper = chain(order), chain(order[::-1])
    return lower[:-1] + upper[:-1]


def area(vertices: Tensor) -> float:
    """Of a polygon [m, 2], positive with this orientation."""
    (u, v), (next_u, next_v) = vertices.detach().unbind(-1), vertices.detach().roll(-1, 0).unbind(-1)
    return (u * next_v - v * next_u).sum().item() / 2


def scales(depth: Tensor, delta: Tensor, sigma: Tensor, camera: Camera) -> tuple[Tensor, Tensor]:
    """A = d delta kappa and B = d sigma, both at least 1e-12; kappa = f_ref^2 / (fx fy)."""
    d = depth if camera.depth_grad else depth.detach()
    kappa: Tensor | float = 1.0
    if camera.reference_focal is not None:
        kappa = camera.reference_focal**2 / (camera.K[0, 0] * camera.K[1, 1]).detach()
    return (d * delta * kappa).clamp(min=FLOOR), (d * sigma).clamp(min=FLOOR)


def line_forms(vertices: Tensor) -> Tensor:
    """[m, 3] coefficients of L_j(q) = (b.v - a.v)(q.u - a.u) - (b.u - a.u)(q.v - a.v) in (q.u, q.v, 1).

    Edge j goes from vertex a = j to b = j + 1 of [m, 2]. Negative inside, in edge length times distance.
    """
    (au, av), (bu, bv) = vertices.unbind(-1), vertices.roll(-1, 0).unbind(-1)
    return torch.stack([bv - av, au - bu, bu * av - au * bv], -1)


def field(lines: Tensor, pixels: Tensor) -> Tensor:
    """phi = log sum_j exp(s_j) at pixels [..., 2] relative to the centre, with lines [m, 3]."""
    s = pixels[..., 0, None] * lines[:, 0] + pixels[..., 1, None] * lines[:, 1] + lines[:, 2]
    most = s.detach().amax(-1, keepdim=True)
    return most[..., 0] + (s - most).exp().sum(-1).log()


def alpha_at(seen: Footprint, opacity: Tensor, pixels: Tensor) -> Tensor:
    """min(0.99, o sigmoid(-B phi)) at absolute pixels [..., 2], differentiated as if there were no minimum."""
    t = seen.sharpness * field(seen.lines, pixels - seen.centre.detach())
    if t.dtype is torch.float32:
        t = t.clamp(-MOST_EXPONENT, MOST_EXPONENT)
    raw = opacity * torch.sigmoid(-t)
    return raw.detach().clamp(max=MOST_ALPHA) + (raw - raw.detach())


def pixel_centres(camera: Camera, like: Tensor) -> Tensor:
    """[H, W, 2] = (column + 0.5, row + 0.5)."""
    v = torch.arange(camera.height, dtype=like.dtype, device=like.device) + 0.5
    u = torch.arange(camera.width, dtype=like.dtype, device=like.device) + 0.5
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)


def support_box(lines: list[list[float]], limit: float) -> tuple[float, float, float, float] | None:
    """Extent (u0, u1, v0, v1) of the polygon s_j(q) <= limit, relative to the centre; None if it is empty.

    The farthest point in a direction e is the least a (limit - c_i) + b (limit - c_j) over all pairs of lines with
    e = a n_i + b n_j and a, b >= 0, by duality of linear programs.
    """
    farthest = []
    for e in ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)):
        bound = math.inf
        for i in lines:
            for j in lines:
                det = i[0] * j[1] - i[1] * j[0]
                size = math.hypot(i[0], i[1]) * math.hypot(j[0], j[1])
                # Nearly parallel lines meet too far away to bound anything, and only with noise.
                if not det > 1e-14 * size:
                    continue
                a, b = (e[0] * j[1] - e[1] * j[0]) / det, (i[0] * e[1] - i[1] * e[0]) / det
                if a >= 0 and b >= 0:
                    bound = min(bound, a * (limit - i[2]) + b * (limit - j[2]))
        farthest.append(bound)
    u0, u1, v0, v1 = -farthest[0], farthest[1], -farthest[2], farthest[3]
    return (u0, u1, v0, v1) if u0 <= u1 and v0 <= v1 else None


def box_radii(box: tuple[float, float, float, float], centre: Tensor, camera: Camera) -> tuple[int, int] | None:
    """Half extents of a box relative to a centre [2], in whole pixels; None if it has no pixel of the picture."""
    u, v = centre.tolist()
    u0, u1, v0, v1 = box
    for low, high, pixels in ((u + u0, u + u1, camera.width), (v + v0, v + v1, camera.height)):
        first, last = max(low - PIXEL_MARGIN - 0.5, -1.0), min(high + PIXEL_MARGIN - 0.5, float(pixels))
        if max(math.ceil(first), 0) > min(math.floor(last), pixels - 1):
            return None
    most = 2 * math.hypot(camera.width, camera.height)
    return math.ceil(min((u1 - u0) / 2, most)), math.ceil(min((v1 - v0) / 2, most))


def seen_color(coefficients: Tensor, points: Tensor, camera: Camera, degree: int) -> Tensor:
    """max(0, 0.5 + harmonics) of coefficients [S, 3], from the camera at -R^T t to the mean of points [K, 3]: [3]."""
    position = -camera.viewmat[:3, :3].T @ camera.viewmat[:3, 3]
    direction = points.mean(0) - position
    basis = harmonics(direction / direction.square().sum().sqrt(), degree)
    return (0.5 + basis @ coefficients[: len(basis)]).clamp(min=0.0)


def harmonics(direction: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics of a unit vector [3], in the order l = 0.., m = -l..l: [(degree + 1)^2].

    Y_lm = (-1)^m N_lm q_lm(z) times Im (x + iy)^|m| for m < 0 and Re (x + iy)^m for m > 0, q_lm being the m-th
    derivative of the Legendre polynomial P_l, by the recursion in l.
    """
    x, y, z = direction
    one = torch.ones_like(z)
    derivative: dict[tuple[int, int], Tensor] = {}
    around = [(one, torch.zeros_like(z))]  # (x + iy)^m
    for m in range(degree + 1):
        re, im = around[-1]
        around.append((re * x - im * y, re * y + im * x))
        derivative[m, m] = one * math.prod(range(1, 2 * m, 2))
        if m < degree:
            derivative[m + 1, m] = (2 * m + 1) * z * derivative[m, m]
        for degree_l in range(m + 2, degree + 1):
            previous, before = derivative[degree_l - 1, m], derivative[degree_l - 2, m]
            above = (2 * degree_l - 1) * z * previous - (degree_l + m - 1) * before
            derivative[degree_l, m] = above / (degree_l - m)
    found = []
    for degree_l in range(degree + 1):
        for m in range(-degree_l, degree_l + 1):
            n = abs(m)
            ratio = math.factorial(degree_l - n) / math.factorial(degree_l + n)
            scale = math.sqrt((2 * degree_l + 1) / (4 * math.pi) * ratio * (2 if m else 1))
            re, im = around[n]
            found.append((-1) ** n * scale * derivative[degree_l, n] * (im if m < 0 else re))
    return torch.stack(found)


def view_meta(footprints: dict[int, Footprint], points: Tensor) -> dict[str, Tensor]:
    """means2d [N, 2], depths [N], points2d [N, K, 2], radii int32 [N, 2], hull_size int32 [N]; 0 where not seen.

    Args:
        footprints: of the convexes that are seen.
        points: [N, K, 3].
    """
    n, k = points.shape[:2]
    means2d, depths = [points.new_zeros(2)] * n, [points.new_zeros(())] * n
    points2d, radii, hull_size = [points.new_zeros(k, 2)] * n, [(0, 0)] * n, [0] * n
    for at, seen in footprints.items():
        means2d[at], depths[at], points2d[at] = seen.centre, seen.depth, seen.points2d
        radii[at], hull_size[at] = seen.radii, len(seen.vertices)

    def stacked(rows: list[Tensor], *shape: int) -> Tensor:
        return torch.stack(rows) if rows else points.new_zeros(0, *shape)

    counts = torch.tensor(hull_size, dtype=torch.int32, device=points.device)
    sizes = torch.tensor(radii, dtype=torch.int32, device=points.device).reshape(n, 2)
    return {
        "means2d": stacked(means2d, 2),
        "depths": stacked(depths),
        "points2d": stacked(points2d, k, 2),
        "radii": sizes,
        "hull_size": counts,
    }
