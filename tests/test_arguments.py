"""Arguments that make no sense are refused by one check each, whichever function takes them."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses

import eoi_jax as eoi
from eoi_jax import criteria, givens, initializers, isometry, masks, rotation, sao, spectrum, theory

KEY = jax.random.key(4)
ROTATIONS = givens.sample(KEY, 8, 12)


def params(dtype):
    return {"kernel": jnp.ones((8, 8), dtype), "bias": jnp.ones(8)}


# Every function with a scale that multiplies, as (scale, dtype) -> result.
SCALED = {
    "orthogonal": lambda s, d: eoi.orthogonal(KEY, (8, 8), 0.5, scale=s, dtype=d),
    "sao.orthogonal": lambda s, d: sao.orthogonal(KEY, 8, 4, scale=s, dtype=d),
    "blocks.orthogonal": lambda s, d: eoi.blocks.orthogonal(
        KEY, (8, 8), 0.5, block_size=2, scale=s, dtype=d
    ),
    "n_to_m.orthogonal": lambda s, d: eoi.n_to_m.orthogonal(KEY, (8, 8), 2, 4, scale=s, dtype=d),
    "dense": lambda s, d: initializers.dense(0.5, scale=s)(KEY, (8, 8), d),
    "conv": lambda s, d: initializers.conv(0.5, scale=s)(KEY, (3, 8, 8), d),
    "delta_orthogonal": lambda s, d: initializers.delta_orthogonal(scale=s)(KEY, (3, 4, 4), d),
    "conv_orthogonal": lambda s, d: initializers.conv_orthogonal(scale=s)(KEY, (2, 4, 4), d),
    "sao_dense": lambda s, d: initializers.sao_dense(0.5, scale=s)(KEY, (8, 8), d),
    "sao_conv": lambda s, d: initializers.sao_conv(0.5, scale=s)(KEY, (3, 8, 8), d),
    "exact_orthogonal": lambda s, d: eoi.exact_orthogonal(KEY, params(d), 0.5, scale=s).params,
    "sparsity_aware_orthogonal": lambda s, d: (
        eoi.sparsity_aware_orthogonal(KEY, params(d), 0.5, scale=s).params
    ),
    "isometry": lambda s, d: isometry.approximate_isometry(
        jnp.eye(8, dtype=d), jnp.eye(8) > 0, scale=s, num_steps=1
    ),
    "orthogonality_error": lambda s, d: spectrum.orthogonality_error(
        jnp.eye(3, dtype=jnp.float32), scale=s * (1e34 if d == jnp.float16 else 1)
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_that_the_dtype_cannot_hold_is_refused(name):
    for scale, dtype in ((1e39, jnp.float32), (7e4, jnp.float16), (3.4e38, jnp.bfloat16)):
        if name == "orthogonality_error" and dtype == jnp.bfloat16:
            continue
        with refuses("scale=", "range of"):
            SCALED[name](scale, dtype)
    with refuses("scale=1e-60", "range of float32"):
        SCALED[name](1e-60, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [6e4, -6e4, 0.0])
def test_a_scale_that_the_dtype_holds_gives_finite_weights(scale):
    for name in ("orthogonal", "sao.orthogonal", "delta_orthogonal"):
        assert np.isfinite(np.asarray(SCALED[name](scale, jnp.float16), np.float32)).all()


@pytest.mark.parametrize(
    "take",
    [
        lambda r: givens.waves(r, 8),
        lambda r: givens.support(r, (8, 5)),
        lambda r: givens.num_nonzeros(r, (5, 8)),
        lambda r: rotation.rotate(jnp.eye(8), r),
        lambda r: rotation.as_matrix(r, 8),
    ],
)
def test_rotations_may_come_as_any_three_arrays(take):
    i, j, theta = ROTATIONS
    expected = take(ROTATIONS)
    for given in (
        (i, j, theta),
        [i.astype(jnp.uint8), j.astype(jnp.uint8), theta],
        givens.Rotations(i.astype(jnp.int16), np.asarray(j, ">i8"), np.asarray(theta, ">f4")),
        (i.tolist(), j.tolist(), theta),
    ):
        np.testing.assert_allclose(take(given), expected, atol=1e-6)
    for given, named in (
        ((i, j), "rotations=tuple"),
        (None, "rotations=NoneType"),
        ((i * 1.0, j, theta), "rotations.i.dtype='float32'"),
        ((i, j > 3, theta), "rotations.j.dtype='bool'"),
        ((i, j, theta * 1j), "rotations.theta.dtype='complex64'"),
        ((i, j, jax.ShapeDtypeStruct((12,), jnp.float32)), "rotations.theta=ShapeDtypeStruct"),
        ((i.astype(jnp.uint8).at[0].set(200), j, theta), "rotations[0]"),
    ):
        with refuses(named):
            take(given)


def test_narrow_planes_count_to_more_than_their_dtype():
    """Rows above 127 or 255 sort by their number, not by what eight bits make of it."""
    i, j = np.array([200, 3, 200], np.uint8), np.array([100, 200, 4], np.uint8)
    wide = givens.Rotations(i.astype(np.int32), j.astype(np.int32), np.ones(3, np.float32))
    narrow = givens.num_nonzeros((i, j, np.ones(3, np.float32)), (300, 300))
    np.testing.assert_array_equal(narrow, givens.num_nonzeros(wide, (300, 300)))


def test_rotations_are_counted_by_32_bits():
    last = givens.sample(KEY, 8, 3, first=2**32 - 3)
    one = givens.sample(KEY, 8, 1, first=2**32 - 1)
    assert (last.i[2], last.j[2], last.theta[2]) == (one.i[0], one.j[0], one.theta[0])
    assert givens.sample(KEY, 8, 0, first=2**32).i.size == 0
    for first in (2**32 - 2, 2**32, 2**40):
        with refuses(f"first={first}", "4294967293"):
            givens.sample(KEY, 8, 3, first=first)
    with refuses("num_rotations="):
        givens.sample(KEY, 8, 2**40)
    with refuses("size=", "integer"):
        jax.jit(lambda size: givens.sample(KEY, size, 3))(8.5)


@pytest.mark.parametrize("angles", ["a", 1j, float("nan"), None, lambda key, dtype: jnp.array(1j)])
def test_angles_are_finite_numbers_or_laws_of_real_scalars(angles):
    for draw in (
        lambda a: givens.sample(KEY, 8, 3, angles=a),
        lambda a: givens.from_pairs(KEY, [(0, 1)], angles=a),
    ):
        with refuses("angles="):
            draw(angles)


@pytest.mark.parametrize(
    "take",
    [
        criteria.magnitude,
        lambda tree: criteria.random(KEY, tree),
        lambda tree: criteria.snip(lambda p: jnp.sum(p["kernel"]), tree),
        lambda tree: criteria.synflow(lambda p, x: x @ p["kernel"], tree, jnp.ones((1, 8))),
        lambda tree: criteria.prune(criteria.magnitude, tree, 0.5),
        lambda tree: masks.top_k(tree, 0.5),
        lambda tree: eoi.approximate_isometry(tree, {"kernel": jnp.eye(8) > 0, "bias": True}),
    ],
)
def test_shapes_without_values_are_refused(take):
    with refuses("bias", "shape without values"):
        take(jax.eval_shape(lambda: params(jnp.float32)))


def test_what_is_no_array_is_refused():
    shape, mask = jax.ShapeDtypeStruct((4, 4), jnp.float32), jnp.eye(4) > 0
    for bad in (shape, "kernel", None, object()):
        for name, take in (
            ("kernel", lambda a: isometry.approximate_isometry(a, mask)),
            ("mask", lambda a: isometry.approximate_isometry(jnp.eye(4), a)),
            ("mask", isometry.structural_rank),
            ("matrix", lambda a: rotation.rotate(a, ROTATIONS)),
            ("matrix", spectrum.orthogonality_error),
            ("values", spectrum.summarize),
            ("x", lambda a: spectrum.singular_values(jnp.tanh, a)),
            ("kernel", lambda a: spectrum.conv_singular_values(a, (4, 4))),
        ):
            with refuses(f"{name}=", type(bad).__name__):
                take(bad)


def test_names_are_strings():
    for bad in (np.array(["relu"]), jnp.ones(2), ["tanh"], 1):
        with refuses("activation="):
            sao.degree(8, 0.5, activation=bad)
        with refuses("objective="):
            isometry.approximate_isometry(jnp.eye(4), jnp.eye(4) > 0, objective=bad)
        with refuses("method="):
            theory.expected_density(8, 5, method=bad)
    for bad in (10**400, -(10**400)):
        with refuses("density="):
            eoi.orthogonal(KEY, (8, 8), bad)


@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 0), (2, 0, 3, 4, 4)])
def test_empty_convolutions_are_empty(shape):
    kernel = initializers.sao_conv(0.5)(KEY, shape)
    assert kernel.shape == shape
    assert kernel.size == 0


@pytest.mark.slow
def test_narrow_floats_are_drawn_and_measured_in_float32():
    x = jnp.ones((1, 3), jnp.float8_e4m3fn)
    ends = spectrum.extreme_singular_values(KEY, lambda x: 2 * x.astype(jnp.float32), x)
    assert float(ends.largest[0]) == pytest.approx(2, rel=1e-6)
    narrow = eoi.orthogonal(KEY, (8, 8), 0.5, dtype=jnp.float8_e5m2)
    wide = eoi.orthogonal(KEY, (8, 8), 0.5)
    assert (narrow == wide.astype(jnp.float8_e5m2)).all()
    with refuses("dtype='float8_e8m0fnu'", "negative"):  # powers of two alone
        eoi.orthogonal(KEY, (8, 8), 0.5, dtype=jnp.float8_e8m0fnu)


def test_no_size_takes_long_or_much_memory():
    start = time.process_time()
    prime = 2**31 - 1
    with refuses("density=0.5", f"{prime}/{prime}"):
        sao.degree(prime, 0.5)
    assert sao.degree(prime - 1, 0.5) == prime // 2
    for size in (2**31, 2**25 + 1):
        with refuses(f"size={size}", "closed_form"):
            theory.nonzeros_distribution(size, 0)
        with refuses(f"size={size}", "closed_form"):
            theory.expected_density(size, 0, method="exact")
    with refuses("size="):
        theory.num_rotations(10**400, 0.5)
    assert time.process_time() - start < 2


def test_degrees_are_the_divisors():
    for size in (1, 2, 7, 12, 36, 97, 128, 360):
        for activation, least, step in (("tanh", 2, 1), ("relu", 4, 2)):
            expected = [d for d in range(least, size + 1, step) if size % d == 0]
            found = []
            for degree in range(1, size + 1):
                try:
                    found.append(sao.degree(size, degree / size, activation=activation))
                except ValueError:
                    continue
            assert found == expected
