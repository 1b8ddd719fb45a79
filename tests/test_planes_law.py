"""The laws of the planes: what a round of matchings is, and that all that draws keeps its laws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gram_error, refuses

import eoi_jax as eoi
from eoi_jax import givens, planes, rotation, theory
from eoi_jax.planes import independent, matching

KEY = jax.random.key(17)


@pytest.mark.parametrize("size", [2, 3, 8, 9, 50])
def test_each_round_is_a_perfect_matching(size):
    pairs, rounds = size // 2, 6
    drawn = givens.sample(KEY, size, pairs * rounds, planes=matching)
    both = np.stack([drawn.i, drawn.j], axis=1).reshape(rounds, 2 * pairs)
    assert both.min() >= 0
    assert both.max() < size
    for coordinates in both:
        assert len(set(coordinates.tolist())) == 2 * pairs
    if size > 8:
        assert len({tuple(sorted(map(tuple, r.reshape(-1, 2).tolist()))) for r in both}) == rounds


def test_matchings_are_uniform():
    """All three matchings of four coordinates, and all three coordinates that sit out of three."""
    draw = jax.vmap(lambda key: givens.sample(key, 4, 2, planes=matching))
    number = 3000
    rotations = draw(jax.random.split(KEY, number))
    partner = np.where(rotations.i == 0, rotations.j, 0) + np.where(
        rotations.j == 0, rotations.i, 0
    )
    counts = np.bincount(partner.max(axis=1), minlength=4)[1:]
    one = jax.vmap(lambda key: givens.sample(key, 3, 1, planes=matching))
    rotations = one(jax.random.split(KEY, number))
    alone = np.bincount((3 - rotations.i - rotations.j).ravel(), minlength=3)
    spread = 4 * np.sqrt(number * 2 / 9)
    assert (abs(np.stack([counts, alone]) - number / 3) < spread).all()


def test_rotations_depend_on_the_key_and_the_index_alone():
    whole = givens.sample(KEY, 9, 40, planes=matching)
    for first, number in [(0, 7), (3, 1), (5, 20), (4, 0), (39, 1)]:
        part = givens.sample(KEY, 9, number, planes=matching, first=first)
        for got, wanted in zip(part, whole, strict=True):
            np.testing.assert_array_equal(got, wanted[first : first + number])
    last = givens.sample(KEY, 9, 5, planes=matching, first=2**32 - 5)
    earlier = givens.sample(KEY, 9, 9, planes=matching, first=2**32 - 9)
    np.testing.assert_array_equal(last.i, earlier.i[4:])
    # The angles are those of independent planes.
    np.testing.assert_array_equal(whole.theta, givens.sample(KEY, 9, 40).theta)


def test_a_traced_size_and_its_capacity_change_nothing():
    @functools.partial(jax.jit, static_argnames="capacity")
    def draw(size, first, capacity):
        return givens.sample(KEY, size, 30, planes=matching, first=first, capacity=capacity)

    for size, capacity in itertools.product([2, 5, 12], [12, 21]):
        wanted = givens.sample(KEY, size, 30, planes=matching, first=2)
        for got, value in zip(draw(size, 2, capacity), wanted, strict=True):
            np.testing.assert_array_equal(got, value)


@pytest.mark.parametrize("shape", [(64, 64), (33, 33), (20, 70), (70, 20)])
def test_orthogonal_at_the_density_asked_for(shape):
    draw = jax.jit(lambda density: eoi.orthogonal(KEY, shape, density, planes=matching))
    for density in (1 / max(shape), 0.07, 0.2, 0.55, 1.0):
        matrix = draw(density)
        assert gram_error(matrix) < 1e-5
        assert abs(np.count_nonzero(matrix) / matrix.size - density) <= 0.5001 / max(shape)
    eager = eoi.orthogonal(KEY, shape, 0.2, planes=matching)
    np.testing.assert_allclose(eager, draw(0.2), atol=1e-6)
    np.testing.assert_array_equal(eager != 0, draw(0.2) != 0)


def test_a_batch_is_the_loop():
    keys = jax.random.split(KEY, 3)
    draw = functools.partial(eoi.orthogonal, shape=(21, 16), density=0.3, planes=matching)
    for batched, key in zip(jax.vmap(draw)(keys), keys, strict=True):
        np.testing.assert_array_equal(batched != 0, draw(key) != 0)
        np.testing.assert_allclose(batched, draw(key), atol=1e-6)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rows_and_columns_of_full_rounds_are_balanced(rounds):
    size = 256
    rotations = givens.sample(KEY, size, rounds * size // 2, planes=matching)
    support = np.asarray(givens.support(rotations, (size, size)))
    waves = givens.waves(rotations, size)
    np.testing.assert_array_equal(waves, np.arange(len(waves)) // (size // 2))
    for counts in (support.sum(axis=0), support.sum(axis=1)):
        assert counts.max() <= 2**rounds
        assert counts.min() >= 2
        assert np.median(counts) == 2**rounds
    one_hot = np.asarray(givens.support(givens.sample(KEY, size, len(waves)), (size, size)))
    assert one_hot.sum(axis=1).min() == 1  # those of independent planes are not


@pytest.mark.parametrize("size", [2, 3, 5, 8, 17, 40])
def test_theory_is_the_mean_of_simulations(size):
    """Over keys, at every number of rotations: full rounds and parts of rounds."""
    number, length = 600, 4 * size // 2

    def count(key):
        rotations = givens.sample(key, size, length, planes=matching)
        return givens.num_nonzeros(rotations, (size, size))

    counts = np.asarray(jax.vmap(count)(jax.random.split(KEY, number)), float) / size**2
    mean, error = counts.mean(axis=0), counts.std(axis=0) / np.sqrt(number)
    expected = [theory.expected_density(size, t, planes=matching) for t in range(length + 1)]
    assert (abs(mean - expected) <= 4 * error + 1e-9).all()


@pytest.mark.parametrize("size", [64, 101, 500, 999])
def test_the_closed_form_is_near_the_chain(size):
    for rotations in np.linspace(0, 8 * size, 41).astype(int).tolist():
        exact, closed = (
            theory.expected_density(size, rotations, method=method, planes=matching)
            for method in ("exact", "closed_form")
        )
        assert abs(exact - closed) <= 0.15 / size
    full, closed_full = (
        theory.num_rotations(size, 1.0, method=method, planes=matching)
        for method in ("exact", "closed_form")
    )
    assert closed_full == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize("size", [2, 3, 9, 64, 2000])
def test_no_other_number_of_rotations_is_closer(size):
    for density in np.linspace(1 / size, 0.97, 23).tolist():
        best = theory.num_rotations(size, density, planes=matching)
        distance = [
            abs(theory.expected_density(size, t, planes=matching) - density)
            for t in (best, best + 1, max(best - 1, 0))
        ]
        assert distance[0] <= min(distance) + 1e-9


def test_hadamard_angles_make_non_zeros_of_one_size():
    angles = jax.vmap(givens.hadamard_angle)(jax.random.split(KEY, 400))
    degrees, counts = np.unique(np.round(np.degrees(angles)), return_counts=True)
    assert degrees.tolist() == [-135, -45, 45, 135]
    assert counts.min() > 60
    size, rounds = 256, 3
    rotations = givens.sample(
        KEY, size, rounds * size // 2, planes=matching, angles=givens.hadamard_angle
    )
    matrix = np.asarray(rotation.as_matrix(rotations, size))
    multiples = matrix * np.sqrt(2) ** rounds
    np.testing.assert_allclose(multiples, multiples.round(), atol=1e-5)
    assert set(abs(multiples).round().ravel().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("law", [independent, matching])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_hadamard_angles_cancel_is_an_exact_zero(law, dtype):
    """After many meetings of supports too: nothing remains of an entry but rounding errors."""
    options = {"planes": law, "angles": givens.hadamard_angle, "dtype": dtype}
    matrix = eoi.orthogonal(KEY, (32, 32), 0.5, **options)
    entries = abs(np.asarray(matrix, np.float64))
    assert entries[entries > 0].min() > 1e-3
    if dtype == "float32":
        assert gram_error(matrix) < 1e-5
        assert abs((entries > 0).mean() - 0.5) < 0.02


def test_networks_of_matchings():
    shapes = {"a": (40, 30), "b": (3, 3, 8, 16), "c": (3, 2)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    start = eoi.exact_orthogonal(KEY, params, 0.5, planes=matching)
    for name, shape in shapes.items():
        kernel, mask = start.params[name]["kernel"], start.mask[name]["kernel"]
        assert int(mask.sum()) == int(np.floor(0.5 * np.prod(shape) + 0.5))
        assert not (kernel[~mask] != 0).any()
        assert gram_error(kernel[1, 1] if name == "b" else kernel) < 1e-5
    same = eoi.exact_orthogonal(KEY, params, 0.5, planes=independent)
    default = eoi.exact_orthogonal(KEY, params, 0.5)
    assert (same.mask["a"]["kernel"] == default.mask["a"]["kernel"]).all()
    assert (same.mask["a"]["kernel"] != start.mask["a"]["kernel"]).any()


def test_initializers_take_the_law():
    kernel = eoi.dense(0.2, planes=matching)(KEY, (32, 32))
    np.testing.assert_array_equal(kernel, eoi.orthogonal(KEY, (32, 32), 0.2, planes=matching))
    kernel = eoi.conv(0.2, planes=matching)(KEY, (3, 3, 32, 32))
    assert gram_error(kernel[1, 1]) < 1e-5
    assert (np.count_nonzero(kernel[1, 1], axis=1) >= 2).all()


@pytest.mark.parametrize("wrong", ["matching", None, 3, lambda *args: args])
def test_what_is_no_law_of_planes_is_refused(wrong):
    params = {"kernel": jnp.ones((4, 4))}
    for draw in (
        lambda: givens.sample(KEY, 8, 3, planes=wrong),
        lambda: eoi.orthogonal(KEY, (8, 8), 0.5, planes=wrong),
        lambda: eoi.dense(0.5, planes=wrong),
        lambda: eoi.conv(0.5, planes=wrong),
        lambda: eoi.exact_orthogonal(KEY, params, 0.5, planes=wrong),
        lambda: theory.expected_density(8, 3, planes=wrong),
        lambda: theory.num_rotations(8, 0.5, planes=wrong),
        lambda: planes.check(wrong),
    ):
        with refuses("planes="):
            draw()


def test_a_capacity_is_needed_and_large_enough():
    with refuses("capacity=", "size=9"):
        givens.sample(KEY, 9, 3, planes=matching, capacity=8)
    with refuses("capacity="):
        jax.jit(lambda size: givens.sample(KEY, size, 3, planes=matching))(9)
