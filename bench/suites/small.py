"""Small tensors, where what a call costs by itself is most of its time."""

from bench.suites.suite import Layer, Suite

SUITE = Suite(
    source="shapes of at most 1.1 MB in float32, where a call's overhead shows; ResNet-20 is that of He et al. 2016 "
    "(arXiv:1512.03385), section 4.2, for CIFAR-10, on 8 images",
    layers=(
        Layer("tiny", (2, 16, 8, 8)),
        Layer("features, 64 x 128", (64, 128)),
        Layer("features, 256 x 1024", (256, 1024)),
        Layer("pooled to 1x1", (32, 256, 1, 1)),
        Layer("last stage, 8 images", (8, 64, 7, 7)),
        Layer("last stage, 1 image", (1, 512, 7, 7)),
        Layer("sequence", (16, 64, 100)),
        Layer("voxels", (2, 16, 8, 8, 8)),
        Layer("ResNet-20 stage 1", (8, 16, 32, 32)),
        Layer("ResNet-20 stage 2", (8, 32, 16, 16)),
        Layer("ResNet-20 stage 3", (8, 64, 8, 8)),
    ),
)
