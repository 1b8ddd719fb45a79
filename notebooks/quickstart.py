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
# # Quickstart: a sparse network that is orthogonal from the start
#
# You learn to draw one sparse, exactly orthogonal matrix, to start a network from such matrices,
# to keep its zeros while any optax optimizer trains it, and to look at the singular values that
# explain the difference. Flax Linen and Flax NNX take one screen each; the data are the 8 × 8
# digits that come with scikit-learn.
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
DENSITY = 0.1  # fraction of the weights that are kept
WIDTH = 128  # units of a hidden layer
DEPTH = 8  # linear layers
STEPS = 200  # training steps
BATCH = 128  # images of a step
EXAMPLES = 128  # images whose Jacobians are taken
SEED = 0

# %%
import itertools

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import eoi_jax as eoi

# Okabe and Ito's colors, told apart by color-blind readers.
BLUE, VERMILION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

images, labels = load_digits(return_X_y=True)
images = ((images - images.mean()) / images.std()).astype(np.float32)
x_train, x_test, y_train, y_test = train_test_split(
    images, labels, test_size=0.2, random_state=SEED
)
print(f"{len(x_train)} training images of {x_train.shape[1]} pixels, {len(x_test)} test images")

# %% [markdown]
# ## One matrix
#
# `eoi.orthogonal` composes random rotations of two coordinates each until the density is reached.

# %%
matrix = eoi.orthogonal(jax.random.key(SEED), (64, 64), density=DENSITY)
print(f"density {float((matrix != 0).mean()):.4f}, asked for {DENSITY}")
print(f"largest error of W Wᵀ = I: {float(eoi.spectrum.orthogonality_error(matrix)):.1e}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
for axes, values, title in (
    (left, matrix, f"W, density {DENSITY:g}"),
    (right, matrix @ matrix.T, "W Wᵀ"),
):
    picture = axes.imshow(values, cmap="PuOr", vmin=-1, vmax=1)
    axes.set(title=title, xlabel="column", ylabel="row")
figure.colorbar(picture, ax=(left, right), label="entry")
plt.show()

# %% [markdown]
# Most entries on the left are exactly zero, and still the product on the right is the identity:
# rows have length 1 and are perpendicular.

# %% [markdown]
# ## The task
#
# Both frameworks use the same loss, and the same random batches for every network.


# %%
def cross_entropy(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def batches():
    generator = np.random.default_rng(SEED)
    for _ in range(STEPS):
        chosen = generator.choice(len(x_train), BATCH)
        yield x_train[chosen], y_train[chosen]


# %% [markdown]
# ## Flax Linen
#
# Give `eoi.dense` as `kernel_init`, take the mask from the kernels' zeros, and wrap the optimizer.


# %%
class Mlp(nn.Module):
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x):
        for _ in range(DEPTH - 1):
            x = nn.tanh(nn.Dense(WIDTH, kernel_init=self.kernel_init)(x))
        return nn.Dense(10, kernel_init=self.kernel_init)(x)


model = Mlp(eoi.dense(density=DENSITY))


def train(params, mask):
    """Train under a mask; return the parameters and the loss of each step."""
    tx = eoi.static_sparse(optax.adamw(1e-3), mask)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(model.apply(p, x), y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for x, y in batches():
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))
        if len(losses) % max(STEPS // 4, 1) == 0:
            print(f"  step {len(losses)} of {STEPS}, loss {losses[-1]:.4f}")
    return params, losses


params = jax.jit(model.init)(jax.random.key(SEED), x_train[:1])
mask = eoi.masks.support(params)
print(f"Linen, EOI: density {eoi.masks.density(mask):.4f} before training")
trained, linen_losses = train(params, mask)
accuracy = (model.apply(trained, x_test).argmax(-1) == y_test).mean()
print(f"density {eoi.masks.density(eoi.masks.support(trained)):.4f} after training")
print(f"test accuracy {accuracy:.1%}")

# %% [markdown]
# ## Flax NNX
#
# The steps are the same; take the mask of `nnx.state(model, nnx.Param)`.

# %%
rngs = nnx.Rngs(SEED)
sizes = [x_train.shape[1]] + [WIDTH] * (DEPTH - 1) + [10]
layers = []
for inputs, outputs in itertools.pairwise(sizes):
    layers += [
        nnx.Linear(inputs, outputs, kernel_init=eoi.dense(density=DENSITY), rngs=rngs),
        nnx.tanh,
    ]
nnx_model = nnx.Sequential(*layers[:-1])  # no activation after the last layer

nnx_mask = eoi.masks.support(nnx.state(nnx_model, nnx.Param))
tx = eoi.static_sparse(optax.adamw(1e-3), nnx_mask)
optimizer = nnx.Optimizer(nnx_model, tx, wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(x), y))(model)
    optimizer.update(model, grads)
    return loss


nnx_losses = [float(nnx_step(nnx_model, optimizer, x, y)) for x, y in batches()]
after = eoi.masks.support(nnx.state(nnx_model, nnx.Param))
accuracy = (nnx_model(x_test).argmax(-1) == y_test).mean()
print(f"NNX, EOI: loss {nnx_losses[-1]:.4f} after {STEPS} steps, test accuracy {accuracy:.1%}")
print(f"density {eoi.masks.density(nnx_mask):.4f} before, {eoi.masks.density(after):.4f} after")

# %% [markdown]
# ## Against the usual sparse start
#
# The usual sparse start draws dense weights, here orthogonal ones, and removes equally many of
# them at random: `eoi.masked`.

# %%
dense = eoi.networks.redraw(jax.random.key(SEED), params, jax.nn.initializers.orthogonal())
base = eoi.masked(dense, eoi.masks.random(jax.random.key(SEED + 1), dense, DENSITY))
print(f"Linen, masked orthogonal: density {eoi.masks.density(base.mask):.4f}")
base_trained, base_losses = train(base.params, base.mask)
accuracy = (model.apply(base_trained, x_test).argmax(-1) == y_test).mean()
print(f"test accuracy {accuracy:.1%}")

figure, axes = plt.subplots(figsize=(8, 4))
axes.plot(linen_losses, color=BLUE, label="EOI, Linen")
axes.plot(nnx_losses, "--", color=GREEN, label="EOI, NNX")
axes.plot(base_losses, ":", color=VERMILION, label="masked orthogonal")
axes.set(
    title=f"Training loss, {DEPTH}-layer tanh MLP, density {DENSITY:g}",
    xlabel="training step",
    ylabel="cross-entropy (nats)",
)
axes.grid(alpha=0.3)
axes.legend(title="start")
plt.show()

# %% [markdown]
# From EOI the networks of both frameworks learn at once. They have different matrices, so their
# curves are not equal. The masked start has as many weights, but its loss first stays at that of
# guessing, and is then higher than that of the others.

# %% [markdown]
# ## The spectrum
#
# The reason is in the singular values of the Jacobian of logits with respect to pixels, here for
# some images. They are the factors by which the network stretches small changes of its input, and
# gradients in the backward pass.


# %%
@jax.jit
def spectrum(params):
    return eoi.spectrum.singular_values(lambda x: model.apply(params, x), x_train[:EXAMPLES])


cells = {
    "dense orthogonal, at the start": (dense, BLACK, "-."),
    "EOI, at the start": (params, BLUE, "-"),
    "EOI, trained": (trained, GREEN, "--"),
    "masked orthogonal, at the start": (base.params, VERMILION, ":"),
}
figure, axes = plt.subplots(figsize=(8, 4))
for name, (own, color, style) in cells.items():
    values = np.sort(spectrum(own).ravel())[::-1]
    summary = eoi.spectrum.summarize(values)
    print(f"{name:32} mean {summary.mean:.2g}, from {summary.min:.2g} to {summary.max:.2g}")
    axes.plot(np.linspace(0, 1, values.size), values, style, color=color, label=name)
axes.set(
    title=f"Singular values of the Jacobian, pooled over {EXAMPLES} images",
    xlabel="fraction of the singular values that are larger",
    ylabel="singular value",
    yscale="log",
)
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# EOI starts close to the dense orthogonal network, with all singular values within one decade;
# training then spreads them. Those of the masked start are smaller by orders of magnitude, and so
# are its gradients, although it has as many weights.
#
# Where to go on: [dynamical_isometry](dynamical_isometry.ipynb) follows these spectra through
# depth, [deep_networks](deep_networks.ipynb) trains where the usual starts do not, and
# [pruning_methods](pruning_methods.ipynb) takes layer densities from pruning criteria.
