"""The batch norms of VGG-16: configuration D of Simonyan & Zisserman 2015, one after each convolution."""

from bench.suites.suite import Layer, Suite

# The paper has no batch norm; torchvision's vgg16_bn puts one between each convolution and its ReLU.
SUITE = Suite(
    source="Simonyan & Zisserman 2015 (arXiv:1409.1556), table 1, configuration D, 224 x 224 images; "
    "a batch norm after each convolution, as in torchvision's vgg16_bn",
    batch=32,
    layers=(
        Layer("conv1", (64, 224, 224), 2),
        Layer("conv2", (128, 112, 112), 2),
        Layer("conv3", (256, 56, 56), 3),
        Layer("conv4", (512, 28, 28), 3),
        Layer("conv5", (512, 14, 14), 3),
    ),
)
