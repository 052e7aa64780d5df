"""What follows each normalisation of a model, read off a trace of its forward.

The trace is never run. A module whose forward cannot be traced (its path depends on values) counts as one step of its
parent's, and its children are traced each for itself.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partialmethod
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from .known import activation_kind
from .norm_hosts import norm_kind
from .report import short_name
from .traverse import has_matrices, places_of

# "act": only activations; "residual": an addition, and an activation after it; "condition": a scale or shift computed
# elsewhere; "zoo": an activation of this project; "unknown": the end of what could be traced; "plain": anything else.
Following = Literal["act", "residual", "condition", "zoo", "unknown", "plain"]

Place = tuple[nn.Module, str]

_ADDITIONS = {"add", "add_", "iadd", "sub", "sub_", "isub"}
_LAYERS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}
_PRODUCTS = {"mul", "mul_", "imul", "addcmul", "addcmul_"}


@dataclass(eq=False)
class Call:
    """One execution of a module's forward, with the activations it calls itself, in order."""

    module: nn.Module
    acts: list[Act] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)


@dataclass(eq=False)
class Act:
    """One call of an activation.

    Args:
        value: the module or function.
        call: the execution that calls it.
        index: which of its activations it is.
        place: where the module is registered; None for functions, and if it cannot be told.
        node: in the graph.
    """

    value: nn.Module | Callable[..., Any]
    call: Call
    index: int
    place: Place | None
    node: fx.Node


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a normalisation, and what becomes of its output.

    Args:
        following: what comes next.
        before: the layer whose output enters; None for the model's input, and if it cannot be told.
        on_input: whether the input of the model enters.
        on_layer: whether the output of layers enters, without an activation or a sum between.
        after: the first layer that follows.
        acts: the activations, if nothing else follows.
        ends_residual: in front of an addition, whether this is its longer branch.
    """

    following: Following
    before: nn.Module | None
    on_input: bool
    on_layer: bool
    after: nn.Module | None
    acts: tuple[Act, ...] = ()
    ends_residual: bool = False


@dataclass(frozen=True)
class Flow:
    """Calls of normalisations, by the module's id, and of activations."""

    uses: dict[int, list[Use]]
    acts: list[Act]


class _Value(fx.Proxy):
    """A proxy that keeps `x += y` apart from `x = x + y`: other names for x change with it."""

    def _in_place(self, operation: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    __iadd__ = partialmethod(_in_place, operator.iadd)
    __isub__ = partialmethod(_in_place, operator.isub)
    __imul__ = partialmethod(_in_place, operator.imul)
    __itruediv__ = partialmethod(_in_place, operator.itruediv)


class Tracer(fx.Tracer):
    """A tracer that knows who calls an activation, and goes on past what cannot be traced.

    Args:
        root: the module to trace.
        model: holds `root`, if that is only a part.
        shallow: every child is a step, and the graph is one to run.
    """

    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, model: nn.Module, *, shallow: bool = False) -> None:
        super().__init__()
        self.calls, self.model, self.shallow = [Call(root)], model, shallow
        self.opaque: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.shallow or norm_kind(m) or activation_kind(m) or isinstance(m, (_ConvNd, nn.Linear)):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.calls[-1].counts[id(m)] += 1
        if self.is_leaf_module(m, ""):
            return self._step(m, args, kwargs)
        mark = len(self.graph.nodes)
        self.calls.append(Call(m))
        try:
            return forward(*args, **kwargs)
        except Exception:  # whatever a forward raises on values it cannot look at; its children are traced alone
            for node in reversed(list(self.graph.nodes)[mark:]):
                self.graph.erase_node(node)
            self.opaque.append(m)
        finally:
            self.calls.pop()
        return self._step(m, args, kwargs)

    def _step(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy:
        name = self.path_of_module(m) if self.shallow else type(m).__name__
        proxy = self.create_proxy("call_module", name, args, kwargs)
        node = proxy.node
        node.meta["module"] = m
        if activation_kind(m):
            self._note(node, m, self._place(m))
        return proxy

    def create_node(self, kind: str, target: Any, *arguments: Any, **options: Any) -> fx.Node:
        node = super().create_node(kind, target, *arguments, **options)
        if kind in ("call_function", "call_method"):
            value = getattr(Tensor, target, None) if isinstance(target, str) else target
            if activation_kind(value):
                self._note(node, value, None)
        return node

    def _note(self, node: fx.Node, value: Any, place: Place | None) -> None:
        call = self.calls[-1]
        node.meta["act"] = act = Act(value, call, len(call.acts), place, node)
        call.acts.append(act)

    def _place(self, m: nn.Module) -> Place | None:
        call = self.calls[-1]
        names = [name for name, child in call.module._modules.items() if child is m]
        if len(names) == 1:
            return call.module, names[0]
        if type(call.module).forward is nn.Sequential.forward:  # runs its children in order
            return call.module, names[call.counts[id(m)] - 1]
        places = [] if names else places_of(self.model, m)
        return places[0] if len(places) == 1 else None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        own = (*self.root.parameters(), *self.root.buffers()) if self.shallow and isinstance(a, Tensor) else (a,)
        if not any(a is tensor for tensor in own):
            raise fx.proxy.TraceError("makes a tensor of its own")
        return super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        if self.shallow:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        # arguments that may be left out are
        wanted = [
            parameter.name
            for parameter in list(inspect.signature(root_fn).parameters.values())[1:]
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in wanted)]


@contextmanager
def in_mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """All these modules in one mode; afterwards each as it was, whatever a traced forward has stored in it."""
    held = [vars(module) for module in modules]
    inside = [value for attributes in held for value in attributes.values() if isinstance(value, (dict, list, set))]
    before = [(container, container.copy()) for container in (*held, *inside)]
    try:
        for attributes in held:
            attributes["training"] = training
        yield
    finally:
        for container, content in before:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def flow_of(model: nn.Module) -> Flow:
    """Every call of a normalisation and of an activation, in either mode, as far as the model can be traced."""
    flow = Flow({}, [])
    for training in (True, False):
        with in_mode(model.modules(), training):
            _trace(model, flow)
    return flow


def _trace(model: nn.Module, flow: Flow) -> None:
    roots, seen = [model], set[int]()
    while roots:
        root = roots.pop()
        if id(root) in seen:
            continue
        seen.add(id(root))
        tracer = Tracer(root, model)
        try:
            graph = tracer.trace(root)
        except Exception:  # as in Tracer.call_module
            roots += root.children()
            continue
        roots += [child for module in tracer.opaque for child in module.children()]
        for node in graph.nodes:
            if "act" in node.meta:
                flow.acts.append(node.meta["act"])
            module = node.meta.get("module")
            if norm_kind(module):
                flow.uses.setdefault(id(module), []).append(_use(node, whole=root is model))


def _use(node: fx.Node, *, whole: bool) -> Use:
    before, on_input = _source(node)
    context = (before, whole and on_input, all(map(_of_layers, node.all_input_nodes)), _next_layer(node))
    users = _users(node)
    acts = [user.meta["act"] for user in users if "act" in user.meta]
    kinds = {activation_kind(act.value) for act in acts}
    if len(node.all_input_nodes) > 1 or _conditioned(node):
        return Use("condition", *context)
    if "zoo" in kinds:
        return Use("zoo", *context)
    if acts and len(acts) == len(users) and kinds == {"hidden"}:
        return Use("act", *context, tuple(acts))
    for sum_ in _sums(node):
        after = [user.meta["act"] for user in _users(sum_) if "act" in user.meta]
        if any(activation_kind(act.value) == "hidden" for act in after):
            return Use("residual", *context, ends_residual=_is_longer_branch(node, sum_))
    ends = [user for start in (node, *_sums(node)) for user in _users(start)]
    if not whole and any(user.op == "output" for user in ends):
        return Use("unknown", *context)
    return Use("plain", *context)


def _users(node: fx.Node) -> list[fx.Node]:
    """Users of a value, those of an Identity in its place."""
    found = []
    for user in node.users:
        found += _users(user) if isinstance(user.meta.get("module"), nn.Identity) else [user]
    return found


def _named(node: fx.Node, names: set[str]) -> bool:
    """Whether a node is an operator, function or method of one of these names."""
    if node.op not in ("call_function", "call_method"):
        return False
    return (node.target if isinstance(node.target, str) else short_name(node.target)) in names


def _is_layer(node: fx.Node) -> bool:
    module = node.meta.get("module")
    return module is not None and (norm_kind(module) is not None or has_matrices(module))


def _sums(node: fx.Node) -> list[fx.Node]:
    """The first additions a value gets to, by way of dropout, gates and the like: no layer and no activation."""
    found, seen, waiting = [], set[fx.Node](), [node]
    while waiting:
        for user in waiting.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if _named(user, _ADDITIONS) and len(user.all_input_nodes) > 1:
                found.append(user)
            elif not _is_layer(user) and "act" not in user.meta:
                waiting.append(user)
    return found


def _conditioned(node: fx.Node) -> bool:
    """Whether an output is scaled or shifted by what a linear layer or embedding makes of something else."""
    for user in _users(node):
        if not _named(user, _ADDITIONS | _PRODUCTS):
            continue
        for other in user.all_input_nodes:
            source, _ = _source_of(other)
            if _makes_vectors(source) and node not in _ancestors(other):
                return True
        # scale, then shift, where the scale is a parameter or was made by arithmetic
        if _named(user, _PRODUCTS) and _conditioned(user):
            return True
    return False


def _makes_vectors(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding))


def _of_layers(node: fx.Node) -> bool:
    """Whether a value is what layers give, perhaps pooled, concatenated and the like."""
    if _is_layer(node):
        return norm_kind(node.meta["module"]) is None
    if _named(node, _LAYERS):
        return True
    if "act" in node.meta or not node.all_input_nodes or (_named(node, _ADDITIONS) and len(node.all_input_nodes) > 1):
        return False
    return all(map(_of_layers, node.all_input_nodes))


def _next_layer(node: fx.Node) -> nn.Module | None:
    """The first layer that a value gets to, by way of operations and activations."""
    seen, waiting = {node}, [node]
    for node in waiting:
        for user in node.users:
            if _is_layer(user):
                return user.meta["module"]
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return None


def _source(node: fx.Node) -> tuple[nn.Module | None, bool]:
    return _source_of(node.all_input_nodes[0]) if node.all_input_nodes else (None, False)


def _source_of(node: fx.Node) -> tuple[nn.Module | None, bool]:
    """The layer a value comes from, by way of operations without weights that take one value; or the model's input."""
    while not _is_layer(node):
        if node.op == "placeholder":
            return None, True
        if len(node.all_input_nodes) != 1:
            return None, False
        node = node.all_input_nodes[0]
    return node.meta["module"], False


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """A value and all it is computed from."""
    found, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


def _is_longer_branch(node: fx.Node, sum_: fx.Node) -> bool:
    """Whether the branch that ends in `node` has more layers than the one it is added to."""
    # the graph keeps in-place additions apart, so that each input of the sum is one branch
    inputs = [_ancestors(branch) for branch in sum_.all_input_nodes]
    own = next(branch for branch in inputs if node in branch)
    others = set[fx.Node]().union(*(branch for branch in inputs if branch is not own))
    return _layers(own - others) > _layers(others - own)


def _layers(nodes: Iterable[fx.Node]) -> int:
    return sum(1 for node in nodes if _is_layer(node) and not norm_kind(node.meta["module"]))
