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
# # Pruning methods, side by side
#
# You learn what pruning at initialization decides: *where* the weights are (the mask) and *how
# many* each layer gets (the budget). Seven rules prune one network; you see their masks as
# pictures and their budgets side by side. Then exact orthogonal initialization (EOI) uses only
# the budgets and draws new masks and weights, and you compare spectra and training. The data are
# the 8 × 8 digits that come with scikit-learn.
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
DENSITY = 0.15  # fraction of the weights that every method keeps
WIDTH = 64  # units of a hidden layer
DEPTH = 6  # linear layers
SYNFLOW_STEPS = 100  # rounds of SynFlow
AI_STEPS = 1000  # steps of descent towards orthogonality
STEPS = 150  # training steps
BATCH = 128  # images of a step
SEED = 0

# %%
import functools

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.colors import ListedColormap
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import eoi_jax as eoi

# Okabe and Ito's colors, told apart by color-blind readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = ListedColormap(["#FFFFFF", "#0072B2"])
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)  # ink in [0, 1], and blank pixels exactly 0
x_train, x_test, y_train, y_test = train_test_split(
    images, labels, test_size=0.2, random_state=SEED
)

# %% [markdown]
# ## One network, seven rules
#
# A criterion scores weights, and `eoi.masks.top_k` keeps those with the largest scores in the whole
# network. A budget rule decides only the counts of the layers; the masks are random. A criterion
# takes any loss function and any parameter tree.


# %%
class Mlp(nn.Module):
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.orthogonal()
        for layer in range(1, DEPTH):
            x = nn.Dense(WIDTH, kernel_init=init, name=f"layer{layer}")(x)
            x = nn.tanh(x) if self.activation == "tanh" else x
        return nn.Dense(10, kernel_init=init, name=f"layer{DEPTH}")(x)


model = Mlp()
params = jax.jit(model.init)(jax.random.key(SEED), x_train[:1])
x_batch, y_batch = x_train[:BATCH], y_train[:BATCH]
names = [f"layer{layer}" for layer in range(1, DEPTH + 1)]


def loss_fn(params, x, y, temperature=1.0):
    logits = model.apply(params, x) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def synflow(params):
    # SynFlow is defined for networks whose output doubles with their input: no tanh.
    return eoi.criteria.synflow(Mlp("none").apply, params, x_train[:1])


snip = jax.jit(functools.partial(eoi.criteria.snip, loss_fn))
grasp = jax.jit(functools.partial(eoi.criteria.grasp, functools.partial(loss_fn, temperature=200)))
for_random, for_uniform, for_erk, for_eoi = jax.random.split(jax.random.key(SEED + 1), 4)
uniform = eoi.budgets.uniform(params, DENSITY)
erk = eoi.budgets.erdos_renyi_kernel(params, DENSITY)
masks = {
    "random": eoi.masks.top_k(eoi.criteria.random(for_random, params), DENSITY),
    "magnitude": eoi.masks.top_k(eoi.criteria.magnitude(params), DENSITY),
    "SNIP": eoi.masks.top_k(snip(params, x_batch, y_batch), DENSITY),
    "GraSP": eoi.masks.top_k(grasp(params, x_batch, y_batch), DENSITY),
    "SynFlow": eoi.criteria.prune(synflow, params, DENSITY, num_steps=SYNFLOW_STEPS),
    "uniform": eoi.masks.random(for_uniform, params, uniform),
    "ERK": eoi.masks.random(for_erk, params, erk),
}
for name, mask in masks.items():
    kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask) if leaf.ndim)
    overlap = eoi.masks.overlap(mask, masks["SNIP"])
    density = eoi.masks.density(mask)
    print(f"{name:10} {kept:,} weights, density {density:.4f}, overlap with SNIP {overlap:.2f}")
print("overlap: the Jaccard index, 1 for equal masks")

# %% [markdown]
# ## Masks as pictures


# %%
def draw_masks(masks, title):
    """Draw the mask of each layer, a row of pictures for each method."""
    shown = [names[0], names[1], names[-2], names[-1]]
    figure, grid = plt.subplots(
        *(len(masks), len(shown)),
        figsize=(7.5, 1.75 * len(masks)),
        gridspec_kw={"width_ratios": [1, 1, 1, 0.3]},
        squeeze=False,
    )
    for row, (method, mask) in zip(grid, masks.items(), strict=True):
        for axes, name in zip(row, shown, strict=True):
            own = mask["params"][name]["kernel"]
            axes.imshow(own, cmap=INK, vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{method}\ninput unit", fontsize=9)
    for axes, name in zip(grid[0], shown, strict=True):
        axes.set_title(name, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("output unit", fontsize=9)
    figure.suptitle(title)
    plt.show()


draw_masks(masks, f"Weights that are kept (blue), density {DENSITY:g}")

# %% [markdown]
# Random, magnitude, uniform and ERK masks are uniform noise: the sizes of orthogonal weights have
# no information. SNIP and GraSP use data, and in the first layer they leave whole rows empty.
# SynFlow uses no data, and also leaves rows and columns empty: a unit that loses some of its flow
# loses the rest too.

# %% [markdown]
# ## What the first layer reads
#
# The rows of the first layer's mask are pixels. How many weights does each pixel keep?

# %%
figure, grid = plt.subplots(2, 4, figsize=(9, 4.6))
counts = {m: mask["params"]["layer1"]["kernel"].sum(axis=1) for m, mask in masks.items()}
panels = {"mean image": images.mean(axis=0), **counts}
most = max(int(own.max()) for own in counts.values())
for axes, (name, own) in zip(grid.ravel(), panels.items(), strict=True):
    limits = {} if name == "mean image" else {"vmin": 0, "vmax": most}
    colors = "gray" if name == "mean image" else "cividis"
    picture = axes.imshow(np.reshape(own, (8, 8)), cmap=colors, **limits)
    axes.set(title=name, xticks=[], yticks=[])
    if name != "mean image":
        print(f"{name:10} pixels without a weight: {int((own == 0).sum())} of 64")
figure.colorbar(picture, ax=grid, label="weights kept (of a pixel)")
figure.suptitle("Weights that the first layer keeps, pixel by pixel")
plt.show()

# %% [markdown]
# SNIP and GraSP keep weights where strokes are and drop the margins, which are blank in nearly
# every image. The other methods do not distinguish strokes from margins.

# %% [markdown]
# ## Budgets side by side

# %%
budgets = {name: eoi.masks.densities(mask)["params"] for name, mask in masks.items()}
figure, axes = plt.subplots(figsize=(9, 4))
for index, (name, color) in enumerate(zip(budgets, COLORS, strict=True)):
    own = [float(budgets[name][layer]["kernel"]) for layer in names]
    print(f"{name:10} " + "  ".join(f"{density:.3f}" for density in own))
    position = np.arange(DEPTH) + (index - 3) * 0.12
    axes.bar(position, own, 0.12, color=color, edgecolor="white", linewidth=0.5, label=name)
axes.axhline(DENSITY, color="#000000", linestyle=":", linewidth=1)
axes.set(
    title=f"Density of each layer, {DENSITY:g} of the whole (dotted)",
    xlabel="layer",
    ylabel="density (fraction kept)",
    xticks=np.arange(DEPTH),
    xticklabels=[name.removeprefix("layer") for name in names],
)
axes.grid(alpha=0.3, axis="y")
axes.legend(ncols=4)
plt.show()

# %% [markdown]
# All methods keep equally many weights of the whole network. They differ in the small last layer:
# uniform, random and magnitude give it the density of the other layers, and SNIP, GraSP, SynFlow
# and ERK a far higher one.

# %% [markdown]
# ## EOI from each budget
#
# `eoi.exact_orthogonal` uses only the layer densities. A layer whose budget is below the minimum of
# an orthogonal matrix gets the missing weights from the other layers.

# %%
eoi_starts = {
    name: eoi.exact_orthogonal(
        for_eoi, params, eoi.masks.densities(mask), infeasible="redistribute"
    )
    for name, mask in masks.items()
}
for name, start in eoi_starts.items():
    error = max(
        float(eoi.spectrum.orthogonality_error(start.params["params"][layer]["kernel"]))
        for layer in names
    )
    density = eoi.masks.density(start.mask)
    print(f"{name:10} density {density:.4f}, largest error of orthogonality {error:.0e}")
some = {f"EOI, {name}": eoi_starts[name].mask for name in ("SNIP", "SynFlow", "ERK")}
draw_masks(some, "Masks that EOI draws from the budgets alone")

# %% [markdown]
# The structure of the criteria's masks is gone; only their counts are kept. The diagonals remain
# from the identity with which the rotations start. One key draws the same planes, so the three
# masks look alike.

# %% [markdown]
# ## Spectra at the start
#
# *Base* keeps the dense weights on the mask, and *AI* changes them towards orthogonality. *EOI* is
# the start of the section above.


# %%
@jax.jit
def spectrum(params):
    return eoi.spectrum.singular_values(lambda x: model.apply(params, x), x_batch)


starts = {}
for name, mask in masks.items():
    starts["Base", name] = eoi.masked(params, mask)
    starts["AI", name] = eoi.approximate_isometry(params, mask, num_steps=AI_STEPS)
    starts["EOI", name] = eoi_starts[name]
    print(f"{name}: Base, AI and EOI drawn")
methods = {"Base": ("#D55E00", "s"), "AI": ("#009E73", "^"), "EOI": ("#0072B2", "o")}
figure, axes = plt.subplots(figsize=(9, 4))
for index, (method, (color, marker)) in enumerate(methods.items()):
    found = [np.asarray(spectrum(starts[method, name].params)).ravel() for name in masks]
    means, lows, highs = (
        np.array([fn(own) for own in found]).clip(1e-12) for fn in (np.mean, np.min, np.max)
    )
    print(
        f"{method:5} mean "
        + "  ".join(f"{name} {m:.2g}" for name, m in zip(masks, means, strict=True))
    )
    position = np.arange(len(masks)) + (index - 1) * 0.2
    axes.vlines(position, lows, highs, color=color, alpha=0.6, linewidth=2)
    axes.plot(position, means, marker, color=color, label=method)
axes.set(
    title="Singular values of the Jacobian at the start: mean (marker) and range (line)",
    xlabel="mask or budget from",
    ylabel="singular value",
    yscale="log",
    ylim=(1e-4, 10),
    xticks=np.arange(len(masks)),
    xticklabels=list(masks),
)
axes.grid(alpha=0.3, axis="y")
figure.legend(loc="outside right center")
plt.show()

# %% [markdown]
# With Base the singular values are small for every mask, most of all for the random ones. Six
# layers are few, so AI repairs nearly all of this;
# [dynamical_isometry](dynamical_isometry.ipynb) shows how AI does at greater depth. With EOI the
# values are about equally high for every budget.

# %% [markdown]
# ## Training

# %%
adam = optax.adam(1e-3)


@jax.jit
def step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    tx = eoi.static_sparse(adam, optax.tree.get(state, "mask"))  # one program for every mask
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(start):
    """Return the accuracy on the test images after training."""
    generator = np.random.default_rng(SEED)
    params, state = start.params, eoi.static_sparse(adam, start.mask).init(start.params)
    for _ in range(STEPS):
        chosen = generator.choice(len(x_train), BATCH)
        params, state, _ = step(params, state, x_train[chosen], y_train[chosen])
    return float((model.apply(params, x_test).argmax(-1) == y_test).mean())


figure, axes = plt.subplots(figsize=(9, 3.8))
for index, (method, (color, _)) in enumerate(methods.items()):
    accuracy = [100 * train(starts[method, name]) for name in masks]
    print(
        f"{method:5} " + "  ".join(f"{n} {a:.1f} %" for n, a in zip(masks, accuracy, strict=True))
    )
    position = np.arange(len(masks)) + (index - 1) * 0.25
    axes.bar(position, accuracy, 0.25, color=color, edgecolor="white", label=method)
axes.set(
    title=f"Test accuracy after {STEPS} steps of Adam, one run each",
    xlabel="mask or budget from",
    ylabel="accuracy (%)",
    ylim=(0, 100),
    xticks=np.arange(len(masks)),
    xticklabels=list(masks),
)
axes.grid(alpha=0.3, axis="y")
figure.legend(loc="outside right center")
plt.show()

# %% [markdown]
# From Base, the accuracy depends on the mask; from AI and EOI it hardly does. At this depth
# isometry decides, and EOI has it without a step of descent. Each bar is one short run, so
# differences of a few percent between the blue and green bars mean nothing.
