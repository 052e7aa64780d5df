"""Mistakes on the command line or in a config, told in one short paragraph with the nearest right spelling."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import settings
from ..registry import did_you_mean


class ZooParser(LightningArgumentParser):
    """Exit with status 2 and one paragraph; `ZOO_DEBUG=1` brings the full message and the traceback back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # an abbreviation today is ambiguous tomorrow
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        if settings.debug():
            super().error(message, ex)
        fail(explain(str(message), self))


def fail(message: str) -> NoReturn:
    """Print a mistake on stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def explain(message: str, parser: ArgumentParser) -> str:
    """The user's mistake in one sentence: what came, what was expected, and the nearest right word."""
    key = next(iter(re.findall(r'Parser key "([^"]+)"', message)), "")
    where = f"{key}: " if key else ""
    options = _options(parser)

    if match := re.search(r"the following arguments are required: (.*)", message):
        missing = " and ".join(name.strip().rpartition(".")[2] for name in match.group(1).split(","))
        return f"no {missing} given; name a config, e.g. --config quickstart, or pass --model and --data"
    if match := re.search(r"unrecognized arguments: (.*)", message):
        word = match.group(1).split()[0].split("=")[0]
        return f"no option is called {word!r}.{did_you_mean(word, options, n=1)}"
    if match := re.search(r"does not accept option '([^']+)'", message):
        names = [option.removeprefix("--") for option in options]
        return f"no option is called {match.group(1)!r}.{did_you_mean(match.group(1), names, n=1)}"
    if match := re.search(r"Option '([^']+)' is not accepted", message):
        return f"no argument is called {match.group(1)!r}.{did_you_mean(match.group(1), _argument_names(), n=1)}"
    if match := re.search(r"Expected a dot import path string: (\S+)", message):
        return _unknown_class(where, match.group(1))
    if match := re.search(r"module '\S+' has no attribute '(\S+)'. Got value: (\S+)", message):
        return _unknown_class(where, match.group(2))
    expected = [_readable(kind) for kind in re.findall(r"Expected an? (.*?)(?:\. Got value: .*)?$", message, re.M)]
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    if expected and given:
        return f"{where}expected {' or '.join(dict.fromkeys(expected))}, got {given.group(1)!r}"
    return where + " ".join(line.strip().lstrip("- ") for line in message.splitlines() if "Parser key" not in line)


def _options(parser: ArgumentParser) -> list[str]:
    """Long options of a parser and of its subcommands."""
    found: list[str] = []
    for action in parser._actions:
        found += [option for option in action.option_strings if option.startswith("--")]
        for child in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            found += _options(child)
    return found


def configurable_classes() -> list[type]:
    """Classes a config may name without their module: tasks, data modules, optimizers, schedules."""

    def below(cls: type) -> list[type]:
        return [cls, *(leaf for child in cls.__subclasses__() for leaf in below(child))]

    bases = (L.LightningModule, L.LightningDataModule, Optimizer, LRScheduler)
    return [cls for base in bases for cls in below(base) if not cls.__module__.startswith("lightning.")]


def _unknown_class(where: str, given: str) -> str:
    module, _, name = given.rpartition(".")
    known = {cls.__name__ for cls in configurable_classes()}
    hint = did_you_mean(name, known, n=1)
    if module and hint:
        hint = hint.replace("Did you mean '", f"Did you mean '{module}.")
    return f"{where}no class is called {given!r}.{hint} A class of ours goes by its name, others by dotted path."


def _argument_names() -> Iterable[str]:
    return {name for cls in configurable_classes() for name in inspect.signature(cls).parameters}


def _readable(kind: str) -> str:
    """A type as jsonargparse prints it, as a person would say it."""
    kind = kind.strip()
    if match := re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", kind):
        return {"NoneType": "null"}.get(match.group(1), match.group(1))
    if match := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {match.group(1)}"
    return kind
