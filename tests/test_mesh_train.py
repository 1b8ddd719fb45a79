"""Training on a mesh and by several processes: one run, whatever carries it out."""

import dataclasses
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from helpers import refuses

from experiments import __main__ as commands
from experiments import runs
from experiments.config import Train, digest
from experiments.runs import Runtime, processes
from experiments.tools import kill_and_resume, show
from experiments.training import meshes, metrics, sharded, steps, train
from experiments.training.checkpoints import Checkpoints

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "docs" / "how-to" / "clusters"
# 784 -> 8 -> 8 -> 10, 14 steps, of which 12 are an epoch.
CONFIG = Train(
    data="made",
    method="base",
    criterion="magnitude",
    init="fan_in",
    density=0.5,
    depth=3,
    width=8,
    batch_size=48,
    epochs=14 / 12,
    learning_rate=0.05,
    seeds=(3,),
)


def curve(folder):
    rows = metrics.read(folder / "metrics.jsonl")
    return {(r["step"], r["split"], r["seed"]): (r["loss"], r["accuracy"]) for r in rows}


def same_curve(folder, other):
    one, two = curve(folder), curve(other)
    assert one.keys() == two.keys()
    for key, values in one.items():
        assert two[key] == pytest.approx(values, rel=1e-4), key


def interrupt_at(patch, step):
    """Press Ctrl-C after the lines of a step."""
    write = metrics.Metrics.write

    def pressed(self, now, *rest):
        write(self, now, *rest)
        if now == step:
            raise KeyboardInterrupt

    patch.setattr(metrics.Metrics, "write", pressed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run of one device, without a mesh."""
    folder = tmp_path_factory.mktemp("whole")
    train.run(CONFIG, folder, Runtime(log_every=4))
    return folder


def test_a_mesh_is_no_part_of_a_run(tmp_path):
    with_mesh = Runtime(runs=str(tmp_path), mesh="data=2")
    assert runs.folder_of(CONFIG, with_mesh.runs).name == digest(CONFIG)
    assert "mesh" not in json.dumps(dataclasses.asdict(CONFIG))
    with refuses("heartbeat", "heartbeat=0"):
        Runtime(heartbeat=0)


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "data=1"])
@pytest.mark.parametrize("after", [None, "data=1"])
def test_a_run_goes_on_with_and_without_a_mesh(before, after, whole, tmp_path, monkeypatch):
    runtime = Runtime(runs=str(tmp_path), log_every=4, checkpoint_every=0.0, mesh=before)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 12)
        with pytest.raises(KeyboardInterrupt, match="from step 8"):
            train.run(CONFIG, tmp_path, runtime)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert Checkpoints(tmp_path / "checkpoints").latest == 8
    train.run(CONFIG, tmp_path, dataclasses.replace(runtime, mesh=after))
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:2] == lines[:2]
    same_curve(whole, tmp_path)
    kept = [path.name for path in (tmp_path / "checkpoints" / "sharded").glob("*")]
    assert sorted(kept) == (["12", "14"] if after else ["4", "8"] if before else [])
    # What shows a run reads either kind.
    (tmp_path / "config.json").write_text(json.dumps(runs.to_dict(CONFIG)))
    saved = show.read_run(tmp_path)
    expected = Checkpoints(whole / "checkpoints")
    state = expected.recover().tree
    for found, leaf in zip(
        jax.tree.leaves(saved.variables["params"]), jax.tree.leaves(state["params"]), strict=True
    ):
        np.testing.assert_allclose(found, leaf, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_several_seeds_train_at_once_on_a_mesh(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "DROP_AND_GROW_EVERY", 4)
    config = dataclasses.replace(CONFIG, seeds=(3, 5), dynamic="set")
    for name, mesh in (("one", None), ("mesh", "data=1,model=1")):
        (tmp_path / name).mkdir()
        runtime = Runtime(runs=str(tmp_path / name), log_every=7, mesh=mesh)
        train.run(config, tmp_path / name, runtime)
    same_curve(tmp_path / "one", tmp_path / "mesh")


def test_meshes_that_cannot_be_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "initialize", lambda heartbeat: None)  # here JAX is at work
    with refuses("mesh", "data=64,model=1", "1 devices"):
        train.run(CONFIG, tmp_path, Runtime(mesh="data=64"))
    for mesh in ("rows=2", "data=64"):
        with pytest.raises(SystemExit) as stopped:
            commands.main(["train", "--data", "made", "--mesh", mesh, "--runs", str(tmp_path)])
        assert f"error: mesh='{mesh}" in str(stopped.value)
    mesh = jax.sharding.AbstractMesh((32, 2), ("data", "model"))
    with refuses("batch_size", "batch_size=48", "data=32"):
        train.compiled(CONFIG, None, mesh)


# ------------------------------------------------------------------ checkpoints of a mesh


@pytest.fixture
def store(tmp_path):
    """A folder with one checkpoint, of a bit pattern for each dtype that a state has."""
    draw = np.random.default_rng(0)
    tree = {
        "params": {"kernel": draw.normal(size=(4, 6)).astype("f4"), "bias": np.zeros(6, "f4")},
        "mask": {"kernel": draw.random((4, 6)) < 0.5, "bias": np.array(True)},
        "key": np.array([1, 2], "u4"),
        "step": np.array(7, "i4"),
        "half": draw.normal(size=3).astype("f2"),
    }
    tree = jax.tree.map(jax.numpy.asarray, tree)
    checkpoints = Checkpoints(tmp_path, on_mesh=True)
    checkpoints.save(7, tree, {"start": [1]})
    return checkpoints, tree


def test_checkpoints_of_a_mesh_hold_every_bit(store):
    checkpoints, tree = store
    found = Checkpoints(checkpoints.folder).recover()
    assert (found.step, found.record) == (7, {"start": [1]})
    restored = Checkpoints(checkpoints.folder).restore(tree, found)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


def test_a_checkpoint_of_a_mesh_that_is_not_the_networks_is_refused(store):
    checkpoints, tree = store
    for other in ({**tree, "key": tree["step"]}, {"params": tree["params"]}):
        with refuses(str(checkpoints.folder / "sharded" / "7"), "Remove"):
            checkpoints.restore(other)


def test_a_bit_that_changed_is_told(store, monkeypatch):
    checkpoints, tree = store
    monkeypatch.setattr(sharded, "checksum", lambda leaves: 1)
    with refuses(str(checkpoints.folder / "sharded" / "7"), "damaged", "Remove"):
        checkpoints.restore(tree)
    (checkpoints.folder / "sharded" / "7" / "record" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match=r"sharded/7 is damaged.*7\.damaged.*starts again"):
        assert checkpoints.recover() is None


def test_a_part_of_a_checkpoint_is_removed(tmp_path):
    left = tmp_path / "sharded" / "9.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    assert Checkpoints(tmp_path, on_mesh=True).latest is None
    assert not left.exists()


def test_the_checksum_tells_words_and_places():
    words = np.arange(24, dtype="f4").reshape(2, 3, 4)
    one = {"a": jax.numpy.asarray(words), "b": jax.numpy.arange(3)}
    # By hand: the n-th of all words counts 2n + 1 times.
    place = 2 * np.arange(24, dtype=np.uint64) + 1
    by_hand = int((words.view("u4").ravel() * place).sum()) % 2**32
    by_hand = (by_hand * 16777619 + (1 * 3 + 2 * 5)) % 2**32
    assert sharded.checksum(one) == by_hand
    swapped = {**one, "a": one["a"][:, ::-1]}
    flipped = {**one, "a": one["a"].at[1, 2, 3].set(-23.0)}
    renamed = {"b": one["a"], "a": one["b"]}
    sums = {sharded.checksum(tree) for tree in (one, swapped, flipped, renamed)}
    assert len(sums) == 4


# ------------------------------------------------------------------ processes


def test_a_process_that_is_alone_is_the_first(monkeypatch):
    assert processes.is_first()
    assert not processes.several()
    assert processes.agree({"a": 1}) == {"a": 1}
    with pytest.raises(KeyError), processes.ending_together():
        raise KeyError
    called = []

    def initialize(**options):
        called.append(options)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    processes.initialize(30)
    assert called[0]["heartbeat_timeout_seconds"] == 30
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with refuses("JAX_PROCESS_ID", "coordinator_address"):
        processes.initialize(30)
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with refuses("JAX_PROCESS_ID", "'first'"):
        processes.initialize(30)


def test_others_do_as_the_first_process_does(tmp_path, monkeypatch):
    """They write nothing, run what it runs and end where it ends."""
    told, ran = [], []
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "agree", lambda value: told.pop(0))
    monkeypatch.setattr(train, "run", lambda *arguments: ran.append(arguments))
    runtime = Runtime(runs=str(tmp_path / "runs"))
    told[:] = [True, None]
    folder = runs.execute(CONFIG, runtime)
    assert ran == [(CONFIG, folder, runtime)]
    told[:] = [False]
    assert runs.execute(CONFIG, runtime) == folder
    told[:] = ["Another process is running."]
    with pytest.raises(RuntimeError, match="Another process"):
        runs.execute(CONFIG, runtime)
    assert len(ran) == 1
    assert not (tmp_path / "runs").exists()


def test_what_several_processes_end_with_is_told(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(os, "_exit", ended.append)
    for error, status, words in (
        (SystemExit("error: a"), 1, "process 0 of 1 ended: error: a"),
        (SystemExit(0), 0, ""),
        (KeyboardInterrupt("stopped at step 8"), 130, "stopped at step 8"),
        (jax.errors.JaxRuntimeError("closed by peer"), 1, "another process was lost"),
    ):
        with processes.ending_together():
            raise error
        assert ended.pop() == status
        assert words in capsys.readouterr().err


# ------------------------------------------------------------------ many devices

DEVICES = """
import dataclasses, json, sys
from pathlib import Path
import jax, numpy as np, optax
import test_mesh_train as t
from experiments.runs import Runtime
from experiments.training import meshes, sharded, steps, train
from experiments.training.checkpoints import Checkpoints

assert jax.device_count() == 4
steps.DROP_AND_GROW_EVERY = 4
root = Path(sys.argv[1])
for dynamic, shape in (("set", "data=1,model=4"), ("rigl", "data=2,model=2")):
    config = dataclasses.replace(t.CONFIG, dynamic=dynamic)
    folders = [root / dynamic / name for name in ("one", "mesh")]
    for folder, mesh in zip(folders, (None, shape), strict=True):
        folder.mkdir(parents=True)
        train.run(config, folder, Runtime(runs=str(root), log_every=7, mesh=mesh))
    t.same_curve(*folders)
    for leaf, expected in zip(*map(t.masks_of, folders), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    # A checkpoint of one mesh restores on another, divided as that one is.
    dataset = train._read("made", None, None)
    mesh = meshes.make(meshes.parse("data=4"))
    step_fns = train.compiled(config, None, mesh)
    like = train._abstract(config, step_fns, dataset, mesh)
    state = Checkpoints(folders[1] / "checkpoints", on_mesh=True).restore(like)
    kernel = state.params["first"]["kernel"]
    assert kernel.sharding.mesh.shape == {"data": 4, "model": 1}, kernel.sharding
    placed = {"whole": kernel, "half": jax.device_put(kernel, meshes.sharding(
        meshes.make(meshes.parse("model=4")), (jax.tree_util.DictKey("kernel"),), kernel))}
    assert len({sharded.checksum({"a": leaf}) for leaf in placed.values()}) == 1
"""


def masks_of(folder):
    found = Checkpoints(folder / "checkpoints")
    leaves = found.recover().leaves
    path = folder / "checkpoints" / "sharded" / "14"
    leaves = leaves or sharded.restore(path)
    return [
        np.asarray(leaf)
        for name, leaf in sorted(leaves.items())
        if name.startswith("optimizer/mask")
    ]


def run_python(arguments, **env):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **env}
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_masks_of_a_mesh_are_those_of_one_device(tmp_path):
    """SET and RigL on four devices: the same masks, curves within the order of sums."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    run_python([sys.executable, "-c", DEVICES, str(tmp_path)], XLA_FLAGS=flags)


@pytest.mark.slow
def test_a_process_is_killed_and_others_go_on(tmp_path, capsys):
    """Real processes on this machine: starts, curves, the end of the survivor, what goes on."""
    kill_and_resume.main(["--runs", str(tmp_path), "--times", "1", "--epochs", "1"])
    assert "1 of 1: no step lost beyond the last save" in capsys.readouterr().out


# ------------------------------------------------------------------ the files for clusters

SRUN = """#!{python}
# Stands for Slurm's srun: a node fails at first; then the tasks of a step on this machine.
import os, pathlib, subprocess, sys
count = pathlib.Path({count!r})
if not count.exists():
    count.touch()
    sys.exit(1)
arguments = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
number = int(os.environ["SLURM_NTASKS"])
tasks = []
for rank in range(number):
    step = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": str(rank)}}
    step["SLURM_PROCID"] = str(rank)
    tasks.append(subprocess.Popen(arguments, env={{**os.environ, **step}}))
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
def test_the_script_for_slurm_trains_with_what_the_scheduler_gives(tmp_path):
    """Under a stub of srun whose first step fails: the script tries again, two tasks train."""
    srun = tmp_path / "srun"
    srun.write_text(SRUN.format(python=sys.executable, count=str(tmp_path / "failed")))
    srun.chmod(srun.stat().st_mode | stat.S_IEXEC)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = {
        field.name: getattr(CONFIG, field.name)
        for field in dataclasses.fields(CONFIG)
        if getattr(CONFIG, field.name) != field.default
    }
    arguments = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value[0] if name == "seeds" else value))
    ]
    run_python(
        ["bash", str(CLUSTERS / "train.sbatch"), *arguments, "--runs", str(tmp_path / "runs")],
        PATH=os.pathsep.join([str(tmp_path), os.environ["PATH"]]),
        PYTHON=sys.executable,
        SLURM_JOB_ID="1234",
        SLURM_NTASKS="2",
        JAX_COORDINATOR_PORT=str(port),
    )
    [done] = (tmp_path / "runs").glob("train/*/done")
    expected = runs.folder_of(CONFIG, tmp_path / "runs")
    assert done.parent == expected
    assert (tmp_path / "failed").exists()


def test_the_script_for_slurm_is_one():
    lines = (CLUSTERS / "train.sbatch").read_text().splitlines()
    options = dict(
        line[len("#SBATCH --") :].partition("=")[::2] for line in lines if "SBATCH --" in line
    )
    assert lines[0] == "#!/bin/bash"
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])  # Slurm reads none there
    subprocess.run(["bash", "-n", str(CLUSTERS / "train.sbatch")], check=True)


def test_the_manifest_for_kubernetes_is_one():
    """By hand: the fields that it has, of JobSet v1alpha2, and that its numbers agree."""
    manifest = yaml.safe_load((CLUSTERS / "jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = manifest["spec"]
    assert set(spec) == {"failurePolicy", "network", "replicatedJobs"}
    assert spec["failurePolicy"]["maxRestarts"] > 0
    assert spec["network"]["enableDNSHostnames"] is True
    [replicated] = spec["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    job = replicated["template"]["spec"]
    assert set(job) == {
        *("parallelism", "completions", "completionMode", "backoffLimit", "template"),
    }
    assert (job["completionMode"], job["backoffLimit"], replicated["replicas"]) == ("Indexed", 0, 1)
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    number = int(env["JAX_NUM_PROCESSES"]["value"])
    host, port = env["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    name = manifest["metadata"]["name"]
    # What JobSet calls the first pod: jobset, job, its number, the pod's; and the service.
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert [entry["containerPort"] for entry in container["ports"]] == [int(port)]
    field = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    command = container["command"]
    assert command[:4] == ["python", "-m", "experiments", "train"]
    shape = meshes.parse(command[command.index("--mesh") + 1])
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert job["parallelism"] == job["completions"] == number == shape.size / gpus
    [mount] = container["volumeMounts"]
    assert mount["mountPath"] == command[command.index("--runs") + 1]
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]
    assert pod["restartPolicy"] == "Never"
