"""Laws of budgets: exact totals, never above 1, and the published recipe before rounding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from eoi_jax import budgets, masks
from eoi_jax.typing import Layout

MLP7 = [(784, 100), *[(100, 100)] * 5, (100, 10)]
RESNET32 = [
    (3, 3, 3, 16),
    *[(3, 3, 16, 16)] * 10,
    *[(3, 3, 16, 32), *[(3, 3, 32, 32)] * 9, (1, 1, 16, 32)],
    *[(3, 3, 32, 64), *[(3, 3, 64, 64)] * 9, (1, 1, 32, 64)],
    (64, 10),
]
# Its first and last layers are so small that they are dense at 0.3, and the second soon after.
CONVS = [(3, 3, 3, 8), (3, 3, 8, 16), (5, 64, 128), (3, 3, 128, 128), (128, 2)]
NETS = {"mlp7": MLP7, "resnet32": RESNET32, "convs": CONVS}

RATIOS = {
    "uniform": lambda shape: 1.0,
    "erdos_renyi": lambda shape: (shape[-2] + shape[-1]) / (shape[-2] * shape[-1]),
    "erdos_renyi_kernel": lambda shape: np.sum(shape) / np.prod(shape),
}


def tree_of(shapes):
    return [
        {
            "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
            "bias": jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
        }
        for shape in shapes
    ]


def kernels_of(densities):
    assert all(type(layer["bias"]) is float and layer["bias"] == 1.0 for layer in densities)
    return np.array([layer["kernel"] for layer in densities])


def sizes_of(shapes):
    return np.array([int(np.prod(shape)) for shape in shapes])


def published(shapes, target, ratio):
    """The recipe of Evci et al.: while a layer exceeds 1, make those of the largest ratio dense."""
    sizes, ratios, dense = sizes_of(shapes), [ratio(shape) for shape in shapes], set()
    while len(dense) < len(shapes):
        free = [index for index in range(len(shapes)) if index not in dense]
        needed = target - sum(sizes[index] for index in dense)
        epsilon = needed / sum(ratios[index] * sizes[index] for index in free)
        largest = max(ratios[index] for index in free)
        if epsilon * largest <= 1:
            break
        dense |= {index for index in free if ratios[index] == largest}
    return np.array([1.0 if i in dense else epsilon * r for i, r in enumerate(ratios)])


def test_the_figures_of_mlp7():
    found = kernels_of(budgets.erdos_renyi(tree_of(MLP7), 0.1))
    expected = [0.0732, *[0.1298] * 5, 0.7138]
    # A count within 1 of a quota moves a density by at most one over the size.
    assert (np.abs(found - expected) < 5e-5 + 1 / sizes_of(MLP7)).all()
    quotas = published(MLP7, 12940, RATIOS["erdos_renyi"])
    np.testing.assert_allclose(quotas, expected, atol=5e-5)
    assert round(found @ sizes_of(MLP7)) == 12940


@settings(max_examples=30)
@given(density=st.floats(1e-4, 1.0))
@pytest.mark.parametrize("rule", RATIOS)
@pytest.mark.parametrize("net", NETS)
def test_each_layer_is_within_one_weight_of_the_published_recipe(net, rule, density):
    shapes, sizes = NETS[net], sizes_of(NETS[net])
    found = kernels_of(getattr(budgets, rule)(tree_of(shapes), density))
    target = np.floor(density * sizes.sum() + 0.5)
    quotas = published(shapes, target, RATIOS[rule]) * sizes
    counts = found * sizes
    assert (np.abs(counts - quotas) < 1 + 1e-6).all()
    # Largest remainders: whatever was rounded up had no smaller one than what was not.
    up, down = counts > quotas + 1e-5, counts < quotas - 1e-5
    if up.any() and down.any():
        remainders = quotas - np.floor(quotas)
        assert remainders[up].min() >= remainders[down].max() - 1e-5


@pytest.mark.parametrize(("rule", "dense"), [("erdos_renyi", 2), ("erdos_renyi_kernel", 2)])
def test_layers_that_would_exceed_one_are_dense(rule, dense):
    found = kernels_of(getattr(budgets, rule)(tree_of(CONVS), 0.3))
    assert (found <= 1).all()
    assert (found == 1).sum() >= dense
    assert (found < 1).any()


@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple), min_size=1),
    density=st.floats(0.0, 1.0, exclude_min=True),
    rule=st.sampled_from(sorted(RATIOS)),
)
@settings(max_examples=150)
def test_counts_are_integers_that_sum_to_the_budget(shapes, density, rule):
    sizes = sizes_of(shapes)
    target = np.floor(density * sizes.sum() + 0.5)
    if target == 0:
        with refuses(f"density={density}"):
            getattr(budgets, rule)(tree_of(shapes), density)
        return
    found = kernels_of(getattr(budgets, rule)(tree_of(shapes), density))
    assert ((found >= 0) & (found <= 1)).all()
    counts = np.floor(found * sizes + 0.5)
    assert counts.sum() == target
    np.testing.assert_array_equal(counts / sizes, found)


@pytest.mark.parametrize("rule", RATIOS)
def test_masks_meet_the_budgets(rule):
    params = tree_of([(7, 5), (1, 35), (5, 7, 1), (7, 5)])
    found = getattr(budgets, rule)(params, 0.37)
    mask = masks.random(jax.random.key(0), params, found)
    assert sum(int(layer["kernel"].sum()) for layer in mask) == round(0.37 * 140)
    for layer, density in zip(mask, kernels_of(found), strict=True):
        assert int(layer["kernel"].sum()) == round(density * layer["kernel"].size)


@pytest.mark.parametrize("rule", RATIOS)
@pytest.mark.parametrize("stack", [(6,), (2, 3)])
def test_a_stack_counts_as_its_layers(rule, stack):
    def layout(path, leaf):
        return Layout(batch_axes=len(stack) if leaf.shape[-2:] == (9, 4) else 0)

    apart = tree_of([*[(9, 4)] * 6, (4, 30), (3, 4, 4)])
    together = tree_of([(*stack, 9, 4), (4, 30), (3, 4, 4)])
    expected = kernels_of(getattr(budgets, rule)(apart, 0.231))
    found = getattr(budgets, rule)(together, 0.231, layout=layout)
    assert found[0]["kernel"].shape == stack
    assert found[0]["kernel"].dtype == np.float64
    np.testing.assert_array_equal(found[0]["kernel"].ravel(), expected[:6])
    np.testing.assert_array_equal([found[1]["kernel"], found[2]["kernel"]], expected[6:])
    assert rule == "uniform" or len(set(expected)) > 2
    # Each layer of the stack gets its own count.
    mask = masks.random(jax.random.key(0), together[0], found[0])
    counts = np.asarray(mask["kernel"].sum((-2, -1))).ravel()
    np.testing.assert_array_equal(counts, np.round(expected[:6] * 36))


def test_equal_remainders_go_in_the_order_of_the_tree():
    found = budgets.uniform([{"kernel": jnp.ones((3, 3))} for _ in range(4)], 0.5)
    assert [round(9 * layer["kernel"]) for layer in found] == [5, 5, 4, 4]


def test_erdos_renyi_reads_channels_and_its_kernel_form_the_window_too():
    params = tree_of([(3, 3, 100, 200), (100, 200), (5, 5, 400, 400)])
    conv, dense, _ = kernels_of(budgets.erdos_renyi(params, 0.01))
    np.testing.assert_allclose(conv, dense, rtol=1e-3)
    conv, dense, _ = kernels_of(budgets.erdos_renyi_kernel(params, 0.01))
    np.testing.assert_allclose(conv / dense, 306 / 300 / 9, rtol=1e-3)


@pytest.mark.parametrize("rule", RATIOS)
def test_all_or_no_weights(rule):
    share = getattr(budgets, rule)
    assert (kernels_of(share(tree_of(RESNET32), 1.0)) == 1).all()
    params = {"kernel": jnp.ones((0, 3)), "other": {"kernel": jnp.ones((2, 2))}}
    assert share(params, 0.5) == {"kernel": 1.0, "other": {"kernel": 0.5}}


@pytest.mark.parametrize("rule", RATIOS)
def test_arrays_and_shapes_give_one_answer(rule):
    params = [{k: jnp.ones(s.shape) for k, s in layer.items()} for layer in tree_of(MLP7)]
    share = getattr(budgets, rule)
    chex.assert_trees_all_equal(share(params, 0.2), share(tree_of(MLP7), 0.2))
    # A traced tree has shapes as well.
    seen = []
    jax.eval_shape(lambda tree: seen.append(share(tree, 0.2)), params)
    chex.assert_trees_all_equal(seen[0], share(params, 0.2))


KERNEL = {"kernel": jnp.ones((4, 5))}


@pytest.mark.parametrize("rule", RATIOS)
@pytest.mark.parametrize(
    ("named", "call"),
    [
        ("density=0.0", lambda f: f(KERNEL, 0.0)),
        ("density=1.2", lambda f: f(KERNEL, 1.2)),
        ("density=0.02", lambda f: f(KERNEL, 0.02)),
        ("density=", lambda f: jax.jit(lambda d: f(KERNEL, d))(0.5)),
        ("params=['bias']", lambda f: f({"bias": jnp.ones((4, 5))}, 0.5)),
        ("params=['kernel']", lambda f: f(KERNEL, 0.5, where=lambda path, leaf: False)),
        (
            "layout(kernel).batch_axes=2",
            lambda f: f(KERNEL, 0.5, layout=lambda path, leaf: Layout(batch_axes=2)),
        ),
        (
            "layout(kernel).groups=0",
            lambda f: f(KERNEL, 0.5, layout=lambda path, leaf: Layout(groups=0)),
        ),
    ],
)
def test_errors_name_the_argument(rule, named, call):
    with refuses(named):
        call(getattr(budgets, rule))


@pytest.mark.parametrize("rule", budgets.RULES)
def test_kernels_without_entries_are_dense(rule):
    params = {"empty": {"kernel": jnp.ones((0, 4))}, "also": {"kernel": jnp.ones((3, 0))}}
    assert jax.tree.leaves(budgets.RULES[rule](params, 0.5)) == [1.0, 1.0]


def test_the_message_of_a_density_that_keeps_nothing_names_the_smallest_that_keeps_one():
    params = {"kernel": jnp.ones((10, 10))}
    with refuses("density", "0.004", "[0.005, 1]"):
        budgets.uniform(params, 0.004)
    assert budgets.uniform(params, 0.005) == {"kernel": 0.01}
