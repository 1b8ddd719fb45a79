"""Training: steps by hand, runs that are killed, and what they leave behind."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from helpers import refuses

from eoi_jax import linen
from experiments import __main__ as commands
from experiments.config import Train
from experiments.runs import Runtime
from experiments.training import checkpoints, loops, metrics, network, starts, steps, train
from experiments.training.checkpoints import Checkpoints
from experiments.training.loops import Epoch

# 784 -> 8 -> 10, 13 steps. Of 576 training images 11 batches of 50 are an epoch, and neither 64
# images for validation nor 128 for the test are whole batches.
ONE = Train(
    data="made",
    method="base",
    criterion="magnitude",
    init="fan_in",
    density=0.5,
    depth=2,
    width=8,
    batch_size=50,
    epochs=13 / 11,
    learning_rate=0.05,
    weight_decay=0.01,
    seeds=(3,),
)
DYNAMIC = dataclasses.replace(ONE, dynamic="set", seeds=(3, 5))
BLOCKS = dataclasses.replace(
    ONE, model="mlp7_wide", method="blocks", block_size=4, init="orthogonal", depth=4, seeds=(3, 5)
)


def begin(config):
    """Return the functions of a config, its arrays on the device and its state at the start."""
    dataset, arrays = train.load(config, None)
    step_fns = train.compiled(config, None)
    states = [
        step_fns.begin(jax.random.key(seed), *starts.make(config, seed, dataset))
        for seed in config.seeds
    ]
    return step_fns, arrays, loops.stack(states)


def epoch_of(order, arrays, learning_rate=0.05):
    return Epoch(order, learning_rate, *arrays["train"])


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def equal(tree, other):
    return all(map(np.array_equal, leaves(tree), leaves(other)))


# ------------------------------------------------------------------ steps


class Hand:
    """``tanh(x W1 + b1) W2 + b2`` with its gradient and SGD, in NumPy and float64."""

    def __init__(self, params, mask):
        names = [(layer, leaf) for layer in ("first", "last") for leaf in ("kernel", "bias")]
        self.weights = [np.asarray(params[layer][leaf], np.float64) for layer, leaf in names]
        self.mask = [np.asarray(mask[layer][leaf]) for layer, leaf in names]
        self.momentum = [np.zeros_like(weight) for weight in self.weights]

    def logits(self, x):
        first, one, last, two = self.weights
        return np.tanh(x @ first + one) @ last + two

    def losses(self, x, y):
        logits = self.logits(x)
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]

    def right(self, x, y):
        return self.logits(x).argmax(1) == y

    def step(self, x, y, rate):
        first, one, last, _ = self.weights
        hidden, logits = np.tanh(x @ first + one), self.logits(x)
        error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(10)[y]
        error /= len(x)
        back = error @ last.T * (1 - hidden**2)
        grads = [x.T @ back, back.sum(0), hidden.T @ error, error.sum(0)]
        for i, (weight, grad) in enumerate(zip(self.weights, grads, strict=True)):
            decayed = (grad + 0.01 * weight) * self.mask[i]
            self.momentum[i] = 0.9 * self.momentum[i] + decayed
            self.weights[i] = weight - rate * (decayed + 0.9 * self.momentum[i])


@pytest.fixture(scope="module")
def made():
    dataset, _ = train.load(ONE, None)

    def split(name):
        part = getattr(dataset, name)
        pixels = part.images.reshape(len(part.images), -1).astype(np.float64)
        return (pixels / 255 - 0.5) / 0.2, part.labels

    return split


@pytest.mark.slow
def test_steps_by_hand(made):
    """SGD with Nesterov momentum and decay, its rate divided at steps 7 and 10."""
    step_fns, arrays, state = begin(ONE)
    assert (step_fns.num_steps, step_fns.steps_of_epoch) == (13, 11)
    hand = Hand(state.params, optax.tree.get(state.optimizer, "mask"))
    orders, (x, y) = [np.asarray(step_fns.order(state, epoch)) for epoch in (0, 1)], made("train")
    losses, right = [], []
    for step, rate in enumerate([0.05] * 7 + [0.005] * 3 + [0.0005] * 3):
        index = orders[step // 11][step % 11]
        losses.append(hand.losses(x[index], y[index]).mean())
        right.append(hand.right(x[index], y[index]).mean())
        hand.step(x[index], y[index], rate)
    loss = accuracy = 0.0
    for first, stop in itertools.pairwise((0, 1, 5, 11, 13)):
        state, sums = step_fns.advance(state, first, stop, epoch_of(orders[first // 11], arrays))
        loss, accuracy = loss + float(sums.loss), accuracy + float(sums.accuracy)
        assert int(sums.bad_step) == steps.NEVER
    assert loss == pytest.approx(sum(losses), rel=1e-5)
    assert accuracy == pytest.approx(sum(right), rel=1e-6)
    names = itertools.product(("first", "last"), ("kernel", "bias"))
    for (layer, name), expected, kept in zip(names, hand.weights, hand.mask, strict=True):
        leaf = np.asarray(state.params[layer][name])
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)
        assert kept.ndim == 0 or (leaf[~kept] == 0).all()
    for split in ("validation", "test"):
        x, y = made(split)
        loss, accuracy = step_fns.evaluate(state, *arrays[split])
        assert float(loss) == pytest.approx(hand.losses(x, y).mean(), rel=1e-5)
        assert float(accuracy) == pytest.approx(hand.right(x, y).mean(), rel=1e-6)


@pytest.mark.slow
def test_dispatches_change_no_bit():
    ends = []
    for bounds in ((0, 11), (0, 3, 4, 11)):
        step_fns, arrays, state = begin(ONE)
        epoch = epoch_of(step_fns.order(state, 0), arrays)
        for first, stop in itertools.pairwise(bounds):
            state, _ = step_fns.advance(state, first, stop, epoch)
        ends.append(state)
    assert equal(*ends)


def test_the_order_of_the_images():
    step_fns = train.compiled(ONE, None)

    def order(seed, epoch):
        key = jax.random.key_data(jax.random.key(seed))
        return np.asarray(step_fns.order(steps.State(key, None, {}, None), epoch))

    for one in (order(3, 0), order(3, 1)):
        assert one.shape == (11, 50)
        assert len(set(one.ravel())) == 550
        assert set(one.ravel()) <= set(range(576))
    assert not np.array_equal(order(3, 0), order(3, 1))
    assert not np.array_equal(order(3, 0), order(4, 0))


@pytest.mark.slow
def test_seeds_at_once_are_the_seeds_one_by_one(monkeypatch):
    """While SET exchanges weights, at steps 4 and 8 and no more after three quarters."""
    monkeypatch.setattr(steps, "DROP_AND_GROW_EVERY", 4)
    step_fns, arrays, state = begin(DYNAMIC)
    order, loss = step_fns.order(state, 0), 0.0
    masks = [leaves(optax.tree.get(state.optimizer, "mask"))]
    for first, stop in itertools.pairwise((0, 4, 5, 8, 9)):
        state, sums = step_fns.advance(state, first, stop, epoch_of(order, arrays))
        masks.append(leaves(optax.tree.get(state.optimizer, "mask")))
        loss += float(sums.loss[1])
    changes = [not all(map(np.array_equal, *pair)) for pair in itertools.pairwise(masks)]
    assert changes == [False, True, False, True]
    for mask in masks[1:]:
        for leaf, start in zip(mask, masks[0], strict=True):
            axes = tuple(range(1, leaf.ndim))
            np.testing.assert_array_equal(leaf.sum(axes), start.sum(axes))
    alone, _, single = begin(dataclasses.replace(DYNAMIC, seeds=(5,)))
    single, sums = alone.advance(single, 0, 9, epoch_of(order[1], arrays))
    assert float(sums.loss) == pytest.approx(loss, rel=1e-5)
    for found, expected in zip(leaves(single), leaves(state), strict=True):
        np.testing.assert_allclose(found, expected[1] if expected.ndim else expected, atol=1e-5)


class Normalized(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(
            images.reshape(len(images), -1)
        )
        return nn.Dense(self.num_classes, name="last")(x)


@pytest.mark.slow
def test_statistics_of_batches_are_kept_and_used(monkeypatch, made):
    build = functools.lru_cache(lambda config, num_classes: Normalized(num_classes))
    monkeypatch.setattr(network, "build", build)
    step_fns, arrays, state = begin(dataclasses.replace(ONE, width=9))
    order = np.arange(550).reshape(11, 50)
    state, _ = step_fns.advance(state, 0, 2, epoch_of(order, arrays, learning_rate=0.0))
    mean = np.zeros(784)
    for index in order[:2]:
        mean = 0.5 * mean + 0.5 * made("train")[0][index].mean(0)
    [stats] = state.others["batch_stats"].values()
    np.testing.assert_allclose(stats["mean"], mean, atol=1e-4)
    x, y = made("validation")
    x = (x - np.asarray(stats["mean"])) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
    logits = x @ np.asarray(state.params["last"]["kernel"])
    loss, accuracy = step_fns.evaluate(state, *arrays["validation"])
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-4)
    assert float(accuracy) == (logits.argmax(1) == y).mean()


def test_functions_are_shared():
    one = train.compiled(ONE, None)
    same = {"method": "eoi", "density": 0.2, "seeds": (9,), "experiment": "x"}
    same |= {"learning_rate": 1.0, "scale": 2.0}
    assert train.compiled(dataclasses.replace(ONE, **same), None) is one
    for change in ({"epochs": 1.0}, {"seeds": (1, 2)}, {"width": 12}):
        assert train.compiled(dataclasses.replace(ONE, **change), None) is not one
    blocks = train.compiled(BLOCKS, None)
    assert train.compiled(dataclasses.replace(BLOCKS, seeds=(1, 2)), None) is blocks
    for change in ({"density": 1.0}, {"block_size": 8, "density": 1.0}, {"scale": 2.0}):
        assert train.compiled(dataclasses.replace(BLOCKS, **change), None) is not blocks
    with refuses("batch_size", "batch_size=577", "[1, 576]"):
        train.compiled(dataclasses.replace(ONE, batch_size=577), None)


@pytest.mark.slow
def test_blocks_train_as_the_masked_dense_network_does():
    """From the same weights in the same places, with the mask that the blocks are."""
    one = dataclasses.replace(BLOCKS, seeds=(3,))
    block_fns, arrays, state = begin(one)
    stored = optax.tree.get(state.optimizer, "mask")
    assert all(leaf.shape == () for leaf in jax.tree.leaves(stored))
    dense, mask = linen.to_dense({"params": state.params, **state.others})
    assert float(mask["hidden"]["linear"]["kernel"].mean()) == 0.5
    start = [leaf.copy() for leaf in leaves(dense)]
    dense_fns = train.compiled(
        dataclasses.replace(one, method="base", block_size=0, init="fan_in"), None
    )
    dense_state = loops.stack([dense_fns.begin(jax.random.key(3), {"params": dense}, mask)])
    epoch = epoch_of(block_fns.order(state, 0), arrays)
    state, sums = block_fns.advance(state, 0, 11, epoch)
    dense_state, dense_sums = dense_fns.advance(dense_state, 0, 11, epoch)
    assert float(sums.loss) == pytest.approx(float(dense_sums.loss), rel=1e-5)
    trained, _ = linen.to_dense({"params": state.params, **state.others})
    for found, expected, first in zip(
        *map(leaves, (trained, dense_state.params, start)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(found - first).max() > 1e-3


# ------------------------------------------------------------------ whole runs


def test_a_run_leaves_metrics_and_results(tmp_path, made):
    """Training is logged every four steps and at the end of an epoch; the others follow there."""
    runtime = Runtime(runs=str(tmp_path), log_every=4, tensorboard=True)
    train.run(ONE, tmp_path, runtime)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [(row["split"], row["step"]) for row in rows] == [
        *(("train", 4), ("train", 8), ("train", 11), ("validation", 11)),
        *(("train", 12), ("train", 13), ("validation", 13), ("test", 13)),
    ]
    assert all(row["seed"] == 3 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert rows[0]["epoch"] == round(4 / 11, 6)
    [result] = json.loads((tmp_path / "results.json").read_text())
    assert (result["kept"], result["size"], result["density"]) == (3176, 6352, 0.5)
    assert (result["seed"], result["steps"]) == (3, 13)
    assert result["test_accuracy"] == rows[-1]["accuracy"] > 0.2
    assert result["validation_loss"] == rows[-2]["loss"]
    # Logits of the start are tanh(x W1) W2, whose Jacobian is explicit.
    dataset, _ = train.load(ONE, None)
    start = starts.make(ONE, 3, dataset)
    hand = Hand(start.variables["params"], start.mask)
    first, _, last, _ = hand.weights
    slopes = 1 - np.tanh(made("train")[0][:128] @ first) ** 2
    values = np.linalg.svd(last.T @ (slopes[:, :, None] * first.T), compute_uv=False)
    assert result["spectrum_mean"] == pytest.approx(values.mean(), rel=1e-3)
    assert result["spectrum_max"] == pytest.approx(values.max(), rel=1e-4)
    assert result["spectrum_std"] == pytest.approx(values.std(), rel=1e-3)
    assert list((tmp_path / "tensorboard").iterdir())
    # Killed before its results were written, it has nothing else left to do.
    before = [(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "results.json")]
    (tmp_path / "results.json").unlink()
    train.run(ONE, tmp_path, runtime)
    after = [(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "results.json")]
    assert after == before


def test_validation_data_are_evaluated_at_more_steps_if_asked(tmp_path):
    runtime = Runtime(runs=str(tmp_path), log_every=4)
    train.run(dataclasses.replace(ONE, validate_every=3), tmp_path, runtime)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    steps_of = {
        split: [row["step"] for row in rows if row["split"] == split]
        for split in ("train", "validation", "test")
    }
    assert steps_of == {
        "train": [3, 4, 6, 8, 9, 11, 12, 13],
        "validation": [3, 6, 9, 11, 12, 13],
        "test": [13],
    }


def test_the_clock_counts_training_alone_and_goes_on(tmp_path, monkeypatch):
    """A second a step, as a false clock has it, that other work takes another hundred of."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    path = tmp_path / "times.jsonl"

    def train_to(steps_done, *stops):
        with metrics.Clock(tmp_path, (3, 5), steps_done) as clock:
            for stop in stops:
                with clock.running():
                    now[0] += stop - steps_done
                now[0] += 100
                clock.write(stop)
                steps_done = stop

    def seconds():
        lines = list(map(json.loads, path.read_text().splitlines()))
        assert all(line["seeds"] == [3, 5] for line in lines)
        return {line["step"]: line["seconds"] for line in lines}

    train_to(0, 4, 8, 12)
    assert seconds() == {4: 4, 8: 8, 12: 12}
    train_to(8, 10)  # what was after the checkpoint of step 8 is done again
    assert seconds() == {4: 4, 8: 8, 10: 10}
    path.write_text(path.read_text() + '{"step": 11, "sec')
    train_to(10, 12)
    assert seconds() == {4: 4, 8: 8, 10: 10, 12: 12}
    for damaged in ("[]\n", '{"step": 12}\n', "", '{"step": 8, "seconds": 8.0, "seeds": [3, 5]}\n'):
        path.write_text(damaged)
        train_to(12, 13)
        assert seconds() == {}


@pytest.mark.slow
@pytest.mark.parametrize("config", [DYNAMIC, BLOCKS], ids=["set", "blocks"])
def test_a_run_goes_on_with_mask_momentum_and_count(config, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "DROP_AND_GROW_EVERY", 4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runtime = Runtime(runs=str(tmp_path), log_every=3, checkpoint_every=0.0)
    for folder in (whole, cut):
        folder.mkdir()
    train.run(config, whole, runtime)
    written = metrics.Metrics.write

    def stop(self, step, *rest):
        written(self, step, *rest)
        if step == 9:  # after the exchange of step 8; its checkpoint is of step 6
            raise KeyboardInterrupt

    monkeypatch.setattr(metrics.Metrics, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, cut, runtime)
    monkeypatch.setattr(metrics.Metrics, "write", written)
    assert not (cut / "results.json").exists()
    train.run(config, cut, runtime)
    for name in ("metrics.jsonl", "results.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    states = []
    for folder in (whole, cut):
        checkpoints = Checkpoints(folder / "checkpoints")
        assert checkpoints.latest == 13
        states.append(checkpoints.restore(begin(config)[2]))
    assert equal(*states)
    if config is DYNAMIC:
        assert int(states[0].optimizer.step) == 13
    times = [json.loads(line) for line in (cut / "times.jsonl").read_text().splitlines()]
    assert [line["step"] for line in times] == [3, 6, 9, 11, 12, 13]
    seconds = [line["seconds"] for line in times]
    assert 0 < seconds[0] < seconds[-1]
    assert seconds == sorted(seconds)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    runtime = Runtime(runs=str(tmp_path), log_every=1, checkpoint_every=0.0)
    message = r"step [1-5] .*seeds \[3\].*checkpoint .*step [1-5] .*learning_rate=1e\+25"
    with pytest.raises(FloatingPointError, match=message):
        train.run(dataclasses.replace(ONE, learning_rate=1e25), tmp_path, runtime)
    assert all(np.isfinite(row["loss"]) for row in metrics.read(tmp_path / "metrics.jsonl"))
    good = Checkpoints(tmp_path / "checkpoints").restore(begin(ONE)[2])
    assert all(np.isfinite(leaf).all() for leaf in leaves(good.params))


# ------------------------------------------------------------------ damaged files

ARGUMENTS = ["train", "--no-progress", "--log-every", "4", "--checkpoint-every", "0"] + [
    f"--{name.replace('_', '-')}={value[0] if name == 'seeds' else value}"
    for name, value in dataclasses.asdict(ONE).items()
    if not isinstance(value, bool) and value not in (None, ())
]


def command(root):
    """Run from the command line; return None, or what the process would exit with."""
    try:
        commands.main([*ARGUMENTS, "--runs", str(root)])
    except SystemExit as stop:
        return stop.code
    return None


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".damaged" and path.name != "times.jsonl"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of the runs of a process that was not interrupted."""
    root = tmp_path_factory.mktemp("whole")
    assert command(root) is None
    return root


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    """One that was stopped at step 12, after the checkpoints of steps 8 and 11."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 12)
        assert command(root) == 130
    return root


def interrupt_at(patch, step):
    """Press Ctrl-C right after the lines of a step."""
    write = metrics.Metrics.write

    def pressed(self, now, *rest):
        write(self, now, *rest)
        if now == step:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(metrics.Metrics, "write", pressed)


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of the stopped run: the folder of runs, and its own."""
    shutil.copytree(stopped, tmp_path / "runs")
    [folder] = (tmp_path / "runs").glob("*/*/checkpoints")
    return tmp_path / "runs", folder.parent


def flipped(position):
    def flip(data):
        damaged = bytearray(data)
        damaged[position if position >= 0 else len(data) + position] ^= 0x04
        return bytes(damaged)

    return flip


CHECKPOINT_DAMAGE = {
    "emptied": lambda data: b"",
    "cut in the length": lambda data: data[:5],
    "cut in the header": lambda data: data[:100],
    "cut in the arrays": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "zeros at the end": lambda data: data[:-512] + bytes(512),
    "longer": lambda data: data + b"0",
    "of random bytes": lambda data: np.random.default_rng(0).bytes(len(data)),
    "a text": lambda data: b"Not found\n",
    "a bit of the length": flipped(0),
    "a large length": flipped(6),
    "a bit of the record": flipped(60),
    "a bit of the header": flipped(700),
    "a bit of a weight": lambda data: flipped(len(data) // 2)(data),
    "the last bit": flipped(-1),
}


@pytest.mark.parametrize("kind", CHECKPOINT_DAMAGE)
def test_a_damaged_checkpoint_is_left_for_the_one_before(kind, copy, whole):
    root, folder = copy
    newest = folder / "checkpoints" / "11.safetensors"
    newest.write_bytes(CHECKPOINT_DAMAGE[kind](newest.read_bytes()))
    with pytest.warns(UserWarning, match=rf"{newest} is damaged.*11\.damaged.*from step 8"):
        command(root)
    assert files(root) == files(whole)


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(copy, whole):
    root, folder = copy
    shutil.copy(folder / "checkpoints" / "8.safetensors", folder / "checkpoints" / "12.safetensors")
    with pytest.warns(UserWarning, match=r"12\.safetensors is damaged.*from step 11"):
        command(root)
    assert files(root) == files(whole)


def test_without_a_whole_checkpoint_a_run_starts_again(copy, whole):
    root, folder = copy
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="the run starts again") as warned:
        command(root)
    assert len(warned) == 2
    assert files(root) == files(whole)


@pytest.mark.parametrize("missing", [("11",), ("8", "11")])
def test_without_checkpoints_a_run_goes_on_from_what_is_there(missing, copy, whole):
    root, folder = copy
    for step in missing:
        (folder / "checkpoints" / f"{step}.safetensors").unlink()
    command(root)
    assert files(root) == files(whole)


def test_a_checkpoint_that_is_damaged_is_not_shown(copy):
    _, folder = copy
    path = folder / "checkpoints" / "11.safetensors"
    path.write_bytes(flipped(-1)(path.read_bytes()))
    with refuses(str(path), "damaged", "go"):
        checkpoints.read(folder / "checkpoints")
    assert path.exists()


def test_a_checkpoint_that_a_killed_process_did_not_remove_is_removed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "runs")
    [folder] = (tmp_path / "runs").glob("*/*/checkpoints")
    shutil.copy(folder / "12.safetensors", folder / "11.safetensors")
    (folder.parent / "done").unlink()
    assert command(tmp_path / "runs") is None
    assert files(tmp_path / "runs") == files(whole)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    found = Checkpoints(tmp_path)
    found.save(3, {"a": np.zeros(3, np.float32)})
    for other in ({"a": np.zeros(4, np.float32)}, {"a": np.zeros(3, np.int32)}, {"b": np.zeros(3)}):
        with refuses(str(tmp_path / "3.safetensors"), "Remove"):
            found.restore(other)
    assert found.latest == 3


@pytest.mark.parametrize("text", ["", "[", "{}", None, '[{"seed": 3, "density": 0.4}]'])
def test_a_damaged_record_of_the_start_is_written_anew(text, copy, whole):
    root, folder = copy
    if text is None:
        (folder / "start.json").unlink()
    else:
        (folder / "start.json").write_text(text)
    with pytest.warns(UserWarning, match=r"start\.json was damaged"):
        command(root)
    assert files(root) == files(whole)


def test_a_damaged_line_completes_no_run(stopped, whole, tmp_path, capsys):
    """Any byte of the lines before the checkpoint: the run ends as it should, or not at all."""
    [folder] = stopped.glob("*/*/metrics.jsonl")
    lines = folder.read_bytes()
    num_kept = sum(json.loads(line)["step"] <= 11 for line in lines.splitlines())
    before = len(b"".join(lines.splitlines(keepends=True)[:num_kept]))
    positions = [*range(0, before, 41), *(i for i in range(before) if lines[i : i + 1] == b"\n")]
    refused = 0
    for position in positions:
        root = tmp_path / str(position)
        shutil.copytree(stopped, root)
        [path] = root.glob("*/*/metrics.jsonl")
        path.write_bytes(flipped(position)(lines))
        error = command(root)
        if error is None:
            assert files(root) == files(whole)
        else:
            assert error.startswith(f"error: {path}")
            assert "\n" not in error
            assert not (path.parent / "done").exists()
            assert not (path.parent / "results.json").exists()
            refused += 1
    assert refused > len(positions) * 0.9  # only a blank of JSON may be another blank


def test_a_damaged_line_is_told_by_its_number(copy):
    root, folder = copy
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for bad in (b"\xff\n", b'{"step": 4}\n', lines[1].replace(b"step", b"stop"), b"\n"):
        path.write_bytes(b"".join([lines[0], bad, *lines[2:]]))
        assert command(root).startswith(f"error: {path}, line 2")


def test_lines_that_are_missing_complete_no_run(whole, tmp_path):
    """The last checkpoint is there, and so is nothing left to train."""
    shutil.copytree(whole, tmp_path / "runs")
    [done] = (tmp_path / "runs").glob("*/*/done")
    path = done.with_name("metrics.jsonl")
    lines = path.read_bytes()
    for text in (lines[:-1], lines[:-20], b"".join(lines.splitlines(keepends=True)[1:]), b""):
        done.unlink(missing_ok=True)
        (done.parent / "results.json").unlink(missing_ok=True)
        path.write_bytes(text)
        assert command(tmp_path / "runs").startswith(f"error: {path}")
        assert not done.exists()
    path.write_bytes(lines)
    assert command(tmp_path / "runs") is None
    assert files(tmp_path / "runs") == files(whole)


# ------------------------------------------------------------------ interrupts and full disks


def test_an_interrupt_is_told_on_one_line(whole, tmp_path, monkeypatch, capsys):
    """At the start, in training, in the last evaluation and while a checkpoint is written."""

    def press(*arguments, **options):
        signal.raise_signal(signal.SIGINT)

    told = []
    for name, patch in {
        "start": lambda m: m.setattr(starts, "make", press),
        "training": lambda m: interrupt_at(m, 8),
        "checkpoint": lambda m: m.setattr(checkpoints.safetensors.numpy, "save", press),
        "end": lambda m: interrupt_at(m, 13),
    }.items():
        for _ in range(2 if name == "training" else 1):
            with monkeypatch.context() as context:
                patch(context)
                assert command(tmp_path) == 130
            told += capsys.readouterr().err.splitlines()
    assert told == [
        f"stopped at step {reached}; the same command goes on from step {last}"
        for reached, last in ((0, 0), (8, 4), (8, 4), (8, 4), (13, 12))
    ]
    command(tmp_path)
    assert files(tmp_path) == files(whole)


def test_an_interrupt_during_the_imports_comes_after_them(tmp_path, monkeypatch, capsys):
    """Where it would not be lost in a callback, nor become another error."""
    handler, reached = signal.getsignal(signal.SIGINT), []

    def load(name):
        signal.raise_signal(signal.SIGINT)
        reached.append(name)

    with monkeypatch.context() as context:
        context.setattr(commands.importlib, "import_module", load)
        assert command(tmp_path) == 130
    assert reached == ["experiments.training.train"]
    assert capsys.readouterr().err == "stopped; the same command goes on\n"
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_on_one_line(error, whole, tmp_path, monkeypatch, capsys):
    """Whichever of the run's writes meets it."""
    fsync = os.fsync
    for number in (0, 2, 4, 7, 12, 10**6):
        count = itertools.count()

        def full(descriptor, number=number, count=count):
            if next(count) >= number:
                raise OSError(error, os.strerror(error))
            fsync(descriptor)

        with monkeypatch.context() as context:
            context.setattr(os, "fsync", full)
            told = command(tmp_path)
        assert (told is None) == (number == 10**6)
        assert told is None or re.fullmatch(r"error: .*Free some space.*", told)
    [done] = tmp_path.glob("*/*/done")
    (done.parent / "failed.txt").unlink(missing_ok=True)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("epochs", [1e9, 2e8, 1e300])
def test_more_steps_than_can_be_counted_are_refused(epochs, tmp_path):
    with refuses("epochs", epochs, "steps"):
        train.compiled(dataclasses.replace(ONE, epochs=epochs), None)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split_is_refused(split, monkeypatch):
    def load(name, data_dir, image_shape):
        part = getattr(real, split)
        return dataclasses.replace(real, **{split: type(part)(part.images[:0], part.labels[:0])})

    real, _ = train.load(ONE, None)
    monkeypatch.setattr(train.data, "load", load)
    with refuses("data", "made", f"{split} split"):
        train._load.__wrapped__("made", None, None)


KILLED = """
import os, signal, sys
from experiments import runs
from experiments.training import metrics, train
from experiments.config import Train

config, moment, *folders = sys.argv[1:]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "line":  # in the middle of a line, after the checkpoint of step 6
    written = metrics.Metrics.write
    def write(self, step, *rest):
        written(self, step, *rest)
        if step == 8:
            self._file.write('{"step": 9, "epo')
            self._file.flush()
            kill()
    metrics.Metrics.write = write
if moment == "checkpoint":  # complete, but under another name
    replace = os.replace
    def stop(old, new, **options):
        if str(new).endswith("checkpoints/12.safetensors"):
            kill()
        replace(old, new, **options)
    os.replace = stop
for folder in folders:
    print(runs.execute(eval(config), runs.Runtime(folder, log_every=2, checkpoint_every=0.0)))
"""


@pytest.mark.slow
def test_killed_runs_end_as_if_they_were_not(tmp_path):
    """A real process is killed within a line of metrics, and within a checkpoint."""

    def start(moment, *folders):
        command = [sys.executable, "-c", KILLED, repr(ONE), moment]
        done = subprocess.run(
            [*command, *(str(tmp_path / folder) for folder in folders)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == (0 if moment == "never" else -signal.SIGKILL), done.stderr
        return [Path(line) for line in done.stdout.split()]

    start("line", "cut")
    [folder] = (tmp_path / "cut").glob("*/*/checkpoints")
    assert {path.name for path in folder.iterdir()} == {"4.safetensors", "6.safetensors"}
    start("checkpoint", "cut")
    names = {path.name for path in folder.iterdir()}
    assert {"10.safetensors", "11.safetensors"} < names
    assert len(names) == 3
    folders = start("never", "cut", "whole")
    for name in ("metrics.jsonl", "results.json", "done"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    states = []
    for folder in folders:
        checkpoints = Checkpoints(folder / "checkpoints")
        assert {path.stem for path in checkpoints.folder.iterdir()} == {"12", "13"}
        states.append(checkpoints.restore(begin(ONE)[2]))
    assert equal(*states)


# ------------------------------------------------------------------ metrics and the command line


def test_lines_after_the_last_checkpoint_are_cut_off(tmp_path):
    config, runtime = dataclasses.replace(ONE, seeds=(1, 2)), Runtime()
    with metrics.Metrics(tmp_path, config, runtime, 0) as log:
        for step in (10, 20, 30):
            log.write(step, step / 8, "train", [1.0, 2.0], np.float32([0.1, 0.2]))
    whole = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(whole)[:-9])
    with metrics.Metrics(tmp_path, config, runtime, 20) as log:
        assert log.path.read_bytes() == b"".join(whole[:4])
        log.write(30, 30 / 8, "train", [1.0, 2.0], np.float32([0.1, 0.2]))
    assert log.path.read_bytes() == b"".join(whole)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with refuses("runtime.wandb=True", "pip install wandb", error=ImportError):
        metrics.Metrics(tmp_path, ONE, Runtime(wandb=True), 0)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    calls = []

    def run(config, runtime):
        calls.append((config, runtime))
        if config.seeds == (9,):
            raise FloatingPointError("not finite")
        row = {"seed": 1, "test_accuracy": 0.5, "test_loss": 1.25, "kept": 1000, "size": 10_000}
        (tmp_path / "results.json").write_text(json.dumps([row]))
        return tmp_path

    monkeypatch.setattr(train, "execute", run)
    train.main(["--method", "dense", "--density", "1", "--seeds", "1", "2", "--log-every", "7"])
    [(config, runtime)] = calls
    assert config == Train(method="dense", density=1.0, seeds=(1, 2))
    assert runtime == Runtime(log_every=7)
    out = capsys.readouterr().out
    assert "seed 1: test accuracy 50.00%, loss 1.2500; 1,000 of 10,000 weights" in out
    assert str(tmp_path) in out
    for bad, message in ((["--seeds", "9"], "not finite"), (["--density", "2"], "density=2")):
        with pytest.raises(SystemExit) as stopped:
            train.main(bad)
        assert message in str(stopped.value) + capsys.readouterr().err
