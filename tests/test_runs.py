import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import types

import pytest
from helpers import refuses

from eoi_jax._internal.files import atomic_write, atomic_write_text
from experiments import config, runs


@dataclasses.dataclass(frozen=True)
class Made:
    """A config whose run is whatever a test makes of it."""

    experiment: str = "made"
    density: float = 0.1
    seeds: tuple[int, ...] = (1, 2)


def complete(made, folder, runtime):
    rows = [{"seed": seed, "test_accuracy": seed / 10, "density": 0.1001} for seed in made.seeds]
    atomic_write_text(folder / "results.json", json.dumps(rows))
    lines = [{"step": 10 * i, "seed": 1, "loss": 2.0 / (i + 1)} for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runner(monkeypatch):
    """The module that runs Made; its function is counted and may be replaced."""
    module = types.ModuleType("made_runner")
    module.calls, module.run = [], complete

    def run(made, folder, runtime):
        module.calls.append(folder)
        module.run(made, folder, runtime)

    module.counted = run
    monkeypatch.setitem(sys.modules, "made_runner", module)
    monkeypatch.setitem(runs.RUNNERS, "Made", "made_runner:counted")
    return module


@pytest.fixture
def runtime(tmp_path):
    return runs.Runtime(runs=str(tmp_path))


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_run_leaves_its_files(runner, runtime, tmp_path):
    folder = runs.execute(Made(), runtime)
    assert folder == tmp_path / "made" / config.digest(Made()) == runs.folder_of(Made(), tmp_path)
    assert files(folder) == {"config.json", "results.json", "metrics.jsonl", "done", ".lock"}
    assert json.loads((folder / "config.json").read_text()) == config.to_dict(Made())
    assert runs.is_done(folder)


def test_a_module_is_run_by_its_function_run(runner, runtime, monkeypatch):
    monkeypatch.setitem(runs.RUNNERS, "Made", "made_runner")
    assert runs.is_done(runs.execute(Made(), runtime))
    assert runner.calls == []


def test_the_mark_is_written_last(runner, runtime):
    def run(made, folder, runtime):
        assert files(folder) == {"config.json", ".lock"}
        complete(made, folder, runtime)

    runner.run = run
    runs.execute(Made(), runtime)


def test_what_is_done_is_not_run_again(runner, runtime):
    folder = runs.execute(Made(), runtime)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert runs.execute(Made(), runtime) == folder
    assert runner.calls == [folder]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_fields_are_other_runs(runner, runtime):
    one, other = (runs.execute(Made(density=density), runtime) for density in (0.1, 0.2))
    assert one != other
    assert len(runner.calls) == 2


def test_a_failure_is_written_down_and_the_next_start_forgets_it(runner, runtime):
    def fail(made, folder, runtime):
        complete(made, folder, runtime)
        raise FloatingPointError("loss is nan")

    runner.run = fail
    with pytest.raises(FloatingPointError, match="loss is nan"):
        runs.execute(Made(), runtime)
    [folder] = runner.calls
    failed = (folder / "failed.txt").read_text()
    assert failed.startswith("Traceback")
    assert failed.endswith("FloatingPointError: loss is nan\n")
    assert not runs.is_done(folder)
    assert runs.load_rows(runtime.runs) == []
    runner.run = complete
    runs.execute(Made(), runtime)
    assert runs.is_done(folder)
    assert "failed.txt" not in files(folder)


def test_a_part_that_runs_elsewhere_is_no_failure(runner, runtime):
    def wait(made, folder, runtime):
        raise runs.RunningElsewhere("Another process is running a part.")

    runner.run = wait
    with pytest.raises(runs.RunningElsewhere):
        runs.execute(Made(), runtime)
    assert "failed.txt" not in files(runs.folder_of(Made(), runtime.runs))


@pytest.mark.parametrize("results", [None, "", "{}", '[{"seed": 1}, 2]', '[{"seed": '])
def test_a_run_without_results_is_not_done(results, runner, runtime):
    def run(made, folder, runtime):
        if results is not None:
            (folder / "results.json").write_text(results)

    runner.run = run
    with pytest.raises(ValueError, match=r"results\.json (is missing|is corrupt|does not hold)"):
        runs.execute(Made(), runtime)
    [folder] = runner.calls
    assert not runs.is_done(folder)
    assert "failed.txt" in files(folder)


def test_an_interruption_is_no_failure(runner, runtime):
    def interrupt(made, folder, runtime):
        raise KeyboardInterrupt

    runner.run = interrupt
    with pytest.raises(KeyboardInterrupt):
        runs.execute(Made(), runtime)
    assert files(runner.calls[0]) == {"config.json", ".lock"}


def test_a_run_that_runs_is_not_started_again(runner, runtime):
    def run(made, folder, runtime):
        with pytest.raises(runs.RunningElsewhere, match=re.escape(str(folder))):
            runs.execute(made, runtime)
        assert files(folder) == {"config.json", ".lock"}
        complete(made, folder, runtime)

    runner.run = run
    assert runs.is_done(runs.execute(Made(), runtime))
    assert len(runner.calls) == 1


def test_a_run_that_ends_while_another_waits_is_not_repeated(runner, runtime, monkeypatch):
    @contextlib.contextmanager
    def locked(folder):
        atomic_write_text(folder / "done", "")  # by the process that had the lock
        yield

    monkeypatch.setattr(runs, "_locked", locked)
    runs.execute(Made(), runtime)
    assert runner.calls == []


def test_a_killed_process_leaves_no_lock(runner, runtime):
    """Another process takes the lock, and is killed with it."""
    folder = runs.folder_of(Made(), runtime.runs)
    folder.mkdir(parents=True)
    code = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, 2)\n"
    code += "print('locked', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(runs.RunningElsewhere):
            runs.execute(Made(), runtime)
        assert files(folder) == {".lock"}
        os.kill(process.pid, signal.SIGKILL)
    assert runs.is_done(runs.execute(Made(), runtime))


def test_rows_join_results_and_config(runner, runtime):
    runs.execute(Made(density=0.1), runtime)
    runs.execute(Made(density=0.2, seeds=(3,)), runtime)
    rows = sorted(runs.load_rows(runtime.runs), key=lambda row: row["seed"])
    digest = config.digest(Made(density=0.1))
    assert rows[0] == {
        **{"kind": "Made", "experiment": "made", "density": 0.1, "seeds": [1, 2]},
        **{"digest": digest, "seed": 1, "test_accuracy": 0.1, "measured_density": 0.1001},
    }
    assert [(row["seed"], row["density"]) for row in rows] == [(1, 0.1), (2, 0.1), (3, 0.2)]
    curves = [row for row in runs.load_curves(runtime.runs) if row["digest"] == digest]
    assert [(row["step"], row["loss"]) for row in curves] == [(0, 2.0), (10, 1.0), (20, 2 / 3)]


def test_curves_have_times_where_they_are_known(runner, runtime):
    folder = runs.execute(Made(), runtime)
    line = {"step": 10, "seconds": 1.5, "seeds": [1]}
    (folder / "times.jsonl").write_text(json.dumps(line) + "\n")
    lines = [{"step": step, "seed": seed} for seed in (1, 2) for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [(row["seed"], row["step"], row["seconds"]) for row in runs.load_curves(runtime.runs)]
    assert found == [(1, 10, 1.5), (1, 20, None), (2, 10, None), (2, 20, None)]


def test_fields_that_came_later_change_no_digest_at_their_defaults():
    plain = config.Train(seeds=(1, 2))
    assert config.digest(plain) == "d81aa5c1ca1e"  # as it was before them
    later = [
        dataclasses.replace(plain, validate_every=10),
        dataclasses.replace(plain, method="blocks", block_size=16),
        dataclasses.replace(plain, method="blocks", block_size=32),
    ]
    assert len({config.digest(one) for one in (plain, *later)}) == 4
    assert config.to_dict(later[0])["validate_every"] == 10
    assert "validate_every" not in config.to_dict(plain)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"method": "blocks"}, ("block_size=0", "[1, ...)")),
        ({"block_size": 16}, ("block_size=16", "{0}", "method='blocks'")),
        ({"method": "2:4"}, ("density=0.1", "{0.5}")),
        ({"validate_every": -1}, ("validate_every=-1", "[0, ...)")),
        ({"method": "blocks", "block_size": 4, "dynamic": "set"}, ("dynamic='set'", "'static'")),
        ({"method": "blocks", "block_size": 4, "init": "fan_in"}, ("init='fan_in'", "orthogonal")),
        ({"method": "blocks", "block_size": 4, "density_power": 1}, ("density_power=1.0", "{0.0}")),
        ({"method": "blocks", "block_size": 4, "attention": True}, ("attention=True", "{False}")),
        ({"method": "blocks", "block_size": 4, "planes": "matching"}, ("planes='matching'", "eoi")),
    ],
)
def test_fields_that_do_not_go_together(fields, parts):
    with refuses(*parts):
        config.Train(**fields)


def test_a_run_without_metrics_has_no_curves(runner, runtime):
    folder = runs.execute(Made(), runtime)
    (folder / "metrics.jsonl").unlink()
    assert runs.load_curves(runtime.runs) == []


@pytest.mark.parametrize("name", ["config.json", "results.json", "metrics.jsonl"])
def test_corrupt_files_are_named(name, runner, runtime):
    folder = runs.execute(Made(), runtime)
    (folder / name).write_text('[{"seed": 1')
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        runs.load_rows(runtime.runs) + runs.load_curves(runtime.runs)


def of_another_config(path):
    path.write_text(json.dumps(config.to_dict(Made(density=0.2))))


def changed(old, new):
    def change(path):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def garble(path):
    text = bytearray(path.read_bytes())
    text[len(text) // 2] ^= 0x80
    path.write_bytes(text)


DAMAGE = [
    ("config.json", changed("0.1", "0.3")),
    ("config.json", changed("made", "other")),
    ("config.json", changed('"kind": "Made",', "")),
    ("config.json", of_another_config),
    ("config.json", lambda path: path.write_text("[]")),
    ("config.json", cut),
    ("config.json", os.remove),
    ("results.json", changed("0.1", "0.7")),
    ("results.json", changed('"seed": 2', '"seed": 1')),
    ("results.json", lambda path: path.write_text("")),
    ("results.json", lambda path: path.write_text("[]")),
    ("results.json", cut),
    ("results.json", garble),
    ("results.json", os.remove),
    ("metrics.jsonl", changed("2.0", "3.0")),
    ("metrics.jsonl", cut),
    ("metrics.jsonl", garble),
    ("metrics.jsonl", os.remove),
    ("done", garble),
]


@pytest.mark.parametrize(("name", "spoil"), DAMAGE)
def test_a_damaged_run_is_not_done(name, spoil, runner, runtime):
    """It is named, with a remedy that works: what was there is there again."""
    folder = runs.execute(Made(), runtime)
    assert runs.damage(folder) is None
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    spoil(folder / name)
    assert str(folder / name) in runs.damage(folder)
    with refuses(str(folder / name), f"Remove {folder / 'done'}") as raised:
        runs.execute(Made(), runtime)
    assert runs.damage(folder) == str(raised.value)
    assert len(runner.calls) == 1
    (folder / "done").unlink()
    runs.execute(Made(), runtime)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_in_the_folder_of_another_is_damaged(runner, runtime):
    folder = runs.execute(Made(), runtime)
    other = folder.with_name(config.digest(Made(density=0.2)))
    folder.rename(other)
    with refuses(str(other / "config.json"), folder.name):
        runs.execute(Made(density=0.2), runtime)
    with refuses(str(other / "config.json")):
        runs.load_rows(runtime.runs)


def test_marks_of_old_are_empty(runner, runtime):
    folder = runs.execute(Made(), runtime)
    (folder / "done").write_text("")
    assert runs.damage(folder) is None
    (folder / "results.json").write_text("[]")
    assert "results.json" in runs.damage(folder)


@pytest.mark.parametrize("row", [{}, {"test_accuracy": None}, {"test_loss": 0.5}])
def test_results_without_all_columns_are_not_done(row, runner, runtime, monkeypatch):
    def run(made, folder, runtime):
        rows = [{"seed": 1, "test_accuracy": 0.5}, {"seed": 2, **row}]
        atomic_write_text(folder / "results.json", json.dumps(rows))

    runner.run = run
    monkeypatch.setitem(runs.COLUMNS, "Made", ("seed", "test_accuracy"))
    with refuses("results.json", "lacks test_accuracy of seed 2"):
        runs.execute(Made(), runtime)
    assert not runs.is_done(runner.calls[0])


def test_files_that_killed_processes_left_are_removed(runner, runtime):
    """Under the names that the atomic writer gives them."""
    folder = runs.folder_of(Made(), runtime.runs)
    folder.mkdir(parents=True)
    partial = []

    def interrupted(file):
        partial.extend(folder.iterdir())
        file.write(b"half")

    for name in ("config.json", "failed.txt", "another"):
        atomic_write(folder / name, interrupted)
        (folder / name).unlink()
    for path in partial:
        path.write_text("half")
    assert len(files(folder)) == 3
    runs.execute(Made(), runtime)
    assert files(folder) == {"config.json", "results.json", "metrics.jsonl", "done", ".lock"}


def test_a_full_disk_is_the_error_that_is_told(runner, runtime, monkeypatch):
    """Although why it failed cannot be written down either."""

    def run(made, folder, runtime):
        monkeypatch.setattr(os, "fsync", full)
        complete(made, folder, runtime)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    runner.run = run
    with pytest.raises(OSError, match="No space left") as raised:
        runs.execute(Made(), runtime)
    assert raised.value.__context__ is None
    assert "Free some space" in runs.explain(raised.value)
    [folder] = runner.calls
    assert files(folder) == {"config.json", ".lock"}
    monkeypatch.undo()


def test_lines_tell_which_is_damaged(tmp_path):
    path = tmp_path / "lines"
    whole = [b'{"a": %d}\n' % number for number in range(3)]
    assert runs.read_lines(path) == []
    path.write_bytes(b"".join(whole))
    assert [row["a"] for row in runs.read_lines(path)] == [0, 1, 2]
    for damaged in (b"\n", b"[1]\n", b'{"a"\n', b"\xff\n", b'{"a": 1} \x0b\n', b"\0\0\n"):
        path.write_bytes(whole[0] + damaged + whole[2])
        for last in (False, True):
            with refuses(str(path), "line 2"):
                runs.read_lines(path, cut=last)
    for length in range(1, len(whole[2])):
        path.write_bytes(b"".join(whole)[:-length])
        assert len(runs.read_lines(path, cut=True)) == 2
        with refuses(str(path), "line 3"):
            runs.read_lines(path)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", "a b", ".hidden"])
def test_names_that_are_no_folders(name):
    with pytest.raises(ValueError, match=re.escape(f"experiment={name!r} is outside")):
        runs.folder_of(Made(experiment=name), "runs")


@pytest.mark.parametrize(
    ("name", "value"),
    [("checkpoint_every", -1.0), ("checkpoint_every", float("nan")), ("log_every", 0)],
)
def test_a_runtime_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} is outside"):
        runs.Runtime(**{name: value})
