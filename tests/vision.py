"""Small networks, defined as torchvision defines its large ones."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(c_in, c_out, kernel=3, stride=1, groups=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in, width, stride=1, downsample=None):
        super().__init__()
        self.conv1 = conv(c_in, width, stride=stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x):
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in, width, stride=1, downsample=None):
        super().__init__()
        self.conv1 = conv(c_in, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.conv1 = conv(3, 8)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.c_in = 8
        self.layer1 = self._layer(block, 8, 1)
        self.layer2 = self._layer(block, 8, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.c_in, 5)

    def _layer(self, block, width, stride):
        c_out = block.expansion * width
        downsample = nn.Sequential(conv(self.c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))
        blocks = nn.Sequential(block(self.c_in, width, stride, downsample), block(c_out, width))
        self.c_in = c_out
        return blocks

    def _forward_impl(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward(self, x):
        return self._forward_impl(x)


class Residual(nn.Module):
    """As in bench.networks: each branch a Sequential, the shortcut an empty one where the shape stays."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(conv(c_in, c_out), nn.BatchNorm2d(c_out), nn.ReLU(), *_pair(c_out, c_out))
        self.shortcut = nn.Sequential(*(_pair(c_in, c_out) if c_in != c_out else ()))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def _pair(c_in, c_out):
    return [conv(c_in, c_out), nn.BatchNorm2d(c_out)]


def _head(channels):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]


class VGG(nn.Module):
    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for c_out in (8, 16, 16):
            layers += [*_pair(c_in, c_out), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            c_in = c_out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(64, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5))

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


class ConvNormActivation(nn.Sequential):
    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, activation=nn.ReLU6):
        layers = [conv(c_in, c_out, kernel, stride, groups), nn.BatchNorm2d(c_out)]
        super().__init__(*layers, *([activation(inplace=True)] if activation else []))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x):
        return x * self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))


class InvertedResidual(nn.Module):
    """MobileNetV2's, and V3's by its squeeze and excitation."""

    def __init__(self, c_in, c_out, stride, activation, squeezes):
        super().__init__()
        self.use_res_connect = stride == 1 and c_in == c_out
        self.block = nn.Sequential(
            ConvNormActivation(c_in, 2 * c_in, 1, activation=activation),
            ConvNormActivation(2 * c_in, 2 * c_in, 3, stride, 2 * c_in, activation),
            *([SqueezeExcitation(2 * c_in)] if squeezes else []),
            ConvNormActivation(2 * c_in, c_out, 1, activation=None),
        )

    def forward(self, x):
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


def mobilenet(activation, squeezes):
    blocks = [InvertedResidual(8, 8, 1, activation, squeezes), InvertedResidual(8, 12, 2, activation, squeezes)]
    return nn.Sequential(ConvNormActivation(3, 8, 3, activation=activation), *blocks, *_head(12))


class DenseLayer(nn.Module):
    def __init__(self, c_in, growth, drop_rate=0.0):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv(c_in, 4 * growth, 1)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv(4 * growth, growth)
        self.drop_rate = drop_rate

    def bn_function(self, inputs):
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, input):
        inputs = [input] if isinstance(input, torch.Tensor) else input
        new = self.conv2(self.relu2(self.norm2(self.bn_function(inputs))))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class DenseBlock(nn.ModuleDict):
    def __init__(self, c_in, growth):
        super().__init__()
        for i in range(2):
            self.add_module(f"denselayer{i + 1}", DenseLayer(c_in + i * growth, growth))

    def forward(self, init_features):
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", conv(3, 8))
        self.features.add_module("norm0", nn.BatchNorm2d(8))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("denseblock1", DenseBlock(8, 4))
        self.features.add_module("norm5", nn.BatchNorm2d(16))
        self.classifier = nn.Linear(16, 5)

    def forward(self, x):
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


# How to make each, how many batch norms it has, and to how many of them an activation can go.
NETWORKS = {
    "ResNet of BasicBlock": (lambda: ResNet(BasicBlock), 11, 9),
    "ResNet of Bottleneck": (lambda: ResNet(Bottleneck), 15, 13),
    "residual Sequentials": (lambda: nn.Sequential(Residual(3, 8), Residual(8, 8), *_head(8)), 5, 4),
    "VGG": (VGG, 3, 3),
    "MobileNetV2": (lambda: mobilenet(nn.ReLU6, False), 7, 5),
    "MobileNetV3": (lambda: mobilenet(nn.Hardswish, True), 7, 5),
    "SiLU": (lambda: mobilenet(nn.SiLU, False), 7, 5),
    "DenseNet": (DenseNet, 6, 5),
}
