"""ConvexModel: a scene of smooth convexes as parameters, and how it starts, grows, shrinks and is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import DataError
from .arguments import check_arguments, focal_length, mean_focal_length
from .geometry import regular_points
from .rendering import rasterization_convex
from .start import Start
from .storage import halved, official_dictionary, read_official

if TYPE_CHECKING:
    from .checks import Backend, NearMode, RenderMode

# Adam's rates, with eps 1e-15 and no weight decay: the authors' code, light profile; the supplement gives the same.
LEARNING_RATES: Mapping[str, float] = {
    "points": 5e-4,
    "log_delta": 5e-3,
    "log_sigma": 4.5e-3,
    "opacity_logit": 1e-2,
    "sh0": 2.5e-3,
    "shN": 1.25e-4,
    "mask": 1e-2,
}
# What the rate of the points has fallen to, log-linearly, after the 30,000 steps; not scaled by the size of the scene.
LAST_POINTS_LEARNING_RATE = 5e-6

# A convex whose sigmoid(mask) is no larger is not drawn (authors' code; epsilon in Lee et al.).
MASK_THRESHOLD = 0.01


class ConvexModel(nn.Module):
    """A scene of smooth convexes, each the hull of K points, rendered by :func:`zoo.splat.rasterization_convex`.

    A new model holds equal convexes around the origin; fill it by :meth:`initialise`, or build it by
    :meth:`from_points` or :meth:`from_official`. A state dictionary with any number of convexes loads into it.

    Parameters, all raw: `points` [N, K, 3], `log_delta` [N], `log_sigma` [N], `opacity_logit` [N], `sh0` [N, 1, 3] and
    `shN` [N, S - 1, 3] coefficients of spherical harmonics, S = (sh_degree + 1)^2, and `mask` [N], the logit of whether
    a convex is kept. Adam's rates for them are in `LEARNING_RATES`.

    Whatever changes N (:meth:`initialise`, :meth:`prune`, :meth:`set_parameters`, loading another N) puts new
    parameters under the same names: an optimizer that holds the old ones must be given the new ones, or built again.

    Args:
        num_convexes: N, 0 or more.
        k: points a convex, 3 to 8; 6 in the paper, where more gain nothing.
        sh_degree: highest degree of the harmonics, 0 to 4; 3 in the paper. 0 are in use until :meth:`one_up_sh_degree`.
        background: RGB behind everything, where `forward` is given no `backgrounds`; None for black.
        reference_focal: focal length in pixels that the scene is learned at, see :func:`zoo.splat.rasterization_convex`
            and :meth:`fit_reference_focal`; None for the published form.
        planar: convexes in the plane z = 1: `points` is [N, K, 2] and depth is 1. Needs sh_degree=0.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        viewmats [C, 4, 4], Ks [C, 3, 3] -> rgb [C, H, W, 3], alpha [C, H, W, 1].

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Held et al., "3D Convex Splatting: Radiance Field Rendering with 3D Smooth Convexes", 2025, arXiv:2411.14974,
        section 3; the mask is that of Lee et al., "Compact 3D Gaussian Representation", 2024, arXiv:2311.13681.

    Example:
        >>> model = ConvexModel.from_points(torch.tensor([[0.0, 0, 4], [1, 0, 5]]), torch.rand(2, 3))
        >>> model
        ConvexModel(num_convexes=2, k=6, sh_degree=3, 0.00056 MB)
        >>> {name: tuple(p.shape) for name, p in model.named_parameters() if name in ("points", "shN")}
        {'points': (2, 6, 3), 'shN': (2, 15, 3)}
    """

    points: nn.Parameter
    log_delta: nn.Parameter
    log_sigma: nn.Parameter
    opacity_logit: nn.Parameter
    sh0: nn.Parameter
    shN: nn.Parameter
    mask: nn.Parameter
    active_sh_degree: Tensor
    reference_focal: Tensor
    background: Tensor | None

    def __init__(
        self,
        num_convexes: int = 0,
        *,
        k: int = 6,
        sh_degree: int = 3,
        background: Sequence[float] | None = None,
        reference_focal: float | None = None,
        planar: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_arguments(num_convexes, k, sh_degree, background, planar)
        self.k, self.sh_degree, self.planar = k, sh_degree, planar
        for name, tail in self._tails().items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_convexes, *tail, device=device, dtype=dtype)))
        # Both numbers choose how forward runs, and reading them from a GPU would wait for it: it reads these instead.
        self._degree, self._focal = 0, focal_length(reference_focal)
        self._background = None if background is None else tuple(float(c) for c in background)
        self.register_buffer("active_sh_degree", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("reference_focal", torch.zeros((), dtype=torch.float32, device=device))
        behind = None if background is None else torch.empty(3, device=device, dtype=dtype)
        self.register_buffer("background", behind, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Equal grey convexes of radius 1 around the origin, and degree 0; the reference focal length stays."""
        self.points.copy_(regular_points(self.k, self.planar).to(self.points).expand_as(self.points))
        start = Start()
        self.log_delta.fill_(math.log(start.delta))
        self.log_sigma.fill_(math.log(start.sigma))
        self.opacity_logit.fill_(start.opacity_logit)
        self.sh0.zero_()
        self.shN.zero_()
        self.mask.fill_(1.0)
        self._degree = 0
        self._write_buffers()

    @classmethod
    def from_points(
        cls,
        xyz: Tensor,
        rgb: Tensor,
        *,
        k: int = 6,
        sh_degree: int = 3,
        size: float = 1.2,
        opacity: float = 0.1,
        delta: float = 0.1,
        sigma: float = 9.5e-4,
        min_radius: float | None = None,
        max_radius: float | None = None,
        random_orientation: bool | None = None,
        background: Sequence[float] | None = None,
        reference_focal: float | None = None,
        planar: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> ConvexModel:
        """A model with a convex at every point, see :meth:`initialise`; where `xyz` is, of its dtype or `dtype`.

        Example:
            >>> ConvexModel.from_points(torch.rand(9, 3), torch.rand(9, 3), sh_degree=0).num_convexes
            9
        """
        model = cls(
            k=k,
            sh_degree=sh_degree,
            background=background,
            reference_focal=reference_focal,
            planar=planar,
            device=xyz.device,
            dtype=dtype or xyz.dtype,
        )
        model.initialise(
            xyz,
            rgb,
            size=size,
            opacity=opacity,
            delta=delta,
            sigma=sigma,
            min_radius=min_radius,
            max_radius=max_radius,
            random_orientation=random_orientation,
            generator=generator,
        )
        return model

    def initialise(
        self,
        xyz: Tensor,
        rgb: Tensor,
        *,
        size: float = 1.2,
        opacity: float = 0.1,
        delta: float = 0.1,
        sigma: float = 9.5e-4,
        min_radius: float | None = None,
        max_radius: float | None = None,
        random_orientation: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Put a convex at every point of a cloud, in place of those there are, and start again from degree 0.

        A convex's points lie on a sphere of size r, or in the plane a circle, around its point of the cloud; r is the
        root of the mean squared distance to the three nearest others.

        Args:
            xyz: [N, 3] world coordinates; for a planar model [N, 2], or [N, 3] with z = 1.
            rgb: [N, 3] colours in [0, 1].
            size: radius over r (1.2, authors' code).
            opacity: in (0, 1) (0.1).
            delta: smoothness times r, > 0 (0.1).
            sigma: sharpness > 0 (9.5e-4, the light profile; it is for scenes in the units of COLMAP).
            min_radius, max_radius: bounds of r, before `size`. A single point has no neighbour: give it `min_radius`.
            random_orientation: turn each convex at random; None does for k = 3 alone, which is flat otherwise. Convexes
                of a planar model are never turned.
            generator: of those turns.

        Raises:
            ValueError, TypeError: if shapes, types or lengths do not fit, there is no point, or a number is not finite
                or out of range.
        """
        start = Start(size, opacity, delta, sigma, min_radius, max_radius, random_orientation)
        self.set_parameters(start.parameters(xyz, rgb, self.k, self.sh_degree, self.planar, generator))
        self.set_active_sh_degree(0)

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ConvexModel:
        """A model from a dictionary of the authors' code, or the `.pt` file that holds it.

        Args:
            source: with convex_points [N, K, 3], delta, sigma and opacity ([N, 1] or [N]), features_dc [N, 1, 3],
                features_rest [N, S - 1, 3], active_sh_degree, all raw, and perhaps a mask [N, 1] or [N]. Other keys are
                left alone. A file is read without running code of it.
            device: of the model.
            dtype: of the model; None takes that of convex_points.

        Raises:
            DataError: if there is no such file, a key is missing, or a shape does not fit.
        """
        values, degree = read_official(source)
        given, k, sh_degree = values["points"], values["points"].shape[1], math.isqrt(values["shN"].shape[1] + 1) - 1
        model = cls(len(given), k=k, sh_degree=sh_degree, device=device or given.device, dtype=dtype or given.dtype)
        model.set_parameters({"mask": model.mask.detach(), **values})
        model.set_active_sh_degree(degree)
        return model

    def to_official(self) -> dict[str, Any]:
        """The dictionary of :meth:`from_official`, copied: one number a convex is [N, 1]; the mask is among them."""
        values = {**dict(self.named_parameters()), "points": self.vertices}
        return official_dictionary(values, self._degree)

    def save_light(self, path: str | Path) -> None:
        """Write the model to a `.safetensors` file with its parameters in half precision, as the paper's light model.

        Read it with :meth:`load_light`. Coordinates keep 11 bits: half a thousandth of their distance from the origin.

        Raises:
            ValueError: if a number is not finite or above 65504, the largest of half precision.
        """
        from ...hub import save

        light = type(self)(**self.arguments(), device="meta")
        light.load_state_dict(halved(self.state_dict()), assign=True)
        save(light, path, kind="renderer", name="convex_splat", kwargs=self.arguments())

    @classmethod
    def load_light(cls, path: str | Path, device: torch.device | str = "cpu") -> ConvexModel:
        """The model of a file of :meth:`save_light`, in float32. Also reads what :func:`zoo.save` wrote.

        Raises:
            DataError: if the file holds another component.
            FileFormatError: if it is no such file.
        """
        from ...hub import load

        model = load(path, device)
        if not isinstance(model, cls):
            raise DataError(f"load_light: {path} holds a {type(model).__name__}, no ConvexModel; use zoo.load")
        return model.float()

    def arguments(self) -> dict[str, Any]:
        """What the constructor needs for a model of these shapes, as :func:`zoo.save` wants it."""
        return {
            "num_convexes": self.num_convexes,
            "k": self.k,
            "sh_degree": self.sh_degree,
            "background": None if self._background is None else list(self._background),
            "reference_focal": self._focal,
            "planar": self.planar,
        }

    @property
    def num_convexes(self) -> int:
        """N."""
        return len(self.points)

    @property
    def vertices(self) -> Tensor:
        """[N, K, 3] points in space, those of a planar model with z = 1."""
        return torch.cat([self.points, torch.ones_like(self.points[..., :1])], -1) if self.planar else self.points

    @property
    def delta(self) -> Tensor:
        """[N] smoothness, > 0."""
        return self.log_delta.exp()

    @property
    def sigma(self) -> Tensor:
        """[N] sharpness, > 0."""
        return self.log_sigma.exp()

    @property
    def opacity(self) -> Tensor:
        """[N] opacities in [0, 1], 0 where sigmoid(mask) <= 0.01; the gradient is that of sigmoid(mask) times each.

        What is not drawn gets no gradient from a picture: a convex once masked does not come back by itself.
        """
        kept = self.mask.sigmoid()
        straight_through = (kept > MASK_THRESHOLD).to(kept) + (kept - kept.detach())
        return self.opacity_logit.sigmoid() * straight_through

    @property
    def colors(self) -> Tensor:
        """[N, S, 3] coefficients of all degrees."""
        return torch.cat([self.sh0, self.shN], 1)

    def forward(
        self,
        viewmats: Tensor,
        Ks: Tensor,
        width: int,
        height: int,
        *,
        backgrounds: Tensor | None = None,
        render_mode: RenderMode = "RGB",
        near_plane: float = 0.01,
        far_plane: float = 1e10,
        radius_clip: float = 0.0,
        tile_size: int = 16,
        depth_grad: bool = True,
        near_mode: NearMode = "cull",
        rasterize_mode: str = "classic",
        absgrad: bool = False,
        backend: Backend = "auto",
    ) -> dict[str, Any]:
        """Render views of the scene; every option is explained at :func:`zoo.splat.rasterization_convex`.

        Args:
            viewmats: [C, 4, 4] world to camera, OpenCV axes.
            Ks: [C, 3, 3] pixels.
            width, height: of the pictures, pixels.
            backgrounds: [C, 3] colour behind everything; None for that of the model.
            render_mode: "RGB", "D", "ED", "RGB+D" or "RGB+ED".

        Returns:
            rgb [C, H, W, 3], not clamped to 1, or None in the modes of depth alone; alpha [C, H, W, 1]; depth
            [C, H, W, 1], or None in mode "RGB"; and meta, what the rasterizer found on its way.
        """
        if backgrounds is None and self.background is not None:
            backgrounds = self.background.expand(*viewmats.shape[:-2], 3)
        rendered, alpha, meta = rasterization_convex(
            self.vertices,
            self.delta,
            self.sigma,
            self.opacity,
            self.colors,
            viewmats,
            Ks,
            width,
            height,
            near_plane=near_plane,
            far_plane=far_plane,
            radius_clip=radius_clip,
            sh_degree=self._degree,
            tile_size=tile_size,
            backgrounds=backgrounds,
            render_mode=render_mode,
            reference_focal=self._focal,
            depth_grad=depth_grad,
            near_mode=near_mode,
            rasterize_mode=rasterize_mode,
            absgrad=absgrad,
            backend=backend,
        )
        rgb = rendered[..., :3] if render_mode.startswith("RGB") else None
        depth = None if render_mode == "RGB" else rendered[..., -1:]
        return {"rgb": rgb, "alpha": alpha, "depth": depth, "meta": meta}

    def set_active_sh_degree(self, degree: int) -> None:
        """Use harmonics up to a degree. Write the buffer by this alone: forward reads a copy of it.

        Raises:
            ValueError: if the model has no such degree.
        """
        if not 0 <= degree <= self.sh_degree:
            raise ValueError(
                f"set_active_sh_degree: degree must lie in [0, {self.sh_degree}], the model's sh_degree, got {degree}"
            )
        self._degree = int(degree)
        self._write_buffers()

    def one_up_sh_degree(self) -> None:
        """Use one degree of the harmonics more, up to the highest; every 1,000 steps in the paper."""
        self.set_active_sh_degree(min(self._degree + 1, self.sh_degree))

    def set_reference_focal(self, focal: float | None) -> None:
        """Set the focal length in pixels that the scene is learned at; None for the published form, stored as 0.

        Write the buffer by this alone: forward reads a copy of it.

        Raises:
            ValueError: if it is not a positive number.
        """
        self._focal = focal_length(focal)
        self._write_buffers()

    def fit_reference_focal(self, Ks: Tensor) -> None:
        """Set it to the geometric mean of sqrt(fx fy) of the training cameras, [V, 3, 3] in pixels.

        Raises:
            ValueError: if there is no camera or a focal length is not positive.
        """
        self.set_reference_focal(mean_focal_length(Ks))

    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Replace all parameters, with any number of convexes.

        Args:
            values: raw, for each parameter's name N rows. A parameter is taken as it is, for an optimizer that holds it
                already; another tensor becomes one on the device and of the dtype of the model.

        Raises:
            ValueError: if a name is missing or unknown, lengths differ, or a shape is not that of the model.
        """
        tails = self._tails()
        if set(values) != set(tails):
            raise ValueError(f"set_parameters: expected {', '.join(tails)}, got {', '.join(values) or 'none'}")
        n = len(values["points"])
        for name, tail in tails.items():
            if tuple(values[name].shape) != (n, *tail):
                raise ValueError(
                    f"set_parameters: {name} must be {[n, *tail]} beside {n} sets of points, got"
                    f" {list(values[name].shape)}; give every one as many rows"
                )
            old = self.get_parameter(name)
            if isinstance(values[name], nn.Parameter) and (values[name].dtype, values[name].device) != (
                old.dtype,
                old.device,
            ):
                raise ValueError(
                    f"set_parameters: the parameter {name} must be {old.dtype} on {old.device} as the model is, got"
                    f" {values[name].dtype} on {values[name].device}; give a tensor, which is converted"
                )
        for name in tails:
            value, old = values[name], self.get_parameter(name)
            if not isinstance(value, nn.Parameter):
                copied = value.detach().to(device=old.device, dtype=old.dtype, copy=True)
                value = nn.Parameter(copied, requires_grad=old.requires_grad)
            setattr(self, name, value)

    def prune(self, mask: Tensor) -> None:
        """Remove the convexes where `mask`, bool [N], is True. Parameters are replaced: see the class for optimizers.

        Raises:
            ValueError: if it is no such mask.
        """
        if mask.dtype is not torch.bool or tuple(mask.shape) != (self.num_convexes,):
            raise ValueError(
                f"prune: mask must be bool [{self.num_convexes}], True for convexes to remove, got {mask.dtype}"
                f" {list(mask.shape)}"
            )
        kept = ~mask.to(self.points.device)
        self.set_parameters(
            {name: nn.Parameter(p.detach()[kept], p.requires_grad) for name, p in self.named_parameters()}
        )

    def extra_repr(self) -> str:
        megabytes = sum(p.numel() * p.element_size() for p in self.parameters()) / 1e6
        planar = ", planar=True" if self.planar else ""
        shapes = f"num_convexes={self.num_convexes}, k={self.k}, sh_degree={self.sh_degree}{planar}"
        return f"{shapes}, {megabytes:.3g} MB"

    def _tails(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a convex's parameters, by name, in the order of registration."""
        return {
            "points": (self.k, 2 if self.planar else 3),
            "log_delta": (),
            "log_sigma": (),
            "opacity_logit": (),
            "sh0": (1, 3),
            "shN": ((self.sh_degree + 1) ** 2 - 1, 3),
            "mask": (),
        }

    @torch.no_grad()
    def _write_buffers(self) -> None:
        self.active_sh_degree.fill_(self._degree)
        self.reference_focal.fill_(self._focal or 0.0)
        if self.background is not None and self._background is not None:
            self.background.copy_(torch.tensor(self._background, device="cpu"))

    def _apply(self, fn: Any, recurse: bool = True) -> ConvexModel:
        super()._apply(fn, recurse)
        # Half precision has no 1111.1, and forward's copy keeps it: the buffer must not differ.
        if self.reference_focal.dtype is not torch.float32:
            self.reference_focal = torch.zeros_like(self.reference_focal, dtype=torch.float32)
            self._write_buffers()
        return self

    def _load_from_state_dict(  # pyrefly: ignore[bad-override]  # the rest is passed on as it comes
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Takes any number of convexes: parameters of another length are replaced before they are filled."""
        tails = self._tails()
        given = {name: state_dict.get(prefix + name) for name in tails}
        n = len(given["points"]) if isinstance(given["points"], Tensor) and given["points"].ndim else 0
        fits = all(isinstance(v, Tensor) and tuple(v.shape) == (n, *tails[name]) for name, v in given.items())
        if fits and n != self.num_convexes:
            for name, old in dict(self.named_parameters()).items():
                setattr(self, name, nn.Parameter(old.new_empty(n, *tails[name]), old.requires_grad))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if self.active_sh_degree.is_meta:
            return
        degree, focal = int(self.active_sh_degree), float(self.reference_focal)
        if 0 <= degree <= self.sh_degree:
            self._degree = degree
        else:
            errors = arguments[-1]
            errors.append(f"{prefix}active_sh_degree must lie in [0, {self.sh_degree}], got {degree}")
        self._focal = focal if 0 < focal < math.inf else None
        if self._background is not None:  # not in the state, and lost where the model was made on meta
            self.background = torch.tensor(self._background, dtype=self.points.dtype, device=self.points.device)
