"""Kill one of two processes that train one network, resume with another number, and compare.

First, a run of one process gives the expected curve. A run of two processes that is not killed
shows the differences between numbers of processes: none at the start, and afterwards only those of
the order of sums. Then, repeatedly, one of two processes is killed at a random step, or stopped so
that it no longer responds. The other has to end within a minute. The same command resumes the run,
with one process and with four in turn. It has to keep every line up to the last checkpoint and end
on the same curve.

Example:
    python -m experiments.tools.kill_and_resume --times 20 --runs /tmp/killed
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.runs import read_lines

__all__ = ["Options", "Program", "main"]

TOLERANCE = 1e-4
"""Relative, of losses and accuracies at every step: sums over two devices or four add up in another
order than those of one."""
_MINUTE = 60.0
_STEPS = 18  # of an epoch: 576 images in batches of 32
_SAVE_EVERY = 3  # steps
_MESHES = {1: "data=1", 2: "data=2", 4: "data=2,model=2"}  # by the number of processes
_COMMAND = [
    *(sys.executable, "-m", "experiments", "train", "--no-progress", "--data", "made"),
    *("--depth", "3", "--width", "64", "--batch-size", "32", "--learning-rate", "0.1"),
    *("--seeds", "3", "--log-every", str(_SAVE_EVERY), "--checkpoint-every", "0"),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """Arguments of the command."""

    runs: Path
    """Folder for the folders of runs, which is made."""
    times: int = 20
    """How often a process is killed."""
    epochs: int = 3
    """Passes over the synthetic images, of 18 steps each."""
    method: Literal["eoi", "base"] = "eoi"
    """Start: EOI, or dense weights under a mask of the largest, which take less time to draw."""
    seed: int = 0
    """Decides which process is killed, and when."""


class Program:
    """Processes on this machine that train one network together; a context that leaves none behind.

    Args:
        runs: Folder for the runs.
        number: How many processes, with one device each.
        options: Passes over the images, and the start.
    """

    def __init__(self, runs: Path, number: int, options: Options) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        command = [*_COMMAND, "--runs", str(runs), "--mesh", _MESHES[number], "--heartbeat", "10"]
        command += ["--epochs", str(options.epochs), "--method", options.method]
        command += ["--criterion", "magnitude"] if options.method == "base" else []
        self.processes: list[subprocess.Popen[str]] = []
        for index in range(number):
            env = {**os.environ, "JAX_PLATFORMS": "cpu"}
            if number > 1:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(number),
                    "JAX_PROCESS_ID": str(index),
                }
            pipe = subprocess.PIPE
            self.processes.append(
                subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)
            )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def finish(self) -> None:
        """Wait for the end, and require that all processes reach it."""
        told = [process.communicate()[1] for process in self.processes]
        codes = [process.returncode for process in self.processes]
        assert codes == [0] * len(codes), f"{codes}\n" + "\n".join(told)

    def lose(self, index: int, how: signal.Signals) -> str:
        """Lose one process, and require that the others end within a minute and say why."""
        lost, others = self.processes[index], [p for p in self.processes]
        others.remove(lost)
        lost.send_signal(how)
        begin, told = time.monotonic(), ""
        for process in others:
            told += process.communicate(timeout=max(1.0, begin + _MINUTE - time.monotonic()))[1]
            assert process.returncode, told
        return told


def curve(folder: Path) -> dict[tuple[int, str], tuple[float, float]]:
    """Return loss and accuracy by step and split."""
    rows = read_lines(folder / "metrics.jsonl", cut=True)
    return {(row["step"], row["split"]): (row["loss"], row["accuracy"]) for row in rows}


def difference(folder: Path, other: Path) -> float:
    """Return the largest relative difference of two curves, which have the same steps."""
    one, two = curve(folder), curve(other)
    assert one.keys() == two.keys(), f"steps differ: {one.keys() ^ two.keys()}"
    pairs = [(a, b) for key in one for a, b in zip(one[key], two[key], strict=True)]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def last_save(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    names = (path.name for path in (folder / "checkpoints" / "sharded").glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _folder(runs: Path) -> Path:
    [folder] = runs.glob("train/*")
    return folder


def _reached(runs: Path) -> int:
    lines = [key[0] for folder in runs.glob("train/*") for key in curve(folder)]
    return max(lines, default=0)


def _kill_once(options: Options, number: int, whole: Path, draw: random.Random) -> dict[str, Any]:
    """Kill one of two processes at a random step, go on with ``number``, and compare."""
    runs = options.runs / "killed"
    shutil.rmtree(runs, ignore_errors=True)
    at, lost = draw.randrange(1, 2 * _STEPS * options.epochs // 3), draw.randrange(2)
    how = draw.choice((signal.SIGKILL, signal.SIGSTOP))
    with Program(runs, 2, options) as program:
        while _reached(runs) < at - at % _SAVE_EVERY:
            assert program.processes[0].poll() is None, program.processes[0].communicate()
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))  # anywhere between two steps, or in a checkpoint
        told = program.lose(lost, how)
    folder = _folder(runs)
    reached, saved = _reached(runs), last_save(folder)
    assert not (folder / "done").exists()
    assert reached - saved <= _SAVE_EVERY, "a checkpoint that was complete is lost"
    kept = {name: _lines(folder / name, saved) for name in ("metrics.jsonl", "times.jsonl")}
    with Program(runs, number, options) as program:
        program.finish()
    # The times of the lines before would be others if steps up to the last save were done again.
    for name, lines in kept.items():
        assert _lines(folder / name, saved) == lines, f"{name} does not go on from step {saved}"
    found = difference(whole, folder)
    assert found <= TOLERANCE, f"the curve differs by {found}"
    return {
        "lost": lost,
        "by": how.name,
        "reached": reached,
        "saved": saved,
        "on": number,
        "differs": found,
        "told": _reason(told),
    }


def _lines(path: Path, last: int) -> list[str]:
    rows = [json.dumps(row) for row in read_lines(path, cut=True) if row["step"] <= last]
    return rows


def _reason(told: str) -> str:
    """Return what the survivor said: which line depends on what met the loss first."""
    named = re.search(r"Gloo \w+ failed|the JAX distributed service detected fatal errors", told)
    assert named, told
    return named[0]


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    prog = "python -m experiments.tools.kill_and_resume"
    options = tyro.cli(Options, args=arguments, description=__doc__, prog=prog)
    options.runs.mkdir(parents=True, exist_ok=True)
    wholes = {}
    for number in (1, 2, 4):
        wholes[number] = options.runs / f"whole{number}"
        with Program(wholes[number], number, options) as program:
            program.finish()
    folders = {number: _folder(runs) for number, runs in wholes.items()}
    starts = {json.dumps(json.loads((f / "start.json").read_text())) for f in folders.values()}
    assert len(starts) == 1, "the starts differ"
    for number in (2, 4):
        found = difference(folders[1], folders[number])
        assert found <= TOLERANCE, f"the curve of {number} processes differs by {found}"
        print(
            f"{number} processes: same start; curve differs from one's by {found:.1e}", flush=True
        )
    draw = random.Random(options.seed)
    for time_ in range(options.times):
        row = _kill_once(options, (1, 4)[time_ % 2], folders[1], draw)
        print(
            "{n:2}: process {lost} of 2 lost by {by} after step {reached}, saved {saved}, went on "
            "with {on}, curve differs by {differs:.1e}; {told}".format(n=time_ + 1, **row),
            flush=True,
        )
    print(f"{options.times} of {options.times}: no step lost beyond the last save")


if __name__ == "__main__":
    # So that the processes that were started end with this one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
