"""Warnings a user sees once."""

from __future__ import annotations

import functools
import warnings


class KernelWarning(UserWarning):
    """A native kernel is not used, or not as well as it could be; the message says how to mend it."""


@functools.cache
def warn_once(message: str, category: type[Warning] = KernelWarning) -> None:
    """Warn, the first time this message comes up in the process."""
    warnings.warn(message, category, stacklevel=3)
