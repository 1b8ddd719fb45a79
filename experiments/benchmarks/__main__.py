"""Benchmarks: every number is a median, every comparison is made within one process, in turns.

Commands:
    init    time, compile time and memory of drawing matrices, against JAX's own initializers
    optim   time of a training step under a mask, against the dense step
    methods time to initialize networks and matrices with every method
    spectrum time of all singular values in one call, and of the extremes of a very deep network

Example:
    python -m experiments benchmarks init --quick
"""

from __future__ import annotations

import sys
from typing import Annotated

import tyro
from rich.console import Console

from experiments.benchmarks import timing
from experiments.benchmarks.initialization import Init, Optim, bench_init, bench_optim
from experiments.benchmarks.methods import Methods, bench_methods
from experiments.benchmarks.spectrum import Spectrum, bench_spectrum

__all__ = ["main"]

Command = (
    Annotated[Init, tyro.conf.subcommand("init")]
    | Annotated[Optim, tyro.conf.subcommand("optim")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
    | Annotated[Spectrum, tyro.conf.subcommand("spectrum")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    prog = "python -m experiments benchmarks"
    command: Init | Optim | Methods | Spectrum = tyro.cli(
        Command, args=arguments, description=__doc__, prog=prog
    )
    console = Console(width=None if Console().is_terminal else 120)
    try:
        timing.check(command.repeats, getattr(command, "output", None))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if isinstance(command, Init):
        bench_init(command, console)
    elif isinstance(command, Optim):
        bench_optim(command, console)
    elif isinstance(command, Methods):
        bench_methods(command, console)
    else:
        bench_spectrum(command, console)


if __name__ == "__main__":
    main()
