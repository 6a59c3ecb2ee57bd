"""The batch norms that can be measured, and the callables made of them, which are first checked and then timed."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import bnext
from bench import peers
from bench.cases import EPS, MOMENTUM, Inputs
from bench.peers import BatchNorm, Unsupported


def _unchanged(inputs: Inputs, mode: str) -> Inputs:
    return inputs


def _only_on_cuda(inputs: Inputs, mode: str) -> Inputs:
    if inputs.x.device.type != "cuda":
        raise Unsupported("there is no cuDNN on the CPU: torch is its native kernel")
    return inputs


def _as_mkldnn(inputs: Inputs, mode: str) -> Inputs:
    """The same values in oneDNN's own tensors."""
    if inputs.x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise Unsupported("oneDNN's batch norm is one of torch for CPUs")
    if inputs.x.dtype != torch.float32 or inputs.x.dim() not in (4, 5) or not inputs.x.is_contiguous():
        raise Unsupported("torch has oneDNN's batch norm in float32, [N, C, H, W] or [N, C, D, H, W], nchw")
    residual = inputs.residual if inputs.residual is None else inputs.residual.to_mkldnn()
    return replace(inputs, x=inputs.x.to_mkldnn(), dy=inputs.dy.to_mkldnn(), residual=residual)


def _native(*arguments: Tensor | float | bool | None) -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        return F.batch_norm(*arguments)


def _bnext(op: str) -> BatchNorm:
    return bnext.batch_norm if op == "bn" else bnext.batch_norm_act


def composed(batch_norm: BatchNorm, op: str) -> BatchNorm:
    """op of a batch norm alone and eager torch's sum and ReLU, both in place, as torchvision's ResNet has them.

    In place is the fastest that eager torch has: it moves no more tensors, and asks for no fresh memory.
    """
    if op == "bn":
        return batch_norm

    def with_relu(*arguments: Tensor | float | bool | None, residual: Tensor | None = None) -> Tensor:
        y = batch_norm(*arguments)
        if residual is not None:
            y += residual
        return y.relu_()

    return with_relu


def _torch(op: str) -> BatchNorm:
    return composed(F.batch_norm, op)


def _compiled(op: str) -> BatchNorm:
    """What torch runs through torch.compile, compiled anew for what it is called with first; so is its backward."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # a backward that frees what it reads could be timed only once
    return torch.compile(_torch(op), dynamic=False)


@dataclass(frozen=True)
class Backend:
    """make(op): a function with the signature of F.batch_norm and, where op adds one, residual; new for each case.

    package: what must be installed for it. prepare(inputs, mode): the inputs as it takes them; raises Unsupported.
    """

    name: str
    about: str
    make: Callable[[str], BatchNorm]
    prepare: Callable[[Inputs, str], Inputs] = _unchanged
    package: str = ""

    @property
    def installed(self) -> bool:
        """Whether its package, if it needs one, can be imported."""
        try:
            return not self.package or importlib.util.find_spec(self.package) is not None
        except ImportError:
            return False


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("bnext", "bnext.batch_norm, batch_norm_act", _bnext),
        Backend("torch", "F.batch_norm as it comes", _torch),
        Backend("torch-native", "F.batch_norm with cuDNN off (CUDA)", partial(composed, _native), _only_on_cuda),
        Backend("torch-mkldnn", "F.batch_norm on oneDNN's tensors (CPU, float32)", _torch, _as_mkldnn),
        Backend("compile", "torch.compile of what torch runs; seconds before each case", _compiled),
        Backend("apex", "apex.contrib.groupbn (CUDA, float16, nhwc)", peers.apex, peers.for_apex, "apex"),
        Backend("inplace-abn", "inplace_abn without activation", peers.inplace_abn, peers.for_abn, "inplace_abn"),
    )
}
DEFAULT = {"cpu": ("bnext", "torch"), "cuda": ("bnext", "torch", "torch-native")}


def find(name: str) -> Backend:
    """A backend by its name, or MODULE:FUNCTION; ValueError where there is none."""
    if name in BACKENDS:
        return BACKENDS[name]
    module, _, function = name.partition(":")
    if not (module and function):
        raise ValueError(f"expected one of {', '.join(BACKENDS)} or MODULE:FUNCTION, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the module does
        raise ValueError(f"{name} cannot be imported: {' '.join(str(error).split())}") from None
    if not callable(found):
        raise ValueError(f"expected {name} to be a function with the signature of F.batch_norm, got {type(found)}")
    return Backend(name, "yours", partial(composed, found))


@dataclass(frozen=True)
class Candidate:
    """call does the work that is timed; names are those of its results; buffers it may update in place."""

    call: Callable[[], Tensor | tuple[Tensor, ...]]
    names: tuple[str, ...]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def outputs(self) -> dict[str, Tensor]:
        """Everything that one call produced, by name."""
        result = self.call()
        returned = (result,) if isinstance(result, Tensor) else result
        dense = (t.to_dense() if t.is_mkldnn else t for t in returned)
        return dict(zip(self.names, dense, strict=True)) | self.buffers


def candidate(backend: Backend, inputs: Inputs, mode: str) -> Candidate:
    """The backend in one mode, with running buffers of its own.

    fwd and fwd_bwd record a graph, as in training; eval does not; bwd walks one recorded beforehand. Gradients are of
    x, weight, bias and, where there is one, residual.
    """
    prepared = backend.prepare(inputs, mode)
    batch_norm = backend.make(inputs.op)
    differentiable = {"dx": prepared.x, "dw": prepared.weight, "db": prepared.bias, "dresidual": prepared.residual}
    gradients = {name: t.detach().requires_grad_(mode != "eval") for name, t in differentiable.items() if t is not None}
    x, weight, bias, *_ = leaves = tuple(gradients.values())
    more = {"residual": gradients["dresidual"]} if "dresidual" in gradients else {}
    if mode == "bwd":
        y = batch_norm(x, None, None, weight, bias, True, MOMENTUM, EPS, **more)
        return Candidate(lambda: torch.autograd.grad(y, leaves, prepared.dy, retain_graph=True), tuple(gradients))
    mean, var = inputs.running_mean.clone(), inputs.running_var.clone()
    buffers = {"running_mean": mean, "running_var": var}

    def forward() -> Tensor:
        return batch_norm(x, mean, var, weight, bias, mode != "eval", MOMENTUM, EPS, **more)

    def both() -> tuple[Tensor, ...]:
        y = forward()
        return (y.detach(), *torch.autograd.grad(y, leaves, prepared.dy))

    if mode == "fwd_bwd":
        return Candidate(both, ("y", *gradients), buffers)
    return Candidate(forward, ("y",), buffers)
