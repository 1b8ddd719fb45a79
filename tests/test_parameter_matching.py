"""Dense networks of equal size."""

import pytest
from helpers import refuses

from experiments.config import Train
from experiments.studies import parameter_matching


def size_by_hand(depth, width):
    return 784 * width + (depth - 2) * width**2 + 10 * width


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_no_other_width_is_closer(density):
    sparse = Train(density=density)
    found = parameter_matching.dense_of_equal_size(sparse, "width", range(2, 200))
    misses = {w: abs(size_by_hand(7, w) - density * 129_400) for w in range(2, 200)}
    assert found.width == min(misses, key=misses.get)
    assert (found.method, found.density, found.depth) == ("dense", 1.0, None)


def test_depth_is_solved_at_the_width_of_the_sparse_network():
    sparse = Train(model="mlp1000", density=0.125)
    found = parameter_matching.dense_of_equal_size(sparse, "depth", range(100, 150))
    assert found.depth == 121
    assert abs(size_by_hand(121, 128) / (0.125 * size_by_hand(1000, 128)) - 1) < 0.01


@pytest.mark.slow
def test_what_is_off_by_more_than_a_percent_is_refused():
    with refuses("width", "width=10", "1.2%", "density=0.5"):
        parameter_matching.dense_of_equal_size(
            Train(depth=3, width=20, density=0.5), "width", range(2, 20)
        )
