"""Draw the picture of docs/concepts/convolutions_and_taps.md: python docs/concepts/taps.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import eoi_jax as eoi

WAYS = ("center", "spread", "spread_both")
CHANNELS, LAYERS, PIXELS = 8, 6, 21


def reach(taps):
    """Return the energy at each pixel after some layers, of one pixel with random channels."""
    x = jnp.zeros((1, PIXELS, PIXELS, CHANNELS))
    x = x.at[0, PIXELS // 2, PIXELS // 2].set(jax.random.normal(jax.random.key(1), (CHANNELS,)))
    for key in jax.random.split(jax.random.key(2), LAYERS):
        kernel = eoi.conv(density=0.2, taps=taps)(key, (3, 3, CHANNELS, CHANNELS))
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dimensions)
    return np.asarray((x[0] ** 2).sum(-1) / (x**2).sum())


def main():
    """Draw three columns: the kernel tap by tap, and what a pixel reaches."""
    figure, panels = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
    for taps, top, bottom in zip(WAYS, *panels, strict=True):
        kernel = eoi.conv(density=0.2, taps=taps)(jax.random.key(0), (3, 3, CHANNELS, CHANNELS))
        tiles = np.pad(np.asarray(kernel != 0), ((0, 0), (0, 0), (0, 1), (0, 1)))
        tiles = tiles.transpose(0, 2, 1, 3).reshape(3 * (CHANNELS + 1), -1)[:-1, :-1]
        top.imshow(tiles, cmap="Blues", vmax=1.2)
        for line in (CHANNELS, 2 * CHANNELS + 1):
            top.axhline(line, color="gray", linewidth=1)
            top.axvline(line, color="gray", linewidth=1)
        top.set(title=f'taps="{taps}"', xticks=[], yticks=[])
        bottom.imshow(reach(taps) ** 0.25, cmap="Blues")
        bottom.set(xticks=[], yticks=[])
    panels[0][0].set(ylabel="kernel, 3 x 3 taps")
    panels[1][0].set(ylabel=f"one pixel after {LAYERS} layers")
    figure.savefig(Path(__file__).with_name("taps.png"), dpi=90)


if __name__ == "__main__":
    main()
