"""Laws of criteria: scores against NumPy by hand, deep chains, iterated pruning."""

import functools
import gc
import itertools
import warnings
import weakref

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from eoi_jax import criteria, masks
from eoi_jax.typing import Layout
from experiments.models import Mlp

RNG = np.random.default_rng


def mlp_params(sizes, seed=0, dtype=np.float64):
    rng = RNG(seed)
    return {
        f"layer{i}": {
            "kernel": (rng.standard_normal((n, m)) / np.sqrt(n)).astype(dtype),
            "bias": rng.standard_normal(m).astype(dtype),
        }
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    }


def kernels_of(tree):
    return [layer["kernel"] for layer in tree.values()]


def mlp(params, x, activation=jnp.tanh):
    *hidden, last = params.values()
    for layer in hidden:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def cross_entropy(params, x, labels, temperature=1.0):
    logits = mlp(params, x) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batch(examples=8, features=5, classes=3, dtype=np.float64):
    rng = RNG(1)
    return rng.standard_normal((examples, features)).astype(dtype), rng.integers(
        0, classes, examples
    )


def backprop(params, x, labels, temperature=1.0):
    """Gradients of the two kernels of ``cross_entropy``, by hand."""
    first, last = params.values()
    hidden = np.tanh(x @ first["kernel"] + first["bias"])
    logits = (hidden @ last["kernel"] + last["bias"]) / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(x)), labels] -= 1
    d_logits = p / len(x) / temperature
    d_hidden = (d_logits @ last["kernel"].T) * (1 - hidden**2)
    return [x.T @ d_hidden, hidden.T @ d_logits]


def moved(params, step, direction):
    return {
        name: {**layer, "kernel": layer["kernel"] + step * move}
        for (name, layer), move in zip(params.items(), direction, strict=True)
    }


def flow_scores(kernels):
    """SynFlow's scores of a chain, every layer divided by its sum: the common factor is gone."""
    sizes = [np.abs(np.asarray(k, np.float64)) for k in kernels]
    forward = [np.ones(len(sizes[0]))]
    for k in sizes:
        forward.append(forward[-1] @ k)
        forward[-1] /= max(forward[-1].sum(), 1e-300)
    backward, scores = np.ones(sizes[-1].shape[1]), []
    for k, inputs in zip(sizes[::-1], forward[-2::-1], strict=True):
        score = inputs[:, None] * k * backward
        scores.append(score / max(score.sum(), 1e-300))
        backward = k @ backward
        backward /= max(backward.sum(), 1e-300)
    return scores[::-1]


def identity(x):
    return x


LINEAR = functools.partial(mlp, activation=identity)


def test_snip_is_backpropagation_by_hand(x64):
    params = mlp_params([5, 7, 3])
    x, labels = batch()
    scores = jax.jit(functools.partial(criteria.snip, cross_entropy))(params, x, labels)
    grads = backprop(params, x, labels)
    for score, kernel, grad in zip(kernels_of(scores), kernels_of(params), grads, strict=True):
        np.testing.assert_allclose(score, np.abs(kernel * grad), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_a_finite_difference_of_gradients_by_hand(x64, temperature):
    params = mlp_params([5, 7, 3])
    x, labels = batch()
    loss = functools.partial(cross_entropy, temperature=temperature)
    grasp = jax.jit(functools.partial(criteria.grasp, loss, micro_batch_size=2))
    scores = kernels_of(grasp(params, x, labels))
    g = backprop(params, x, labels, temperature)
    step = 1e-4 / np.sqrt(sum((leaf**2).sum() for leaf in g))
    ahead, behind = (backprop(moved(params, s, g), x, labels, temperature) for s in (step, -step))
    for score, kernel, a, b in zip(scores, kernels_of(params), ahead, behind, strict=True):
        expected = kernel * (a - b) / (2 * step)
        np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    # The sign: weights of large scores carry the gradient flow, so shrinking them lowers it.
    top = [
        score > np.quantile(np.concatenate([s.ravel() for s in scores]), 0.8) for score in scores
    ]
    shrunk = moved(params, -1e-3, [k * t for k, t in zip(kernels_of(params), top, strict=True)])
    flow = [
        sum((leaf**2).sum() for leaf in backprop(p, x, labels, temperature))
        for p in (params, shrunk)
    ]
    assert flow[1] < flow[0]


@pytest.mark.slow
def test_grasp_over_micro_batches_is_grasp_of_the_batch():
    params = mlp_params([5, 7, 3], dtype=np.float32)
    x, labels = batch(dtype=np.float32)
    grasp = jax.jit(
        functools.partial(criteria.grasp, cross_entropy), static_argnames="micro_batch_size"
    )
    whole = grasp(params, x, labels)
    for size in (1, 4):
        parts = grasp(params, x, labels, micro_batch_size=size)
        chex.assert_trees_all_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_memory_of_grasp_does_not_grow_with_the_number_of_micro_batches():
    params = mlp_params([5, 7, 3], dtype=np.float32)

    def temporary_bytes(examples, size):
        x, labels = batch(examples, dtype=np.float32)
        grasp = functools.partial(criteria.grasp, cross_entropy, micro_batch_size=size)
        return (
            jax.jit(grasp).lower(params, x, labels).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporary_bytes(4096, 16) < temporary_bytes(64, 16) + 1024
    assert temporary_bytes(4096, 4096) > 10 * temporary_bytes(4096, 16)


@pytest.mark.slow
def test_synflow_is_the_chain_by_hand(x64):
    params = mlp_params([6, 9, 8, 3])
    scores = criteria.synflow(
        functools.partial(mlp, activation=jax.nn.relu), params, np.ones((1, 6))
    )
    sizes = [np.abs(k) for k in kernels_of(params)]
    flow = (np.ones(6) @ sizes[0] @ sizes[1] @ sizes[2]).sum()
    for score, expected in zip(kernels_of(scores), flow_scores(sizes), strict=True):
        np.testing.assert_allclose(score, flow * expected, rtol=1e-12)


@pytest.mark.slow
def test_a_hundred_rounds_of_synflow_are_those_of_a_loop(x64):
    params = mlp_params([6, 9, 8, 3])
    mask = criteria.prune(
        lambda p: criteria.synflow(LINEAR, p, np.ones((1, 6))), params, 0.3, num_steps=100
    )
    kernels = kernels_of(params)
    total = sum(k.size for k in kernels)
    alive = np.ones(total, bool)
    for r in range(1, 101):
        scores = np.concatenate([s.ravel() for s in flow_scores(kernels)])
        order = np.argsort(-np.where(alive, scores, -1), kind="stable")
        alive = np.zeros(total, bool)
        alive[order[: int(np.floor(0.3 ** (r / 100) * total + 0.5))]] = True
        parts = np.split(alive, np.cumsum([k.size for k in kernels])[:-1])
        kernels = [k * part.reshape(k.shape) for k, part in zip(kernels, parts, strict=True)]
    for found, part in zip(kernels_of(mask), parts, strict=True):
        np.testing.assert_array_equal(found, part.reshape(found.shape))


def test_a_chain_out_of_range_is_scored_up_to_one_factor():
    synflow = jax.jit(
        lambda p: criteria.synflow(LINEAR, p, jax.ShapeDtypeStruct((1, 6), jnp.float32))
    )
    params = mlp_params([6, 9, 8, 3], dtype=np.float32)
    for factor in (1e-20, 1e20):
        scaled = jax.tree.map(lambda leaf, f=factor: leaf * np.float32(f), params)
        found = kernels_of(synflow(scaled))
        flow = float(found[0].sum())
        assert 0.1 < flow < 10
        for score, expected in zip(found, flow_scores(kernels_of(scaled)), strict=True):
            np.testing.assert_allclose(score, flow * expected, rtol=1e-4)


@pytest.mark.slow
def test_synflow_keeps_every_layer_of_a_thousand_alive_in_float32():
    net = Mlp(depth=1000, width=16, num_classes=10, activation=identity)
    image = jnp.ones((1, 8, 8, 1))
    params = net.init(jax.random.key(0), image)

    @jax.jit
    def score_fn(params):
        return criteria.synflow(net.apply, params, image)

    def layers(tree):
        first, hidden, last = (tree["params"][n] for n in ("first", "hidden", "last"))
        return [first["kernel"], *hidden["linear"]["kernel"], last["kernel"]]

    scores = layers(jax.tree.map(np.asarray, score_fn(params)))
    expected = flow_scores(layers(jax.tree.map(np.asarray, params)))
    for score, oracle in zip(scores, expected, strict=True):
        np.testing.assert_allclose(score, scores[0].sum() * oracle, rtol=1e-3)

    mask = criteria.prune(score_fn, params, 0.125, num_steps=100)  # any warning is an error
    kept = [int(leaf.sum()) for leaf in layers(jax.tree.map(np.asarray, mask))]
    assert min(kept) > 0
    total = sum(leaf.size for leaf in scores)
    assert sum(kept) == round(0.125 * total)
    pruned = layers(jax.tree.map(np.asarray, score_fn(masks.apply(mask, params))))
    assert all(np.isfinite(leaf).all() and leaf.sum() > 0 for leaf in pruned)


def residual(params, x):
    return jax.lax.scan(lambda x, w: (x + x @ w, None), x, params["kernel"])[0]


def residual_params(dtype):
    return {"kernel": np.abs(RNG(0).standard_normal((50, 8, 8))).astype(dtype) * 2}


@pytest.mark.slow
def test_a_residual_network_needs_float64(x64):
    x = np.ones((1, 8))
    with refuses("apply_fn", "chain", "jax_enable_x64"):
        criteria.synflow(residual, residual_params(np.float32), x.astype(np.float32))
    kernels = residual_params(np.float64)["kernel"]
    scores = criteria.synflow(residual, {"kernel": kernels}, x)["kernel"]
    forward = [x[0]]
    for w in kernels:
        forward.append(forward[-1] + forward[-1] @ w)
    assert forward[-1].sum() > 1e50
    backward = np.ones(8)
    for w, inputs, score in zip(kernels[::-1], forward[-2::-1], scores[::-1], strict=True):
        np.testing.assert_allclose(score, inputs[:, None] * w * backward, rtol=1e-10)
        backward = backward + w @ backward


def softmax_output(params, x):
    return jax.nn.softmax(LINEAR(params, x))


@pytest.mark.parametrize(
    "apply_fn",
    [
        mlp,
        functools.partial(mlp, activation=jax.nn.gelu),
        softmax_output,
        lambda params, x: LINEAR(params, x) + 1.0,
    ],
)
def test_networks_that_are_not_homogeneous_are_refused(apply_fn):
    params = mlp_params([6, 9, 3], dtype=np.float32)
    x = np.ones((1, 6), np.float32)
    with refuses("apply_fn", "homogeneous"):
        criteria.synflow(apply_fn, params, x)


@pytest.mark.slow
def test_what_cannot_be_refused_while_tracing_is_nan_and_refused_by_prune():
    params = mlp_params([6, 9, 3], dtype=np.float32)

    def score_fn(params):
        return criteria.synflow(mlp, params, np.ones((1, 6), np.float32))

    assert all(bool(jnp.isnan(leaf).all()) for leaf in kernels_of(jax.jit(score_fn)(params)))
    with refuses("score_fn", "step 1 of 3"):
        criteria.prune(score_fn, params, 0.5, num_steps=3)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.slow
def test_other_collections_pass_through_untouched():
    x = jnp.asarray(RNG(0).standard_normal((4, 6, 6, 2)), jnp.float32)
    variables = Normed().init(jax.random.key(0), x)
    seen = []

    def loss_fn(variables, x):
        seen.append(variables["batch_stats"]["BatchNorm_0"]["mean"])
        return jnp.mean(Normed().apply(variables, x) ** 2)

    scores = {
        "snip": jax.jit(lambda x: criteria.snip(loss_fn, variables, x))(x),
        "grasp": jax.jit(lambda x: criteria.grasp(loss_fn, variables, x, micro_batch_size=2))(x),
        "synflow": criteria.synflow(Normed().apply, variables, x),
    }
    assert all(leaf is variables["batch_stats"]["BatchNorm_0"]["mean"] for leaf in seen)
    for tree in scores.values():
        assert jax.tree.structure(tree) == jax.tree.structure(variables)
        for (path, score), leaf in zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(variables), strict=True
        ):
            is_kernel = path[-1].key == "kernel"
            chex.assert_shape(score, leaf.shape if is_kernel else ())
            assert is_kernel or float(score) == np.inf
    grads = jax.grad(lambda p: loss_fn({**variables, "params": p}, x))(variables["params"])
    for name in ("Conv_0", "Dense_0"):
        chex.assert_trees_all_close(
            scores["snip"]["params"][name]["kernel"],
            jnp.abs(grads[name]["kernel"] * variables["params"][name]["kernel"]),
            rtol=1e-5,
        )


def equinox_net():
    model = eqx.nn.MLP(6, 3, 9, 1, activation=jax.nn.relu, key=jax.random.key(0))
    return lambda model, x: jax.vmap(model)(x), model


def haiku_net():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([9, 3])(x)))
    return net.apply, net.init(jax.random.key(0), jnp.ones((1, 6)))


def nnx_net():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = (nnx.Linear(*s, rngs=rngs) for s in ((6, 9), (9, 3)))

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), params


@pytest.mark.slow
@pytest.mark.parametrize("build", [equinox_net, haiku_net, nnx_net])
def test_any_framework(build):
    apply_fn, params = build()
    x = jnp.ones((4, 6))

    def loss_fn(params, x):
        return jnp.mean(apply_fn(params, x) ** 2)

    def synflow(params):
        return criteria.synflow(apply_fn, params, x)

    for scores in (
        criteria.snip(loss_fn, params, x),
        criteria.prune(synflow, params, 0.5, num_steps=3),
    ):
        assert jax.tree.structure(scores) == jax.tree.structure(params)
        sizes = sorted(leaf.size for leaf in jax.tree.leaves(scores) if leaf.ndim)
        assert sizes == [27, 54]
    assert masks.density(scores) == 41 / 81  # half of 81, rounded up


@pytest.mark.slow
def test_magnitude_random_and_invert():
    params = mlp_params([5, 7, 3], dtype=np.float32)
    params["layer0"]["kernel"] = params["layer0"]["kernel"].astype(jnp.bfloat16)
    scores = criteria.magnitude(params)
    chex.assert_type(jax.tree.leaves(scores), jnp.float32)
    for score, kernel in zip(kernels_of(scores), kernels_of(params), strict=True):
        np.testing.assert_array_equal(score, np.abs(kernel).astype(np.float32))
    assert float(scores["layer0"]["bias"]) == np.inf
    key = jax.random.key(0)
    drawn = criteria.random(key, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, scores)
    chex.assert_trees_all_equal(criteria.random(key, params), drawn)
    other = criteria.random(jax.random.key(1), params)
    for a, b in zip(kernels_of(drawn), kernels_of(other), strict=True):
        assert bool((a != b).all())
    kept = masks.top_k(scores, 0.25)
    dropped = masks.top_k(criteria.invert(scores), 0.75)
    assert all(
        bool((a ^ b).all()) for a, b in zip(kernels_of(kept), kernels_of(dropped), strict=True)
    )
    chex.assert_trees_all_equal(criteria.invert(criteria.invert(scores)), scores)
    chosen = criteria.magnitude(params, where=lambda path, leaf: path[0].key == "layer1")
    chex.assert_shape([chosen["layer0"]["kernel"], chosen["layer1"]["bias"]], [(), (3,)])


PARAMS = mlp_params([5, 7, 3], dtype=np.float32)


def fading(params):
    """Scores that change with what is left: weights in full rows matter less."""
    return jax.tree.map(
        lambda leaf: (
            jnp.abs(leaf) / (1 + (leaf != 0).sum(-1, keepdims=True))
            if leaf.ndim == 2
            else jnp.array(jnp.inf)
        ),
        params,
    )


@pytest.mark.slow
@settings(max_examples=8)
@given(st.floats(0.01, 1.0), st.sampled_from([1, 3]))
def test_prune_is_exact_and_nested(density, step):
    with warnings.catch_warnings(action="ignore"):  # of layers that are left empty
        mask = criteria.prune(fading, PARAMS, density, num_steps=4)
        before = criteria.prune(fading, PARAMS, density ** (step / 4), num_steps=step)
        once = criteria.prune(fading, PARAMS, density)
    assert sum(int(k.sum()) for k in kernels_of(mask)) == np.floor(density * 56 + 0.5)
    for late, early in zip(kernels_of(mask), kernels_of(before), strict=True):
        assert bool((late <= early).all())
    chex.assert_trees_all_equal(once, masks.top_k(fading(PARAMS), density))
    assert all(layer["bias"].ndim == 0 and bool(layer["bias"]) for layer in mask.values())


def test_prune_never_takes_back_what_it_removed():
    # Scores that favor what was removed, and -1 for what is left.
    def contrary(params):
        return jax.tree.map(
            lambda leaf: jnp.where(leaf == 0, 1e9, -jnp.abs(leaf)) if leaf.ndim > 1 else jnp.inf,
            params,
        )

    mask = criteria.prune(contrary, PARAMS, 0.25, num_steps=5)
    chex.assert_trees_all_equal(mask, masks.top_k(contrary(PARAMS), 0.25))


def test_prune_compiles_once_for_all_densities():
    bodies = []

    def score_fn(params):
        bodies.append(None)
        return criteria.magnitude(params)

    criteria.prune(score_fn, PARAMS, 0.5, num_steps=7)
    first = len(bodies)
    assert first <= 4  # not once a step
    criteria.prune(score_fn, PARAMS, 0.3, num_steps=7)
    assert len(bodies) <= first + 1  # its shapes are looked up; nothing is compiled


class Scorer:
    """A criterion with its batch, as an object that can be called or asked for a method."""

    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __call__(self, params):
        return criteria.grasp(cross_entropy, params, self.x, self.labels)

    def snip(self, params):
        return criteria.snip(cross_entropy, params, self.x, self.labels)


def partial_snip(x, labels):
    def loss_fn(x, labels, params):
        return cross_entropy(params, x, labels)

    return functools.partial(criteria.snip, functools.partial(loss_fn, x, labels))


def scored_by_synflow(x, labels):
    # Not a batch, but as much as one: what the network multiplies its inputs by.
    return lambda params: criteria.synflow(
        lambda params, ones: LINEAR(params, ones * jnp.abs(x)), params, x
    )


SCORERS = {
    "lambda": lambda x, y: lambda params: criteria.snip(cross_entropy, params, x, y),
    "partial": partial_snip,
    "method": lambda x, y: Scorer(x, y).snip,
    "object": Scorer,
    "synflow": scored_by_synflow,
    "micro": lambda x, y: (
        lambda params: criteria.grasp(cross_entropy, params, x, y, micro_batch_size=4)
    ),
}


def constants(jaxpr):
    """List the arrays that programs inside a jaxpr hold."""
    found = []
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=callable):
            if hasattr(value, "consts"):
                found += [*value.consts, *constants(value.jaxpr)]
            elif hasattr(value, "eqns"):
                found += constants(value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_prune_keeps_nothing_and_takes_batches_as_arguments(scorer):
    params = mlp_params([5, 7, 3], dtype=np.float32)

    def call():
        x, labels = (jnp.asarray(array) for array in batch(dtype=np.float32))
        score_fn = scorer(x, labels)
        for density in (0.6, 0.5):
            mask = criteria.prune(score_fn, params, density, num_steps=2)
            assert masks.density(mask) == pytest.approx(density, abs=0.01)
        traced = jax.make_jaxpr(lambda params: criteria.prune(score_fn, params, 0.5))(params)
        assert any(array is x for array in traced.consts)  # an argument of the programs inside
        assert all(np.size(array) < x.size for array in constants(traced.jaxpr))
        baked = jax.make_jaxpr(jax.jit(lambda kernel: x @ kernel))(np.ones((5, 2)))
        assert any(array is x for array in constants(baked.jaxpr))  # so it would be found
        return weakref.ref(x), weakref.ref(labels)

    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    references = call()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert sum(array.nbytes for array in jax.live_arrays()) <= before


def test_prune_under_jit_and_of_a_traced_density():
    eager = criteria.prune(fading, PARAMS, 0.25, num_steps=4)
    jitted = jax.jit(lambda p, d: criteria.prune(fading, p, d, num_steps=4))(PARAMS, 0.25)
    chex.assert_trees_all_equal(jitted, eager)


def test_prune_names_the_layers_that_it_emptied():
    kernel = np.ones((3, 4, 4), np.float32)
    kernel[1] = 1e-3
    params = {"stack": {"kernel": kernel}, "head": {"kernel": np.full((4, 2), 1e-4, np.float32)}}

    def layout(path, leaf):
        return Layout(batch_axes=leaf.ndim - 2)

    with pytest.warns(UserWarning, match=r"2 layers: head/kernel, stack/kernel\[1\]\."):
        criteria.prune(criteria.magnitude, params, 0.5, layout=layout)
    with pytest.warns(UserWarning, match=r"1 layers?: head/kernel\."):
        criteria.prune(criteria.magnitude, params, 0.5)


def test_synflow_of_a_network_without_a_path_is_zero():
    params = mlp_params([6, 9, 8, 3], dtype=np.float32)
    params["layer1"]["kernel"] = np.zeros((9, 8), np.float32)
    synflow = jax.jit(lambda p: criteria.synflow(LINEAR, p, np.ones((1, 6), np.float32)))
    for factor in (1.0, 1e15, 1e25):
        scores = synflow(jax.tree.map(lambda leaf, f=factor: leaf * np.float32(f), params))
        assert all(not np.asarray(leaf).any() for leaf in kernels_of(scores))


@pytest.mark.parametrize(
    ("named", "call"),
    [
        (["params=['bias']"], lambda: criteria.magnitude({"bias": jnp.ones((2, 2))})),
        (
            ["magnitude", "a/kernel"],
            lambda: criteria.magnitude({"a": {"kernel": jnp.array([[jnp.nan]])}}),
        ),
        (["loss_fn", "(3,)"], lambda: criteria.snip(lambda p, x: x, PARAMS, jnp.ones(3))),
        (["loss_fn", "tuple"], lambda: criteria.snip(lambda p: (jnp.ones(()), 0), PARAMS)),
        (
            ["snip", "layer0/kernel"],
            lambda: criteria.snip(lambda p: jnp.inf * p["layer0"]["kernel"].sum(), PARAMS),
        ),
        (
            ["micro_batch_size=3", "8 examples"],
            lambda: criteria.grasp(cross_entropy, PARAMS, *batch(), micro_batch_size=3),
        ),
        (
            ["micro_batch_size=0"],
            lambda: criteria.grasp(cross_entropy, PARAMS, *batch(), micro_batch_size=0),
        ),
        (
            ["batch", "(2,)", "(4,)"],
            lambda: criteria.grasp(
                cross_entropy, PARAMS, jnp.ones((4, 5)), jnp.ones(2, int), micro_batch_size=2
            ),
        ),
        (["x.dtype='int32'"], lambda: criteria.synflow(LINEAR, PARAMS, jnp.ones((1, 5), int))),
        (["density=1.5"], lambda: criteria.prune(fading, PARAMS, 1.5)),
        (["num_steps=0"], lambda: criteria.prune(fading, PARAMS, 0.5, num_steps=0)),
        (["score_fn(params)"], lambda: criteria.prune(kernels_of, PARAMS, 0.5)),
        (
            ["score_fn(params)[layer0/bias]", "(1,)"],
            lambda: criteria.prune(lambda p: jax.tree.map(lambda leaf: leaf[:1], p), PARAMS, 0.5),
        ),
    ],
)
def test_errors_name_the_argument(named, call):
    with refuses(*named):
        call()
