import functools
import importlib
import inspect
import io
import math
import re
import shlex
import subprocess
import sys
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import pytest
import tyro
from helpers import refuses
from rich.console import Console

import eoi_jax as eoi
from experiments import __main__ as commands
from experiments import models
from experiments.tools import plan as planning
from experiments.tools.plan import Layer, plan

# Every budget and density for these, one of them for the other networks.
FEW = ("mlp7", "mlp1000", "resnet32")
KINDS = [
    (name, budget)
    for name in models.NAMES
    for budget in (eoi.budgets.RULES if name in FEW else ("erdos_renyi_kernel",))
]
each_kind = pytest.mark.parametrize(("name", "budget"), KINDS)


@functools.cache
def model_of(name):
    """A network whose initializers are quick to trace."""
    zeros = nn.initializers.zeros
    return models.create(name, kernel_init=zeros, conv_init=zeros)


TRACE = functools.cache(planning._trace)


def params_of(name):
    return TRACE(model_of(name), models.input_shape(name))[1]


@functools.cache
def planned(name, density, budget, attention=False):
    """Trace each network only once."""
    where = models.where(name, attention=attention)
    with mock.patch.object(planning, "_trace", TRACE):
        return plan(model_of(name), models.input_shape(name), density, budget, where=where)


@pytest.fixture(autouse=True)
def one_argument(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test"])


@pytest.mark.slow
@each_kind
def test_totals_are_exact(name, budget):
    known = {"mlp7": 129_400, "mlp1000": 16_452_864, "resnet32": 464_432}
    where, leaves = models.where(name), jax.tree_util.tree_leaves_with_path(params_of(name))
    size = known.get(name, sum(leaf.size for path, leaf in leaves if where(path, leaf)))
    for density in (0.1, 0.03, 0.125, 1.0) if name in FEW else (0.1,):
        found = planned(name, density, budget)
        assert found.total("size", pruned=True) == size
        kept = found.total("nonzeros", pruned=True)
        assert kept == found.target == math.floor(density * size + 0.5)


@each_kind
def test_layers_get_what_the_budget_says(name, budget):
    """The rule itself, on the parameter tree and with the layout of the networks."""
    params, where = params_of(name), models.where(name)
    rule = eoi.budgets.RULES[budget]
    densities = rule(params, 0.1, where=where, layout=models.layout)
    expected = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if eoi.masks.is_kernel(path, leaf):
            of_layers = np.ravel(functools.reduce(lambda tree, key: tree[key.key], path, densities))
            layers = math.prod(leaf.shape[: models.layout(path, leaf).batch_axes])
            counts = np.rint(np.broadcast_to(of_layers, layers) * (leaf.size / layers)).astype(int)
            layer = "/".join(key.key for key in path[:-1])
            layer = re.sub("hidden/(linear|conv)", "hidden", layer)
            expected[layer] = (tuple(counts.tolist()), not where(path, leaf))
    found = planned(name, 0.1, budget).layers
    assert {layer.name: (layer.counts, layer.dense) for layer in found} == expected


@pytest.mark.parametrize("name", models.NAMES)
def test_layers_have_the_geometry_that_layout_tells(name):
    """The plan reads kernels off the layers; the networks tell it by path."""
    found = {layer.name: layer for layer in planned(name, 0.1, "erdos_renyi_kernel").layers}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params_of(name)):
        if eoi.masks.is_kernel(path, leaf):
            layout = models.layout(path, leaf)
            layer = found[
                re.sub("hidden/(linear|conv)", "hidden", "/".join(k.key for k in path[:-1]))
            ]
            assert layer.shape == leaf.shape[layout.batch_axes :]
            assert layer.groups == layout.groups
            assert layer.num_layers == math.prod(leaf.shape[: layout.batch_axes])


def test_layers_that_are_not_pruned():
    found = planned("deit_s", 0.1, "erdos_renyi_kernel")
    names = [f"hidden/attention/{name}" for name in ("query", "key", "value", "out")]
    assert [layer.name for layer in found.layers if layer.dense] == ["embed", *names, "last"]
    query = found.layers[1]
    assert (query.shape, query.num_layers, query.positions) == ((384, 64), 12 * 6, 197)
    assert (query.density, query.rotations, query.mask_bytes) == (1.0, 0, 0)
    assert query.sparse_bytes == query.weight_bytes == 4 * 12 * 384 * 384
    text = printed(found, 112)
    assert sum("dense" in row.split() for row in text.splitlines()) == 6
    first = planning.summary(found)[0]
    dense = 768 * 384 + 12 * 4 * 384**2 + 384_000
    assert first.startswith("Weights: 1,415,578 of 14,155,776; target")
    assert first.endswith(f"exact; and {dense:,} of dense layers")
    heads = planned("deit_s", 0.1, "erdos_renyi_kernel", attention=True)
    assert [layer.name for layer in heads.layers if layer.dense] == ["embed", "last"]
    assert heads.total("size", pruned=True) == 12 * 12 * 384**2


def test_layers_come_in_the_order_of_the_network():
    assert [layer.name for layer in planned("mlp1000", 0.1, "uniform").layers] == [
        "first",
        "hidden",
        "last",
    ]
    names = [layer.name for layer in planned("resnet32", 0.1, "uniform").layers]
    assert len(names) == 34
    assert names[:3] == ["first", "block1_1/conv1", "block1_1/conv2"]
    assert names[-2:] == ["block3_5/conv2", "last"]
    assert [name for name in names if "shortcut" in name] == [
        "block2_1/shortcut",
        "block3_1/shortcut",
    ]


def test_flops_of_the_mlp_by_hand():
    found = planned("mlp7", 0.1, "uniform")
    assert found.total("flops") == 2 * 129_400
    assert found.total("masked_flops") == 2 * 12_940
    hidden = found.layers[1]
    assert (hidden.num_layers, hidden.positions, hidden.flops) == (5, 1, 2 * 5 * 100 * 100)


def test_flops_of_the_residual_network_by_formula():
    found = {layer.name: layer for layer in planned("resnet32", 0.1, "erdos_renyi").layers}
    pixels = {1: 32**2, 2: 16**2, 3: 8**2}
    widths = {0: 16, 1: 16, 2: 32, 3: 64}
    expected = {"first": 2 * 32**2 * 9 * 3 * 16, "last": 2 * 64 * 10}
    for stage, area in pixels.items():
        for block in range(1, 6):
            inputs = widths[stage - 1] if block == 1 else widths[stage]
            name, width = f"block{stage}_{block}", widths[stage]
            expected[f"{name}/conv1"] = 2 * area * 9 * inputs * width
            expected[f"{name}/conv2"] = 2 * area * 9 * width * width
            if inputs != width:
                expected[f"{name}/shortcut"] = 2 * area * inputs * width
    assert {name: layer.flops for name, layer in found.items()} == expected
    for layer in found.values():
        assert layer.masked_flops * layer.size == layer.flops * layer.nonzeros


def count_flops(jaxpr):
    """Count 2 for each multiply-add of the products in a program; loops count as often as run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            left, right = (variable.aval.shape for variable in equation.invars)
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                terms = math.prod(left[axis] for axis in contracted)
            else:
                outputs = equation.params["dimension_numbers"].rhs_spec[0]
                terms = math.prod(right) // right[outputs]
            total += 2 * terms * equation.outvars[0].aval.size
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * count_flops(inner)
    return total


class Assorted(nn.Module):
    """Grouped, strided, scanned, one-dimensional and per-pixel layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, padding="VALID", name="strided")(x)
        x = nn.Conv(16, (3, 1), feature_group_count=4, name="grouped")(x)
        x = nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x)
        x = nn.Dense(6, name="pixels")(x)
        stack = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)(
            name="stack"
        )
        x, _ = stack(x, None)
        x = x.reshape(x.shape[0], -1, 6)
        return nn.Conv(5, 3, name="line")(x).sum(axis=1)


class _Block(nn.Module):
    """Two layers in one scan."""

    @nn.compact
    def __call__(self, x, _):
        x = nn.Conv(6, (3, 3), padding="CIRCULAR", use_bias=False, name="conv")(x)
        return nn.relu(nn.Dense(6, name="mix")(x)), None


@pytest.mark.slow
@pytest.mark.parametrize("name", [*models.NAMES, "assorted"])
def test_flops_are_those_of_the_program(name):
    """The operations are counted once more, in the program that JAX traces."""
    if name == "assorted":
        model, shape = Assorted(), (17, 13, 3)
        found = plan(model, shape, 0.5)
    else:
        model, shape = model_of(name), models.input_shape(name)
        found = planned(name, 0.1, "erdos_renyi_kernel")
    # With initializers that are zeros, no products but those of a forward pass.
    images = jax.ShapeDtypeStruct((1, *shape), "float32")
    program = jax.make_jaxpr(model.init_with_output)(jax.random.key(0), images)
    # Queries with keys, and weights with values: tokens, channels, blocks.
    sizes = {"deit_s": (197, 384, 12), "vit": (65, 256, 4), "gpt": (64, 64, 6)}
    tokens, channels, blocks = sizes.get(name.removesuffix("_plain"), (0, 0, 0))
    between = 2 * 2 * tokens * tokens * channels * blocks
    embedding = 2 * 64 * 96 * 64 if name.startswith("gpt") else 0  # which is no kernel
    assert found.total("flops") + between + embedding == count_flops(program.jaxpr)


def test_layers_of_other_kinds():
    found = {layer.name: layer for layer in plan(Assorted(), (17, 13, 3), 0.5, "uniform").layers}
    assert list(found) == [
        *("strided", "grouped", "depthwise", "pixels", "stack/conv", "stack/mix", "line")
    ]
    assert found["stack/conv"].num_layers == found["stack/mix"].num_layers == 4
    assert found["stack/conv"].shape == (3, 3, 6, 6)
    assert found["line"].shape == (3, 6, 5)
    assert found["strided"].positions == 8 * 6
    grouped, depthwise = found["grouped"], found["depthwise"]
    assert (grouped.shape, grouped.groups, grouped.matrix) == ((3, 1, 2, 16), 4, (2, 4))
    assert grouped.min_count == 4 * 2
    assert (depthwise.matrix, depthwise.min_count, depthwise.rotations) == ((1, 1), 16, 0)


def test_kernels_of_other_layers_are_refused():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral((2, 3), name="heads")(x)

    with refuses("model", "Attention", "heads/kernel"):
        plan(Attention(), (8,), 0.5)


def test_planning_makes_no_weights():
    def refuse(key, shape, dtype=None, out_sharding=None):
        assert isinstance(key, jax.core.Tracer)
        return jax.numpy.zeros(shape, dtype)

    class Huge(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2**19, kernel_init=refuse, bias_init=refuse)(x)

    found = plan(Huge(), (2**19,), 2**-19)  # a tebibyte
    assert found.total("nonzeros") == 2**19 == found.layers[0].min_count
    assert found.layers[0].rotations == 0


def test_bytes():
    layer = Layer("a", (3, 3, 4, 8), groups=1, positions=5, counts=(100, 99))
    assert layer.size == 2 * 288
    assert layer.weight_bytes == 4 * 2 * 288
    assert layer.mask_bytes == 2 * 288
    assert layer.sparse_bytes == 8 * 199
    kernel = jax.numpy.eye(16, 8)
    dense = Layer("b", kernel.shape, groups=1, positions=1, counts=(8,))
    assert dense.weight_bytes == kernel.nbytes
    assert dense.mask_bytes == eoi.masks.support({"kernel": kernel})["kernel"].nbytes


@pytest.mark.parametrize(
    ("shape", "groups", "count", "expected"),
    [
        # A linear layer at its minimum needs none; 784 x 100 at 0.1 as theory says.
        ((144, 16), 1, 16, 0),
        ((784, 100), 1, 7840, 1786),
        # One tap keeps half a weight of room in each vector: 0.25 - 1/64 of 32.
        ((1, 1, 16, 32), 1, 128, eoi.theory.num_rotations(32, 0.25 - 1 / 64)),
        # 9 taps at 0.25: the square root binds; at 0.01 the taps do.
        ((3, 3, 16, 32), 1, 1152, eoi.theory.num_rotations(32, 0.5)),
        ((3, 3, 100, 100), 1, 900, eoi.theory.num_rotations(100, 0.09 - 1 / 200)),
        ((3, 3, 16, 32), 1, 4608, eoi.theory.num_rotations(32, 1.0)),
        ((3, 3, 16, 32), 1, 16, 0),
        # Four groups of 4 inputs and 8 outputs are four matrices.
        ((3, 3, 4, 32), 4, 288, 4 * eoi.theory.num_rotations(8, 0.5)),
    ],
)
def test_rotations(shape, groups, count, expected):
    layer = Layer("a", shape, groups, 1, (count,))
    assert layer.rotations == expected
    assert Layer("a", shape, groups, 1, (count, count, count)).rotations == 3 * expected


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.3, 0.05])
def test_rotations_are_of_the_matrix_that_is_drawn(density):
    """A draw ends within 1/(2N) of its target, and one rotation more adds 1/(2N) at the most."""
    shape, groups = (3, 3, 16, 64), 2
    kernel = np.asarray(eoi.conv(density, feature_group_count=groups)(jax.random.key(0), shape))
    count = math.floor(density * kernel.size + 0.5)
    layer = Layer("a", shape, groups, 1, (count,))
    drawn = (kernel != 0).sum() / (shape[-1] * shape[-2])
    expected = eoi.theory.expected_density(32, layer.rotations // groups)
    # Rounding the budget to a count moves the target by half a weight at most.
    assert abs(drawn - expected) <= 1 / 32 + 9 * 0.5 / kernel.size
    assert (kernel != 0).sum() <= count


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "groups"), [((5, 7), 1), ((3, 3, 8, 4), 1), ((3, 3, 1, 8), 8)])
def test_the_minimum_is_what_the_initializer_can_draw(shape, groups):
    """The smallest density is drawn with exactly so many weights; below it there is an error."""
    least = Layer("a", shape, groups, 1, (0,))
    if len(shape) == 2:
        assert least.min_density == pytest.approx(eoi.theory.min_density(shape))
        init = eoi.dense
    else:
        init = functools.partial(eoi.conv, feature_group_count=groups)
    kernel = init(least.min_density)(jax.random.key(0), shape)
    assert int((kernel != 0).sum()) == least.min_count
    with pytest.raises(ValueError, match="density"):
        init(0.9 * least.min_density)(jax.random.key(0), shape)


def test_infeasible_layers():
    found = planned("resnet32", 0.004, "uniform")
    names = {layer.name for layer in found.infeasible}
    assert {"first", "block1_1/conv1", "block2_1/shortcut", "last"} <= names
    assert not any(name.startswith("block3_2") for name in names)
    for layer in found.layers:
        below = layer.counts[0] < min(layer.shape[-2:])
        assert (layer in found.infeasible) == below
        assert (layer.rotations is None) == below
    text = printed(found)
    rows = [line.split() for line in text.splitlines() if "0.00" in line]
    flagged = {row[0] for row in rows if "!" in row}
    assert flagged == names
    [line] = [line for line in planning.summary(found) if "Below EOI's minimum" in line]
    assert all(f"{name} (" in line for name in names)
    assert "last (3 of at least 10 weights)" in line
    assert planned("resnet32", 0.1, "erdos_renyi_kernel").infeasible == ()


def test_a_layer_at_its_minimum_is_feasible():
    shape = (3, 3, 16, 32)
    assert Layer("a", shape, 1, 1, (16,)).num_infeasible == 0
    assert Layer("a", shape, 1, 1, (15, 16, 15)).num_infeasible == 2
    assert Layer("a", shape, 1, 1, (15, 16, 15)).rotations is None


def printed(found, width=300, **options):
    console = Console(width=width, file=io.StringIO())
    console.print(planning.table(found, **options))
    return console.file.getvalue()


@each_kind
def test_the_table_fits(name, budget):
    for density in (0.004, 0.1, 1.0) if name in FEW else (0.1,):
        found = planned(name, density, budget)
        for width, full_width in ((80, False), (112, True)):
            text = printed(found, width, full_width=full_width)
            assert "…" not in text
            rows = text.splitlines()
            assert sum(bool(re.search(r"\dx\d", row)) for row in rows) == len(found.layers)


def test_the_table_says_it_all():
    found = planned("mlp1000", 0.1, "erdos_renyi_kernel")
    text = printed(found, 112, title="here")
    assert "here" in text
    [hidden] = [line for line in text.splitlines() if "hidden" in line]
    assert "hidden (998 layers)" in hidden
    hidden = hidden.split("layers)")[1].split()
    assert hidden[:4] == ["128x128", "0.1002", "1,638,552", "0.0078"]
    assert int(hidden[4].replace(",", "")) == found.layers[1].rotations
    assert hidden[5:] == ["32.7M", "3.28M", "65.4MB", "16.4MB", "13.1MB"]
    total = text.splitlines()[-2].split()
    rotations = f"{found.total('rotations'):,}"
    flops = ["32.9M", "3.29M", "65.8MB", "16.5MB", "13.2MB"]
    assert total == ["total", "0.1000", "1,645,286", rotations, *flops]
    lines = planning.summary(found)
    assert lines[0].startswith("Weights: 1,645,286 of 16,452,864; target 0.1 x 16,452,864")
    assert lines[0].endswith("= 1,645,286: exact")
    assert not any(line.startswith("!") for line in lines)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (999_600, "1M"), (1_857_728, "1.86M"), (5e9, "5G")],
)
def test_short_numbers(number, text):
    assert planning._short(number) == text


def test_names_of_budgets():
    model = models.create("mlp7")
    hyphens = plan(model, (28, 28, 1), 0.1, "erdos-renyi-kernel")
    assert hyphens == planned("mlp7", 0.1, "erdos_renyi_kernel")
    with refuses("budget", "erdos_reny", "Did you mean 'erdos_renyi'?"):
        plan(model, (28, 28, 1), 0.1, "erdos-reny")
    with refuses("density", 1.5):
        plan(model, (28, 28, 1), 1.5)


# ------------------------------------------------------------------ the command line


@pytest.mark.slow
def test_the_command_in_a_process():
    command = [sys.executable, "-m", "experiments", "plan", "--model", "resnet32"]
    command += ["--density", "0.1", "--budget", "erdos-renyi-kernel"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "resnet32, density 0.1, erdos_renyi_kernel" in done.stdout
    assert "target 0.1 x 464,432 = 46,443: exact" in done.stdout
    assert "block2_1/shortcut" in done.stdout
    assert "…" not in done.stdout


def test_no_command_lists_them_all_and_imports_none(monkeypatch, capsys):
    monkeypatch.setattr(commands.importlib, "import_module", None)
    for arguments in ([], ["--help"], ["-h"]):
        commands.main(arguments)
        out = capsys.readouterr().out
        for name, (_, does) in commands.COMMANDS.items():
            assert re.search(rf"^  {name} +{re.escape(does)}$", out, re.MULTILINE)
        assert "python -m experiments plan --model" in out
        assert all(len(line) <= 80 for line in out.splitlines())


def test_arguments_default_to_those_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments"])
    commands.main()
    assert "usage: python -m experiments" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typo", "answer"),
    [("pln", "Did you mean 'plan'?"), ("benchmark", "'benchmarks'?"), ("zzz", "See the list:")],
)
def test_unknown_commands(typo, answer, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main([typo, "--density", "0.1"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"there is no command {typo!r}. " in captured.err
    assert answer in captured.err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_helps_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main([name, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: python -m experiments {name}" in out
    assert re.search(rf"Example:\s+python -m experiments {name}", out)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_examples_are_commands(name, monkeypatch):
    module = importlib.import_module(f"experiments.{commands.COMMANDS[name][0]}")
    read = []

    def cli(command, **options):
        if inspect.isfunction(command):
            command = functools.wraps(command)(lambda **arguments: arguments)  # without its body
        read.append(parse(command, **options))
        sys.exit("read")

    parse = tyro.cli
    monkeypatch.setattr(tyro, "cli", cli)
    examples = re.findall(rf"^    python -m experiments {name}(.*)$", module.__doc__, re.MULTILINE)
    for example in examples:
        with pytest.raises(SystemExit, match="read"):
            module.main(shlex.split(example))
    assert len(read) == len(examples) > 0


@pytest.mark.parametrize(
    ("typo", "answer"),
    [
        ("train --model mpl7", "model='mpl7' .*Did you mean 'mlp7'"),
        ("train --data mnits", "data='mnits' .*Did you mean 'mnist'"),
        ("sweep tabel1_mlp1000", "Did you mean 'table1_mlp1000'"),
        ("train --densty 0.1", "Perhaps you meant.* --density"),
        ("sweep table1_mlp1000 --scal quick", "Perhaps you meant.* --scale"),
        ("report --pagse docs", "Perhaps you meant.* --pages"),
        ("quickstart --layer 3", "Perhaps you meant.* --layers"),
        ("benchmarks init --quik", "Perhaps you meant.* --quick"),
        (
            "benchmarks optimizer",
            r"subcommands: init, optim, methods, spectrum, training,\W+sparse_layers, rl, sharding",
        ),
    ],
)
def test_typos_are_answered(typo, answer, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        commands.main(typo.split())
    assert re.search(answer, f"{stopped.value.code} {capsys.readouterr().err}", re.DOTALL)
    assert not list(tmp_path.iterdir())  # no run was begun


def test_commands_get_their_arguments(monkeypatch):
    from experiments.benchmarks import __main__ as benchmarks

    received = []
    monkeypatch.setattr(benchmarks, "main", received.append)
    commands.main(["benchmarks", "init", "--quick"])
    assert received == [["init", "--quick"]]


def test_plan_prints_and_flags(capsys):
    commands.main(["plan", "--model", "mlp7", "--density", "0.01", "--budget", "uniform"])
    out = capsys.readouterr().out
    assert "mlp7, density 0.01, uniform" in out
    assert "hidden (5 layers)" in out
    assert "target 0.01 x 129,400 = 1,294: exact" in out
    assert "Below EOI's minimum" not in out
    commands.main(["plan", "--model", "mlp7", "--density", "0.0099", "--num-classes", "20"])
    out = capsys.readouterr().out
    assert "target 0.0099 x 130,400 = 1,291: exact" in out
    commands.main(["plan", "--model", "mlp7", "--density", "0.009", "--budget", "uniform"])
    assert "hidden (5 of 5 layers, 90 of at least 100 weights)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_smaller_networks_are_planned(capsys):
    small = ["--model", "deit-s", "--depth", "2", "--width", "12", "--num-classes", "3"]
    commands.main(["plan", *small, "--density", "0.5"])
    out = capsys.readouterr().out
    assert "deit_s, density 0.5, erdos_renyi_kernel" in out
    dense = 16 * 16 * 3 * 12 + 2 * 4 * 12**2 + 36
    assert f"Weights: 1,152 of 2,304; target 0.5 x 2,304 = 1,152: exact; and {dense:,}" in out
    commands.main(["plan", *small, "--density", "0.5", "--attention"])
    assert "Weights: 1,728 of 3,456;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet23"], r"'resnet23' .*Did you mean 'resnet32'\?"),
        (["--budget", "erk"], "budget='erk'"),
        (["--density", "0"], r"density=0\.0"),
        (["--model", "mlp7", "--num-classes", "-1"], "num_classes=-1"),
        (["--model", "mlp7", "--depth", "1"], "depth=1"),
        (["--model", "vgg16", "--attention"], "attention=True .*vgg16"),
        (["--densty", "0.1"], r"(?s)densty.*--density"),
    ],
)
def test_bad_arguments_are_answered(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["plan", *arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err + captured.out)
    assert "Traceback" not in captured.err
