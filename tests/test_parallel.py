"""One model on several devices: DistributedDataParallel in two processes, replicas as of DataParallel in threads."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_same_state, bring_into_use, modules, norms, values
from ranks import in_two_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel, replicate
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def networks():
    """The subject's and torch's, in the same state, which is not the initial one."""
    ours, theirs = (
        nn.Sequential(nn.Conv2d(3, 5, 3), cls(5), nn.ReLU(), cls(5, momentum=None)).double() for cls in modules()
    )
    bring_into_use(ours, theirs, [batch()])
    return ours, theirs


def batch(n=4):
    return values((n, 3, 6, 5), torch.float64)


def train_in_a_process(rank, folder, models, batches):
    for name, model in models.items():
        model = copy.deepcopy(model)  # what is sent to a process is shared with it
        parallel = DistributedDataParallel(model)
        for x in batches[rank]:
            parallel.zero_grad()
            parallel(x).square().sum().backward()
        torch.save([model, [p.grad for p in model.parameters()]], f"{folder}/{name}{rank}")


@pytest.mark.only("cpu", "over gloo")
def test_distributed_data_parallel(tmp_path):
    models = dict(zip(("ours", "theirs"), networks(), strict=True))
    batches = [[batch(), batch(2), batch(3)] for _ in range(2)]
    in_two_ranks(train_in_a_process, tmp_path, models, batches)
    grads = []
    for rank in range(2):
        (ours, found), (theirs, expected) = (torch.load(tmp_path / f"{n}{rank}", weights_only=False) for n in models)
        assert_same_state(ours, theirs)
        assert_close(found, expected)
        assert norms(ours)[1].num_batches_tracked == 4
        grads.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.fixture
def broadcast_on_one_device(monkeypatch):
    """The part of replicate that needs several GPUs: the first copy shares its memory, the others do not."""

    def broadcast(tensors, devices, detach=False):
        return [[t.view_as(t) if i == 0 else t.clone() for t in tensors] for i in range(len(devices))]

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", broadcast)


def test_replicas(broadcast_on_one_device):
    """Their weights are plain tensors, not Parameters; the first one's buffers are the model's."""
    models, x = networks(), batch(8)
    before = copy.deepcopy(models[0])
    for model in models:
        replicas = replicate(model, [0, 1])
        assert not list(replicas[1].parameters())
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(nn.Module.__call__, replicas, x.split(5)))
        torch.cat(outputs).square().sum().backward()
    ours, theirs = models
    assert_same_state(ours, theirs)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad)
    before(x[:5])
    assert torch.equal(norms(ours)[0].running_mean, norms(before)[0].running_mean)
