"""Arguments are checked before a kernel sees them, and where no kernel can run, that is said once or raised."""

from __future__ import annotations

import ctypes
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo import settings
from zoo.errors import KernelBuildError, KernelError
from zoo.kernels import launch, use_cuda
from zoo.kernels.launch import Extent, Kernel, Signature
from zoo.kernels.sources import Unit, poly_relu_unit
from zoo.warn import KernelWarning, warn_once

UNIT = poly_relu_unit("float32", 3)
CPU = torch.device("cpu")
ALL = Signature("S* x, C* sums, void* weight, S* mask?, i32 width, i64 rows, C eps")


def values(dtype: torch.dtype = torch.float32, **changed: Any) -> list[Any]:
    """Arguments that fit :data:`ALL`, but for those that are changed."""
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    fitting = {
        "x": torch.zeros(4, dtype=dtype),
        "sums": torch.zeros(2, dtype=compute),
        "weight": torch.zeros(3, dtype=torch.int8),
        "mask": None,
        "width": 4,
        "rows": 2**40,
        "eps": 1e-6,
    }
    return list({**fitting, **changed}.values())


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        (torch.float32, ctypes.c_float),
        (torch.bfloat16, ctypes.c_float),
        (torch.float16, ctypes.c_float),
        (torch.float64, ctypes.c_double),
    ],
)
def test_arguments_become_c_values(dtype: torch.dtype, number: type) -> None:
    given = values(dtype)
    packed, device = ALL.pack("scale", dtype, given)
    types = [ctypes.c_void_p] * 4 + [ctypes.c_int32, ctypes.c_int64, number]
    assert [type(value) for value in packed] == types
    assert [value.value for value in packed[:3]] == [tensor.data_ptr() for tensor in given[:3]]
    assert [value.value for value in packed[3:6]] == [None, 4, 2**40]
    assert packed[6].value == pytest.approx(1e-6)
    assert device == CPU


def test_an_optional_tensor_may_come() -> None:
    mask = torch.zeros(4)
    packed, _ = ALL.pack("scale", torch.float32, values(mask=mask))
    assert packed[3].value == mask.data_ptr()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": None}, "x must be a tensor of torch.float32, got None"),
        ({"x": torch.zeros(8)[::2]}, "x must be contiguous, got strides (2,)"),
        ({"weight": None}, "weight must be a tensor of any dtype, got None"),
        ({"x": 1.0}, "x must be a tensor of torch.float32, got 1.0"),
        (
            {"x": torch.zeros(4, dtype=torch.float64)},
            "x must be a tensor of torch.float32, got a tensor of torch.float64 on cpu",
        ),
        (
            {"mask": torch.zeros(4, dtype=torch.bool)},
            "mask must be a tensor of torch.float32, got a tensor of torch.bool on cpu",
        ),
        (
            {"sums": torch.zeros(2, device="meta")},
            "sums must be a tensor on cpu, got a tensor of torch.float32 on meta",
        ),
        ({"width": 2**31}, "width must be an integer of 32 bits, got 2147483648"),
        ({"width": -(2**31) - 1}, "width must be an integer of 32 bits, got -2147483649"),
        ({"width": 4.0}, "width must be an integer of 32 bits, got 4.0"),
        ({"rows": 2**63}, "rows must be an integer of 64 bits, got 9223372036854775808"),
        ({"rows": torch.tensor(4)}, "rows must be an integer of 64 bits, got a tensor of torch.int64 on cpu"),
        ({"eps": 1}, "eps must be a float, got 1"),
        ({"eps": None}, "eps must be a float, got None"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=f"^scale: {re.escape(message)}$"):
        ALL.pack("scale", torch.float32, values(**changed))


def test_sums_of_half_precision_are_float32() -> None:
    with pytest.raises(KernelError, match="sums must be a tensor of torch.float32, got a tensor of torch.bfloat16"):
        ALL.pack("scale", torch.bfloat16, values(torch.bfloat16, sums=torch.zeros(2, dtype=torch.bfloat16)))


@pytest.mark.parametrize("number", [-(2**31), 2**31 - 1])
def test_the_ends_of_a_range_belong_to_it(number: int) -> None:
    assert ALL.pack("scale", torch.float32, values(width=number))[0][4].value == number


def test_the_number_of_arguments_is_checked() -> None:
    with pytest.raises(KernelError, match="scale takes 7 arguments, got 6"):
        ALL.pack("scale", torch.float32, values()[:-1])


def test_a_kernel_needs_a_tensor() -> None:
    with pytest.raises(KernelError, match="scale was given no tensor"):
        Signature("S* x?, i32 n").pack("scale", torch.float32, [None, 1])


def test_a_misspelt_type_is_an_error() -> None:
    with pytest.raises(KernelError, match="unknown type 'int' of kernel parameter 'n'"):
        Signature("S* x, int n")


# Where kernels run


class Recorder:
    """A machine that only takes notes."""

    multiprocessors, shared_bytes = 1, 0

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def load(self, unit: Unit) -> None:
        """Nothing to do."""

    def run(self, unit: Unit, name: str, grid: Extent, block: Extent, shared: int, arguments: list[Any]) -> None:
        """Note it."""
        self.launched.append((unit, name, grid, block, shared, [argument.value for argument in arguments]))


@pytest.fixture
def machine() -> Any:
    recorder = Recorder()
    token = launch.emulator.set(recorder)
    yield recorder
    launch.emulator.reset(token)


def test_a_kernel_is_launched_on_the_machine_of_its_tensors(machine: Recorder) -> None:
    x = torch.zeros(4)
    Kernel(UNIT, "scale", Signature("S* x, i32 n"))((2, 1, 1), (32, 1, 1), x, 4, shared=16)
    assert machine.launched == [(UNIT, "scale", (2, 1, 1), (32, 1, 1), 16, [x.data_ptr(), 4])]


def test_nothing_is_launched_with_arguments_that_do_not_fit(machine: Recorder) -> None:
    with pytest.raises(KernelError, match="scale takes 2 arguments, got 1"):
        Kernel(UNIT, "scale", Signature("S* x, i32 n"))((1, 1, 1), (32, 1, 1), torch.zeros(4))
    assert machine.launched == []


def test_a_cpu_tensor_has_no_kernels() -> None:
    with pytest.raises(KernelError, match="kernels run on CUDA devices, got cpu"):
        Kernel(UNIT, "scale", Signature("S* x"))((1, 1, 1), (32, 1, 1), torch.zeros(4))


def test_the_emulator_is_for_cpu_tensors_only(machine: Recorder) -> None:
    assert launch.machine_of(CPU) is machine
    with pytest.raises(KernelError, match="kernels run on CUDA devices, got meta"):
        launch.machine_of(torch.device("meta"))


def ask(device: torch.device = CPU) -> bool:
    """use_cuda as a new process would see it."""
    return launch._use_gpu.__wrapped__(UNIT, device)


def test_the_emulator_counts_as_cuda(machine: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_KERNELS", "off")  # what a user set is not about tests of kernels
    assert use_cuda(UNIT, CPU)


def test_auto_falls_back_with_one_warning(cache: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [ask(), ask()] == [False, False]
    (warning,) = caught
    assert issubclass(warning.category, KernelWarning)
    assert str(warning.message) == (
        "no CUDA kernels, the affected ops run through PyTorch. kernels run on CUDA devices, got cpu"
        " (ZOO_KERNELS=off accepts this silently)"
    )


def test_require_raises(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_KERNELS", "require")
    with pytest.raises(KernelError, match="kernels run on CUDA devices, got cpu"):
        ask()


def test_off_is_silent_and_loads_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_KERNELS", "off")
    monkeypatch.setattr(launch, "machine_of", lambda _: pytest.fail("asked for a machine"))
    assert not ask()


def test_a_unit_that_does_not_compile_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, machine: Recorder
) -> None:
    def fail(_: Unit) -> None:
        raise KernelBuildError("math.h(7): error")

    monkeypatch.setattr(machine, "load", fail)
    with pytest.warns(KernelWarning, match=r"no CUDA kernels, .* math.h\(7\): error"):
        assert not ask()
    monkeypatch.setattr(machine, "load", lambda _: None)
    assert ask()


def test_missing_bindings_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(KernelError, match=r"bindings are not installed .*pip install 'paperzoo\[cuda\]'"):
        launch.driver.__wrapped__()


# Settings and warnings


@pytest.mark.parametrize("word", ["auto", "off", "require"])
def test_modes(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("ZOO_KERNELS", word)
    assert settings.kernel_mode() == word


def test_auto_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZOO_KERNELS", raising=False)
    assert settings.kernel_mode() == "auto"


@pytest.mark.parametrize("word", ["", "0", "OFF", "required"])
def test_any_other_mode_is_an_error(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("ZOO_KERNELS", word)
    with pytest.raises(KernelError, match=f"ZOO_KERNELS must be auto, off or require, got {word!r}"):
        settings.kernel_mode()


def test_a_warning_comes_once_for_each_message() -> None:
    words = [f"{__name__} {word}" for word in ("one", "two", "one")]  # no other test says this
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for word in words:
            warn_once(word)
    assert [str(warning.message) for warning in caught] == words[:2]
    assert all(warning.category is KernelWarning for warning in caught)
