"""fuse_batchnorm_act: batch norms that apply the activation that follows them, and the sum between."""

import copy
import logging
from collections.abc import Iterator
from typing import TypeVar

from torch import fx, nn

from bnext.convert import convert_batchnorm
from bnext.patterns import Match, Uses, matches, objection, residual
from bnext.rewrite import WITH_ACT, absorb, rewrite, unfuse
from bnext.trace import Trace, is_chain, source, trace

_log = logging.getLogger("bnext")
_Module = TypeVar("_Module", bound=nn.Module)


def fuse_batchnorm_act(module: _Module) -> _Module:
    """Has the batch norms of module apply the activations that follow them, and sums between, in place; returns module.

    Fused are ReLU, ReLU6, leaky ReLU, SiLU and hardswish, as torch's modules, functions or methods, of what a batch
    norm gives or of its sum with another tensor [N, C, *], where one forward calls both, or a Sequential holds both.

    A batch norm becomes a BatchNormAct of the same object, Parameters, buffers and name; of torch's exact classes, all
    become bnext's first, as by convert_batchnorm. An activation module that does nothing else stays, and passes on what
    it gets. Otherwise, and for sums, the forward of the one module that calls them is written anew by torch.fx, its
    children as leaves, in a subclass of its class; what that forward read of its attributes is constant from then on.

    A warning of the "bnext" logger names the batch norms that are, or may be, followed by an activation and stay as
    they are, and why: a forward that torch.fx cannot follow or that depends on training, hooks, other uses.
    revert_batchnorm undoes it all; fusing again starts over. Raises ValueError, and changes nothing, where module holds
    but a part of what was fused before.
    """
    unfuse(module)
    convert_batchnorm(module)
    traces = {m: trace(m) for m in module.modules() if type(m).forward is not nn.Module.forward and any(_norms(m))}
    uses = Uses(module, traces)
    left: dict[nn.Module, str] = {}
    for owner, traced in traces.items():
        left |= _fuse(owner, traced, uses)
    for owner, traced in traces.items():
        if traced.untraceable:
            left = {norm: traced.untraceable for norm in _norms(owner) if type(norm) in WITH_ACT} | left
    names: dict[str, list[str]] = {}
    for name, layer in module.named_modules():
        if layer in left:
            names.setdefault(left[layer], []).append(name)
    if names:
        _log.warning("not fused: %s", "; ".join(f"{', '.join(of)} ({reason})" for reason, of in names.items()))
    return module


def _norms(module: nn.Module) -> Iterator[nn.Module]:
    """The batch norms that the forward of module may call: its children, and those of containers among them."""
    for child in module.children():
        if type(child) in WITH_ACT:
            yield child
        elif is_chain(child) or type(child).forward is nn.Module.forward:
            yield from _norms(child)


def _fuse(module: nn.Module, traced: Trace, uses: Uses) -> dict[nn.Module, str]:
    """Fuses what is found in the forward of module; returns the batch norms that are not, and why."""
    left, acts, paths = {}, {}, []
    for match in list(matches(module, traced.graph)):
        norm = match.layers[-1]
        passes = _can_pass(module, match, uses)
        if reason := objection(module, match, uses) or (None if passes else traced.as_written):
            left[norm] = reason
            continue
        acts[norm] = match.act
        if passes:
            _pass(module, match, uses)
        else:
            _rewire(traced.graph, match)
            paths.append(match.path)
    if paths:
        rewrite(module, source(traced.graph), paths)
    for norm, act in acts.items():
        norm.__class__, norm.act = WITH_ACT[type(norm)], act
    return left


def _can_pass(module: nn.Module, match: Match, uses: Uses) -> bool:
    """Whether the activation is a module that does nothing else, so that the forward can stay as it is."""
    node = match.nodes[0]
    if match.add or node.op != "call_module":
        return False
    activation = id(module.get_submodule(node.target))
    # One that has several names can be replaced where it is an item of a Sequential; torch.fx knows but one of them.
    return is_chain(module) if uses.names[activation] > 1 else uses.calls[activation] == 1


def _pass(module: nn.Module, match: Match, uses: Uses) -> None:
    name = match.nodes[0].target
    activation = module.get_submodule(name)
    if uses.names[id(activation)] > 1:
        activation = copy.deepcopy(activation)
        setattr(module, name, activation)
    absorb(activation, match.layers[-1])


def _rewire(graph: fx.Graph, match: Match) -> None:
    """Has one call of the batch norm in place of all nodes of match."""
    call = match.nodes[-1]
    value, path = call.all_input_nodes[0], call.target
    with graph.inserting_before(call):
        for chain in match.layers[:-1]:
            *names, last = chain._modules
            for name in names:
                value = graph.call_module(f"{path}.{name}", (value,))
            path = f"{path}.{last}"
    with graph.inserting_before(match.add or call):
        fused = graph.call_module(path, (value, residual(match)) if match.add else (value,))
    match.nodes[0].replace_all_uses_with(fused)
    for node in match.nodes:
        graph.erase_node(node)
