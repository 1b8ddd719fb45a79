"""Fan axes: each kernel, as ``(inputs, outputs)``, is exactly what a matrix alone would be."""

import functools
import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import gram_error, refuses
from jax.tree_util import DictKey, GetAttrKey

import eoi_jax as eoi
from eoi_jax.typing import Layout

KEY = jax.random.key(3)
DENSITY = 0.25
D, HEADS, HEAD = 32, 4, 8

QUERY = Layout(in_axis=0, out_axis=(1, 2))
OUT = Layout(in_axis=(0, 1), out_axis=2)
QUERY_PER_HEAD = Layout(in_axis=0, out_axis=2, batch_axis=1)
OUT_PER_HEAD = Layout(in_axis=1, out_axis=2, batch_axis=0)
# A kernel's shape and layout; how einsum brings one layer into (matrices, inputs, outputs); and the
# shape of each matrix.
CASES = {
    "query": ((D, HEADS, HEAD), QUERY, "ihk->ihk", (1, D, D)),
    "query-grouped": ((D, 2, HEAD), QUERY, "ihk->ihk", (1, D, 16)),
    "query-per-head": ((D, HEADS, HEAD), QUERY_PER_HEAD, "ihk->hik", (HEADS, D, HEAD)),
    "out": ((HEADS, HEAD, D), OUT, "hko->hko", (1, D, D)),
    "out-per-head": ((HEADS, HEAD, D), OUT_PER_HEAD, "hko->hko", (HEADS, HEAD, D)),
    "fused": (
        (D, 3, HEADS, HEAD),
        Layout(in_axis=0, out_axis=(2, 3), batch_axis=1),
        "ithk->tihk",
        (3, D, D),
    ),
    "outputs-first": ((48, D), Layout(in_axis=1, out_axis=0), "oi->io", (1, D, 48)),
    "experts": ((3, D, 16), Layout(batch_axis=0), "eio->eio", (3, D, 16)),
    "swapped-heads": ((D, HEADS, HEAD), Layout(in_axis=0, out_axis=(2, 1)), "ihk->ikh", (1, D, D)),
}


def matrices(kernel, equation, shape):
    return np.einsum(equation, np.asarray(kernel, np.float64)).reshape(shape)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "layout", "equation", "matrix"), CASES.values(), ids=CASES)
def test_dense_draws_each_matrix_as_it_would_be_drawn_alone(shape, layout, equation, matrix):
    init = eoi.dense(
        DENSITY,
        scale=1.5,
        in_axis=layout.in_axis,
        out_axis=layout.out_axis,
        batch_axis=layout.batch_axis,
    )
    found = matrices(init(KEY, shape), equation, matrix)
    keys = [KEY] if layout.batch_axis == () else jax.random.split(KEY, matrix[0])
    for key, one in zip(keys, found, strict=True):
        expected = eoi.orthogonal(key, matrix[1:], DENSITY, scale=1.5)
        np.testing.assert_array_equal(one, expected)
        assert gram_error(one, 1.5) < 1e-5
    if len(keys) > 1:
        assert (found[0] != found[1]).any()
    fans = [layout.in_axis, layout.out_axis, layout.batch_axis]
    jax_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", *fans)
    assert jax_init(KEY, shape).shape == shape


@pytest.mark.slow
def test_dense_by_default_reads_all_axes_but_the_last_as_inputs():
    expected = eoi.orthogonal(KEY, (3, 4, 20), 0.2)
    np.testing.assert_array_equal(eoi.dense(0.2)(KEY, (3, 4, 20)), expected)
    moved = eoi.dense(0.2, in_axis=1, out_axis=0)(KEY, (20, 12))
    np.testing.assert_array_equal(moved.T, expected.reshape(12, 20))


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "degree"), [("tanh", 4), ("relu", 4)])
def test_sao_takes_the_axes_of_dense(activation, degree):
    init = functools.partial(eoi.initializers.sao_dense, degree / D, activation=activation)
    whole = init()(KEY, (D, D))
    query = init(in_axis=0, out_axis=(1, 2))(KEY, (D, HEADS, HEAD))
    np.testing.assert_array_equal(query.reshape(D, D), whole)
    fused = init(in_axis=0, out_axis=(2, 3), batch_axis=1)(KEY, (D, 3, HEADS, HEAD))
    for key, one in zip(jax.random.split(KEY, 3), jnp.moveaxis(fused, 1, 0), strict=True):
        np.testing.assert_array_equal(one.reshape(D, D), init()(key, (D, D)))


@pytest.fixture(scope="module")
def start():
    params = {name: {"kernel": jnp.zeros(CASES[name][0])} for name in ALONE}
    params |= {f"scanned {name}": {"kernel": jnp.zeros((2, *CASES[name][0]))} for name in SCANNED}
    return eoi.exact_orthogonal(KEY, params, DENSITY, layout=layout_of)


ALONE = ["query", "query-per-head", "out", "outputs-first"]
SCANNED = ["query", "out-per-head", "fused"]


def layout_of(path, leaf):
    name = path[0].key
    scanned = name.startswith("scanned ")
    return CASES[name.removeprefix("scanned ")][1]._replace(batch_axes=int(scanned))


@pytest.mark.slow
def test_exact_orthogonal_makes_each_matrix_an_isometry_and_counts_exactly(start):
    for name, leaves in start.params.items():
        _, _, equation, matrix = CASES[name.removeprefix("scanned ")]
        scanned = name.startswith("scanned ")
        kernel, mask = leaves["kernel"], start.mask[name]["kernel"]
        for layer, layer_mask in zip(
            kernel if scanned else [kernel], mask if scanned else [mask], strict=True
        ):
            assert layer_mask.sum() == round(DENSITY * layer.size)
            assert not np.any(np.asarray(layer)[~np.asarray(layer_mask)])
            found = matrices(layer, equation, matrix)
            assert max(gram_error(one) for one in found) < 1e-5
            counts = [np.count_nonzero(one) for one in found]
            most = round(DENSITY * layer.size) // len(found)
            assert all(most - max(matrix[1:]) < count <= most for count in counts)
    densities = eoi.masks.densities(start.mask, layout=layout_of)
    assert densities["scanned fused"]["kernel"].tolist() == [DENSITY] * 2
    errors = eoi.spectrum.kernel_orthogonality_errors(start.params, layout=layout_of)
    assert max(float(jnp.max(error)) for error in errors.values()) < 1e-5
    assert errors["scanned query/kernel"].shape == (2,)
    values = eoi.spectrum.kernel_singular_values(start.params, layout=layout_of)
    assert values["query-per-head/kernel"].shape == (HEADS * HEAD,)
    assert values["scanned fused/kernel"].shape == (2, 3 * D)


@pytest.mark.slow
def test_exact_orthogonal_draws_what_it_draws_for_the_flattened_kernel(start):
    """Leaves keep their places in the tree, and so their keys."""
    flat = {}
    for name, leaves in start.params.items():
        kernel, (number, inputs, outputs) = (
            leaves["kernel"],
            CASES[name.removeprefix("scanned ")][3],
        )
        stack = kernel.shape[: int(name.startswith("scanned "))]
        flat[name] = {"kernel": jnp.zeros((*stack, inputs, number * outputs))}

    def flat_layout(path, leaf):
        number = CASES[path[0].key.removeprefix("scanned ")][3][0]
        return Layout(batch_axes=leaf.ndim - 2, groups=number)

    expected = eoi.exact_orthogonal(KEY, flat, DENSITY, layout=flat_layout)
    for tree, expected_tree in zip(start, expected, strict=True):
        for name, leaves in tree.items():
            _, _, equation, (number, inputs, outputs) = CASES[name.removeprefix("scanned ")]
            whole = np.asarray(expected_tree[name]["kernel"]).reshape(-1, inputs, number, outputs)
            stacked = np.asarray(leaves["kernel"]).reshape(
                len(whole), *CASES[name.removeprefix("scanned ")][0]
            )
            for layer, expected_layer in zip(stacked, whole, strict=True):
                found = np.einsum(equation, layer.astype(np.float32))
                np.testing.assert_array_equal(
                    found.reshape(number, inputs, outputs), expected_layer.swapaxes(0, 1)
                )


@pytest.mark.slow
def test_other_starts_read_the_same_axes():
    shape = (D, HEADS, HEAD)
    params = {"a": {"kernel": jnp.zeros(shape)}, "b": {"kernel": jnp.zeros((HEADS, HEAD, D))}}
    layouts = {"a": QUERY_PER_HEAD, "b": OUT}

    def layout(path, leaf):
        return layouts[path[0].key]

    drawn = eoi.networks.redraw(KEY, params, jax.nn.initializers.orthogonal(), layout=layout)
    assert max(gram_error(drawn["a"]["kernel"][:, head]) for head in range(HEADS)) < 1e-5
    assert gram_error(drawn["b"]["kernel"].reshape(D, D)) < 1e-5

    mask = eoi.masks.random(KEY, drawn, 0.7)
    solved = eoi.approximate_isometry(drawn, mask, num_steps=50, layout=layout).params
    for name, stacked in (
        ("a", lambda kernel: jnp.moveaxis(kernel, 1, 0)),
        ("b", lambda kernel: kernel.reshape(1, D, D)),
    ):
        kernel, kernel_mask = (stacked(tree[name]["kernel"]) for tree in (drawn, mask))
        alone = eoi.isometry.approximate_isometry(kernel, kernel_mask, num_steps=50, batch_axes=1)
        np.testing.assert_array_equal(stacked(solved[name]["kernel"]), alone)

    sao = eoi.sparsity_aware_orthogonal(KEY, params, 4 / D, layout=layout)
    out = sao.mask["b"]["kernel"].reshape(D, D)
    assert set(out.sum(0).tolist()) == set(out.sum(1).tolist()) == {4}
    assert sao.mask["a"]["kernel"].all()  # heads are not square: the method leaves them dense
    assert max(gram_error(sao.params["a"]["kernel"][:, head]) for head in range(HEADS)) < 1e-5


@pytest.mark.slow
def test_rescaling_by_unit_counts_along_the_inputs():
    params = {"a": jnp.ones((D, HEADS, HEAD)), "b": jnp.ones((24, D))}
    params = {name: {"kernel": value} for name, value in params.items()}
    layouts = {"a": QUERY, "b": Layout(in_axis=1, out_axis=0)}
    mask = eoi.masks.random(KEY, params, 0.5)
    start = eoi.rescaled(params, mask, per="unit", layout=lambda path, leaf: layouts[path[0].key])
    for name, axis in (("a", 0), ("b", 1)):
        kernel = np.asarray(start.params[name]["kernel"], np.float64)
        kept = np.asarray(start.mask[name]["kernel"]).sum(axis)
        norms = np.linalg.norm(kernel, axis=axis)[kept > 0]
        np.testing.assert_allclose(norms, math.sqrt(D), rtol=1e-5)


@pytest.mark.parametrize("rule", [eoi.budgets.erdos_renyi, eoi.budgets.erdos_renyi_kernel])
def test_budgets_count_the_fans(rule):
    params = {"a": {"kernel": jnp.ones((D, HEADS, HEAD))}, "b": {"kernel": jnp.ones((D, 2 * D))}}
    flat = {**params, "a": {"kernel": jnp.ones((D, HEADS * HEAD))}}
    layouts = {"a": QUERY, "b": Layout()}
    found = rule(params, 0.3, layout=lambda path, leaf: layouts[path[0].key])
    assert found == rule(flat, 0.3)
    # Matrices along a batch axis are those of a stack.
    stack = {**params, "a": {"kernel": jnp.ones((HEADS, D, HEAD))}}
    layouts["a"] = QUERY_PER_HEAD
    found = rule(params, 0.3, layout=lambda path, leaf: layouts[path[0].key])
    layouts["a"] = Layout(batch_axis=0)
    again = rule(stack, 0.3, layout=lambda path, leaf: layouts[path[0].key])
    assert found == again
    layouts["a"] = Layout(batch_axes=1)
    layers = rule(stack, 0.3, layout=lambda path, leaf: layouts[path[0].key])
    assert np.mean(layers["a"]["kernel"]) == pytest.approx(found["a"]["kernel"], abs=1e-3)


# ------------------------------------------------------------------ what the names tell


def linen_params(**options):
    layer = nn.MultiHeadDotProductAttention(num_heads=HEADS, **options)
    return layer.init(KEY, jnp.ones((1, 3, D)))["params"]


def nnx_params():
    layer = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=nnx.Rngs(0))
    return nnx.state(layer, nnx.Param)


def scanned_params():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.MultiHeadDotProductAttention(HEADS, name="attention")(x), None

    scanned = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=2)
    return scanned().init(KEY, jnp.ones((1, 3, D)), None)["params"]


ATTENTION = {
    "linen": (linen_params, 0),
    "linen-normalized": (functools.partial(linen_params, normalize_qk=True), 0),
    "nnx": (nnx_params, 0),
    "linen-scanned": (scanned_params, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize(("build", "stacked"), ATTENTION.values(), ids=ATTENTION)
def test_attention_of_flax_is_known_by_name(build, stacked):
    params = jax.tree.map(jnp.ones_like, build())
    whole = eoi.exact_orthogonal(KEY, params, DENSITY)
    layout = eoi.layouts.by_name(params, per_head=True)
    heads = eoi.exact_orthogonal(KEY, params, DENSITY, layout=layout)
    for start, per_head in ((whole, False), (heads, True)):
        kernels = 0
        for (path, leaf), mask in zip(
            jax.tree_util.tree_leaves_with_path(start.params),
            jax.tree.leaves(start.mask),
            strict=True,
        ):
            names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            if "kernel" not in names:
                assert np.ndim(mask) == 0
                assert (leaf == 1).all()  # biases (heads, k) stay as they are
                continue
            kernels += 1
            kind = ("out" if "out" in names else "query") + "-per-head" * per_head
            _, _, equation, matrix = CASES[kind]
            for layer, layer_mask in zip(
                leaf if stacked else [leaf], mask if stacked else [mask], strict=True
            ):
                assert layer_mask.sum() == round(DENSITY * layer.size)
                assert max(map(gram_error, matrices(layer, equation, matrix))) < 1e-5
        assert kernels == 4
    errors = eoi.spectrum.kernel_orthogonality_errors(whole.params)
    assert max(float(jnp.max(error)) for error in errors.values()) < 1e-5


@pytest.mark.slow
def test_an_initializer_draws_attention_of_flax_as_whole_isometries():
    params = linen_params(kernel_init=eoi.dense(DENSITY))
    for name in ("query", "key", "value", "out"):
        kernel = params[name]["kernel"]
        assert gram_error(kernel.reshape(D, D)) < 1e-5
        assert (kernel != 0).mean() == pytest.approx(DENSITY, abs=1 / (2 * D))


def test_grouped_query_attention_is_known_by_name():
    shapes = {"query": (D, HEADS, HEAD), "key": (D, 2, HEAD), "value": (D, 2, HEAD)}
    shapes["out"] = (HEADS, HEAD, D)
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    start = eoi.exact_orthogonal(KEY, params, DENSITY)
    assert gram_error(start.params["key"]["kernel"].reshape(D, 16)) < 1e-5
    assert gram_error(start.params["out"]["kernel"].reshape(D, D)) < 1e-5


@pytest.mark.slow
def test_equinox_keeps_outputs_first():
    attention = eqx.nn.MultiheadAttention(HEADS, D, key=KEY)
    wide = eqx.nn.Linear(D, 4 * D, key=KEY)
    params = eqx.filter({"attention": attention, "wide": wide}, eqx.is_inexact_array)
    start = eoi.exact_orthogonal(KEY, params, DENSITY, balance_outputs=True)
    for name in ("query_proj", "key_proj", "value_proj", "output_proj"):
        assert gram_error(getattr(start.params["attention"], name).weight) < 1e-5
    weight = np.asarray(start.params["wide"].weight)
    assert gram_error(weight) < 1e-5
    assert np.linalg.norm(weight, axis=1).min() >= 0.5 * math.sqrt(D / (4 * D)) - 1e-6
    layout = eoi.layouts.by_name(params)
    assert layout((GetAttrKey("wide"), GetAttrKey("weight")), weight) == Layout(
        in_axis=1, out_axis=0
    )


def recorded(shapes):
    """A tree of kernels by paths, as another library stores them."""
    tree = {}
    for path, shape in shapes.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.ones(shape)
    return tree


# Names and shapes as transformers 4 has them, of FlaxGPT2Model and FlaxBertModel with 32 features:
# FlaxConv1D of modeling_flax_gpt2.py keeps (outputs, inputs), nn.Dense of BERT (inputs, outputs).
GPT2 = {
    "h/0/ln_1/scale": (D,),
    "h/0/attn/c_attn/kernel": (3 * D, D),
    "h/0/attn/c_attn/bias": (3 * D,),
    "h/0/attn/c_proj/kernel": (D, D),
    "h/0/crossattention/c_attn/kernel": (2 * D, D),
    "h/0/crossattention/q_attn/kernel": (D, D),
    "h/0/mlp/c_fc/kernel": (4 * D, D),
    "h/0/mlp/c_proj/kernel": (D, 4 * D),
    "wte/embedding": (100, D),
}
BERT = {
    "encoder/layer/0/attention/self/query/kernel": (D, D),
    "encoder/layer/0/attention/self/query/bias": (D,),
    "encoder/layer/0/attention/self/key/kernel": (D, D),
    "encoder/layer/0/attention/self/value/kernel": (D, D),
    "encoder/layer/0/attention/output/dense/kernel": (D, D),
    "encoder/layer/0/intermediate/dense/kernel": (D, 4 * D),
    "encoder/layer/0/output/dense/kernel": (4 * D, D),
    "pooler/dense/kernel": (D, D),
    "embeddings/word_embeddings/embedding": (100, D),
}


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [GPT2, BERT], ids=["gpt2", "bert"])
def test_trees_of_hugging_face_are_known_by_name(shapes):
    params = recorded(shapes)
    start = eoi.exact_orthogonal(KEY, params, DENSITY)
    errors = eoi.spectrum.kernel_orthogonality_errors(start.params)
    assert len(errors) == sum(path.endswith("kernel") for path in shapes)
    assert max(map(float, errors.values())) < 1e-5
    if shapes is GPT2:
        layout = eoi.layouts.by_name(params)
        found = jax.tree_util.tree_map_with_path(layout, params)["h"]["0"]
        assert found["mlp"]["c_fc"]["kernel"] == Layout(in_axis=1, out_axis=0)
        assert found["mlp"]["c_proj"]["kernel"] == Layout(in_axis=1, out_axis=0)
        fused = start.params["h"]["0"]["attn"]["c_attn"]["kernel"]
        assert max(map(gram_error, fused.reshape(3, D, D))) < 1e-5
        fused = start.params["h"]["0"]["crossattention"]["c_attn"]["kernel"]  # of keys and values
        assert max(map(gram_error, fused.reshape(2, D, D))) < 1e-5


@pytest.mark.slow
def test_fused_kernels_are_three_isometries():
    params = {
        "inputs": {"c_attn": {"kernel": jnp.ones((D, 3 * D))}},
        "torch": {"self_attn.in_proj_weight": jnp.ones((3 * D, D))},
    }
    start = eoi.exact_orthogonal(KEY, params, DENSITY).params
    inputs, torch = start["inputs"]["c_attn"]["kernel"], start["torch"]["self_attn.in_proj_weight"]
    for part in (*jnp.split(inputs, 3, axis=1), *jnp.split(torch, 3, axis=0)):
        assert gram_error(part) < 1e-5


@pytest.mark.slow
def test_other_starts_draw_fused_kernels_apart():
    params = {"c_attn": {"kernel": jnp.zeros((D, 3 * D))}}
    sao = eoi.sparsity_aware_orthogonal(KEY, params, DENSITY).params
    redrawn = eoi.networks.redraw(KEY, params, jax.nn.initializers.orthogonal())
    shapes = []
    eoi.networks.redraw(
        KEY, params, lambda _, shape, dtype: shapes.append(shape) or jnp.ones(shape)
    )
    for drawn in (sao, redrawn):
        parts = jnp.split(drawn["c_attn"]["kernel"], 3, axis=1)
        assert max(map(gram_error, parts)) < 1e-5
        assert not jnp.allclose(parts[0], parts[1])
    assert set(shapes) == {(D, D)}


def test_gpt2_tells_its_axes_also_beside_kernels_of_pytorch():
    gpt2 = {"c_attn": {"kernel": jnp.ones((8, 24))}, "c_fc": {"kernel": jnp.ones((8, 32))}}
    both = {"a": gpt2, "b": {"self_attn.in_proj_weight": jnp.ones((24, 8))}}
    path = (DictKey("a"), DictKey("c_fc"), DictKey("kernel"))
    assert eoi.layouts.by_name(both)(path, gpt2["c_fc"]["kernel"]) == Layout()


def test_recurrent_kernels_have_outputs_first():
    cell = eqx.filter(eqx.nn.GRUCell(8, 16, key=KEY), eqx.is_inexact_array)
    state_dict = {"rnn.weight_hh_l0": jnp.ones((48, 16)), "attention.q_proj_weight": jnp.eye(8)}
    for tree in (cell, state_dict):
        layout = eoi.layouts.by_name(tree)
        kernels = [
            layout(path, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if leaf.ndim == 2
        ]
        assert kernels == [Layout(in_axis=1, out_axis=0)] * 2
    ones = jax.tree.map(jnp.ones_like, cell)
    weight = eoi.rescaled(ones, eoi.masks.random(KEY, ones, 0.9), per="unit").params.weight_ih
    np.testing.assert_allclose(np.linalg.norm(weight, axis=1), 8**0.5, rtol=1e-5)


def test_starts_refuse_what_may_be_a_stack():
    stack, deep = {"kernel": jnp.zeros((9, 64, 64))}, {"kernel": jnp.zeros((4, 3, 3, 8, 8))}
    normal = jax.nn.initializers.normal()
    for params in (stack, deep):
        mask = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
        for function in (
            lambda params: eoi.networks.redraw(KEY, params, normal),
            lambda params, mask=mask: eoi.rescaled(params, mask),
            lambda params: eoi.exact_orthogonal(KEY, params, DENSITY),
        ):
            with refuses("params[kernel]", str(params["kernel"].shape), "batch_axes=1", "Layout()"):
                function(params)


def test_kernels_that_no_name_explains_are_refused():
    shape = (D, HEADS, HEAD)
    alone = {"query": {"kernel": jnp.zeros(shape)}}
    others = {name: {"kernel": jnp.zeros(shape)} for name in ("query", "key", "value", "out")}
    for params in (alone, others, {"dense": {"kernel": jnp.zeros(shape)}}):
        for function in (
            lambda params: eoi.exact_orthogonal(KEY, params, DENSITY),
            lambda params: eoi.exact_orthogonal(
                KEY, params, DENSITY, layout=eoi.layouts.by_name(params)
            ),
            eoi.spectrum.kernel_orthogonality_errors,
            lambda params: eoi.sparsity_aware_orthogonal(KEY, params, DENSITY),
        ):
            with refuses("/kernel]", str(shape), "in_axis=0, out_axis=(1, 2)", "batch_axes=1"):
                function(params)
    grouped_query = {"c_attn": {"kernel": jnp.zeros((D, D + 2 * HEAD))}}
    with refuses("c_attn/kernel", str((D, D + 2 * HEAD)), "drawn apart", "Layout()"):
        eoi.exact_orthogonal(KEY, grouped_query, DENSITY)
    # Of a stack the rest is one: a layout of the user's own needs only what names do not tell.
    params = {"layers": {"mlp": {"kernel": jnp.zeros((2, 8, 8))}}, "head": {"kernel": jnp.eye(8)}}
    layout = eoi.layouts.by_name(params, batch_axes=lambda path: int(path[0].key == "layers"))
    start = eoi.exact_orthogonal(KEY, params, DENSITY, layout=layout)
    assert start.mask["layers"]["mlp"]["kernel"].sum(axis=(1, 2)).tolist() == [16, 16]
    with refuses("batch_axes=-1"):
        eoi.layouts.by_name(params, batch_axes=-1)


@pytest.mark.parametrize(
    ("axes", "parts"),
    [
        ({"in_axis": 0, "out_axis": (0, 1)}, ["out_axis=(0, 1)", "in_axis=0"]),
        ({"in_axis": 5}, ["in_axis=5"]),
        ({"out_axis": ()}, ["out_axis=()"]),
        ({"batch_axis": -1}, ["batch_axis=-1", "out_axis=-1"]),
        ({"in_axis": "heads"}, ["in_axis='heads'"]),
        ({"batch_axis": 0.5}, ["batch_axis=0.5"]),
    ],
)
def test_axes_out_of_range_are_refused(axes, parts):
    with refuses(*parts):
        eoi.dense(DENSITY, **axes)(KEY, (D, HEADS, HEAD))
    with refuses("layout(kernel)", *parts):
        eoi.exact_orthogonal(
            KEY,
            {"kernel": jnp.zeros((D, HEADS, HEAD))},
            DENSITY,
            layout=lambda path, leaf: Layout(**axes),
        )
