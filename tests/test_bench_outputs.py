"""The benchmark's files: each is parsed back, and says what the rows say."""

import base64
import csv
import io
import json
import re
import struct
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from bench import cells as texts
from bench import files, page, plots
from bench.cases import Case
from bench.rows import FLOOR, OUT_OF_MEMORY, Row

pytestmark = [
    pytest.mark.bnext("bnext's benchmark"),
    pytest.mark.only("cpu", "about the benchmark's workings, on the CPU"),
]

CASE = Case("nets", "conv1", (32, 64, 56, 56), 3, "fwd", "nchw", "float32", "cpu", 2)
DETAIL = 'expected <Tensor> | got "none" & more,\nat the end'
PNG = b"\x89PNG\r\n\x1a\n"
BYTES = 2 * 4 * 32 * 64 * 56 * 56
ROWS = (
    Row(CASE, FLOOR, samples=(0.1 / 3,), floor_share=1.0),
    Row(CASE, "torch", samples=(0.2 / 3, 0.1, 0.21 / 3), floor_share=10 / 21, speedup=1.0, peak_bytes=3 * 2**20),
    Row(CASE, "bnext", "ok", "", (1 / 30, 1 / 29, 1 / 31), True, 1.0, 2.1, 2**19, "two sweeps", 2.0, "python x.py"),
    Row(replace(CASE, layer="conv2"), "bnext", OUT_OF_MEMORY, DETAIL),
    Row(replace(CASE, mode="bwd", threads=1), "bnext", samples=(2e-6,), speedup=0.5),
    Row(replace(CASE, suite="other", op="bn+relu"), "bnext", samples=(12.3456e-6,)),
    Row(replace(CASE, suite="none"), "bnext", "failed", "no"),
)
ENVIRONMENT = {
    "device": "AMD <EPYC>",
    "bnext": "0.1.0",
    "torch": "2.13.0+cpu",
    "collect_env": {"cpu_info": "two\n<lines>", "cuda": None, "share": float("nan")},
}
REPORT = files.Report(
    "2026-01-02 03:04 UTC", ["--csv", "a<b"], True, ENVIRONMENT, {"baseline": "torch", "min_time": 0.2}, ROWS
)


def csv_rows(report=REPORT):
    return list(csv.DictReader(io.StringIO(files.csv_text(report))))


def markdown_tables(text):
    """Heading -> its table as dicts by column."""
    tables, heading = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("|"):
            cells = [re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            tables.setdefault(heading, []).append(cells)
    return {name: [dict(zip(head, line, strict=True)) for line in lines] for name, (head, _, *lines) in tables.items()}


class Page(HTMLParser):
    """Fails at a tag that closes what is not open; tables: by id, a list of lines of texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tables, self.texts = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "table":
            self.table = self.tables.setdefault(dict(attributes).get("id"), [])
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.table[-1][-1] += data


def test_csv_says_everything_to_the_last_bit():
    assert tuple(csv_rows()[0]) == files.CSV_COLUMNS
    for row, cells in zip(ROWS, csv_rows(), strict=True):
        case = row.case
        assert [cells[name] for name in ("suite", "layer", "op", "mode", "backend")] == [
            *(case.suite, case.layer, case.op, case.mode, row.backend),
        ]
        assert (cells["shape"], cells["count"], cells["threads"]) == ("32x64x56x56", "3", str(case.threads))
        assert int(cells["bytes"]) == (BYTES if case.mode == "fwd" else BYTES * 3 // 2)
        for name in ("gb_per_s", "floor_share", "speedup", "peak_bytes", "passes"):
            value = getattr(row, name)
            assert cells[name] == ("" if value is None else repr(value))
        if row.samples:
            median, p20, p80 = (float(cells[f"{name}_us"]) for name in ("median", "p20", "p80"))
            assert (median, p20, p80) == tuple(1e6 * t for t in (row.spread.median, row.spread.p20, row.spread.p80))
            assert (float(cells["noise"]), cells["noisy"]) == (row.spread.noise, str(row.noisy))
            assert cells["samples"] == str(len(row.samples))


def test_csv_of_a_row_without_figures():
    text, cells = files.csv_text(REPORT), csv_rows()[3]
    assert len(text.splitlines()) == 1 + len(ROWS)
    assert (cells["status"], cells["detail"]) == (OUT_OF_MEMORY, DETAIL.replace("\n", " "))
    figures = files.CSV_COLUMNS[files.CSV_COLUMNS.index("median_us") :]
    assert {name: cells[name] for name in figures if cells[name]} == {"bytes": str(BYTES)}


def test_json_is_the_document():
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = files.json_text(REPORT)
    document = json.loads(text, parse_constant=refuse)
    assert document["environment"].pop("collect_env") == {"cpu_info": "two\n<lines>", "cuda": None, "share": None}
    assert document["environment"] == {key: ENVIRONMENT[key] for key in ("device", "bnext", "torch")}
    assert document.pop("rows") == [row.as_dict() for row in ROWS]
    assert [*document] == ["schema", "date", "argv", "interrupted", "environment", "settings"]
    assert [*document.values()][:4] == [1, REPORT.date, ["--csv", "a<b"], True]
    assert document["settings"] == REPORT.settings
    assert f'"samples": [ {", ".join(map(repr, ROWS[1].samples))} ]' in text


def test_json_and_csv_have_no_infinite_numbers():
    report = replace(REPORT, rows=(replace(ROWS[2], speedup=float("inf"), floor_share=float("nan")),))
    assert [json.loads(files.json_text(report))["rows"][0][name] for name in ("speedup", "floor_share")] == [None, None]
    assert [csv_rows(report)[0][name] for name in ("speedup", "floor_share")] == ["", ""]


def test_json_leaves_strings_alone():
    detail = 'a "samples": [\n 1,\n 2] of text'
    report = replace(REPORT, rows=(replace(ROWS[3], detail=detail),))
    assert json.loads(files.json_text(report))["rows"][0]["detail"] == detail


def test_markdown_has_a_table_per_group():
    text = files.markdown(REPORT)
    tables = markdown_tables(text)
    assert [*tables] == [
        "nets: bn, fwd, nchw, float32, 2 threads",
        "nets: bn, bwd, nchw, float32, 1 thread",
        "other: bn+relu, fwd, nchw, float32, 2 threads",
        "none: bn, fwd, nchw, float32, 2 threads",
        "Geometric means",
    ]
    floor, torch, bnext, failed = (tuple(line.values()) for line in tables["nets: bn, fwd, nchw, float32, 2 threads"])
    assert tuple(tables["none: bn, fwd, nchw, float32, 2 threads"][0]) == texts.COLUMNS
    place = ("conv1", "32x64x56x56")
    assert floor == (*place, "floor", "33333", "once", "1.54", "100", "", "", "", "")
    assert torch == (*place, "torch", "70000", "23.8", "0.734", "47.6", "1.00", "3.00", "", "")
    assert bnext == (*place, "bnext", "~33333", "3.3", "1.54", "100", "2.10", "0.500", "2", "two sweeps")
    assert failed == ("conv2", *place[1:], "bnext", OUT_OF_MEMORY, *[""] * 6, DETAIL.replace("\n", " "))
    assert tables["other: bn+relu, fwd, nchw, float32, 2 threads"][0]["us"] == "12.3"


def test_markdown_begins_with_what_was_measured():
    first, _, second, *_ = files.markdown(REPORT).splitlines()
    assert first == "# bnext 0.1.0, torch 2.13.0+cpu, AMD <EPYC>"
    assert second == "Measured 2026-01-02 03:04 UTC; baseline torch; min_time 0.2. Interrupted: rows are missing."
    assert "Interrupted" not in files.markdown(replace(REPORT, interrupted=False))
    assert "- speedup: the median time of torch over this one's." in files.markdown(REPORT)


def test_markdown_of_the_means():
    means = [tuple(line.values()) for line in markdown_tables(files.markdown(REPORT))["Geometric means"]]
    assert means == [
        ("nets", "bn", "fwd", "nchw", "float32", "2", "floor", "1", "", "100", "", "", ""),
        ("nets", "bn", "fwd", "nchw", "float32", "2", "torch", "1", "1.00", "47.6", "", "1.00", "conv1 32x64x56x56"),
        ("nets", "bn", "fwd", "nchw", "float32", "2", "bnext", "1", "2.10", "100", "", "2.10", "conv1 32x64x56x56"),
        ("nets", "bn", "bwd", "nchw", "float32", "1", "bnext", "1", "0.50", "", "", "0.50", "conv1 32x64x56x56"),
        ("other", "bn+relu", "fwd", "nchw", "float32", "2", "bnext", "1", "", "", "", "", ""),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0123456, "0.0123"), (1, "1.00"), (99.94, "99.9"), (99.96, "100"), (1e6, "1000000")],
)
def test_digits(value, text):
    assert texts.digits(value) == text


def test_writing_replaces_the_whole_file(tmp_path):
    file = tmp_path / "rows.csv"
    for text in ("a longer text\n", "a µ\n"):
        files.write(file, text)
        assert file.read_text("utf-8") == text
    with pytest.raises(UnicodeEncodeError):
        files.write(file, "lost \ud800")
    assert file.read_text("utf-8") == "a µ\n"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.fixture
def _no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def html(monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: True)
    monkeypatch.setattr(plots, "png", lambda rows, environment: PNG)
    return page.html(REPORT)


def test_page_is_well_formed_and_complete(html):
    parsed = Page(html)
    head, *lines = parsed.tables["rows"]
    assert head == ["suite", "op", "mode", "layout", "dtype", "threads", *texts.COLUMNS]
    assert lines == [
        [row.case.suite, row.case.op, row.case.mode, "nchw", "float32", str(row.case.threads), *texts.cells(row)]
        for row in ROWS
    ]
    assert lines[3][-1] == DETAIL.replace("\n", " ")
    assert [line[6] for line in parsed.tables["means"]] == ["backend", "floor", "torch", "bnext", "bnext", "bnext"]
    facts = dict(parsed.tables[None])
    assert facts == {
        **{key: ENVIRONMENT[key] for key in ("device", "bnext", "torch")},
        "argv": '["--csv", "a<b"]',
        "cpu_info": "two\n<lines>",
        "cuda": "None",
        "share": "nan",
    }
    assert set(files.reading(REPORT)) | {files.about(REPORT), REPORT.title} <= set(parsed.texts)


def test_page_needs_nothing_else(html):
    assert not re.search(r"https?://|//cdn|@import|url\(", html)
    attributes = Page(html).attributes
    assert {name for _, name, _ in attributes if name in ("src", "href", "srcset", "data")} == {"src"}
    sources = [value for _, name, value in attributes if name == "src"]
    assert sources == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"] * 2  # "none" has no figures
    assert "prefers-color-scheme: dark" in html


def test_an_unescaped_text_would_be_noticed(html):
    with pytest.raises(AssertionError):
        Page(html.replace("expected &lt;Tensor&gt;", "expected <Tensor>"))


@pytest.mark.usefixtures("_no_matplotlib")
def test_page_without_matplotlib():
    text = page.html(REPORT)
    assert "matplotlib is not installed where this page was made, so it has no pictures." in text
    assert not any(name == "src" for _, name, _ in Page(text).attributes)


@pytest.mark.usefixtures("_no_matplotlib")
def test_pictures_without_matplotlib_are_one_sentence(tmp_path):
    with pytest.raises(ImportError, match=r"^--plot needs matplotlib: pip install matplotlib$"):
        plots.save(ROWS, tmp_path / "plots", ENVIRONMENT)
    assert not (tmp_path / "plots").exists()


def test_one_picture_per_measured_suite(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whose state is global
    folder = tmp_path / "new" / "plots"
    floor_alone = Row(replace(CASE, suite="floor alone"), FLOOR, samples=(0.1,), floor_share=1.0)
    paths = plots.save((*ROWS, floor_alone), folder, ENVIRONMENT)
    assert paths == [folder / "nets.png", folder / "other.png"] == sorted(folder.iterdir())
    sizes = []
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(PNG)
        sizes.append(struct.unpack(">II", data[16:24]))
    assert sizes[0][1] > 1.5 * sizes[1][1]  # two lines of panels, and one


def test_bars_and_points_are_the_figures_of_the_rows():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    left, right = figure.subplots(1, 2)
    looks = plots._looks(ROWS[:4])
    plots._shares(left, ROWS[:4], looks)
    plots._roofline(right, ROWS[:4], looks)
    (torch, bnext) = left.patches
    assert [torch.get_height(), bnext.get_height()] == pytest.approx([1000 / 21, 100])
    assert torch.get_facecolor() != bnext.get_facecolor()
    assert [label.get_text() for label in left.get_xticklabels()] == ["conv1", "conv2"]
    low, high = left.collections[0].get_segments()[0][:, 1]
    assert [low, high] == pytest.approx([100 / 3, 50])
    points = [tuple(points.get_offsets()[0]) for points in right.collections]
    assert points == [(BYTES, row.gb_per_s) for row in ROWS[1:3]]
    assert [tuple(line.get_ydata()) for line in right.lines] == [(ROWS[0].gb_per_s,)]
