"""bnext: exact, fused batch normalisation for PyTorch, a drop-in for torch.nn.BatchNorm1d/2d/3d."""

import sys

# python -m bnext reports on what does not load, or crashes. Until it finds the module, sys.argv is -m and words.
if sys.argv[:1] != ["-m"] or sys.orig_argv[-len(sys.argv)] not in ("bnext", "-mbnext"):
    from bnext.backend import backend_for, is_cuda_available
    from bnext.convert import convert_batchnorm, revert_batchnorm
    from bnext.freeze import freeze_batchnorm, unfreeze_batchnorm
    from bnext.function import BatchNormFunction
    from bnext.functional import batch_norm, batch_norm_act
    from bnext.fuse import fuse_batchnorm_act
    from bnext.inspect import bn_stats
    from bnext.modules import (
        BatchNorm1d,
        BatchNorm2d,
        BatchNorm3d,
        BatchNormAct1d,
        BatchNormAct2d,
        BatchNormAct3d,
    )
    from bnext.plan import plan
    from bnext.recalibrate import update_bn
    from bnext.recomputation import checkpoint_context

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormFunction",
    "backend_for",
    "batch_norm",
    "batch_norm_act",
    "bn_stats",
    "checkpoint_context",
    "convert_batchnorm",
    "freeze_batchnorm",
    "fuse_batchnorm_act",
    "is_cuda_available",
    "plan",
    "revert_batchnorm",
    "unfreeze_batchnorm",
    "update_bn",
]
