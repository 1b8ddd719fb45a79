"""Networks and matrices compiled for devices that need not be there, here for one CPU."""

import dataclasses
import importlib.util
import io
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses
from rich.console import Console

from experiments import __main__ as commands
from experiments import models
from experiments.benchmarks import sharding
from experiments.tools import plan, programs, slices
from experiments.tools.collectives import Collective
from experiments.tools.programs import Program, TooLarge
from experiments.training import meshes

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is missing: pip install '.[tpu-aot]'",
)


def mesh():
    return meshes.make(meshes.MeshShape(), jax.devices()[:1])


def test_a_program_tells_its_memory():
    x = programs.placed(jnp.ones((64, 32)), HERE)
    program = programs.build(lambda x: x + 1, x)
    assert (program.arguments, program.outputs) == (4 * 64 * 32, 4 * 64 * 32)
    assert program.flops == 64 * 32
    assert program.memory >= program.arguments + program.outputs
    assert program.collectives == {}
    # What takes the place of an argument takes none of its own.
    assert programs.build(lambda x: x + 1, x, donate=0).outputs == 0


def test_no_memory_for_a_program_is_told_in_a_line(monkeypatch):
    def lower(**_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.0G of 15.75G hbm. Exceeded.\nMore."
        )

    traced = types.SimpleNamespace(lower=lower)
    jitted = types.SimpleNamespace(trace=lambda *_: traced)
    monkeypatch.setattr(jax, "jit", lambda *_, **__: jitted)
    x = programs.placed(jnp.ones(3), HERE)
    with pytest.raises(TooLarge, match=r"^Used 20.0G of 15.75G hbm$"):
        programs.build(lambda x: x, x)
    assert slices.try_build(programs.build, None, x) == "Used 20.0G of 15.75G hbm"


@pytest.fixture(scope="module")
def network():
    zeros = nn.initializers.zeros
    model = models.create("mlp7", depth=3, width=8, kernel_init=zeros)
    where, shape = models.where("mlp7"), models.input_shape("mlp7")
    densities = plan._densities("uniform", 0.5, model, shape, where)
    return slices.Network(model, shape, densities, where)


def test_a_step_holds_parameters_moments_and_mask(network):
    program = slices.training_step(network, mesh(), 4)
    kernels, biases = 784 * 8 + 8 * 8 + 8 * 10, 8 + 8 + 10
    # Parameters, a moment of each, and a mask of the kernels, with a scalar for each bias.
    state = 8 * (kernels + biases) + kernels + 3
    batch = 4 * 784 + 4 * 4
    assert state + batch <= program.arguments < state + batch + 200
    assert program.outputs < 200  # the new state takes the place of the old one
    assert program.flops > 2 * 3 * 4 * 784 * 8 / 2


def test_a_start_is_divided_as_training_divides_it(network, monkeypatch):
    """Its compilation is left to the tests of the TPU compiler: it takes long."""
    asked = {}

    def build(function, *args, out_shardings):
        asked.update(args=args, shardings=out_shardings)
        return program_of(0)

    monkeypatch.setattr(programs, "build", build)
    slices.initialization(network, mesh())
    _, params = asked["args"]
    assert asked["shardings"].params == meshes.shardings(mesh(), params)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == asked["shardings"].params
    divided = {tuple(leaf.spec) for leaf in jax.tree.leaves(asked["shardings"].mask)}
    assert divided == {(), (None, "model"), (None, None, "model")}


def test_texts_have_a_label_for_each_character():
    model = models.create("gpt", depth=1, width=8)
    network = slices.Network(model, models.input_shape("gpt"), None, models.where("gpt"))
    assert slices._dataset(network).train.labels.shape == (0, 64)
    assert slices._dataset(network).image_shape == (64, 96)


@pytest.mark.parametrize("batch_size", [0, -2, 3])
def test_batches_are_divided_equally(batch_size):
    mesh = jax.sharding.AbstractMesh((2, 1), ("data", "model"))
    with refuses("batch_size", batch_size, "data=2"):
        slices.check_batch(batch_size, mesh)


def rendered(table):
    console = Console(width=160, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def program_of(temporary):
    sent = {"all-reduce": Collective(2, 3 * 2**20), "all-gather": Collective(1, 10)}
    return Program(2**10, 2**20, temporary, 0, sent, 1.0, 2.0, 3.0, "")


def test_the_table_tells_what_fits():
    built = {"small": program_of(2**30), "large": program_of(16 * 2**30), "none": "Used 1G of 0G"}
    text = rendered(slices.table(built, "TPU v5 lite", "title"))
    [small] = re.findall("small .*", text)
    assert [part.strip() for part in small.split("  ") if part.strip()] == [
        *("small", "1 KiB", "1 MiB", "1 GiB", "0 B", "yes", "2 all-reduce, 3 MiB", "3 s")
    ]
    assert "16 GiB" in text.split("small")[0]
    assert re.search(r"large .* no ", text)
    assert re.search(r"none .* no: Used 1G of 0G", text)
    assert re.search(r"small .* \? ", rendered(slices.table(built, "unknown", "title")))


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**44, "1.638e+04 GiB")]
)
def test_bytes_are_written_in_binary_units(number, text):
    assert slices.size(number) == text


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["plan", "--model", "mlp7", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err or str(stopped.value.code)


def test_plan_names_what_it_lacks(capsys, monkeypatch):
    assert "mesh='data=4' is given without a topology" in refused(capsys, "--mesh", "data=4")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "pip install '.[tpu-aot]'" in refused(capsys, "--topology", "v5e:2x2")
    # Four chips, of no compiler.
    monkeypatch.setattr(programs, "tpu_devices", lambda topology: jax.devices()[:1] * 4)
    given = ("--topology", "v5e:2x2", "--mesh")
    assert "has 6 places, and there are 4" in refused(capsys, *given, "data=2,model=3")
    assert "mesh='data:4' is outside the forms" in refused(capsys, *given, "data:4")


def test_plan_compiles_for_a_slice(capsys, monkeypatch):
    """The programs are tested above, the compiler of TPUs in test_tpu_aot.py."""
    monkeypatch.setattr(programs, "tpu_devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(slices, "initialization", lambda network, mesh: program_of(0))
    monkeypatch.setattr(slices, "training_step", lambda network, mesh, size: program_of(size))
    commands.main(["plan", "--model", "mlp7", "--topology", "v5e:1x1", "--batch-size", "512"])
    out = capsys.readouterr().out
    assert "mlp7, density 0.1, erdos_renyi_kernel" in out
    assert "One device of v5e:1x1, data=1,model=1" in out
    assert re.search(r"initialization +1 KiB +1 MiB +0 B ", out)
    assert re.search(r"step of 512 +1 KiB +1 MiB +512 B ", out)


def test_the_benchmark_counts_what_is_compiled(monkeypatch):
    monkeypatch.setattr(sharding, "_devices", lambda tpu, number: jax.devices()[:1])
    built = []

    def build(function, key, *others, out_shardings, donate=()):
        if others:  # a training step
            return program_of(2**10)
        built.append((jax.eval_shape(function, key).shape, out_shardings.spec))
        return program_of(2**10)

    monkeypatch.setattr(programs, "build", build)
    options = sharding.Sharding(devices=(1,), sizes=(8, 16), density=0.5, dense_size=8, weak=())
    options.check()
    console = Console(width=120, file=io.StringIO())
    sharding.bench_sharding(options, console)
    assert [shape for shape, _ in built] == [(8, 8), (8, 8), (16, 16)]
    assert {tuple(spec) for _, spec in built} == {(None, "devices")}
    table = console.file.getvalue().split("eoi: orthogonal")[1]
    assert len(re.findall(r"(?:8|16) +1 +eoi +1 MiB +1 KiB +2 all-reduce, 3 MiB", table)) == 2
    assert re.search(r"16 +1 +jax.nn +– +not compiled", table)
    # Work a device: the same matrix a device, and the same examples a device.
    built.clear()
    weak = sharding._weak_scaling(dataclasses.replace(options, weak=(1,)))
    assert weak.row_count == 2
    assert [shape for shape, _ in built] == [(1024, 1024)]


def test_the_benchmark_refuses_what_it_cannot_divide(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: [None] * 8)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for name, value in {"sizes": (260,), "devices": (9,), "density": 0.001, "weak": (0,)}.items():
        with refuses(name, np.ravel(value)[0]):
            sharding.Sharding(**{name: value}).check()


@pytest.mark.parametrize(
    ("number", "slice_"), [(1, "1x1"), (4, "2x2"), (8, "2x4"), (16, "4x4"), (256, "16x16")]
)
def test_slices_are_as_square_as_their_number_allows(number, slice_, monkeypatch):
    monkeypatch.setattr(programs, "tpu_devices", lambda topology: [topology] * 256)
    assert sharding._devices("v5e", number) == [f"v5e:{slice_}"] * number


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "number"), [("v5e:1x1", 1), ("v4:1x1x1", 2), ("v3:1x1", 2), ("v5e:2x4", 8)]
)
def test_a_single_chip_is_part_of_the_smallest_slice(topology, number):
    """One of v3 and v4 is two devices."""
    assert len(programs.tpu_devices(topology)) == number


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:3x7x", "v9z:2x2", "v5e", ""])
def test_unknown_slices_are_refused(topology):
    with refuses("topology", repr(topology), "v5e:16x16"):
        programs.tpu_devices(topology)
