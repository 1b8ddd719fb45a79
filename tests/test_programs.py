"""Steps dispatched one by one, as for convolutional networks on CPUs, equal those of a loop."""

import chex
import jax
import numpy as np
import pytest

from experiments import models
from experiments.config import Train
from experiments.training import programs, starts


def trained(own, config, stops):
    """State after the last stop, and what the losses and accuracies added up to until each."""
    dataset, arrays = programs.load(config, None)
    begun = []
    for seed in config.seeds:
        made = starts.make(config, seed, dataset)
        key = jax.random.key_data(jax.random.key(seed))
        begun.append(own.begin(key, made.variables, made.mask))
    state = own.stack(begun)
    order, all_sums = own.order(state, 0), []
    for first, stop in zip((0, *stops), stops, strict=False):
        state, sums = own.advance(state, order, first, stop, 0.05, *arrays["train"])
        all_sums.append(sums)
    return state, all_sums


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_one_by_one_is_the_loop(monkeypatch, seeds):
    config = Train(
        data="made", method="base", init="fan_in", depth=2, width=20, density=0.3, seeds=seeds
    )
    loop = programs.compiled(config, None)
    # Any network but a perceptron is trained step by step.
    monkeypatch.setattr(models, "Mlp", models.Cnn)
    in_turn = programs._compiled.__wrapped__(config, None)
    assert type(in_turn.advance) is not type(loop.advance)

    state, [sums] = trained(loop, config, (3,))
    other, [whole] = trained(in_turn, config, (3,))
    chex.assert_trees_all_close((state.params, sums), (other.params, whole), rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(whole.loss) > 0)
    assert np.all(np.asarray(whole.bad_step) == programs.NEVER)

    divided, parts = trained(in_turn, config, (1, 3))
    chex.assert_trees_all_equal(other, divided)
    np.testing.assert_allclose(whole.loss, sum(part.loss for part in parts), rtol=1e-6)
