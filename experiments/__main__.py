"""The experiments: ``python -m experiments COMMAND …``."""

from __future__ import annotations

import difflib
import gc
import importlib
import signal
import sys
from types import ModuleType

__all__ = ["COMMANDS", "main"]

# Of each command the module of this package with its ``main(arguments)``, imported when it is
# called, and what it does.
COMMANDS = {
    "quickstart": ("quickstart", "train a 1000-layer network from four starts and compare them"),
    "benchmarks": (
        "benchmarks.__main__",
        "time drawing, initializing, masked training and spectra",
    ),
    "spectra": ("studies.spectra", "picture singular values through the depth of a network"),
    "universality": ("studies.universality", "hold sparse orthogonal spectra against theory"),
    "plan": ("tools.plan", "list the layers of a sparse network: weights, FLOPs, bytes"),
    "train": ("training.train", "train one network from one kind of start"),
    "inspect": ("tools.show", "show how sparse and orthogonal a saved network is"),
    "sweep": ("runs.sweep", "run all configs of a figure or table, here or on a cluster"),
    "report": ("reporting.report", "turn results into CSV files, tables, figures and a page"),
}
PROG = "python -m experiments"


def usage() -> str:
    """Write the commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, (_, does) in COMMANDS.items()]
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
        SystemExit: with status 2 for an unknown command, 130 for one that Ctrl-C has stopped.
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
    try:
        _import(f"experiments.{COMMANDS[name][0]}").main(rest)
    except (Exception, KeyboardInterrupt) as error:
        stop = _interrupt(error)
        if stop is not None:
            print(str(stop) or "stopped; the same command goes on", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        if isinstance(error, OSError):
            from experiments.runs import explain

            sys.exit(f"error: {explain(error)}")
        raise


def _import(name: str) -> ModuleType:
    # JAX has a callback of the garbage collector, and Python drops an interrupt in one of these.
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.enable()


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the interrupt that an error is or comes from: extensions make others of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


if __name__ == "__main__":
    main()
