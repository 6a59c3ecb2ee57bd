"""Layers in several Python threads and in other processes: forks, DataLoader workers, spawned children."""

import copy
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_same_state, by_mode, layers, modules, values
from torch.testing import assert_close
from torch.utils.data import DataLoader

SHAPE = (4, 5, 3, 6)
no_fork_on_cuda = pytest.mark.only("cpu", "CUDA does not work in a forked process")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
multithreaded_fork = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 on


def in_four_threads(work):
    """work(0), ..., work(3), begun together."""
    barrier = threading.Barrier(4, timeout=60)

    def begin(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(begin, range(4)))


def five_steps(layer, x):
    """Everything that five forwards and backwards of layer give, its .grad left alone."""
    results = []
    for _ in range(5):
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        results += [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, layer.weight, layer.bias])]
    return [*results, *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize("share", [False, True], ids=["a layer each", "one layer in eval"])
def test_four_python_threads(share):
    mine = [layers(16)[0] for _ in range(4)]
    if share:
        mine = [mine[0].eval()] * 4
    inputs = [values((8, 16, 15, 17), torch.float32) for _ in range(4)]
    expected = [five_steps(copy.deepcopy(layer), x) for layer, x in zip(mine, inputs, strict=True)]
    found = in_four_threads(lambda i: five_steps(mine[i], inputs[i]))
    for ours, serial in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, serial, strict=True))


def test_four_python_threads_take_turns_to_train_a_layer():
    """Without the turns torch promises nothing about the counter."""
    layer, lock = modules()[0](5, momentum=None, dtype=torch.float64), threading.Lock()
    batches = values((4, 10, *SHAPE[1:]), torch.float64).unbind()

    def work(i):
        for x in batches[i].split(2):
            with lock:
                layer(x)

    in_four_threads(work)
    assert layer.num_batches_tracked == 20
    means = [x.mean((0, 2, 3)) for b in batches for x in b.split(2)]
    assert_close(layer.running_mean, torch.stack(means).mean(0))


def in_a_fork(action):
    """The wait status of a child that runs action after it has been told to use one thread."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # kills a child that hangs
        torch.set_num_threads(1)
        try:
            os._exit(0 if action() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1]


@no_fork_on_cuda
@needs_fork
@multithreaded_fork
def test_fork_after_use():
    layer, x = layers(16)[0], values((32, 16, 28, 28), torch.float32)
    torch.set_num_threads(2)
    five_steps(copy.deepcopy(layer), x)
    torch.set_num_threads(1)
    expected = five_steps(copy.deepcopy(layer), x)

    def same():
        return all(torch.equal(a, b) for a, b in zip(five_steps(layer, x), expected, strict=True))

    torch.set_num_threads(2)
    assert in_a_fork(same) == 0
    assert layer.num_batches_tracked == 0
    five_steps(layer, x)  # the parent's threads are still there


@no_fork_on_cuda
@needs_fork
@multithreaded_fork
def test_a_data_loader_worker_runs_a_layer():
    layer, theirs = layers()
    data = values((6, *SHAPE[1:]), torch.float32)
    with torch.no_grad():
        expected = [theirs.eval()(x) for x in data.split(2)]
        layer.eval()
        loader = DataLoader(
            data,
            batch_size=2,
            num_workers=1,
            collate_fn=lambda rows: layer(torch.stack(rows)),
            multiprocessing_context="fork",
            timeout=60,
        )
        assert_close(list(loader), expected)


def train_in_a_child(layer, x, output):
    torch.set_num_threads(1)
    output.copy_(layer(x).detach())
    if output.is_cuda:
        torch.cuda.synchronize()  # a process may end before its kernels do


@by_mode
def test_spawned_process_shares_the_buffers(training):
    """torch.multiprocessing sends tensors by shared memory: what the child's layer counts, the parent's has."""
    ours, theirs = (m.train(training) for m in layers())
    x = values(SHAPE, torch.float32)
    output = torch.zeros_like(x)
    child = torch.multiprocessing.get_context("spawn").Process(target=train_in_a_child, args=(ours, x, output))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert_close(output, theirs(x).detach())
    assert ours.num_batches_tracked == training
    assert_same_state(ours, theirs)
