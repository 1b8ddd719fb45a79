"""Whole networks: exact counts, exact orthogonality, and nothing else changed."""

import functools
import gc
import math
import weakref

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import compilations, gram_error, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from eoi_jax import budgets, criteria, givens, masks, networks, orthogonal, sao, spectrum
from eoi_jax._internal import selection
from eoi_jax.optim import static_sparse
from eoi_jax.typing import Layout
from experiments import models

KEY = jax.random.key(3)
PARAMS = {
    "conv": {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.ones(8)},
    "depthwise": {"kernel": jnp.zeros((3, 3, 1, 6))},
    "linear": {"kernel": jnp.zeros((12, 20)), "bias": jnp.ones(20)},
    "stack": {"kernel": jnp.zeros((3, 8, 8)), "scale": jnp.ones((3, 8))},
}
LAYERS = 6  # of the four kernels
SIZE = 288 + 54 + 240 + 192
NEED = 4 + 6 + 12 + 3 * 8


def layout(path, leaf):
    name = path[0].key
    return Layout(batch_axes=1 if name == "stack" else 0, groups=6 if name == "depthwise" else 1)


def start(densities, key=KEY, params=PARAMS, **options):
    return networks.exact_orthogonal(key, params, densities, layout=layout, **options)


def count(mask):
    return sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask) if leaf.ndim)


def matrices(params):
    """All the matrices that should be orthogonal."""
    yield params["conv"]["kernel"][1, 1]
    for channel in range(6):
        yield params["depthwise"]["kernel"][1, 1, :, channel : channel + 1]
    yield params["linear"]["kernel"]
    yield from params["stack"]["kernel"]


@pytest.mark.slow
@settings(max_examples=12)
@given(count=st.integers(NEED, SIZE), seed=st.integers(0, 2**31 - 1))
def test_the_count_is_exact_and_every_layer_orthogonal(count, seed):
    densities = budgets.erdos_renyi_kernel(PARAMS, count / SIZE, layout=layout)
    drawn = start(densities, jax.random.key(seed), infeasible="redistribute")
    assert sum(int(m.sum()) for m in jax.tree.leaves(drawn.mask) if m.ndim) == count
    assert max(gram_error(matrix) for matrix in matrices(drawn.params)) < 1e-5
    off = masks.apply(jax.tree.map(lambda m: ~m if m.ndim else m, drawn.mask), drawn.params)
    assert not any(np.any(leaf["kernel"]) for leaf in off.values())


@pytest.mark.slow
def test_feasible_layers_get_their_budget_and_matrices_stay_just_below():
    densities = budgets.uniform(PARAMS, 0.3, layout=layout)
    drawn = start(densities)
    chex.assert_trees_all_equal(
        masks.densities(drawn.mask, layout=layout), jax.tree.map(np.float64, densities)
    )
    linear = drawn.params["linear"]["kernel"]
    budget = int(drawn.mask["linear"]["kernel"].sum())
    assert budget == 72
    assert budget - 12 < np.count_nonzero(linear) <= budget
    for layer, mask in zip(*(t["stack"]["kernel"] for t in drawn), strict=True):
        assert mask.sum() - 8 < np.count_nonzero(layer) <= mask.sum()


def test_only_kernels_change():
    drawn = start(0.3)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn.params, PARAMS)
    chex.assert_trees_all_equal_structs(drawn.mask, PARAMS)
    for name, leaf in (("conv", "bias"), ("linear", "bias"), ("stack", "scale")):
        np.testing.assert_array_equal(drawn.params[name][leaf], PARAMS[name][leaf])
        assert drawn.params[name][leaf] is not PARAMS[name][leaf]
        assert drawn.mask[name][leaf].shape == ()


@pytest.mark.slow
def test_convolutions_live_on_their_center_tap():
    params = {"kernel": jnp.zeros((3, 5, 16, 16))}
    for density, center in ((0.02, None), (0.3, None), (0.3, 0.2)):
        drawn = networks.exact_orthogonal(KEY, params, density, center_density=center)
        kernel = np.array(drawn.params["kernel"])
        tap = kernel[1, 2].copy()
        kernel[1, 2] = 0
        assert not kernel.any()
        expected = min(density * 15, math.sqrt(density), 1.0) if center is None else center
        assert expected - 1 / 16 < np.count_nonzero(tap) / 256 <= expected + 0.5 / 256
        assert int(drawn.mask["kernel"].sum()) == round(density * 15 * 256)
        assert gram_error(tap) < 1e-5
        outside = np.array(drawn.mask["kernel"])
        outside[1, 2] = False
        assert outside.any()


@pytest.mark.slow
def test_eis_unmasks_all_taps_of_the_connections():
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 16, 32))},
        "linear": {"kernel": jnp.zeros((8, 8))},
    }
    drawn = networks.exact_orthogonal(KEY, params, 0.2, variant="eis")
    mask, kernel = drawn.mask["conv"]["kernel"], drawn.params["conv"]["kernel"]
    connected = np.array(kernel[1, 1] != 0)
    assert np.asarray(mask)[:, :, connected].all()
    assert mask.sum() == round(0.2 * 9 * 16 * 32)
    # What is left is less than one more rotation would have taken.
    assert mask.sum() - 9 * connected.sum() < 9 * 16 + 9
    assert gram_error(kernel[1, 1]) < 1e-5
    assert drawn.mask["linear"]["kernel"].sum() == round(0.2 * 64)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["eoi", "eis"])
def test_a_scale_of_zero_changes_no_mask(variant):
    params = {"kernel": jnp.zeros((3, 3, 16, 16))}
    draw = functools.partial(networks.exact_orthogonal, KEY, params, 0.1, variant=variant)
    drawn = draw(scale=0.0)
    chex.assert_trees_all_equal(drawn.mask, draw().mask)
    assert not drawn.params["kernel"].any()


@pytest.mark.parametrize("name", ["balance_outputs", "center_density"])
def test_what_counts_depend_on_is_static(name):
    def draw(value):
        return networks.exact_orthogonal(KEY, PARAMS, 0.3, **{name: value})

    with refuses(name, "is traced", "static"):
        jax.jit(draw)(True if name == "balance_outputs" else 0.3)


def test_scale_and_narrow_dtypes():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    drawn = start(0.3, params=params, scale=1.5)
    chex.assert_trees_all_equal_dtypes(drawn.params, params)
    for matrix in matrices(drawn.params):
        assert gram_error(np.asarray(matrix, np.float64), 1.5) < 0.03
    wide = start(0.3, scale=1.5)
    assert max(gram_error(matrix, 1.5) for matrix in matrices(wide.params)) < 1e-5
    chex.assert_trees_all_equal(drawn.mask, wide.mask)


@pytest.mark.slow
def test_keys_jit_and_vmap():
    params = {name: PARAMS[name] for name in ("depthwise", "stack")}
    draw = jax.jit(lambda key: start(0.3, key, params))
    drawn = draw(KEY)
    eager = start(0.3, params=params)
    chex.assert_trees_all_equal(eager.mask, drawn.mask)
    chex.assert_trees_all_close(eager.params, drawn.params, atol=1e-6)
    keys = jax.random.split(KEY, 2)
    batch = jax.jit(jax.vmap(draw))(keys)
    for index, key in enumerate(keys):
        one = jax.tree.map(lambda x, i=index: x[i], batch.mask)
        chex.assert_trees_all_equal(one, draw(key).mask)
    for name in params:
        assert (batch.mask[name]["kernel"][0] != batch.mask[name]["kernel"][1]).any(), name
    layers = drawn.params["stack"]["kernel"]
    assert (layers[0] != layers[1]).any()


def test_infeasible_budgets_are_listed():
    with pytest.raises(ValueError, match="orthogonal matrices need in 4 layers") as error:
        start(0.1)
    message = str(error.value)
    assert "depthwise/kernel: 5 of 54 weights, needs 6" in message
    assert "stack/kernel[2]: 6 of 64 weights, needs 8" in message
    assert 'infeasible="redistribute"' in message


def test_redistribution_takes_in_proportion_to_what_is_to_spare():
    densities = {
        "conv": {"kernel": 104 / 288, "bias": 1.0},
        "depthwise": {"kernel": 0.0},
        "linear": {"kernel": 62 / 240, "bias": 1.0},
        "stack": {"kernel": np.array([8, 8, 7]) / 64, "scale": 1.0},
    }
    drawn = start(densities, infeasible="redistribute")
    found = jax.tree.map(lambda leaf: int(leaf.sum()), drawn.mask)
    assert found["depthwise"]["kernel"] == 6
    assert drawn.mask["stack"]["kernel"].sum((1, 2)).tolist() == [8, 8, 8]
    # 7 weights: the convolution has 100 to spare and the linear layer 50.
    assert found["conv"]["kernel"] == 104 - 5
    assert found["linear"]["kernel"] == 62 - 2


def test_what_no_redistribution_can_do_is_refused():
    with pytest.raises(ValueError, match=rf"outside \[{NEED}, {SIZE}\].*at least 0.0594"):
        start(0.02, infeasible="redistribute")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"infeasible": "shrug"}, "infeasible='shrug'"),
        ({"variant": "eos"}, "variant='eos'"),
        ({"center_density": 2.0}, "center_density=2.0"),
        ({"scale": math.inf}, "scale=inf"),
        ({"center_density": 0.01}, r"center_density=0.01 .*0\.125.*conv/kernel"),
        ({"center_density": 0.5, "variant": "eis"}, "center_density=0.5 does not go with variant"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        start(0.3, **options)


def test_densities_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"densities=1\.5"):
        start(1.5)
    with pytest.raises(ValueError, match="Say with layout="):
        networks.exact_orthogonal(
            KEY,
            {"kernel": jnp.zeros((3, 8, 8))},
            {"kernel": np.full(3, 0.5)},
            layout=lambda path, leaf: Layout(),
        )
    with pytest.raises(ValueError, match="is being traced"):
        jax.jit(lambda density: start(density))(0.3)
    with pytest.raises(ValueError, match=r"groups=5.*8"):
        networks.exact_orthogonal(
            KEY, {"kernel": jnp.zeros((3, 8))}, 0.5, layout=lambda path, leaf: Layout(groups=5)
        )
    with pytest.raises(ValueError, match="is a shape without values"):
        networks.exact_orthogonal(KEY, jax.eval_shape(lambda: PARAMS), 0.5, layout=layout)


@pytest.mark.slow
def test_the_densities_of_any_method():
    model = models.Mlp(depth=5, width=16, num_classes=10)
    images = jax.random.normal(KEY, (8, 4, 4, 1))
    params = jax.jit(model.init)(KEY, images)

    def stacked(path, leaf):
        return Layout(batch_axes=1 if "hidden" in jax.tree_util.keystr(path) else 0)

    def loss_fn(params):
        labels = jnp.arange(8)
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    scored = masks.top_k(jax.jit(lambda p: criteria.snip(loss_fn, p))(params), 0.3)
    densities = masks.densities(scored, layout=stacked)
    assert densities["params"]["hidden"]["linear"]["kernel"].shape == (3,)
    drawn = networks.exact_orthogonal(KEY, params, densities, layout=stacked)
    assert count(drawn.mask) == count(scored)
    chex.assert_trees_all_equal(masks.densities(drawn.mask, layout=stacked), densities)
    base = networks.masked(params, scored)
    chex.assert_trees_all_equal(base.params, masks.apply(scored, params))


@pytest.mark.slow
def test_trees_of_nnx_and_equinox():
    state = nnx.state(nnx.Linear(12, 20, rngs=nnx.Rngs(0)), nnx.Param)
    drawn = networks.exact_orthogonal(KEY, state, 0.25)
    assert isinstance(drawn.mask, nnx.State)
    assert gram_error(drawn.params["kernel"][...]) < 1e-5
    arrays = eqx.filter(eqx.nn.MLP(20, 12, 12, 1, key=KEY), eqx.is_inexact_array)
    drawn = networks.exact_orthogonal(KEY, arrays, 0.25)
    assert [int(layer.weight.sum()) for layer in drawn.mask.layers] == [60, 36]
    assert max(gram_error(layer.weight) for layer in drawn.params.layers) < 1e-5


@pytest.mark.slow
def test_redraw_draws_each_layer_of_a_stack_by_itself():
    drawn = networks.redraw(KEY, PARAMS, nn.initializers.orthogonal(), layout=layout)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, PARAMS)
    layers = drawn["stack"]["kernel"]
    assert max(gram_error(layer) for layer in layers) < 1e-5
    assert (layers[0] != layers[1]).any()
    np.testing.assert_array_equal(drawn["conv"]["bias"], PARAMS["conv"]["bias"])
    again = networks.redraw(KEY, PARAMS, nn.initializers.orthogonal(), layout=layout)
    chex.assert_trees_all_equal(again, drawn)


def test_redraw_draws_any_leaf_that_where_selects():
    """Also biases, which have no fans; of a stack each layer's by itself."""
    params = {"kernel": jnp.zeros((3, 4, 5)), "bias": jnp.zeros((3, 5)), "last": jnp.zeros(7)}
    drawn = networks.redraw(
        KEY,
        params,
        nn.initializers.normal(1.0),
        where=lambda path, leaf: path[-1].key != "kernel",
        layout=lambda path, leaf: Layout(batch_axes=int(leaf.shape[0] == 3)),
    )
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
    assert not drawn["kernel"].any()
    assert drawn["last"].all()
    assert len(np.unique(drawn["bias"])) == 15


def test_integers_are_refused_where_weights_are_drawn_or_rescaled():
    params = {"kernel": jnp.ones((4, 4)), "table": jnp.arange(16).reshape(4, 4)}
    with refuses("params[table]", "int32", "where="):
        networks.redraw(
            KEY, params, nn.initializers.normal(), where=lambda path, leaf: leaf.ndim > 1
        )
    with refuses("params[table]", "int32", "scalar True"):
        networks.rescaled(params, {"kernel": jnp.array(True), "table": jnp.eye(4, dtype=bool)})
    with refuses("params[bias]", "(4,)", "scalar True"):
        networks.approximate_isometry({"bias": jnp.ones(4)}, {"bias": jnp.ones(4, bool)})


@pytest.mark.parametrize("method", ["exact", "sao", "redraw"])
def test_shapes_without_entries_become_empty_arrays(method):
    params = {"empty": {"kernel": jax.ShapeDtypeStruct((0, 5), jnp.float32)}}
    whole = {**params, "square": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
    draw = {
        "exact": lambda tree: networks.exact_orthogonal(KEY, tree, 0.5).params,
        "sao": lambda tree: networks.sparsity_aware_orthogonal(KEY, tree, 0.5).params,
        "redraw": lambda tree: networks.redraw(KEY, tree, nn.initializers.normal()),
    }[method]
    for tree in (params, whole):
        drawn = draw(tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(drawn, tree)
        assert isinstance(drawn["empty"]["kernel"], jax.Array)


def test_numbers_that_are_arrays_or_traced_are_refused():
    params = {"kernel": jnp.ones((8, 8)), "conv": {"kernel": jnp.ones((3, 3, 8, 8))}}
    with refuses("scale", "array([1., 1.])"):
        networks.exact_orthogonal(KEY, params, 0.5, scale=np.ones(2))
    with refuses("center_density", "array([1., 1.])"):
        networks.exact_orthogonal(KEY, params, 0.5, center_density=np.ones(2))
    with refuses("scale(conv/kernel)", "Python number"):
        jax.jit(lambda gain: networks.exact_orthogonal(KEY, params, 0.5, scale=lambda *_: gain))(2)


def test_dense_leaves_are_copied():
    """Also those of NumPy: a start may be written to, or donated, without the others."""
    bias = np.zeros(4, np.float32)
    start = networks.masked(
        {"kernel": np.ones((4, 4), np.float32), "bias": bias},
        {"kernel": np.eye(4, dtype=bool), "bias": np.array(True)},
    )
    assert not np.shares_memory(start.params["bias"], bias)


def test_a_mask_of_the_same_key_does_not_know_the_redrawn_weights():
    params = {"kernel": jnp.zeros((100, 100))}
    drawn = networks.redraw(KEY, params, nn.initializers.normal(1.0))["kernel"]
    mask = masks.random(KEY, params, 0.2)["kernel"]
    # The mean of 2000 independent standard Gaussians, in standard errors.
    assert abs(float(drawn[mask].mean())) * 2000**0.5 < 4


@pytest.mark.slow
def test_approximate_isometry_of_a_network_is_that_of_each_matrix(x64):
    """In float64: 200 steps of a fixed length make of float32's rounding another matrix."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PARAMS)
    params = networks.redraw(KEY, params, nn.initializers.lecun_normal(), layout=layout)
    mask = masks.random(KEY, params, 0.7)
    solved = networks.approximate_isometry(params, mask, num_steps=200, layout=layout)
    chex.assert_trees_all_equal_shapes_and_dtypes(solved.params, params)
    chex.assert_trees_all_equal(masks.apply(mask, solved.params), solved.params)
    start = networks.masked(params, mask)

    def errors(tree):
        yield gram_error(tree["linear"]["kernel"])
        yield from (gram_error(layer) for layer in tree["stack"]["kernel"])
        yield gram_error(np.reshape(tree["conv"]["kernel"], (36, 8)))

    for before, after in zip(errors(start.params), errors(solved.params), strict=True):
        assert after < 0.7 * before
    alone = networks.approximate_isometry(
        {"kernel": params["stack"]["kernel"][1]},
        {"kernel": mask["stack"]["kernel"][1]},
        num_steps=200,
    )
    np.testing.assert_allclose(
        alone.params["kernel"], solved.params["stack"]["kernel"][1], atol=1e-8
    )
    # Each channel of a depthwise kernel is a matrix of one column, its norm within a step of 1:
    # the gradient of |x^2 - 1| has the length 2 x however near the end is.
    norms = np.linalg.norm(solved.params["depthwise"]["kernel"].reshape(9, 6), axis=0)
    np.testing.assert_allclose(norms, 1, atol=0.1 * 2 * 1.2)


@pytest.mark.slow
def test_sparsity_aware_orthogonal_networks():
    params = {
        "first": {"kernel": jnp.zeros((3, 3, 3, 16)), "bias": jnp.ones(16)},
        "conv": {"kernel": jnp.zeros((3, 3, 16, 16))},
        "linear": {"kernel": jnp.zeros((16, 16), jnp.bfloat16)},
        "last": {"kernel": jnp.zeros((16, 10))},
    }
    drawn = networks.sparsity_aware_orthogonal(KEY, params, 0.25)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn.params, params)
    assert drawn.mask["first"]["kernel"].all()
    assert drawn.mask["last"]["kernel"].all()
    assert gram_error(drawn.params["last"]["kernel"]) < 1e-5
    assert gram_error(drawn.params["first"]["kernel"][1, 1]) < 1e-5
    assert gram_error(drawn.params["conv"]["kernel"][1, 1]) < 1e-5
    connected = drawn.mask["conv"]["kernel"][0, 0]
    assert (drawn.mask["conv"]["kernel"] == connected).all()
    assert (connected.sum(0) == 4).all()
    assert (connected.sum(1) == 4).all()
    np.testing.assert_array_equal(connected, drawn.params["conv"]["kernel"][1, 1] != 0)
    assert (drawn.mask["linear"]["kernel"].sum(0) == 4).all()
    relu = networks.sparsity_aware_orthogonal(KEY, params, 0.25, activation="relu")
    assert (relu.mask["linear"]["kernel"].sum(0) == 4).all()
    with pytest.raises(ValueError, match=r"densities\[conv/kernel\].*nearest"):
        networks.sparsity_aware_orthogonal(KEY, params, 0.1)
    stack = {"kernel": jnp.zeros((3, 16, 16))}
    one = networks.sparsity_aware_orthogonal(
        KEY, stack, 0.25, layout=lambda path, leaf: Layout(batch_axes=1)
    )
    assert (one.mask["kernel"].sum(1) == sao.degree(16, 0.25)).all()
    assert (one.mask["kernel"][0] != one.mask["kernel"][1]).any()


@pytest.mark.slow
def test_a_deep_sparse_network_learns_from_eoi_and_not_from_a_masked_start():
    """80 tanh layers at density 1/8 on noise with labels: from chance to memorized, or never."""
    model = models.Mlp(depth=80, width=64, num_classes=4)
    x = jax.random.normal(jax.random.key(0), (64, 4, 4, 1)) / 4
    y = jnp.arange(64) % 4

    def stacked(path, leaf):
        return Layout(batch_axes=1 if "hidden" in jax.tree_util.keystr(path) else 0)

    dense = jax.jit(model.init)(KEY, x)
    densities = budgets.uniform(dense, 0.125, layout=stacked)
    starts = {
        "eoi": networks.exact_orthogonal(KEY, dense, densities, scale=1.02, layout=stacked),
        "masked": networks.masked(
            networks.redraw(KEY, dense, nn.initializers.orthogonal(1.02), layout=stacked),
            masks.random(KEY, dense, densities),
        ),
    }
    assert count(starts["eoi"].mask) == count(starts["masked"].mask)

    def loss_fn(params):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def train(params, mask):
        tx = static_sparse(optax.adam(1e-3), mask)

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, tx.init(params)), None, length=60)[1]

    losses = {name: train(*pair) for name, pair in starts.items()}
    chance = math.log(4)
    assert losses["eoi"][-1] < 0.5 * chance
    assert losses["masked"].min() > 0.9 * chance


@pytest.mark.slow
def test_approximated_isometry_loses_singular_values_where_eoi_keeps_them():
    """The paper's descent at density 0.1, all its 10 000 steps, against one draw of EOI."""
    params = {"kernel": jax.random.normal(KEY, (100, 100)) / 10}
    mask = masks.random(KEY, params, 0.1)
    solved = networks.approximate_isometry(params, mask).params["kernel"]
    values = np.linalg.svd(np.asarray(solved, np.float64), compute_uv=False)
    assert values.min() < 0.05
    assert values.mean() < 0.99
    drawn = networks.exact_orthogonal(KEY, params, 0.1)
    assert count(drawn.mask) == count(mask)
    exact = np.linalg.svd(np.asarray(drawn.params["kernel"], np.float64), compute_uv=False)
    np.testing.assert_allclose(exact, 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "reading"),
    [
        ("kernel", (3, 8, 8), "a stack of layers, a 1-D convolution or attention"),
        ("kernel", (64, 32, 3, 3), "a window of 64 x 32 or other axes"),
        ("kernel", (3, 3, 1, 16), "a depthwise convolution or one of a single input channel"),
    ],
)
@pytest.mark.parametrize("start", ["eoi", "sao", "ai"])
def test_shapes_that_may_mean_several_things_are_refused(name, shape, reading, start):
    params = {name: jnp.ones(shape)}
    call = {
        "eoi": lambda: networks.exact_orthogonal(KEY, params, 0.5),
        "sao": lambda: networks.sparsity_aware_orthogonal(KEY, params, 0.5),
        "ai": lambda: networks.approximate_isometry(params, {name: jnp.ones(shape, bool)}),
    }[start]
    with pytest.raises(ValueError, match=reading):
        call()


def test_equinox_convolutions_are_refused():
    arrays = eqx.filter(eqx.nn.Conv2d(4, 8, 3, key=KEY), eqx.is_inexact_array)
    with pytest.raises(ValueError, match=r"\(outputs, inputs, \*taps\), as Equinox stores it"):
        networks.exact_orthogonal(KEY, arrays, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (2,)])
def test_groups_are_isometries_of_their_own(batch):
    """Through the real convolution, so that the order of the channels counts."""
    conv = nn.Conv(12, (3, 3), padding="CIRCULAR", feature_group_count=3, use_bias=False)
    x = jax.random.normal(KEY, (1, 5, 5, 9))
    params = {"kernel": jnp.zeros((*batch, 3, 3, 3, 12))}
    drawn = networks.exact_orthogonal(
        KEY, params, 0.3, layout=lambda path, leaf: Layout(batch_axes=len(batch), groups=3)
    )
    for kernel in np.reshape(drawn.params["kernel"], (-1, 3, 3, 3, 12)):
        y = conv.apply({"params": {"kernel": kernel}}, x)
        for group in range(3):
            norms = np.linalg.norm(x[..., 3 * group : 3 * group + 3], axis=-1)
            of_group = y[..., 4 * group : 4 * group + 4]
            np.testing.assert_allclose(np.linalg.norm(of_group, axis=-1), norms, rtol=1e-5)


def test_transposed_convolutions_have_their_own_center():
    conv = nn.ConvTranspose(8, (4, 4), padding="CIRCULAR", use_bias=False)
    params = {"kernel": jnp.zeros((4, 4, 8, 8))}
    drawn = networks.exact_orthogonal(
        KEY, params, 0.2, layout=lambda path, leaf: Layout(transposed=True)
    )
    assert (drawn.params["kernel"][2, 2] != 0).any()
    x = jax.random.normal(KEY, (1, 6, 6, 8))
    y = conv.apply({"params": drawn.params}, x)
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-5)


@pytest.mark.slow
def test_where_permute_and_angles_reach_the_layers():
    params = {"a": {"kernel": jnp.zeros((12, 40))}, "b": {"kernel": jnp.ones((12, 40))}}
    only_a = networks.exact_orthogonal(
        KEY, params, 0.1, where=lambda path, leaf: path[0].key == "a"
    )
    np.testing.assert_array_equal(only_a.params["b"]["kernel"], 1)
    assert only_a.mask["b"]["kernel"].shape == ()
    kernel = np.asarray(only_a.params["a"]["kernel"])
    # Few rotations reach into the first of many columns: the diagonal is where they start.
    assert np.count_nonzero(kernel.diagonal()) == 12
    permuted = networks.exact_orthogonal(KEY, params, 0.1, permute=True).params["a"]["kernel"]
    assert np.count_nonzero(permuted.diagonal()) < 12
    assert gram_error(permuted) < 1e-5
    small = networks.exact_orthogonal(KEY, params, 0.1, angles=0.01).params["a"]["kernel"]
    assert np.abs(small.diagonal()).min() > 0.99 > np.abs(kernel.diagonal()).min()


@pytest.mark.slow
def test_the_mask_is_the_support_before_the_cast():
    params = {"kernel": jnp.zeros((64, 64), jnp.float16)}
    drawn = networks.exact_orthogonal(KEY, params, 0.9, angles=1e-3, scale=1e-3)
    assert drawn.mask["kernel"].sum() == round(0.9 * 64 * 64)
    # Products of sines of 0.001 are below what float16 can tell from 0.
    assert np.count_nonzero(drawn.params["kernel"]) < 0.8 * 64 * 64


def test_the_density_of_each_layer_at_its_center():
    params = {"kernel": jnp.zeros((3, 5, 16, 16))}
    drawn = networks.exact_orthogonal(KEY, params, 0.25, center_density="density")
    assert 0.25 - 1 / 16 < np.count_nonzero(drawn.params["kernel"][1, 2]) / 256 <= 0.25


@pytest.mark.slow
def test_other_densities_of_the_same_shapes_compile_nothing():
    params = {"kernel": jnp.zeros((12, 20)), "large": {"kernel": jnp.zeros((12, 70))}}
    networks.exact_orthogonal(KEY, params, 0.1)
    with compilations() as compiled:
        for density in (0.2, 0.5, 0.9):
            networks.exact_orthogonal(KEY, params, density)
    assert compiled == []


@pytest.mark.slow
def test_matrices_of_small_layers_are_drawn_by_one_program():
    traced = []

    def law(key, dtype):
        traced.append(key)
        return jax.random.uniform(key, (), dtype, 0.1, 1.4)

    draw = functools.partial(networks.exact_orthogonal, KEY, densities=0.5, angles=law)
    draw({"a": {"kernel": jnp.zeros((3, 3, 20, 30))}, "b": {"kernel": jnp.zeros((64, 8))}})
    first = len(traced)
    draw({"a": {"kernel": jnp.zeros((5, 7))}, "b": {"kernel": jnp.zeros((3, 3, 50, 4))}})
    assert len(traced) == first > 0


@pytest.mark.slow
def test_matrices_of_several_larger_shapes_share_a_program_and_change_no_bit():
    traced = []

    @givens.continuous
    def law(key, dtype):
        traced.append(key)
        return jax.random.uniform(key, (), dtype, 0.1, 1.4)

    def draw(key, *shapes):
        params = [{"kernel": jnp.zeros(shape)} for shape in shapes]
        return networks.exact_orthogonal(key, params, 0.3, angles=law)

    draw(KEY, (90, 80), (90, 80))
    first = len(traced)
    drawn = draw(KEY, (90, 80), (9, 70))
    assert len(traced) == first > 0
    # Inside of another program each shape is drawn as it is.
    jitted = jax.jit(functools.partial(draw, KEY, (90, 80), (9, 70)))()
    chex.assert_trees_all_equal(drawn, jitted)
    assert len(traced) > first


@pytest.mark.slow
def test_masks_of_several_sizes_share_a_program_and_change_no_bit(monkeypatch):
    shapes, unmask = [], selection.unmask_flat

    def unmask_flat(keys, mask, *numbers):
        shapes.append(mask.shape)
        return unmask(keys, mask, *numbers)

    monkeypatch.setattr(selection, "unmask_flat", unmask_flat)

    def draw():
        params = [{"kernel": jnp.zeros(shape)} for shape in ((20, 10), (150, 130), (10, 20))]
        return networks.exact_orthogonal(KEY, params, 0.4)

    drawn = draw()
    assert shapes == [(1, 2**16)] * 3
    chex.assert_trees_all_equal(drawn, jax.jit(draw)())  # where no mask is padded
    assert len(shapes) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw",
    [
        lambda law: start(0.5, params={"linear": PARAMS["linear"]}, angles=law),
        lambda law: orthogonal(KEY, (6, 4), 0.6, angles=law),
        lambda law: givens.sample(KEY, 6, 4, angles=law),
    ],
    ids=["network", "matrix", "rotations"],
)
def test_a_law_of_angles_goes_with_the_table_that_it_closes_over(draw):
    def call():
        table = jnp.linspace(0.1, 0.2, 64)

        def law(key, dtype):
            return table[jax.random.randint(key, (), 0, 64)].astype(dtype)

        chex.assert_trees_all_equal(draw(law), draw(law))
        return weakref.ref(law), weakref.ref(table)

    references = call()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.slow
def test_a_start_is_committed_to_devices_only_where_its_parameters_are():
    params = {"kernel": jnp.ones((6, 6)), "bias": jnp.ones(6)}
    for committed in (False, True):
        if committed:
            params = jax.device_put(params, jax.devices()[0])
        for drawn in (
            networks.exact_orthogonal(KEY, params, 0.5),
            networks.sparsity_aware_orthogonal(KEY, params, 0.5),
            networks.masked(params, masks.random(KEY, params, 0.5)),
        ):
            kernels = drawn.params["kernel"], drawn.mask["kernel"]
            assert [leaf.committed for leaf in kernels] == [committed] * 2


def test_a_donated_start_leaves_the_others():
    params = {"kernel": jnp.ones((12, 20)), "bias": jnp.ones(4)}
    mask = masks.random(KEY, params, 0.5)
    starts = [networks.masked(params, mask), networks.exact_orthogonal(KEY, params, 0.5)]
    consume = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    for start in starts:
        assert consume(start.params)["bias"].tolist() == [2.0] * 4
    assert params["bias"].tolist() == [1.0] * 4


@pytest.mark.slow
def test_narrow_kernels_of_every_start():
    params = {"linear": {"kernel": jnp.zeros((16, 10), jnp.bfloat16)}}
    params["square"] = {"kernel": jnp.zeros((16, 16), jnp.bfloat16)}
    sao_start = networks.sparsity_aware_orthogonal(KEY, params, 0.25)
    drawn = networks.redraw(KEY, params, nn.initializers.orthogonal())
    for tree in (sao_start.params, drawn):
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, params)
        assert gram_error(np.asarray(tree["linear"]["kernel"], np.float64)) < 0.03


# --- taps and scales of convolutions ----------------------------------------------------------

CONV = {
    "conv": {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.ones(8)},
    "grouped": {"kernel": jnp.zeros((3, 3, 2, 4))},
    "linear": {"kernel": jnp.zeros((8, 5))},
    "stack": {"kernel": jnp.zeros((2, 3, 3, 4, 4))},
}


def conv_layout(path, leaf):
    name = path[0].key
    return Layout(batch_axes=int(name == "stack"), groups=2 if name == "grouped" else 1)


def layers_of(name, kernel):
    return list(kernel) if name == "stack" else [kernel]


@pytest.mark.slow
@pytest.mark.parametrize("taps", ["spread", "spread_both"])
def test_spread_taps_are_isometric_and_keep_every_count(taps):
    key = jax.random.key(0)
    center = networks.exact_orthogonal(key, CONV, 0.3, layout=conv_layout, balance_outputs=True)
    start = networks.exact_orthogonal(key, CONV, 0.3, taps=taps, layout=conv_layout)
    moved = 0
    for name in CONV:
        kernel, mask = start.params[name]["kernel"], start.mask[name]["kernel"]
        assert int(mask.sum()) == int(center.mask[name]["kernel"].sum())
        assert not np.asarray(kernel)[~np.asarray(mask)].any()
        if name == "linear":
            np.testing.assert_array_equal(kernel, center.params[name]["kernel"])
            continue
        groups = 2 if name == "grouped" else 1
        pairs = zip(
            layers_of(name, kernel), layers_of(name, center.params[name]["kernel"]), strict=True
        )
        for layer, of_center in pairs:
            values = spectrum.conv_singular_values(layer, (4, 4), feature_group_count=groups)
            np.testing.assert_allclose(values, 1, atol=1e-5)
            np.testing.assert_allclose(layer.sum(axis=(0, 1)), of_center.sum(axis=(0, 1)))
            moved += int((layer != of_center).any())
    assert moved == 4


@pytest.mark.slow
def test_he_scales_have_the_norm_of_masked_he_weights():
    densities = {"conv": 0.2, "grouped": 0.5, "linear": 0.4, "stack": np.array([0.2, 0.4])}
    tree = {
        name: {leaf: densities[name] if leaf == "kernel" else 1.0 for leaf in CONV[name]}
        for name in CONV
    }
    start = networks.exact_orthogonal(
        jax.random.key(0), CONV, tree, scale="he", taps="spread", layout=conv_layout
    )
    for name in CONV:
        pairs = [
            layers_of(name, start.params[name]["kernel"]),
            layers_of(name, start.mask[name]["kernel"]),
        ]
        for layer, mask in zip(*pairs, strict=True):
            expected = 2 * float(mask.mean()) * layer.shape[-1]
            np.testing.assert_allclose((np.asarray(layer) ** 2).sum(), expected, rtol=1e-5)


def test_a_function_gives_each_layer_its_scale():
    seen = []

    def scale(path, shape, density):
        seen.append((path[0].key, shape, density))
        return 1.0 + density

    start = networks.exact_orthogonal(jax.random.key(0), CONV, 0.3, scale=scale, layout=conv_layout)
    plain = networks.exact_orthogonal(jax.random.key(0), CONV, 0.3, layout=conv_layout)
    assert [name for name, _, _ in seen] == ["conv", "grouped", "linear", "stack", "stack"]
    assert seen[3][1] == (3, 3, 4, 4)
    factors = [1.0 + density for _, _, density in seen]
    for name, factor in zip(["conv", "grouped", "linear"], factors, strict=False):
        np.testing.assert_allclose(
            start.params[name]["kernel"], factor * plain.params[name]["kernel"], rtol=1e-6
        )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"taps": "edge"}, ("taps", "edge")),
        ({"taps": "spread", "variant": "eis"}, ("taps", "spread")),
        ({"scale": "xavier"}, ("scale", "xavier")),
        ({"scale": lambda *_: 1e39}, ("scale(conv/kernel)", "1e+39")),
        ({"scale": lambda *_: None}, ("scale(conv/kernel)", "None")),
    ],
)
def test_taps_and_scales_out_of_range_are_refused(options, named):
    with refuses(*named):
        networks.exact_orthogonal(jax.random.key(0), CONV, 0.3, layout=conv_layout, **options)


@pytest.mark.slow
@pytest.mark.parametrize("per", ["layer", "unit"])
def test_rescaled_weights_keep_the_second_moment_of_dense_ones(per):
    """Over its fan-in: of each layer as a whole, or of each unit."""
    key = jax.random.key(0)
    params = {
        "linear": {"kernel": jnp.ones((40, 30)), "bias": jnp.ones(30)},
        "stack": {"kernel": jnp.ones((2, 3, 3, 8, 6))},
    }
    density = {
        "linear": {"kernel": 0.2, "bias": 1.0},
        "stack": {"kernel": np.array([0.1, 0.5])},
    }
    mask = masks.random(key, params, density)

    def layout(path, leaf):
        return Layout(batch_axes=int(path[0].key == "stack"))

    start = networks.rescaled(params, mask, per=per, layout=layout)
    chex.assert_trees_all_equal(start.mask, mask)
    np.testing.assert_array_equal(start.params["linear"]["bias"], 1.0)
    layers = [start.params["linear"]["kernel"], *start.params["stack"]["kernel"]]
    kept = [mask["linear"]["kernel"], *mask["stack"]["kernel"]]
    for layer, layer_mask in zip(layers, kept, strict=True):
        flat = np.asarray(layer).reshape(-1, layer.shape[-1])
        alive = np.asarray(layer_mask).reshape(flat.shape)
        assert not flat[~alive].any()
        if per == "layer":
            np.testing.assert_allclose((flat**2).mean(), 1, rtol=1e-5)
            np.testing.assert_allclose(flat[alive], alive.mean() ** -0.5, rtol=1e-5)
        else:
            expected = alive.any(axis=0).astype(float)  # a unit without weights stays zero
            np.testing.assert_allclose((flat**2).mean(axis=0), expected, rtol=1e-5)


def test_rescaling_refuses_another_unit():
    with refuses("per", "row"):
        networks.rescaled({"kernel": jnp.ones((2, 2))}, {"kernel": jnp.eye(2) > 0}, per="row")


# --- balanced outputs and strides -------------------------------------------------------------

BALANCE_LAYERS = {
    "first": {"kernel": jnp.zeros((3, 3, 3, 16))},
    "grouped": {"kernel": jnp.zeros((3, 3, 2, 10))},
    "linear": {"kernel": jnp.zeros((6, 20))},
    "narrow": {"kernel": jnp.zeros((3, 3, 16, 3))},
    "stack": {"kernel": jnp.zeros((2, 3, 3, 3, 16))},
}
# One layer of the stack has a weight for each of its 16 outputs, and one has 12.
BALANCE_DENSITIES = {
    name: {"kernel": np.array([0.05, 12 / 432]) if name == "stack" else 0.2}
    for name in BALANCE_LAYERS
}


def shares(kernel, groups=1):
    """Norms of the outputs over their fair share."""
    norms = np.linalg.norm(np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]), axis=0)
    return norms / math.sqrt(min(kernel.shape[-2] * groups / kernel.shape[-1], 1))


@pytest.mark.slow
def test_filters_are_balanced_where_taps_are_spread_and_the_budget_allows_it():
    draw = functools.partial(
        networks.exact_orthogonal, KEY, BALANCE_LAYERS, BALANCE_DENSITIES, layout=conv_layout
    )
    start, paper, every = (
        draw(taps="spread"),
        draw(taps="spread", balance_outputs=False),
        draw(balance_outputs=True, infeasible="redistribute"),
    )
    for mask in (start.mask, paper.mask):
        for name, leaf in BALANCE_LAYERS.items():
            density = np.mean(BALANCE_DENSITIES[name]["kernel"])
            assert int(mask[name]["kernel"].sum()) == round(density * leaf["kernel"].size)
    kernels = {name: start.params[name]["kernel"] for name in BALANCE_LAYERS}
    assert shares(kernels["first"]).min() >= 0.5
    assert shares(kernels["grouped"], groups=2).min() >= 0.5
    assert shares(kernels["stack"][0]).min() >= 0.5
    assert shares(kernels["stack"][1]).min() == 0  # 12 weights for 16 outputs
    for name in ("first", "stack"):
        for layer in layers_of(name, kernels[name]):
            values = spectrum.conv_singular_values(layer, (3, 3))
            np.testing.assert_allclose(values, 1, atol=1e-5)
    # Linear layers are as before, and so is all without the option.
    np.testing.assert_allclose(kernels["linear"], paper.params["linear"]["kernel"], atol=1e-6)
    assert shares(paper.params["first"]["kernel"]).min() < 0.3
    center = draw()
    for name in ("first", "grouped"):
        total = paper.params[name]["kernel"].sum(axis=(0, 1))
        np.testing.assert_array_equal(total, center.params[name]["kernel"].sum(axis=(0, 1)))
    # On request it holds of every layer; the second layer of the stack takes four weights.
    assert int(every.mask["stack"]["kernel"][1].sum()) == 16
    assert masks.density(every.mask) == masks.density(start.mask)
    assert shares(every.params["linear"]["kernel"]).min() >= 0.5
    assert shares(every.params["stack"]["kernel"][1]).min() >= 0.5


def test_what_balance_refuses_in_networks():
    draw = functools.partial(
        networks.exact_orthogonal, KEY, BALANCE_LAYERS, BALANCE_DENSITIES, layout=conv_layout
    )
    with refuses("stack/kernel", "12 of 432", "needs 16", "balanced outputs"):
        draw(balance_outputs=True)
    with refuses("balance_outputs", 1):
        draw(balance_outputs=1)
    with refuses("center_density", 0.3, "0.333333", "balance_outputs"):
        networks.exact_orthogonal(
            KEY, BALANCE_LAYERS["first"], 0.2, balance_outputs=True, center_density=0.3
        )


@pytest.mark.slow
def test_tiny_filters_blow_up_under_batch_normalization_and_balanced_ones_do_not():
    """Ten steps of the first layer of 19, on pictures of noise, with the paper's optimizer."""
    images = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    labels = jnp.arange(64) % 10
    deep = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (18, 16, 16)))[0]
    head = jax.random.normal(jax.random.key(5), (16, 10)) / 4

    def normalized(x):
        return nn.relu((x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5))

    def loss(params):
        axes = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            images, params["kernel"], (1, 1), "SAME", dimension_numbers=axes
        )
        x, _ = jax.lax.scan(lambda x, w: (normalized(x @ w), None), normalized(x), deep)
        logits = x.mean((1, 2)) @ head
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def squared_norm_after_ten_steps(params, mask):
        tx = static_sparse(optax.sgd(0.1, momentum=0.9, nesterov=True), mask)

        def step(state, _):
            params, state = state
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, 10)
        return (params["kernel"] ** 2).sum()

    shape = {"kernel": jnp.zeros((3, 3, 3, 16))}
    for seed in (6, 11):
        grown = [
            squared_norm_after_ten_steps(
                *networks.exact_orthogonal(
                    jax.random.key(seed), shape, 0.05, taps="spread", balance_outputs=balance
                )
            )
            for balance in (False, None)
        ]
        assert grown[0] > 300, seed  # from 3
        assert grown[1] < 6, seed


def strided_operator(kernel, grid, strides, groups=1):
    """The circular convolution as a matrix, by the definition in NumPy."""
    kernel = np.asarray(kernel, np.float64)
    inputs, outputs = kernel.shape[-2] * groups, kernel.shape[-1]
    rows = []
    for place in np.ndindex(*grid, inputs):
        x = np.zeros((*grid, inputs))
        x[place] = 1
        y = 0
        for tap in np.ndindex(*kernel.shape[:-2]):
            seen = np.roll(x, [-t for t in tap], range(len(grid)))
            seen = seen[tuple(slice(None, None, step) for step in strides)]
            parts = zip(
                np.split(seen, groups, axis=-1),
                np.split(kernel[tap], groups, axis=-1),
                strict=True,
            )
            y = y + np.concatenate([part @ weights for part, weights in parts], axis=-1)
        rows.append(y.ravel())
    assert rows[0].size == math.prod(grid) // math.prod(strides) * outputs
    return np.stack(rows)


STRIDES = {
    "first": 2,
    "grouped": (2, 1),
    "linear": 1,
    "narrow": (1, 2),
    "stack": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("taps", ["center", "spread", "spread_both"])
def test_strided_layers_of_a_network_are_isometric_from_all_pixels(taps):
    """Wide, square, narrow, grouped and stacked; and every count is the budget."""
    densities = jax.tree.map(lambda leaf: 0.2, BALANCE_LAYERS)
    start = networks.exact_orthogonal(
        KEY,
        BALANCE_LAYERS,
        densities,
        taps=taps,
        strides=lambda path, leaf: STRIDES[path[0].key],
        layout=conv_layout,
    )
    plain = networks.exact_orthogonal(KEY, BALANCE_LAYERS, densities, layout=conv_layout)
    for name, leaf in BALANCE_LAYERS.items():
        kernel, mask = start.params[name]["kernel"], start.mask[name]["kernel"]
        assert int(mask.sum()) == round(0.2 * leaf["kernel"].size)
        assert not np.asarray(kernel)[~np.asarray(mask)].any()
        if name == "linear":
            np.testing.assert_allclose(kernel, plain.params[name]["kernel"], atol=1e-6)
            continue
        strides = STRIDES[name]
        strides = strides if isinstance(strides, tuple) else (strides, strides)
        groups = 2 if name == "grouped" else 1
        for layer in layers_of(name, kernel):
            matrix = strided_operator(layer, (4, 4), strides, groups)
            values = np.linalg.svd(matrix, compute_uv=False)
            np.testing.assert_allclose(values, 1, atol=1e-5)
    if taps != "center":
        assert shares(start.params["first"]["kernel"]).min() >= 0.5  # 12 rows of four phases


def test_the_scale_he_of_strided_layers():
    params = {"kernel": jnp.zeros((3, 3, 4, 8))}
    start = networks.exact_orthogonal(KEY, params, 0.2, scale="he", strides=lambda *_: 2)
    squared = float((start.params["kernel"] ** 2).sum())
    assert squared == pytest.approx(2 * float(start.mask["kernel"].mean()) * 8, rel=1e-5)


def test_what_strides_refuse_in_networks():
    draw = functools.partial(networks.exact_orthogonal, KEY)
    params = {"kernel": jnp.zeros((1, 1, 4, 8))}
    with refuses("strides(kernel)", "2"):
        draw(params, 0.5, strides=lambda *_: 2)
    with refuses("strides(kernel)", "2"):
        draw({"kernel": jnp.zeros((4, 8))}, 0.5, strides=lambda *_: 2)
    with refuses("strides(kernel)", "(1, 1, 1)"):
        draw(params, 0.5, strides=lambda *_: (1, 1, 1))
    with refuses("strides", "eis"):
        draw(params, 0.5, strides=lambda *_: 1, variant="eis")
