"""The experiments: ``python -m experiments COMMAND …``."""

from __future__ import annotations

import difflib
import importlib
import sys

__all__ = ["COMMANDS", "main"]

# Each command is a module of this package with a ``main(arguments)``, imported when it is called.
COMMANDS = {
    "quickstart": "train a 1000-layer network from four starts and compare them",
    "benchmarks": "time drawing, initializing, masked training and spectra",
    "spectra": "picture singular values through the depth of a network",
    "universality": "hold sparse orthogonal spectra against theory for dense",
    "plan": "list the layers of a sparse network: weights, FLOPs, bytes",
    "train": "train one network from one kind of start",
    "inspect": "show how sparse and orthogonal a saved network is",
    "sweep": "run all configs of a figure or table, here or on a cluster",
    "report": "turn results into CSV files, tables, figures and a page",
}
PROG = "python -m experiments"


def usage() -> str:
    """Write the commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [--help] ...",
            "",
            *lines,
            "",
            f"Example: {PROG} plan --model resnet32 --density 0.1",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the first argument names with all others; list the commands if none.

    Args:
        arguments: default: those of the process.

    Raises:
        SystemExit: with status 2 for an unknown command.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else "See the list:"
        print(f"error: there is no command {name!r}. {remedy}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"experiments.{name}").main(rest)


if __name__ == "__main__":
    main()
