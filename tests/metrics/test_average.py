"""What all metrics have in common: sums over batches and processes, images without a value, torchmetrics around it."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle
import pkgutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

from tests.metrics.cases import ALL, HIGHER_IS_BETTER, LOCALISE, arguments, pictures
from zoo import metrics
from zoo.metrics.average import ImageAverage

each = pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)


def _bad_heatmaps() -> torch.Tensor:
    """Two maps of five that say nothing, and one with infinity."""
    heatmaps = pictures()[1]
    heatmaps[0] = 0
    heatmaps[2, 1, 1] = torch.nan
    heatmaps[3, 0, 0] = torch.inf
    return heatmaps


@each
def test_class_is_the_mean_of_the_function(metric: type[ImageAverage]) -> None:
    made = metric()
    for part in (slice(0, 2), slice(2, 5)):
        made.update(*arguments(metric, part))
    values = ALL[metric](*arguments(metric))
    assert values.shape == (5,)
    assert values.dtype is torch.float64
    torch.testing.assert_close(made.compute(), values.mean().float())
    assert made.n_valid == 5
    assert made.n_invalid == 0
    assert made.higher_is_better is HIGHER_IS_BETTER[metric]
    assert made.is_differentiable is False
    made.reset()
    assert made.n_valid == 0


@each
def test_maps_that_say_nothing_are_counted_and_left_out(metric: type[ImageAverage]) -> None:
    made = metric()
    made.update(*arguments(metric, heatmaps=_bad_heatmaps()))
    values = ALL[metric](*arguments(metric, heatmaps=_bad_heatmaps()))
    assert values.isnan().tolist() == [True, False, True, True, False]
    torch.testing.assert_close(values[[1, 4]], ALL[metric](*arguments(metric))[[1, 4]])
    assert made.n_invalid == 3
    torch.testing.assert_close(made.compute(), values[[1, 4]].mean().float())


@each
def test_nothing_is_nan_with_one_warning_of_ours(metric: type[ImageAverage]) -> None:
    made = metric()
    with pytest.warns(
        UserWarning, match=f"{metric.__name__}: NaN, for no image had a value; 0 were left out"
    ) as caught:
        assert made.compute().isnan()
    assert len(caught) == 1
    made.update(*arguments(metric, slice(0, 0)))  # an empty batch
    made.update(*arguments(metric, slice(0, 1), heatmaps=_bad_heatmaps()))
    with pytest.warns(UserWarning, match="1 were left out, with maps of zeros") as caught:
        assert made.compute().isnan()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.update(*arguments(metric, slice(1, 2)))
        assert made.compute().isfinite()


@each
def test_copies_go_their_own_way(metric: type[ImageAverage]) -> None:
    made = metric()
    made.update(*arguments(metric))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        before = made.compute()
        assert torch.equal(other.compute(), before)
        other.update(*arguments(metric, heatmaps=_bad_heatmaps()))
        assert other.n_valid == 7
        assert made.n_valid == 5
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `tolerence`"):
        metric(tolerence=1)


@each
def test_call_gives_the_value_of_the_batch(metric: type[ImageAverage]) -> None:
    made = metric()
    first = made(*arguments(metric, slice(0, 2)))
    second = made(*arguments(metric, slice(2, 5)))
    torch.testing.assert_close(made.compute(), (2 * first + 3 * second) / 5)


@each
def test_updates_inside_inference_mode_go_on_outside(metric: type[ImageAverage]) -> None:
    made, plain = metric(), metric()
    with torch.inference_mode():
        made.update(*arguments(metric, slice(0, 2)))
    assert not made.total.is_inference()
    made.update(*arguments(metric, slice(2, 5)))
    made.total += 0  # as a plain state can
    plain.update(*arguments(metric))
    torch.testing.assert_close(made.compute(), plain.compute())


def test_metrics_of_a_collection_stay_apart() -> None:
    """torchmetrics shares the states of those that look alike after the first batch."""
    hit = torch.zeros(1, 4, 4)
    hit[0, 1, 1] = 1.0
    box = [torch.tensor([[1, 1, 2, 2]])]
    both = MetricCollection({"point": metrics.PointingGame(), "near": metrics.PointingGame(tolerance=2)})
    both.update(hit, box)
    both.update(hit.roll(1, 2), box)
    assert both.compute() == {"near": 1.0, "point": 0.5}
    games = MetricCollection([metric() for metric in list(LOCALISE)[:3]])
    games.update(hit, box)
    games.update(hit * 0.5 + hit.roll(1, 2) * 0.5, box)
    assert games.compute() == {"PointingGame": 1.0, "EnergyPointingGame": 0.75, "InstanceRecall": 1.0}


def _run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = {}
        for metric in ALL:
            made = metric()
            made.update(*arguments(metric, slice(0, 2) if rank == 0 else slice(2, 5), heatmaps=_bad_heatmaps()))
            late = metric()
            if rank == 1:  # a rank that had no batch takes part
                late.update(*arguments(metric))
            results[metric.__name__] = (made.compute(), late.compute(), made.n_invalid, late.n_valid)
        torch.save(results, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(_run, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for metric in ALL:
        one, whole = metric(), metric()
        one.update(*arguments(metric, heatmaps=_bad_heatmaps()))
        whole.update(*arguments(metric))
        for found in (first[metric.__name__], second[metric.__name__]):
            torch.testing.assert_close(found[0], one.compute())
            torch.testing.assert_close(found[1], whole.compute())
        assert (first[metric.__name__][2], second[metric.__name__][2]) == (1, 2)  # each its own again
        assert (first[metric.__name__][3], second[metric.__name__][3]) == (0, 5)


@pytest.mark.parametrize("module", [name for _, name, _ in pkgutil.iter_modules(metrics.__path__)])
def test_docstring_examples_run(module: str) -> None:
    found = importlib.import_module(f"zoo.metrics.{module}")
    result = doctest.testmod(found, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@each
def test_public_names_say_where_they_come_from(metric: type[ImageAverage]) -> None:
    for documented in (metric, ALL[metric]):
        text = documented.__doc__ or ""
        assert "is better" in text
        assert "Args:" in text
    assert "n_invalid" in (metric.__doc__ or "")
