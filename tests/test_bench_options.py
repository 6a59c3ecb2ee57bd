"""The benchmark's command line: what it selects, and the sentence for what it refuses."""

import re
from pathlib import Path

import pytest
import torch

import bench.__main__ as command
from bench import options
from bench.suites import SUITES

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.bnext("bnext's benchmark"),
    pytest.mark.only("cpu", "about the benchmark's workings, on the CPU"),
]


SENTENCES = {
    "--shape 4,5,x": "argument --shape: expected N,C or N,C,L or N,C,H,W or N,C,D,H,W, all above 0, got '4,5,x'",
    "--shape 4,0,3": "argument --shape: expected N,C or N,C,L or N,C,H,W or N,C,D,H,W, all above 0, got '4,0,3'",
    "--dtype float8": "argument --dtype: expected some of float32,float64,bfloat16,float16, got 'float8'",
    "--op bn+gelu": "argument --op: expected some of bn,bn+relu,bn+add+relu, got 'bn+gelu'",
    "--mode train": "argument --mode: expected some of fwd,bwd,fwd_bwd,eval, got 'train'",
    "--layout chwn": "argument --layout: expected some of nchw,nhwc, got 'chwn'",
    "--suite resnet": "argument --suite: expected some of resnet50,vgg16,unet,detection,small,odd, got 'resnet'",
    "--backend tensorflow": "argument --backend: expected one of bnext, torch, torch-native, torch-mkldnn, compile, "
    "apex, inplace-abn or MODULE:FUNCTION, got 'tensorflow'",
    "--backend no.such:f": "argument --backend: no.such:f cannot be imported: No module named 'no'",
    "--backend math:pi": "argument --backend: expected math:pi to be a function with the signature of F.batch_norm, "
    "got <class 'float'>",
    "--baseline compile": "--baseline: expected one of --backend (bnext, torch), got 'compile'",
    "--threads 0": "argument --threads: expected a whole number from 1 on, got '0'",
    "--max-noise 5": "argument --max-noise: expected a percentage from 0% up, with its sign, such as 5%, got '5'",
    "--min-time -1": "argument --min-time: expected seconds, 0 or more, got '-1'",
    "--csv - --json -": "only one of --csv, --json and --md can be - at a time",
    "--json no/such/folder/x": "--json: expected a file in a folder that can be written to, got 'no/such/folder/x'",
    "--csv bench": "--csv: expected a file in a folder that can be written to, got 'bench'",
    "--csv s --json s": "--csv: s is the file of another option too",
    "--html -": "--html: expected a file in a folder that can be written to, got '-'",
    "--plot Makefile": "--plot: expected a folder, got 'Makefile'",
    "--min-time 5 --timeout 0": "--timeout: expected at least --min-time (5), got 0",
    "--backend test_bench_options:no": "argument --backend: test_bench_options:no cannot be imported: module "
    "'test_bench_options' has no attribute 'no'",
    "--cuda-graph": "--cuda-graph is for --device cuda",
    "--no-flush": "--no-flush is for --device cuda",
    "--device cuda": "--device cuda: torch finds no NVIDIA GPU here",
    "--plots x": "unrecognized arguments: --plots x",
}


@pytest.mark.parametrize("arguments", SENTENCES)
def test_bad_arguments_are_one_sentence(arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"python -m bench: {SENTENCES[arguments]}\n")


def test_help_and_list(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    for word in re.findall(r"--[a-z][a-z-]+", (ROOT / "README.md").read_text().replace("--no-build-isolation", "")):
        if f"python -m bench {word}" in (ROOT / "README.md").read_text():
            assert word in printed
    assert command.main(["--list", "--batch", "7"]) == 0
    printed = capsys.readouterr().out
    assert "    7x64x112x112        1 x  conv1\n" in printed
    assert "inplace-abn" in printed
    assert all(f"{name}: {suite.source}" in printed for name, suite in SUITES.items())


def test_selection_is_what_was_asked_for():
    args = options.parse("bench", ["--suite", "resnet50,small", "--batch", "3", "--shape", "2x3x4", "--threads", "1,2"])
    cases = [case for group in options.groups(args) for case in group]
    resnet = [case for case in cases if case.suite == "resnet50"]
    assert len(resnet) == 12 * 3 * 2 * 2
    assert {case.shape[0] for case in resnet} == {3}
    assert sum(case.count for case in resnet) == 53 * 12
    small = {case.shape for case in cases if case.suite == "small"}
    assert small == {layer.sizes for layer in SUITES["small"].layers}
    custom = [case for case in cases if case.suite == "custom"]
    assert [(case.mode, case.layout, case.threads) for case in custom] == [
        (mode, "nchw", threads) for mode in ("fwd", "bwd", "eval") for threads in (1, 2)
    ]
    assert {case.op for case in cases} == {"bn"}
    args = options.parse("bench", ["--shape", "2,3", "--op", "bn+relu,bn+add+relu", "--dtype", "float32,bfloat16"])
    assert [{(case.dtype, case.op) for case in group} for group in options.groups(args)] == [
        {(dtype, op)} for dtype in ("float32", "bfloat16") for op in ("bn+relu", "bn+add+relu")
    ]


def test_a_row_is_repeated_by_its_command():
    words = "--shape 4,6,5,3 --op bn+add+relu --dtype float64 --baseline bnext --max-noise 7% --mode fwd,bwd"
    given = words.split()
    args = options.parse("bench", [*given, "--min-time", "0", "--allocator", "default"])
    ((*_, case),) = options.groups(args)
    words = options.repro(case, "torch", args).split()
    assert words[:3] == ["python", "-m", "bench"]
    again = options.parse("bench", words[3:])
    assert list(options.groups(again)) == [[case]]
    assert (case.op, case.mode, case.layout, case.dtype) == ("bn+add+relu", "bwd", "nhwc", "float64")
    assert [backend.name for backend in again.backend] == ["torch", "bnext"]
    kept = ("baseline", "max_noise", "min_time", "timeout", "allocator", "run_once")
    assert [getattr(again, name) for name in kept] == ["bnext", pytest.approx(0.07), 0, 2, "default", False]
    words = options.repro(case, "floor", options.parse("bench", given[:2])).split()
    assert words[-2:] == ["--backend", "torch"]
