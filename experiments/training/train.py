"""Train one network from one kind of start, with a few seeds at once.

An interrupted run resumes, and its result equals that of an uninterrupted run, bit for bit: all
random numbers depend only on seed, epoch and step, and the number of steps in one dispatch is an
argument of the compiled program. With ``--mesh`` a run trains on several devices. If Slurm,
Kubernetes or environment variables describe several processes, all of them train together. The run
is the same on every mesh, and can resume on another mesh.

Example:
    python -m experiments train --method eoi --density 0.1 --epochs 2 --seeds 1 2 3
    srun python -m experiments train --mesh data=2,model=4
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eoi_jax as eoi
from eoi_jax.typing import Array
from experiments import data, models
from experiments.config import WITHOUT_CRITERION, Train, to_dict
from experiments.runs import (
    RunningElsewhere,
    Runtime,
    execute,
    explain,
    processes,
    write_json,
)
from experiments.studies import measure
from experiments.tools import show
from experiments.training import (
    loops,
    mesh_loops,
    meshes,
    metrics,
    network,
    rates,
    starts,
    steps,
)
from experiments.training.checkpoints import Checkpoints
from experiments.training.loops import Epoch
from experiments.training.steps import State

__all__ = ["StepFns", "compiled", "load", "main", "run"]

_SAVE = "File for the trained network of the first seed, by eoi.save: net.safetensors."

_ERRORS = (ArithmeticError, ImportError, OSError, RunningElsewhere, ValueError)  # told on one line

# Fields that the compiled functions depend on. Runs that differ in others share them.
_FIELDS = (
    *("model", "activation", "depth", "width", "data", "dynamic"),
    *("epochs", "batch_size", "optimizer", "momentum", "weight_decay", "density_power"),
)


class StepFns(NamedTuple):
    """The compiled functions of training, of one seed or of several stacked ones.

    Attributes:
        begin: ``(key, variables, mask) -> State`` of one seed.
        order: ``(state, epoch) -> indices`` of the training images of each of its steps.
        advance: ``(state, first, stop, epoch) -> (state, Sums)``: trains from step ``first`` to
            ``stop``, both of one :class:`Epoch`. The state passed is used up.
        evaluate: ``(state, images, labels) -> (loss, accuracy)``, means over all images.
        is_finite: ``(state) -> bool``: whether all parameters are.
        num_steps: Training steps in all.
        steps_of_epoch: Those of one epoch; what is left of the images is dropped.
    """

    begin: Callable[..., State]
    order: Callable[..., Any]
    advance: loops.Advance
    evaluate: Callable[..., tuple[Any, Any]]
    is_finite: Callable[[State], Array]
    num_steps: int
    steps_of_epoch: int


def load(
    config: Train, data_dir: str | None
) -> tuple[data.Dataset, dict[str, tuple[Array, Array]]]:
    """Load the data set of a config, and bring its splits to the device; kept for the next call.

    Returns:
        The data set, and images and labels of ``"train"``, ``"validation"`` and ``"test"``.
    """
    return _load(config.data, data_dir, network.image_shape(config))


@functools.lru_cache(maxsize=1)
def _load(name: str, data_dir: str | None, shape: Any) -> Any:
    dataset = _read(name, data_dir, shape)
    on_device = {
        split: (jnp.asarray(images), jnp.asarray(labels))
        for split, (images, labels) in _splits(dataset).items()
    }
    return dataset, on_device


def _read(name: str, data_dir: str | None, shape: Any) -> data.Dataset:
    dataset = data.load(name, data_dir, image_shape=shape)
    for split, (_, labels) in _splits(dataset).items():
        if not len(labels):
            raise ValueError(
                f"data={name!r} has no image in its {split} split, of {len(dataset.train.labels)} "
                "for training. Choose a larger set."
            )
    return dataset


def _splits(dataset: data.Dataset) -> dict[str, Any]:
    names = ("train", "validation", "test")
    return {name: (getattr(dataset, name).images, getattr(dataset, name).labels) for name in names}


def compiled(config: Train, data_dir: str | None, mesh: Mesh | None = None) -> StepFns:
    """Return the functions of a config; configs that need the same ones share them.

    Args:
        config: What is trained.
        data_dir: Folder of prepared data sets.
        mesh: Devices to train on: then orders and images are arrays of NumPy. Default: one device.
    """
    fields = {name: getattr(config, name) for name in _FIELDS}
    if config.method == "blocks":  # its network depends on more
        more = ("method", "density", "block_size", "scale")
        fields |= {name: getattr(config, name) for name in more}
    seeds = (0,) if len(config.seeds) == 1 else (0, 1)
    return _compiled(Train(seeds=seeds, **fields), data_dir, mesh)


@functools.lru_cache(maxsize=8)
def _compiled(config: Train, data_dir: str | None, mesh: Mesh | None = None) -> StepFns:
    dataset = _read(config.data, data_dir, network.image_shape(config))
    model = network.build(config, dataset.num_classes)
    loop = loops.device_loop
    # In a loop, XLA for CPUs takes tens of times as long for the gradient of a convolution, and for
    # the convolutions of several seeds at once several times as long as for one after the other.
    if jax.default_backend() == "cpu" and mesh is None:
        adapt = models.SPECS[config.model].in_cpu_loop
        model, loop = (adapt(model), loop) if adapt else (model, loops.python_loop)
    size, batch_size = len(dataset.train.labels), config.batch_size
    if batch_size > size:
        raise ValueError(
            f"batch_size={batch_size} is outside [1, {size}], the training images of "
            f"{config.data}. Give a smaller one."
        )
    if mesh is not None and batch_size % mesh.shape["data"]:
        raise ValueError(
            f"batch_size={batch_size} cannot be divided among data={mesh.shape['data']} of the "
            "mesh. Give a multiple of it, or another mesh."
        )
    steps_of_epoch = size // batch_size
    # Steps are counted in int32, whose last number means no step at all.
    longest = (steps.NEVER - 1) // steps_of_epoch
    if config.epochs > longest:
        raise ValueError(
            f"epochs={config.epochs!r} is outside (0, {longest}]: with {steps_of_epoch} steps an "
            f"epoch, a run has at most {steps.NEVER - 1:,} of them. Give fewer epochs."
        )
    num_steps = max(1, round(config.epochs * steps_of_epoch))
    optimizer_of = steps.sparse_optimizer(
        num_steps,
        optimizer=config.optimizer,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        dynamic=config.dynamic,
        density_power=config.density_power,
    )
    begin = functools.partial(steps.init_state, optimizer_of)
    order = loops.epoch_order(size, batch_size)
    train_step = steps.train_step(model, dataset, optimizer_of)
    axes = loops.state_axes(dynamic=config.dynamic != "static")
    several = len(config.seeds) > 1
    is_finite = steps.is_finite
    if several:
        order, is_finite = jax.vmap(order, (axes, None)), jax.vmap(is_finite, (axes,))
    num = (num_steps, steps_of_epoch)
    if mesh is not None:
        step_of_batch = loops.step_of_examples(train_step, num_steps)
        totals = steps.evaluated_batch(model, dataset)
        if several:
            step_of_batch = jax.vmap(step_of_batch, (axes, 0, None, None, 0, 0), (axes, 0))
            totals = jax.vmap(totals, (axes, None, None, None))
        whole = NamedSharding(mesh, PartitionSpec())
        order_on_mesh = jax.jit(order, out_shardings=whole)
        return StepFns(
            jax.jit(begin),
            lambda state, epoch: np.asarray(order_on_mesh(state, epoch)),
            mesh_loops.advance(step_of_batch, mesh),
            mesh_loops.evaluate(totals, mesh, batch_size),
            jax.jit(is_finite, out_shardings=whole),
            *num,
        )
    step = loops.step_of_epoch(train_step, num_steps)
    evaluate = steps.evaluation(model, dataset, batch_size)
    if several and loop is loops.device_loop:
        step = jax.vmap(step, (axes, 0, None, Epoch(0, None, None, None)), (axes, 0))  # type: ignore[arg-type]
        evaluate = jax.vmap(evaluate, (axes, None, None))
    elif several:
        evaluate = loops.one_by_one(evaluate)
    return StepFns(
        jax.jit(begin), jax.jit(order), loop(step), jax.jit(evaluate), jax.jit(is_finite), *num
    )


def run(config: Train, folder: Path, runtime: Runtime) -> None:
    """Train, or go on training, and leave metrics and results in a folder.

    Validation data are evaluated after each epoch, every ``config.validate_every`` steps and at the
    end, test data at the end. A checkpoint is written every ``runtime.checkpoint_every`` seconds,
    at the end of an epoch already after a tenth of that, and at the end. A config of several
    learning rates is left to :mod:`experiments.training.rates`. Of several processes each calls
    this, and the first writes.
    """
    if config.learning_rates:
        rates.run(config, folder, runtime)
        return
    mesh = None if runtime.mesh is None else meshes.make(meshes.parse(runtime.mesh))
    if mesh is None:
        dataset, arrays = load(config, runtime.data_dir)
    else:
        dataset = _read(config.data, runtime.data_dir, network.image_shape(config))
        arrays = _splits(dataset)
    step_fns = compiled(config, runtime.data_dir, mesh)
    num_steps, steps_of_epoch = step_fns.num_steps, step_fns.steps_of_epoch
    every = config.validate_every
    occasions = (steps_of_epoch, runtime.log_every, *([every] if every else []))
    checkpoints = Checkpoints(folder / "checkpoints", on_mesh=mesh is not None)
    found = checkpoints.recover()
    reached = step = found.step if found else 0
    try:
        if found:
            state = checkpoints.restore(_abstract(config, step_fns, dataset, mesh), found)
            rows = found.record["start"]
        else:
            state, rows = _begin(config, step_fns, dataset, Path(runtime.runs) / "cache")
            state = state if mesh is None else _on_mesh(state, mesh)
        if processes.is_first():
            _write_start(folder / "start.json", rows, kept=found is not None)
        epoch, saved = None, time.monotonic()
        logged = found.record["metrics"] if found else None
        with contextlib.ExitStack() as stack:
            log: Any = metrics.Silent()
            clock: Any = log
            bar: Any = log
            if processes.is_first():
                log = stack.enter_context(metrics.Metrics(folder, config, runtime, step, logged))
                clock = stack.enter_context(metrics.Clock(folder, config.seeds, step))
                bar = metrics.Bar(_title(config), num_steps, step, shown=runtime.progress)
                stack.enter_context(bar)
            while step < num_steps:
                if epoch is None or step % steps_of_epoch == 0:
                    compiles = epoch is None
                    order = step_fns.order(state, step // steps_of_epoch)
                    epoch = Epoch(order, config.learning_rate, *arrays["train"])
                    if compiles:
                        _compile(step_fns, state, step, epoch)
                first, step = step, _next_stop(step, num_steps, occasions)
                with clock.running():
                    state, sums = step_fns.advance(state, first, step, epoch)
                    loss, accuracy, bad = map(_numbers, sums)
                clock.write(step)
                _check(bad == steps.NEVER, int(bad.min()), "loss", config, checkpoints)
                reached = step
                loss, accuracy = loss / (step - first), accuracy / (step - first)
                log.write(step, step / steps_of_epoch, "train", loss, accuracy)
                examples = (step - first) * config.batch_size * len(config.seeds)
                bar.update(step, loss.mean(), accuracy.mean(), examples)

                ends = step == num_steps or step % steps_of_epoch == 0
                validates = ends or (every > 0 and step % every == 0)
                for split in ("validation", "test") if step == num_steps else ("validation",):
                    if validates:
                        loss, accuracy = map(_numbers, step_fns.evaluate(state, *arrays[split]))
                        log.write(step, step / steps_of_epoch, split, loss, accuracy)
                waited = time.monotonic() - saved
                due = runtime.checkpoint_every / (10 if ends else 1)
                if step == num_steps or processes.agree(waited >= due):
                    finite = _numbers(step_fns.is_finite(state))
                    _check(finite, step, "weight", config, checkpoints)
                    checkpoints.save(step, state, {"start": rows, "metrics": log.sync()})
                    saved = time.monotonic()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped at step {reached}; the same command goes on from step "
            f"{checkpoints.latest or 0}"
        ) from None
    if processes.is_first():
        write_json(folder / "results.json", _results(folder, rows, num_steps))


def _numbers(values: Any) -> np.ndarray:
    """Return what was computed, one number a seed."""
    return np.atleast_1d(np.asarray(values))


def _title(config: Train) -> str:
    rule = "" if config.method in WITHOUT_CRITERION else f" {config.criterion}"
    return f"{config.model} {config.method}{rule} {config.density:g}"


def _compile(step_fns: StepFns, state: State, step: int, epoch: Epoch) -> None:
    """Take one step and forget it, so that no time to compile is in that of training."""
    copied = jax.tree.map(jnp.copy, state)
    jax.block_until_ready(step_fns.advance(copied, step, step + 1, epoch))


def _next_stop(step: int, num_steps: int, occasions: Iterable[int]) -> int:
    """Return where a dispatch ends: at the next multiple of one of the occasions, or the end."""
    return min(num_steps, *((step // every + 1) * every for every in occasions))


def _check(
    finite: np.ndarray, step: int, what: str, config: Train, checkpoints: Checkpoints
) -> None:
    remedy = f"Lower learning_rate={config.learning_rate} or scale={config.scale}."
    what = f"A {what} is not finite at step {step}"
    checkpoints.require_finite(finite, config.seeds, what, remedy)


def _begin(
    config: Train, step_fns: StepFns, dataset: data.Dataset, cache: Path
) -> tuple[State, list[dict[str, Any]]]:
    """Make the start of every seed, and tell what is known of it."""
    made = [starts.make(config, seed, dataset, cache=cache) for seed in config.seeds]
    rows = [
        {**starts.record(seed, start), **_spectrum(config, dataset, start)}
        for seed, start in zip(config.seeds, made, strict=True)
    ]
    states = [
        step_fns.begin(jax.random.key(seed), *start)
        for seed, start in zip(config.seeds, made, strict=True)
    ]
    return loops.stack(states), rows


def _on_mesh(state: State, mesh: Mesh) -> State:
    """Bring the state that every process has made to the devices of all.

    Raises:
        RuntimeError: If another process has made another one.
    """
    host = jax.tree.map(np.asarray, state)
    sha256 = hashlib.sha256()
    for leaf in jax.tree.leaves(host):
        sha256.update(leaf.tobytes())
    if processes.agree(sha256.hexdigest()) != sha256.hexdigest():
        raise RuntimeError(
            "This process has drawn other weights than the first one. Use processors and versions "
            "of JAX of one kind in all of them."
        )
    shardings = meshes.shardings(mesh, host)
    return jax.tree.map(meshes.put, host, shardings)


def _write_start(path: Path, rows: list[dict[str, Any]], *, kept: bool) -> None:
    """Write what is known of the start, and warn if it should be there and is not."""
    try:
        intact = json.loads(path.read_bytes()) == rows
    except (FileNotFoundError, ValueError):
        intact = False
    if kept and not intact:
        warnings.warn(f"{path} was damaged and is written anew from the checkpoint.", stacklevel=3)
    if not intact:
        write_json(path, rows)


def _abstract(config: Train, step_fns: StepFns, dataset: data.Dataset, mesh: Mesh | None) -> Any:
    """Return the shapes of a state, and how it is divided on a mesh, without making a start."""
    pruned = network.where(config)

    def begin(seed: Any) -> State:
        variables = starts.dense(config, seed, dataset)
        mask = starts.full_mask(config.method, variables["params"], pruned)
        one = step_fns.begin(jax.random.key(seed), variables, mask)
        return loops.stack([one] * len(config.seeds))

    shapes = jax.eval_shape(begin, 0)
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        meshes.shardings(mesh, shapes),
    )


def _spectrum(config: Train, dataset: data.Dataset, start: starts.Start) -> dict[str, float | None]:
    """Measure the spectrum of a network of linear layers alone.

    The Jacobian of one with convolutions would take longer than much of its training. Of a
    transformer that of its blocks.
    """
    if models.SPECS[config.model].attention:
        return measure.spectrum_of(config, dataset, start)
    matrices = models.block_sparse.matrices(start.variables)
    leaves = jax.tree_util.tree_leaves_with_path(start.variables["params"])
    for path, leaf in leaves:
        if models.block_sparse.module(path) in matrices:
            continue
        if eoi.masks.is_kernel(path, leaf) and leaf.ndim > 2 + models.layout(path, leaf).batch_axes:
            return {}
    return measure.spectrum_of(config, dataset, start)


def _results(folder: Path, rows: list[dict[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    """Return one row a seed: what was known at the start, and what each split came to.

    That is the last line, but of training, whose lines are of single batches or a few, the mean
    over the last tenth of the steps.
    """
    by_seed = {row["seed"]: {**row, "steps": num_steps} for row in rows}
    lines = metrics.read(folder / "metrics.jsonl")
    for line in lines:
        for name in ("loss", "accuracy"):
            by_seed[line["seed"]][f"{line['split']}_{name}"] = line[name]
    for seed, row in by_seed.items():
        train = [line for line in lines if (line["seed"], line["split"]) == (seed, "train")]
        steps = np.diff([0, *(line["step"] for line in train)])
        late = [line["step"] > 0.9 * num_steps for line in train]
        for name in ("loss", "accuracy"):
            values = [line[name] for line in train]
            row[f"train_{name}"] = float(np.average(values, weights=steps * late))
    return list(by_seed.values())


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""

    def command(
        config: Annotated[Train, tyro.conf.OmitArgPrefixes],
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
        if save is not None and config.learning_rates:
            raise ValueError(
                f"save={save!r} is for a training at one rate, and learning_rates="
                f"{config.learning_rates} are several. Train with them first, then with the rate "
                "chosen as learning_rate, and one seed: that run is complete."
            )
        if runtime.mesh is not None:
            meshes.parse(runtime.mesh)
            processes.initialize(runtime.heartbeat)
        with processes.ending_together():
            try:
                folder = execute(config, runtime)
            except RuntimeError as error:
                if not processes.several() or isinstance(error, jax.errors.JaxRuntimeError):
                    raise
                sys.exit(f"error: {explain(error)}")
            except _ERRORS as error:
                sys.exit(f"error: {explain(error)}")
            if processes.is_first():
                _tell(config, folder, save)

    try:
        prog = "python -m experiments train"
        tyro.cli(command, args=arguments, description=__doc__, prog=prog)
    except _ERRORS as error:
        sys.exit(f"error: {explain(error)}")


def _tell(config: Train, folder: Path, save: str | None) -> None:
    """Print the results of a run, and save its network if asked."""
    for row in json.loads((folder / "results.json").read_text(encoding="utf-8")):
        rate = f", learning rate {row['learning_rate']:g}" if config.learning_rates else ""
        print(
            f"seed {row['seed']}{rate}: test accuracy {row['test_accuracy']:.2%}, loss "
            f"{row['test_loss']:.4f}; {row['kept']:,} of {row['size']:,} weights"
        )
    print(f"Folder: {folder}")
    if save is not None:
        saved, about = show.read_run(folder), to_dict(config)
        eoi.save(save, saved.variables, saved.mask, metadata=about, layout=models.layout)
        print(f"Saved: {save}")
