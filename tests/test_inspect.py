"""What `inspect` says of files and runs, against NumPy."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import gram_error

import eoi_jax as eoi
from eoi_jax.typing import Layout
from experiments import __main__ as commands
from experiments import config, models
from experiments.tools import show
from experiments.training import steps, train
from experiments.training.checkpoints import Checkpoints

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def one_argument(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test"])


def network():
    """A linear layer, a stack of two, a convolution, and a kernel without a mask."""
    shapes = {"conv": (3, 3, 2, 4), "first": (6, 3), "hidden": (2, 3, 3), "last": (3, 2)}
    params = {name: {"kernel": RNG.normal(size=shape)} for name, shape in shapes.items()}
    params["first"]["bias"] = RNG.normal(size=3)
    mask = jax.tree.map(lambda leaf: np.array(True), params)
    for name in ("conv", "first", "hidden"):
        mask[name]["kernel"] = RNG.random(shapes[name]) < 0.5
    params = jax.tree.map(lambda leaf, leaf_mask: np.float32(leaf * leaf_mask), params, mask)
    return params, mask


def singular_values(kernel, grid):
    """Of a convolution, frequency by frequency, from the definition."""
    taps = list(np.ndindex(*kernel.shape[:-2]))
    found = []
    for frequency in np.ndindex(*(grid,) * (kernel.ndim - 2)):
        phases = [np.exp(-2j * np.pi * np.dot(frequency, tap) / grid) for tap in taps]
        matrix = sum(phase * kernel[tap] for phase, tap in zip(phases, taps, strict=True))
        found.append(np.linalg.svd(matrix, compute_uv=False))
    return np.concatenate(found)


def lines_of(text):
    """The lines of the table by the kernel's name, each as its cells."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.slow
def test_a_file(tmp_path, capsys):
    params, mask = network()
    path = tmp_path / "net.safetensors"
    eoi.save(path, params, mask, layout=models.layout)
    found = {kernel.name: kernel for kernel in show.inspect(show.read(path), grid=5)}
    assert list(found) == [f"{name}/kernel" for name in ("conv", "first", "hidden", "last")]
    for name in ("first", "last"):
        matrix = np.asarray(params[name]["kernel"], np.float64)
        kernel = found[f"{name}/kernel"]
        values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(kernel.errors, [gram_error(matrix)], rtol=1e-5)
        np.testing.assert_allclose(kernel.extremes, [values.min(), values.max()], rtol=1e-4)
        assert (kernel.shape, kernel.num_layers, kernel.off) == (matrix.shape, 1, 0)
    stack = np.asarray(params["hidden"]["kernel"], np.float64)
    values = np.linalg.svd(stack, compute_uv=False)
    kernel = found["hidden/kernel"]
    np.testing.assert_allclose(kernel.errors, [gram_error(layer) for layer in stack], rtol=1e-5)
    np.testing.assert_allclose(kernel.extremes, [values.min(), values.max()], rtol=1e-4, atol=1e-6)
    assert (kernel.shape, kernel.num_layers, kernel.size) == ((3, 3), 2, 18)
    values = singular_values(np.asarray(params["conv"]["kernel"], np.float64), 5)
    np.testing.assert_allclose(found["conv/kernel"].extremes, [values.min(), values.max()], 1e-4)
    for name, leaf in mask.items():
        kept = int(leaf["kernel"].sum()) if leaf["kernel"].ndim else None
        assert found[f"{name}/kernel"].kept == kept
    assert found["last/kernel"].nonzeros == 6

    commands.main(["inspect", str(path), "--grid", "5"])
    out = capsys.readouterr().out
    rows = lines_of(out)
    assert rows["hidden/kernel"][:3] == ["(2", "layers)", "3x3"]
    assert "to" in rows["hidden/kernel"]
    assert rows["first/kernel"][0] == "6x3"
    assert rows["last/kernel"][-1] == "dense"
    assert [rows[f"{name}/kernel"][-1] for name in ("conv", "first", "hidden")] == ["holds"] * 3
    kept = sum(kernel.nonzeros for kernel in found.values())
    size = 72 + 18 + 18 + 6
    assert rows["total"][:3] == [f"{kept / size:.4f}", str(kept), str(size)]
    assert rows["total"][-1] == "holds"
    assert f"{found['conv/kernel'].extremes[1]:.3g}" in rows["conv/kernel"]
    assert "grid of side 5" in " ".join(out.split())


@pytest.mark.slow
def test_shapes_that_may_mean_several_things(tmp_path, capsys):
    """Without a layout a stack may be a convolution: no number rather than a wrong one."""
    params, mask = network()
    path = tmp_path / "net"
    eoi.save(path, params, mask)
    rows = {kernel.name: kernel for kernel in show.inspect(show.read(path))}
    for name in ("hidden/kernel", "conv/kernel"):
        assert rows[name].errors is None
        assert rows[name].extremes is None
    assert rows["hidden/kernel"].kept == mask["hidden"]["kernel"].sum()
    assert rows["first/kernel"].errors is not None
    commands.main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert lines_of(out)["hidden/kernel"][4:] == ["–", "–", "–", "holds"]
    assert "eoi.save(..., layout=...)" in out


def test_leaves_that_are_no_kernels_but_have_masks():
    params = {"bias": np.ones(3), "embedding": np.ones((3, 1))}
    kept = np.array([1, 1, 0], bool)
    mask = {"bias": kept, "embedding": kept[:, None]}
    for kernel in show.inspect(show.Saved("", params, mask, None)):
        assert (kernel.kept, kernel.off, kernel.errors, kernel.extremes) == (2, 1, None, None)


def test_names_are_printed_as_they_are(tmp_path, capsys):
    path = tmp_path / "net[b]"
    params = {"a[/b]:key:": {"kernel": np.ones((1, 1), np.float32)}}
    eoi.save(path, params, {"a[/b]:key:": {"kernel": np.ones((1, 1), bool)}})
    commands.main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert "net[b], written by" in " ".join(out.split())
    assert lines_of(out)["a[/b]:key:/kernel"][-1] == "holds"


@pytest.mark.parametrize("strange", ["\x1b[2J", "\x9b31m", "\u202e", "\x07", "a\rb"])
def test_nothing_that_a_terminal_obeys_is_printed(strange, tmp_path, capsys, monkeypatch):
    """Neither of a name in a checkpoint, which no check has read, nor of a path or an error."""
    params = {strange: {"kernel": np.full((1, 1), 1e-40, np.float32)}}
    mask = {strange: {"kernel": np.zeros((1, 1), bool)}}
    monkeypatch.setattr(show, "read", lambda path, seed: show.Saved(f"{path}", params, mask, None))
    with pytest.raises(SystemExit, match="1"):  # a subnormal number off the mask is not zero
        show.main([f"net{strange}"])
    monkeypatch.undo()
    path = tmp_path / f"net{strange}"
    with pytest.raises(SystemExit, match="2"):
        show.main([str(path)])
    path.write_bytes(b"PK")
    with pytest.raises(SystemExit, match="2"):
        show.main([str(path)])
    captured = capsys.readouterr()
    shown = strange.encode("unicode_escape").decode()
    assert shown in captured.out
    assert all(line.isprintable() for line in (captured.out + captured.err).split("\n"))


# ------------------------------------------------------------------ runs


def run_of(folder, seeds, transformation, spoil=lambda params: params):
    """Leave what a run leaves: its config and two checkpoints, of several seeds stacked."""
    folder.mkdir()
    fields = config.to_dict(config.Train(seeds=seeds))
    (folder / "config.json").write_text(json.dumps(fields))
    states, networks = [], []
    for _ in seeds:
        params, mask = jax.tree.map(jnp.asarray, network())
        optimizer = transformation(mask).init(params)
        params = spoil(params)
        others = {"batch_stats": {"norm": {"mean": jnp.ones(3)}}}
        states.append(steps.State(jnp.zeros(2, jnp.uint32), params, others, optimizer))
        networks.append((params, mask))
    state = (
        states[0] if len(seeds) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(5, jax.tree.map(jnp.zeros_like, state))
    checkpoints.save(12, state)
    return networks


def static(mask):
    return eoi.static_sparse(optax.sgd(0.1, momentum=0.9), mask)


def dynamic(mask):
    return eoi.rigl(optax.sgd(0.1), mask, stop_step=10, layout=models.layout)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "transformation"), [((3,), static), ((3, 5), dynamic)])
def test_the_last_checkpoint_of_a_run(seeds, transformation, tmp_path, capsys):
    networks = run_of(tmp_path / "run", seeds, transformation)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    for seed, (params, mask) in zip(seeds, networks, strict=True):
        saved = show.read(tmp_path / "run", None if seed == 3 else seed)
        assert saved.title.endswith(f"mlp7 eoi, seed {seed}, step 12")
        assert set(saved.variables) == set(saved.mask) == {"params", "batch_stats"}
        jax.tree.map(np.testing.assert_array_equal, saved.variables["params"], params)
        jax.tree.map(np.testing.assert_array_equal, saved.mask["params"], mask)
        assert saved.variables["batch_stats"]["norm"]["mean"].shape == (3,)
        assert saved.layout is models.layout
    commands.main(["inspect", str(tmp_path / "run")])
    assert "params/hidden/kernel (2 layers)" in capsys.readouterr().out
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_mask_that_does_not_hold(tmp_path, capsys):
    def spoil(params):
        kernel = params["first"]["kernel"]
        return {**params, "first": {**params["first"], "kernel": jnp.where(kernel == 0, 1, kernel)}}

    [(_, mask)] = run_of(tmp_path / "run", (3,), static, spoil)
    with pytest.raises(SystemExit) as stop:
        commands.main(["inspect", str(tmp_path / "run")])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    off = str(18 - int(mask["first"]["kernel"].sum()))
    assert lines_of(out)["params/first/kernel"][-2:] == [off, "off"]
    assert lines_of(out)["total"][-2:] == [off, "off"]
    assert lines_of(out)["params/conv/kernel"][-1] == "holds"
    assert "not zero in params/first/kernel." in out


@pytest.mark.slow
def test_training_saves_what_it_has_trained(tmp_path, monkeypatch, capsys):
    folder, path = tmp_path / "run", tmp_path / "net.safetensors"
    [(params, mask), _] = run_of(folder, (3, 5), static)
    row = {"seed": 3, "test_accuracy": 1.0, "test_loss": 0.5, "kept": 1, "size": 2}
    (folder / "results.json").write_text(json.dumps([row]))
    monkeypatch.setattr(train, "execute", lambda config, runtime: folder)
    commands.main(["train", "--seeds", "3", "5", "--save", str(path)])
    assert f"Saved: {path}" in capsys.readouterr().out
    saved = eoi.load(path)
    jax.tree.map(np.testing.assert_array_equal, saved.params["params"], params)
    jax.tree.map(np.testing.assert_array_equal, saved.mask["params"], mask)
    assert saved.metadata["user"] == config.to_dict(config.Train(seeds=(3, 5)))
    layouts = jax.tree_util.tree_map_with_path(saved.layout, saved.params)
    assert layouts["params"]["hidden"]["kernel"] == Layout(batch_axes=1)
    assert layouts["params"]["first"]["kernel"] == Layout()


@pytest.mark.slow
def test_blocks_are_told_as_the_dense_kernels_that_they_are(tmp_path, capsys):
    """The stack of two matrices is read from the run's folder and from the file it saves."""
    arguments = "--data made --model mlp7_wide --method blocks --density 0.5 --block-size 4"
    arguments += " --depth 4 --width 8 --epochs 0.01 --learning-rate 1e-9 --no-progress"
    path = tmp_path / "net.safetensors"
    command = [*arguments.split(), "--runs", str(tmp_path), "--save", str(path)]
    commands.main(["train", *command])
    assert "test accuracy" in capsys.readouterr().out
    [folder] = tmp_path.glob("train/*/")
    for where in (folder, path):
        found = {kernel.name: kernel for kernel in show.inspect(show.read(where))}
        assert set(found) == {
            f"params/{name}/kernel" for name in ("first", "hidden/linear", "last")
        }
        kernel = found["params/hidden/linear/kernel"]
        assert (kernel.shape, kernel.num_layers, kernel.kept, kernel.off) == ((8, 8), 2, 64, 0)
        assert max(kernel.errors) < 1e-5
        np.testing.assert_allclose(kernel.extremes, 1, atol=1e-5)
        assert found["params/last/kernel"].kept is None
        commands.main(["inspect", str(where)])
        cells = lines_of(capsys.readouterr().out)["params/hidden/linear/kernel"]
        assert cells[:6] == ["(2", "layers)", "8x8", "0.5000", "64", "128"]
        assert cells[-1] == "holds"


def test_training_does_not_begin_without_a_place_for_what_it_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "execute", lambda config, runtime: pytest.fail("it trains"))
    for path in (tmp_path, tmp_path / "no" / "net.safetensors"):
        with pytest.raises(SystemExit, match="save="):
            commands.main(["train", "--save", str(path)])


# ------------------------------------------------------------------ what is refused


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        commands.main(["inspect", *map(str, arguments)])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


def test_what_cannot_be_read(tmp_path, capsys):
    assert str(tmp_path / "no") in refused(capsys, tmp_path / "no")
    assert f"folder={str(tmp_path)!r}" in refused(capsys, tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "Counts"}')
    assert f"folder={str(tmp_path)!r}" in refused(capsys, tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "Train", "seeds": [3, 5]}')
    assert str(tmp_path / "checkpoints") in refused(capsys, tmp_path)
    assert "seed=4" in refused(capsys, tmp_path, "--seed", 4)
    other = tmp_path / "other"
    other.write_bytes(b"PK")
    assert str(other) in refused(capsys, other)


def test_options_that_do_not_go_with_a_file(tmp_path, capsys):
    path = tmp_path / "net"
    eoi.save(path, {"kernel": np.ones((1, 1), np.float32)}, {"kernel": np.ones((1, 1), bool)})
    assert "seed=1" in refused(capsys, path, "--seed", 1)
    assert "grid=0" in refused(capsys, path, "--grid", 0)


def test_a_recorded_layout_that_does_not_fit_hides_no_other_kernel():
    def layout(path, leaf):
        return Layout(batch_axes=2 if path[0].key == "b" else 0)

    params = {name: {"kernel": np.ones((2, 2))} for name in "abc"}
    mask = jax.tree.map(lambda leaf: np.array(True), params)
    found = show.inspect(show.Saved("", params, mask, layout))
    assert [kernel.errors is None for kernel in found] == [False, True, False]
