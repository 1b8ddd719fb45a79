"""One set of laws for all frameworks: start, mask, train, checkpoint, go on, and look at spectra.

Each network has scanned layers, rematerialized, with batch normalization. It is compiled once as a
step of training, runs through a checkpoint of Orbax, and the laws read what that run has left.
"""

import warnings
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import gram_error
from jax.tree_util import DictKey

import eoi_jax as eoi
from eoi_jax.typing import Layout

KEY = jax.random.key(0)
DENSITY = 0.4
INPUTS, WIDTH, DEPTH = 6, 8, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, INPUTS)), jnp.float32)
Y = jnp.arange(16) % WIDTH
INNER = optax.adamw(0.03, weight_decay=0.1)
EPSILON = 1e-5  # of batch normalization in Flax


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def stacked(path, leaf):
    """Tell a stack of linear layers, as a scan stores it, from a convolution."""
    return Layout(batch_axes=leaf.ndim - 2)


class Run(NamedTuple):
    """A network at its start, after some steps, and after as many again, both ways."""

    params: Any  # at the start
    mask: Any
    trained: Any
    whole: Any  # all that went on without a stop, in any order
    resumed: Any  # the same after a checkpoint
    linear: Any  # x -> the network without activations, at its start
    norms: int = 0  # batch normalizations in that, each of the variance 1


def through_orbax(tree, folder):
    """Save a tree and read it back into its shapes alone."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder / "checkpoint", jax.eval_shape(lambda: tree))
    # What is restored is bound to its device, for which a step would be compiled once more.
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), restored)


def run_functions(apply, params, rest, mask, folder):
    """Train by pure functions: ``apply(params, rest, x) -> logits, rest``."""
    tx = eoi.static_sparse(INNER, mask)

    @jax.jit
    def step(params, rest, state):
        def loss_fn(params):
            logits, new_rest = apply(params, rest, X)
            return loss_of(logits), new_rest

        grads, rest = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state

    middle = step(*step(params, rest, tx.init(params)))
    whole = step(*step(*middle))
    resumed = step(*step(*through_orbax(middle, folder)))
    return middle[0], whole, resumed


# ---------------------------------------------------------------------------- Flax Linen


class LinenLayer(nn.Module):
    activation: Any
    train: bool

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(WIDTH, kernel_init=eoi.dense(DENSITY))(x)
        return self.activation(nn.BatchNorm(use_running_average=not self.train)(x)), None


class LinenNet(nn.Module):
    activation: Any = jnp.tanh

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(WIDTH, kernel_init=eoi.dense(DENSITY))(x)
        layers = nn.scan(
            nn.remat(LinenLayer),
            {"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=DEPTH,
        )
        return layers(self.activation, train, name="layers")(x, None)[0]


def ensemble(activation):
    """Two networks with one batch."""
    axes = {"params": 0, "batch_stats": 0}
    both = nn.vmap(LinenNet, axes, split_rngs={"params": True}, in_axes=None, axis_size=2)
    return both(activation)


def linen(folder):
    net = ensemble(jnp.tanh)
    variables = jax.jit(net.init, static_argnums=2)(KEY, X, False)
    params, rest = variables["params"], variables["batch_stats"]

    def apply(params, rest, x):
        variables = {"params": params, "batch_stats": rest}
        logits, new = net.apply(variables, x, True, mutable=["batch_stats"])
        return logits.mean(0), new["batch_stats"]

    mask = eoi.masks.support(params)
    runs = run_functions(apply, params, rest, mask, folder)
    plain = ensemble(lambda x: x)
    return Run(params, mask, *runs, lambda x: plain.apply(variables, x, False)[1], norms=DEPTH)


# ------------------------------------------------------------------------------ Flax NNX


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x, activation):
        return activation(self.norm(self.linear(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=DEPTH)
        @nnx.vmap(in_axes=0, out_axes=0)
        def build(rngs):
            return NnxLayer(rngs)

        self.first = nnx.Linear(INPUTS, WIDTH, rngs=rngs)
        self.layers = build(rngs)

    def __call__(self, x, activation=jnp.tanh):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def scanned(layer, x):
            return layer(x, activation)

        return scanned(self.layers, self.first(x))


def nnx_net(folder):
    model = NnxNet(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    start = eoi.exact_orthogonal(KEY, params, DENSITY, layout=stacked)
    nnx.update(model, start.params)
    optimizer = nnx.Optimizer(model, eoi.static_sparse(INNER, start.mask), wrt=nnx.Param)
    graph, *state = jax.tree.map(jnp.copy, nnx.split(model, nnx.Param, ...))

    def linear(x):
        # Without a copy, a scan inside would meet the variables of an outer trace.
        merged = nnx.merge(graph, *state, copy=True)
        merged.eval()
        return merged(x, lambda x: x)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: loss_of(model(X)))(model))

    def two_steps():
        for _ in range(2):
            step(model, optimizer)
        return jax.tree.map(jnp.copy, (nnx.state(model), nnx.state(optimizer)))

    middle = two_steps()
    trained = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    whole = two_steps()
    restored = through_orbax(middle, folder)
    nnx.update(model, restored[0])
    nnx.update(optimizer, restored[1])
    return Run(start.params, start.mask, trained, whole, two_steps(), linear, norms=DEPTH)


# ------------------------------------------------------------------------------- Equinox


class EqxNet(eqx.Module):
    first: eqx.nn.Linear
    layers: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        first, *rest = jax.random.split(key, 1 + DEPTH)
        self.first = eqx.nn.Linear(INPUTS, WIDTH, key=first)
        self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(WIDTH, WIDTH, key=key))(
            jnp.stack(rest)
        )
        self.norm = eqx.nn.BatchNorm(WIDTH, "batch", mode="batch")

    def __call__(self, x, activation):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        @jax.checkpoint
        def layer(x, arrays):
            return activation(eqx.combine(arrays, static)(x)), None

        return jax.lax.scan(layer, self.first(x), arrays)[0]


def equinox(folder):
    model, rest = eqx.nn.make_with_state(EqxNet)(KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    start = eoi.exact_orthogonal(KEY, params, DENSITY, layout=stacked)

    def apply(params, rest, x):
        model = eqx.combine(params, static)
        hidden = jax.vmap(model, (0, None))(x, jnp.tanh)
        both = jax.vmap(model.norm, (0, None), (0, None), axis_name="batch")
        return both(hidden, rest)

    runs = run_functions(apply, start.params, rest, start.mask, folder)
    return Run(*start, *runs, lambda x: eqx.combine(start.params, static)(x, lambda x: x))


# --------------------------------------------------------------------------------- Haiku


def haiku_init(shape, dtype):
    """Take the key from Haiku, whose initializers are called without one."""
    return eoi.dense(DENSITY)(hk.next_rng_key(), shape, dtype)


def haiku_net(x, train):
    activation = jnp.tanh if train else lambda x: x

    def layer(x):
        return activation(hk.Linear(WIDTH, w_init=haiku_init)(x))

    x = hk.Linear(WIDTH, w_init=haiku_init)(x)
    x = hk.layer_stack(DEPTH)(hk.remat(layer))(x)
    # Its averages start from zero, not from a variance of 1.
    return hk.BatchNorm(True, True, 0.9)(x, train) if train else x


def haiku(folder):
    net = hk.transform_with_state(haiku_net)
    params, rest = jax.jit(net.init, static_argnums=2)(KEY, X, True)

    def apply(params, rest, x):
        return net.apply(params, rest, None, x, True)

    mask = eoi.masks.support(params)
    runs = run_functions(apply, params, rest, mask, folder)
    return Run(params, mask, *runs, lambda x: net.apply(params, rest, None, x[None], False)[0][0])


FRAMEWORKS = {"linen": linen, "nnx": nnx_net, "equinox": equinox, "haiku": haiku}


@pytest.fixture(params=FRAMEWORKS, scope="module")
def run(request, tmp_path_factory):
    return FRAMEWORKS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
def test_kernels_start_orthogonal(run):
    pairs = zip(jax.tree.leaves(run.mask), jax.tree.leaves(run.params), strict=True)
    kernels = [np.asarray(leaf, np.float64) for mask, leaf in pairs if mask.ndim]
    assert len(kernels) == 2
    for kernel in kernels:
        for matrix in kernel.reshape(-1, *kernel.shape[-2:]):
            assert gram_error(matrix) < 1e-5
    assert eoi.masks.density(run.mask) == pytest.approx(DENSITY, abs=1 / (2 * WIDTH))


def test_masked_weights_stay_zero_and_kept_ones_move(run):
    trees = (run.mask, run.params, run.trained)
    kernels = 0
    for mask, before, after in zip(*map(jax.tree.leaves, trees), strict=True):
        kept = np.broadcast_to(mask, after.shape)
        assert np.all(np.asarray(after)[~kept] == 0)
        if mask.ndim:
            kernels += 1
            assert np.mean(np.asarray(before != after)[kept]) > 0.95
    assert kernels == 2


def test_a_restored_run_goes_on_as_if_there_had_been_no_stop(run):
    chex.assert_trees_all_equal(run.resumed, run.whole)


@pytest.mark.slow
def test_the_spectrum_of_the_linear_network_is_flat(run):
    values = eoi.spectrum.singular_values(run.linear, X[:4])
    expected = (1 + EPSILON) ** (-run.norms / 2)
    np.testing.assert_allclose(values, np.full((4, INPUTS), expected), rtol=1e-5)


# ------------------------------------------------- convolutions with their outputs in front


def outputs_last(tree):
    """Bring kernels (outputs, inputs, *taps) into the order of this library."""
    return jax.tree.map(lambda w: jnp.moveaxis(w, (0, 1), (-1, -2)) if w.ndim > 2 else w, tree)


def outputs_first(tree):
    return jax.tree.map(lambda w: jnp.moveaxis(w, (-1, -2), (0, 1)) if w.ndim > 2 else w, tree)


@pytest.mark.slow
def test_convolutions_of_equinox():
    conv = eqx.nn.Conv1d(4, 6, 3, padding="SAME", padding_mode="CIRCULAR", key=KEY)
    params, static = eqx.partition(conv, eqx.is_inexact_array)
    start = eoi.exact_orthogonal(
        KEY, outputs_last(params), DENSITY, layout=lambda path, leaf: Layout()
    )
    params, mask = outputs_first(start)
    assert mask.weight.shape == conv.weight.shape == (6, 4, 3)
    assert mask.weight.sum() == round(DENSITY * conv.weight.size)
    x = jax.random.normal(KEY, (1, 4, 5))
    values = eoi.spectrum.singular_values(eqx.combine(params, static), x)
    np.testing.assert_allclose(values, np.ones((1, 4 * 5)), rtol=1e-5)
    tx = eoi.static_sparse(INNER, mask)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    trained = optax.apply_updates(params, updates).weight
    np.testing.assert_array_equal(trained != 0, mask.weight)


def of_equinox(build):
    return lambda: eqx.filter(build(key=KEY), eqx.is_inexact_array)


def of_linen(module):
    return lambda: module.init(KEY, jnp.ones((1, 2, 4)))["params"]


def of_nnx(build):
    return lambda: nnx.state(build(rngs=nnx.Rngs(0)), nnx.Param)


def of_haiku(build):
    def unroll(x):
        core = build()
        return hk.dynamic_unroll(core, x, core.initial_state(2))[0]

    return lambda: hk.transform(unroll).init(KEY, jnp.ones((3, 2, 4)))


def of_torch(*names):
    return lambda: {name: jnp.ones((4, 4)) for name in names} | {"rnn.bias_hh_l0": jnp.ones(4)}


# Each network, and how many matrices it has.
RECURRENT = {
    "equinox-gru": (of_equinox(lambda key: eqx.nn.GRUCell(4, 6, key=key)), 2),
    "equinox-lstm": (of_equinox(lambda key: eqx.nn.LSTMCell(4, 6, key=key)), 2),
    "equinox-attention": (of_equinox(lambda key: eqx.nn.MultiheadAttention(2, 4, key=key)), 4),
    "linen-lstm": (of_linen(nn.RNN(nn.OptimizedLSTMCell(6))), 8),
    "linen-gru": (of_linen(nn.RNN(nn.GRUCell(6))), 6),
    "linen-simple": (of_linen(nn.RNN(nn.SimpleCell(6))), 2),
    "nnx-gru": (of_nnx(lambda rngs: nnx.GRUCell(4, 6, rngs=rngs)), 2),
    "nnx-lstm": (of_nnx(lambda rngs: nnx.LSTMCell(4, 6, rngs=rngs)), 8),
    "haiku-gru": (of_haiku(lambda: hk.GRU(6)), 2),
    "haiku-lstm": (of_haiku(lambda: hk.LSTM(6)), 1),
    "torch-lstm": (of_torch("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_hr_l0"), 3),
    "torch-backwards": (of_torch("weight_ih_l1_reverse", "weight_hh_l1_reverse"), 2),
    "torch-attention": (of_torch("self_attn.in_proj_weight", "self_attn.out_proj.weight"), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(("build", "number"), RECURRENT.values(), ids=RECURRENT)
def test_a_network_has_the_density_that_was_asked_for(build, number):
    params = build()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        mask = eoi.masks.random(KEY, params, 0.25)
    assert seen == []
    matrices = [leaf for leaf in jax.tree.leaves(eoi.masks.apply(mask, params)) if leaf.ndim == 2]
    assert len(matrices) == number
    assert sum(int((leaf != 0).sum()) for leaf in matrices) == sum(m.size // 4 for m in matrices)


@pytest.mark.slow
def test_recurrent_kernels_of_equinox_start_orthogonal():
    params = RECURRENT["equinox-lstm"][0]()
    start = eoi.exact_orthogonal(KEY, params, 0.3)
    assert gram_error(start.params.weight_hh) < 1e-5
    assert gram_error(start.params.weight_ih) < 1e-5


DENSE = {
    "lora": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))},
    "hand": {"W1": jnp.ones((4, 4)), "mixing": jnp.ones((2, 4, 4))},
    "list": [jnp.ones((4, 2)), jnp.ones((2, 2, 4))],
    "boxed": {"core": nn.Partitioned(jnp.ones((4, 2)), ("in", "out"))},
}
MAKERS = {
    "support": eoi.masks.support,
    "random": lambda params: eoi.masks.random(KEY, params, 0.5),
    "adopt": lambda params: eoi.masks.adopt({"layer": {"kernel": np.ones((4, 4))}}, params),
    "uniform": lambda params: eoi.budgets.uniform(params, 0.5),
    "magnitude": eoi.criteria.magnitude,
    "prune": lambda params: eoi.criteria.prune(
        lambda params: eoi.criteria.magnitude(params), params, 0.5, num_steps=2
    ),
    "eoi": lambda params: eoi.exact_orthogonal(KEY, params, 0.5),
    "sao": lambda params: eoi.sparsity_aware_orthogonal(KEY, params, 0.5),
    "redraw": lambda params: eoi.networks.redraw(KEY, params, jax.nn.initializers.orthogonal()),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("maker", "name"),
    [*((maker, "lora") for maker in MAKERS), *(("support", name) for name in DENSE)],
)
def test_one_warning_names_the_matrices_that_stay_dense(maker, name):
    params = {"layer": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones((2, 2))}, "other": DENSE[name]}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        MAKERS[maker](params)
    [found] = seen
    assert found.category is UserWarning
    assert found.filename == __file__
    paths = jax.tree_util.tree_leaves_with_path({"other": DENSE[name]})
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        for path, _ in paths
    ]
    assert all(name in str(found.message) for name in [*names, "where="])
    assert "layer" not in str(found.message)


def test_a_warning_names_five_and_counts_the_rest():
    params = {"kernel": jnp.ones((4, 4))} | {f"W{i}": jnp.ones((2, 3)) for i in range(8)}
    with pytest.warns(UserWarning, match=r"^W0, W1, W2, W3, W4 and 3 more: ") as seen:
        eoi.budgets.erdos_renyi(params, 0.5)
    assert len(seen) == 1


def test_what_is_dense_by_its_name_its_shape_or_the_users_word_is_not_named():
    dense = {
        "embedding": jnp.ones((9, 4)),
        "embed": {"embeddings": jnp.ones((9, 4)), "pos_embed": jnp.ones((1, 9, 4))},
        "position": jnp.ones((9, 4)),
        "norm": {"scale": jnp.ones((3, 4)), "offset": jnp.ones((3, 4)), "scale1": jnp.ones((3, 4))},
        "bias": jnp.ones((3, 4)),
        "b": jnp.ones((3, 4)),
        "b1": jnp.ones((3, 4)),
        "bias_hh_l0": jnp.ones((3, 4)),
        "running_mean": jnp.ones((3, 4)),
        "token": jnp.ones((1, 1, 4)),
        "u": jnp.ones((1, 4)),
        "count": jnp.ones((3, 4), jnp.int32),
        "name": "text",
    }
    params = {"kernel": jnp.ones((4, 4)), **dense}
    mask = eoi.masks.random(KEY, {k: v for k, v in params.items() if k != "name"}, 0.5)
    assert [path[-1].key for path, m in jax.tree_util.tree_leaves_with_path(mask) if m.ndim] == [
        "kernel"
    ]
    eoi.budgets.uniform(params, 0.5)
    # Under a rule of the user no leaf is forgotten.
    named = {"kernel": jnp.ones((4, 4)), "W": jnp.ones((4, 4))}
    for where in (
        lambda path, leaf: eoi.masks.is_kernel(path, leaf),
        lambda path, leaf: path == (DictKey("W"),),
    ):
        eoi.masks.support(named, where=where)
    # Measures name what they have measured.
    assert [*eoi.spectrum.kernel_orthogonality_errors(named)] == ["kernel"]
