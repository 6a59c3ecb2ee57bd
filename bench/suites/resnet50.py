"""The batch norms of ResNet-50: the stages of He et al. 2016 for 224 x 224 images."""

from bench.suites.suite import Layer, Suite

# v1.5: the stride of a bottleneck is in its 3x3 convolution, so the first 1x1 of a stage still sees the larger image.
SUITE = Suite(
    source="He et al. 2016 (arXiv:1512.03385), table 1, 224 x 224 images; v1.5, stride in the 3x3 convolutions",
    batch=32,
    layers=(
        Layer("conv1", (64, 112, 112), 1),
        Layer("conv2 1x1 and 3x3", (64, 56, 56), 6),
        Layer("conv2 expansion", (256, 56, 56), 4),
        Layer("conv3 first 1x1", (128, 56, 56), 1),
        Layer("conv3 1x1 and 3x3", (128, 28, 28), 7),
        Layer("conv3 expansion", (512, 28, 28), 5),
        Layer("conv4 first 1x1", (256, 28, 28), 1),
        Layer("conv4 1x1 and 3x3", (256, 14, 14), 11),
        Layer("conv4 expansion", (1024, 14, 14), 7),
        Layer("conv5 first 1x1", (512, 14, 14), 1),
        Layer("conv5 1x1 and 3x3", (512, 7, 7), 5),
        Layer("conv5 expansion", (2048, 7, 7), 4),
    ),
)
