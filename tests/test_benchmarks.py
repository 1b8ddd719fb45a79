"""The benchmark of the methods measures what it says."""

import chex
import jax
import numpy as np
import pytest

import eoi_jax as eoi
from experiments.benchmarks import methods

PNG = b"\x89PNG\r\n\x1a\n"
WEIGHTS = 129_400  # of MLP-7


@pytest.fixture(scope="module")
def starts():
    return methods.starts("mlp7", 0.1, steps=3)


METHODS = ("ERK, random mask", "magnitude", "SNIP", "GraSP", "SynFlow", "ERK, EOI", "ERK, AI")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_tenth_of_the_weights(starts, method):
    [start] = [start for name, start in starts.items() if name.startswith(method)]
    params, mask = start()
    assert round(eoi.masks.density(mask) * WEIGHTS) == WEIGHTS // 10
    chex.assert_trees_all_equal(params, eoi.masks.apply(mask, params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_dense_start_is_orthogonal_and_sao_has_ten_connections(starts):
    dense = starts["dense orthogonal (QR)"]()
    assert eoi.spectrum.orthogonality_error(dense["params"]["first"]["kernel"]) < 1e-5
    hidden = starts["SAO"]().mask["params"]["hidden"]["linear"]["kernel"]
    assert (hidden.sum(1) == 10).all()


def test_the_plot_of_the_matrices_is_a_picture(tmp_path):
    rows = {
        (size, density): {"EOI": 1e-3, "QR": 2e-3, "SAO": float("nan"), "AI": 1e-3}
        for size in (128, 256)
        for density in (0.0625, 0.125, 0.25)
    }
    path = methods.plot_matrices(rows, str(tmp_path / "methods.png"))
    assert path.read_bytes().startswith(PNG)
