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
# # Reinforcement learning: a sparse actor and a sparse critic
#
# You learn to train PPO on CartPole with an actor and a critic that keep a tenth of their hidden
# weights, and to compare them with dense networks. You check that the masks hold, and see how
# training changes the actor's singular values. Several seeds train at once in one compiled
# program; the environment is from gymnax.
#
# Runs on TPU, GPU and CPU; under two minutes on two CPU cores.

# %%
import sys

REPOSITORY = "https://github.com/OWNER/eoi_jax"
checkout = ".."  # of the repository: pip does not install its folder `experiments`
if "google.colab" in sys.modules:
    import subprocess
    import tempfile

    checkout = tempfile.mkdtemp()
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, checkout], check=True)
    packages = ["gymnax>=1.0.1", f"{checkout}[experiments]"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)
sys.path.append(checkout)

# %% tags=["parameters"]
WIDTH = 64  # units of a hidden layer
DENSITY = 0.1  # of the hidden kernels of the sparse networks
STEPS = 200_000  # environment steps of each seed
ENVIRONMENTS = 8  # of each seed
SEEDS = 4
POINTS = 20  # of the learning curve

# %%
import dataclasses
import itertools

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import eoi_jax as eoi
from experiments.config import Ppo
from experiments.rl import diagnostics, ppo, starts

# Okabe and Ito's colors, told apart by color-blind readers.
LOOKS = {"dense": ("#000000", "--"), "EOI": ("#0072B2", "-")}
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

dense = Ppo(
    env="CartPole-v1",
    width=WIDTH,
    depth=3,
    method="dense",
    density=1.0,
    num_envs=ENVIRONMENTS,
    total_steps=STEPS,
    num_points=POINTS,
    learning_rate=1e-3,
    seeds=tuple(range(SEEDS)),
)
sparse = dataclasses.replace(dense, method="eoi", planes="matching", density=DENSITY)

# %% [markdown]
# ## The starts
#
# Actor and critic have three hidden layers each. The kernels between the first layer and the last
# are sparse and exactly orthogonal up to a gain of √2; the others are dense.


# %%
def begin(config):
    """Return the compiled functions, and the state of all seeds before the first update."""
    step_fns = ppo.compiled(config)
    states = []
    for seed in config.seeds:
        start = starts.make(config, step_fns.model, step_fns.env.observation_size, seed)
        states.append(step_fns.begin(jax.random.key(seed), *start))
    return step_fns, step_fns.stack(states)


def hidden(tree, network, seed=0):
    """Return the hidden kernels of one seed, of parameters or of a mask."""
    layers = tree[network]
    return [layers[name]["linear"]["kernel"][seed] for name in ("layers_0", "layers_1")]


step_fns, state = begin(sparse)
figure, axes = plt.subplots(1, 4, figsize=(12, 3.4))
kernels = [
    (f"{network}, layer {number}", kernel)
    for network in ("actor", "critic")
    for number, kernel in enumerate(hidden(state.params, network), 1)
]
for panel, (name, kernel) in zip(axes, kernels, strict=True):
    panel.imshow(kernel != 0, cmap="gray_r")
    panel.set(title=f"{name}: density {float((kernel != 0).mean()):.3f}", xlabel="output")
    error = float(eoi.spectrum.orthogonality_error(kernel, scale=sparse.scale))
    print(f"{name}: largest error of W Wᵀ = 2 I: {error:.1e}")
axes[0].set_ylabel("input")
plt.show()

# %% [markdown]
# Black weights are kept. Each seed has other masks, and an actor has other masks than its critic.

# %% [markdown]
# ## Training
#
# `advance` runs the updates from one number to another, for all seeds at once. Both kinds of
# networks train for the same number of steps at the same learning rate.


# %%
def train(config):
    """Train all seeds; return the states at the ends, curves, and singular values."""
    step_fns, state = begin(config)
    spectrum = diagnostics.singular_range(step_fns.model, step_fns.env)
    first = jax.tree.map(np.array, state)
    ends = np.linspace(0, step_fns.num_updates, POINTS + 1).astype(int)
    returns, spectra = [], [spectrum(state)]
    for start, stop in itertools.pairwise(ends):
        state, sums = step_fns.advance(state, config.learning_rate, start, stop)
        returns.append(np.asarray(sums.returns / np.maximum(sums.episodes, 1)))
        spectra.append(spectrum(state))
    steps = ends * config.num_envs * config.num_steps
    return first, state, steps, np.array(returns), np.array(spectra)


results = {"dense": train(dense), "EOI": train(sparse)}

figure, axes = plt.subplots(figsize=(8, 4))
for name, (_, _, steps, returns, _) in results.items():
    color, style = LOOKS[name]
    axes.plot(steps[1:], returns.mean(axis=1), style, color=color, label=name)
    axes.fill_between(steps[1:], returns.min(axis=1), returns.max(axis=1), color=color, alpha=0.2)
    print(f"{name:6} mean return in the last part: {returns[-1].mean():.0f} of 500")
axes.set(
    title=f"CartPole, width {WIDTH}: EOI keeps {DENSITY:g} of the hidden weights",
    xlabel="environment steps",
    ylabel="return of an episode",
)
axes.grid(alpha=0.3)
axes.legend(title="start")
plt.show()

# %% [markdown]
# Lines are means of the seeds, and bands go from the lowest to the highest seed. Both kinds of
# networks come close to 500, the largest return; before that, seeds differ more than starts do.

# %% [markdown]
# ## The masks hold
#
# The optimizer is Adam with clipped gradients, and `eoi.static_sparse` is around both. In actor and
# critic, the weights that were zero are still zero, and every other weight has changed.

# %%
first, last, *_ = results["EOI"]
mask = optax.tree.get(last.optimizer, "mask")
for network in ("actor", "critic"):
    for seed in range(SEEDS):
        before, after = hidden(first.params, network, seed), hidden(last.params, network, seed)
        for old, new, kept in zip(before, after, hidden(mask, network, seed), strict=True):
            assert not new[~kept].any()
            assert (old != new)[kept].all()
print(f"masks held in {2 * 2 * SEEDS} kernels")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
for panel, state, title in ((left, first, "at the start"), (right, last, "trained")):
    picture = panel.imshow(hidden(state.params, "actor")[0], cmap="PuOr", vmin=-1, vmax=1)
    panel.set(title=f"actor, layer 1, {title}", xlabel="output")
left.set_ylabel("input")
figure.colorbar(picture, ax=(left, right), label="weight")
plt.show()

# %% [markdown]
# The pattern is the same on both sides, and the values differ.

# %% [markdown]
# ## The actor's singular values
#
# How far do the hidden layers stretch and shrink a change of their input? The picture shows the
# largest and the smallest singular value of their Jacobian, at two observations for each seed.

# %%
figure, axes = plt.subplots(figsize=(8, 4))
for name, (_, _, steps, _, spectra) in results.items():
    color, style = LOOKS[name]
    for ends, label in ((spectra[:, 0], name), (spectra[:, 1], None)):
        middle = np.exp(np.log(np.maximum(ends, 1e-12)).mean(axis=1))
        axes.plot(steps, middle, style, color=color, label=label)
axes.set(
    title="Range of the singular values of the actor's hidden layers",
    xlabel="environment steps",
    ylabel="singular value",
    yscale="log",
)
axes.grid(alpha=0.3)
axes.legend(title="start")
plt.show()

# %% [markdown]
# Without an activation all values would be 2 at the start, the square of the gain; where tanh
# saturates, it shrinks them. Training increases the largest values, most of all those of the dense
# actor.
#
# Where to go on: `python -m experiments rl --help` trains other environments, residual networks,
# layers of blocks, SET and RigL, and `sweep rl_scaling` compares starts over widths and densities.
