"""python -m bench compare: its exit codes and its table, for documents that are written here."""

import argparse
import json
import re

import pytest

from bench import compare
from bench.cases import Case
from bench.rows import FAILED, FLOOR, NOT_INSTALLED, OUT_OF_MEMORY, SCHEMA, UNSUPPORTED, WRONG, Row

pytestmark = [
    pytest.mark.bnext("bnext's benchmark"),
    pytest.mark.only("cpu", "about the benchmark's workings, on the CPU"),
]

SHAPE = (32, 64, 56, 56)


def row(us=100.0, backend="bnext", noise=0.01, timings=11, status="ok", detail="", **case):
    """As the benchmark writes it, with so many timings of this median and this noise."""
    fields = {"suite": "resnet50", "layer": "conv2", "shape": SHAPE, "count": 6, "mode": "fwd", "layout": "nchw"}
    fields |= {"dtype": "float32", "device": "cpu", "threads": 1}
    steps = [0.0] if timings == 1 else [-noise] * 4 + [0.0] * 3 + [noise] * 4
    samples = tuple(us * 1e-6 * (1 + step) for step in steps) if status == "ok" else ()
    return Row(Case(**fields | case), backend, status, detail, samples).as_dict()


def document(*rows, device="AMD EPYC (AVX512)", **changes):
    environment = {"device": device, "torch": "2.13.0+cpu", "collect_env": {"cpu_info": "64 cores"}}
    whole = {"schema": SCHEMA, "date": "2026-01-02 03:04 UTC", "argv": [], "interrupted": False}
    return whole | {"environment": environment, "settings": {"min_time": 0.5}, "rows": list(rows)} | changes


def parsed(*options):
    parser = argparse.ArgumentParser("python -m bench compare")
    compare.add_arguments(parser)
    return parser.parse_args(options)


@pytest.fixture
def compared(tmp_path, capsys):
    """(exit code, stdout, stderr) of the command on two documents, or on two texts, with these options."""

    def run(old, new, *options):
        for name, content in (("old", old), ("new", new)):
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text)
        code = compare.run(parsed(str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options))
        return code, *capsys.readouterr()

    return run


def table(out):
    """The table's lines as dicts."""
    lines = [line for line in out.splitlines() if "  " in line.strip()]
    head, *body = (re.split(r"  +", line) for line in lines)
    assert head[-1] == "verdict"
    return [dict(zip(head, line, strict=True)) for line in body]


def test_the_table_has_the_figures(compared):
    old = document(row(100), row(200, mode="bwd", layout="nhwc", threads=2), row(50, "native"))
    new = document(row(110), row(150, mode="bwd", layout="nhwc", threads=2), row(50.2, "native"))
    code, out, err = compared(old, new)
    assert (code, err) == (0, "")
    assert [list(line.values()) for line in table(out)] == [
        ["32x64x56x56", "bn", "fwd", "nchw", "float32", "cpu 1", "bnext", "100.0", "110.0", "1.100", "1.4%", "slower"],
        ["32x64x56x56", "bn", "bwd", "nhwc", "float32", "cpu 2", "bnext", "200.0", "150.0", "0.750", "1.4%", "faster"],
        ["32x64x56x56", "bn", "fwd", "nchw", "float32", "cpu 1", "native", "50.0", "50.2", "1.004", "1.4%", "same"],
    ]


def test_the_columns_are_aligned(compared):
    wide = {"shape": (2, 65537, 3, 3), "mode": "fwd_bwd", "dtype": "bfloat16"}
    _, out, _ = compared(document(row(1), row(123456, **wide)), document(row(1), row(123456, **wide)))
    lines = [line for line in out.splitlines() if line.endswith(("same", "verdict"))]
    assert len(lines) == 3
    assert len({re.search(r"verdict|same", line).start() for line in lines}) == 1
    assert len({re.search(r"new us|1\.0(?=  1)|123456\.0(?=  1\.000)", line).end() for line in lines}) == 1


@pytest.mark.parametrize(("us", "verdict"), [(104.9, "same"), (105.1, "slower"), (95.1, "same"), (94.9, "faster")])
def test_the_noise_is_that_of_both(compared, us, verdict):
    _, out, _ = compared(document(row(100, noise=0.03)), document(row(us, noise=0.04)))
    assert [(line["+-"], line["verdict"]) for line in table(out)] == [("5.0%", verdict)]


@pytest.mark.parametrize(
    ("us", "noise", "code"),
    [(105.1, 0.001, 1), (104.9, 0.001, 0), (90, 0.001, 0), (120, 0.2, 0), (120, 0.1, 1)],
)
def test_fails_above_the_limit_and_the_noise(compared, us, noise, code):
    old, new = document(row(100, noise=noise)), document(row(us, noise=noise))
    found, out, err = compared(old, new, "--fail-above", "5%")
    assert (found, err) == (code, "")
    assert out.splitlines()[-1] == f"rows slower by more than 5% and their noise: {code}, lost: 0"
    assert compared(old, new)[0] == 0


def test_one_bad_row_of_many_fails(compared):
    modes = ("fwd", "bwd", "fwd_bwd", "eval")
    old = document(*(row(100, mode=mode) for mode in modes))
    new = document(*(row(130 if mode == "eval" else 50, mode=mode) for mode in modes))
    assert compared(old, new, "--fail-above", "20%")[0] == 1
    assert compared(old, new, "--fail-above", "31%")[0] == 0


def test_one_timing_tells_no_noise(compared):
    code, out, _ = compared(document(row(100)), document(row(900, timings=1)), "--fail-above", "5%")
    assert code == 0
    assert [(line["ratio"], line["+-"], line["verdict"]) for line in table(out)] == [("9.000", "inf%", "same")]


@pytest.mark.parametrize("status", [WRONG, FAILED, OUT_OF_MEMORY, UNSUPPORTED, NOT_INSTALLED])
def test_a_lost_row_fails(compared, status):
    old, new = (
        document(row(100), row(100, mode="bwd")),
        document(row(100, status=status, detail="why"), row(mode="bwd")),
    )
    code, out, _ = compared(old, new, "--fail-above", "5%")
    assert code == 1
    assert [line["verdict"] for line in table(out)] == [f"lost: {status}, why", "same"]
    assert [line["new us"] for line in table(out)] == ["-", "100.0"]
    assert out.splitlines()[-1] == "rows slower by more than 5% and their noise: 0, lost: 1"
    assert compared(old, new)[0] == 0


def test_a_row_without_figures_before_is_not_lost(compared):
    bad = row(status=WRONG)
    code, out, _ = compared(document(bad, row(mode="bwd", status=WRONG)), document(row(), bad | {"mode": "bwd"}))
    assert code == 0
    assert [line["verdict"] for line in table(out)] == ["gained", "none: wrong"]
    assert "bnext:" not in out  # no ratio, so no mean


def test_the_floor_is_a_control_that_never_fails(compared):
    old = document(row(100), row(10, FLOOR), row(10, FLOOR, mode="bwd"), row(10, FLOOR, mode="eval"))
    new = document(row(100), row(20, FLOOR), row(80, FLOOR, mode="bwd"), row(status=FAILED, backend=FLOOR, mode="eval"))
    code, out, _ = compared(old, new, "--fail-above", "5%")
    assert code == 0
    assert [line["backend"] for line in table(out)] == ["bnext"]
    assert "  floor: 4.000, rows: 2, the control: what the machine itself changed by" in out.splitlines()
    code, out, _ = compared(old, new, "--fail-above", "5%", "--backend", "floor")
    assert code == 0
    assert [line["verdict"] for line in table(out)] == ["slower", "slower", "lost: failed"]
    assert "  floor: 4.000, rows: 2, the control: what the machine itself changed by" in out.splitlines()


def test_geometric_means_by_backend(compared):
    old = document(row(100), row(100, mode="bwd"), row(100, "native"))
    new = document(row(400), row(100, mode="bwd"), row(25, "native"))
    lines = compared(old, new)[1].splitlines()
    start = lines.index("geometric means of new/old:")
    assert lines[start + 1 :] == ["  bnext: 2.000, rows: 2", "  native: 0.250, rows: 1"]


def test_backend_narrows(compared):
    old, new = document(row(), row(100, "native"), row(1, "jit")), document(row(), row(200, "native"), row(9, "jit"))
    assert compared(old, new, "--fail-above", "5%")[0] == 1
    code, out, _ = compared(old, new, "--fail-above", "5%", "--backend", "bnext")
    assert (code, [line["backend"] for line in table(out)]) == (0, ["bnext"])
    assert "native" not in out
    _, out, _ = compared(old, new, "--backend", "native,bnext")
    assert [line["backend"] for line in table(out)] == ["bnext", "native"]
    code, out, err = compared(old, new, "--backend", "bnext,typo")
    assert (code, out, err) == (2, "", "compare: --backend: expected some of bnext, native, jit, got typo\n")


@pytest.mark.parametrize(
    "change",
    ["shape 16", "op bn+relu", "mode bwd", "layout nhwc", "dtype float16", "device cuda", "threads 2", "backend b"],
)
def test_rows_match_by_all_of_the_key(compared, change):
    field, value = change.split()
    change = {field: {"threads": 2, "shape": (16, 64, 56, 56)}.get(field, value)}
    message = "expected rows in common, got 1 in OLD, 1 in NEW, none in both"
    refused(compared(document(row()), document(row(**change))), message)


def test_a_file_from_before_there_were_other_ops_is_one_of_batch_norms(compared):
    before = {name: value for name, value in row(100).items() if name != "op"}
    code, out, _ = compared(document(before), document(row(200), row(300, op="bn+relu")))
    assert (code, [line["ratio"] for line in table(out)]) == (0, ["2.000"])
    assert "rows only in NEW: 1, 32x64x56x56 bn+relu fwd nchw float32 cpu 1 bnext" in out.splitlines()


def test_rows_match_whatever_suite_they_are_of(compared):
    code, out, _ = compared(document(row(100)), document(row(200, suite="", layer="32x64x56x56", count=1)))
    assert (code, [line["ratio"] for line in table(out)]) == (0, ["2.000"])


def test_a_shape_in_two_suites_is_matched_in_turn(compared):
    two = [row(100), row(200, suite="unet")]
    code, out, _ = compared(document(*two), document(row(110), row(status=WRONG, suite="unet")), "--fail-above", "50%")
    assert code == 1
    assert [(line["old us"], line["verdict"]) for line in table(out)] == [("100.0", "slower"), ("200.0", "lost: wrong")]
    assert "rows only in OLD: 1, 32x64x56x56 " in compared(document(*two), document(row(100)))[1]


def test_rows_of_one_file_alone_are_named(compared):
    extra = [row(mode=mode) for mode in ("bwd", "fwd_bwd", "eval")]
    code, out, _ = compared(document(row(), *extra, row(5, FLOOR)), document(row()), "--fail-above", "0%")
    assert code == 0
    named = "; ".join(f"32x64x56x56 bn {mode} nchw float32 cpu 1 bnext" for mode in ("bwd", "fwd_bwd", "eval"))
    assert f"rows only in OLD: 3, {named}" in out.splitlines()
    _, out, _ = compared(document(row()), document(*extra, row(), row(layout="nhwc")))
    assert f"rows only in NEW: 4, {named}; ..." in out.splitlines()
    assert "only in OLD" not in out


def test_what_else_changed_is_said(compared):
    old = document(row(), settings={"min_time": 0.5, "flush": True})
    new = document(row(), settings={"min_time": 0.5, "flush": False})
    new["environment"] |= {"torch": "2.14.0", "collect_env": {"cpu_info": "32 cores"}}
    lines = compared(old, new)[1].splitlines()
    assert lines[:2] == ["torch: 2.13.0+cpu in OLD, 2.14.0 in NEW", "flush: True in OLD, False in NEW"]
    assert lines[2].startswith("shape ")


def refused(result, *parts):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("compare: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_refuses_another_device(compared):
    result = compared(document(row()), document(row(), device="NVIDIA H200"), "--fail-above", "5%")
    refused(result, "expected files of one device, got OLD of 'AMD EPYC (AVX512)' and NEW of 'NVIDIA H200'")


def test_refuses_an_unknown_schema(compared):
    refused(compared(document(row()), document(row(), schema=2)), "NEW ", f"expected schema {SCHEMA}, got 2")


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "got no JSON (Expecting value"),
        ("\0\1", "got no JSON ("),
        ("[1, 2]", "got JSON without a schema"),
        ('{"rows": []}', "got JSON without a schema"),
        (json.dumps({"schema": SCHEMA}), "got one without environment, settings, rows"),
        (json.dumps(document(environment={})), "got one without environment.device"),
        (json.dumps(document(rows={})), "got one without rows"),
        (json.dumps(document(rows=[7])), "in row 0, got TypeError"),
        (json.dumps(document(row(), {"shape": [1]})), "in row 1, got KeyError('mode')"),
        (json.dumps(document(row() | {"shape": [[1]]})), "in row 0, got TypeError"),
        (json.dumps(document(row() | {"seconds": {"median": 1}})), "in row 0, got TypeError"),
        (
            json.dumps(document(row() | {"seconds": dict.fromkeys(("median", "p20", "p80", "count"), 0)})),
            "median of 0 s",
        ),
    ],
)
def test_refuses_what_the_benchmark_did_not_write(compared, text, got):
    refused(compared(document(row()), text), "NEW ", got)
    refused(compared(text, document(row())), "OLD ", got)


def test_refuses_a_truncated_file(compared):
    whole = json.dumps(document(row()))
    for length in range(0, len(whole), 97):
        refused(compared(document(row()), whole[:length]), "NEW ", "got no JSON (")


def test_refuses_a_missing_file(tmp_path, capsys):
    (tmp_path / "old.json").write_text(json.dumps(document(row())))
    code = compare.run(parsed(str(tmp_path / "old.json"), str(tmp_path / "none.json")))
    refused((code, *capsys.readouterr()), "NEW ", "none.json", "got No such file or directory")


def test_refuses_files_with_no_batch_norm_in_common(compared):
    old, new = document(row(10, FLOOR), row(100)), document(row(10, FLOOR), row(100, mode="bwd"))
    refused(compared(old, new), "expected rows in common, got 2 in OLD, 2 in NEW, none in both")
    refused(compared(document(), document()), "expected rows in common, got 0 in OLD, 0 in NEW, none in both")


@pytest.mark.parametrize(("text", "limit"), [("5%", 0.05), ("0%", 0.0), ("2.5%", 0.025), ("150%", 1.5)])
def test_percentages(text, limit):
    assert parsed("old", "new", "--fail-above", text).fail_above == limit


@pytest.mark.parametrize("text", ["5", "0.05", "%", "", "five%", "nan%", "inf%", "5%%", "-5%"])
def test_other_percentages_are_errors(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        parsed("old", "new", f"--fail-above={text}")
    assert exit_.value.code == 2
    expected = f"argument --fail-above: expected a percentage from 0% up, with its sign, such as 5%, got {text!r}\n"
    assert capsys.readouterr().err.endswith(expected)


def test_the_help_explains_the_percentage(capsys):
    with pytest.raises(SystemExit) as exit_:
        parsed("--help")
    assert exit_.value.code == 0
    assert "this percentage, such as 5%, and" in " ".join(capsys.readouterr().out.split())
