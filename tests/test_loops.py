"""The loops over training steps: dispatched one by one in Python, they equal one on the device."""

import chex
import jax
import numpy as np
import pytest

from experiments import models
from experiments.config import Train
from experiments.models.layers import in_memory
from experiments.training import loops, starts, train
from experiments.training.loops import Epoch
from experiments.training.steps import NEVER


def trained(step_fns, config, stops):
    """State after the last stop, and what the losses and accuracies added up to until each."""
    dataset, arrays = train.load(config, None)
    begun = [
        step_fns.begin(jax.random.key(seed), *starts.make(config, seed, dataset))
        for seed in config.seeds
    ]
    state, all_sums = loops.stack(begun), []
    epoch = Epoch(step_fns.order(state, 0), 0.05, *arrays["train"])
    for first, stop in zip((0, *stops), stops, strict=False):
        state, sums = step_fns.advance(state, first, stop, epoch)
        all_sums.append(sums)
    return state, all_sums


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "dynamic"),
    [
        ((1,), "static"),
        ((1, 2), "static"),
        pytest.param((1, 2), "rigl", marks=pytest.mark.slow),
    ],
)
def test_one_by_one_is_the_loop(monkeypatch, seeds, dynamic):
    config = Train(
        **{"data": "made", "method": "base", "init": "fan_in", "depth": 2, "width": 20},
        **{"density": 0.3, "seeds": seeds, "dynamic": dynamic},
    )
    on_device = train.compiled(config, None)
    # As a network that states no form whose gradients are fast in a loop on CPUs.
    monkeypatch.setitem(models.SPECS, "mlp7", models.SPECS["mlp7"]._replace(in_cpu_loop=None))
    in_python = train._compiled.__wrapped__(config, None)
    assert type(in_python.advance) is not type(on_device.advance)

    state, [sums] = trained(on_device, config, (3,))
    other, [whole] = trained(in_python, config, (3,))
    chex.assert_trees_all_close((state, sums), (other, whole), rtol=1e-5, atol=1e-6)
    split = train.load(config, None)[1]["validation"]
    chex.assert_trees_all_close(
        on_device.evaluate(state, *split), in_python.evaluate(other, *split), rtol=1e-5
    )
    assert np.all(np.asarray(whole.loss) > 0)
    assert np.all(np.asarray(whole.bad_step) == NEVER)

    divided, parts = trained(in_python, config, (1, 3))
    chex.assert_trees_all_equal(other, divided)
    np.testing.assert_allclose(whole.loss, sum(part.loss for part in parts), rtol=1e-6)


def test_what_is_kept_in_memory_on_cpus_is_not_fused_away():
    """XLA may rename the pass: then nothing would fail, but steps would be slow again."""
    if jax.default_backend() != "cpu":
        pytest.skip("Marks are for CPUs.")
    gradient = jax.grad(lambda x: in_memory(in_memory(x**2) ** 2).sum())
    lowered = jax.jit(gradient).lower(np.ones(3, np.float32))
    kept, removed = (
        lowered.compile(compiler_options=options).as_text() for options in (loops.CPU_OPTIONS, None)
    )
    assert kept.count(" opt-barrier(") >= 2
    assert " opt-barrier(" not in removed
