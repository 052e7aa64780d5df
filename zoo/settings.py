"""The environment variables the zoo reads, each in one place and when it is needed, never at import.

| variable | values | meaning |
| --- | --- | --- |
| `ZOO_PLUGINS` | `1` (default), `0` | `0` ignores components announced by other distributions |
| `ZOO_DEBUG` | `0` (default), `1` | `1` shows full tracebacks and the parser's own messages |
| `ZOO_DATA` | a folder | real data for local runs and optional tests |
"""

from __future__ import annotations

import os
from pathlib import Path


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
