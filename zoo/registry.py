"""Look components up by name: list, info, get, create, factory, register.

The rows of :mod:`zoo.catalog` are data; a class is imported when it is asked for. Other distributions add rows through
the entry-point group `zoo.components` (an iterable of `Component`, or a function returning one).
"""

from __future__ import annotations

import builtins
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, overload

from . import settings
from .catalog import COMPONENTS, Component, Kind
from .errors import ComponentArgumentError, UnknownComponentError

if TYPE_CHECKING:
    from torch import nn

    from .splat import ConvexModel

T = TypeVar("T", bound=type)

ENTRY_POINT_GROUP = "zoo.components"
KINDS: tuple[str, ...] = get_args(Kind)

_rows: dict[tuple[str, str], Component] = {(row.kind, row.name): row for row in COMPONENTS}
_classes: dict[tuple[str, str], type] = {}
_plugins_loaded = False
_plugin_errors: dict[str, Exception] = {}


def did_you_mean(word: str, known: Iterable[str], n: int = 3) -> str:
    """' Did you mean ...?' with the nearest of the known words, or an empty string."""
    close = difflib.get_close_matches(word, builtins.list(known), n=n, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def list(
    kind: Kind | None = None, pattern: str = "*", *, tag: str | None = None, paper: str | None = None
) -> builtins.list[str]:
    """Names of the components, sorted.

    Args:
        kind: only of this kind.
        pattern: shell-style pattern the name must match.
        tag: only with this tag.
        paper: only from this paper, by its key in `zoo.catalog.PAPERS`.

    Raises:
        UnknownComponentError: if no kind has that name.
    """
    return [row.name for row in rows(kind, pattern, tag=tag, paper=paper)]


def rows(
    kind: str | None = None, pattern: str = "*", *, tag: str | None = None, paper: str | None = None
) -> builtins.list[Component]:
    """The catalog rows behind :func:`list`, sorted by name."""
    _load_plugins()
    if kind is not None:
        _check_kind(kind)
    found = [
        row
        for row in _rows.values()
        if (kind is None or row.kind == kind)
        and fnmatchcase(row.name, pattern)
        and (tag is None or tag in row.tags)
        and (paper is None or paper == row.paper)
    ]
    return sorted(found, key=lambda row: (row.name, row.kind))


def info(kind: Kind, name: str) -> Component:
    """The catalog row of one component. Never imports torch.

    Raises:
        UnknownComponentError: if no component of that kind has that name; the message names the nearest one.
    """
    row = _rows.get((kind, name))
    if row is None:
        _load_plugins()
        row = _rows.get((kind, name))
    if row is None:
        raise _unknown(kind, name)
    return row


@overload
def get(kind: Literal["explainer"], name: str) -> type[Any]: ...
@overload
def get(kind: Literal["renderer"], name: Literal["convex_splat"]) -> type[ConvexModel]: ...
@overload
def get(kind: Kind, name: str) -> type[nn.Module]: ...
def get(kind: Kind, name: str) -> type[Any]:
    """The class of one component; imports the one module that holds it.

    Raises:
        UnknownComponentError: if no component of that kind has that name.
    """
    if (kind, name) not in _classes:
        module, _, qualname = info(kind, name).target.partition(":")
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
        _classes[kind, name] = found
    return _classes[kind, name]


@overload
def create(kind: Literal["explainer"], name: str, /, *args: Any, **kwargs: Any) -> Any: ...
@overload
def create(kind: Literal["renderer"], name: Literal["convex_splat"], /, *args: Any, **kwargs: Any) -> ConvexModel: ...
@overload
def create(kind: Kind, name: str, /, *args: Any, **kwargs: Any) -> nn.Module: ...
def create(kind: Kind, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Build a component by name.

    Example:
        >>> zoo.create("activation", "polynorm", order=2)
        PolyNorm(order=2, eps=1e-06, norm='rms')

    Raises:
        UnknownComponentError: if no component of that kind has that name.
        ComponentArgumentError: if the constructor does not take one of the arguments, or lacks one it needs.
    """
    cls = get(kind, name)
    _check_args(cls, args, kwargs, f"{kind} {name!r}", complete=True)
    return cls(*args, **kwargs)


def factory(kind: Kind, spec: str | Mapping[str, Any] | Callable[..., Any]) -> Callable[..., Any]:
    """Turn what a config says into a constructor.

    Args:
        kind: kind of component wanted.
        spec: a registry name, `{name: ..., argument: value}`, a dotted path, `{class_path: ..., init_args: {...}}`,
            or a callable, which is returned as it is.

    Raises:
        UnknownComponentError: if the name or dotted path leads nowhere.
        ComponentArgumentError: if an argument is not one the constructor takes.
    """
    if callable(spec):
        return spec
    name, kwargs = _split(kind, spec)
    if "." in name:
        cls, label = _import_dotted(kind, name), name
    else:
        cls, label = get(kind, name), f"{kind} {name!r}"
    _check_args(cls, (), kwargs, label)
    return partial(cls, **kwargs) if kwargs else cls


def register(kind: Kind, name: str, *, replace: bool = False, **facts: Any) -> Callable[[T], T]:
    """Class decorator that adds a component from a notebook or a user's module.

    Args:
        kind: kind of component.
        name: registry name.
        replace: take the place of a component of that name.
        facts: further fields of :class:`zoo.catalog.Component`.

    Raises:
        ValueError: if the name is taken and `replace` is false.
    """
    _check_kind(kind)

    def wrap(cls: T) -> T:
        given: dict[str, Any] = {
            "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
            "dist": cls.__module__.partition(".")[0],
            **facts,
        }
        row = Component(name=name, kind=kind, target=f"{cls.__module__}:{cls.__qualname__}", **given)
        add(row, replace=replace)
        _classes[kind, name] = cls
        return cls

    return wrap


def add(row: Component, *, replace: bool = False) -> None:
    """Add one catalog row; the name must be free unless `replace`."""
    old = _rows.get((row.kind, row.name))
    if old is not None and not replace:
        raise ValueError(
            f"{row.kind} {row.name!r} is already provided by {old.target} ({old.dist});"
            " pass replace=True to override it"
        )
    _rows[row.kind, row.name] = row
    _classes.pop((row.kind, row.name), None)


def describe_signature(signature: inspect.Signature) -> str:
    """Arguments and defaults as one writes them in a call, without annotations."""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def plugin_errors() -> dict[str, Exception]:
    """Plug-ins that failed to load, by entry point; shown by `zoo doctor`."""
    _load_plugins()
    return dict(_plugin_errors)


def _load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded or not settings.plugins_enabled():
        return
    _plugins_loaded = True
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            announced = entry.load()
            for row in announced() if callable(announced) else announced:
                add(row)
        except Exception as error:  # another package's bug must not break ours; `zoo doctor` and failed look-ups tell
            _plugin_errors[entry.value] = error


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UnknownComponentError(
            f"no kind of component is called {kind!r}.{did_you_mean(kind, KINDS)} Kinds: {', '.join(KINDS)}."
        )


def _unknown(kind: str, name: str) -> UnknownComponentError:
    _check_kind(kind)
    elsewhere = sorted(k for k, n in _rows if n == name)
    if elsewhere:
        return UnknownComponentError(f"{name!r} is {_article(elsewhere[0])}, not {_article(kind)}.")
    names = sorted(n for k, n in _rows if k == kind)
    available = f"Available: {', '.join(names)}." if names else "None is registered."
    broken = f" {len(_plugin_errors)} plug-in(s) failed to load; run `zoo doctor`." if _plugin_errors else ""
    return UnknownComponentError(
        f"no {kind} is called {name!r}.{did_you_mean(name, names)} {available}"
        f" Any other class goes by its dotted path, e.g. torch.nn.Identity.{broken}"
    )


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _split(kind: str, spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping):
        raise ComponentArgumentError(f"a {kind} is a name, a mapping or a callable, got {spec!r}")
    kwargs = dict(spec)
    if "class_path" in kwargs:
        name = kwargs.pop("class_path")
        kwargs, extra = dict(kwargs.pop("init_args", None) or {}), kwargs
        if extra:
            raise ComponentArgumentError(
                f"a {kind} given by class_path takes only init_args beside it, got {', '.join(map(repr, extra))}"
            )
        return name, kwargs
    if not isinstance(kwargs.get("name"), str):
        raise ComponentArgumentError(f"a {kind} given as a mapping needs a 'name' key, got {dict(spec)!r}")
    return kwargs.pop("name"), kwargs


def _import_dotted(kind: str, path: str) -> Callable[..., Any]:
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UnknownComponentError(f"no {kind} at {path!r}: {error}.") from error
    except AttributeError:
        known = dir(importlib.import_module(module))
        raise UnknownComponentError(
            f"no {kind} at {path!r}: {module} has no {attribute!r}.{did_you_mean(attribute, known, n=1)}"
        ) from None


def _check_args(
    cls: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], label: str, *, complete: bool = False
) -> None:
    """Misspelt and, when `complete`, missing arguments, before the constructor runs."""
    try:
        signature = inspect.signature(cls)
    except ValueError:  # a builtin without a signature checks for itself
        return
    takes = describe_signature(signature)
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for word in kwargs:
            if word not in parameters:
                raise ComponentArgumentError(
                    f"{label} has no argument {word!r}.{did_you_mean(word, parameters)} It takes {takes}."
                )
    try:
        (signature.bind if complete else signature.bind_partial)(*args, **kwargs)
    except TypeError as error:
        raise ComponentArgumentError(f"{label}: {error}. It takes {takes}.") from None
