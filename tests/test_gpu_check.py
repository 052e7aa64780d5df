"""`scripts/gpu_check.py` where there is no GPU: its checks can fail, its clock and its record work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts import gpu_check
from scripts.bench import _gpu, comp_sum_gpu, evonorm_gpu, polycom_gpu
from zoo.kernels import launch
from zoo.kernels.sources import poly_relu_unit

CPU = torch.device("cpu")


class _Event:
    """A device clock that advances by a millisecond a reading."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.now += 1.0
        self.at = _Event.now

    def elapsed_time(self, other: _Event) -> float:
        return other.at - self.at


@pytest.fixture
def device_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_machine_without_a_gpu_gets_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.startswith("gpu_check needs a CUDA device")


def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polycom_gpu, "SHAPES", ((5, 3), (4, 1037), (0, 8)))


def test_every_check_passes_for_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    _small(monkeypatch)
    outcome = gpu_check.compare([polycom_gpu], CPU)
    assert outcome["checks"] == 4 * (3 * 2 + 5 + 1)
    assert outcome["failed"] == {}


def test_every_check_of_evonorm_passes_for_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evonorm_gpu, "SHAPES", ((2, 8, 5, 7), (3, 6, 1, 1)))
    outcome = gpu_check.compare([evonorm_gpu], CPU)
    assert outcome["checks"] == 4 * 2 * 2 * 2
    assert outcome["failed"] == {}


@pytest.mark.parametrize("name", ["evonorm_s", "evonorm_b"])
def test_wrong_kernel_of_evonorm_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evonorm_gpu, "SHAPES", ((2, 8, 5, 7),))
    right = getattr(evonorm_gpu, name)
    # one element of a tensor off by a thousandth of it
    monkeypatch.setattr(evonorm_gpu, name, lambda x, *a, **k: right(x, *a, **k) * (1 + 1e-2 * (x == x.max())))
    failed = gpu_check.compare([evonorm_gpu], CPU)["failed"]
    assert len(failed) == 8
    assert all(what.startswith(name) for what in failed)


def _few_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comp_sum_gpu, "SHAPES", ((5, 1), (9, 70), (2, 5, 3, 3)))


def test_every_check_of_comp_sum_passes_for_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    _few_losses(monkeypatch)
    outcome = gpu_check.compare([comp_sum_gpu], CPU)
    assert outcome["checks"] == 4 * (3 * 2 + 2)
    assert outcome["failed"] == {}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda right: lambda *a, **k: right(*a, **k) * (1 + 1e-4),
        lambda right: lambda scores, *a, **k: right(scores.nan_to_num(0.0, 9.0, -9.0), *a, **k),
    ],
    ids=["one part in ten thousand", "infinities made finite"],
)
def test_wrong_kernel_of_comp_sum_is_named(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _few_losses(monkeypatch)
    monkeypatch.setattr(comp_sum_gpu, "comp_sum_loss", wrong(comp_sum_gpu.comp_sum_loss))
    failed = gpu_check.compare([comp_sum_gpu], CPU)["failed"]
    assert len(failed) >= 4
    assert all(what.startswith("comp_sum") for what in failed)


def test_comp_sum_is_timed_beside_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comp_sum_gpu, "BENCHMARK_SHAPES", ((4, 64), (2, 3, 4, 4)))
    found = list(comp_sum_gpu.benchmarks())
    assert [b.moved for b in found] == [3 * n * e + 40 * rows for n, rows in ((256, 4), (96, 32)) for e in (2, 4)]
    assert [round(1 / b.target_ratios["cross_entropy"], 3) if b.target_ratios else None for b in found] == [
        0.55,
        0.55,
        None,
        None,
    ]
    for benchmark in found:
        inputs = benchmark.inputs(CPU)
        shapes = [call(inputs)[0].shape for name, call in benchmark.rivals.items() if name in ("ours", "cross_entropy")]
        assert shapes == [inputs[0].shape] * 2


def test_promises_of_a_ratio_are_judged(device_clock: None) -> None:
    def benchmark(least: float) -> _gpu.Benchmark:
        rivals = {"ours": lambda _: None, "theirs": lambda _: None}
        return _gpu.Benchmark(
            "op", {"shape": [1]}, 1, lambda _: None, rivals, target_ratios={"theirs": least, "gone": 1.0}
        )

    for least, met in ((1.0, True), (1.5, False)):
        result = _gpu.run(benchmark(least), CPU, 1e12, float("inf"))
        assert result["target_ratios"] == {"theirs": {"target": least, "met": met}}
        assert f"theirs {'met' if met else 'MISSED'} {least:.2f}x" in gpu_check.row(result)


def _far_too_large_an_eps(x: Tensor, *arguments: Tensor, **_: object) -> Tensor:
    return torch.ops.zoo.poly_norm(x.reshape(-1, x.shape[-1]), *arguments, 1e-3, True)[0].view_as(x)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("poly_norm", _far_too_large_an_eps),
        ("poly_norm_mul", lambda x, mul, weight, bias, scores: x * mul * scores[:, None] * weight.sum() + 0 * bias),
        ("poly_relu", lambda x, weight, bias=None: x * weight.sum() + (0 if bias is None else 0 * bias)),
    ],
)
def test_wrong_kernel_is_named(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _small(monkeypatch)
    monkeypatch.setattr(polycom_gpu, name, wrong)
    failed = gpu_check.compare([polycom_gpu], CPU)["failed"]
    assert failed
    assert all(name in what or "order" in what or "strided" in what for what in failed)


@pytest.mark.usefixtures("device_clock")
def test_every_call_is_timed_and_inputs_take_turns() -> None:
    seen: list[int] = []
    times = _gpu.device_milliseconds(seen.append, [0, 1, 2], rounds=2, calls=4)
    assert times == [1.0] * 8
    assert seen[-8:] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_inputs_are_more_than_a_cache_holds() -> None:
    assert len(_gpu.sets_of(lambda _: object(), CPU, 2**30)) == 2
    assert len(_gpu.sets_of(lambda _: object(), CPU, 2**26)) == 5
    assert len(_gpu.sets_of(lambda _: object(), CPU, 1)) == 64


def _fail(_: Any) -> object:
    raise RuntimeError("out of memory\nand more")


def _benchmark(**rivals: Any) -> _gpu.Benchmark:
    return _gpu.Benchmark("copy forward", {"shape": [2], "dtype": "bfloat16"}, 1000, lambda _: object(), rivals)


def test_share_and_ratios_follow_from_the_times() -> None:
    times = {"ours": 2.0, "peer": 3.0}

    def timer(call: Any, sets: Any) -> list[float]:
        return [times[call(sets[0])]] * 5

    rivals = {"ours": lambda _: "ours", "peer": lambda _: "peer", "broken": _fail}
    result = _gpu.run(_benchmark(**rivals), CPU, 1e6, float("inf"), timer=timer)
    assert result["share_of_copy"] == 0.5
    assert result["met"] is False
    assert result["rivals"]["peer"]["ratio_to_ours"] == 1.5
    assert result["skipped"] == {"broken": "RuntimeError: out of memory"}
    assert "MISSED 80%" in gpu_check.row(result)
    late = _gpu.run(_benchmark(**rivals), CPU, 1e5, 0.0, timer=timer)
    assert late["met"] is True
    assert late["skipped"] == {"peer": "out of time", "broken": "out of time"}
    with pytest.raises(RuntimeError, match="out of memory"):
        _gpu.run(_benchmark(ours=_fail), CPU, 1e6, float("inf"), timer=timer)


def test_polycom_times_every_operation_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polycom_gpu, "BENCHMARK_SHAPES", ((4, 64),))
    found = list(polycom_gpu.benchmarks())
    assert [b.moved // (2 * 4 * 64) for b in found] == [2, 3, 2, 3, 3, 5]
    for benchmark in found:
        inputs = benchmark.inputs(CPU)
        for name, call in benchmark.rivals.items():
            if name != "official_compiled":
                call(inputs)
                call(inputs)


def test_evonorm_times_layers_and_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evonorm_gpu, "BENCHMARK_SHAPES", ((2, 32, 4, 4),))
    monkeypatch.setattr(evonorm_gpu, "PICTURES", (2, 3, 32, 32))
    monkeypatch.setattr(evonorm_gpu, "NETWORK", "resnetv2_50")
    *layers, network = evonorm_gpu.benchmarks()
    assert [b.moved // (2 * 2 * 32 * 4 * 4) for b in layers] == [5, 8, 8, 8]
    assert [round(1 / b.target_ratios["bn_silu"], 3) for b in layers] == [0.6, 0.8, 0.9, 0.9]
    for benchmark in layers:
        inputs = benchmark.inputs(CPU)
        for name, call in benchmark.rivals.items():
            if name != "timm_compiled":
                call(inputs)
    assert network.target_ratios == {"batchnorm": 0.9}
    inputs = network.inputs(CPU)
    shapes = {name: [g.shape for g in call(inputs)] for name, call in network.rivals.items()}
    assert shapes["ours"] == shapes["timm"]  # the same network, v and all


def test_whole_run_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the device itself, with one wrong case and one right one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Some-GPU 80GB")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(launch, "gpu", lambda index: SimpleNamespace(arch="90"))
    monkeypatch.setattr(_gpu, "ceilings", lambda device: {"copy_bytes_per_s": 1e12, "bfloat16_flop_per_s": 1e14})
    monkeypatch.setattr(_gpu, "run", lambda b, *_: {**_RESULT, "name": b.name})
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ZOO_KERNELS", "require")
    wrong = False

    def check() -> None:
        assert not wrong, "off by one"

    family = SimpleNamespace(
        units=lambda: [poly_relu_unit("float32", 3)],
        checks=lambda device: [("kernel [3]", check)],
        benchmarks=lambda: [_benchmark(ours=None)],
    )
    monkeypatch.setattr(gpu_check, "FAMILIES", ("a_family",))
    monkeypatch.setitem(sys.modules, "a_family", family)
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--out", str(out), "--no-tests"]) == 0
    record = json.loads(out.read_text())
    assert record["device"] == "NVIDIA Some-GPU 80GB"
    assert record["compiled"]["arch"] == "90"
    assert record["results"][0]["rivals"]["ours"]["median_ms"] == 0.1
    wrong = True
    assert gpu_check.main(["--out", str(out), "--no-tests"]) == 1
    record = json.loads(out.read_text())
    assert record["compared"]["failed"] == {"kernel [3]": "AssertionError: off by one"}
    assert record["results"] == []
    assert "WRONG kernel [3]" in capsys.readouterr().out

    wrong = False
    monkeypatch.setattr(_gpu, "run", lambda *_: _fail(None))
    assert gpu_check.main(["--out", str(out), "--no-tests"]) == 1
    failed = json.loads(out.read_text())["compared"]["failed"]
    assert list(failed.values()) == ["RuntimeError: out of memory"]


_RESULT: dict[str, Any] = {
    "shape": [2],
    "share_of_copy": 0.9,
    "target_share": 0.8,
    "met": True,
    "rivals": {"ours": {"median_ms": 0.1, "iqr_ms": 0.01, "ratio_to_ours": 1.0}},
}


def test_file_is_named_after_device_and_day() -> None:
    assert gpu_check.file_name("NVIDIA H100 80GB HBM3", "2026-01-31") == "nvidia-h100-80gb-hbm3-2026-01-31.json"
