"""python -m bench train: what it compares, and that it notices what is wrong."""

import argparse
import re

import pytest
import torch
from torch import nn

import bnext
from bench import networks, train

pytestmark = [
    pytest.mark.bnext("bnext's benchmark"),
    pytest.mark.only("cpu", "about the benchmark's workings, on the CPU"),
    pytest.mark.usefixtures("one_thread"),
]

NUMBER = r"(\d+\.\d+)"
SUMMARY = re.compile(
    rf"median step: torch {NUMBER} ms, bnext {NUMBER} ms, speedup {NUMBER}x\n"
    rf"peak memory of a step, beside weights and momenta: torch {NUMBER} MiB, bnext {NUMBER} MiB, {NUMBER} of torch's\n"
)


def options(*words):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(words)


def summary(output):
    """Its numbers, checked against each other."""
    torch_ms, bnext_ms, speedup, torch_mib, bnext_mib, share = map(float, SUMMARY.search(output).groups())
    assert torch_ms / bnext_ms == pytest.approx(speedup, abs=0.02)
    assert bnext_mib / torch_mib == pytest.approx(share, abs=0.006)
    return torch_mib, bnext_mib


@pytest.mark.parametrize(
    ("make", "parameters", "norms", "images", "classes"),
    [
        (networks.resnet50, 25_557_032, 53, (2, 3, 32, 32), 1000),
        (networks.small_resnet, 77_754, 9, (2, 1, 8, 8), 10),
    ],
)
def test_a_network_is_the_one_of_its_paper(make, parameters, norms, images, classes):
    model = make()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(type(layer) is nn.BatchNorm2d for layer in model.modules()) == norms
    assert model(torch.randn(images)).shape == (2, classes)


@pytest.mark.parametrize("fused", [False, True])
def test_resnet50_agrees_step_by_step(fused, capsys):
    assert train.train_resnet50("cpu", batch=4, steps=2, fused=fused, size=32) == []
    output = capsys.readouterr().out
    assert output.startswith("fused: 49 of 53 batch norms\n" if fused else "\n step")
    steps = re.findall(rf"^ +(\d) +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}$", output, re.MULTILINE)
    assert [step for step, *_ in steps] == ["1", "2", "3"]
    assert all(float(theirs) == pytest.approx(float(ours), rel=1e-3) for _, theirs, ours, *_ in steps)
    theirs, ours = summary(output)
    gradients = 4 * 25_557_032 / 2**20
    assert gradients < ours <= 1.02 * theirs < 2 * gradients


@pytest.mark.parametrize("words", [[], ["--fused"]])
def test_digits_from_the_command_line(words, capsys):
    pytest.importorskip("sklearn")
    assert train.run(options("--epochs", "3", *words)) == 0
    output = capsys.readouterr().out
    assert f"bnext {bnext.__version__}, torch {torch.__version__} on " in output
    assert "; digits, batch 64, 1 thread\n" in output
    assert ("fused: 7 of 9 batch norms\n" in output) == bool(words)
    epochs = re.findall(rf"^ +(\d) +{NUMBER} +{NUMBER} +{NUMBER}% +{NUMBER}%$", output, re.MULTILINE)
    assert [epoch for epoch, *_ in epochs] == ["1", "2", "3"]
    summary(output)


def test_digits_that_are_not_learned_are_noticed(capsys):
    pytest.importorskip("sklearn")
    assert train.run(options("--epochs", "1", "--batch", "1437", "--seed", "3")) == 1
    output = capsys.readouterr().out
    assert "; digits, batch 1437, 1 thread\n" in output
    faults = [line for line in output.splitlines() if line.startswith("WRONG")]
    assert faults == [f"WRONG  {name} recognised no more than 95% of the test images" for name in ("torch", "bnext")]


def norms(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def wrong_forward(model):
    for layer in norms(model):
        layer.eps = 0.5


def wrong_backward(model):
    for layer in norms(model):
        layer.weight.register_hook(lambda gradient: 0 * gradient)


@pytest.mark.parametrize(("plant", "first_step"), [(wrong_forward, 1), (wrong_backward, 2)])
def test_a_wrong_batch_norm_is_noticed(plant, first_step, monkeypatch):
    convert = bnext.convert_batchnorm

    def planted(model):
        plant(converted := convert(model))
        return converted

    monkeypatch.setattr(bnext, "convert_batchnorm", planted)
    faults = train.train_resnet50("cpu", batch=4, steps=2, fused=False, size=32)
    assert faults[0].startswith(f"losses of step {first_step} differ by more than 0.1%: torch ")
    assert len(faults) == 4 - first_step


def test_a_model_that_stays_torchs_is_noticed(monkeypatch):
    monkeypatch.setattr(bnext, "convert_batchnorm", lambda model: model)
    faults = train.train_resnet50("cpu", batch=4, steps=1, fused=False, size=32)
    assert faults.count("<class 'torch.nn.modules.batchnorm.BatchNorm2d'> was not converted") == 53
    assert "bnext::batch_norm_train was called 0 times for 53 layers" in faults


def test_a_model_that_is_not_fused_is_noticed(monkeypatch):
    monkeypatch.setattr(bnext, "fuse_batchnorm_act", lambda model: model)
    assert train.train_resnet50("cpu", batch=4, steps=1, fused=True, size=32) == ["no batch norm was fused"]


def test_a_fused_batch_norm_that_runs_as_a_plain_one_is_noticed():
    model = bnext.fuse_batchnorm_act(networks.small_resnet())
    model[1].act = "identity"
    faults = train._conversion_faults(model, torch.randn(4, 1, 8, 8), torch.arange(4), True)
    ops = ("train", "backward", "eval")
    assert faults == [
        *(f"bnext::batch_norm_{op} was called 3 times for 2 layers" for op in ops),
        *(f"bnext::batch_norm_act_{op} was called 6 times for 7 layers" for op in ops),
    ]


def test_loss_and_accuracy_faults():
    assert train._loss_faults("epoch", [(2.0, 2.0019), (1.0, 0.9991)]) == []
    nan = float("nan")
    assert train._loss_faults("epoch", [(2.0, 2.0), (2.0, 2.0021), (2.0, nan), (nan, nan)]) == [
        f"losses of epoch {i} differ by more than 0.1%: torch {theirs}, bnext {ours}"
        for i, theirs, ours in ((2, "2.000000", "2.002100"), (3, "2.000000", "nan"), (4, "nan", "nan"))
    ]
    assert train._accuracy_faults([0.96, 0.965]) == []
    assert train._accuracy_faults([0.97, 0.955]) == ["accuracies differ by more than a percentage point"]
    assert train._accuracy_faults([0.955, 0.95]) == ["bnext recognised no more than 95% of the test images"]


class Wasteful(nn.Module):
    def forward(self, x):
        waste = torch.empty(10**6)
        del waste
        return x * 1


def test_the_peak_of_a_step_counts_temporaries():
    images, labels = torch.randn(64, 64), torch.zeros(64, dtype=torch.int64)
    peaks = [
        train._Trainee(nn.Sequential(nn.Linear(64, 10), layer), 1).peak(images, labels)
        for layer in (nn.Identity(), Wasteful())
    ]
    assert 4 * 650 < peaks[0] < 100_000
    assert 4_000_000 < peaks[1] < 4_100_000


def test_the_two_take_turns_at_going_first(monkeypatch):
    order = []

    def step(self, images, labels):
        order.append(type(self.model))
        self.losses.append(0.0)

    monkeypatch.setattr(train._Trainee, "step", step)
    pair = train._Pair(nn.BatchNorm2d(3), 1, False)
    for _ in range(2):
        pair.step(None, None)
    assert order == [nn.BatchNorm2d, bnext.BatchNorm2d, bnext.BatchNorm2d, nn.BatchNorm2d]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "--steps: expected --network resnet50, got --network digits"),
        (["--epochs", "3", "--network", "resnet50"], "--epochs: expected --network digits, got --network resnet50"),
        (["--batch", "1438"], "--batch: expected at most the 1437 images to train on, got 1438"),
        (["--device", "cuda"], "--device cuda: torch finds no NVIDIA GPU here"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(words, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.run(options(*words)) == 2
    assert capsys.readouterr() == ("", f"python -m bench train: {message}\n")
