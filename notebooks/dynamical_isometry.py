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
# # Dynamical isometry: singular values through depth
#
# You learn how well signals and gradients pass through a deep network, measured by the singular
# values of the Jacobian of its first layers: for dense orthogonal weights, for a mask on them
# (Base), for that mask with weights made nearly orthogonal (AI), and for exactly orthogonal sparse
# weights (EOI). Mean-field theory and free probability predict the dense case; you see where
# sparse weights follow the prediction and where they do not.
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
LAYERS = 64  # linear layers
WIDTH = 128  # units of each
DENSITY = 0.125  # of the sparse networks
EVERY = 4  # layers from one measurement to the next
EXAMPLES = 4  # inputs whose Jacobians are taken
AI_STEPS = 1000  # steps of descent towards orthogonality
Q = 0.0259  # variance of the preactivations: where the published 1000-layer networks start
SEED = 0

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import eoi_jax as eoi

# Okabe and Ito's colors, told apart by color-blind readers.
LOOKS = {
    "dense orthogonal": ("#000000", "-"),
    "EOI": ("#0072B2", "--"),
    "AI": ("#009E73", "-."),
    "masked orthogonal": ("#D55E00", ":"),
}
ORANGE = "#E69F00"
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Four starts
#
# A layer is $h' = W\tanh(h) + b$. The gain $\sigma_w$ of the weights and the deviation $\sigma_b$
# of the biases are *critical*: the variance $q$ of the preactivations $h$ does not change with
# depth, and the mean squared singular value of a layer is 1. All layers are one stack of matrices,
# which `layout` describes.

# %%
sigma_w, sigma_b = eoi.mean_field.critical_line("tanh", Q)
print(f"critical: σ_w = {sigma_w:.4f}, σ_b = {sigma_b:.5f}")
print(f"mean squared singular value of a layer: {eoi.mean_field.chi('tanh', sigma_w, Q):.6f}")

for_weights, for_mask, for_biases, for_inputs = jax.random.split(jax.random.key(SEED), 4)
layout = lambda path, leaf: eoi.typing.Layout(batch_axes=1)  # noqa: E731
zeros = {"kernel": jnp.zeros((LAYERS, WIDTH, WIDTH))}
orthogonal = jax.nn.initializers.orthogonal(sigma_w)
dense = eoi.networks.redraw(for_weights, zeros, orthogonal, layout=layout)
mask = eoi.masks.random(for_mask, zeros, {"kernel": np.full(LAYERS, DENSITY)})
print("drawn: dense orthogonal, and a random mask")
starts = {
    "dense orthogonal": eoi.SparseInit(dense, eoi.masks.support(dense)),
    "masked orthogonal": eoi.masked(dense, mask),
    "AI": eoi.approximate_isometry(dense, mask, scale=sigma_w, num_steps=AI_STEPS, layout=layout),
    "EOI": eoi.exact_orthogonal(for_weights, zeros, DENSITY, scale=sigma_w, layout=layout),
}
print(f"drawn: EOI, and AI in {AI_STEPS} steps")
for name, start in starts.items():
    errors = eoi.spectrum.orthogonality_error(start.params["kernel"], scale=sigma_w)
    density = eoi.masks.density(start.mask)
    print(f"{name:18} density {density:.4f}, largest error of W Wᵀ / σ_w² = I {errors.max():.1e}")

# %% [markdown]
# ## Without an activation
#
# Products of orthogonal matrices are orthogonal, so EOI keeps every singular value at 1 (divided
# by $\sigma_w$ for each layer). `eoi.spectrum.layerwise` computes the singular values after each
# layer of the stack.

# %%
biases = sigma_b * jax.random.normal(for_biases, (LAYERS, WIDTH))
inputs = jnp.sqrt(Q) * jax.random.normal(for_inputs, (EXAMPLES, WIDTH))
depths = np.minimum(EVERY * (1 + np.arange(-(-LAYERS // EVERY))), LAYERS)


@functools.partial(jax.jit, static_argnums=0)
def spectra(activation, kernels, biases, inputs):
    """Singular values (depths, examples, width) of the Jacobian of the first layers."""

    def layer(params, h):
        kernel, bias = params
        return kernel.T @ activation(h) + bias

    return eoi.spectrum.layerwise(layer, (kernels, biases), inputs, every=EVERY)


def identity(h):
    return h


def draw(axes, values, name):
    """Draw the median and the range of the singular values against depth."""
    color, style = LOOKS[name]
    pooled = values.reshape(len(values), -1).clip(1e-12)  # zeros have no logarithm
    axes.plot(depths, np.median(pooled, axis=1), style, color=color, linewidth=2, label=name)
    axes.fill_between(depths, pooled.min(1), pooled.max(1), color=color, alpha=0.15)


figure, axes = plt.subplots(figsize=(8, 4))
for name, start in starts.items():
    kernels = start.params["kernel"] / sigma_w
    # Without an activation the Jacobian is the same at every input.
    values = np.asarray(spectra(identity, kernels, biases, inputs[:1]))
    print(f"{name:18} after {LAYERS} layers: {values[-1].min():.2e} to {values[-1].max():.2e}")
    draw(axes, values, name)
axes.set(
    title=f"Without an activation, width {WIDTH}, density {DENSITY:g} (dense: 1)",
    xlabel="depth (layers)",
    ylabel="singular value: median and range",
    yscale="log",
    ylim=(1e-6, 10),
)
axes.grid(alpha=0.3)
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# The lines of the dense weights and of EOI coincide at 1: sparsity costs nothing here. The median
# of AI stays near 1 for many layers, but a few directions are lost from the first layer on: its
# range reaches down to zero. The values of the masked weights fall below the picture within the
# first layers.

# %% [markdown]
# ## With tanh, and the prediction of the theory
#
# With an activation the singular values spread even with dense orthogonal weights, because of the
# slopes $\tanh'(h)$ of the units. For an infinitely wide network of Haar-distributed orthogonal
# weights, free probability gives their law: `eoi.mean_field.predicted_singular_values`.

# %%
measured = {}
for name, start in starts.items():
    kernels = start.params["kernel"]
    measured[name] = np.asarray(spectra(jnp.tanh, kernels, biases, inputs))
    low, middle, high = np.quantile(measured[name][-1], (0.1, 0.5, 0.9))
    print(f"{name:18} after {LAYERS} layers: 10 % {low:.2g}, median {middle:.2g}, 90 % {high:.2g}")

laws = [eoi.mean_field.predicted_singular_values("tanh", int(d), sigma_w, Q) for d in depths]
fractions = np.array([0.1, 0.5, 0.9])
predicted = np.stack([law.quantile(fractions) for law in laws])
print("theory, dense      10 % {:.2g}, median {:.2g}, 90 % {:.2g}".format(*predicted[-1]))

figure, panels = plt.subplots(1, 3, figsize=(11, 4), sharey=True)
for axes, name in zip(panels, ("dense orthogonal", "EOI", "AI"), strict=True):
    color, style = LOOKS[name]
    low, middle, high = np.quantile(measured[name], fractions, axis=(1, 2))
    axes.fill_between(depths, low, high, color=color, alpha=0.2, label="10 % to 90 %, measured")
    axes.plot(depths, middle, style, color=color, linewidth=2, label="median, measured")
    for fraction, quantile in zip(fractions, predicted.T, strict=True):
        label = "10, 50, 90 %, theory for dense" if fraction == 0.5 else None
        axes.plot(depths, quantile, ":", color=ORANGE, linewidth=2.5, label=label)
    axes.set(title=name, xlabel="depth (layers)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
panels[0].set(ylabel="singular value", ylim=(0, None))
figure.suptitle(f"Singular values through a tanh network, width {WIDTH}, density {DENSITY:g}")
plt.show()

# %% [markdown]
# The dense network stays close to the theory at every depth, a little above it. EOI keeps the
# median, and its band widens on both sides. The lowest tenth of AI falls within the first layers
# and its median later. Masked weights without repair are not drawn, since their values are too
# small (see the numbers above).

# %% [markdown]
# ## Where sparse weights differ
#
# The picture shows the distribution after the last layer, beside the predicted density.

# %%
law = laws[-1]
figure, panels = plt.subplots(1, 2, figsize=(11, 4))
left, right = panels
bins = np.linspace(0, max(law.grid[-1], *(measured[n][-1].max() for n in ("EOI", "AI"))), 40)
for name in ("dense orthogonal", "EOI", "AI"):
    color, style = LOOKS[name]
    values = np.sort(measured[name][-1].ravel())
    middles = (np.arange(values.size) + 0.5) / values.size
    distance = np.abs(values - law.quantile(middles)).mean()
    print(f"{name:18} distance from theory (Wasserstein-1): {distance:.3f}")
    counted, _ = np.histogram(values, bins, density=True)
    left.stairs(counted, bins, color=color, linestyle=style, linewidth=1.8, label=name)
    right.plot(values, middles, style, color=color, linewidth=1.8, label=name)
left.plot(law.grid, law.density, ":", color=ORANGE, linewidth=2.5, label="theory for dense")
right.plot(law.grid, law.cdf(law.grid), ":", color=ORANGE, linewidth=2.5, label="theory for dense")
left.set(
    title="Density",
    xlabel="singular value",
    ylabel="probability density",
    ylim=(0, 2 * law.density.max()),
)
right.set(title="Distribution", xlabel="singular value", ylabel="fraction at most this large")
for axes in panels:
    axes.grid(alpha=0.3)
    axes.legend()
figure.suptitle(f"Singular values after {LAYERS} tanh layers, width {WIDTH}")
plt.show()

# %% [markdown]
# Theory and the dense network agree up to effects of the finite width. With EOI mass moves from
# the middle to both ends, but little of it close to zero, where the density of AI is highest. The
# theory assumes Gaussian preactivations, and weights that are free from the slopes. A row of a
# sparse matrix has only a few non-zeros, so both assumptions hold less well. So exact
# orthogonality gives isometry without an activation, and with one less isometry than the theory
# of dense weights predicts.
