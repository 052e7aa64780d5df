"""Files of a convex model: dictionaries of the authors' code, and parameters in half precision."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError
from .arguments import check_arguments

# Names in the authors' dictionaries, beside ours. All values are raw, before activation.
_OFFICIAL = {
    "points": "convex_points",
    "log_delta": "delta",
    "log_sigma": "sigma",
    "opacity_logit": "opacity",
    "sh0": "features_dc",
    "shN": "features_rest",
}
_MASK, _DEGREE = "mask", "active_sh_degree"
_SCALARS = ("log_delta", "log_sigma", "opacity_logit", "mask")  # one number a convex, which they keep as [N, 1]


def read_official(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Raw parameters by our names, and the active degree, of a dictionary of the authors' code.

    Args:
        source: the dictionary, or the `.pt` file that holds it. Keys it has beyond the known ones are left alone.

    Returns:
        points [N, K, 3], log_delta, log_sigma and opacity_logit [N], sh0 [N, 1, 3], shN [N, S - 1, 3] and, where the
        dictionary has one, mask [N], detached; and the degree.

    Raises:
        DataError: if there is no such file, it holds no dictionary, or a key is missing or shaped otherwise.
    """
    given = source if isinstance(source, Mapping) else _read(Path(source))
    missing = [key for key in (*_OFFICIAL.values(), _DEGREE) if key not in given]
    if missing:
        raise DataError(
            f"from_official: expected the keys {', '.join((*_OFFICIAL.values(), _DEGREE))}, but there is no"
            f" {', '.join(missing)}; found {', '.join(sorted(map(str, given))) or 'none'}"
        )
    names = _OFFICIAL | ({_MASK: _MASK} if _MASK in given else {})
    values = {name: _tensor(key, given[key]) for name, key in names.items()}
    _check_shapes(values, names)
    values |= {name: values[name].flatten() for name in _SCALARS if name in values}
    n, k = values["points"].shape[:2]
    highest = math.isqrt(values["shN"].shape[1] + 1) - 1
    if values["shN"].shape[1] != (highest + 1) ** 2 - 1:
        raise DataError(
            f"from_official: features_rest must hold (d + 1)^2 - 1 coefficients a convex, got {values['shN'].shape[1]};"
            " give all of a degree d"
        )
    try:
        check_arguments(n, k, highest, None, False)
    except ValueError as error:
        raise DataError(f"from_official: {error}") from None
    degree = given[_DEGREE]
    if isinstance(degree, Tensor) and degree.numel() == 1:
        degree = degree.item()
    if not isinstance(degree, int) or not 0 <= degree <= highest:
        raise DataError(f"from_official: {_DEGREE} must be a whole number in [0, {highest}], got {degree!r}; give one")
    return values, degree


def official_dictionary(values: Mapping[str, Tensor], degree: int) -> dict[str, Any]:
    """The reverse of :func:`read_official`: copies, numbers of one a convex as [N, 1]."""
    copies = {name: value.detach().clone() for name, value in values.items()}
    for name in _SCALARS:
        copies[name] = copies[name][:, None]
    return {key: copies[name] for name, key in _OFFICIAL.items()} | {_MASK: copies[_MASK], _DEGREE: degree}


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dictionary whose parameters are in half precision; reference_focal, one number, stays as it is.

    Raises:
        ValueError: if a number is too large for it.
    """
    light = {k: v.half() if v.is_floating_point() and k != "reference_focal" else v for k, v in state.items()}
    for name, value in light.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"save_light: {name} must be finite and at most {torch.finfo(torch.float16).max:g} in size to be stored"
                f" in half precision, got {state[name].abs().max():g}; use zoo.save, or scale the scene"
            )
    return light


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise DataError(f"from_official: expected a .pt file, but there is none at {path}; give the file itself")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise DataError(
            f"from_official: {path} cannot be read as tensors ({type(error).__name__}); give a .pt file as torch.save"
            " writes it"
        ) from error
    if not isinstance(found, Mapping):
        raise DataError(f"from_official: {path} must hold a dictionary, got {type(found).__name__}; give another file")
    return found


def _tensor(key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"from_official: {key} must be a tensor of floating-point numbers, got {what}; convert it")
    return value.detach()


def _check_shapes(values: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    n = len(values["points"]) if values["points"].ndim else 0
    tails = {"points": "[N, K, 3]", "sh0": "[N, 1, 3]", "shN": "[N, S - 1, 3]"}
    for name, value in values.items():
        shape = tuple(value.shape)
        if name in tails:
            fits = len(shape) == 3 and shape[2] == 3 and (name != "sh0" or shape[1] == 1)
        else:
            fits = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
        if not fits or shape[0] != n:
            raise DataError(
                f"from_official: {names[name]} must be {tails.get(name, '[N] or [N, 1]')} with the N = {n} of"
                f" {names['points']}, got {list(shape)}; give a whole dictionary"
            )
