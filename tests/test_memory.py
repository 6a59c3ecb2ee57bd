"""What a call allocates: its results, and nothing of their size beside them."""

import subprocess
import sys
import textwrap

import pytest
from helpers import DEVICE, LAYOUTS

pytestmark = [
    pytest.mark.bnext("torch's own makes temporaries"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the CPU's peak from /proc"),
]

SCRIPT = textwrap.dedent("""
    import re, torch, bnext
    torch.set_num_threads(1)
    torch.set_default_device("{device}")
    x = torch.ones(8, 64, 256, 256, dtype=torch.{dtype}).{layout}
    layer = bnext.BatchNorm2d(64, dtype=torch.{params})
    def in_process(name):
        return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
    def reset():
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        open("/proc/self/clear_refs", "w").write("5")
        return in_process("VmRSS")
    def peak(call):
        before = reset()
        result = call()
        after = torch.cuda.max_memory_allocated() if x.is_cuda else in_process("VmHWM")
        return (after - before) / x.nbytes, result
    for x in (x[:, :, :8, :8], x):  # first a small one, for what is loaded at the first call
        x.requires_grad_()
        forward, y = peak(lambda: layer(x))
        dy = torch.ones_like(x)
        backward, _ = peak(lambda: torch.autograd.grad(y, [x, layer.weight, layer.bias], dy))
    print(forward, backward)
""")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "params"), [("bfloat16", "float32"), ("float16", "float16"), ("float32", "float32")])
def test_peak_of_a_step(dtype, params, layout):
    """In sizes of the input: 1 is the output, or grad_input; a float32 copy of a half tensor would be 2 more."""
    script = SCRIPT.format(
        device=DEVICE.type,
        dtype=dtype,
        params=params,
        layout=f"to(memory_format=torch.{layout}_format)".replace("last_format", "last"),
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    forward, backward = map(float, output.stdout.split())
    assert 0.9 < forward < 1.2
    assert 0.9 < backward < 1.2
