"""What a suite is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A named shape: the sizes of an image, C and any spatial ones; or N too, in a suite without a batch.

    count: how often the network has it.
    """

    name: str
    sizes: tuple[int, ...]
    count: int = 1


@dataclass(frozen=True)
class Suite:
    """Layers, and where they come from; batch: images in a batch where none are asked for, None if layers fix N."""

    source: str
    layers: tuple[Layer, ...]
    batch: int | None = None

    def shapes(self, batch: int | None) -> list[tuple[Layer, tuple[int, ...]]]:
        """Each layer with its shape N, C, ...; batch replaces the suite's own, where it has one."""
        if self.batch is None:
            return [(layer, layer.sizes) for layer in self.layers]
        return [(layer, (batch or self.batch, *layer.sizes)) for layer in self.layers]
