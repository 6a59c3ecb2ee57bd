"""The batch norms of a detector's backbone: ResNet-50 on two large images."""

from bench.suites.suite import Layer, Suite

# 800 x 1333 pixels, padded to multiples of 32. The pyramid's own, of 256 channels at the sizes of conv2 to conv5, and
# the heads' are left out: all but one of the pyramid's shapes are here, and heads see a region at a time, not an image.
SUITE = Suite(
    source="ResNet-50 v1.5 as the backbone of a feature pyramid, Lin et al. 2017 (arXiv:1612.03144), 800 x 1344 "
    "images, two per GPU; batch norms not frozen, as in Li et al. 2021 (arXiv:2111.11429)",
    batch=2,
    layers=(
        Layer("conv1", (64, 400, 672), 1),
        Layer("conv2 1x1 and 3x3", (64, 200, 336), 6),
        Layer("conv2 expansion", (256, 200, 336), 4),
        Layer("conv3 first 1x1", (128, 200, 336), 1),
        Layer("conv3 1x1 and 3x3", (128, 100, 168), 7),
        Layer("conv3 expansion", (512, 100, 168), 5),
        Layer("conv4 first 1x1", (256, 100, 168), 1),
        Layer("conv4 1x1 and 3x3", (256, 50, 84), 11),
        Layer("conv4 expansion", (1024, 50, 84), 7),
        Layer("conv5 first 1x1", (512, 50, 84), 1),
        Layer("conv5 1x1 and 3x3", (512, 25, 42), 5),
        Layer("conv5 expansion", (2048, 25, 42), 4),
    ),
)
