"""A module's forward without some of the activations it calls.

A block may call one `self.relu` in several places, or `F.relu` by its own name: there is no module to take out then.
Its forward is traced with every child as one step, the calls are taken out, and the module gets a class of its own with
this forward, derived from the class it had. It stays the object it was, with its parameters, hooks, attributes and
methods; so do state-dict names, `isinstance` and the type's name. Copies and pickles rebuild the class from the source
of the forward. What a trace cannot see, and would lose without a word, is refused.
"""

from __future__ import annotations

import dis
import functools
import importlib
import linecache
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import fx, nn

from .flow import Call, Tracer, in_mode
from .report import ConversionError, short_name

# What a forward reads that a trace takes for constant, or does that a trace leaves out.
_BAKED_IN = {"isinstance", "type", "is_grad_enabled", "is_autocast_enabled", "checkpoint"}


@dataclass(frozen=True)
class Source:
    """A forward as text, and where the names in it come from: (name, module, qualified name or "" for the module)."""

    code: str
    names: tuple[tuple[str, str, str], ...]


def without(module: nn.Module, path: str, calls: Collection[Call], indices: Collection[int]) -> type[nn.Module]:
    """The class of a module whose forward skips some activations.

    Args:
        module: the module; unchanged.
        path: of it, for messages.
        calls: executions of its forward that the indices were counted in.
        indices: the activations to skip, in the order of their calls.

    Returns:
        A class to set as `module.__class__`.

    Raises:
        ConversionError: if the forward does things that would get lost.
    """
    wanted = [_names(call) for call in calls]
    sources = []
    for training in (True, False):
        with in_mode([module], training):
            sources.append(_source(module, path, wanted, indices))
    return rewritten_class(_original(type(module)), *sources)


def _names(call: Call) -> list[str]:
    return [short_name(act.value) for act in call.acts]


def _original(cls: type[nn.Module]) -> type[nn.Module]:
    return cls.__dict__.get("_zoo_rewrites", cls)


class _CodeTracer(Tracer):
    """A shallow tracer that keeps the code objects of the module's own methods that ran."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root, root, shallow=True)
        self.codes: dict[CodeType, None] = {}
        self.callers: list[str] = []

    def _note(self, node: fx.Node, value: Any, place: Any) -> None:
        super()._note(node, value, place)
        self.callers.append(next(frame.f_code.co_name for frame in self._own_frames()))

    def create_node(self, kind: str, target: Any, *arguments: Any, **options: Any) -> fx.Node:
        self.codes.update((frame.f_code, None) for frame in self._own_frames())
        return super().create_node(kind, target, *arguments, **options)

    def _own_frames(self) -> Any:
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not _source.__code__:
            code = frame.f_code
            machinery = frame.f_globals.get("__name__", "").startswith(("torch.fx", "torch.nn.modules.module"))
            if code.co_argcount and not machinery and frame.f_locals.get(code.co_varnames[0]) is self.root:
                yield frame
            frame = frame.f_back


def _source(module: nn.Module, path: str, wanted: list[list[str]], indices: Collection[int]) -> Source:
    place = path or "the model"
    advice = "give it an nn.Module of its own for every activation, or leave its norms out with skip"

    def refuse(why: str) -> ConversionError:
        return ConversionError(
            f"{place}, a {short_name(type(module))}, calls an activation that must go after its norm, and its forward "
            f"cannot be rewritten: it {why}; {advice}"
        )

    if "forward" in vars(module):
        raise refuse("was replaced on the instance")
    tracer = _CodeTracer(module)
    try:
        graph = tracer.trace(module)
    except Exception as error:  # as in Tracer.call_module, here for the user to read
        raise refuse(f"cannot be traced ({error})") from error
    defaults = [node.target for node in graph.nodes if node.op == "placeholder" and node.args]
    if defaults:
        raise refuse(f"has an argument that may be left out, {defaults[0]}")
    for code in tracer.codes:
        if why := _lost(code):
            raise refuse(why)
    acts = tracer.calls[0].acts
    names = _names(tracer.calls[0])
    if any(names != other for other in wanted):
        raise refuse("calls other activations in other modes or for other inputs")
    for index in indices:
        caller, node = tracer.callers[index], acts[index].node
        if caller != "forward":
            raise refuse(f"calls it in {caller}, which may be called without forward")
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    graph.lint()
    return _text(graph, refuse)


def _lost(code: CodeType) -> str:
    """What a trace of this code would lose, empty if nothing."""
    baked = _BAKED_IN.intersection(code.co_names)
    if baked:
        return f"calls {min(baked)}"
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("BEFORE_WITH", "SETUP_WITH") or instruction.argrepr == "__enter__":
            return "has a with statement"
        if instruction.opname in ("STORE_ATTR", "STORE_GLOBAL"):
            return f"sets {instruction.argval}"
    return ""


def _text(graph: fx.Graph, refuse: Callable[[str], ConversionError]) -> Source:
    python = graph.python_code("self")
    used = set(_function(python.src, python.globals).__code__.co_names)
    names = []
    for name, value in python.globals.items():
        if name not in used:
            continue
        if isinstance(value, ModuleType):
            names.append((name, value.__name__, ""))
            continue
        where = (name, "math", name) if isinstance(value, float) else (
            name, getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
        )  # fmt: skip
        try:
            found = _find(where[1], where[2])
        except (ImportError, AttributeError, ValueError):
            found = None
        if found is not value and not isinstance(value, float):
            raise refuse(f"calls {short_name(value)}, which cannot be imported from anywhere")
        names.append(where)
    return Source(python.src, tuple(sorted(names)))


def _find(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def _function(code: str, names: dict[str, Any], filename: str = "<forward>") -> FunctionType:
    scope = dict(names)
    exec(compile(code, filename, "exec"), scope)
    return scope["forward"]


@functools.cache
def rewritten_class(base: type[nn.Module], train: Source, evaluate: Source) -> type[nn.Module]:
    """The class derived from `base` with one forward for training and one for evaluation."""
    functions = [_load(base, source) for source in dict.fromkeys((train, evaluate))]

    def choose(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return functions[0 if self.training else -1](self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = super(cls, self).__reduce_ex__(protocol)
        return _blank, (base, train, evaluate), *state

    cls = type(base)(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduce,
            "_zoo_rewrites": base,
            "forward": functions[0] if train == evaluate else functools.wraps(functions[0])(choose),
        },
    )
    return cls


def _blank(base: type[nn.Module], train: Source, evaluate: Source) -> nn.Module:
    cls = rewritten_class(base, train, evaluate)
    return cls.__new__(cls)


def _load(base: type[nn.Module], source: Source) -> FunctionType:
    # registered as a file, so that tracebacks and inspect show its lines
    filename = f"<forward of {base.__module__}.{base.__qualname__} without activations {hash(source):x}>"
    linecache.cache[filename] = (len(source.code), None, source.code.splitlines(keepends=True), filename)
    names = {name: _find(module, qualname) for name, module, qualname in source.names}
    return _function(source.code, names, filename)
