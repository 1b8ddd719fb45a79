"""One key, one result: whatever its generator, its style and the transformation around the call."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refuses

import eoi_jax as eoi
from eoi_jax import blocks, criteria, givens, initializers, masks, n_to_m, networks, sao, spectrum
from eoi_jax._internal.keys import one_key, threefry_key

IMPLS = ["threefry2x32", "rbg", "unsafe_rbg"]
PARAMS = {"a": {"bias": jnp.ones(8), "kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones((8, 8))}}
MASK = {"a": {"bias": jnp.array(True), "kernel": jnp.eye(8) > 0}, "b": {"kernel": jnp.eye(8) > 0}}
BLOCKS = blocks.growable(blocks.orthogonal(jax.random.key(1), (32, 32), 0.25, block_size=2))

# Every public function that takes a key.
DRAWS = {
    "orthogonal": lambda key: eoi.orthogonal(key, (8, 8), 0.4, permute=True),
    "sao.orthogonal": lambda key: sao.orthogonal(key, 8, 4, activation="relu"),
    "blocks.orthogonal": lambda key: blocks.orthogonal(key, (8, 8), 0.5, block_size=2),
    "blocks.set_step": lambda key: blocks.set_step(key, BLOCKS, 0.5),
    "n_to_m.orthogonal": lambda key: n_to_m.orthogonal(key, (8, 8), 2, 4),
    "givens.sample": lambda key: givens.sample(key, 8, 5),
    "givens.from_pairs": lambda key: givens.from_pairs(key, [(0, 1), (1, 2)]).theta,
    "givens.uniform_angle": givens.uniform_angle,
    "dense": lambda key: initializers.dense(0.4)(key, (8, 8)),
    "conv": lambda key: initializers.conv(0.4, feature_group_count=2)(key, (3, 4, 8)),
    "delta_orthogonal": lambda key: initializers.delta_orthogonal()(key, (3, 4, 4)),
    "conv_orthogonal": lambda key: initializers.conv_orthogonal()(key, (2, 4, 4)),
    "sao_dense": lambda key: initializers.sao_dense(0.5)(key, (8, 8)),
    "sao_conv": lambda key: initializers.sao_conv(0.5)(key, (3, 8, 8)),
    "masks.random": lambda key: masks.random(key, PARAMS, 0.4),
    "masks.fill": lambda key: masks.fill(key, MASK, 0.4),
    "masks.shuffle": lambda key: masks.shuffle(key, MASK),
    "criteria.random": lambda key: criteria.random(key, PARAMS),
    "exact_orthogonal": lambda key: eoi.exact_orthogonal(key, PARAMS, 0.4),
    "sparsity_aware_orthogonal": lambda key: eoi.sparsity_aware_orthogonal(key, PARAMS, 0.5),
    "redraw": lambda key: networks.redraw(key, PARAMS, jax.nn.initializers.normal()),
    "sparse_evolutionary_training": lambda key: set_masks(key, 1)[0],
    "extreme_singular_values": lambda key: spectrum.extreme_singular_values(
        key, jnp.tanh, jnp.ones((2, 3)), num_steps=2
    ),
    "spectral_density": lambda key: spectrum.spectral_density(
        key, jnp.tanh, jnp.ones((2, 3)), num_steps=2, num_probes=2
    ),
}


def set_masks(key, *steps):
    """The masks of both kernels after SET's exchange at each of the steps, from one start."""
    tx = eoi.sparse_evolutionary_training(
        optax.sgd(0.0), MASK, key=key, update_every=1, drop_fraction=0.9
    )
    params = jax.tree.map(lambda leaf, kept: leaf * kept, PARAMS, MASK)
    state = tx.init(params)
    found = []
    for step in steps:
        _, new = tx.update(params, state._replace(step=jnp.asarray(step, jnp.int32)), params)
        found.append(optax.tree.get(new, "mask"))
    return found


def numbers(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWS)
def test_vmap_over_keys_is_the_loop(name):
    # rbg draws a whole batch from its first key, and the random bits of a batch are others.
    for impl in ["unsafe_rbg"] if name != "givens.sample" else IMPLS:
        keys = jax.random.split(jax.random.key(5, impl=impl), 3)
        looped = [numbers(DRAWS[name](key)) for key in keys]
        mapped = jax.vmap(DRAWS[name])(keys)
        for index, expected in enumerate(looped):
            found = numbers(jax.tree.map(lambda leaf, at=index: leaf[at], mapped))
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert not np.array_equal(looped[0], looped[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_scan_and_jit_over_keys_are_the_loop(impl):
    keys = jax.random.split(jax.random.key(3, impl=impl), 3)
    draw = DRAWS["delta_orthogonal"]
    looped = np.stack([draw(key) for key in keys])
    _, scanned = jax.lax.scan(lambda carry, key: (carry, draw(key)), 0, keys)
    np.testing.assert_allclose(scanned, looped, atol=1e-6)
    np.testing.assert_allclose(jax.jit(draw)(keys[1]), looped[1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_an_old_key_draws_what_the_new_one_draws(impl):
    with jax.default_prng_impl(impl):
        old = jax.random.PRNGKey(5)
        new = jax.random.wrap_key_data(old, impl=impl)
        for name in ("sao.orthogonal", "masks.shuffle", "givens.sample", "spectral_density"):
            assert np.array_equal(numbers(DRAWS[name](old)), numbers(DRAWS[name](new))), name
            assert np.array_equal(numbers(DRAWS[name](np.asarray(old))), numbers(DRAWS[name](new)))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_steps_and_leaves_draw_apart(impl):
    """With unsafe_rbg, whose fold_in commutes, (step, leaf) and (leaf, step) would coincide."""
    found = {}
    for step, mask in zip((1, 2), set_masks(jax.random.key(0, impl=impl), 1, 2), strict=True):
        found[step, 1], found[step, 2] = mask["a"]["kernel"], mask["b"]["kernel"]
    for one, other in itertools.combinations(found, 2):
        assert (found[one] != found[other]).any(), (one, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_word_of_a_key_counts(impl):
    data = jax.random.key_data(jax.random.key(5, impl=impl))
    keys = [jax.random.wrap_key_data(data, impl=impl)]
    for word in range(data.size):
        keys.append(jax.random.wrap_key_data(data.at[word].add(1), impl=impl))
    if data.size > 2:
        keys.append(jax.random.wrap_key_data(data.at[2].set(1).at[3].set(2), impl=impl))
        keys.append(jax.random.wrap_key_data(data.at[2].set(2).at[3].set(1), impl=impl))
    for name in ("givens.sample", "masks.shuffle"):
        drawn = {numbers(DRAWS[name](key)).tobytes() for key in keys}
        assert len(drawn) == len(keys), name


def test_a_threefry_key_is_left_as_it_is():
    for key in (jax.random.key(5), jax.random.PRNGKey(5), np.array([1, 2], np.uint32)):
        assert threefry_key(key) is key


@pytest.mark.slow
def test_a_key_varies_inside_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    keys = jax.random.split(jax.random.key(5, impl="rbg"), 1)
    drawn = jax.shard_map(
        lambda keys: sao.orthogonal(keys[0], 8, 4)[None], mesh=mesh, in_specs=spec, out_specs=spec
    )(keys)
    np.testing.assert_allclose(drawn[0], sao.orthogonal(keys[0], 8, 4), atol=1e-6)


@pytest.mark.parametrize("name", DRAWS)
def test_a_function_refuses_what_is_no_key(name):
    for bad in (0, jax.random.split(jax.random.key(0)), jnp.zeros(3, jnp.uint32)):
        with refuses("key=", "one PRNG key, such as jax.random.key(0)"):
            DRAWS[name](bad)


def test_no_key_is_recognised_whatever_it_looks_like():
    key = jax.random.key(0)
    integers = jax.random.key_data(key)
    bad = [1.5, "key", None, [0, 1], key[None], integers[0], integers.astype(int), integers[None]]
    bad += [np.uint32(4), np.zeros(2), jax.random.key, jax.ShapeDtypeStruct((), key.dtype)]
    for value in bad:
        with refuses("draw_key=", "one PRNG key, such as jax.random.key(0)"):
            one_key(value, "draw_key")
    with jax.default_prng_impl("rbg"), refuses("key=uint32(2,)"):
        one_key(integers)
