"""What a conversion did, as a value that prints as a table. Shared by every converter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ..errors import ZooError


class ConversionError(ZooError, ValueError):
    """A model that cannot be converted as asked; it is left as it was."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """One place of the model that changed.

    Args:
        path: dotted path of what was replaced.
        old: what stood there.
        new: what stands there now.
        parameters: parameters gained, negative if lost.
        note: what the reader must know beyond the names, e.g. that weights are fresh.
    """

    path: str
    old: str
    new: str
    parameters: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """One place that could have been meant and was left alone, and why."""

    path: str
    old: str
    reason: str


@dataclass(frozen=True, slots=True, repr=False)
class ConversionReport:
    """Everything a converter changed in a model.

    Iterates over, and has the length of, its replacements. Prints as a table.

    Args:
        model: class of the model.
        replaced: what changed, in the model's order.
        kept: what was left alone on purpose.
        parameters_before: parameters of the whole model before, shared ones counted once.
        parameters_after: the same afterwards.
    """

    model: str
    replaced: tuple[Replacement, ...]
    kept: tuple[Kept, ...]
    parameters_before: int
    parameters_after: int

    @property
    def parameters(self) -> int:
        """Parameters the whole model gained, negative if it lost some."""
        return self.parameters_after - self.parameters_before

    def __len__(self) -> int:
        return len(self.replaced)

    def __iter__(self) -> Iterator[Replacement]:
        return iter(self.replaced)

    def __repr__(self) -> str:
        change = f" ({self.parameters / self.parameters_before:+.2%})" if self.parameters_before else ""
        blocks = [
            f"{self.model}: {len(self)} replaced, {len(self.kept)} kept, parameters "
            f"{self.parameters_before:,} -> {self.parameters_after:,}{change}",
            _table(
                ("path", "old", "new", "parameters", "note"),
                [(row.path, row.old, row.new, f"{row.parameters:+,}", row.note) for row in self.replaced],
            ),
        ]
        if self.kept:
            blocks.append(_table(("kept", "is", "because"), [(row.path, row.old, row.reason) for row in self.kept]))
        return "\n\n".join(blocks)


def short_name(value: object) -> str:
    """What a report or message calls a module, a class or a function."""
    while isinstance(value, partial):
        value = value.func
    return getattr(value, "__name__", type(value).__name__)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; a column without content is left out."""
    shown = [column for column in zip(head, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in shown]
    lines = zip(*shown, strict=True)
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
