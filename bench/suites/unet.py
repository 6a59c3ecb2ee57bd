"""The batch norms of U-Net: Ronneberger et al. 2015 with padded convolutions, a batch norm after each 3x3 one."""

from bench.suites.suite import Layer, Suite

# Padding keeps the size of a level, so the encoder's two batch norms have the shape of the decoder's two.
SUITE = Suite(
    source="Ronneberger et al. 2015 (arXiv:1505.04597), figure 1, 256 x 256 images; in the widely used variant "
    "with padded convolutions and a batch norm after each 3x3 one",
    batch=8,
    layers=(
        Layer("level 1, down and up", (64, 256, 256), 4),
        Layer("level 2, down and up", (128, 128, 128), 4),
        Layer("level 3, down and up", (256, 64, 64), 4),
        Layer("level 4, down and up", (512, 32, 32), 4),
        Layer("bottleneck", (1024, 16, 16), 2),
    ),
)
