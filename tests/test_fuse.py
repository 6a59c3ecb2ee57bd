"""fuse_batchnorm_act: whole networks compute what they computed, stay what they were, and come back."""

import copy
import io
import logging
import pickle

import pytest
import torch
from helpers import assert_same_state, bnext_ops, norms
from torch import nn
from vision import NETWORKS, BasicBlock, Bottleneck, ResNet, conv

import bnext
from bnext import rewrite

pytestmark = [
    pytest.mark.bnext("bnext.fuse_batchnorm_act"),
    pytest.mark.usefixtures("one_thread"),
]

ACTS = (bnext.BatchNormAct1d, bnext.BatchNormAct2d, bnext.BatchNormAct3d)


def in_use(make):
    """A network in float64, its batch norms with parameters and buffers that are not initial; without dropout."""
    model = make().double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


def pair(make):
    """Fused, and unfused on bnext."""
    model = in_use(make)
    twin = bnext.convert_batchnorm(copy.deepcopy(model))
    return bnext.fuse_batchnorm_act(model), twin


def batch():
    return torch.randn(3, 3, 16, 16, dtype=torch.float64)


def fused(model):
    return [layer for layer in model.modules() if isinstance(layer, ACTS)]


def assert_same_gradients(ours, theirs):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_buffers(name, training):
    make, count, expected = NETWORKS[name]
    model, twin = pair(make)
    assert (len(norms(model)), len(fused(model))) == (count, expected)
    x = batch()
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m.train(training)(x) for m, x in zip((model, twin), xs, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    assert_same_gradients(model, twin)
    assert_same_state(model, twin)


@pytest.mark.parametrize("name", NETWORKS)
def test_five_steps(name):
    model, twin = pair(NETWORKS[name][0])
    x, target = batch(), torch.tensor([0, 3, 4])
    for m in (model, twin):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(x), target).backward()
            optimizer.step()
    assert_same_state(model, twin)


def test_ops():
    block = bnext.fuse_batchnorm_act(BasicBlock(3, 3))
    x = torch.randn(2, 3, 5, 5)
    with bnext_ops("act_train", "act_train", "act_backward", "act_backward") as recorder:
        block(x).sum().backward()
    assert recorder.torch == []


def test_converting_a_fused_model_does_nothing(caplog):
    model = bnext.fuse_batchnorm_act(ResNet(BasicBlock))
    with caplog.at_level(logging.WARNING, logger="bnext"):
        bnext.convert_batchnorm(model)
    assert len(fused(model)) == 9
    assert not caplog.records


def test_channels_last():
    model, twin = pair(lambda: ResNet(Bottleneck))
    x = batch().to(memory_format=torch.channels_last)
    outputs = [m.to(memory_format=torch.channels_last)(x) for m in (model, twin)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_else_stays(name):
    """Objects, names, tensors, modes, and what the network is made of but for the activations that went."""
    model = in_use(NETWORKS[name][0])
    norms(model)[0].eval()
    norms(model)[1].weight.requires_grad_(False)
    modules, tensors = dict(model.named_modules()), model.state_dict(keep_vars=True)
    before = {m: dict(vars(m)) for m in modules.values()}
    kinds = {m: (type(m), type(m).__name__) for m in modules.values()}
    assert bnext.fuse_batchnorm_act(model) is model
    assert dict(model.named_modules()) == modules
    assert {k: id(t) for k, t in model.state_dict(keep_vars=True).items()} == {k: id(t) for k, t in tensors.items()}
    for m in modules.values():
        assert {k: v for k, v in vars(m).items() if k not in ("act", "was", "norm")} == before[m]
        if not isinstance(m, (*ACTS, rewrite.FusedActivation, bnext.BatchNorm2d)):
            assert isinstance(m, kinds[m][0])
            assert type(m).__name__ == kinds[m][1]
    bnext.revert_batchnorm(model)
    for m in modules.values():
        assert type(m) is kinds[m][0]
        assert vars(m) == before[m]


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpoints_cross_over(name):
    model, twin = pair(NETWORKS[name][0])
    other = NETWORKS[name][0]().double()
    other.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(NETWORKS[name][0]().double().state_dict(), strict=True)
    model.load_state_dict(other.state_dict(), strict=True)
    assert_same_state(model, twin)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    rewrite._rewritten.cache_clear()  # as in another process
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def pickled(model, protocol):
    data = pickle.dumps(model, protocol)
    rewrite._rewritten.cache_clear()
    return pickle.loads(data)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickled(model, pickle.HIGHEST_PROTOCOL),
    "pickle, protocol 0": lambda model: pickled(model, 0),
    "torch.save": saved,
    "twice": lambda model: pickled(copy.deepcopy(saved(model)), 4),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["ResNet of BasicBlock", "VGG"])
def test_copies(name, how):
    model, _ = pair(NETWORKS[name][0])
    other, x = COPIES[how](model), batch()
    assert len(fused(other)) == len(fused(model))
    assert not set(map(id, model.modules())) & set(map(id, other.modules()))
    assert torch.equal(other(x), model(x))
    assert_same_state(other, model)
    bnext.revert_batchnorm(other)
    assert fused(other) == []
    assert len(fused(model)) == NETWORKS[name][2]
    torch.testing.assert_close(other(x), model(x))


def test_replicas():
    """What DataParallel makes of each module, and links with those of its children."""
    block = bnext.fuse_batchnorm_act(BasicBlock(3, 3))
    replica = block._replicate_for_data_parallel()
    assert type(replica) is type(block)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(replica.eval()(x), block.eval()(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, while it compiles
def test_compile():
    torch._dynamo.reset()
    model, twin = pair(lambda: ResNet(BasicBlock))
    x = batch()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, twin(x))
    for result in (y, twin(x)):
        result.sum().backward()
    assert_same_gradients(model, twin)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_before():
    torch._dynamo.reset()
    model = nn.Sequential(BasicBlock(3, 3)).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, x = copy.deepcopy(model), batch()
    compiled(x)
    expected(x)
    bnext.fuse_batchnorm_act(compiled)
    torch.testing.assert_close(compiled(x), expected(x))
    assert_same_state(model, expected)


def test_fx():
    """torch.fx follows a forward that was written anew, and finds batch norms with two arguments."""
    model, twin = pair(lambda: ResNet(BasicBlock))
    graph = torch.fx.symbolic_trace(model)
    assert sum(len(node.args) == 2 for node in graph.graph.find_nodes(op="call_module", target="layer1.0.bn2")) == 1
    x = batch()
    torch.testing.assert_close(graph(x), twin(x))


def test_a_block_is_still_a_block():
    model = bnext.fuse_batchnorm_act(ResNet(Bottleneck))
    block = model.layer1[0]
    assert isinstance(block, Bottleneck)
    assert block.expansion == 4
    assert repr(block).startswith("Bottleneck(\n  (conv1)")
    assert "FusedActivation(ReLU of the batch norm before)" in repr(model)
    assert model.eval() is model
    assert not block.bn1.training
    seen = []
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.randn(2, 3, 16, 16))
    assert (seen[0] >= 0).all()


def test_layers_of_the_same_code_share_a_class():
    """torch.compile makes one graph of blocks of one class."""
    model = bnext.fuse_batchnorm_act(nn.Sequential(BasicBlock(3, 3), BasicBlock(3, 3), Bottleneck(3, 3)))
    assert type(model[0]) is type(model[1])
    assert type(model[2]).__mro__[2] is Bottleneck


def test_frozen_and_guarded_layers():
    model = nn.Sequential(conv(3, 4), bnext.BatchNorm2d(4, skip_nonfinite=True), nn.ReLU())
    bnext.fuse_batchnorm_act(bnext.freeze_batchnorm(model))
    (layer,) = fused(model)
    assert layer.skip_nonfinite
    assert layer.frozen_stats
    before = layer.running_mean.clone()
    model(torch.randn(2, 3, 4, 4))
    assert torch.equal(layer.running_mean, before)
    with pytest.raises(ValueError, match=r"no frozen layers.*got 1;"):
        bnext.revert_batchnorm(model)
    assert fused(model) == [layer]


def test_fusing_again_starts_over(caplog):
    model = ResNet(BasicBlock)
    handle = model.layer1[0].bn2.register_forward_hook(lambda *_: None)
    bnext.fuse_batchnorm_act(model)
    assert "layer1.0.bn2 (hooks" in caplog.text
    assert len(fused(model)) == 8
    handle.remove()
    caplog.clear()
    for _ in range(2):
        bnext.fuse_batchnorm_act(model)
        assert len(fused(model)) == 9
        assert type(model.layer1[0]).__mro__[2] is BasicBlock
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_parts_of_a_fusion_do_not_revert():
    model = bnext.fuse_batchnorm_act(ResNet(BasicBlock))
    count = len(fused(model))
    with pytest.raises(ValueError, match="expected all that was fused together"):
        bnext.revert_batchnorm(nn.Sequential(model.conv1, model.relu))
    assert len(fused(model)) == count
    bnext.revert_batchnorm(model.layer1[0])
    assert len(fused(model)) == count - 2
    assert type(model.layer1[0]) is BasicBlock


def test_layers_built_with_an_activation_do_not_revert():
    model = nn.Sequential(BasicBlock(3, 3), bnext.BatchNormAct2d(3))
    bnext.fuse_batchnorm_act(model)
    with pytest.raises(ValueError, match=r"expected no layers with an activation.*got 1$"):
        bnext.revert_batchnorm(model)
    assert len(fused(model)) == 3


def test_layers_that_were_replaced_do_not_revert():
    block = bnext.fuse_batchnorm_act(BasicBlock(3, 3))
    block.bn2 = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="expected all that was fused together"):
        bnext.revert_batchnorm(block)
    assert len(fused(block)) == 1


def test_update_bn():
    model, twin = pair(lambda: ResNet(BasicBlock))
    for m in (model, twin):
        torch.manual_seed(0)
        bnext.update_bn([batch() for _ in range(2)], m)
    assert_same_state(model, twin)
