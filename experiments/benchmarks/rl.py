"""Environment steps a second of PPO: dense networks, masked ones and layers of blocks."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
from rich.console import Console

from experiments.benchmarks.timing import machine, medians, tabulate
from experiments.config import Ppo
from experiments.rl import ppo, starts

__all__ = ["Rl", "bench_rl", "configs"]


@dataclasses.dataclass(frozen=True)
class Rl:
    """PPO: environment steps a second, of dense, masked and block-sparse actor and critic."""

    env: str = "CartPole-v1"
    """Environment, by its name in gymnax."""
    widths: tuple[int, ...] = (64, 256, 1024)
    """Units of a hidden layer; multiples of 16."""
    depth: int = 3
    """Hidden layers."""
    density: float = 0.125
    """Density of the hidden kernels, masked or of blocks of a 16th of the width."""
    num_seeds: int = 1
    """Seeds that train at once; their steps count together."""
    num_envs: int = 8
    """Environments of each seed."""
    repeats: int = 5
    """Updates that are timed; the median is reported."""

    def check(self) -> None:
        """Refuse settings of which there is no config."""
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds={self.num_seeds} is outside [1, ...). Give 1.")
        for width in self.widths:
            configs(self, width)


def configs(options: Rl, width: int) -> dict[str, Ppo]:
    """Return what is compared at one width, by name."""
    if width < 16 or width % 16:
        raise ValueError(
            f"widths={width} is outside the multiples of 16. Give one: there are 16 blocks a row."
        )
    env: Any = options.env
    base = Ppo(
        "benchmark",
        env=env,
        width=width,
        depth=options.depth,
        method="dense",
        density=1.0,
        num_envs=options.num_envs,
        seeds=tuple(range(options.num_seeds)),
    )
    density = options.density
    return {
        "dense": base,
        "masked": dataclasses.replace(base, method="eoi", planes="matching", density=density),
        "blocks": dataclasses.replace(
            base, method="blocks", block_size=width // 16, density=density
        ),
    }


def bench_rl(options: Rl, console: Console) -> None:
    """Print environment steps a second of whole updates, and their ratio to the dense ones."""
    console.print(f"Median of {options.repeats} updates. {machine()}")
    rows = []
    for width in options.widths:
        of_width = configs(options, width)
        try:
            functions = {name: _update(config) for name, config in of_width.items()}
        except ImportError as error:
            sys.exit(f"error: {error}")
        seconds = medians(functions, options.repeats, twice=True)
        dense = of_width["dense"]
        count = dense.num_envs * dense.num_steps * options.num_seeds
        rates = [f"{count / seconds[name]:,.0f}" for name in of_width]
        ratios = [f"{seconds['dense'] / seconds[name]:.2f}" for name in ("masked", "blocks")]
        rows.append([str(width), *rates, *ratios])
    title = (
        f"PPO on {options.env}: environment steps a second, depth {options.depth}, density "
        f"{options.density:g} of the hidden kernels, seeds at once: {options.num_seeds}"
    )
    heads = ("width", "dense", "masked", "blocks", "masked / dense", "blocks / dense")
    console.print(tabulate(title, heads, rows))


def _update(config: Ppo) -> Any:
    """Return a function that carries out one update, from where the last call came."""
    step_fns = ppo.compiled(config)
    states = []
    for seed in config.seeds:
        start = starts.make(config, step_fns.model, step_fns.env.observation_size, seed)
        states.append(step_fns.begin(jax.random.key(seed), *start))
    # A call uses up the state that it is given.
    kept = [step_fns.stack(states)]

    def update() -> Any:
        kept[0], sums = step_fns.advance(kept[0], config.learning_rate, 0, 1)
        return sums  # of the same program as the state: both are there at once

    return update
