"""What the forward of one module calls, by torch.fx, its children as leaves; and whether that is all it does."""

import contextlib
import copy
import inspect
import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

_DEVICES = ("cpu", "cuda")  # of autocast


class Trace(NamedTuple):
    """graph: the calls; empty where torch.fx cannot follow them, and untraceable says why.

    as_written: why the forward must not be written anew from the graph.
    """

    graph: fx.Graph
    untraceable: str | None = None
    as_written: str | None = None


def trace(module: nn.Module) -> Trace:
    """The forward of module: one for training and evaluation, with and without gradients or autocast."""
    if "forward" in vars(module):
        return Trace(fx.Graph(), "its forward is set on the object")
    if is_chain(module):
        return Trace(_chain(module), as_written="its activation is called elsewhere, too")
    try:
        with _untouched(module) as changed:
            (graph, seen), (again, seen_again) = [_graph(module, grad, autocast=not grad) for grad in (True, False)]
        if source(graph) != source(again):
            return Trace(fx.Graph(), "its forward is another one under torch.no_grad() or autocast")
        if changed:
            seen = f"its forward changes {', '.join(changed)}"
        return Trace(graph, as_written=seen or seen_again or _bound(module, graph))
    except Exception as error:  # whatever the forward of a user raises on proxies
        return Trace(fx.Graph(), _reason(error))


def is_chain(module: nn.Module) -> bool:
    """Whether calling module is calling its children one after the other, as nn.Sequential does."""
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def source(graph: fx.Graph) -> str:
    """Python code that defines a function forward, with the imports that it needs."""
    code = graph.python_code("self")
    return f"{_format_import_block(code.globals, sys_importer)}\n{code.src}"


def _chain(module: nn.Module) -> fx.Graph:
    """The graph of a Sequential, which torch.fx would give one name for the two places of an object."""
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name in module._modules:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[list[str]]:
    """Undoes what a forward does to attributes of module, their items if lists or dicts; gives their names.

    Inside there is no `training`: a forward that reads it cannot be traced, whatever it would make of it.
    """
    modes = {m: vars(m).pop("training") for m in module.modules() if "training" in vars(m)}
    before = dict(vars(module))
    items = {name: copy.copy(value) for name, value in before.items() if type(value) in (list, dict)}
    changed: list[str] = []
    try:
        yield changed
    finally:
        changed += [name for name, value in vars(module).items() if before.get(name, changed) is not value]
        changed += [name for name, were in items.items() if not _same_items(before[name], were)]
        for name, were in items.items():
            before[name].clear()
            before[name].extend(were) if isinstance(were, list) else before[name].update(were)
        vars(module).clear()
        vars(module).update(before)
        for m, mode in modes.items():
            m.training = mode


def _same_items(a: list[Any] | dict[Any, Any], b: list[Any] | dict[Any, Any]) -> bool:
    values = [list(c.values()) if isinstance(c, dict) else c for c in (a, b)]
    return len(a) == len(b) and all(map(operator.is_, *values))


def _graph(module: nn.Module, grad: bool, autocast: bool) -> tuple[fx.Graph, str | None]:
    """The graph, and what is seen of the forward that no graph tells."""
    before = [torch.is_autocast_enabled(device) for device in _DEVICES]
    try:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, autocast)
        with torch.set_grad_enabled(grad):
            tracer = _Tracer()
            graph = tracer.trace(module)
    finally:
        for device, enabled in zip(_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, enabled)
    for node in graph.nodes:
        node.type = None  # annotations of a user may have no name to import them by
    if any(proxy() is not None for proxy in tracer.proxies):
        tracer.seen = "its forward keeps what it computes"
    return graph, tracer.seen


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, AttributeError) and "attribute 'training'" in text:
        return "its forward depends on training mode"
    return f"torch.fx cannot trace its forward, {type(error).__name__}: {text.partition(chr(10))[0]}"


def _bound(module: nn.Module, graph: fx.Graph) -> str | None:
    """Why an object with the forward of graph could not stand for module."""

    def parameters(forward: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        _, *others = inspect.signature(forward).parameters.values()
        return [(p.name, p.kind, p.default) for p in others]

    if type(module).__reduce_ex__ is not object.__reduce_ex__ or type(module).__reduce__ is not object.__reduce__:
        return "its class pickles in a way of its own"
    written = parameters(type(module).forward)
    if any(default is None for _, _, default in written):
        return "an argument of its forward may be None"
    namespace: dict[str, Any] = {}
    exec(source(graph), namespace)
    return None if parameters(namespace["forward"]) == written else "torch.fx changes the arguments of its forward"


class _Tracer(fx.Tracer):
    """Every module is a leaf. seen: something that a graph cannot tell, such as torch.no_grad()."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math,))
        self.proxies: list[weakref.ref[fx.Proxy]] = []
        self.seen: str | None = None
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            self.seen = "its forward switches gradients or autocast"
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        if node.op != "get_attr":  # fx.Tracer keeps those of parameters and buffers
            self.proxies.append(weakref.ref(proxy))
        return proxy


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(torch.is_autocast_enabled, _DEVICES)


class _Proxy(fx.Proxy):
    """Tells the tracer when a forward asks for its type, and does in place what fx.Proxy takes for out of place."""

    @property
    def __class__(self) -> type:
        """What isinstance() looks at."""
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            self.tracer.seen = "its forward asks for the type of a value"
        return _Proxy


def _in_place(function: Callable[..., Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))
