"""python -m bnext stats: what it prints and draws of checkpoints, and what it says of files that are none."""

import argparse
import csv
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import bnext
from bnext.__main__ import main
from bnext.inspect import TENSORS

pytestmark = pytest.mark.bnext("bnext's command line")

ROOT = Path(__file__).parent.parent


def model():
    """Two batch norms; of the first, weight has a NaN and bias nothing else."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False))
    made(torch.randn(2, 3, 4, 4))
    with torch.no_grad():
        made[1].weight[:2] = torch.tensor([0, math.nan])
        made[1].bias.fill_(math.nan)
    return made


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": nn.DataParallel(model()).state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    return path


def stats(*words):
    return main(["stats", *map(str, words)])


def test_table(checkpoint, capsys):
    assert stats(checkpoint) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "channels", *TENSORS, "dead", "exploding", "nonfinite", "batches"]
    assert lines[1].split() == ["min", "mean", "max"] * 4
    first, second = (line.split() for line in lines[2:4])
    assert first[:2] + first[8:11] + first[-4:] == ["1", "4", "0", "0.67", "1", "1", "0", "5", "1"]
    assert second[:2] + second[8:] == ["3", "4", "-", "-", "0", "0", "0", "1"]
    assert lines[4] == "2 batch norms, 8 channels; 1 dead, 0 exploding, 5 nonfinite"


def test_names_are_no_commands_to_a_terminal(tmp_path, capsys):
    torch.save(nn.ModuleDict({"\x1b[2J": nn.BatchNorm2d(1)}).state_dict(), path := tmp_path / "model.pt")
    assert stats(path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(r"'\x1b[2J'  ")
    assert lines[3].startswith("1 batch norm, 1 channel; ")


def test_a_large_checkpoint_is_not_read_whole(tmp_path, monkeypatch):
    """Nor is one by an older torch.save, which cannot be read in parts, refused."""
    found, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: found.append(kwargs["mmap"]) or load(*args, **kwargs))
    for zipped in (True, False):
        torch.save(model().state_dict(), path := tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
        assert stats(path) == 0
    assert found == [True, False]


def test_table_by_rich(checkpoint, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert stats(checkpoint) == 0
    assert "─────" in (out := capsys.readouterr().out)
    assert "0.67" in out


def test_json_is_strict(checkpoint, capsys):
    assert stats(checkpoint, "--json") == 0

    def refuse(name):
        raise AssertionError(name)

    first, second = json.loads(capsys.readouterr().out, parse_constant=refuse)
    (row, _) = bnext.bn_stats(model())
    assert first["running_var"] == vars(row.running_var)
    assert (first["name"], first["kind"], first["dead"], first["weight"]["nonfinite"]) == ("1", None, 1, 1)
    assert first["bias"] == {"min": None, "mean": None, "max": None, "nonfinite": 4}
    assert second["weight"] is None


def test_csv(checkpoint, capsys):
    assert stats(checkpoint, "--csv") == 0
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    (row, _) = bnext.bn_stats(model())
    assert float(first["running_mean_mean"]) == row.running_mean.mean  # nothing is rounded
    assert (first["bias_max"], first["bias_nonfinite"], first["kind"]) == ("", "4", "")
    assert (second["name"], second["weight_min"], second["num_batches_tracked"]) == ("3", "", "1")


def test_safetensors(tmp_path, capsys):
    save_file = pytest.importorskip("safetensors.torch").save_file
    norms = nn.Sequential(*(nn.BatchNorm2d(1) for _ in range(11)))
    save_file(norms.state_dict(), path := tmp_path / "model.safetensors")
    assert stats(path, "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [str(i) for i in range(11)]
    path.write_bytes(path.read_bytes()[:100])
    assert_refused(path, "not a safetensors file, or cut off", capsys)


def assert_refused(path, sentence, capsys, *options):
    assert stats(path, *options) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m bnext stats: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert "weights_only" not in err


class Touch:
    """Unpickled, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_executed(zipped, tmp_path, capsys):
    torch.save({"state_dict": model().state_dict(), "x": Touch(tmp_path / "made")}, path := tmp_path / "evil.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    assert_refused(path, "refused, as loading it would call posix.mkdir: save model.state_dict()", capsys)
    path.write_bytes(pickle.dumps(Touch(tmp_path / "made")))
    assert_refused(path, "not a checkpoint", capsys)
    assert not (tmp_path / "made").exists()


@pytest.mark.filterwarnings("default")
def test_whole_modules_and_programs_are_refused(tmp_path, capsys, recwarn):
    torch.save(model(), path := tmp_path / "module.pt")
    assert_refused(path, "would call torch.nn.modules.container.Sequential: save model.state_dict()", capsys)
    with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save makes them
        archive.writestr("module/constants.pkl", pickle.dumps(()))
        archive.writestr("module/version", "3\n")
    assert_refused(path, "TorchScript program: save model.state_dict()", capsys)
    assert not recwarn.list


def test_files_that_are_no_checkpoint(checkpoint, tmp_path, capsys):
    assert_refused(tmp_path / "none.pt", "none.pt: No such file or directory", capsys)
    assert_refused(tmp_path, "Is a directory", capsys)
    whole = checkpoint.read_bytes()
    for content in (b"", b"text\n", whole[: len(whole) // 2], whole[:-1]):
        checkpoint.write_bytes(content)
        assert_refused(checkpoint, "not a checkpoint by torch.save, or cut off", capsys)
    torch.save([1, 2], checkpoint)
    assert_refused(checkpoint, "expected a state dict in it, got list", capsys)
    torch.save(nn.Linear(2, 2).state_dict(), checkpoint)
    assert_refused(checkpoint, "no batch norm in it", capsys)


def test_packages_that_are_not_there(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (safe := tmp_path / "model.safetensors").touch()
    assert_refused(safe, "needs safetensors: pip install safetensors", capsys)
    with pytest.raises(SystemExit, match="2"):
        stats(checkpoint, "--plot", "x.png")
    assert "needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_arguments(checkpoint, capsys):
    for words, sentence in (
        ([checkpoint, "--plot", "x.jpg"], "expected a file name ending in .png, .svg, .pdf, got 'x.jpg'"),
        ([checkpoint, "--csv", "--json"], "not allowed with"),
        ([], "required: CHECKPOINT"),
    ):
        with pytest.raises(SystemExit, match="2"):
            stats(*words)
        assert sentence in capsys.readouterr().err


@pytest.fixture
def figure(monkeypatch):
    """The figure that is saved."""
    saved = []
    figures = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path: saved.append(self))
    return saved


def test_plot_shows_every_layer(checkpoint, figure):
    assert stats(checkpoint, "--plot", "x.png") == 0
    panels = figure[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == list(TENSORS)
    assert [axes.get_yscale() for axes in panels] == ["linear", "log", "linear", "linear"]
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == ["1", "3"]
    for axes, name in zip(panels, TENSORS, strict=True):
        ranges = [getattr(row, name) for row in bnext.bn_stats(model())]
        means = torch.tensor([math.nan if r is None else r.mean for r in ranges])
        torch.testing.assert_close(torch.tensor(axes.lines[0].get_ydata()).float(), means, equal_nan=True)
        if name != "bias":
            low, high = axes.collections[1].get_segments()[0][:, 1]  # of the first layer, which may have no neighbour
            assert (low, high) == (ranges[0].min, ranges[0].max)
    assert [len(axes.lines[1].get_xdata()) for axes in panels] == [0, 0, 1, 1]  # crosses: not finite
    assert "with inf or nan" in [text.get_text() for text in figure[0].legends[0].get_texts()]


def test_plot_of_a_dead_network(tmp_path, figure):
    """A variance of 0 has no logarithm."""
    (dead := nn.BatchNorm2d(3)).running_var.zero_()
    torch.save(dead.state_dict(), path := tmp_path / "dead.pt")
    assert stats(path, "--plot", "x.png") == 0
    assert 0 < figure[0].axes[1].get_ylim()[0] < 1e-7
    assert [label.get_text() for label in figure[0].axes[-1].get_xticklabels()] == ["(root)"]


def test_plot_reads_off_variances_that_are_alike(tmp_path, figure):
    norms = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    norms[1].running_var.fill_(0.8)
    torch.save(norms.state_dict(), path := tmp_path / "alike.pt")
    assert stats(path, "--plot", "x.png") == 0
    axes = figure[0].axes[1]
    bottom, top = axes.get_ylim()
    assert sum(bottom < tick < top for tick in axes.get_yticks()) >= 3


def test_plot_takes_names_for_text(tmp_path, capsys):
    """Not for formulas."""
    pytest.importorskip("matplotlib")
    torch.save(nn.ModuleDict({"$a^$": nn.BatchNorm2d(1)}).state_dict(), path := tmp_path / "$b^$.pt")
    assert stats(path, "--plot", tmp_path / "x.png") == 0


def test_plot_files(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        assert stats(checkpoint, "--plot", path := tmp_path / f"picture{suffix}") == 0
        assert path.read_bytes().startswith(start)
    capsys.readouterr()
    assert_refused(checkpoint, "none/x.png: No such file or directory", capsys, "--plot", tmp_path / "none/x.png")


def test_a_reader_who_has_seen_enough(checkpoint):
    process = subprocess.Popen(
        [sys.executable, "-m", "bnext", "stats", checkpoint],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("words", [(), ("--json",), ("stats", "model.pth")])
def test_what_cannot_be_written_is_a_sentence(words, checkpoint):
    with open("/dev/full", "w") as full:
        done = run(*words, cwd=checkpoint.parent, stdout=full)
    assert done.returncode == 1
    assert re.fullmatch(r"python -m bnext( stats)?: standard output: No space left on device\n", done.stderr)


def test_names_that_an_encoding_has_not(tmp_path):
    torch.save(nn.ModuleDict({"层": nn.BatchNorm2d(1)}).state_dict(), tmp_path / "model.pt")
    done = run("stats", "model.pt", cwd=tmp_path, stdout=subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u5c42" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="of a shell")
def test_a_closed_standard_output(checkpoint):
    closed = {"stdout": None, "preexec_fn": lambda: os.close(1)}
    assert run("stats", checkpoint.name, cwd=checkpoint.parent, **closed).returncode == 0


def run(*words, cwd, stdout, preexec_fn=None, **environment):
    """python -m bnext, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-m", "bnext", *words]
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn
    )
