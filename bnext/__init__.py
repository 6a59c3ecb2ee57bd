"""bnext: exact, fused batch normalisation for PyTorch, a drop-in for torch.nn.BatchNorm1d/2d/3d."""

from bnext.convert import convert_batchnorm, revert_batchnorm
from bnext.function import BatchNormFunction
from bnext.functional import batch_norm
from bnext.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnext.recalibrate import update_bn

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormFunction",
    "batch_norm",
    "convert_batchnorm",
    "revert_batchnorm",
    "update_bn",
]
