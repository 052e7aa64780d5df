"""Hulls of points on the screen, normals, and convexes around the points of a cloud."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEWEST_POINTS, MOST_POINTS = 3, 8  # of a convex
LEAST_SQUARE_RADIUS = 1e-7
_NEIGHBOURS = 3
_LEAF = 24  # at most so many points in a leaf of the k-d tree
_AT_ONCE = 2**16  # points that are searched for together


def convex_hull_2d(points: Tensor) -> tuple[Tensor, Tensor]:
    """Convex hulls of many small sets of points: monotone chain over the order (u, v, index).

    The hull is strictly convex: a point on an edge is no corner, and of equal points one is, unless all are equal. From
    corner a to the next corner b all points q have (b.u - a.u)(q.v - a.v) - (b.v - a.v)(q.u - a.u) >= 0. The first
    corner has the lowest (u, v).

    Args:
        points: [..., K, 2], floating point. Decisions are exact as far as the cross products are in this dtype.

    Returns:
        Indices of the corners, int64 [..., K], -1 behind the last; and their number, int64 [...], less than 3 where all
        points lie on a line. Where a coordinate is NaN both mean nothing.

    Raises:
        TypeError: if `points` is not floating point.
        ValueError: if its shape does not fit.

    Example:
        >>> square = torch.tensor([[0.0, 0], [2, 0], [1, 0], [2, 2], [0, 2]])
        >>> convex_hull_2d(square)
        (tensor([ 0,  1,  3,  4, -1]), tensor(4))

    Source:
        Andrew, Another Efficient Algorithm for Convex Hulls in Two Dimensions, 1979.
    """
    if not points.is_floating_point():
        raise TypeError(f"convex_hull_2d: points must be floating point, got {points.dtype}; convert with .float()")
    if points.ndim < 2 or points.shape[-1] != 2 or points.shape[-2] < 1:
        raise ValueError(f"convex_hull_2d: points must be [..., K, 2] with K >= 1, got {tuple(points.shape)}")
    leading, k = points.shape[:-2], points.shape[-2]
    flat = points.detach().reshape(-1, k, 2)
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()  # exact, and products of half types would not be
    by_v = torch.sort(flat[..., 1], dim=-1, stable=True).indices
    by_u = torch.sort(flat[..., 0].gather(-1, by_v), dim=-1, stable=True).indices
    order = by_v.gather(-1, by_u)  # [B, K]
    lower, lower_size = _chain(flat, order)
    upper, upper_size = _chain(flat, order.flip(-1))
    # Each chain ends where the other begins.
    first, size = lower_size - 1, lower_size + upper_size - 2
    at = torch.arange(k, device=flat.device).expand(len(flat), k)
    from_upper = upper.gather(-1, (at - first[:, None]).clamp(0, k - 1))
    corners = torch.where(at < first[:, None], lower, from_upper).masked_fill(at >= size[:, None], -1)
    return corners.reshape(*leading, k), size.reshape(leading)


def _chain(points: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The corners on one side, [B, K] indices and [B] how many, of points [B, K, 2] taken in the order [B, K]."""
    b, k = order.shape
    rows = torch.arange(b, device=points.device)
    chain, size = order.clone(), torch.zeros(b, dtype=torch.long, device=points.device)
    for step in range(k):
        following = points[rows, order[:, step]]
        for _ in range(step - 1):  # of the step points before it two stay, one as the other end of the first edge
            u1, v1 = points[rows, chain[rows, (size - 2).clamp(min=0)]].unbind(-1)
            u2, v2 = points[rows, chain[rows, (size - 1).clamp(min=0)]].unbind(-1)
            turn = (u2 - u1) * (following[:, 1] - v1) - (v2 - v1) * (following[:, 0] - u1)
            size = size - ((size >= 2) & (turn <= 0)).long()
        chain[rows, size] = order[:, step]
        size = size + 1
    return chain, size


def convex_normals(points: Tensor, campos: Tensor) -> Tensor:
    """Unit normals: the direction in which the points of a convex spread least, turned towards the camera.

    The eigenvector of the smallest eigenvalue of sum_k (p_k - c)(p_k - c)^T. Meant for flat convexes; where two
    eigenvalues are equal the direction is arbitrary and its gradient infinite.

    Args:
        points: [..., N, K, 3] world coordinates.
        campos: [..., 3] where the camera is; its leading axes broadcast with those of `points`.

    Returns:
        [..., N, 3], 0 where a point is not finite.

    Raises:
        ValueError: if a shape does not fit.

    Example:
        >>> square = torch.tensor([[[-1.0, -1, 4], [1, -1, 4], [1, 1, 4], [-1, 1, 4]]])
        >>> convex_normals(square, torch.zeros(3)).round().abs()  # towards the camera is -z
        tensor([[0., 0., 1.]])
    """
    if points.ndim < 3 or points.shape[-1] != 3 or campos.shape[-1:] != (3,):
        raise ValueError(
            "convex_normals: expected points [..., N, K, 3] and campos [..., 3], got"
            f" {tuple(points.shape)} and {tuple(campos.shape)}"
        )
    usable = points.isfinite().all(-1).all(-1)[..., None]  # [..., N, 1]
    points = torch.where(usable[..., None], points, 0.0)
    points = points if points.dtype in (torch.float32, torch.float64) else points.float()
    centre = points.mean(-2)
    arms = points - centre[..., None, :]
    normals = torch.linalg.eigh(arms.transpose(-1, -2) @ arms).eigenvectors[..., 0]
    facing = (normals * (campos[..., None, :] - centre)).sum(-1, keepdim=True).detach()
    return torch.where(usable, torch.where(facing < 0, -normals, normals), 0.0)


@torch.no_grad()
def convex_init_from_points(
    xyz: Tensor,
    k: int = 6,
    size: float = 1.2,
    random_orientation: bool | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Convexes around the points of a cloud: K points on a Fibonacci sphere of radius size * r.

    r is the root of the mean squared distance to the three nearest other points, of those there are if the cloud has
    fewer, and at least sqrt(1e-7), which is also the radius of a single point.

    Args:
        xyz: [N, 3] world coordinates, finite.
        k: points of a convex, 3 to 8.
        size: radius of the sphere over r, > 0 (1.2, the authors' code).
        random_orientation: whether each convex is turned at random. None for only those with k = 3, which would all be
            flat and upright.
        generator: of the random numbers; None for the global one.

    Returns:
        The points [N, K, 3] and r [N].

    Raises:
        TypeError: if `xyz` is not floating point.
        ValueError: if `xyz` is not [N, 3] or not finite, or k or size is out of range.

    Source:
        Held et al., 3D Convex Splatting, 2025, arXiv:2411.14974, section 3. The paper takes the mean distance, the
        authors' code the root of the mean square; we follow the code, to which the published numbers belong.
    """
    if not xyz.is_floating_point():
        raise TypeError(f"convex_init_from_points: xyz must be floating point, got {xyz.dtype}; convert with .float()")
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        raise ValueError(f"convex_init_from_points: xyz must be [N, 3], got {tuple(xyz.shape)}")
    if not FEWEST_POINTS <= k <= MOST_POINTS:
        raise ValueError(f"convex_init_from_points: k must be from {FEWEST_POINTS} to {MOST_POINTS}, got {k}")
    if not 0 < size < math.inf:
        raise ValueError(f"convex_init_from_points: size must be positive, got {size}")
    if not xyz.isfinite().all():
        raise ValueError("convex_init_from_points: xyz must be finite, got NaN or inf; remove such points first")
    if xyz.dtype not in (torch.float32, torch.float64):
        xyz = xyz.float()
    squares = _nearest_squares(xyz)
    exists = squares.isfinite()
    mean = torch.where(exists, squares, 0.0).sum(-1) / exists.sum(-1).clamp(min=1)
    radius = mean.clamp(min=LEAST_SQUARE_RADIUS).sqrt()
    arms = regular_points(k).to(xyz).expand(len(xyz), k, 3)
    if k == 3 if random_orientation is None else random_orientation:
        arms = arms @ _random_rotations(xyz, generator)
    return xyz[:, None] + size * radius[:, None, None] * arms, radius


def regular_points(k: int, planar: bool = False) -> Tensor:
    """K points spread over the unit sphere along a spiral, poles first and last, or at equal angles of the unit circle.

    Returns:
        float64 [K, 3], or [K, 2] in the plane, on the CPU.

    Source:
        Held et al., 2025, arXiv:2411.14974 (a Fibonacci sphere). The circle is ours, for convexes in a plane: the
        sphere's poles would lie inside, and be no corners.
    """
    index = torch.arange(k, dtype=torch.float64, device="cpu")  # also where the default device is meta
    if planar:
        angle = index * (2 * math.pi / k)
        return torch.stack([angle.cos(), angle.sin()], -1)
    z = 1 - 2 * index / (k - 1)
    angle = math.pi * (3 - math.sqrt(5)) * index
    across = (1 - z.square()).clamp(min=0).sqrt()
    return torch.stack([across * angle.cos(), across * angle.sin(), z], -1)


def _random_rotations(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """[N, 3, 3], uniform: of unit quaternions that are uniform on their sphere."""
    device = like.device if generator is None else generator.device
    q = torch.randn(len(like), 4, generator=generator, device=device, dtype=like.dtype).to(like.device)
    w, x, y, z = torch.nn.functional.normalize(q, dim=-1).unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
    rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
    rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return torch.stack(rows, -1).reshape(-1, 3, 3)


def _nearest_squares(xyz: Tensor) -> Tensor:
    """Squared distances to the three nearest other points, exact, inf for those there are not: [N, 3] to [N, 3]."""
    if not len(xyz):
        return xyz.new_zeros(0, _NEIGHBOURS)
    leaves = _leaves(xyz)
    absent = leaves < 0
    at = xyz[leaves].masked_fill(absent[..., None], math.inf)  # [leaves, M, 3]
    low, high = at.amin(1), at.masked_fill(absent[..., None], -math.inf).amax(1)
    lows, highs = [low], [high]
    while len(low) > 1:
        low, high = low.reshape(-1, 2, 3).amin(1), high.reshape(-1, 2, 3).amax(1)
        lows, highs = [low, *lows], [high, *highs]
    # Node 1 is the root, 2 i and 2 i + 1 are the children of node i; there is no node 0.
    boxes = torch.stack([torch.cat([lows[0], *lows]), torch.cat([highs[0], *highs])], 1)  # [nodes, 2, 3]
    found = torch.empty(len(xyz), _NEIGHBOURS, dtype=xyz.dtype, device=xyz.device)
    # In the order of the leaves neighbours are searched for together, and memory is read in order.
    for own in leaves[~absent].split(_AT_ONCE):
        found[own] = _search(xyz[own], own, leaves, at, boxes)
    return found


def _leaves(xyz: Tensor) -> Tensor:
    """Indices of the points in the leaves of a k-d tree split along longest sides: [leaves, M], -1 where none is."""
    n = len(xyz)
    levels = max(0, math.ceil(math.log2(n / _LEAF)))
    index = torch.full((1, -(-n // 2**levels) * 2**levels), -1, device=xyz.device)
    index[0, :n] = torch.arange(n, device=xyz.device)
    for _ in range(levels):
        absent = (index < 0)[..., None]
        at = xyz[index].masked_fill(absent, math.inf)  # [nodes, M, 3]
        axis = (at.masked_fill(absent, -math.inf).amax(1) - at.amin(1)).argmax(-1)  # [nodes]
        along = at.gather(-1, axis[:, None, None].expand(*index.shape, 1))[..., 0]
        order = along.argsort(-1)  # those that are absent come last
        index = index.gather(-1, order).reshape(2 * len(index), -1)
    return index


def _search(points: Tensor, own: Tensor, leaves: Tensor, at: Tensor, boxes: Tensor) -> Tensor:
    """Squared distances of points to their three nearest others: each walks down the tree, the nearer child first.

    Args:
        points: [P, 3].
        own: [P] their indices.
        leaves: [leaves, M] indices of the points in the tree.
        at: [leaves, M, 3] these points.
        boxes: [nodes, 2, 3] least and greatest coordinates of the nodes.

    Returns:
        [P, 3].
    """
    best = points.new_full((len(points), _NEIGHBOURS), math.inf)
    depth = len(leaves).bit_length()
    nodes = torch.ones(len(points), depth, dtype=torch.long, device=points.device)  # the root, and room for more
    gaps = torch.zeros(len(points), depth, dtype=points.dtype, device=points.device)
    waiting = torch.ones(len(points), dtype=torch.long, device=points.device)
    active = torch.arange(len(points), device=points.device)
    while len(active):  # host sync: how many walk on
        top = waiting[active] - 1
        waiting[active] = top
        node = nodes[active, top]
        is_near = gaps[active, top] < best[active, -1]
        walks = is_near & (node < len(leaves))
        rows, leaf = active[is_near & ~walks], node[is_near & ~walks] - len(leaves)
        squares = (points[rows, None] - at[leaf]).square().sum(-1)  # [rows, M], inf where there is no point
        squares = squares.masked_fill(leaves[leaf] == own[rows, None], math.inf)
        best[rows] = torch.cat([best[rows], squares], -1).topk(_NEIGHBOURS, largest=False).values

        rows, children = active[walks], 2 * node[walks, None] + torch.arange(2, device=points.device)  # [rows, 2]
        low, high = boxes[children].unbind(2)  # [rows, 2, 3]
        to_box = torch.maximum(low - points[rows, None], points[rows, None] - high).clamp(min=0).square().sum(-1)
        to_box, order = to_box.sort(-1, descending=True)
        children = children.gather(-1, order)
        place = waiting[rows]
        for child in range(2):
            nodes[rows, place + child], gaps[rows, place + child] = children[:, child], to_box[:, child]
        waiting[rows] = place + 2
        active = active[waiting[active] > 0]
    return best
