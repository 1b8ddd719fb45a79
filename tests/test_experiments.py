import dataclasses
import io
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from helpers import refuses
from matplotlib.image import imread
from rich.console import Console

import eoi_jax as eoi
from eoi_jax import linen
from experiments import data, models, quickstart
from experiments.training import starts


@pytest.fixture
def console():
    return Console(width=200, record=True, file=io.StringIO())


def test_mlp_has_the_layers_it_says():
    model = models.Mlp(depth=1000, width=128, num_classes=10)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))
    kernels = [leaf for leaf in jax.tree.leaves(shapes) if leaf.shape[-2:] == (128, 128)]
    assert [leaf.shape for leaf in kernels] == [(998, 128, 128)]
    total = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert total == 784 * 128 + 998 * 128 * 128 + 128 * 10 + 999 * 128 + 10


@pytest.mark.slow
def test_a_scanned_mlp_equals_the_loop():
    model = models.Mlp(depth=5, width=16, num_classes=3, kernel_init=eoi.dense(0.3))
    x = jax.random.normal(jax.random.key(1), (4, 5, 5, 1))
    params = model.init(jax.random.key(0), x)["params"]
    h = np.tanh(x.reshape(4, -1) @ params["first"]["kernel"] + params["first"]["bias"])
    hidden = params["hidden"]["linear"]
    for kernel, bias in zip(hidden["kernel"], hidden["bias"], strict=True):
        h = np.tanh(h @ kernel + bias)
    expected = h @ params["last"]["kernel"] + params["last"]["bias"]
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=1e-5)


# The tests of the quickstart train one network, so that its programs are compiled once.
SMALL = {"layers": 12, "width": 32}


@pytest.mark.slow
def test_quickstart_runs_and_saves_its_picture(tmp_path, console):
    config = quickstart.Config(**SMALL, steps=6, blocks=4, output=str(tmp_path / "q.png"))
    results = quickstart.run(config, console)
    assert [result.start for result in results] == [*quickstart.STARTS, quickstart.BLOCKS]
    for result in results:
        assert len(result.losses) == 6
        assert np.isfinite(result.losses).all()
        assert 0 <= result.accuracy <= 1
        # The first layer and the last of the network with blocks are dense.
        ends = 2368 / 12608 * 0.875 if result.start == quickstart.BLOCKS else 0
        expected = 1 if "dense" in result.start else 0.125 + ends
        assert abs(result.density - expected) < 0.01
    text = console.export_text()
    assert "12-layer tanh MLP on digits" in text
    for result in results:
        assert result.start in text
        assert f"{result.kept:,}" in text
    assert imread(tmp_path / "q.png").std() > 0


@pytest.fixture(scope="module")
def net_on_digits():
    config, digits = quickstart.Config(**SMALL), data.load("digits", validation=0)
    return config, digits, quickstart.StepFns(config, digits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EOI", "masked orthogonal", "masked Gaussian"])
def test_sparse_starts_stay_on_their_mask(name, net_on_digits):
    config, digits, step_fns = net_on_digits
    draw = jax.jit(lambda key: quickstart.STARTS[name](config, key, digits))
    params, mask = draw(jax.random.key(0))
    state = step_fns.begin(jax.random.key(0), {"params": params}, mask)
    for number in range(3):
        images, labels = digits.train.images[:128], digits.train.labels[:128]
        state, _ = step_fns.step(state, number, 0.1, images, labels)
    leaves = zip(*map(jax.tree.leaves, (mask, params, state.params)), strict=True)
    kernels = [leaf for leaf in leaves if leaf[0].ndim]
    assert len(kernels) == 3
    for leaf_mask, first, last in kernels:
        assert (last[~leaf_mask] == 0).all()
        assert (last != first).any()
        assert 0.1 < leaf_mask.mean() < 0.15


@pytest.mark.slow
def test_blocks_train_without_a_mask_as_the_masked_dense_network_does(net_on_digits):
    """The same numbers in the same places, under a mask: the losses are those of the blocks."""
    config, digits, masked_fns = net_on_digits
    config = dataclasses.replace(config, blocks=4)
    block_fns = quickstart.StepFns(config, digits, blocks=True)
    start = quickstart.start_of(config, quickstart.BLOCKS, jax.random.key(0), digits)
    kernel = start.variables["params"]["hidden"]["linear"]["kernel"]
    assert kernel.size == 10 * 32 * 32 // 8
    dense, mask = linen.to_dense(start.variables)
    assert starts.count(start) == (
        64 * 32 + 10 * 32 * 32 // 8 + 32 * 10,
        64 * 32 + 10 * 32 * 32 + 32 * 10,
    )
    states = {
        block_fns: block_fns.begin(jax.random.key(0), *start),
        masked_fns: masked_fns.begin(jax.random.key(0), {"params": dense}, mask),
    }
    assert optax.tree.get(states[block_fns].optimizer, "mask") is None
    losses = {fns: [] for fns in states}
    for number in range(3):
        images, labels = digits.train.images[:128], digits.train.labels[:128]
        for fns, state in states.items():
            states[fns], sums = fns.step(state, number, 0.1, images, labels)
            losses[fns].append(float(sums.loss))
    np.testing.assert_allclose(losses[block_fns], losses[masked_fns], rtol=1e-4)
    assert losses[block_fns][-1] != losses[block_fns][0]


@pytest.mark.slow
def test_ctrl_c_leaves_a_message_and_the_results(tmp_path):
    """A real process and a real signal, after the first start has finished."""
    output = tmp_path / "stopped.png"
    command = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    command += ["--steps", "50", "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS_ITSELF, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 130, text
    steps = re.search(r"Stopped by Ctrl-C after (\d+) of 200 steps", text)
    assert steps, text
    assert 50 < int(steps[1]) < 200
    assert "dense orthogonal" in text
    assert "Traceback" not in text
    assert output.exists()


STOPS_ITSELF = f"""
import os, signal
from experiments import quickstart

# A job that a shell runs in the background is born with the signal ignored.
signal.signal({int(signal.SIGINT)}, signal.default_int_handler)
train = quickstart.train

def interrupted(config, dataset, step_fns, name, results, tick):
    def tock(loss):
        tick(loss)
        if len(results) == 2 and len(results[1].losses) == 3:
            os.kill(os.getpid(), {int(signal.SIGINT)})
    train(config, dataset, step_fns, name, results, tock)

quickstart.train = interrupted
quickstart.main()
"""


# As ``python -m`` runs a module, one after the other: most of the time goes into importing.
HELPS = """
import runpy, sys

for module in sys.argv[1:]:
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        print("status", stopped.code)
"""


@pytest.mark.slow
def test_help_states_the_command():
    names = ("quickstart", "benchmarks")
    command = [sys.executable, "-c", HELPS, *(f"experiments.{name}" for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    for name, out in zip(names, done.stdout.split("status 0\n"), strict=False):
        assert f"usage: python -m experiments {name}" in out
    assert done.stdout.count("status 0\n") == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", "1"),
        ("steps", "0"),
        ("batch-size", "0"),
        ("density", "2.0"),
        ("density", "0.001"),
        ("output", "nowhere/at/all.png"),
        ("learning-rate", "0.0"),
        ("bias-std", "-1.0"),
        ("seed", "-1"),
        ("blocks", "12"),
        ("blocks", "32"),
    ],
)
def test_bad_settings_are_named_before_any_training(name, value):
    with refuses(name.replace("-", "_"), value, error=SystemExit):
        quickstart.main([f"--{name}", value])


def test_a_folder_without_data_is_named():
    with refuses("data_dir", "nowhere", error=SystemExit):
        quickstart.main(["--data", "mnist", "--data-dir", "nowhere"])
