"""Files of a ConvexModel: dictionaries of the authors' code, safetensors, half precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from tests._numerics import assert_close
from tests.splat.test_model import assert_same, noisy
from zoo.errors import DataError, UnknownComponentError
from zoo.hub import load, save
from zoo.splat.convex import ConvexModel


@pytest.fixture
def registered() -> Iterator[None]:
    """The catalog row that files name, if the catalog lacks it."""
    try:
        zoo.info("renderer", "convex_splat")
        yield
    except UnknownComponentError:
        target = f"{ConvexModel.__module__}:ConvexModel"
        zoo.registry.add(zoo.catalog.Component("convex_splat", "renderer", target, "convexes"))
        yield
        del zoo.registry._rows["renderer", "convex_splat"]
        zoo.registry._classes.pop(("renderer", "convex_splat"), None)


def official(n: int, k: int = 6, flat: bool = False) -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(3)
    shape = (n,) if flat else (n, 1)
    return {
        "convex_points": torch.randn(n, k, 3, generator=numbers),
        "delta": nn.Parameter(torch.randn(shape, generator=numbers)),
        "sigma": torch.randn(shape, generator=numbers),
        "features_dc": torch.randn(n, 1, 3, generator=numbers),
        "features_rest": torch.randn(n, 15, 3, generator=numbers),
        "opacity": torch.randn(shape, generator=numbers),
        "active_sh_degree": 3,
        "something_else": [1, 2],
    }


@pytest.mark.parametrize("flat", [False, True])
def test_official_dictionaries_are_read_raw(flat: bool, tmp_path: Path) -> None:
    given = official(5, flat=flat)
    torch.save(given, tmp_path / "convexes.pt")
    for source in (given, tmp_path / "convexes.pt", str(tmp_path / "convexes.pt")):
        model = ConvexModel.from_official(source)
        assert torch.equal(model.points, given["convex_points"])
        assert_close(model.delta.detach(), given["delta"].detach().flatten().exp())
        assert_close(model.sigma.detach(), given["sigma"].flatten().exp())
        assert_close(model.opacity.detach(), given["opacity"].flatten().sigmoid())
        assert torch.equal(model.colors, torch.cat([given["features_dc"], given["features_rest"]], 1))
        assert int(model.active_sh_degree) == 3
    with torch.no_grad():
        model = ConvexModel.from_official(given)
        model.points.zero_()
    assert given["convex_points"].any()  # the caller's own are not touched


def test_official_dictionaries_round_trip() -> None:
    model = noisy(4, k=5, sh_degree=2)
    model.one_up_sh_degree()
    written = model.to_official()
    assert {key: tuple(value.shape) for key, value in written.items() if isinstance(value, Tensor)} == {
        "convex_points": (4, 5, 3),
        "delta": (4, 1),
        "sigma": (4, 1),
        "opacity": (4, 1),
        "features_dc": (4, 1, 3),
        "features_rest": (4, 8, 3),
        "mask": (4, 1),
    }
    assert written["active_sh_degree"] == 1
    assert not any(isinstance(value, nn.Parameter) for value in written.values())
    assert_same(ConvexModel.from_official(written), model)
    written["convex_points"].zero_()  # a copy
    assert model.points.any()
    plane = noisy(2, sh_degree=0, planar=True)
    assert torch.equal(ConvexModel.from_official(plane.to_official()).points, plane.vertices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": None}, "there is no delta; found active_sh_degree"),
        (
            {"delta": torch.zeros(4, 1)},
            r"delta must be \[N\] or \[N, 1\] with the N = 5 of convex_points, got \[4, 1\]",
        ),
        ({"opacity": torch.zeros(5, 2)}, r"opacity must be \[N\] or \[N, 1\] with .* got \[5, 2\]"),
        ({"convex_points": torch.zeros(30, 3)}, r"convex_points must be \[N, K, 3\]"),
        ({"convex_points": torch.zeros(5, 9, 3)}, r"from_official: .*k must lie in \[3, 8\], got 9"),
        ({"features_dc": torch.zeros(5, 2, 3)}, r"features_dc must be \[N, 1, 3\]"),
        ({"features_rest": torch.zeros(5, 14, 3)}, "features_rest must hold .* got 14"),
        ({"active_sh_degree": 4}, r"active_sh_degree must be a whole number in \[0, 3\], got 4"),
        ({"active_sh_degree": "3"}, "active_sh_degree must be a whole number .* got '3'"),
        ({"sigma": [0.0] * 5}, "sigma must be a tensor of floating-point numbers, got list"),
        ({"sigma": torch.zeros(5, dtype=torch.int64)}, "floating-point numbers, got a tensor of torch.int64"),
    ],
)
def test_wrong_official_dictionaries_get_a_sentence(change: dict[str, Any], message: str) -> None:
    given = {key: value for key, value in {**official(5), **change}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        ConvexModel.from_official(given)


def test_files_that_are_no_dictionary_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a \.pt file, but there is none at"):
        ConvexModel.from_official(tmp_path / "absent.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match="must hold a dictionary, got list"):
        ConvexModel.from_official(tmp_path / "list.pt")


@pytest.mark.usefixtures("registered")
def test_safetensors_round_trip(tmp_path: Path) -> None:
    model = noisy(7, k=4, sh_degree=1, background=(1, 1, 1), reference_focal=33.3)
    model.prune(torch.arange(7) < 2)
    model.one_up_sh_degree()
    save(model, tmp_path / "a.safetensors", kind="renderer", name="convex_splat", kwargs=model.arguments())
    loaded = load(tmp_path / "a.safetensors")
    assert isinstance(loaded, ConvexModel)
    assert_same(loaded, model)
    assert repr(loaded) == repr(model)
    assert loaded.arguments() == model.arguments()
    assert torch.equal(loaded.get_buffer("background"), torch.ones(3))


@pytest.mark.usefixtures("registered")
def test_light_files_are_half_as_large_and_come_back_in_float32(tmp_path: Path) -> None:
    model = noisy(200, reference_focal=1111.1)
    model.set_active_sh_degree(3)
    save(model, tmp_path / "whole.safetensors", kind="renderer", name="convex_splat", kwargs=model.arguments())
    model.save_light(tmp_path / "light.safetensors")
    whole, light = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "light"))
    assert light < 0.53 * whole
    loaded = ConvexModel.load_light(tmp_path / "light.safetensors")
    assert int(loaded.active_sh_degree) == 3
    assert float(loaded.reference_focal) == float(model.reference_focal)
    for name, parameter in model.named_parameters():
        other = loaded.get_parameter(name)
        assert other.dtype is torch.float32
        assert torch.equal(other, parameter.detach().half().float()), name
        assert_close(other, parameter.detach(), like=torch.float16)
    assert model.points.dtype is torch.float32  # the model itself is left alone
    with torch.no_grad():
        model.points[0, 0, 0] = 70000
    with pytest.raises(ValueError, match="save_light: points must be finite and at most 65504 in size .* got 70000"):
        model.save_light(tmp_path / "light.safetensors")
    assert ConvexModel.load_light(tmp_path / "light.safetensors").num_convexes == 200  # the old file stays


def test_light_files_of_other_components_are_refused(tmp_path: Path) -> None:
    save(zoo.PolyReLU(), tmp_path / "other.safetensors", kind="activation", name="polyrelu")
    with pytest.raises(DataError, match="holds a PolyReLU, no ConvexModel"):
        ConvexModel.load_light(tmp_path / "other.safetensors")


@pytest.mark.parametrize("content", [b"hello", b"", b"PK\x03\x04 and no more"])
def test_a_file_that_holds_no_tensors_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"from_official: .*model.pt cannot be read as tensors .*give a .pt file"):
        ConvexModel.from_official(path)
