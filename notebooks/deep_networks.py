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
# # Deep networks: which starts train
#
# You learn that a plain tanh network of hundreds of layers, without residuals or normalization,
# trains with an eighth of its weights if it starts sparse and exactly orthogonal, and that the
# usual sparse and dense starts do not train. All five starts have the same optimizer and batches.
# Gradients are measured layer by layer before the first step. The data are the 8 × 8 digits that
# come with scikit-learn.
#
# Runs on TPU, GPU and CPU; under two minutes on two CPU cores. `LAYERS = 1000` is the depth of the
# paper's networks; it takes a GPU, or more time.

# %%
import sys

REPOSITORY = "https://github.com/OWNER/eoi_jax"
checkout = ".."  # of the repository: pip does not install its folder `experiments`
if "google.colab" in sys.modules:
    import subprocess
    import tempfile

    checkout = tempfile.mkdtemp()
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, checkout], check=True)
    package = f"{checkout}[experiments]"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)
sys.path.append(checkout)

# %% tags=["parameters"]
LAYERS = 300  # linear layers
WIDTH = 128  # units of each
DENSITY = 0.125  # of the sparse networks
STEPS = 50  # training steps
BATCH = 128  # images of a step
SEED = 0

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import eoi_jax as eoi
from experiments import models

# Okabe and Ito's colors, told apart by color-blind readers.
LOOKS = {
    "dense orthogonal": ("#000000", "--"),
    "EOI": ("#0072B2", "-"),
    "masked orthogonal": ("#D55E00", ":"),
    "masked Gaussian": ("#CC79A7", "-."),
    "dense Gaussian": ("#009E73", (0, (3, 1, 1, 1, 1, 1))),
}
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

images, labels = load_digits(return_X_y=True)
images = ((images - images.mean()) / images.std()).astype(np.float32).reshape(-1, 8, 8, 1)
x_train, x_test, y_train, y_test = train_test_split(
    images, labels, test_size=0.2, random_state=SEED
)

# %% [markdown]
# ## Five starts
#
# The network is `experiments.models.Mlp`. Its hidden layers are one scan, so their kernels are one
# stack of matrices, and more layers take no longer to compile. `models.layout` describes this
# stack to the functions that draw. Gain and biases are at the critical point of tanh, as in the
# published 1000-layer networks.
#
# * **dense orthogonal**: all weights, the reference;
# * **EOI**: sparse and exactly orthogonal;
# * **masked orthogonal**: the reference with random weights removed;
# * **masked Gaussian**: on the same mask, of variance $\sigma_w^2$ over the number of remaining
#   inputs;
# * **dense Gaussian**: all weights, of variance $\sigma_w^2$ over the number of inputs.

# %%
sigma_w, sigma_b = eoi.mean_field.critical_line("tanh", 0.0259)
print(f"critical: σ_w = {sigma_w:.4f}, σ_b = {sigma_b:.5f}")
model = models.create("mlp1000", depth=LAYERS, width=WIDTH)
key, for_biases, for_mask, for_weights = jax.random.split(jax.random.key(SEED), 4)
shapes = jax.eval_shape(model.init, key, x_train[:1])
zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def is_bias(path, leaf):
    return path[-1].key == "bias"


# Every start has the same biases. Any leaf can be drawn: `where` says which.
zeros = eoi.networks.redraw(for_biases, zeros, jax.nn.initializers.normal(sigma_b), where=is_bias)


def draw(init):
    """Draw every kernel by an initializer."""
    return eoi.networks.redraw(for_weights, zeros, init, layout=models.layout)


orthogonal = draw(jax.nn.initializers.orthogonal(sigma_w))
gaussian = draw(jax.nn.initializers.variance_scaling(sigma_w**2, "fan_in", "normal"))
densities = eoi.budgets.uniform(zeros, DENSITY, layout=models.layout)
mask = eoi.masks.random(for_mask, zeros, densities)
full = eoi.masks.support(orthogonal)
# The variance that the removed inputs leave out goes to those that are kept.
rescaled = jax.tree.map(
    lambda own, leaf: leaf * jnp.sqrt(own.shape[-2] / own.sum(-2, keepdims=True).clip(1))
    if own.ndim else leaf,
    mask, gaussian,
)  # fmt: skip
starts = {
    "dense orthogonal": eoi.SparseInit(orthogonal, full),
    "EOI": eoi.exact_orthogonal(for_weights, zeros, densities, scale=sigma_w, layout=models.layout),
    "masked orthogonal": eoi.masked(orthogonal, mask),
    "masked Gaussian": eoi.masked(rescaled, mask),
    "dense Gaussian": eoi.SparseInit(gaussian, full),
}
for name, start in starts.items():
    kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(start.mask) if leaf.ndim)
    print(f"{name:18} density {eoi.masks.density(start.mask):.4f}, {kept:,} weights")

# %% [markdown]
# ## Gradients before the first step
#
# What is the norm of the gradient of the loss with respect to each layer's kernel?

# %%
x_batch, y_batch = x_train[:BATCH], y_train[:BATCH]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


@jax.jit
def gradient_norms(start):
    grads = eoi.masks.apply(start.mask, jax.grad(loss_fn)(start.params, x_batch, y_batch))
    return jnp.sqrt((grads["params"]["hidden"]["linear"]["kernel"] ** 2).sum(axis=(1, 2)))


figure, axes = plt.subplots(figsize=(8, 4))
for name, start in starts.items():
    norms = np.asarray(gradient_norms(start))
    print(f"{name:18} first layer {norms[0]:.1e}, last {norms[-1]:.1e}")
    color, style = LOOKS[name]
    positions = 2 + np.arange(len(norms))
    axes.plot(positions, norms.clip(1e-30), color=color, linestyle=style, linewidth=2, label=name)
axes.set(
    title=f"Gradient of each hidden kernel at the start, {LAYERS} tanh layers",
    xlabel="layer",
    ylabel="norm of the gradient (nats)",
    yscale="log",
    ylim=(1e-13, 1e3),
)
axes.grid(alpha=0.3)
axes.legend(ncols=2)
plt.show()

# %% [markdown]
# With the masked orthogonal start the gradient vanishes: each layer shrinks it. All other starts
# are critical, and their gradients keep about the same norm through all layers. So the norm does
# not distinguish the orthogonal starts from the Gaussian ones; the spectra below do.

# %% [markdown]
# ## Spectra before the first step


# %%
@jax.jit
def spectrum(params):
    return eoi.spectrum.singular_values(lambda x: model.apply(params, x), x_train[:16])


figure, axes = plt.subplots(figsize=(8, 4))
for name, start in starts.items():
    values = np.sort(np.asarray(spectrum(start.params)).ravel())[::-1]
    print(f"{name:18} mean {values.mean():.2g}, from {values.min():.1e} to {values.max():.2g}")
    color, style = LOOKS[name]
    fractions = np.linspace(0, 1, values.size)
    axes.plot(fractions, values.clip(1e-10), color=color, linestyle=style, linewidth=2, label=name)
axes.set(
    title="Singular values of the Jacobian of logits by pixels, 16 images",
    xlabel="fraction of the singular values that are larger",
    ylabel="singular value (at least 1e-10)",
    yscale="log",
)
axes.grid(alpha=0.3)
axes.legend(loc="center left")
plt.show()

# %% [markdown]
# With the orthogonal starts, dense or sparse, all singular values are within one decade. The
# Gaussian starts have a few large singular values and many that are smaller by orders of
# magnitude: different images become nearly the same. Those of the masked orthogonal start are
# below the range of float32.

# %% [markdown]
# ## Training
#
# The optimizer is SGD with Nesterov momentum. Each layer adds to the change of a step, so the
# learning rate is proportional to 1 / LAYERS; it is the same for every start. `eoi.static_sparse`
# keeps masked weights at zero.

# %%
sgd = optax.sgd(0.5 / LAYERS, momentum=0.9, nesterov=True)


@jax.jit
def step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    tx = eoi.static_sparse(sgd, optax.tree.get(state, "mask"))  # one program for every mask
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(start):
    generator = np.random.default_rng(SEED)
    params, state, losses = start.params, eoi.static_sparse(sgd, start.mask).init(start.params), []
    for _ in range(STEPS):
        chosen = generator.choice(len(x_train), min(BATCH, len(x_train)), replace=False)
        params, state, loss = step(params, state, x_train[chosen], y_train[chosen])
        losses.append(float(loss))
    accuracy = (jax.jit(model.apply)(params, x_test).argmax(-1) == y_test).mean()
    return losses, float(accuracy)


figure, axes = plt.subplots(figsize=(8, 5))
for name, start in starts.items():
    losses, accuracy = train(start)
    print(f"{name:18} loss {losses[0]:.3f} to {losses[-1]:.3f}, test accuracy {accuracy:.1%}")
    color, style = LOOKS[name]
    density = eoi.masks.density(start.mask)
    label = f"{name}, density {density:.3g}: {accuracy:.0%}"
    axes.plot(range(1, STEPS + 1), losses, color=color, linestyle=style, linewidth=2, label=label)
axes.set(
    title=f"Training loss, {LAYERS}-layer tanh MLP of width {WIDTH} on digits",
    xlabel="training step",
    ylabel="cross-entropy (nats)",
)
axes.grid(alpha=0.3)
figure.legend(title="start: test accuracy", loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# The dense orthogonal start learns, and so does EOI with an eighth of its weights. The loss of the
# masked orthogonal start does not change, and that of the masked Gaussian start hardly does. The
# loss of the dense Gaussian start falls, but jumps back. Such a short training shows which starts
# train, not the accuracy that each would reach.
