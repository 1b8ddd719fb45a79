# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Convolutions and taps
#
# You learn where the non-zeros of an orthogonal convolution may be. Their places do not change its
# singular values, but they change which pixels a network sees. You also learn what strides change,
# and why a mask may have more weights than the kernel without changing the start.
#
# Runs on CPU, GPU and TPU; under two minutes on two CPU cores.

# %%
import sys

REPOSITORY = "https://github.com/OWNER/eoi_jax"
if "google.colab" in sys.modules:
    import subprocess

    package = f"eoi_jax[experiments] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %% tags=["parameters"]
CHANNELS = 16  # of each layer
LAYERS = 8  # of the plain network
PIXELS = 24  # along each side of an image
DENSITY = 0.1  # fraction of a kernel's weights that may be non-zero
SEED = 0

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import eoi_jax as eoi

WAYS = ("center", "spread", "spread_both")
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})
shape = (3, 3, CHANNELS, CHANNELS)


def convolve(x, kernel, stride=1):
    """Convolve with circular padding."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=names, precision="highest"
    )


# %% [markdown]
# ## Three ways to place one matrix
#
# A kernel holds one sparse orthogonal matrix. With `"center"`, the whole matrix is at one tap. With
# `"spread"`, each input channel has a tap of its own. With `"spread_both"`, the input channel
# decides the row of the tap and the output channel its column.

# %%
kernels = {taps: eoi.conv(density=DENSITY, taps=taps)(jax.random.key(SEED), shape) for taps in WAYS}
figure, panels = plt.subplots(1, 3, figsize=(10, 3.6))
for panel, (taps, kernel) in zip(panels, kernels.items(), strict=True):
    tiles = np.pad(np.asarray(kernel != 0), ((0, 0), (0, 0), (0, 1), (0, 1)))
    side = 3 * (CHANNELS + 1)
    panel.imshow(tiles.transpose(0, 2, 1, 3).reshape(side, side)[:-1, :-1], cmap="Blues")
    for line in (CHANNELS, 2 * CHANNELS + 1):
        panel.axhline(line, color="gray", linewidth=1)
        panel.axvline(line, color="gray", linewidth=1)
    panel.set(title=f'taps="{taps}"', xticks=[], yticks=[])
figure.suptitle("Non-zeros at each of nine taps: inputs down, outputs across")
plt.show()

# %% [markdown]
# The matrix has equally many non-zeros in all three pictures; only their taps differ.
#
# ## All are exact, and a random tap for each entry is not
#
# On a periodic grid the convolution is one matrix for each frequency, the Fourier transform of the
# kernel. `eoi.spectrum.conv_singular_values` computes the singular values of all of them.

# %%
row, column = np.random.default_rng(SEED).integers(0, 3, (2, CHANNELS, CHANNELS))
inputs, outputs = np.indices((CHANNELS, CHANNELS))
scattered = jnp.zeros(shape).at[row, column, inputs, outputs].set(kernels["center"][1, 1])
figure, axes = plt.subplots(figsize=(8, 3.6))
for name, kernel in {**kernels, "a tap for each entry": scattered}.items():
    values = np.asarray(eoi.spectrum.conv_singular_values(kernel, (PIXELS, PIXELS)))
    is_exact = np.abs(values - 1).max() < 1e-4
    print(f"{name:20} from {values.min():.3f} to {values.max():.3f}")
    axes.plot(np.linspace(0, 1, values.size), values, "-" if is_exact else "--", label=name)
axes.set(title="Singular values of one convolution", xlabel="fraction of them", ylabel="value")
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# Three lines coincide at 1, since shifting a channel by whole pixels is a permutation of pixels.
# A separate tap for each entry is not such a shift, and the singular values go from nearly 0 to
# 1.7.
#
# ## What a network sees
#
# The energy of one pixel after some layers, without an activation.


# %%
@jax.jit
def reached(kernels):
    """Energy at each pixel, of one pixel in the middle with random channels."""
    channels = jax.random.normal(jax.random.key(SEED + 1), (CHANNELS,))
    x = jnp.zeros((1, PIXELS, PIXELS, CHANNELS)).at[0, PIXELS // 2, PIXELS // 2].set(channels)
    energy = (x**2).sum()
    x, _ = jax.lax.scan(lambda x, kernel: (convolve(x, kernel), None), x, kernels)
    return (x[0] ** 2).sum(-1) / energy


figure, panels = plt.subplots(1, 3, figsize=(10, 3.6))
keys = jax.random.split(jax.random.key(SEED + 2), LAYERS)
for panel, taps in zip(panels, WAYS, strict=True):
    stack = jnp.stack([eoi.conv(density=DENSITY, taps=taps)(key, shape) for key in keys])
    energy = np.asarray(reached(stack))
    print(f"{taps:12} energy kept {energy.sum():.4f}, pixels reached {(energy > 1e-9).sum()}")
    panel.imshow(energy**0.25, cmap="Blues")
    panel.set(title=f'taps="{taps}"', xticks=[], yticks=[])
figure.suptitle(f"Where the energy of one pixel is after {LAYERS} layers")
plt.show()

# %% [markdown]
# All the energy is kept in each case. With center taps it stays at its pixel at any depth: such a
# network starts as many copies of a perceptron, one for each pixel. With spread taps the energy
# reaches a neighborhood.
#
# ## Strides
#
# A kernel for stride 1 that is used at stride 2 drops three of four pixels. With `strides=2` the
# matrix has a row for each channel of all four phases, the positions in a cell of 2 × 2 pixels.

# %%
x = jax.random.normal(jax.random.key(SEED + 3), (8, PIXELS, PIXELS, CHANNELS))
wide = (3, 3, CHANNELS, 4 * CHANNELS)
kept = {}
for name, options in {"for stride 1": {}, "strides=2": {"strides": 2}}.items():
    kernel = eoi.conv(density=DENSITY, taps="spread", **options)(jax.random.key(SEED), wide)
    kept[name] = float((convolve(x, kernel, 2) ** 2).sum() / (x**2).sum())
    print(f"{name:12} keeps {kept[name]:.3f} of the energy of white noise at stride 2")
figure, axes = plt.subplots(figsize=(5, 3))
axes.bar(list(kept), list(kept.values()), color=["#D55E00", "#009E73"])
axes.set(title="Energy kept at stride 2", ylabel="fraction", ylim=(0, 1.1))
plt.show()

# %% [markdown]
# One kernel keeps a quarter of the energy, the other all of it. With four times the channels, the
# strided layer is an isometry from all pixels. With fewer channels it is a co-isometry, which keeps
# as much as the outputs can hold.
#
# ## The mask is larger than the kernel
#
# The kernel has fewer non-zeros than the density allows. `eoi.masks.fill` unmasks random further
# weights. They are zero at the start, so the function does not change, and they may learn.

# %%
kernel = kernels["spread"]
mask = eoi.masks.fill(jax.random.key(SEED), eoi.masks.support({"kernel": kernel}), DENSITY)
print("non-zeros", int((kernel != 0).sum()), "of", kernel.size)
print("may learn", int(mask["kernel"].sum()), "the budget is", round(DENSITY * kernel.size))
