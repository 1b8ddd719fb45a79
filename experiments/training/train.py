"""Train one network from one kind of start, with a few seeds at once.

A run goes on where it was interrupted, and then equals one that was not, bit for bit: all that is
random depends on seed, epoch and step alone, and the number of steps in one dispatch is an argument
of the compiled program.

Example:
    python -m experiments train --method eoi --density 0.1 --epochs 2 --seeds 1 2 3
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import eoi_jax as eoi
from experiments import config as configs
from experiments import data, models
from experiments.runs import RunningElsewhere, Runtime, execute, write
from experiments.studies import measure
from experiments.tools import show
from experiments.training import metrics, programs, pruning, starts
from experiments.training.checkpoints import Checkpoints

__all__ = ["main", "run"]

_SAVE = "File for the trained network of the first seed, by eoi.save: net.safetensors."


def run(config: configs.Train, folder: Path, runtime: Runtime) -> None:
    """Train, or go on training, and leave metrics and results in a folder.

    Validation data are evaluated after each epoch and at the end, test data at the end. A
    checkpoint is written every ``runtime.checkpoint_every`` seconds, at the end of an epoch already
    after a tenth of that, and at the end.

    Args:
        config: what to train.
        folder: that of the run; it exists.
        runtime: where data lie, what is logged and how often.

    Raises:
        ValueError: for settings that do not go together, as a batch larger than the training set.
        FloatingPointError: if a loss or a weight is not finite; the message names step, seeds and
            the last checkpoint.

    Example:
        >>> import pathlib, tempfile
        >>> from experiments import config, runs
        >>> from experiments.training import metrics, train
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> one = config.Train(data="made", method="base", init="fan_in", depth=2, width=20)
        >>> train.run(one, folder, runs.Runtime(runs=str(folder)))
        >>> sorted({row["split"] for row in metrics.read(folder / "metrics.jsonl")})
        ['test', 'train', 'validation']
    """
    dataset, arrays = programs.load(config, runtime.data_dir)
    own = programs.compiled(config, runtime.data_dir)
    steps, steps_of_epoch = own.steps, own.steps_of_epoch
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.latest or 0
        if step:
            state = checkpoints.restore(_abstract(config, own, dataset))
        else:
            state = _begin(config, own, dataset, folder, Path(runtime.runs) / "cache")
        order, saved = None, time.monotonic()
        with (
            metrics.Metrics(folder, config, runtime, step) as log,
            metrics.Bar(_title(config), steps, step, shown=runtime.progress) as bar,
        ):
            while step < steps:
                epoch, done = divmod(step, steps_of_epoch)
                if order is None or done == 0:
                    order = own.order(state, epoch)
                first, step = step, _next_stop(step, steps, steps_of_epoch, runtime.log_every)
                state, sums = own.advance(
                    state, order, first, step, config.learning_rate, *arrays["train"]
                )
                loss, accuracy, bad = map(_numbers, sums)
                _check(bad == programs.NEVER, int(bad.min()), "loss", config, checkpoints)
                loss, accuracy = loss / (step - first), accuracy / (step - first)
                log.write(step, step / steps_of_epoch, "train", loss, accuracy)
                examples = (step - first) * config.batch_size * len(config.seeds)
                bar.update(step, loss.mean(), accuracy.mean(), examples)

                ends = step == steps or step % steps_of_epoch == 0
                for split in ("validation", "test") if step == steps else ("validation",):
                    if ends:
                        loss, accuracy = map(_numbers, own.evaluate(state, *arrays[split]))
                        log.write(step, step / steps_of_epoch, split, loss, accuracy)
                waited = time.monotonic() - saved
                due = runtime.checkpoint_every / (10 if ends else 1)
                if step == steps or waited >= due:
                    finite = _numbers(own.finite(state))
                    _check(finite, step, "weight", config, checkpoints)
                    log.sync()
                    checkpoints.save(step, state)
                    saved = time.monotonic()
    write(folder / "results.json", json.dumps(_results(config, folder, steps), indent=2) + "\n")


def _numbers(values: Any) -> np.ndarray:
    """Return what was computed, one number a seed."""
    return np.atleast_1d(np.asarray(values))


def _title(config: configs.Train) -> str:
    rule = "" if config.method in ("dense", "sao") else f" {config.criterion}"
    return f"{config.model} {config.method}{rule} {config.density:g}"


def _next_stop(step: int, steps: int, steps_of_epoch: int, log_every: int) -> int:
    """Return where a dispatch ends: at a line of the log, an epoch's end or the last step."""
    return min(steps, *((step // every + 1) * every for every in (steps_of_epoch, log_every)))


def _check(
    finite: np.ndarray, step: int, what: str, config: configs.Train, checkpoints: Checkpoints
) -> None:
    if finite.all():
        return
    seeds = [seed for seed, good in zip(config.seeds, finite, strict=True) if not good]
    kept = checkpoints.latest
    where = "There is no checkpoint" if kept is None else f"The last checkpoint is of step {kept}"
    raise FloatingPointError(
        f"A {what} is not finite at step {step} for seeds {seeds}. {where} in "
        f"{checkpoints.folder}. Lower learning_rate={config.learning_rate} or scale={config.scale}."
    )


def _begin(
    config: configs.Train, own: programs.Programs, dataset: data.Dataset, folder: Path, cache: Path
) -> programs.State:
    """Make the start of every seed, and write down what is known of it."""
    made = [starts.make(config, seed, dataset, cache=cache) for seed in config.seeds]
    rows = []
    for seed, start in zip(config.seeds, made, strict=True):
        kept, size = starts.count(start)
        row = {"seed": seed, "density": kept / size, "kept": kept, "size": size}
        rows.append({**row, **_spectrum(config, dataset, start)})
    write(folder / "start.json", json.dumps(rows, indent=2) + "\n")
    return own.stack(
        [
            own.begin(jax.random.key_data(jax.random.key(seed)), start.variables, start.mask)
            for seed, start in zip(config.seeds, made, strict=True)
        ]
    )


def _abstract(config: configs.Train, own: programs.Programs, dataset: data.Dataset) -> Any:
    """Return the shapes of a state, without making a start."""
    pruned = pruning.where(config)

    def begin(seed: Any) -> programs.State:
        variables = starts.dense(config, seed, dataset)
        mask = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.ones(
                leaf.shape if config.method != "dense" and pruned(path, leaf) else (), bool
            ),
            variables["params"],
        )
        one = own.begin(jax.random.key_data(jax.random.key(seed)), variables, mask)
        return own.stack([one] * len(config.seeds))

    return jax.eval_shape(begin, 0)


def _spectrum(
    config: configs.Train, dataset: data.Dataset, start: starts.Start
) -> dict[str, float | None]:
    """Measure the spectrum of a network of linear layers alone.

    The Jacobian of one with convolutions would take longer than much of its training.
    """
    leaves = jax.tree_util.tree_leaves_with_path(start.variables["params"])
    for path, leaf in leaves:
        if eoi.masks.is_kernel(path, leaf) and leaf.ndim > 2 + models.layout(path, leaf).batch_axes:
            return {}
    return measure.spectrum_of(config, dataset, start)


def _results(config: configs.Train, folder: Path, steps: int) -> list[dict[str, Any]]:
    """Return one row a seed: what was known at the start, and the last line of each split."""
    rows = json.loads((folder / "start.json").read_text(encoding="utf-8"))
    by_seed = {row["seed"]: {**row, "steps": steps} for row in rows}
    for line in metrics.read(folder / "metrics.jsonl"):
        for name in ("loss", "accuracy"):
            by_seed[line["seed"]][f"{line['split']}_{name}"] = line[name]
    return list(by_seed.values())


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""

    def command(
        config: Annotated[configs.Train, tyro.conf.OmitArgPrefixes],
        runtime: Annotated[Runtime, tyro.conf.OmitArgPrefixes],
        save: Annotated[str | None, tyro.conf.arg(help=_SAVE)] = None,
    ) -> None:
        # Before there is a folder: a typo is no run.
        models.choose(config.model, models.NAMES, "model")
        models.choose(config.data, data.NAMES, "data")
        if save is not None and (Path(save).is_dir() or not Path(save).parent.is_dir()):
            raise ValueError(
                f"save={save!r} is outside the files in a folder that exists. Make the folder, and "
                "name a file in it: net.safetensors."
            )
        folder = execute(config, runtime)
        for row in json.loads((folder / "results.json").read_text(encoding="utf-8")):
            print(
                f"seed {row['seed']}: test accuracy {row['test_accuracy']:.2%}, loss "
                f"{row['test_loss']:.4f}; {row['kept']:,} of {row['size']:,} weights"
            )
        print(f"Folder: {folder}")
        if save is not None:
            own, about = show.read_run(folder), configs.to_dict(config)
            eoi.save(save, own.variables, own.mask, metadata=about, layout=models.layout)
            print(f"Saved: {save}")

    try:
        prog = "python -m experiments train"
        tyro.cli(command, args=arguments, description=__doc__, prog=prog)
    except (ArithmeticError, ImportError, OSError, RunningElsewhere, ValueError) as error:
        sys.exit(f"error: {error}")
