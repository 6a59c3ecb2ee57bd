"""Shapes that break what a kernel may assume, each named by what is odd about it."""

from bench.suites.suite import Layer, Suite

SUITE = Suite(
    source="made up: each shape breaks an assumption that a kernel may make; at most 67.2 MB in float32",
    layers=(
        Layer("all sizes prime", (7, 61, 53, 47)),
        Layer("13 channels, no whole vector", (32, 13, 56, 56)),
        Layer("3 channels", (32, 3, 224, 224)),
        Layer("planes of 49 values, 98 bytes in half", (32, 2048, 7, 7)),
        Layer("planes of 9 values", (512, 256, 3, 3)),
        Layer("planes of 1 value", (512, 2048, 1, 1)),
        Layer("planes of one row", (16, 64, 1, 3001)),
        Layer("planes of one column", (16, 64, 3001, 1)),
        Layer("one plane alone", (1, 1, 4096, 4096)),
        Layer("1 channel of many images", (4096, 1, 63, 65)),
        Layer("1 image", (1, 64, 512, 512)),
        Layer("65537 channels", (2, 65537, 3, 3)),
        Layer("sizes powers of two", (64, 256, 32, 32)),
        Layer("N, C", (4096, 1024)),
        Layer("N, C, both odd", (4095, 1023)),
        Layer("N, C, L", (32, 128, 1001)),
        Layer("N, C, D, H, W", (2, 32, 16, 56, 56)),
    ),
)
