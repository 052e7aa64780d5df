"""The environment variables the zoo reads, each in one place and when it is needed, never at import.

| variable | values | meaning |
| --- | --- | --- |
| `ZOO_KERNELS` | `auto` (default), `off`, `require` | `off`: no native kernels; `require`: an error without |
| `ZOO_CACHE_DIR` | a folder | for compiled kernels and decoded pictures; `$XDG_CACHE_HOME/zoo`, else `~/.cache/zoo` |
| `ZOO_KERNEL_DIR` | a folder | kernels of `zoo kernels build --out`, looked at before the cache |
| `ZOO_PLUGINS` | `1` (default), `0` | `0` ignores components announced by other distributions |
| `ZOO_DEBUG` | `0` (default), `1` | `1` shows full tracebacks and the parser's own messages |
| `ZOO_DATA` | a folder | real data for local runs and optional tests |
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast, get_args

from .errors import KernelError

KernelMode = Literal["auto", "off", "require"]


def kernel_mode() -> KernelMode:
    """Whether native kernels are used where they can be, never, or always.

    Raises:
        KernelError: for any other word.
    """
    word = os.environ.get("ZOO_KERNELS", "auto")
    if word not in get_args(KernelMode):
        raise KernelError(f"ZOO_KERNELS must be auto, off or require, got {word!r}")
    return cast(KernelMode, word)


def cache_folder() -> Path:
    """Where compiled kernels and decoded pictures are kept. It need not exist.

    Raises:
        KernelError: if no folder is named and the user has no home.
    """
    chosen = os.environ.get("ZOO_CACHE_DIR")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo"
    except RuntimeError:  # a user id without a home
        raise KernelError("there is no home directory to keep compiled kernels in; set ZOO_CACHE_DIR") from None


def prebuilt_folder() -> Path | None:
    """Kernels the user compiled ahead of time, if any."""
    folder = os.environ.get("ZOO_KERNEL_DIR")
    return Path(folder) if folder else None


def plugins_enabled() -> bool:
    """Whether rows of other distributions are loaded."""
    return os.environ.get("ZOO_PLUGINS", "1") != "0"


def debug() -> bool:
    """Whether mistakes are shown with their tracebacks."""
    return os.environ.get("ZOO_DEBUG", "0") == "1"


def data_folder() -> Path | None:
    """Folder of real data, if the user has one."""
    folder = os.environ.get("ZOO_DATA")
    return Path(folder) if folder else None
