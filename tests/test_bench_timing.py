"""The project's one timer: spreads, budgets, turns; of the CUDA timer what can be tried without CUDA."""

import itertools
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import bench.__main__ as command
from bench import backends, peers, plans, timing, verify
from bench.cases import MODES, OPS, Case, make_inputs
from bench.timing import Budget, Spread
from bnext import _C
from bnext.gpus import GPUS

pytestmark = [
    pytest.mark.bnext("bnext's benchmark"),
    pytest.mark.only("cpu", "about the benchmark's workings, on the CPU"),
]


def test_spread():
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Spread(3.5, 2.0, 5.0, 6)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    assert Spread(4.0, 3.0, 5.0, 9).noise == 0.25


class Clock:
    """Stands in for time.perf_counter; calls made by taking(...) let it run on."""

    def __init__(self, monkeypatch):
        self.now, self.called = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def taking(self, name, *seconds):
        """A call that takes so long in turn, and the last of them ever after."""
        durations = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def call():
            self.called.append(name)
            self.now += next(durations)

        return call


def test_calls_take_turns(monkeypatch):
    clock = Clock(monkeypatch)
    calls = [clock.taking(name, seconds) for name, seconds in zip("abc", (1.0, 2.0, 4.0), strict=True)]
    found = timing.interleaved(calls, Budget(0, 0.05, 0), "cpu")
    assert found == [(1.0,) * 5, (2.0,) * 5, (4.0,) * 5]
    assert "".join(clock.called) == "abcabc" + "abc" + "bca" + "cab" + "abc" + "bca"  # two rounds to warm up


def test_warm_ups_go_on_while_rounds_get_faster(monkeypatch):
    clock = Clock(monkeypatch)
    found = timing.interleaved([clock.taking("a", 8.0, 4.0, 2.0, 1.0)], Budget(0, 0.05, 0), "cpu")
    assert found == [(1.0,) * 5]
    clock.called.clear()
    timing.interleaved([clock.taking("a", *(0.5**i for i in range(40)))], Budget(0, 0.05, 0), "cpu")
    assert len(clock.called) == 10 + 5  # but not for ever


@pytest.mark.parametrize(
    ("budget", "rounds"),
    [
        (Budget(0, 0.05, 100), 5),
        (Budget(20, 0.05, 100), 20),
        (Budget(20, 0.05, 10), 20),  # min_time comes first: options.budget keeps it below timeout
        (Budget(0, 0.05, 3), 5),
        (Budget(0, 0.05, 0, run_once=True), 1),
    ],
    ids=["five rounds", "time", "time and timeout", "timeout", "once"],
)
def test_a_quiet_call_ends_with_its_time(budget, rounds, monkeypatch):
    clock = Clock(monkeypatch)
    assert timing.interleaved([clock.taking("a", 1.0)], budget, "cpu") == [(1.0,) * rounds]
    assert len(clock.called) == rounds + (0 if budget.run_once else 2)


def test_a_noisy_call_goes_on_until_it_is_quiet_or_the_time_is_out(monkeypatch):
    clock = Clock(monkeypatch)
    noisy = [1.0, 1.0] + [1.0, 3.0] * 4
    (found,) = timing.interleaved([clock.taking("a", *noisy, 1.0)], Budget(0, 0.05, 1000), "cpu")
    assert Spread.of(found).noise <= 0.05
    assert Spread.of(found[:11]).noise > 0.05
    (found,) = timing.interleaved([clock.taking("a", *[1.0, 3.0] * 500)], Budget(0, 0.05, 100), "cpu")
    assert Spread.of(found).noise > 0.05
    assert 100 <= sum(found) <= 104


def fake_cuda(monkeypatch, ready):
    """ready(cycles): whether the GPU has spun so long before the host had queued the round."""
    spins, sizes = [], []

    class Event:
        def __init__(self, enable_timing=False):
            pass

        def record(self):
            pass

        def query(self):
            return ready(spins[-1])

        def elapsed_time(self, other):
            return 2.0

    fake = SimpleNamespace(
        Event=Event,
        synchronize=lambda: None,
        _sleep=spins.append,
        current_device=lambda: 0,
        get_device_properties=lambda _: SimpleNamespace(L2_cache_size=64),
    )
    monkeypatch.setattr(timing.torch, "cuda", fake)
    empty = torch.empty
    monkeypatch.setattr(
        timing.torch, "empty", lambda size, device, **keywords: (sizes.append(size), empty(size, **keywords))[1]
    )
    return spins, sizes


@pytest.mark.parametrize(("flush", "size"), [(True, 128), (False, 0)])
def test_a_queue_that_ran_dry_is_filled_longer(flush, size, monkeypatch):
    spins, sizes = fake_cuda(monkeypatch, lambda cycles: cycles < 4 * timing._FIRST_SPIN)
    called = []
    calls = [lambda: called.append("a"), lambda: called.append("b")]
    assert timing.interleaved(calls, Budget(0, 1, 0), "cuda", flush) == [(2e-3,) * 5] * 2
    assert spins == [timing._FIRST_SPIN * n for n in (1, 2, *[4] * 7)]
    assert "".join(called) == "ababab" + "ab" + "abbaabbaab"
    assert sizes == [size]


def test_a_noisy_row_is_marked(monkeypatch, tmp_path, capsys):
    def noisy(calls, budget, device, flush):
        return [(1.0, 1.0, 1.0, 2.0, 2.0) if i == 1 else (1.0,) * 5 for i in range(len(calls))]

    monkeypatch.setattr(timing, "interleaved", noisy)
    file = tmp_path / "run.json"
    arguments = ["--shape", "2,3", "--mode", "eval", "--allocator", "default", "--json", str(file)]
    assert command.main(arguments) == 0
    assert [row["noisy"] for row in json.loads(file.read_text())["rows"]] == [False, True, False]
    shown = capsys.readouterr().out
    assert shown.count("~1000000") == 1
    assert shown.count(" 50.0 ") == 1


def test_plan_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_C, "gpu", lambda: GPUS["h200"])

    def predicted(mode, *shape, layout="nchw"):
        return plans.predicted(Case("custom", "", shape, 1, mode, layout, "bfloat16", "cuda", 1))

    assert predicted("fwd", 256, 1024, 14, 14) == ("cluster 264x256/4", 2)
    assert predicted("eval", 256, 256, 56, 56, layout="nhwc") == ("streaming 264x256", 2)
    assert predicted("bwd", 256, 256, 56, 56, layout="nhwc") == ("retained 132x512", 3.88)
    assert predicted("fwd_bwd", 256, 256, 56, 56, layout="nhwc") == ("retained 132x512; retained 132x512", 5.88)
    monkeypatch.setattr(_C, "gpu", lambda: GPUS["a100"])
    assert predicted("fwd", 256, 64, 112, 112, layout="nhwc")[1] > 2.8


def test_inplace_abn_by_its_interface(monkeypatch):
    """The adapter, with a stand-in of the package's function: y overwrites x, and the weight is |weight| + eps."""

    def stand_in(x, weight, bias, mean, var, training, momentum, eps, activation, activation_param):
        assert (activation, activation_param) == ("identity", 0.0)
        y = F.batch_norm(x, mean, var, weight.detach().abs() + eps, bias.detach(), training, momentum, eps)
        return x.copy_(y)

    package = ModuleType("inplace_abn")
    package.inplace_abn = stand_in
    monkeypatch.setitem(sys.modules, "inplace_abn", package)
    inputs = make_inputs((4, 6, 5, 3), torch.float32, "cpu")
    before = inputs.x.clone()
    backend = backends.find("inplace-abn")
    for mode in ("fwd", "eval"):
        expected = verify.oracle(inputs, mode)
        each = backends.candidate(backend, inputs, mode)
        assert verify.fault("inplace-abn", each, expected, inputs, mode, {}) == ""
        each.call()
    assert torch.equal(inputs.x, before)
    with pytest.raises(backends.Unsupported, match="cannot be repeated"):
        backends.candidate(backend, inputs, "bwd")
    with pytest.raises(backends.Unsupported, match="has no ReLU"):
        backends.candidate(backend, make_inputs((4, 6, 5, 3), torch.float32, "cpu", "bn+relu"), "fwd")


@pytest.mark.parametrize("op", OPS)
def test_apex_by_its_interface(op, monkeypatch):
    """The adapter, with a stand-in of the package's module, which takes [N, H, W, C] and a second tensor to add."""

    class StandIn(torch.nn.BatchNorm2d):
        def __init__(self, channels, fuse_relu, bn_group):
            super().__init__(channels)
            self.fuse_relu = fuse_relu

        def forward(self, x, z=None):
            assert z is None or self.fuse_relu
            y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = y if z is None else y + z
            return F.relu(y) if self.fuse_relu else y

    name = "apex.contrib.groupbn.batch_norm"
    for module in itertools.accumulate(name.split("."), "{}.{}".format):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    sys.modules[name].BatchNorm2d_NHWC = StandIn
    inputs = make_inputs((4, 6, 5, 3), torch.float32, "cpu", op).to(torch.channels_last)
    with pytest.raises(backends.Unsupported, match="on CUDA"):
        backends.candidate(backends.find("apex"), inputs, "fwd")
    for mode in MODES:
        expected = verify.oracle(inputs, mode)
        each = backends.candidate(backends.Backend("apex", "", peers.apex), inputs, mode)
        assert verify.fault("apex", each, expected, inputs, mode, {}) == ""
