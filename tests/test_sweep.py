import dataclasses
import gc
import json
import re
import runpy
import sys
import types

import pytest
import submitit
from rich.console import Console

from eoi_jax._internal.files import atomic_write_text
from experiments import config, runs
from experiments.runs import slurm, sweep


@dataclasses.dataclass(frozen=True)
class Made:
    """A config; a density of 0.3 fails."""

    experiment: str = "made"
    density: float = 0.1
    method: str = "eoi"


GRID = [Made(density=density) for density in (0.1, 0.2, 0.3, 0.4)]
SOURCE = '''
"""A made table."""
from test_sweep import GRID, Made

def get_config():
    return GRID[0]

def sweep():
    return [*GRID, GRID[0]]

def quick():
    return [Made(experiment="made_quick")]

def report(rows):
    return []
'''


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Configs in the order they were run, with a package of one config module in place."""
    started = []

    def run(made, folder, runtime):
        started.append(made)
        if made.density == 0.3:
            raise FloatingPointError("loss is nan\nat step 3")
        atomic_write_text(folder / "results.json", json.dumps([{"seed": 1, "loss": made.density}]))

    module = types.ModuleType("made_runner")
    module.run = run
    monkeypatch.setitem(sys.modules, "made_runner", module)
    monkeypatch.setitem(sys.modules, "test_sweep", sys.modules[__name__])
    monkeypatch.setitem(runs.RUNNERS, "Made", "made_runner")
    package = tmp_path / "made_configs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "made_table.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sweep, "PACKAGE", "made_configs")
    monkeypatch.setattr(sys, "argv", ["test"])
    yield started
    for name in ("made_configs", "made_configs.made_table"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "runs")


def command(*arguments, status=0):
    if not status:
        return sweep.main(["made_table", *arguments])
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["made_table", *arguments])
    assert stopped.value.code == status
    return None


def test_a_failed_run_stops_no_other(calls, folder, capsys):
    command("--runs", folder, status=1)
    assert calls == GRID
    assert [runs.is_done(runs.folder_of(made, folder)) for made in GRID] == [1, 1, 0, 1]
    lines = capsys.readouterr().out.splitlines()
    for index, (density, result) in enumerate(
        [(0.1, "done"), (0.2, "done"), (0.3, "failed"), (0.4, "done")]
    ):
        pattern = rf"\[{index + 1}/4\] density={density}: {result}, \d+\.\d s"
        assert re.fullmatch(pattern, lines[index])
    assert lines[4] == "4 runs: 3 completed, 1 failed"
    assert lines[5] == "failed: density=0.3: FloatingPointError: loss is nan at step 3"
    failed = runs.folder_of(GRID[2], folder) / "failed.txt"
    assert lines[6].split() == [str(failed)]
    assert "FloatingPointError" in failed.read_text()


def test_only_what_is_not_done_is_run_again(calls, folder, capsys):
    command("--runs", folder, status=1)
    calls.clear()
    capsys.readouterr()
    command("--runs", folder, status=1)
    assert calls == [GRID[2]]
    assert "4 runs: 3 done before, 1 failed" in capsys.readouterr().out


def test_the_limit_counts_starts(calls, folder, capsys):
    command("--runs", folder, "--limit", "1")
    assert calls == GRID[:1]
    assert "4 runs: 1 completed, 3 not started" in capsys.readouterr().out
    command("--runs", folder, "--limit", "2", status=1)
    assert calls == GRID[:3]
    assert "1 completed, 1 done before, 1 failed, 1 not started" in capsys.readouterr().out
    command("--runs", folder, "--limit", "0")
    assert calls == GRID[:3]


def test_a_run_elsewhere_is_left_alone(calls, folder, monkeypatch):
    original, inner = sys.modules["made_runner"].run, []

    def run(made, folder, runtime):
        if made == GRID[0]:  # a second sweep starts while the first one runs
            inner.append(sweep.local(GRID[:2], runtime, Console(quiet=True)))
        original(made, folder, runtime)

    monkeypatch.setattr(sys.modules["made_runner"], "run", run)
    outcome = sweep.local(GRID[:2], runs.Runtime(runs=folder), Console(quiet=True))
    assert inner == [sweep.Outcome(1, 0, 1, ())]
    assert outcome == sweep.Outcome(1, 1, 0, ())
    assert calls == [GRID[1], GRID[0]]


def test_an_interruption_stops_the_sweep(calls, folder, monkeypatch):
    def interrupt(made, folder, runtime):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["made_runner"], "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep.local(GRID, runs.Runtime(runs=folder), Console(quiet=True))
    assert sweep.state(GRID[0], folder) == "started"
    assert sweep.state(GRID[1], folder) == "open"


def test_a_module_without_a_smaller_grid_says_so(calls, folder, capsys):
    note = "made_table has no smaller grid: this is the paper's"
    for scale, noted in (("small", True), ("paper", False)):
        command("--runs", folder, "--list", "--scale", scale)
        assert (note in capsys.readouterr().out) == noted


def test_listing_runs_nothing(calls, folder, capsys):
    command("--runs", folder, "--list")
    assert calls == []
    command("--runs", folder, "--limit", "3", status=1)
    capsys.readouterr()
    command("--runs", folder, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:4]] == [
        [word, config.digest(made), f"density={made.density}"]
        for word, made in zip(("done", "done", "failed", "open"), GRID, strict=True)
    ]
    assert lines[4] == "4 runs, 2 done"
    assert len(calls) == 3


def test_a_damaged_run_is_listed_with_the_remedy(calls, folder, monkeypatch, capsys):
    """It is neither done before nor run again, here or as a job."""
    command("--runs", folder, status=1)
    places = [runs.folder_of(made, folder) for made in GRID]
    text = (places[0] / "config.json").read_text()
    (places[0] / "config.json").write_text(text.replace("eoi", "ai"))
    (places[1] / "results.json").write_text("")
    (places[3] / "results.json").unlink()
    calls.clear()
    capsys.readouterr()
    command("--runs", folder, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["damaged", "damaged", "failed", "damaged"]
    assert lines[4] == "4 runs, 0 done"
    told = {0: "config.json", 1: "results.json", 3: "results.json"}
    for line, (index, name) in zip(lines[5:], told.items(), strict=True):
        assert line.startswith(f"damaged: density={GRID[index].density}: {places[index] / name} ")
        assert f"Remove {places[index] / 'done'}" in line
    submitted = []
    monkeypatch.setattr(sweep, "submit", lambda grid, *rest: submitted.extend(grid) or [])
    command("--runs", folder, "--launcher", "slurm")
    out = capsys.readouterr().out
    assert "0 of 4 runs were done before" in out
    assert out.count("damaged: ") == 3
    assert submitted == [GRID[2]]
    command("--runs", folder, status=1)
    assert calls == [GRID[2]]
    out = capsys.readouterr().out
    assert "4 runs: 4 failed" in out
    assert [line.split() for line in out.splitlines() if "failed.txt" in line] == [
        [str(places[2] / "failed.txt")]
    ]
    for index in told:
        (places[index] / "done").unlink()
    command("--runs", folder, status=1)
    assert "4 runs: 3 completed, 1 failed" in capsys.readouterr().out


def test_what_cannot_be_written_is_not_named(calls, folder, tmp_path, capsys):
    """The folder of runs is a file: every run fails, and none leaves a traceback."""
    (tmp_path / "runs").write_text("")
    command("--runs", folder, status=1)
    assert calls == []
    out = capsys.readouterr().out
    assert "4 runs: 4 failed" in out
    assert "failed.txt" not in out


def test_quick_is_another_grid(calls, folder):
    command("--runs", folder, "--scale", "quick")
    assert calls == [Made(experiment="made_quick")]


def test_the_runtime_reaches_the_runs(calls, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(runs, "execute", lambda made, runtime: seen.append(runtime))
    command("--runs", folder, "--data-dir", "data", "--no-progress", "--log-every", "7")
    assert seen[0] == runs.Runtime(runs=folder, data_dir="data", progress=False, log_every=7)


def test_hyphens_are_allowed(calls):
    assert sweep.find("made-table").get_config() == GRID[0]
    assert sweep.names() == ("made_table",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["made_tabel"], "config='made_tabel'.*'made_table'"),
        (["made_table", "--limit", "-1"], "limit=-1"),
        (["made_table", "--launcher", "cloud"], "cloud"),
        ([], "config|CONFIG"),
    ],
)
def test_bad_arguments_are_answered(arguments, message, calls, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_descriptions_of_different_kinds():
    grid = [config.Train(density=0.1), config.Train(density=0.05), Made()]
    assert sweep.describe(grid[0], grid[:2]) == "density=0.1"
    assert "kind=Made experiment=made" in sweep.describe(grid[2], grid)
    assert sweep.describe(grid[0], grid[:1]) == config.digest(grid[0])


# ------------------------------------------------------------------------------ clusters


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the cluster leaves its logs open
def test_jobs_are_runs(calls, folder, monkeypatch):
    """Submitit's cluster "debug" runs jobs in this process when their results are asked for."""
    asked = []

    class Executor(submitit.AutoExecutor):
        def __init__(self, **options):
            asked.append(options)
            super().__init__(**options)

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    runtime = runs.Runtime(runs=folder)
    jobs = slurm.submit(GRID, runtime, slurm.Slurm(), cluster="debug")
    assert asked[0]["slurm_max_num_timeout"] > 1000  # a job may meet its limit time and again
    assert [job.exception() is None for job in jobs] == [True, True, False, True]
    assert calls == GRID
    assert jobs[0].result() == str(runs.folder_of(GRID[0], folder))
    assert len(runs.load_rows(folder)) == 3
    seen = []
    monkeypatch.setattr(runs, "execute", lambda *arguments: seen.append(arguments))
    [job] = slurm.submit(GRID[:1], runtime, slurm.Slurm(), cluster="debug")
    job.result()
    assert seen == [(GRID[0], runs.Runtime(runs=folder, progress=False))]
    del jobs, job
    gc.collect()  # of the logs, before another test warns of them


def test_a_stopped_job_is_followed_by_the_same(calls, folder):
    runtime = runs.Runtime(runs=folder)
    following = slurm.Job().checkpoint(GRID[0], runtime)
    assert following.function is not None
    assert following.result() == str(runs.folder_of(GRID[0], folder))
    assert calls == GRID[:1]


def test_the_command_submits_what_is_not_done(calls, folder, monkeypatch, capsys):
    submitted = []

    def submit(grid, runtime, options, name):
        submitted.append((grid, runtime.runs, options, name))
        return [types.SimpleNamespace(job_id=f"7_{index}") for index in range(len(grid))]

    monkeypatch.setattr(sweep, "submit", submit)
    command("--runs", folder, "--limit", "1")
    options = ["--launcher", "slurm", "--slurm.partition", "gpu", "--slurm.gpus", "1"]
    command("--runs", folder, "--limit", "2", *options)
    asked = slurm.Slurm(partition="gpu", gpus=1)
    assert submitted == [(GRID[1:3], folder, asked, "made_table")]
    out = capsys.readouterr().out
    assert "2 jobs submitted 7_0 7_1" in out
    assert "1 of 4 runs were done before" in out
    assert len(calls) == 1


def test_a_machine_without_slurm_is_told(calls, folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as stopped:
        command("--runs", folder, "--launcher", "slurm")
    assert "srun" in str(stopped.value.code)
    assert calls == []


def test_submitit_is_only_needed_for_jobs(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    runpy.run_path(slurm.__file__)


def test_a_small_scale_is_the_papers_where_there_is_none(calls, folder):
    module = sweep.find("made_table")
    assert sweep.grid_of(module, "small") == sweep.grid_of(module, "paper") == GRID
    module.small = lambda: GRID[:2] * 2
    assert sweep.grid_of(module, "small") == GRID[:2]
