"""The report of make gpu-check as Markdown, of rows that are written here."""

import pytest

from bench.cases import Case
from bench.gpu_report import markdown
from bench.gpu_steps import Step
from bench.rows import Row

pytestmark = [
    pytest.mark.bnext("bnext's own check of a GPU"),
    pytest.mark.only("cpu", "about make gpu-check, by trials on the CPU"),
]

FACTS = {"date": "2026-01-02 03:04 UTC", "device": "Some GPU", "memory": 80 * 2**30, "l2_cache": 50 * 2**20}


def rows(
    dtype="bfloat16",
    layout="nchw",
    mode="fwd",
    sizes=(64, 56, 56),
    suite="resnet50",
    op="bn",
    faults=(),
    **microseconds,
):
    """Of one case, as in the benchmark's JSON: those with figures, then a status and detail for each of faults."""
    case = Case(suite, "some", (256, *sizes), 1, mode, layout, dtype, "cuda", 1, op)
    found = [
        Row(
            case,
            name.replace("_", "-"),
            samples=(1e-6 * us,),
            plan="one 8x128" if name == "bnext" else "",
            passes=2.5 if name == "bnext" else None,
        )
        for name, us in microseconds.items()
    ]
    found += [Row(case, backend, status, detail) for backend, status, detail in faults]
    return [row.as_dict() for row in found]


ROWS = [
    *rows(floor=100, bnext=200, torch=300, torch_native=400),
    *rows(floor=50, bnext=100, torch=400, torch_native=300, sizes=(256, 56, 56)),
    *rows(floor=80, bnext=100, torch=90, torch_native=100, mode="bwd"),
    *rows(floor=80, bnext=100, torch=100, torch_native=80, layout="nhwc"),
    *rows(
        floor=80, torch=90, faults=[("bnext", "out of memory", "no 4 GiB"), ("torch-native", "wrong", "y")], mode="eval"
    ),
    *rows(floor=100, bnext=200, torch=300, torch_native=400, compile=150, suite="custom"),
    *rows(floor=100, bnext=200, torch=300, faults=[("compile", "failed", "why")], suite="custom", sizes=(8, 4, 4)),
]


def report(steps=(), rows=ROWS):
    return markdown({"schema": 2, "environment": FACTS, "steps": [vars(step) for step in steps], "rows": list(rows)})


def section(page, heading):
    """Its lines, without empty ones."""
    found = page.partition(f"{heading}\n\n")[2].partition("\n\n#")[0].splitlines()
    return [line for line in found if line]


def test_markdown_of_rows():
    page = report()
    assert page.startswith("# bnext on Some GPU, 2026-01-02 03:04 UTC\n")
    assert "- memory: 80 GiB\n- l2 cache: 50 MiB" in page
    ratios = "torch / bnext | torch-native / bnext | bnext / floor"
    # 2 x 256 x 64 x 56 x 56 x 2 bytes in 200 us are 1028 GB/s
    assert section(page, "### bn, bfloat16, nchw, fwd") == [
        f"| shape | torch | torch-native | bnext | floor | GB/s | {ratios} | passes | plan |",
        f"| --- |{' ---: |' * 10}",
        "| 256x64x56x56 | 300.0 | 400.0 | 200.0 | 100.0 | 1028 | 1.50 | 2.00 | 2.00 | 2.5 | one 8x128 |",
        "| 256x256x56x56 | 400.0 | 300.0 | 100.0 | 50.0 | 8221 | 4.00 | 3.00 | 2.00 | 2.5 | one 8x128 |",
        "| geometric mean |  |  |  |  |  | 2.45 | 2.45 | 2.00 |  |  |",
    ]
    assert section(page, "### bn, bfloat16, nchw, eval")[2:] == [
        "| 256x64x56x56 | 90.0 |  |  | 80.0 |  |  |  |  |  |  |",
        "| geometric mean |  |  |  |  |  |  |  |  |  |  |",
    ]
    beside = page.partition("## Beside torch.compile")[2]
    assert section(beside, "### bn, bfloat16, nchw, fwd")[2:] == [
        "| 256x64x56x56 | 300.0 | 400.0 | 150.0 | 200.0 | 100.0 | 1028 | 1.50 | 2.00 | 0.75 | 2.00 | 2.5 | one 8x128 |",
        "| 256x8x4x4 | 300.0 |  |  | 200.0 | 100.0 | 1 | 1.50 |  |  | 2.00 | 2.5 | one 8x128 |",
        "| geometric mean |  |  |  |  |  |  | 1.50 | 2.00 | 0.75 | 2.00 |  |  |",
    ]
    assert section(page, "## Where bnext is slower than torch") == [
        "2 of 6 cases.",
        "- bn bfloat16 256x64x56x56 nchw bwd: torch / bnext 0.90",
        "- bn bfloat16 256x64x56x56 nhwc fwd: torch-native / bnext 0.80",
    ]
    assert section(page, "## Rows without figures") == [
        "- bn bfloat16 256x64x56x56 nchw eval bnext: out of memory: no 4 GiB",
        "- bn bfloat16 256x64x56x56 nchw eval torch-native: wrong: y",
        "- bn bfloat16 256x8x4x4 nchw fwd compile: failed: why",
    ]


def forced(strategy, plan, microseconds, **case):
    (row,) = rows(bnext=microseconds, **case)
    return row | {"strategy": strategy, "plan": plan}


def test_markdown_of_strategies():
    """Each in its column; the planner's choice comes from the row that nobody forced, and so do all other tables."""
    small = {"sizes": (64, 7, 7)}
    found = [
        *ROWS,
        forced("streaming", "streaming 264x256", 250),
        forced("grid", "grid 264x256", 150),
        forced("block", "grid 264x256", 150),  # not possible: the planner's choice ran
        forced("streaming", "streaming 132x256", 20, **small),
        forced("block", "block 132x256", 10, **small),
    ]
    page = report(rows=found)
    strategies = page.partition("## Strategies")[2]
    assert section(strategies, "### bfloat16, nchw, fwd") == [
        "| shape | streaming | grid | block | chosen | floor / bnext |",
        f"| --- |{' ---: |' * 5}",
        "| 256x64x56x56 | 250.0 | 150.0 |  | one | 0.50 |",
        "| 256x64x7x7 | 20.0 |  | 10.0 |  |  |",
    ]
    assert page.partition("## Strategies")[0].strip() == report().strip()


FUSED = [
    *rows(floor=80, bnext=100, torch=260, compile=100, op="bn+relu"),
    *rows(floor=80, bnext=100, torch=160, compile=150, op="bn+relu", mode="bwd"),
    *rows(floor=80, bnext=100, torch=300, compile=90, op="bn+relu", dtype="float32"),
    *rows(floor=80, bnext=100, torch=390, compile=110, op="bn+add+relu", mode="bwd"),
    *rows(floor=80, bnext=100, torch=100, faults=[("compile", "failed", "why")], op="bn+add+relu"),
    *rows(floor=80, bnext=100, torch=300, op="bn+add+relu", dtype="float32"),
]


def test_markdown_of_what_is_fused():
    """Twice as fast as eager torch is a mean; no slower than torch.compile is every case, of those that there are."""
    page = report(rows=[*ROWS, *FUSED])
    assert section(page, "## Fused")[1:] == [
        "- bn+relu, bfloat16: met. torch / bnext 2.04, where 2 is wanted, the geometric mean of 2 cases; slower than "
        "torch.compile in 0 of 2",
        "- bn+relu, float32: missed. torch / bnext 3.00, where 2 is wanted, the geometric mean of 1 cases; slower than "
        "torch.compile in 1 of 1",
        "  - bn+relu float32 256x64x56x56 nchw fwd 0.90",
        "- bn+add+relu, bfloat16: missed. torch / bnext 1.97, where 2 is wanted, the geometric mean of 2 cases; slower "
        "than torch.compile in 0 of 1",
        "- bn+add+relu, float32: missed. torch / bnext 3.00, where 2 is wanted, the geometric mean of 1 cases; slower "
        "than torch.compile in 0 of 0",
    ]
    # 4 tensors of 103 MB and a mask of 6 MB in 100 us
    assert section(page, "### bn+add+relu, bfloat16, nchw, bwd")[2] == (
        "| 256x64x56x56 | 390.0 | 110.0 | 100.0 | 80.0 | 4175 | 3.90 | 1.10 | 1.25 | 2.5 | one 8x128 |"
    )
    assert "- bn+add+relu bfloat16 256x64x56x56 nchw fwd compile: failed: why" in page
    plain = report()
    assert page.partition("## Figures")[2].startswith(plain.partition("## Figures")[2].rstrip())


def test_markdown_of_steps():
    page = report([Step("build", "passed", 61.4, "for 9.0"), Step("suite", "failed", 3.0, "1 failed", ["a.py::b"])], [])
    assert "| build | passed | 61 | for 9.0 |" in page
    assert "## Tests that failed\n\n- a.py::b\n" in page
    assert "None measured." in page
    assert "0 of 0 cases." in page
    assert "Tests that failed" not in report()
