"""The benchmark's suites: those of networks against the networks themselves, built here from their definitions."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from bench.cases import shape_text
from bench.suites import SUITES

pytestmark = [
    pytest.mark.bnext("bnext's benchmark"),
    pytest.mark.only("cpu", "about the benchmark's workings, on the CPU"),
]

LARGEST = {"small": 1.1e6, "odd": 110e6, "detection": 300e6}  # bytes of a tensor in float32


def conv_bn(inputs, outputs, kernel=3, stride=1):
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def vgg16():
    layers, channels = [], 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers.append(conv_bn(channels, width))
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, width, 1), conv_bn(width, width, 3, stride), conv_bn(width, 4 * width, 1)
        )
        projects = stride != 1 or inputs != 4 * width
        self.shortcut = conv_bn(inputs, 4 * width, 1, stride) if projects else nn.Identity()

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


def resnet50():
    layers, channels = [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)], 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            layers.append(Bottleneck(channels, width, 1 if block else stride))
            channels = 4 * width
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        widths = (64, 128, 256, 512, 1024)
        self.down = nn.ModuleList(self.double(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[-2::-1])
        self.merge = nn.ModuleList(self.double(2 * w, w) for w in widths[-2::-1])

    @staticmethod
    def double(inputs, outputs):
        return nn.Sequential(conv_bn(inputs, outputs), conv_bn(outputs, outputs))

    def forward(self, x):
        skips = []
        for level in self.down[:-1]:
            skips.append(level(x))
            x = nn.functional.max_pool2d(skips[-1], 2)
        x = self.down[-1](x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat((skips.pop(), up(x)), 1))
        return x


def batch_norms(network, image):
    """How often the network's batch norms see each shape (N, C, H, W)."""
    seen = Counter()
    with torch.device("meta"):
        network = network()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda _, args: seen.update([tuple(args[0].shape)]))
        network(torch.empty(image))
    return seen


@pytest.mark.parametrize(
    ("suite", "network", "image", "layers"),
    [
        ("resnet50", resnet50, (32, 3, 224, 224), 53),
        ("vgg16", vgg16, (32, 3, 224, 224), 13),
        ("unet", UNet, (8, 3, 256, 256), 18),
        ("detection", resnet50, (2, 3, 800, 1344), 53),
    ],
)
def test_a_networks_suite_has_its_batch_norms(suite, network, image, layers):
    page = SUITES[suite]
    assert page.batch == image[0]
    counts = {shape: layer.count for layer, shape in page.shapes(None)}
    assert counts == batch_norms(network, image)
    assert sum(counts.values()) == layers


@pytest.mark.parametrize("suite", SUITES)
def test_a_suites_shapes_can_be_trained_on(suite):
    page = SUITES[suite]
    assert page.source
    for layer, shape in page.shapes(None):
        assert 2 <= len(shape) <= 5, layer
        assert all(type(size) is int and size >= 1 for size in shape), layer
        assert math.prod(shape) // shape[1] > 1, layer  # torch refuses to train on one value per channel
        assert 4 * math.prod(shape) <= LARGEST.get(suite, math.inf), layer
        assert type(layer.count) is int, layer
        assert layer.count >= 1, layer


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_has_a_layer_once(suite):
    layers = SUITES[suite].layers
    assert len({layer.name for layer in layers}) == len(layers)
    assert len({layer.sizes for layer in layers}) == len(layers)


@pytest.mark.parametrize("suite", ["small", "odd"])
def test_a_suite_of_whole_shapes_ignores_the_batch(suite):
    assert SUITES[suite].batch is None
    assert SUITES[suite].shapes(3) == [(layer, layer.sizes) for layer in SUITES[suite].layers]


def test_the_batch_replaces_a_networks_own():
    assert {shape[0] for _, shape in SUITES["unet"].shapes(None)} == {8}
    assert {shape[0] for _, shape in SUITES["unet"].shapes(3)} == {3}


def test_names_that_state_a_size_are_right():
    layers = {layer.name: layer.sizes for layer in SUITES["odd"].layers} | {
        layer.name: layer.sizes for layer in SUITES["small"].layers
    }
    planes = {name: math.prod(sizes[2:]) for name, sizes in layers.items()}
    assert planes["planes of 49 values, 98 bytes in half"] == 49
    assert planes["planes of 9 values"] == 9
    assert planes["planes of 1 value"] == planes["pooled to 1x1"] == 1
    for name, channels in (("13 channels, no whole vector", 13), ("3 channels", 3), ("65537 channels", 65537)):
        assert layers[name][1] == channels
    assert layers["one plane alone"][:2] == (1, 1)
    assert layers["1 channel of many images"][1] == 1
    assert layers["1 image"][0] == layers["last stage, 1 image"][0] == 1
    assert all(size % divisor for size in layers["all sizes prime"] for divisor in range(2, size))
    assert all(size & (size - 1) == 0 for size in layers["sizes powers of two"])
    assert all(size % 2 for size in layers["N, C, both odd"])
    for name, sizes in layers.items():
        if name.startswith("features, "):
            assert name == f"features, {shape_text(sizes).replace('x', ' x ')}"
