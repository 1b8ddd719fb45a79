"""One seed, one result, from one release to the next: numbers that were drawn once stand here.

A change that alters them on purpose is a change of the public behaviour, and says so in CHANGELOG.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eoi_jax as eoi

KEY = jax.random.key(20240)
TWO = {"a": {"kernel": jnp.ones((3, 4))}, "b": {"kernel": jnp.ones((3, 4))}}


def rows(mask):
    """Write a mask as rows of 0 and 1."""
    return ["".join(map(str, row)) for row in np.asarray(mask, int).reshape(-1, mask.shape[-1])]


def test_rotations():
    rotations = eoi.givens.sample(KEY, 8, 4)
    assert rotations.i.tolist() == [6, 3, 1, 2]
    assert rotations.j.tolist() == [3, 4, 4, 6]
    np.testing.assert_allclose(rotations.theta, [3.688674, 2.230793, 3.118372, 2.529657], atol=1e-6)
    late = eoi.givens.sample(KEY, 8, 4, first=2**31)
    assert late.i.tolist() == [1, 0, 6, 7]


@pytest.mark.slow
def test_matchings():
    rotations = eoi.givens.sample(KEY, 8, 8, planes=eoi.planes.matching)
    assert rotations.i.tolist() == [4, 2, 6, 3, 1, 0, 6, 3]
    assert rotations.j.tolist() == [5, 1, 7, 0, 2, 4, 5, 7]
    late = eoi.givens.sample(KEY, 7, 4, planes=eoi.planes.matching, first=2**31)
    assert late.i.tolist() == [5, 0, 4, 2]
    assert late.j.tolist() == [4, 1, 5, 3]
    large = eoi.givens.sample(KEY, 4097, 3, planes=eoi.planes.matching)
    assert large.i.tolist() == [2093, 2340, 631]
    assert large.j.tolist() == [3841, 3505, 1324]


def test_planes_within_a_pattern():
    pattern = np.kron(np.eye(2), np.ones((4, 4))) > 0
    rotations = eoi.givens.sample(KEY, 8, 4, planes=eoi.planes.within(pattern))
    assert rotations.i.tolist() == [6, 3, 0, 2]
    assert rotations.j.tolist() == [5, 1, 2, 1]


@pytest.mark.slow
def test_orthogonal_matrices():
    matrix = [[1, 0, 0], [0, 0.523628, 0.789994], [0, 0.674692, -0.613114], [0, -0.520197, 0]]
    np.testing.assert_allclose(eoi.orthogonal(KEY, (4, 3), 0.6), matrix, atol=1e-6)
    permuted = [matrix[row] for row in (0, 2, 1, 3)]
    drawn = eoi.orthogonal(KEY, (4, 3), 0.6, permute=True)
    np.testing.assert_allclose(drawn, permuted, atol=1e-6)


def test_blocks():
    w = eoi.blocks.orthogonal(KEY, (8, 8), 0.5, block_size=2)
    assert w.rows.tolist() == [[0, 3], [1, 2]]
    first = [[0.430507, -0.890046, 0.091569, -0.118735], [0.890046, 0.430507, -0.118735, -0.091569]]
    np.testing.assert_allclose(w.values[0, 0], first, atol=1e-6)


@pytest.mark.slow
def test_networks():
    start = eoi.exact_orthogonal(KEY, TWO, 0.5)
    first = [[-0.654257, -0.562322, 0, -0.505709], [0, 0.668686, 0, -0.743545], [0, 0, 1, 0]]
    np.testing.assert_allclose(start.params["a"]["kernel"], first, atol=1e-6)
    assert rows(start.mask["a"]["kernel"]) == ["1101", "0101", "0010"]
    assert rows(start.mask["b"]["kernel"]) == ["1001", "0110", "0110"]
    conv = eoi.exact_orthogonal(KEY, {"kernel": jnp.ones((2, 2, 3, 3))}, 0.3, permute=True)
    assert rows(conv.mask["kernel"]) == [
        *("100", "111", "011", "001", "001", "001", "100", "000", "000", "000", "010", "000")
    ]


def test_sparsity_aware_matrices():
    drawn = eoi.sao.orthogonal(KEY, 4, 2)
    block, other = [-0.969443, -0.245318], [0.825052, -0.565056]
    np.testing.assert_allclose(drawn[0], [*block, 0, 0], atol=1e-6)
    np.testing.assert_allclose(drawn[1], [0, 0, *other], atol=1e-6)


def test_masks():
    mask = eoi.masks.random(KEY, TWO, 0.5)
    assert rows(mask["a"]["kernel"]) == ["1011", "1000", "1100"]
    assert rows(mask["b"]["kernel"]) == ["1011", "0110", "0010"]
    shuffled = eoi.masks.shuffle(KEY, mask)
    assert rows(shuffled["a"]["kernel"]) == ["1101", "0001", "0011"]
    assert rows(shuffled["b"]["kernel"]) == ["0111", "1001", "1000"]


@pytest.mark.slow
def test_masks_of_sparse_evolutionary_training():
    """The step that is drawn for is the number of calls before."""
    params = {"kernel": jnp.diag(jnp.arange(1.0, 5.0))}
    tx = eoi.sparse_evolutionary_training(
        optax.sgd(0.0), eoi.masks.support, key=KEY, update_every=1, drop_fraction=0.5
    )
    state = tx.init(params)
    found = []
    for _ in range(3):
        _, state = tx.update(params, state, params)
        found.append(rows(optax.tree.get(state, "mask")["kernel"]))
    assert found == [
        ["1000", "0100", "0010", "0001"],
        ["0000", "0000", "0110", "0011"],
        ["0010", "0001", "0010", "0001"],
    ]
