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
# # Faster with blocks
#
# You learn why a mask saves no time, how a matrix of whole blocks can be exactly orthogonal, what
# a product with it costs, and how to train a network of such layers: one line of the network
# changes, and the optimizer needs no mask.
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
SIZE = 1024  # inputs and outputs of a layer
BLOCK = 128  # rows and columns of a block
BATCH = 256  # examples of a step
REPEATS = 10  # of each measurement
STEPS = 60  # of training
SEED = 0

# %%
import dataclasses
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import eoi_jax as eoi
from eoi_jax.linen import BlockSparseDense

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})
key = jax.random.key(SEED)

# %% [markdown]
# ## The pattern
#
# Each round rotates pairs of block rows, all pairs at once. After $r$ rounds each block row, and
# each block column, has $2^r$ blocks, and the product of the rounds is orthogonal. Only the blocks
# are stored, `(block rows, blocks of a row, rows, columns)`, and two small arrays of indices.

# %%
matrix = eoi.blocks.orthogonal(key, (SIZE, SIZE), density=2 * BLOCK / SIZE, block_size=BLOCK)
dense = np.asarray(matrix.to_dense())
error = float(eoi.spectrum.orthogonality_error(dense))
print(f"stored {matrix.values.shape}: {matrix.values.size} of {dense.size}, error {error:.0e}")

unstructured = eoi.orthogonal(key, (SIZE, SIZE), density=2 * BLOCK / SIZE)
figure, axes = plt.subplots(1, 2, figsize=(7, 3.5))
for axis, weights, title in zip(
    axes, (unstructured, dense), ("rotations of single rows", "of blocks"), strict=True
):
    axis.imshow(np.asarray(weights) != 0, cmap="Blues", interpolation="nearest")
    axis.set(title=title, xlabel="outputs", ylabel="inputs")
plt.show()

# %% [markdown]
# Both have a quarter of the weights. Right: each row and column of blocks has the same number of
# blocks. Two rows whose blocks are in the same columns are stored as one row of wider blocks.

# %% [markdown]
# ## What a product costs
#
# Forward and backward passes are timed for a dense matrix, for the same matrix under a mask, and
# for blocks. The three are measured in turn, and the medians are compared. The limit of the
# speedup is one over the density.


# %%
def passes(multiply):
    """Compile the product and its gradients with respect to inputs and weights."""

    def loss(x, weights):
        return (multiply(x, weights) ** 2).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def medians_of(size):
    """Return the median seconds of each kind of product, of one size."""
    x = jax.random.normal(key, (BATCH, size))
    block = BLOCK * size // SIZE
    matrix = eoi.blocks.orthogonal(key, (size, size), 2 * BLOCK / SIZE, block_size=block)
    dense = matrix.to_dense()
    mask = dense != 0

    def of_blocks(x, values):
        return eoi.blocks.matmul(x, dataclasses.replace(matrix, values=values))

    kinds = {
        "dense": (passes(jnp.matmul), dense),
        "masked": (passes(lambda x, w: x @ jnp.where(mask, w, 0)), dense),
        "blocks": (passes(of_blocks), matrix.values),
    }
    seconds = {name: [] for name in kinds}
    for turn in range(REPEATS + 1):
        for name, (function, weights) in kinds.items():
            begun = time.perf_counter()
            jax.block_until_ready(function(x, weights))
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


sizes = (SIZE // 4, SIZE // 2, SIZE)
speeds = {"masked": [], "blocks": []}
for size in sizes:
    medians = medians_of(size)
    for name, found in speeds.items():
        found.append(medians["dense"] / medians[name])
    print(f"{size:5}: blocks {speeds['blocks'][-1]:.1f}, masked {speeds['masked'][-1]:.1f}")
figure, axis = plt.subplots(figsize=(5, 3.2))
axis.axhline(SIZE / (2 * BLOCK), color="#999999", linestyle=":", label="limit")
axis.plot(sizes, speeds["blocks"], "o--", color="#0072B2", label="blocks")
axis.plot(sizes, speeds["masked"], "s-", color="#D55E00", label="masked")
axis.set(xlabel="inputs and outputs", ylabel="speed (dense = 1)", xticks=sizes)
axis.legend()
plt.show()

# %% [markdown]
# The product under a mask takes about as long as the dense one. Blocks gain more at larger sizes:
# small products do not use the whole processor, and rows have to be gathered.

# %% [markdown]
# ## A network
#
# `BlockSparseDense` replaces `nn.Dense`. Its weights are the stored blocks, so gradients and the
# optimizer's state are equally small. The places of the blocks are a collection beside `params`.

# %%
digits = load_digits()
images = jnp.asarray(digits.data / 16 - 0.3, jnp.float32)
labels = jnp.asarray(digits.target)


def network(layer):
    return nn.Sequential(
        [nn.Dense(SIZE), nn.tanh, layer(), nn.tanh, layer(), nn.tanh, nn.Dense(10)]
    )


def of_blocks():
    return BlockSparseDense(SIZE, density=2 * BLOCK / SIZE, block_size=BLOCK)


def train(model, rate):
    variables = model.init(key, images[:1])
    tx = optax.adam(rate)
    params, state = variables["params"], tx.init(variables["params"])

    @jax.jit
    def step(params, state, index):
        def loss_fn(params):
            logits = model.apply({**variables, "params": params}, images[index])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index])
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    order = np.random.default_rng(SEED).integers(1400, size=(STEPS, BATCH))
    jax.block_until_ready(step(params, state, order[0]))  # compiles
    losses, begun = [], time.perf_counter()
    for index in order:
        params, state, loss = step(params, state, index)
        losses.append(float(loss))
    spent = time.perf_counter() - begun
    logits = model.apply({**variables, "params": params}, images[1400:])
    accuracy = float((logits.argmax(-1) == labels[1400:]).mean())
    return sum(leaf.size for leaf in jax.tree.leaves(params)), losses, spent, accuracy


figure, axis = plt.subplots(figsize=(6, 3.5))
spent_by = {}
for name, layer, style in (("dense", lambda: nn.Dense(SIZE), "-"), ("blocks", of_blocks, "--")):
    size, losses, spent_by[name], accuracy = train(network(layer), 1e-3)
    print(f"{name:7} {size:9,} weights, accuracy {100 * accuracy:.1f} %")
    axis.plot(losses, style, label=name)
axis.set(xlabel="step", ylabel="training loss (nats)")
axis.legend()
plt.show()
print(
    f"a step of the network of blocks: {spent_by['dense'] / spent_by['blocks']:.1f} times as fast"
)

# %% [markdown]
# Larger layers gain more, small ones nothing. The page "Where sparsity saves nothing" has a table
# of sizes, block sizes, densities and batches, measured on a machine without other work.
