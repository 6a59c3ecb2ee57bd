"""Every op, layout and dtype on small odd shapes, without a check of the results: for tools that watch the kernels.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/small_shapes.py cuda

Inputs are made on the CPU and copied, so that hardly any kernel but bnext's own runs.
"""

import itertools
import sys

import torch
from helpers import DTYPES, LAYOUTS, SMALL, channel_arguments, values

import bnext

# Beside SMALL: rows that are no multiple of a vector, several blocks to a channel, many channels, small planes that are
# whole vectors together, a single channel.
LARGER = [(3, 2, 50, 41), (2, 33, 28, 27), (9, 130, 7, 7), (40, 16, 7, 7), (700, 65), (2, 1025, 3), (1, 1, 300, 301)]


def everything(device: str) -> int:
    """Runs it all once; how many calls of ops that were."""
    calls = 0
    for shape, dtypes, layout in itertools.product(SMALL + LARGER, DTYPES, LAYOUTS):
        x, dy, residual = (values(shape, dtypes[0], layout).to(device) for _ in range(3))
        weight, bias, mean, var = (t.to(device) for t in channel_arguments(shape[1], dtypes[1]).values())
        counter = torch.tensor(3, device="cpu").to(device)
        saved = bnext.ops.batch_norm_train(x, weight, bias, mean, var, counter, None, 1e-5)[1:]
        bnext.ops.batch_norm_train(x, None, None, None, None, None, 0.1, 1e-5)
        bnext.ops.batch_norm_eval(x, weight, bias, mean, var, 1e-5)
        for training, mask in ((True, [True] * 3), (False, [True] * 3), (True, [True, False, False])):
            bnext.ops.batch_norm_backward(dy, x, weight, *saved, training, mask)
        calls += 6
        for act, added in (("relu", None), ("relu", residual), ("silu", residual)):
            after = (added, act, 0.0, added is not None)
            *_, mask = bnext.ops.batch_norm_act_train(x, weight, bias, None, None, None, 0.1, 1e-5, *after)
            bnext.ops.batch_norm_act_eval(x, weight, bias, mean, var, 1e-5, *after)
            again = added if mask is None else None
            for training in (True, False):
                wanted = [True, True, True, added is not None]
                rest = (*saved, again, mask, training, act, 0.0, wanted)
                bnext.ops.batch_norm_act_backward(dy, x, weight, bias, *rest)
            calls += 4
    return calls


if __name__ == "__main__":
    calls = everything(sys.argv[1])
    if sys.argv[1] == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls on {sys.argv[1]}")
