"""The laws of the planes: what a round of matchings is, and that all that draws keeps its laws."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gram_error, refuses

import eoi_jax as eoi
from eoi_jax import givens, planes, rotation, theory
from eoi_jax._internal import drawing
from eoi_jax.planes import independent, matching, within

KEY = jax.random.key(17)


def band(size, width=1):
    i, j = np.indices((size, size))
    return abs(i - j) <= width


def blocks(size, number):
    return np.kron(np.eye(number), np.ones((size // number,) * 2)).astype(bool)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 8, 9, 50, 4097])
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_traced_size_and_its_capacity_change_nothing():
    @functools.partial(jax.jit, static_argnames="capacity")
    def draw(size, first, capacity):
        return givens.sample(KEY, size, 30, planes=matching, first=first, capacity=capacity)

    # Above 4096 coordinates are sorted in another way.
    for size, capacity in [*itertools.product([2, 5, 12], [12, 21]), (12, 5000)]:
        wanted = givens.sample(KEY, size, 30, planes=matching, first=2)
        for got, value in zip(draw(size, 2, capacity), wanted, strict=True):
            np.testing.assert_array_equal(got, value)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(40, 40), (41, 33)])
def test_rounds_applied_at_once_are_those_of_the_loop(shape):
    """Ended within them, after them, and before the first rotation."""

    def draw(rounds, target):
        law = drawing.Law(shape, 64, givens.uniform_angle, True, planes=matching, rounds=rounds)
        return drawing.draw(KEY, jnp.int32(target), jnp.float32(2), law)

    for target in (shape[1], 5 * shape[1], 20 * shape[1], math.prod(shape)):
        looped, at_once = draw(0, target), draw(4, target)
        np.testing.assert_array_equal(at_once != 0, looped != 0)
        np.testing.assert_allclose(at_once, looped, atol=2e-6)


@pytest.mark.slow
def test_a_batch_is_the_loop():
    keys = jax.random.split(KEY, 3)
    draw = functools.partial(eoi.orthogonal, shape=(21, 16), density=0.3, planes=matching)
    for batched, key in zip(jax.vmap(draw)(keys), keys, strict=True):
        np.testing.assert_array_equal(batched != 0, draw(key) != 0)
        np.testing.assert_allclose(batched, draw(key), atol=1e-6)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 6, 9])
def test_the_distribution_is_that_of_simulations(size):
    """Of the first vector, at every number of rotations of three rounds."""
    number, length = 4000, 3 * (size // 2)

    def count(key):
        rotations = givens.sample(key, size, length, planes=matching)
        return givens.num_nonzeros(rotations, (size, 1))

    counts = np.asarray(jax.vmap(count)(jax.random.split(KEY, number)))
    for t in range(length + 1):
        law = theory.nonzeros_distribution(size, t, planes=matching)
        found = np.bincount(counts[:, t], minlength=size + 1) / number
        assert (abs(found - law) <= 4 * np.sqrt(law * (1 - law) / number) + 1e-9).all()
        mean = law @ np.arange(size + 1) / size
        assert mean == pytest.approx(theory.expected_density(size, t, planes=matching), abs=1e-12)
    assert theory.nonzeros_distribution(size, 10**6, planes=matching)[-1] == pytest.approx(1)
    with refuses("size=20000", "closed_form"):
        theory.nonzeros_distribution(20_000, 3, planes=matching)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_initializers_take_the_law():
    kernel = eoi.dense(0.2, planes=matching)(KEY, (32, 32))
    np.testing.assert_array_equal(kernel, eoi.orthogonal(KEY, (32, 32), 0.2, planes=matching))
    kernel = eoi.conv(0.2, planes=matching)(KEY, (3, 3, 32, 32))
    assert gram_error(kernel[1, 1]) < 1e-5
    assert (np.count_nonzero(kernel[1, 1], axis=1) >= 2).all()


@pytest.mark.slow
def test_planes_within_a_pattern_are_uniform_over_its_pairs():
    pattern = np.zeros((7, 7), bool)
    allowed = [(0, 1), (5, 2), (2, 3), (6, 0), (3, 6)]
    pattern[tuple(np.transpose(allowed))] = True
    np.fill_diagonal(pattern, [True, False] * 3 + [True])  # which says nothing
    number = 4000
    drawn = givens.sample(KEY, 7, number, planes=within(pattern))
    ordered, counts = np.unique(np.stack([drawn.i, drawn.j]), axis=1, return_counts=True)
    both = {*allowed, *((j, i) for i, j in allowed)}
    assert {tuple(pair) for pair in ordered.T.tolist()} == both
    assert abs(counts - number / 10).max() < 4 * np.sqrt(number * 0.09)
    later = givens.sample(KEY, 7, 40, planes=within(pattern), first=30)
    np.testing.assert_array_equal(later.j[:20], drawn.j[30:50])
    np.testing.assert_array_equal(drawn.theta, givens.sample(KEY, 7, number).theta)


def test_patterns_of_the_same_planes_are_one_law():
    pattern = band(9)
    law = within(pattern)
    upper = np.triu(pattern, 1)
    assert law == within(jnp.asarray(upper)) == within(upper.T.tolist()) == within(band).of_size(9)
    assert hash(law) == hash(within(upper.T))
    assert law != within(band(9, 2))
    assert law != within(band(10))
    assert within(band) == within(band) != within(lambda size: band(size, 2))
    pattern[:] = False  # the law keeps what was given
    assert law == within(band(9))


# Tall, wide, and blocks of which some meet no column.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "shape", "most"),
    [
        (blocks(24, 4), (24, 24), 4 * 36),
        (blocks(24, 4), (24, 9), 6 * 6 + 6 * 3),
        (blocks(24, 4), (9, 24), 6 * 6 + 6 * 3),
        (np.pad(band(3), (3, 18)), (24, 20), 9 + 17),
        (band(24), (24, 24), 24**2),
        (band(24), (24, 5), 24 * 5),
    ],
)
def test_densities_inside_a_pattern(pattern, shape, most):
    """Each is reached as closely as anywhere, up to that of full components; none beyond."""
    law, total = within(pattern), math.prod(shape)
    connected = np.linalg.matrix_power(pattern | pattern.T | np.eye(24, dtype=bool), 24) > 0
    n, m = shape
    assert connected[:n, :m].sum() == most
    draw = jax.jit(lambda density: eoi.orthogonal(KEY, shape, density, planes=law))
    for density in (1 / 24, (most / total + 1 / 24) / 2, most / total):
        matrix = np.asarray(draw(density))
        assert gram_error(matrix) < 1e-5
        assert not matrix[~connected[:n, :m]].any()
        assert abs(np.count_nonzero(matrix) - density * total) <= 0.5001 * min(shape)
    assert np.count_nonzero(matrix) == most
    assert np.isnan(draw(1.01 * most / total)).any()
    if most < total:
        with refuses("density=", 1.01 * most / total, f"{most / total:.6g}"):
            eoi.orthogonal(KEY, shape, 1.01 * most / total, planes=law)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "columns"), [(300, 300), (300, 7)])
def test_a_line_of_coordinates_is_filled_too(size, columns):
    """It takes more than 64 rotations a coordinate, after which independent planes are given up."""
    law = within(band)
    matrix = eoi.orthogonal(KEY, (size, columns), 1.0, planes=law)
    assert np.count_nonzero(matrix) == matrix.size
    assert gram_error(matrix) < 1e-5


@pytest.mark.slow
def test_networks_within_patterns():
    shapes = {"a": (80, 30), "b": (3, 3, 8, 16), "c": (16, 80), "d": (1, 1)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    law = within(lambda size: blocks(size, 4))
    densities = {"a": 0.2, "b": 0.05, "c": 0.1, "d": 1.0}
    densities = {name: {"kernel": density} for name, density in densities.items()}
    start = eoi.exact_orthogonal(KEY, params, densities, planes=law)
    for name, shape in shapes.items():
        kernel, mask = start.params[name]["kernel"], start.mask[name]["kernel"]
        budget = int(densities[name]["kernel"] * np.prod(shape) + 0.5)
        assert int(mask.sum()) == budget
        matrix = np.asarray(kernel[1, 1] if name == "b" else kernel)
        n, m = matrix.shape
        assert gram_error(matrix) < 1e-5
        if max(n, m) > 1:
            assert not matrix[~blocks(max(n, m), 4)[:n, :m]].any()
    densities["a"]["kernel"] = 0.5
    with refuses("a/kernel=0.5", f"{(20 * 20 + 20 * 10) / 2400:.6g}"):
        eoi.exact_orthogonal(KEY, params, densities, planes=law)
    with refuses("planes=", "80", "16"):
        eoi.exact_orthogonal(KEY, params, 0.1, planes=within(band(80)), infeasible="redistribute")


def test_a_density_that_equal_angles_do_not_reach_is_refused():
    """Two rotations by 45 degrees in one plane only permute: pairs are never all mixed at once."""
    law = within(blocks(64, 32))
    with refuses("density", "0.03125", "within", "angles"):
        eoi.orthogonal(KEY, (64, 64), 1 / 32, angles=math.pi / 4, planes=law)
    with refuses("density", "0.03125", "within", "angles"):
        eoi.exact_orthogonal(
            KEY, {"kernel": jnp.zeros((64, 64))}, 1 / 32, angles=math.pi / 4, planes=law
        )
    assert (eoi.orthogonal(KEY, (64, 64), 1 / 32, planes=law) != 0).sum() == 128


def test_matchings_of_a_single_coordinate():
    """A depthwise kernel holds matrices of one entry."""
    np.testing.assert_array_equal(eoi.orthogonal(KEY, (1, 1), 1.0, planes=matching), [[1.0]])
    kernel = eoi.conv(0.5, planes=matching, feature_group_count=4)(KEY, (3, 3, 1, 4))
    np.testing.assert_array_equal(kernel[1, 1], np.ones((1, 4)))
    assert (kernel != 0).sum() == 4


def test_what_is_no_pattern_is_refused():
    for wrong, name in [
        (np.ones((3, 4), bool), "pattern.shape=(3, 4)"),
        (np.ones(4, bool), "pattern.shape=(4,)"),
        (np.ones((0, 0), bool), "pattern.shape=(0, 0)"),
        (np.ones((3, 3)), "pattern.dtype='float64'"),
        (np.eye(3, dtype=bool), "pattern='3 x 3'"),
    ]:
        with refuses(name):
            within(wrong)
    with refuses("pattern="):
        jax.jit(lambda pattern: within(pattern).size)(band(4))
    with refuses("planes=", "size=8", "9"):
        givens.sample(KEY, 8, 3, planes=within(band(9)))
    with refuses("planes=", "size=8", "9"):
        eoi.dense(0.5, planes=within(lambda size: band(size + 1)))(KEY, (8, 8))
    for law in (within(band), within(band(9))):
        with refuses("size="):
            jax.jit(lambda size, law=law: givens.sample(KEY, size, 3, planes=law, capacity=9))(9)
        with refuses("planes="):
            theory.expected_density(9, 3, planes=law)


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
        lambda: theory.nonzeros_distribution(8, 3, planes=wrong),
        lambda: planes.check(wrong),
    ):
        with refuses("planes="):
            draw()


def test_a_capacity_is_needed_and_large_enough():
    with refuses("capacity=", "size=9"):
        givens.sample(KEY, 9, 3, planes=matching, capacity=8)
    with refuses("capacity="):
        jax.jit(lambda size: givens.sample(KEY, size, 3, planes=matching))(9)
