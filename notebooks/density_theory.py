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
# # How dense is a product of random rotations?
#
# You learn how many random Givens rotations give a matrix of the density that you want: by the
# Markov chain of the non-zeros of a row, by a closed form that takes no time at any size, and by
# simulation. The usual shortcut, a logistic curve, is biased, and you see why. At the end, the
# chain predicts how many rows no rotation has changed yet.
#
# Runs on CPU, GPU and TPU (nearly all of it on the CPU, in NumPy); under two minutes on two CPU
# cores.

# %%
import sys

REPOSITORY = "https://github.com/OWNER/eoi_jax"
if "google.colab" in sys.modules:
    import subprocess

    package = f"eoi_jax[experiments] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %% tags=["parameters"]
SIZE = 128  # N, the larger side of the matrix
MATRICES = 200  # simulated matrices
SIZES = (64, 256, 1024)  # sizes that are compared with each other
SEED = 0

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import expn

import eoi_jax as eoi

# Okabe and Ito's colors, told apart by color-blind readers.
BLUE, VERMILION, GREEN, PINK, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

# %% [markdown]
# ## The chain
#
# A rotation mixes two coordinates $i \ne j$ of $N$, drawn uniformly. A row of the matrix that has
# $k$ non-zeros gains another exactly if one of its two entries is zero and the other is not:
#
# $$P(k \to k+1) = \frac{2k(N-k)}{N(N-1)}, \qquad k_0 = 1.$$
#
# `eoi.theory.nonzeros_distribution` iterates this chain. The simulation draws rotations and
# computes their support, in integers, with `eoi.givens.sample` and `eoi.givens.support`.

# %%
keys = jax.random.split(jax.random.key(SEED), MATRICES)
times = [eoi.theory.num_rotations(SIZE, density) for density in (0.05, 0.15, 0.5)]


@jax.jit
def row_counts(key):
    """Non-zeros of each row of one matrix at the three times."""
    rotations = eoi.givens.sample(key, SIZE, times[-1])
    prefixes = [jax.tree.map(lambda leaf, t=t: leaf[:t], rotations) for t in times]
    return [eoi.givens.support(prefix, (SIZE, SIZE)).sum(axis=1) for prefix in prefixes]


simulated = [np.asarray(counts) for counts in jax.lax.map(row_counts, keys)]
print(f"simulated {MATRICES} matrices of {SIZE} rows")
figure, panels = plt.subplots(1, 3, figsize=(11, 3.6))
for axes, t, counts in zip(panels, times, simulated, strict=True):
    law = eoi.theory.nonzeros_distribution(SIZE, t)
    frequency = np.bincount(counts.ravel(), minlength=SIZE + 1) / counts.size
    mean = law @ np.arange(SIZE + 1)
    print(
        f"t = {t:3}: mean non-zeros of a row {mean:.2f} by the chain, {counts.mean():.2f} simulated"
    )
    top = int(np.flatnonzero(law > 1e-4)[-1])
    axes.bar(np.arange(1, top + 1), frequency[1 : top + 1], color=PINK, label="simulated")
    axes.plot(np.arange(1, top + 1), law[1 : top + 1], color=BLUE, linewidth=2, label="chain")
    axes.set(title=f"after t = {t} rotations", xlabel="non-zeros of a row")
    axes.grid(alpha=0.3)
panels[0].set(ylabel="fraction of the rows")
panels[0].legend()
figure.suptitle(f"Non-zeros of a row, N = {SIZE}")
plt.show()

# %% [markdown]
# The chain agrees with the tops of the bars. While the matrix is sparse, the distribution falls
# from its first value on, like an exponential: the more non-zeros a row has, the faster it gains
# further ones, so a few rows that gain early get far ahead. This is a Yule process. Only later the
# distribution has a peak, which moves to the right.

# %% [markdown]
# ## The curve: chain, closed form, logistic
#
# If every row had the mean number of non-zeros, the density would follow the **logistic** curve
# $1/(1+(N-1)e^{-2t/(N-1)})$. But rows differ, and the gain $k(N-k)$ is concave, so this curve
# rises too fast. Instead, take the exponential law of the early growth, let each row saturate by
# the logistic curve, and average:
#
# $$d_t \approx 1 - z e^z E_1(z), \qquad z = N e^{-2(t + 1 + d_t/2)/(N-1)},$$
#
# with the exponential integral $E_1$. The shift $1 + d/2$ is for the discrete steps.

# %%
last = eoi.theory.num_rotations(SIZE, 0.99)
steps = np.arange(last + 1)
exact = np.array([eoi.theory.expected_density(SIZE, int(t), method="exact") for t in steps])
closed = np.array([eoi.theory.expected_density(SIZE, int(t), method="closed_form") for t in steps])
logistic = 1 / (1 + (SIZE - 1) * np.exp(-2 * steps / (SIZE - 1)))


@jax.jit
def densities(key):
    """Density of one matrix after each rotation."""
    rotations = eoi.givens.sample(key, SIZE, last)
    return eoi.givens.num_nonzeros(rotations, (SIZE, SIZE)) / SIZE**2


runs = np.asarray(jax.lax.map(densities, keys))
mean, deviation = runs.mean(axis=0), runs.std(axis=0, ddof=1)
error = deviation / np.sqrt(MATRICES)
print(f"largest error of the closed form {np.abs(closed - exact).max():.1e} in density")
print(f"largest error of the logistic {np.abs(logistic - exact).max():.3f}")
print(f"largest standard deviation of one matrix {deviation.max():.3f}")
inside = np.mean(np.abs(mean - exact)[1:] < 2 * error[1:])
print(f"the simulated mean is within 2 standard errors of the chain at {inside:.0%} of the times")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
left.fill_between(
    steps, mean - deviation, mean + deviation, color=PINK, alpha=0.5, label="simulated, mean ± s.d."
)
left.plot(steps, exact, color=BLUE, linewidth=2, label="chain, exact")
left.plot(steps, closed, "--", color=GREEN, linewidth=2, label="closed form")
left.plot(steps, logistic, ":", color=VERMILION, linewidth=2, label="logistic")
left.set(title="Density", xlabel="number of rotations t", ylabel="density (fraction of non-zeros)")
left.legend()
for values, color, style, label in (
    (logistic, VERMILION, ":", "logistic"),
    (exact + error, BLACK, "-", "standard error of the simulated mean"),
    (mean, PINK, "-", f"simulated mean of {MATRICES}"),
    (closed, GREEN, "--", "closed form"),
):
    difference = np.abs(values - exact).clip(1e-8)
    right.plot(steps, difference, style, color=color, linewidth=2, label=label)
right.set(
    title="Distance from the chain",
    xlabel="number of rotations t",
    ylabel="difference in density (at least 1e-8)",
    yscale="log",
)
right.legend(loc="lower right", fontsize=8, framealpha=1)
for axes in (left, right):
    axes.grid(alpha=0.3)
figure.suptitle(f"Density of a product of t rotations, N = {SIZE}")
plt.show()

# %% [markdown]
# Left: chain, closed form and simulation coincide; the logistic curve is ahead of them. Right: the
# closed form is closer to the chain than the mean of these matrices can resolve, and that mean is
# mostly within two of its standard errors. (Its errors at neighboring times are similar, since the
# same matrices are used at all times.) The error of the logistic curve is far larger.

# %% [markdown]
# ## One curve for all sizes
#
# The closed form depends on $t$ and $N$ only through $z$. Its inverse gives the number of rotations
# for a density at any size, with one root of a scalar function: `eoi.theory.num_rotations`.

# %%
figure, axes = plt.subplots(figsize=(8, 4.2))
looks = zip(SIZES, (BLUE, GREEN, VERMILION), ("o", "s", "^"), strict=False)
for size, color, marker in looks:
    targets = np.geomspace(2 / size, 0.9, 24)
    counts = np.array([eoi.theory.num_rotations(size, float(target)) for target in targets])
    ours = np.array(
        [eoi.theory.num_rotations(size, float(d), method="closed_form") for d in targets]
    )
    most = np.abs(ours - counts).max()
    print(f"N = {size}: closed form and chain differ by at most {most} rotations")
    shift = np.log(size) - 2 * (counts + 1 + targets / 2) / (size - 1)
    axes.plot(shift, targets, marker, color=color, fillstyle="none", label=f"chain, N = {size}")
z = np.geomspace(0.01, 600, 200)
axes.plot(np.log(z), np.exp(z) * expn(2, z), color=BLACK, label="1 − z exp(z) E₁(z)")
axes.set(
    title="Densities of all sizes against ln z",
    xlabel="ln z = ln N − 2 (t + 1 + d / 2) / (N − 1)",
    ylabel="density (fraction of non-zeros)",
    yscale="log",
)
axes.invert_xaxis()
axes.grid(alpha=0.3)
axes.legend()
plt.show()

big = 65_536
print(f"N = {big}: {eoi.theory.num_rotations(big, 0.1)} rotations for a density of 0.1")

# %% [markdown]
# The points of all sizes lie on one line, that of the closed form; time goes from left to right.

# %% [markdown]
# ## Rows that no rotation has mixed
#
# The chain also predicts how many rows still have only their first non-zero. Such a row copies one
# input to one output.

# %%
targets = np.geomspace(1.5 / SIZE, 0.5, 12)
matrices = min(MATRICES, 20)
chain, seen, spread = [], [], []


@jax.jit
def rows_of(keys, density):
    """Non-zeros of each row of one matrix for each key."""
    return jax.vmap(lambda key: (eoi.orthogonal(key, (SIZE, SIZE), density) != 0).sum(axis=1))(keys)


for target in targets:
    t = eoi.theory.num_rotations(SIZE, float(target))
    chain.append(eoi.theory.nonzeros_distribution(SIZE, t)[1])
    rows = np.asarray(rows_of(keys[:matrices], float(target)))
    seen.append((rows == 1).mean())
    spread.append(np.abs(rows.mean(axis=1) / SIZE - target).max())
print(f"eoi.orthogonal misses the wanted density by at most {max(spread):.5f}")
print(f"half a non-zero for each row would be {1 / (2 * SIZE):.5f}")

figure, axes = plt.subplots(figsize=(8, 4))
axes.plot(targets, chain, color=BLUE, linewidth=2, label="chain at the expected time")
axes.plot(
    targets, seen, "o", color=PINK, markeredgecolor=BLACK, label=f"eoi.orthogonal, {matrices} each"
)
axes.set(
    title=f"Rows with a single non-zero, N = {SIZE}",
    xlabel="density (fraction of non-zeros)",
    ylabel="fraction of the rows",
    xscale="log",
)
ticks = [own for own in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if own >= targets[0]]
axes.set_xticks(ticks, [f"{own:g}" for own in ticks])
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# At low densities many rows are still unchanged, as the chain predicts. `eoi.orthogonal` does not
# stop at the expected time, but where the density of its matrix is closest to the target. So the
# density is exact to half a non-zero for each row, and the rows follow the same law.
