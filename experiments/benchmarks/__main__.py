"""Benchmarks: every time is a median; compared programs run in turns within one process.

Commands:
    init    time, compile time and memory of drawing matrices, against JAX's own initializers
    optim   time of a training step under a mask, against the dense step
    methods time to initialize networks and matrices with every method
    spectrum time of all singular values in one call, and of the extremes of a very deep network
    training images a second of a residual network's training step
    sparse_layers time and memory of sparse layers, in both directions and in training
    sharding memory, collectives and operations of matrices that are divided among devices
    rl      environment steps a second of PPO with dense, masked and block-sparse networks

Example:
    python -m experiments benchmarks init --quick
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from rich.console import Console

from eoi_jax._internal import checks
from experiments.benchmarks import timing
from experiments.benchmarks.initialization import Init, bench_init
from experiments.benchmarks.methods import Methods, bench_methods
from experiments.benchmarks.optimizers import Optim, bench_optim
from experiments.benchmarks.rl import Rl, bench_rl
from experiments.benchmarks.sharding import Sharding, bench_sharding
from experiments.benchmarks.sparse_layers import SparseLayers, bench_sparse_layers
from experiments.benchmarks.spectrum import Spectrum, bench_spectrum
from experiments.benchmarks.training import Training, bench_training

__all__ = ["main"]

_BENCHMARKS: dict[type, Callable[[Any, Console], None]] = {
    Init: bench_init,
    Optim: bench_optim,
    Methods: bench_methods,
    Spectrum: bench_spectrum,
    Training: bench_training,
    SparseLayers: bench_sparse_layers,
    Rl: bench_rl,
    Sharding: bench_sharding,
}
_Command = (
    Annotated[Init, tyro.conf.subcommand("init")]
    | Annotated[Optim, tyro.conf.subcommand("optim")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
    | Annotated[Spectrum, tyro.conf.subcommand("spectrum")]
    | Annotated[Training, tyro.conf.subcommand("training")]
    | Annotated[SparseLayers, tyro.conf.subcommand("sparse_layers")]
    | Annotated[Rl, tyro.conf.subcommand("rl")]
    | Annotated[Sharding, tyro.conf.subcommand("sharding")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    prog = "python -m experiments benchmarks"
    options: Any = tyro.cli(_Command, args=arguments, description=__doc__, prog=prog)
    console = Console(width=None if Console().is_terminal else 120)
    try:
        if hasattr(options, "repeats"):
            checks.integer(options.repeats, low=1, name="repeats")
        if hasattr(options, "output"):
            timing.check_output(options.output)
        if hasattr(options, "check"):
            options.check()
    except (ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    _BENCHMARKS[type(options)](options, console)


if __name__ == "__main__":
    main()
