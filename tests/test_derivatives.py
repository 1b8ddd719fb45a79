"""Functions with a ``custom_vjp`` have reverse mode only: their spectra and scores exist too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses

from eoi_jax import criteria, spectrum
from eoi_jax._internal.derivatives import has_forward_mode

KEY = jax.random.key(2)


@jax.custom_vjp
def straight_through_sign(x):
    return jnp.sign(x)


straight_through_sign.defvjp(
    lambda x: (jnp.sign(x), x), lambda x, cotangent: (cotangent / (1 + x**2),)
)


@jax.custom_vjp
def clipped(x):
    """Has a backward pass that is not linear."""
    return 2 * x


clipped.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (jnp.clip(cotangent, -1, 1),))


@jax.custom_vjp
def cross_entropy(logits):
    return jax.nn.logsumexp(logits) - logits[0]


cross_entropy.defvjp(
    lambda logits: (cross_entropy(logits), jax.nn.softmax(logits)),
    # Its derivative by a function that has reverse mode only too.
    lambda shares, cotangent: (
        cotangent * (straight_through_sign(shares) * shares - jnp.eye(len(shares))[0]),
    ),
)


def weights(inputs, outputs):
    return jax.random.normal(KEY, (outputs, inputs)) / inputs**0.5


def layer(w, h):
    return straight_through_sign(w @ h) + h


def scanned(x):
    return jax.lax.scan(lambda h, w: (layer(w, h), None), x, jnp.stack([weights(4, 4)] * 2))[0]


FUNCTIONS = {
    "more outputs": lambda x: straight_through_sign(weights(4, 6) @ x),
    "as many": lambda x: straight_through_sign(weights(4, 4) @ x),
    "fewer outputs": lambda x: straight_through_sign(weights(4, 3) @ x),
    "in a scan": scanned,
    "in a checkpoint": jax.checkpoint(lambda x: scanned(x)[None].repeat(2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_spectra_are_those_of_the_jacobian_in_reverse_mode(name):
    fn, x = FUNCTIONS[name], jax.random.normal(KEY, (2, 4))
    assert not has_forward_mode(fn, x[0])
    matrices = jax.vmap(jax.jacrev(fn))(x)
    expected = jnp.linalg.svd(matrices, compute_uv=False)
    np.testing.assert_allclose(spectrum.jacobian(fn, x), matrices, atol=1e-6)
    np.testing.assert_allclose(spectrum.singular_values(fn, x), expected, atol=1e-5)
    ends = spectrum.extreme_singular_values(KEY, fn, x)
    np.testing.assert_allclose(ends.largest, expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(ends.smallest, expected[:, -1], atol=1e-5)
    nodes, _ = spectrum.spectral_density(KEY, fn, x, num_probes=1)
    np.testing.assert_allclose(nodes[:, 0], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 4, 6])
def test_layers_without_forward_mode_have_their_spectra(width):
    x, stack = jax.random.normal(KEY, (2, 4)), jnp.stack([weights(width, width)] * 3)

    def embed(x):
        return straight_through_sign(weights(4, width) @ x)

    found = spectrum.layerwise(layer, stack, x, embed=embed)
    for depth in (1, 3):

        def network(x, depth=depth):
            h = embed(x)
            for w in stack[:depth]:
                h = layer(w, h)
            return h

        expected = spectrum.singular_values(network, x, mode="reverse")
        np.testing.assert_allclose(found[depth - 1], expected, atol=1e-5)


@pytest.mark.slow
def test_both_modes_give_one_spectrum_and_a_missing_one_is_refused():
    x = jax.random.normal(KEY, (2, 4))
    smooth = lambda x: jnp.tanh(weights(4, 4) @ x)  # noqa: E731
    values = [spectrum.singular_values(smooth, x, mode=mode) for mode in ("forward", "reverse")]
    np.testing.assert_allclose(*values, atol=1e-6)
    for measure in (spectrum.singular_values, spectrum.jacobian):
        with refuses("mode='forward'", "custom_vjp"):
            measure(scanned, x, mode="forward")
        with refuses("mode='backward'"):
            measure(scanned, x, mode="backward")


def test_forward_mode_is_kept_where_no_derivative_passes_the_custom_one():
    fn = lambda x: x * straight_through_sign(jax.lax.stop_gradient(x))  # noqa: E731
    assert has_forward_mode(fn, jnp.ones(3))
    assert has_forward_mode(jax.nn.relu, jnp.ones(3))  # a custom_jvp
    branches = lambda x: jax.lax.cond(x[0] > 9, jnp.sin, scanned, x)  # noqa: E731
    assert not has_forward_mode(branches, jnp.ones(4))


@pytest.mark.slow
def test_a_backward_pass_that_is_not_linear_is_refused():
    x = jnp.ones((1, 3))
    with refuses("fn", "custom_vjp", "linear", "mode='reverse'"):
        spectrum.extreme_singular_values(KEY, clipped, x)
    np.testing.assert_allclose(spectrum.singular_values(clipped, x), 1.0)


@pytest.mark.slow
def test_grasp_scores_a_loss_without_forward_mode():
    params = {"kernel": weights(4, 4)}
    batch = jax.random.normal(KEY, (2, 4))

    def loss_of(entropy):
        return lambda params, x: jnp.mean(jax.vmap(lambda x: entropy(params["kernel"] @ x))(x))

    for size in (None, 1):
        found = criteria.grasp(loss_of(cross_entropy), params, batch, micro_batch_size=size)
        by_hand = jax.grad(
            lambda p: jnp.vdot(*[jax.grad(loss_of(cross_entropy))(p, batch)["kernel"]] * 2) / 2
        )(params)
        expected = params["kernel"] * by_hand["kernel"]
        np.testing.assert_allclose(found["kernel"], expected, atol=1e-6)


def test_synflow_scales_a_deep_network_without_forward_mode():
    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (2 * cotangent,))
    params = {"kernel": jnp.abs(jax.random.normal(KEY, (200, 3, 3)))}

    def network(factor):
        return lambda params, x: jax.lax.scan(
            lambda h, w: (factor(h @ w), None), x, params["kernel"]
        )[0]

    found = criteria.synflow(network(twice), params, jnp.ones((1, 3)))["kernel"]
    expected = criteria.synflow(network(lambda x: 2 * x), params, jnp.ones((1, 3)))["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
