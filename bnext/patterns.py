"""Where the forward of a module calls a batch norm and an activation of what it gives, or of a sum with it."""

import itertools
import operator
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from bnext.activation import Act
from bnext.rewrite import WITH_ACT
from bnext.trace import Trace, is_chain

_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    "relu": "relu",  # methods of a tensor
    "relu_": "relu",
}
_SUMS = (operator.add, torch.add, "add")
_SUMS_IN_PLACE = (operator.iadd, "add_")


class Match(NamedTuple):
    """A batch norm and an activation in a graph.

    nodes: from the activation's call back to that of the batch norm, or of a Sequential that ends in it: what the one
    call of a fused layer stands for. add: the sum among them, or None. layers: the called one, down to the batch norm,
    which has the name path in the module.
    """

    nodes: list[fx.Node]
    add: fx.Node | None
    layers: list[nn.Module]
    path: str
    act: Act


class Uses:
    """How often each module has a name in a model, and is called by the forwards that were traced."""

    def __init__(self, model: nn.Module, traces: dict[nn.Module, Trace]) -> None:
        self.names = Counter(id(child) for m in model.modules() for child in m._modules.values())
        self.calls = Counter(
            id(m.get_submodule(node.target))
            for m, traced in traces.items()
            for node in traced.graph.find_nodes(op="call_module")
        )


def matches(module: nn.Module, graph: fx.Graph) -> Iterator[Match]:
    """Each activation of what a batch norm gives, or of a sum with that, nn.Identity passed over.

    Of a sum of two batch norms, one: that which the forward calls, or else the first.
    """
    for node in graph.nodes:
        act, given = _act(module, node), node.all_input_nodes
        if act is None or len(given) != 1:
            continue
        nodes = [node, *_passed(module, given[0])]
        if found := _norm(module, nodes[-1], through=False):
            yield Match(nodes, None, *found, act)
        elif _is_sum(add := nodes[-1]):
            terms = [_passed(module, term) for term in add.args]
            for through, term in itertools.product((False, True), terms):
                if found := _norm(module, term[-1], through):
                    yield Match(nodes + term, add, *found, act)
                    break


def objection(module: nn.Module, match: Match, uses: Uses) -> str | None:
    """Why the batch norm of a match cannot take over the activation, by whatever means; or None."""
    add, call, before = match.add, match.nodes[-1], match.nodes[1:]
    called = match.layers + [module.get_submodule(node.target) for node in match.nodes if node.op == "call_module"]
    if any(_has_hooks(layer) or "forward" in vars(layer) for layer in called):
        return "hooks, or a forward set on the object"
    if any(uses.names[id(layer)] > 1 or uses.calls[id(layer)] > 1 for layer in match.layers):
        return "in several places"
    if any(len(node.users) > 1 for node in before):
        return "its output is used elsewhere, too"
    if len(call.args) != 1 or call.kwargs:
        return "called with keywords"
    if add is None:
        return None
    if add.kwargs:
        return "a sum with keywords, as alpha is"
    if add.target in _SUMS_IN_PLACE and add.args[0] not in before:
        return "a sum in place of the other term"
    if residual(match).op == "get_attr" or residual(match) in before:
        return "a sum with a parameter, a buffer or itself"
    # The call moves to the sum. What is given to the last of several layers of a Sequential, nobody else sees.
    moved = all(len(chain) == 1 for chain in match.layers[:-1])
    if moved and any(call < user < add for user in call.args[0].users):
        return "its input is used again before the sum"
    return None


def residual(match: Match) -> fx.Node:
    """The other term of the sum."""
    a, b = match.add.args
    return b if a in match.nodes else a


def _passed(module: nn.Module, node: fx.Node) -> list[fx.Node]:
    """node and, as long as that is a call of nn.Identity, what it is given."""
    nodes = [node]
    while nodes[-1].op == "call_module" and type(module.get_submodule(nodes[-1].target)) is nn.Identity:
        nodes += nodes[-1].all_input_nodes[:1]
    return nodes


def _norm(module: nn.Module, call: fx.Node, through: bool) -> tuple[list[nn.Module], str] | None:
    """Layers and path, as of a Match, of a call of a batch norm; through: or of a Sequential that ends in one."""
    if call.op != "call_module":
        return None
    path, layers = call.target, [module.get_submodule(call.target)]
    while through and is_chain(layers[-1]) and len(layers[-1]) > 0:
        path += f".{next(reversed(layers[-1]._modules))}"
        layers.append(module.get_submodule(path))
    return (layers, path) if type(layers[-1]) in WITH_ACT else None


def _is_sum(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or node.target not in _SUMS + _SUMS_IN_PLACE:
        return False
    return len(node.args) == 2 and all(isinstance(term, fx.Node) for term in node.args)


def _act(module: nn.Module, node: fx.Node) -> Act | None:
    name, slope = None, None
    if node.op == "call_module":
        layer = module.get_submodule(node.target)
        name, slope = _MODULES.get(type(layer)), getattr(layer, "negative_slope", None)
    elif node.op in ("call_function", "call_method"):
        name = _FUNCTIONS.get(node.target)
        slope = (*node.args[1:], node.kwargs.get("negative_slope", 0.01))[0]
    if name == "leaky_relu":
        return (name, slope) if isinstance(slope, float | int) else None
    return name


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return any(getattr(module, f"_{kind}") for kind in kinds)
