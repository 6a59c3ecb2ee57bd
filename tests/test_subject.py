"""The suite against somebody else's batch norm: green where that is right, red where not."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.bnext("the options, by a run inside a run"),
    pytest.mark.only("cpu", "about the suite's options, by runs on the CPU"),
]

THEIRS = textwrap.dedent("""
    import torch
    import torch.nn.functional as F

    class Right2d(torch.nn.BatchNorm2d):
        pass

    class Biased2d(torch.nn.BatchNorm2d):
        def forward(self, x):
            y = super().forward(x)
            if self.training and self.running_var is not None:
                n = x.numel() // x.shape[1]
                self.running_var.mul_(1 - 1 / n)
            return y

    def right(*args, **kwargs):
        return F.batch_norm(*args, **kwargs)

    def no_eps(input, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        return F.batch_norm(input, mean, var, weight, bias, training, momentum, 1e-5)
""")


def suite(tmp_path, *arguments):
    (tmp_path / "theirs.py").write_text(THEIRS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["tests/test_running_stats.py", "--bn", "theirs:Right2d"], 0),
        (["tests/test_running_stats.py", "--bn", "theirs:Biased2d"], 1),
        (["tests/test_forward.py", "-k", "test_eps", "--bn", "theirs:Right2d"], 0),
        (["tests/test_forward.py", "-k", "test_eps", "--functional", "theirs:right"], 0),
        (["tests/test_forward.py", "-k", "test_eps", "--functional", "theirs:no_eps"], 1),
        (["tests/test_threads.py", "--bn", "theirs:Right2d"], 0),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else value,
)
def test_another_batch_norm(arguments, code, tmp_path):
    result = suite(tmp_path, *arguments)
    assert result.returncode == code, result.stdout
    assert ("failed" in result.stdout) == bool(code)


def test_what_is_not_there_is_skipped_by_name(tmp_path):
    result = suite(tmp_path, "tests/test_running_stats.py", "--functional", "theirs:right")
    assert "no BatchNorm2d to test" in result.stdout
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--bn", "theirs"], "--bn: expected MODULE:NAME, got 'theirs'"),
        (["--bn", "theirs:Nothing"], "--bn: module 'theirs' has no attribute 'Nothing'"),
        (["--functional", "nowhere:f"], "--functional: No module named 'nowhere'"),
        (["--device", "cuda"], "--device cuda: torch finds no NVIDIA GPU here"),
    ],
    ids=str,
)
def test_what_is_not_there_is_one_sentence(arguments, sentence, tmp_path):
    result = suite(tmp_path, "tests/test_running_stats.py", *arguments)
    assert result.returncode == 4
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
