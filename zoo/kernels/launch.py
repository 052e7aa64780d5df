"""Kernels on torch's current stream, with the types of their arguments checked.

    kernel = Kernel(unit, "scale", Signature("S* x, S* y, C factor, i64 n"))
    kernel((blocks, 1, 1), (256, 1, 1), x, y, 2.0, x.numel())

Where a kernel runs is a :class:`Machine`: a GPU, or the emulator while one is switched on (`emulation.py`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import settings
from ..errors import KernelError
from ..warn import warn_once
from . import nvrtc
from .sources import Unit

Extent = tuple[int, int, int]
MOST_BLOCKS = 2**31 - 1


class Machine(Protocol):
    """Something that runs kernels."""

    multiprocessors: int
    shared_bytes: int
    """Dynamic shared memory one block may have while a second one still fits beside it."""

    def load(self, unit: Unit) -> None:
        """Have a unit ready; raises KernelError where that cannot be."""
        ...

    def run(self, unit: Unit, name: str, grid: Extent, block: Extent, shared: int, arguments: list[Any]) -> None:
        """Launch. `arguments` are ctypes values, one a parameter."""
        ...


DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Dtypes kernels take, and how a tensor of any of them is announced (enum Dtype of `common/scalar.h`)."""

emulator: ContextVar[Machine | None] = ContextVar("emulator", default=None)
"""The machine CPU tensors go to, while one is switched on."""


class Parameter(NamedTuple):
    """One parameter of a kernel: `S*` a tensor of the unit's dtype, `C*` of its compute dtype, `void*` of any;
    `i32`, `i64`, and `C` a number of the compute dtype. A `?` after the name allows None for a tensor."""

    kind: str
    name: str
    optional: bool


class Signature:
    """Parameters of a kernel, written as in its source."""

    def __init__(self, text: str) -> None:
        self.parameters = [self._parse(part) for part in text.split(",")]

    @staticmethod
    def _parse(part: str) -> Parameter:
        kind, name = part.split()
        if kind not in ("S*", "C*", "void*", "i32", "i64", "C"):
            raise KernelError(f"unknown type {kind!r} of kernel parameter {name!r}")
        return Parameter(kind, name.rstrip("?"), name.endswith("?"))

    def pack(self, kernel: str, dtype: torch.dtype, values: Sequence[Any]) -> tuple[list[Any], torch.device]:
        """The arguments as ctypes values, and the device their tensors share.

        Raises:
            KernelError: naming the parameter, what was expected and what came.
        """
        if len(values) != len(self.parameters):
            raise KernelError(f"{kernel} takes {len(self.parameters)} arguments, got {len(values)}")
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        device: torch.device | None = None
        packed: list[Any] = []
        for parameter, value in zip(self.parameters, values, strict=True):
            kind, name, optional = parameter
            if kind[-1] == "*":
                if value is None and optional:
                    packed.append(ctypes.c_void_p(None))
                    continue
                wanted = {"S*": dtype, "C*": compute}.get(kind)
                if not isinstance(value, Tensor) or (wanted is not None and value.dtype is not wanted):
                    raise _mismatch(kernel, name, f"a tensor of {wanted or 'any dtype'}", value)
                if not value.is_contiguous():
                    raise KernelError(f"{kernel}: {name} must be contiguous, got strides {value.stride()}")
                device = value.device if device is None else device
                if value.device != device:
                    raise _mismatch(kernel, name, f"a tensor on {device}", value)
                packed.append(ctypes.c_void_p(value.data_ptr()))
            elif kind == "C":
                if not isinstance(value, float):
                    raise _mismatch(kernel, name, "a float", value)
                packed.append(ctypes.c_double(value) if compute is torch.float64 else ctypes.c_float(value))
            else:
                bits = int(kind[1:])
                if not isinstance(value, int) or not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
                    raise _mismatch(kernel, name, f"an integer of {bits} bits", value)
                packed.append(ctypes.c_int32(value) if bits == 32 else ctypes.c_int64(value))
        if device is None:
            raise KernelError(f"{kernel} was given no tensor")
        return packed, device


def _mismatch(kernel: str, name: str, wanted: str, value: object) -> KernelError:
    came = f"a tensor of {value.dtype} on {value.device}" if isinstance(value, Tensor) else repr(value)
    return KernelError(f"{kernel}: {name} must be {wanted}, got {came}")


@dataclass(frozen=True)
class Kernel:
    """An entry point of a unit."""

    unit: Unit
    name: str
    signature: Signature

    def __call__(self, grid: Extent, block: Extent, *values: Any, shared: int = 0) -> None:
        """Launch on the device of the tensors, on torch's current stream there.

        Args:
            grid: blocks.
            block: threads of one.
            values: one a parameter.
            shared: bytes of dynamic shared memory.

        Raises:
            KernelError: for arguments that do not fit, or from the driver.
        """
        arguments, device = self.signature.pack(self.name, getattr(torch, self.unit.dtype), values)
        machine_of(device).run(self.unit, self.name, grid, block, shared, arguments)


@functools.cache
def kernel_of(unit: Unit, name: str, signature: Signature) -> Kernel:
    """The entry point of that name; made once."""
    return Kernel(unit, name, signature)


def aligned(t: Tensor) -> Tensor:
    """The tensor, or a copy where its first element is not on a 16-byte boundary, as in a slice."""
    return t.clone() if t.data_ptr() % 16 else t


def machine_of(device: torch.device) -> Machine:
    """Where kernels on tensors of a device run.

    Raises:
        KernelError: for a device that has no kernels.
    """
    if device.type == "cuda":
        return gpu(torch.cuda.current_device() if device.index is None else device.index)
    machine = emulator.get()
    if device.type != "cpu" or machine is None:
        raise KernelError(f"kernels run on CUDA devices, got {device}")
    return machine


def use_cuda(unit: Unit, device: torch.device) -> bool:
    """Whether a unit can run on a device; see the package's docstring for what happens when it cannot.

    Raises:
        KernelError: with ZOO_KERNELS=require, if it cannot.
    """
    return True if emulator.get() is not None else _use_gpu(unit, device)


@functools.cache
def _use_gpu(unit: Unit, device: torch.device) -> bool:
    mode = settings.kernel_mode()
    if mode == "off":
        return False
    try:
        machine_of(device).load(unit)
    except KernelError as error:
        if mode == "require":
            raise
        warn_once(
            f"no CUDA kernels, the affected ops run through PyTorch. {error} (ZOO_KERNELS=off accepts this silently)"
        )
        return False
    return True


@functools.cache
def driver() -> Any:
    """NVIDIA's `cuda.bindings.driver`.

    Raises:
        KernelError: if it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise KernelError(f"NVIDIA's bindings are not installed ({error}); pip install 'paperzoo[cuda]'") from error


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != driver().CUresult.CUDA_SUCCESS:
        _, text = driver().cuGetErrorString(status)
        raise KernelError(f"CUDA driver: {text.decode() if text else status}")
    return values[0] if values else None


@functools.cache
def gpu(index: int) -> Gpu:
    """The machine of a CUDA device."""
    return Gpu(index)


class Gpu:
    """A CUDA device, through the driver's library interface: one load serves every context."""

    def __init__(self, index: int) -> None:
        if torch.version.cuda is None:
            raise KernelError("The kernels are CUDA; this torch is built for another platform.")
        self.index = index
        properties = torch.cuda.get_device_properties(index)
        self.arch = f"{properties.major}{properties.minor}"
        if (properties.major, properties.minor) < (7, 5):
            raise KernelError(
                f"The kernels need compute capability 7.5, {properties.name} has {self.arch[0]}.{self.arch[1:]}."
            )
        self.device = _checked(driver().cuDeviceGet(index))  # torch counts the visible devices as the driver does
        self.multiprocessors = properties.multi_processor_count
        attribute = driver().CUdevice_attribute
        most = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        total = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)
        self.shared_bytes = min(most, total // 2) - 8192  # for the kernel's own arrays, and what the system takes
        self._functions: dict[tuple[Unit, str], Any] = {}
        self._libraries: dict[Unit, Any] = {}
        self._bound = threading.local()
        self._lock = threading.Lock()

    def _attribute(self, which: Any) -> int:
        return _checked(driver().cuDeviceGetAttribute(which, self.device))

    def load(self, unit: Unit) -> None:
        """Compile or find the unit and give it to the driver."""
        with self._lock:
            if unit not in self._libraries:
                data = nvrtc.cubin(unit, self.arch)
                self._bind_thread()
                self._libraries[unit] = _checked(driver().cuLibraryLoadData(data, None, None, 0, None, None, 0))

    def _bind_thread(self) -> None:
        """The driver wants a context in every thread; torch may have made no call yet that gives this one its own."""
        if not getattr(self._bound, "done", False):
            if int(_checked(driver().cuCtxGetCurrent())) == 0:
                _checked(driver().cuCtxSetCurrent(_checked(driver().cuDevicePrimaryCtxRetain(self.device))))
            self._bound.done = True

    def _function(self, unit: Unit, name: str) -> Any:
        found = self._functions.get((unit, name))
        if found is None:
            self.load(unit)
            found = _checked(driver().cuLibraryGetKernel(self._libraries[unit], name.encode()))
            # Above 48 KiB a kernel must be told beforehand; it costs nothing to allow what may come.
            attribute = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver().cuKernelSetAttribute(attribute, self.shared_bytes, found, self.device))
            found = self._functions[unit, name] = driver().CUfunction(int(found))  # one handle serves every context
        return found

    def run(self, unit: Unit, name: str, grid: Extent, block: Extent, shared: int, arguments: list[Any]) -> None:
        """Launch on torch's current stream of this device."""
        function = self._function(unit, name)
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = torch.cuda.current_stream(self.index).cuda_stream
        with torch.cuda.device(self.index):
            self._bind_thread()
            status = driver().cuLaunchKernel(function, *grid, *block, shared, stream, ctypes.addressof(addresses), 0)
        try:
            _checked(status)
        except KernelError as error:
            raise KernelError(f"{name} with grid {grid}, block {block}, {shared} bytes shared: {error}") from None
