"""The suites of shapes, a page each."""

from bench.suites import detection, odd, resnet50, small, unet, vgg16
from bench.suites.suite import Layer, Suite

SUITES: dict[str, Suite] = {
    page.__name__.rpartition(".")[2]: page.SUITE for page in (resnet50, vgg16, unet, detection, small, odd)
}

__all__ = ["SUITES", "Layer", "Suite"]
