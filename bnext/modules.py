"""BatchNorm1d/2d/3d: torch's modules with bnext's forward."""

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bnext import activation, function
from bnext.activation import Act
from bnext.fallbacks import after_torch, needs_torch, overrides_torch, torch_batch_norm
from bnext.recomputation import recomputation


class _Forward(_BatchNorm):
    """The forward of torch's batch norm modules on bnext's ops; everything else about them is torch's.

    No state that has no default in the class: an instance of torch's becomes one of these by assigning __class__.

    frozen_stats: normalises by the running buffers, and leaves them and the counter alone, whatever training says;
    without running buffers that is an error. frozen_affine: the parameters that freeze_batchnorm switched off.
    """

    # Not annotated: torch.jit.script would look no further, and miss the annotations of torch's classes.
    frozen_stats = False
    frozen_affine = ()
    skip_nonfinite = False

    # torch.jit.script compiles one branch of forward
    __constants__ = (*_BatchNorm.__constants__, "frozen_stats", "skip_nonfinite")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        skip_nonfinite: bool = False,
    ) -> None:
        """torch's arguments, and skip_nonfinite, which guards running_mean and running_var (pytorch#88474).

        skip_nonfinite=True: a channel of a batch in which the mean or variance is not finite, as a number of the
        buffers' dtype, leaves that channel's running statistics as they are. skipped_batches, an int64 buffer [C] that
        no state_dict holds, counts such batches, from reset_running_stats() on. Output and num_batches_tracked are
        torch's. Raises ValueError with track_running_stats=False; the forward in training raises NotImplementedError
        where torch's own batch norm has to run (bnext/fallbacks.py).
        """
        newer = {} if bias else {"bias": False}  # some versions of torch do not have it
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **newer)
        if skip_nonfinite:
            if self.running_mean is None:
                raise ValueError("skip_nonfinite=True guards running statistics: expected track_running_stats=True")
            self.skip_nonfinite = True
            self.register_buffer("skipped_batches", self._no_skipped_batches(), persistent=False)

    def _no_skipped_batches(self) -> Tensor:
        return torch.zeros_like(self.running_mean, dtype=torch.int64)

    # torch.jit.script compiles this in place of the forward below; a method needs a name of its own to be compiled.
    _torch_forward = types.FunctionType(_BatchNorm.forward.__code__, _BatchNorm.forward.__globals__, "_torch_forward")

    def forward(self, input: Tensor) -> Tensor:
        """input [N, C, *] -> [N, C, *], as torch's module of the same name, errors and side effects included."""
        if torch.jit.is_scripting():
            return self._scripted_forward(input)
        else:
            return _forward(self, input)

    def _scripted_forward(self, input: Tensor) -> Tensor:
        if self.frozen_stats:
            return self._torch_frozen_forward(input)
        if self.skip_nonfinite and self.training:
            raise NotImplementedError("skip_nonfinite=True needs bnext's op: expected no training in TorchScript")
        return self._torch_forward(input)

    def _torch_frozen_forward(self, input: Tensor) -> Tensor:
        """torch's own batch norm, of a frozen layer."""
        self._check_input_dim(input)
        return torch_batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def reset_running_stats(self) -> None:
        """As torch's, with skipped_batches; frozen statistics stay."""
        if not self.frozen_stats:
            super().reset_running_stats()
            if self.skip_nonfinite:
                self.skipped_batches.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Forward":
        """As torch's, but skipped_batches stays int64 (type() casts all), and is 0 where it leaves the meta device."""
        before = getattr(self, "skipped_batches", None)
        super()._apply(fn, recurse)
        if before is not None:
            self.skipped_batches = self.skipped_batches.long()
            if before.is_meta and not self.skipped_batches.is_meta:
                self.skipped_batches.zero_()  # load_state_dict() would not
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """As torch's; with assign=True a layer leaves the meta device by it."""
        super()._load_from_state_dict(*args)
        if (count := getattr(self, "skipped_batches", None)) is not None and count.is_meta:
            self.skipped_batches = self._no_skipped_batches()

    def extra_repr(self) -> str:
        added = ("frozen_stats", "frozen_affine", "skip_nonfinite")
        said = [f"{name}={getattr(self, name)}" for name in added if getattr(self, name)]
        return ", ".join([super().extra_repr(), *said])


def _forward(module: _Forward, input: Tensor, residual: Tensor | None = None, act: Act = "identity") -> Tensor:
    if isinstance(input, fx.Proxy):  # torch.fx takes only torch.nn's own modules for leaves
        return _leaf(module, (input,) if residual is None else (input, residual))
    # Once each: torch takes most of a microsecond to find a parameter or buffer.
    weight, bias, running_mean, running_var = module.weight, module.bias, module.running_mean, module.running_var
    if overrides_torch(input) or needs_torch(input, weight, bias, running_mean, running_var, residual):
        return after_torch(_by_torch(module, input), residual, act)
    module._check_input_dim(input)
    counter, skipped, momentum, training = None, None, module.momentum, bool(module.training)
    if module.frozen_stats:
        training = False
    elif training:
        if module.track_running_stats and not recomputation.active:
            counter = module.num_batches_tracked
            if module.skip_nonfinite:
                skipped = module.skipped_batches
        else:
            running_mean = running_var = None
    else:
        training = running_mean is None and running_var is None
    if momentum is None and counter is None:
        momentum = 0.0  # torch: without a counter to average by, the buffers stay
    before = None if counter is None else _version(counter)
    try:
        return function.apply(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            counter,
            training,
            momentum,
            module.eps,
            skipped,
            residual,
            act,
        )
    except Exception:
        if counter is not None and _version(counter) == before:
            counter.add_(1)  # torch counts a batch before it looks at it
        raise


def _by_torch(module: _Forward, input: Tensor) -> Tensor:
    if module.frozen_stats:
        return module._torch_frozen_forward(input)
    if module.skip_nonfinite and module.training and module.track_running_stats:
        raise NotImplementedError(
            "skip_nonfinite=True needs bnext's op: expected no training under torch.func, torch.export, "
            "torch.jit.trace, forward-mode AD or a __torch_function__"
        )
    return _BatchNorm.forward(module, input)


def _leaf(module: _Forward, inputs: tuple[fx.Proxy, ...]) -> fx.Proxy:
    tracer = inputs[0].tracer
    path = tracer.path_of_module(module)
    if not path:
        raise fx.proxy.TraceError(f"{type(module).__name__} is a leaf of torch.fx: trace a module that holds it")
    return tracer.create_proxy("call_module", path, inputs, {})


def _version(counter: Tensor) -> int | None:
    """What tells whether the kernel has counted, where it can be asked for."""
    unknown = torch.compiler.is_compiling() or counter.is_inference()
    return None if unknown else counter._version


class BatchNorm1d(_Forward, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on bnext: input [N, C] or [N, C, L]."""


class BatchNorm2d(_Forward, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on bnext: input [N, C, H, W]."""


class BatchNorm3d(_Forward, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d on bnext: input [N, C, D, H, W]."""


_DROPS_ACTIVATION = {nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__, fuse_conv_bn_eval.__code__}


class _ActForward(_Forward):
    """_Forward, followed by the addition of a residual and an activation.

    act: "identity", "relu", "relu6", ("leaky_relu", slope), "silu" or "hardswish", as given.
    """

    act = "relu"
    __jit_unused_properties__ = ("eps",)

    def __init__(self, *args: Any, act: Act = "relu", **keywords: Any) -> None:
        """The arguments of bnext's BatchNorm of as many dimensions, and act. Raises ValueError for another act."""
        activation.parse(act)
        super().__init__(*args, **keywords)
        self.act = act

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(BatchNorm(input) + residual); input and residual [N, C, *] alike in dtype, device and memory format."""
        if torch.jit.is_scripting():
            return after_torch(self._scripted_forward(input), residual, self.act)
        else:
            return _forward(self, input, residual, self.act)

    @property
    def eps(self) -> float:
        """As of the base class. Raises TypeError for those of torch's tools that would drop the activation."""
        if not torch.compiler.is_dynamo_compiling():
            reader = sys._getframe(1).f_code
            if reader in _DROPS_ACTIVATION:
                raise TypeError(
                    f"{reader.co_name} would drop the activation of {type(self).__name__}: "
                    "expected a batch norm and its activation in modules of their own"
                )
        return vars(self)["eps"]

    @eps.setter
    def eps(self, value: float) -> None:
        vars(self)["eps"] = value

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


class BatchNormAct1d(_ActForward, BatchNorm1d):
    """BatchNorm1d, residual and activation in one: forward(input, residual=None)."""


class BatchNormAct2d(_ActForward, BatchNorm2d):
    """BatchNorm2d, residual and activation in one: forward(input, residual=None)."""


class BatchNormAct3d(_ActForward, BatchNorm3d):
    """BatchNorm3d, residual and activation in one: forward(input, residual=None)."""
