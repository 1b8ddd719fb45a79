"""Train an actor and a critic by PPO from one kind of start, with a few seeds at once.

An interrupted run resumes, and its result equals that of an uninterrupted run, bit for bit: all
random numbers depend only on seed and update, and the number of updates in one dispatch is an
argument of the compiled program.

Example:
    python -m experiments rl --env CartPole-v1 --width 256 --density 0.1 --seeds 1 2 3
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.config import WITHOUT_CRITERION, Ppo
from experiments.rl import diagnostics, environments, networks, ppo, starts
from experiments.rl.aggregates import interquartile_mean
from experiments.rl.ppo import State, StepFns, Sums
from experiments.runs import RunningElsewhere, Runtime, execute, explain, write_json
from experiments.training import metrics, rates
from experiments.training.checkpoints import Checkpoints
from experiments.training.starts import full_mask, record

__all__ = ["TYPES", "main", "run"]

TYPES: Mapping[str, type] = {
    **{"step": int, "seed": int, "return": float, "episodes": int, "loss": float},
    **{"entropy": float, "dormant_actor": float, "dormant_critic": float},
    **{"smallest": float, "largest": float},
}
"""What a line of ``metrics.jsonl`` holds: one seed's means since the last line, and measures.

``return`` is NaN where no episode was completed; the Jacobian's range is measured at the start and
after each quarter, and NaN elsewhere."""

_RANGE = ("smallest", "largest")


def run(config: Ppo, folder: Path, runtime: Runtime) -> None:
    """Train, or go on training, and leave metrics and results in a folder.

    Each of ``config.num_points`` equal parts ends with a line for each seed. A checkpoint is
    written where one ends and ``runtime.checkpoint_every`` seconds have passed, and at the end. A
    config of several learning rates is trained as one run a rate.
    """
    if config.learning_rates:
        _run_best_rate(config, folder, runtime)
        return
    step_fns = ppo.compiled(config)
    per_update = config.num_envs * config.num_steps
    checkpoints = Checkpoints(folder / "checkpoints")
    found = checkpoints.recover()
    reached = found.step if found else 0
    try:
        if found:
            state = checkpoints.restore(_abstract(config, step_fns), found)
            rows = found.record["start"]
        else:
            state, rows = _begin(config, step_fns)
        logged, saved = found.record["metrics"] if found else None, time.monotonic()
        kept = reached if found else -1  # the start has a line, of step 0
        with (
            metrics.Metrics(folder, config, runtime, kept, logged, TYPES) as log,
            metrics.Clock(folder, config.seeds, reached) as clock,
            metrics.Bar(_title(config), *_updates(config, reached), shown=runtime.progress) as bar,
        ):
            if not found:
                _log(log, config, 0, _measures(step_fns, state, spectrum=True))
            _compile(step_fns, state, config.learning_rate)
            for first, stop, quarter in _parts(config):
                if stop * per_update <= reached:
                    continue
                with clock.running():
                    state, sums = step_fns.advance(state, config.learning_rate, first, stop)
                    sums = jax.tree.map(np.asarray, sums)
                reached = stop * per_update
                clock.write(reached)
                checkpoints.require_finite(
                    sums.finite,
                    config.seeds,
                    f"A loss is not finite up to step {reached}",
                    f"Lower learning_rate={config.learning_rate}.",
                )
                measured = _measures(step_fns, state, spectrum=quarter)
                _log(log, config, reached, measured, sums, stop - first)
                returned = sums.returns.sum() / max(sums.episodes.sum(), 1)
                passed = (stop - first) * per_update * len(config.seeds)
                bar.show(stop, f"return {returned:.1f}", passed, "environment steps")
                waited = time.monotonic() - saved
                if stop == step_fns.num_updates or waited >= runtime.checkpoint_every:
                    checkpoints.save(reached, state, {"start": rows, "metrics": log.sync()})
                    saved = time.monotonic()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped at step {reached}; the same command goes on from step "
            f"{checkpoints.latest or 0}"
        ) from None
    write_json(folder / "results.json", _results(config, folder, rows))


def _title(config: Ppo) -> str:
    rule = "" if config.method in WITHOUT_CRITERION else f" {config.criterion}"
    return f"{config.env} {config.method}{rule} {config.density:g}"


def _updates(config: Ppo, reached: int) -> tuple[int, int]:
    """Return the number of updates in all, and of those done."""
    per_update = config.num_envs * config.num_steps
    return config.total_steps // per_update, reached // per_update


def _parts(config: Ppo) -> list[tuple[int, int, bool]]:
    """Return first update, end and whether a quarter is complete, of each part of the training."""
    num_updates, _ = _updates(config, 0)
    points = config.num_points
    return [
        (
            point * num_updates // points,
            (point + 1) * num_updates // points,
            4 * (point + 1) // points > 4 * point // points,
        )
        for point in range(points)
    ]


def _compile(step_fns: StepFns, state: State, learning_rate: float) -> None:
    """Take no step, so that no time to compile is in that of training."""
    copied = jax.tree.map(jnp.copy, state)
    jax.block_until_ready(step_fns.advance(copied, learning_rate, 0, 0))


def _begin(config: Ppo, step_fns: StepFns) -> tuple[State, list[dict[str, Any]]]:
    """Make the start of every seed, and tell what is known of it."""
    size = step_fns.env.observation_size
    made = [starts.make(config, step_fns.model, size, seed) for seed in config.seeds]
    rows = [record(seed, start) for seed, start in zip(config.seeds, made, strict=True)]
    states = [
        step_fns.begin(jax.random.key(seed), *start)
        for seed, start in zip(config.seeds, made, strict=True)
    ]
    return step_fns.stack(states), rows


def _abstract(config: Ppo, step_fns: StepFns) -> Any:
    """Return the shapes of a state, without making a start."""

    def begin(seed: Any) -> State:
        variables = starts.dense(step_fns.model, step_fns.env.observation_size, seed)
        mask = full_mask(config.method, variables["params"], networks.is_hidden_kernel)
        one = step_fns.begin(jax.random.key(seed), variables, mask)
        return step_fns.stack([one] * len(config.seeds))

    return jax.eval_shape(begin, 0)


def _measures(step_fns: StepFns, state: State, *, spectrum: bool) -> dict[str, np.ndarray]:
    """Measure the networks of all seeds; the Jacobian only if ``spectrum`` says so."""
    both = (step_fns.model, step_fns.env)
    found = diagnostics.measures(*both)(state)._asdict()
    nothing = np.full(len(state.key), math.nan)
    ends = diagnostics.singular_range(*both)(state) if spectrum else (nothing, nothing)
    found.update(zip(("smallest", "largest"), ends, strict=True))
    return {name: np.asarray(values) for name, values in found.items()}


def _log(
    log: metrics.Metrics,
    config: Ppo,
    step: int,
    measured: Mapping[str, np.ndarray],
    sums: Sums | None = None,
    num_updates: int = 1,
) -> None:
    """Write a line for each seed: means over some updates, if any, and what was measured."""
    for index, seed in enumerate(config.seeds):
        episodes, values = 0, dict.fromkeys(("return", "loss", "entropy"), math.nan)
        if sums is not None:
            episodes = int(sums.episodes[index])
            if episodes:
                values["return"] = float(sums.returns[index] / episodes)
            values["loss"] = float(sums.loss[index] / num_updates)
            values["entropy"] = float(sums.entropy[index] / num_updates)
        values |= {name: float(each[index]) for name, each in measured.items()}
        row = {"step": step, "seed": seed, "episodes": episodes, **values}
        log.write_row({name: row[name] for name in TYPES}, values)


def _results(config: Ppo, folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a seed: what was known at the start, late returns, the last measures.

    ``return`` is the mean over the episodes that were completed in the last tenth of the training,
    ``return_of_half`` over those of its second half.
    """
    lines = metrics.read(folder / "metrics.jsonl", types=TYPES)
    found = []
    for row in rows:
        of_seed = [line for line in lines if line["seed"] == row["seed"]]
        first, last = of_seed[0], of_seed[-1]
        found.append(
            {
                **row,
                "steps": last["step"],
                "return": _mean_return(of_seed, 0.9),
                "return_of_half": _mean_return(of_seed, 0.5),
                **{name: last[name] for name in (*diagnostics.Measures._fields, *_RANGE)},
                **{f"{name}_at_start": first[name] for name in _RANGE},
            }
        )
    return found


def _mean_return(lines: Sequence[Mapping[str, Any]], after: float) -> float:
    """Return the mean over the episodes after a fraction of the training, of one seed.

    They are those of the last part at least; NaN if there are none.
    """
    begin = min(after * lines[-1]["step"], lines[-2]["step"])
    late = [line for line in lines if line["step"] > begin and line["episodes"]]
    episodes = sum(line["episodes"] for line in late)
    total: float = sum(line["return"] * line["episodes"] for line in late)
    return total / episodes if episodes else math.nan


def _run_best_rate(config: Ppo, folder: Path, runtime: Runtime) -> None:
    """Train ``config.rate_seeds`` at each rate, then the seeds at the best; all are runs.

    The best has the highest mean of the second half's returns, which are less noisy than the last.

    Raises:
        FloatingPointError: If a loss is not finite at any rate.
        ValueError: If no episode ends in the second half at any rate, so that none is the best.
    """
    tried, _ = rates.try_each(
        config.learning_rates,
        lambda rate: execute(_single(config, rate, config.rate_seeds), runtime),
        _return_of_half,
    )
    if all(map(math.isnan, tried.values())):
        raise ValueError(
            f"total_steps={config.total_steps} is too few: no episode ends in the second half at "
            f"any of learning_rates={config.learning_rates}, so none is the best. Give more."
        )
    rate = rates.best(tried)
    rates.gather([execute(_single(config, rate, config.seeds), runtime)], folder, rate, tried)


def _return_of_half(folder: Path) -> float:
    rows = json.loads((folder / "results.json").read_bytes())
    return float(np.mean([row["return_of_half"] for row in rows]))


def _single(config: Ppo, rate: float, seeds: tuple[int, ...]) -> Ppo:
    return dataclasses.replace(config, seeds=seeds, learning_rates=(), learning_rate=rate)


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""

    def command(
        config: Annotated[Ppo, tyro.conf.OmitArgPrefixes],
        runtime: Annotated[Runtime, tyro.conf.OmitArgPrefixes],
    ) -> None:
        networks.build(config, environments.load(config.env).num_actions)  # a typo is no run
        folder = execute(config, runtime)
        rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        returns = [row["return"] for row in rows]
        rate = rows[0].get("learning_rate", config.learning_rate)
        print(
            f"return {interquartile_mean(returns):.1f}, interquartile mean of {len(rows)} seeds "
            f"from {min(returns):.1f} to {max(returns):.1f}; rate {rate:g}; "
            f"{rows[0]['kept']:,} of {rows[0]['size']:,} weights"
        )
        print(f"Folder: {folder}")

    try:
        prog = "python -m experiments rl"
        tyro.cli(command, args=arguments, description=__doc__, prog=prog)
    except (ArithmeticError, ImportError, OSError, RunningElsewhere, ValueError) as error:
        sys.exit(f"error: {explain(error)}")
