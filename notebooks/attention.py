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
# # Attention: which axes of a kernel are a matrix
#
# You learn how to draw sparse, exactly orthogonal kernels for attention, whose kernels have three
# axes: whole or head by head, with queries, keys and values in separate arrays or in one. Then a
# small language model without normalization trains on the help texts of Python from four starts:
# a dense one, and three with an eighth of the weights: masked, masked and rescaled, and exactly
# orthogonal (EOI).
#
# Runs on TPU, GPU and CPU; under two minutes on two CPU cores.

# %%
import sys

REPOSITORY = "https://github.com/OWNER/eoi_jax"
if "google.colab" in sys.modules:
    import subprocess

    package = f"eoi_jax[experiments] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %% tags=["parameters"]
WIDTH = 64  # channels of a token
HEADS = 4
DEPTH = 4  # blocks
LENGTH = 32  # characters of a text
DENSITY = 0.125  # of the kernels in the blocks
BATCH = 32  # texts of a step
STEPS = 150
SEED = 0

# %%
from pydoc_data.topics import topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import eoi_jax as eoi
from eoi_jax.typing import Layout

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})
key = jax.random.key(SEED)

# %% [markdown]
# ## Four kernels of three axes
#
# Flax stores queries, keys and values as `(width, heads, size)` and the output projection as
# `(heads, size, width)`. The library recognizes them by name, so no `layout` is needed.

# %%
attention = nn.MultiHeadDotProductAttention(HEADS)
tokens = jax.random.normal(key, (1, LENGTH, WIDTH))
params = attention.init(key, tokens)["params"]
params, mask = eoi.exact_orthogonal(key, params, DENSITY)
for name, layer in params.items():
    shape = layer["kernel"].shape
    matrix = layer["kernel"].reshape(WIDTH, WIDTH)
    error = float(eoi.spectrum.orthogonality_error(matrix))
    print(f"{name:6} {shape!s:14} density {np.mean(mask[name]['kernel']):.3f}, error {error:.0e}")

# %% [markdown]
# By default, all heads together are one orthogonal matrix, from all channels to the channels of
# all heads. Or each head has a matrix of its own, with orthonormal columns; then the heads are
# independent and may overlap. The pictures show where the weights of one kernel are, with the
# inputs from top to bottom and the heads side by side.


# %%
def per_head(path, leaf):
    if path[0].key == "out":
        return Layout(in_axis=1, out_axis=2, batch_axis=0)
    return Layout(in_axis=0, out_axis=2, batch_axis=1)


apart, _ = eoi.exact_orthogonal(key, params, DENSITY, layout=per_head)
heads = np.asarray(apart["query"]["kernel"], np.float64)
errors = [eoi.spectrum.orthogonality_error(heads[:, head]) for head in range(HEADS)]
print("each head by itself:", ", ".join(f"{error:.0e}" for error in errors))

figure, axes = plt.subplots(1, 2, figsize=(7, 3.5))
for axis, kernels, title in zip(axes, (params, apart), ("whole", "head by head"), strict=True):
    axis.spy(kernels["query"]["kernel"].reshape(WIDTH, WIDTH), markersize=2, color="#0072B2")
    axis.set(title=title, xlabel="heads and their channels", ylabel="channels of a token")
    for head in range(1, HEADS):
        axis.axvline(head * WIDTH / HEADS - 0.5, color="#E69F00")
plt.show()

# %% [markdown]
# Left: each channel of a token goes to about an eighth of all channels of the heads, and rows and
# columns are orthonormal. Right: the columns of each head are orthonormal; different heads are
# independent.

# %% [markdown]
# ## Three kernels in one array
#
# Queries, keys and values in one array, as in GPT-2, are three matrices: `groups=3`.

# %%
fused = {"kernel": jnp.zeros((WIDTH, 3 * WIDTH))}
fused, _ = eoi.exact_orthogonal(key, fused, DENSITY, layout=lambda path, leaf: Layout(groups=3))
parts = jnp.split(fused["kernel"], 3, axis=1)
print([f"{float(eoi.spectrum.orthogonality_error(part)):.0e}" for part in parts])

# %% [markdown]
# ## A language model without normalization
#
# A block adds attention and a perceptron, each divided by the square root of twice the depth, so
# that the size of the sum does not grow with depth. The text is Python's own documentation.

# %%
text = "\n".join(topic for _, topic in sorted(topics.items()))
codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8) % 128
starts = np.random.default_rng(SEED).integers(len(codes) - LENGTH - 1, size=(STEPS, BATCH))
windows = codes[starts[..., None] + np.arange(LENGTH + 1)]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        small = (2 * DEPTH) ** -0.5
        causal = nn.make_causal_mask(x[..., 0])
        x = x + small * nn.MultiHeadDotProductAttention(HEADS, name="attention")(x, mask=causal)
        y = nn.gelu(nn.Dense(4 * WIDTH, name="mlp_in")(x))
        return x + small * nn.Dense(WIDTH, name="mlp_out")(y)


class Model(nn.Module):
    @nn.compact
    def __call__(self, characters):
        x = nn.Embed(128, WIDTH, embedding_init=nn.initializers.normal(1.0))(characters)
        for number in range(DEPTH):
            x = Block(name=f"block{number}")(x)
        return nn.Dense(128, name="last")(x)


def in_blocks(path, leaf):
    """Kernels of the blocks alone become sparse: not the embedding, not the last layer."""
    return path[0].key.startswith("block") and path[-1].key == "kernel"


model = Model()
dense = model.init(key, windows[0, :, :-1])["params"]
random = eoi.masks.random(key, dense, DENSITY, where=in_blocks)
STARTS = {
    "dense": (dense, jax.tree.map(lambda leaf: jnp.array(True), dense), 4e-3),
    "masked": (*eoi.masked(dense, random), 16e-3),
    "masked and rescaled": (*eoi.rescaled(dense, random), 16e-3),
    "EOI": (*eoi.exact_orthogonal(key, dense, DENSITY, where=in_blocks), 16e-3),
}

# %% [markdown]
# ## Singular values at the start
#
# The singular values show how all blocks together stretch a small change of the tokens, at a
# random sequence of 8 tokens.


# %%
def blocks(params):
    """Return the function of all tokens that the blocks are, of one flat array."""

    def function(flat):
        x = flat.reshape(-1, WIDTH)
        for number in range(DEPTH):
            x = Block().apply({"params": params[f"block{number}"]}, x)
        return x.ravel()

    return function


LOOKS = ("#000000", "-"), ("#D55E00", ":"), ("#009E73", "-."), ("#0072B2", "--")
flat = jax.random.normal(key, (1, 8 * WIDTH))
figure, axis = plt.subplots(figsize=(6, 3.5))
for (name, (params, _, _)), (color, style) in zip(STARTS.items(), LOOKS, strict=True):
    values = np.sort(eoi.spectrum.singular_values(blocks(params), flat)[0])[::-1]
    axis.semilogy(values, style, color=color, label=name)
    print(f"{name:20} largest over median {values[0] / np.median(values):.2f}")
axis.set(xlabel="number", ylabel="singular value")
axis.legend()
plt.show()

# %% [markdown]
# The masked start is closest to 1, because its branches are the smallest: a mask removes seven
# eighths of their variance, and the residuals alone are the identity. Of the starts whose
# branches have full size, EOI spreads the values least. With no start is the sum of a residual
# and a branch an isometry.

# %% [markdown]
# AdamW trains all starts, the sparse ones at a higher learning rate: with an eighth of the
# weights, a step of the same size changes the network less. `python -m experiments sweep
# transformers` searches the rate of each start.


# %%
def train(params, mask, rate):
    tx = eoi.static_sparse(optax.adamw(rate), mask)

    def loss_fn(params, window):
        logits = model.apply({"params": params}, window[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:])
        return losses.mean()

    @jax.jit
    def step(params, state, window):
        loss, grads = jax.value_and_grad(loss_fn)(params, window)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for window in windows.astype(np.int32):
        params, state, loss = step(params, state, window)
        losses.append(float(loss))
    return params, np.array(losses)


figure, axis = plt.subplots(figsize=(6, 3.5))
for (name, (params, mask, rate)), (color, style) in zip(STARTS.items(), LOOKS, strict=True):
    trained, losses = train(params, mask, rate)
    assert all(
        not np.any(np.asarray(leaf)[~np.broadcast_to(kept, leaf.shape)])
        for leaf, kept in zip(jax.tree.leaves(trained), jax.tree.leaves(mask), strict=True)
    )
    recent = len(losses) // 5
    print(f"{name:20} mean loss of the last {recent} steps: {losses[-recent:].mean():.3f}")
    smooth = np.convolve(losses, np.ones(recent) / recent, mode="valid")
    axis.plot(np.arange(len(smooth)) + recent, smooth, style, color=color, label=name)
axis.set(xlabel="step", ylabel="loss (nats a character)")
axis.legend()
plt.show()

# %% [markdown]
# With one seed and few steps, the curves show that sparse attention trains, not which start is
# best. The weights outside the mask are exactly zero after training, as the cell above asserts.
