"""The convolution with other gradients: equal to JAX's, value and gradients."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.convolve import valid_convolution

AXES = ("NHWC", "HWIO", "NHWC")


def pulled_back(convolve, x, w, options):
    def call(x, w):
        return convolve(x, w, **{"dimension_numbers": AXES, **options})

    @jax.jit
    def both(x, w):
        y, pull = jax.vjp(call, x, w)
        return y, *pull(jax.random.normal(jax.random.key(3), y.shape, y.dtype))

    return both(x, w)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "options"),
    [
        ((3, 3), {}),
        ((1, 1), {}),
        ((3, 2), {"padding": ((0, 0), (0, 0))}),
        ((3, 3), {"window_strides": (2, 2)}),
        ((3, 3), {"padding": "SAME"}),
        ((3, 3), {"padding": ((1, 0), (0, 2))}),
        ((3, 3), {"rhs_dilation": (2, 1)}),
        ((3, 3), {"lhs_dilation": (1, 2), "padding": ((0, 0), (0, 0))}),
        ((3, 3), {"feature_group_count": 2}),
        ((3, 3), {"dimension_numbers": ("NWHC", "WHIO", "NWHC")}),
    ],
    ids=str,
)
def test_value_and_gradients_are_those_of_jax(x64, window, options):
    options = {"window_strides": (1, 1), "padding": "VALID", **options}
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 4), jnp.float64)
    inputs = 4 // options.get("feature_group_count", 1)
    w = jax.random.normal(jax.random.key(1), (*window, inputs, 6), jnp.float64)
    ours, theirs = (
        pulled_back(convolve, x, w, options)
        for convolve in (valid_convolution, jax.lax.conv_general_dilated)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_these_gradients_are_in_use_within_a_layer_of_flax():
    layer = nn.Conv(3, (3, 3), padding="CIRCULAR", conv_general_dilated=valid_convolution)
    plain = nn.Conv(3, (3, 3), padding="CIRCULAR")
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    params = plain.init(jax.random.key(1), x)
    assert "custom_vjp" in str(jax.make_jaxpr(layer.apply)(params, x))
    np.testing.assert_allclose(layer.apply(params, x), plain.apply(params, x), rtol=1e-6)
    ours, theirs = (
        jax.grad(lambda params, net=net: (net.apply(params, x) ** 2).sum())(params)
        for net in (layer, plain)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_precision_is_handed_on():
    x, w = jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1, 1))

    def convolve(x, w):
        return valid_convolution(x, w, (1, 1), "VALID", dimension_numbers=AXES, precision="highest")

    assert "HIGHEST" in str(jax.make_jaxpr(convolve)(x, w))


def test_second_derivatives_work_forward_over_reverse(x64):
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 2), jnp.float64)
    w = jax.random.normal(jax.random.key(1), (3, 3, 2, 2), jnp.float64)

    def product(convolve):
        def loss(w):
            return (convolve(x, w, (1, 1), "VALID", dimension_numbers=AXES) ** 4).sum()

        return jax.jit(lambda w: jax.jvp(jax.grad(loss), (w,), (w,))[1])(w)

    ours, theirs = product(valid_convolution), product(jax.lax.conv_general_dilated)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
