"""ConvexModel: start values, activations, changes of N, state dictionaries, calls of the rasterizer."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests._numerics import assert_close
from zoo.splat.convex import ConvexModel, rasterization_convex
from zoo.splat.convex.geometry import regular_points
from zoo.splat.convex.model import LEARNING_RATES, MASK_THRESHOLD

NAMES = ["points", "log_delta", "log_sigma", "opacity_logit", "sh0", "shN", "mask"]
VIEW, K = torch.eye(4)[None], torch.tensor([[[20.0, 0, 8], [0, 20, 8], [0, 0, 1]]])


def cloud(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Places in front of the camera, and colours."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(n, 6, generator=generator, dtype=torch.float64).to(dtype)
    return numbers[:, :3] * torch.tensor([1.0, 1, 1], dtype=dtype) + torch.tensor(
        [-0.5, -0.5, 3], dtype=dtype
    ), numbers[:, 3:]


def noisy(n: int, seed: int = 0, **arguments: Any) -> ConvexModel:
    """A model in which no two numbers are alike."""
    model = ConvexModel(n, **arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    state, wanted = model.state_dict(), other.state_dict()
    assert list(state) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(state[name], value), name
        assert state[name].dtype is value.dtype


def test_parameters_have_the_golden_names_and_shapes() -> None:
    model = ConvexModel(5, k=4, sh_degree=2)
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        "points": (5, 4, 3),
        "log_delta": (5,),
        "log_sigma": (5,),
        "opacity_logit": (5,),
        "sh0": (5, 1, 3),
        "shN": (5, 8, 3),
        "mask": (5,),
        "active_sh_degree": (),
        "reference_focal": (),
    }
    assert sum(p[0].numel() for p in ConvexModel(1).parameters()) == 69 + 1  # section 1: 69 and the mask
    assert list(LEARNING_RATES) == NAMES


@pytest.mark.parametrize("k", [3, 4, 6, 8])
def test_a_new_model_holds_the_sphere_of_the_paper(k: int) -> None:
    model = ConvexModel(2, k=k, dtype=torch.float64)
    for index in range(k):
        z = 1 - 2 * index / (k - 1)
        across, angle = math.sqrt(max(0, 1 - z * z)), math.pi * (3 - math.sqrt(5)) * index
        wanted = torch.tensor([across * math.cos(angle), across * math.sin(angle), z], dtype=torch.float64)
        assert_close(model.points.detach()[1, index], wanted, loose=10)
    assert_close(model.opacity.detach(), torch.full((2,), 0.1, dtype=torch.float64))
    assert_close(model.sigma.detach(), torch.full((2,), 9.5e-4, dtype=torch.float64))
    assert_close(model.delta.detach(), torch.full((2,), 0.1, dtype=torch.float64))
    assert torch.equal(model.mask.detach(), torch.ones(2, dtype=torch.float64))
    assert not model.colors.any()


def test_start_values_of_a_cloud_are_those_of_the_paper() -> None:
    # A regular tetrahedron with edge 2 sqrt(2): every neighbour is that far away, so r is that, too.
    xyz = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64) + 5
    rgb = torch.tensor([[0.0, 0.5, 1]] * 4, dtype=torch.float64)
    model = ConvexModel.from_points(xyz, rgb)
    r = 2 * math.sqrt(2)
    assert model.points.dtype is torch.float64
    assert_close(model.points.detach(), xyz[:, None] + 1.2 * r * regular_points(6), loose=10)
    assert_close(model.delta.detach(), torch.full((4,), 0.1 / r, dtype=torch.float64), loose=10)
    assert_close(model.sigma.detach(), torch.full((4,), 9.5e-4, dtype=torch.float64), loose=10)
    assert_close(0.5 + model.sh0.detach()[:, 0] * math.sqrt(1 / (4 * math.pi)), rgb, loose=10)
    assert not model.shN.any()
    assert int(model.active_sh_degree) == 0


def test_bounds_of_the_radius_come_before_its_size_and_reach_delta() -> None:
    xyz, rgb = torch.tensor([[0.0, 0, 0], [3, 0, 0], [100, 0, 0]]), cloud(3)[1]
    model = ConvexModel.from_points(xyz, rgb, size=2.0, delta=0.3, min_radius=80.0, max_radius=90.0)
    radius = (model.points.detach() - xyz[:, None]).norm(dim=-1)
    wanted = torch.tensor([80.0, 80.0, 90.0])  # roots of (3^2 + 100^2) / 2, (3^2 + 97^2) / 2 and (97^2 + 100^2) / 2
    assert_close(radius, (2 * wanted)[:, None].expand(3, 6), loose=4)
    assert_close(model.delta.detach(), 0.3 / wanted, loose=4)
    alone = ConvexModel.from_points(xyz[:1], rgb[:1], min_radius=0.5)
    assert_close((alone.points.detach() - xyz[0]).norm(dim=-1), torch.full((1, 6), 0.6), loose=4)


def test_far_from_the_origin_a_small_sphere_keeps_its_shape() -> None:
    xyz = cloud(20)[0] * 0.05 + torch.tensor([512.0, 512.0, 512.0])
    model = ConvexModel.from_points(xyz, cloud(20)[1], max_radius=2.0**-8, size=1.0)
    wanted = (xyz.double()[:, None] + 2.0**-8 * regular_points(6)).float()  # rounded once
    assert torch.equal(model.points.detach(), wanted)


def test_triangles_are_turned_by_the_generator_and_others_are_not() -> None:
    xyz, rgb = cloud(6)
    made = [
        ConvexModel.from_points(xyz, rgb, k=3, generator=torch.Generator().manual_seed(seed)).points
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert not torch.equal((made[0] - xyz[:, None])[0], (made[0] - xyz[:, None])[1])
    directions = torch.nn.functional.normalize(ConvexModel.from_points(xyz, rgb).points.detach() - xyz[:, None], dim=-1)
    assert_close(directions, regular_points(6).float().expand(6, 6, 3), loose=20)


def test_initialise_replaces_what_there_was_and_keeps_dtype() -> None:
    model = noisy(3, dtype=torch.float64, reference_focal=50.0)
    model.set_active_sh_degree(2)
    xyz, rgb = cloud(7)
    model.initialise(xyz, rgb, opacity=0.5, sigma=0.1)
    assert model.num_convexes == 7
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert_close(model.opacity.detach(), torch.full((7,), 0.5, dtype=torch.float64))
    assert int(model.active_sh_degree) == 0
    assert float(model.reference_focal) == 50.0
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_the_mask_hides_but_still_learns() -> None:
    model = ConvexModel(3, dtype=torch.float64)
    limit = math.log(MASK_THRESHOLD / (1 - MASK_THRESHOLD))
    with torch.no_grad():
        model.mask.copy_(torch.tensor([1.0, limit + 1e-6, limit - 1e-6], dtype=torch.float64))
        model.opacity_logit.copy_(torch.tensor([0.0, 1, 2], dtype=torch.float64))
    raw = model.opacity_logit.detach().sigmoid()
    assert torch.equal(model.opacity.detach(), raw * torch.tensor([1.0, 1, 0], dtype=torch.float64))
    model.opacity.sum().backward()
    kept = model.mask.detach().sigmoid()
    assert model.mask.grad is not None
    assert model.opacity_logit.grad is not None
    assert_close(model.mask.grad, raw * kept * (1 - kept))
    assert_close(model.opacity_logit.grad, raw * (1 - raw) * torch.tensor([1.0, 1, 0], dtype=torch.float64))


def test_planar_convexes_lie_at_depth_one() -> None:
    model = ConvexModel.from_points(torch.tensor([[0.2, 0.1], [0.5, 0.0]]), cloud(2)[1], k=5, sh_degree=0, planar=True)
    assert tuple(model.points.shape) == (2, 5, 2)
    assert tuple(model.vertices.shape) == (2, 5, 3)
    assert torch.equal(model.vertices[..., 2], torch.ones(2, 5))
    r = math.sqrt(0.3**2 + 0.1**2)
    centres = torch.tensor([[0.2, 0.1], [0.5, 0.0]])
    assert_close((model.points.detach() - centres[:, None]).norm(dim=-1), torch.full((2, 5), 1.2 * r), loose=4)
    assert_close(model.points.detach().mean(1), centres, loose=4)
    same = ConvexModel.from_points(
        torch.tensor([[0.2, 0.1, 1], [0.5, 0.0, 1]]), cloud(2)[1], k=5, sh_degree=0, planar=True
    )
    assert torch.equal(same.points, model.points)
    # 6 points, delta, sigma, opacity and RGB (figure 6 of the paper), and the mask
    assert sum(p[0].numel() for p in ConvexModel(1, sh_degree=0, planar=True).parameters()) == 18 + 1


def test_prune_removes_where_true_and_replaces_parameters() -> None:
    model = noisy(5)
    model.sh0.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    old = model.points
    model.prune(torch.tensor([True, False, False, True, False]))
    assert model.num_convexes == 3
    assert [name for name, _ in model.named_parameters()] == NAMES
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][[1, 2, 4]]), name
        assert parameter.requires_grad is (name != "sh0")
    assert model.points is not old
    model.prune(torch.ones(3, dtype=torch.bool))
    assert model.num_convexes == 0


def test_set_parameters_copies_tensors_and_takes_parameters_as_they_are() -> None:
    model, other = ConvexModel(2), noisy(4)
    values: dict[str, Tensor] = {name: p.detach() for name, p in other.named_parameters()}
    values["points"] = other.points
    model.set_parameters(values)
    assert model.points is other.points
    assert_same(model, other)
    with torch.no_grad():
        values["mask"] += 1
    assert torch.equal(other.mask, model.mask + 1)


def test_set_parameters_refuses_a_parameter_of_another_type() -> None:
    model, other = ConvexModel(2), noisy(2, dtype=torch.float64)
    values = dict(other.named_parameters())
    with pytest.raises(
        ValueError, match=r"the parameter points must be torch.float32 on cpu as the model is, got torch"
    ):
        model.set_parameters(values)


@pytest.mark.parametrize("focal", [1e39, 1e-50, 1e300])
def test_a_focal_length_beyond_float32_is_refused(focal: float) -> None:
    with pytest.raises(ValueError, match="reference_focal must be a positive number of pixels or None, got"):
        ConvexModel(2, reference_focal=focal)


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_made_on_meta_has_its_background(assign: bool) -> None:
    saved = noisy(3, background=(1.0, 0.5, 0.0))
    model = ConvexModel(3, background=(1.0, 0.5, 0.0), device="meta")
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(saved.state_dict(), assign=assign)
    assert model.background is not None
    assert model.background.tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("n", [0, 2, 9])
def test_state_of_any_number_of_convexes_loads(n: int, assign: bool) -> None:
    source, model = noisy(n, reference_focal=1111.1), noisy(4, seed=1)
    source.set_active_sh_degree(2)
    model.mask.requires_grad_(False)
    model.load_state_dict(source.state_dict(), assign=assign)
    assert_same(model, source)
    assert model.num_convexes == n
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert [p.requires_grad for p in model.parameters()] == [True] * 6 + [False]
    assert model.arguments() == source.arguments()
    model.one_up_sh_degree()
    assert int(model.active_sh_degree) == 3


def test_state_of_as_many_convexes_keeps_the_parameters_of_an_optimizer() -> None:
    source, model = noisy(4), noisy(4, seed=1)
    before = dict(model.named_parameters())
    model.load_state_dict(source.state_dict())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_state_loads_as_a_part_of_another_module() -> None:
    source, whole = nn.Sequential(nn.Identity(), noisy(6)), nn.Sequential(nn.Identity(), noisy(2, seed=1))
    whole.load_state_dict(source.state_dict())
    assert_same(whole, source)


def test_state_that_does_not_fit_changes_nothing() -> None:
    model = noisy(4)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="size mismatch for points"):
        model.load_state_dict({**noisy(7, k=5).state_dict(), "sh0": torch.zeros(7, 2, 3)})
    assert model.num_convexes == 4
    missing = noisy(7).state_dict()
    del missing["mask"]
    with pytest.raises(RuntimeError, match="size mismatch for points"):
        model.load_state_dict(missing, strict=False)
    uneven = noisy(7).state_dict()
    uneven["mask"] = uneven["mask"][:5]
    with pytest.raises(RuntimeError, match="size mismatch for points"):
        model.load_state_dict(uneven)
    assert model.num_convexes == 4
    assert torch.equal(model.points, before.points)
    broken = noisy(4).state_dict()
    broken["active_sh_degree"] = torch.tensor(7)
    with pytest.raises(RuntimeError, match=r"active_sh_degree must lie in \[0, 3\], got 7"):
        model.load_state_dict(broken)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(copier: Any) -> None:
    model = noisy(3, background=(1, 1, 0.5), reference_focal=30.0)
    model.one_up_sh_degree()
    twin = copier(model)
    assert_same(twin, model)
    assert twin.arguments() == model.arguments()
    twin.prune(torch.tensor([True, False, False]))
    twin.one_up_sh_degree()
    assert (model.num_convexes, int(model.active_sh_degree)) == (3, 1)


def test_conversions_keep_the_focal_length_exact() -> None:
    model = noisy(3, reference_focal=1111.1)
    assert model.half().points.dtype is torch.float16
    assert model.reference_focal.dtype is torch.float32
    assert float(model.reference_focal) == model.arguments()["reference_focal"] == pytest.approx(1111.1, rel=1e-7)
    model.double()
    assert model.points.dtype is torch.float64
    assert model.reference_focal.dtype is torch.float32
    assert model.active_sh_degree.dtype is torch.int64
    assert noisy(2).to("meta").points.is_meta


def test_meta_model_is_filled_by_reset_parameters_or_a_file() -> None:
    model = ConvexModel(3, background=(1, 0, 0), device="meta").to_empty(device="cpu")
    model.reset_parameters()
    assert_same(model, ConvexModel(3))
    assert torch.equal(model.get_buffer("background"), torch.tensor([1.0, 0, 0]))
    with torch.device("meta"):
        empty = ConvexModel(2, reference_focal=9.0)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    source = noisy(5)
    source.one_up_sh_degree()
    empty.load_state_dict(source.state_dict(), assign=True)
    assert_same(empty, source)
    empty.one_up_sh_degree()
    assert int(empty.active_sh_degree) == 2


def test_degree_grows_up_to_the_highest() -> None:
    model = ConvexModel(1, sh_degree=2)
    degrees = []
    for _ in range(4):
        degrees.append(int(model.active_sh_degree))
        model.one_up_sh_degree()
    assert degrees == [0, 1, 2, 2]


def test_reference_focal_is_the_geometric_mean_of_the_cameras() -> None:
    model = ConvexModel(1)
    assert float(model.reference_focal) == 0
    assert model.arguments()["reference_focal"] is None
    Ks = torch.eye(3).repeat(2, 1, 1)
    Ks[0, 0, 0], Ks[0, 1, 1], Ks[1, 0, 0], Ks[1, 1, 1] = 10.0, 40.0, 80.0, 80.0
    model.fit_reference_focal(Ks)
    assert float(model.reference_focal) == pytest.approx(40.0)  # root of 20 x 80
    model.set_reference_focal(None)
    assert float(model.reference_focal) == 0


def test_repr_tells_how_many_how_made_and_how_large() -> None:
    assert repr(ConvexModel(1000)) == "ConvexModel(num_convexes=1000, k=6, sh_degree=3, 0.28 MB)"
    assert "planar=True" in repr(ConvexModel(2, sh_degree=0, planar=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 2}, r"k must lie in \[3, 8\], got 2"),
        ({"k": 9}, r"k must lie in \[3, 8\], got 9"),
        ({"sh_degree": -1}, r"sh_degree must lie in \[0, 4\], got -1"),
        ({"sh_degree": 5}, r"sh_degree must lie in \[0, 4\], got 5"),
        ({"num_convexes": -1}, "num_convexes must not be negative, got -1"),
        ({"planar": True}, "planar convexes have one colour, got sh_degree 3; pass sh_degree=0"),
        ({"background": (1.0, 1.0)}, "background must be 3 finite numbers"),
        ({"background": (1.0, 1.0, math.nan)}, "background must be 3 finite numbers"),
        ({"reference_focal": 0.0}, "reference_focal must be a positive number of pixels or None, got 0"),
        ({"reference_focal": math.nan}, "reference_focal must be a positive number of pixels or None, got nan"),
    ],
)
def test_wrong_arguments_of_the_constructor_get_a_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvexModel(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xyz": torch.rand(4, 2)}, r"xyz must be \[N, 3\] with a point or more, got \[4, 2\]"),
        ({"xyz": torch.rand(0, 3), "rgb": torch.rand(0, 3)}, r"with a point or more, got \[0, 3\]"),
        ({"rgb": torch.rand(5, 3)}, r"rgb must be \[4, 3\], a colour for each point of xyz, got \[5, 3\]"),
        ({"rgb": torch.rand(4, 4)}, r"rgb must be \[4, 3\]"),
        ({"xyz": torch.tensor([[math.nan, 0, 0]] * 2 + [[0, 0, math.inf], [0, 0, 0]])}, "finite, got 3 of 4 points"),
        ({"rgb": torch.full((4, 3), 200.0)}, r"rgb must lie in \[0, 1\], got 200 to 200; divide bytes by 255"),
        ({"rgb": torch.full((4, 3), math.nan)}, r"rgb must lie in \[0, 1\]"),
        ({"opacity": 1.0}, r"opacity must lie inside \(0, 1\), got 1.0"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"delta": -1.0}, "delta must be positive"),
        ({"size": math.inf}, "size must be positive and finite"),
        ({"min_radius": 2.0, "max_radius": 1.0}, "min_radius must not be above max_radius, got 2.0 and 1.0"),
    ],
)
def test_wrong_clouds_get_a_sentence_and_change_nothing(change: dict[str, Any], message: str) -> None:
    model = noisy(3)
    xyz, rgb = cloud(4)
    with pytest.raises(ValueError, match=message):
        model.initialise(**{"xyz": xyz, "rgb": rgb, **change})
    assert_same(model, noisy(3))


def test_wrong_types_and_calls_get_a_sentence() -> None:
    model = noisy(3)
    xyz, rgb = cloud(4)
    with pytest.raises(TypeError, match=r"rgb must be floating point, got torch.uint8; pass rgb.float\(\) / 255"):
        model.initialise(xyz, (255 * rgb).byte())
    with pytest.raises(ValueError, match="points of a planar model must have z = 1"):
        ConvexModel(planar=True, sh_degree=0).initialise(xyz, rgb)
    with pytest.raises(
        ValueError, match=r"mask must be bool \[3\], True for convexes to remove, got torch.int64 \[3\]"
    ):
        model.prune(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must be bool \[3\]"):
        model.prune(torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"degree must lie in \[0, 3\], the model's sh_degree, got 4"):
        model.set_active_sh_degree(4)
    with pytest.raises(ValueError, match=r"Ks must be \[V, 3, 3\]"):
        model.fit_reference_focal(torch.eye(3))
    with pytest.raises(ValueError, match="focal lengths in Ks must be positive"):
        model.fit_reference_focal(torch.zeros(1, 3, 3))
    values = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="set_parameters: expected points, .*, got points$"):
        model.set_parameters({"points": model.points})
    with pytest.raises(ValueError, match=r"mask must be \[3\] beside 3 sets of points, got \[2\]"):
        model.set_parameters({**values, "mask": values["mask"][:2]})
    assert_same(model, noisy(3))


def test_forward_is_the_rasterizer_on_activated_parameters() -> None:
    xyz, rgb = cloud(6)
    model = ConvexModel.from_points(xyz, rgb, sigma=0.1, opacity=0.6, reference_focal=40.0, background=(1, 0.5, 0))
    with torch.no_grad():
        model.shN += 0.1 * cloud(6 * 15)[1].view(6, 15, 3)
        model.mask[2] = -9.0
    for degree in range(2):
        model.set_active_sh_degree(degree)
        rendering = model(VIEW, K, 16, 12, render_mode="RGB+ED")
        wanted, alpha, _ = rasterization_convex(
            model.points,
            model.log_delta.exp(),
            model.log_sigma.exp(),
            model.opacity_logit.sigmoid() * (model.mask > -4),
            torch.cat([model.sh0, model.shN], 1),
            VIEW,
            K,
            16,
            12,
            sh_degree=degree,
            backgrounds=torch.tensor([[1.0, 0.5, 0]]),
            render_mode="RGB+ED",
            reference_focal=40.0,
        )
        assert torch.equal(rendering["rgb"], wanted[..., :3])
        assert torch.equal(rendering["depth"], wanted[..., 3:])
        assert torch.equal(rendering["alpha"], alpha)
        assert alpha.max() > 0.3
    assert tuple(rendering["rgb"].shape) == (1, 12, 16, 3)
    assert "sigmas" in rendering["meta"]
    black = model(VIEW, K, 16, 12, backgrounds=torch.zeros(1, 3))
    assert black["depth"] is None
    assert not torch.equal(black["rgb"], rendering["rgb"])
    depth = model(VIEW, K, 16, 12, render_mode="D")
    assert depth["rgb"] is None
    assert tuple(depth["depth"].shape) == (1, 12, 16, 1)


def test_every_parameter_learns() -> None:
    xyz, rgb = cloud(5)
    model = ConvexModel.from_points(xyz, rgb * 0.5 + 0.25, sigma=0.05, delta=0.02, opacity=0.5)
    model.set_active_sh_degree(3)
    rendering = model(VIEW, K, 16, 16)
    (rendering["rgb"] * cloud(256)[1].view(16, 16, 3)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_planar_model_renders_what_the_same_solid_one_does() -> None:
    plane = ConvexModel.from_points(
        torch.tensor([[0.0, 0.0]]), cloud(1)[1], sh_degree=0, planar=True, min_radius=0.3, sigma=0.1, opacity=0.9
    )
    solid = ConvexModel(1, sh_degree=0)
    solid.set_parameters({**dict(plane.named_parameters()), "points": plane.vertices})
    seen = plane(VIEW, K, 16, 16)
    assert torch.equal(seen["rgb"], solid(VIEW, K, 16, 16)["rgb"])
    assert seen["alpha"].max() > 0.5
    assert torch.equal(seen["meta"]["depths"], torch.ones(1, 1))


def test_an_empty_model_renders_its_background() -> None:
    rendering = ConvexModel(background=(0.25, 0.5, 1))(VIEW, K, 6, 4)
    assert torch.equal(rendering["rgb"], torch.tensor([0.25, 0.5, 1]).expand(1, 4, 6, 3))
    assert not rendering["alpha"].any()


def test_a_light_model_in_half_precision_renders_as_its_float32_form() -> None:
    xyz, rgb = cloud(5)
    model = ConvexModel.from_points(xyz, rgb, sigma=0.1, opacity=0.5).half()
    with torch.no_grad():
        seen = model(VIEW, K, 8, 8)["rgb"]
    assert seen.dtype is torch.float32
    assert seen.isfinite().all()


def test_forward_reads_no_buffer_and_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's own part; how the rasterizer compiles is for its tests."""

    def stand_in(points: Tensor, delta: Tensor, sigma: Tensor, *more: Any, **options: Any) -> Any:
        opacities, colors, viewmats, _, width, height = more
        shade = (points * (delta + sigma + opacities)[:, None, None]).mean((0, 1)) * viewmats.sum()
        shade = shade + options["sh_degree"] * colors.mean((0, 1)) + (options["reference_focal"] or 0)
        return shade.expand(1, height, width, 3), shade[:1].expand(1, height, width, 1), {}

    monkeypatch.setattr("zoo.splat.convex.model.rasterization_convex", stand_in)
    model = noisy(4, sh_degree=1)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for degree, focal in ((0, None), (1, None), (1, 25.0)):
        model.set_active_sh_degree(degree)
        model.set_reference_focal(focal)
        assert_close(compiled(VIEW, K, 8, 8)["rgb"], model(VIEW, K, 8, 8)["rgb"])


def test_docstring_examples_run() -> None:
    import doctest

    for thing in (ConvexModel, ConvexModel.from_points):
        (example,) = doctest.DocTestFinder(recurse=False).find(
            thing, thing.__name__, globs={"ConvexModel": ConvexModel, "torch": torch}
        )
        assert doctest.DocTestRunner().run(example).failed == 0
