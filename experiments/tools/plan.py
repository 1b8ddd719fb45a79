"""Plan a sparse network before any of its weights is made.

A plan lists for each layer the weights that a budget gives it, the minimum of an exactly orthogonal
kernel, the number of rotations that draw this kernel, the cost of a forward pass, and the bytes.
Only shapes are computed: a network of any size is planned in seconds.

With a topology, the network's start and its training step are also compiled for that slice of TPUs,
by the TPU compiler on this machine, and memory and collectives are listed. This needs no TPU, but
the extra ``tpu-aot``.

Example:
    python -m experiments plan --model resnet32 --density 0.1 --budget erdos_renyi_kernel
    python -m experiments plan --model mlp7 --topology v5e:2x4 --mesh data=2,model=4
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from eoi_jax import budgets, masks
from eoi_jax.typing import Layout, Shape, Where
from experiments import models
from experiments.tools import programs, slices
from experiments.tools.layer_cost import Layer
from experiments.training import meshes

__all__ = ["Layer", "Plan", "plan"]

_LAYERS = (nn.Dense, nn.Conv, models.HeadProjection)

# Columns of the table: head, attribute of a layer, unit. A narrow table has the first two.
_NUMBERS = (
    ("FLOPs", "flops", ""),
    ("masked", "masked_flops", ""),
    ("weights", "weight_bytes", "B"),
    ("mask", "mask_bytes", "B"),
    ("sparse", "sparse_bytes", "B"),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of :func:`plan`.

    Attributes:
        density: The density that was asked for.
        budget: Name of the rule that shared it.
        layers: The layers, in the order in which the network calls them.
    """

    density: float
    budget: str
    layers: tuple[Layer, ...]

    def total(self, attribute: str, *, pruned: bool = False) -> int:
        """Sum an attribute, ``"size"`` or ``"flops"`` for example, of all or the pruned layers."""
        layers = (layer for layer in self.layers if not (pruned and layer.dense))
        return sum(getattr(layer, attribute) for layer in layers)

    @property
    def target(self) -> int:
        """The weights that the density allows the pruned layers: rounded half up."""
        return math.floor(self.density * self.total("size", pruned=True) + 0.5)

    @property
    def infeasible(self) -> tuple[Layer, ...]:
        """Layers that get fewer weights than an exactly orthogonal kernel has."""
        return tuple(layer for layer in self.layers if layer.num_infeasible)


def plan(
    model: nn.Module,
    input_shape: Shape,
    density: float,
    budget: str = "erdos_renyi_kernel",
    *,
    where: Where = masks.is_kernel,
) -> Plan:
    r"""Plan a sparse network without making any of its weights.

    The kernels of all linear layers and convolutions that are pruned share
    :math:`\lfloor \text{density} \cdot \sum_l n_l + 1/2 \rfloor` weights. An exactly orthogonal
    kernel of :math:`g` groups with :math:`n` inputs and :math:`m` outputs each has at least
    :math:`g \min(n, m)` of them, at its center tap if it has several. One example costs
    :math:`2 P n_l` operations in a layer that is applied at :math:`P` positions; biases,
    activations, normalization and the products of attention's queries, keys and values with each
    other are not counted, and products with padded zeros are.

    Args:
        model: A Linen module, called as ``model(images)``. Its kernels belong to
            :class:`flax.linen.Dense`, :class:`flax.linen.Conv` and
            :class:`experiments.models.HeadProjection`, scanned or not; a layer that is called more
            than once counts as called once.
        input_shape: Shape of one example, without a batch axis.
        density: Fraction of the weights of all pruned kernels together, in (0, 1].
        budget: How the layers share them, a name in ``eoi.budgets.RULES``; hyphens do for
            underscores.
        where: Which leaves are pruned, such as :func:`experiments.models.where` says; the other
            kernels are listed as dense.

    Returns:
        A :class:`Plan`.

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, section 4.
    """
    rule = budgets.RULES[models.choose(budget.replace("-", "_"), budgets.RULES, "budget")]
    calls, params = _trace(model, input_shape)
    kernels = {
        _names(path): (leaf, where(path, leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if masks.is_kernel(path, leaf)
    }
    unknown = ["/".join(names) for names in kernels if names not in calls]
    if unknown:
        raise ValueError(
            f"model={type(model).__name__} has the kernels {unknown}, outside those of nn.Dense, "
            "nn.Conv and HeadProjection. Build it from these layers to plan it."
        )

    def layout(path: tuple[Any, ...], leaf: Any) -> Layout:
        return Layout(len(leaf.shape) - len(calls[_names(path)].shape))

    shared = rule(params, density, where=where, layout=layout)
    densities = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shared)}
    layers = []
    for names, call in calls.items():
        leaf, pruned = kernels[names]
        size = math.prod(call.shape)
        counts = np.rint(np.broadcast_to(np.ravel(densities[names]), leaf.size // size) * size)
        stacked = len(leaf.shape) > len(call.shape)
        alone = sum(other[:-2] == names[:-2] for other in calls) == 1
        name = names[:-2] if stacked and alone and len(names) > 2 else names[:-1]
        counts = tuple(counts.astype(int).tolist())
        layers.append(Layer("/".join(name), *call, counts, dense=not pruned))
    return Plan(float(density), rule.__name__, tuple(layers))


class _Call(NamedTuple):
    shape: tuple[int, ...]
    groups: int
    positions: int


def _trace(model: nn.Module, input_shape: Shape) -> tuple[dict[tuple[str, ...], _Call], Any]:
    """Return what each linear layer and convolution does, by the path of its kernel, and params.

    The layer itself tells the shape of its kernel: inside a scan it sees one slice of the stack.
    A scan may trace its body more than once, so the path is what tells calls apart.
    """
    calls: dict[tuple[str, ...], _Call] = {}

    def watch(
        function: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        output = function(*args, **kwargs)
        layer = context.module
        if isinstance(layer, _LAYERS) and context.method_name == "__call__":
            shape = layer.variables["params"]["kernel"].shape
            groups = layer.feature_group_count if isinstance(layer, nn.Conv) else 1
            positions = output.size // shape[-1]
            if isinstance(layer, models.HeadProjection):  # a kernel for each head
                positions //= 1 if layer.merge else layer.heads
                shape = shape[1:]
            calls[*layer.path, "kernel"] = _Call(shape, groups, positions)
        return output

    images = jax.ShapeDtypeStruct((1, *input_shape), "float32")
    with nn.intercept_methods(watch):
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return calls, variables["params"]


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", key)) for key in path)


def table(found: Plan, *, title: str = "", full_width: bool = True) -> Table:
    """Tabulate a plan, in 80 columns, or with the bytes of each layer in 112."""
    numbers = _NUMBERS if full_width else _NUMBERS[:2]
    footer = [
        *("total", "", f"{found.total('nonzeros') / found.total('size'):.4f}"),
        *(f"{found.total('nonzeros'):,}", ""),
        "–" if found.infeasible else f"{found.total('rotations'):,}",
        *(_short(found.total(attribute), unit) for _, attribute, unit in numbers),
    ]
    heads = ["layer", "shape", "density", "non-zeros", "minimum", "rotations"]
    heads += [head for head, _, _ in numbers]
    out = Table(title=title, box=SIMPLE, padding=(0, int(full_width), 0, 0), show_footer=True)
    for head, total in zip(heads, footer, strict=True):
        if head == "layer":
            out.add_column(head, total, overflow="fold")
        else:
            out.add_column(head, total, justify="right", no_wrap=True)
    for layer in found.layers:
        out.add_row(
            layer.name + (f" ({layer.num_layers} layers)" if layer.num_layers > 1 else ""),
            "x".join(map(str, layer.shape)),
            f"{'! ' if layer.num_infeasible else ''}{layer.density:.4f}",
            f"{layer.nonzeros:,}",
            "dense" if layer.dense else f"{layer.min_density:.4f}",
            "–" if layer.rotations is None else f"{layer.rotations:,}",
            *(_short(getattr(layer, attribute), unit) for _, attribute, unit in numbers),
            style="red" if layer.num_infeasible else None,
        )
    return out


def summary(found: Plan) -> list[str]:
    """State the totals against the target, what the columns are, and the infeasible layers."""
    size, nonzeros = found.total("size", pruned=True), found.total("nonzeros", pruned=True)
    dense = found.total("size") - size
    lines = [
        f"Weights: {nonzeros:,} of {size:,}; target {found.density:g} x {size:,} = "
        f"{found.target:,}: {'exact' if nonzeros == found.target else nonzeros - found.target}"
        + (f"; and {dense:,} of dense layers" if dense else ""),
        f"Memory: {_short(found.total('weight_bytes'), 'B')} of float32 weights kept dense, "
        f"{_short(found.total('mask_bytes'), 'B')} of mask (bool, 1 byte a weight); sparse, as "
        f"float32 values with int32 indices, {_short(found.total('sparse_bytes'), 'B')}",
        "minimum: smallest density of an exactly orthogonal kernel (EOI); rotations: how many are "
        "expected to draw it; FLOPs: one example, 2 for each multiply-add, by all weights; masked: "
        "by the non-zeros alone",
    ]
    if found.infeasible:
        named = ", ".join(_shortage(layer) for layer in found.infeasible)
        lines.append(
            f"! Below EOI's minimum: {named}. Give a larger density or another budget, or leave "
            "these layers to another initializer."
        )
    return lines


def _shortage(layer: Layer) -> str:
    stack = f"{layer.num_infeasible} of {layer.num_layers} layers, " if layer.num_layers > 1 else ""
    return f"{layer.name} ({stack}{min(layer.counts):,} of at least {layer.min_count:,} weights)"


def _short(number: float, unit: str = "") -> str:
    """Write a number in three digits: 1.86MB."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{prefix}{unit}"
        number /= 1000
    return f"{number:.3g}T{unit}"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the plan."""

    model: Annotated[str, tyro.conf.arg(help=f"Network: {', '.join(models.NAMES)}.")] = "resnet32"
    density: float = 0.1
    """Fraction of the weights of all pruned kernels together, in (0, 1]."""
    budget: Annotated[
        str, tyro.conf.arg(help=f"How the layers share them: {', '.join(budgets.RULES)}.")
    ] = "erdos_renyi_kernel"
    num_classes: int | None = None
    """Units of the last layer; default: those of the network."""
    depth: int | None = None
    """Layers or blocks; default: those of the network."""
    width: int | None = None
    """Units of a hidden layer, or channels of the first stage; default: those of the network."""
    attention: bool = False
    """Prune the heads of attention too."""
    topology: str | None = None
    """Slice of TPUs to compile for, version and shape: v5e:16x16."""
    mesh: str | None = None
    """How its devices are arranged, data=16,model=16; default: all along data."""
    batch_size: int = 256
    """Examples of a training step, on all devices together."""


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    prog = "python -m experiments plan"
    config = tyro.cli(Config, args=arguments, description=__doc__, prog=prog)
    console = Console(width=None if Console().is_terminal else 120)
    try:
        name = config.model.replace("-", "_")  # hyphens do, as in budgets
        model = models.create(name, config.num_classes, depth=config.depth, width=config.width)
        where = models.where(name, attention=config.attention)
        shape = models.input_shape(name)
        found = plan(model, shape, config.density, config.budget, where=where)
        mesh = _mesh(config)
        if mesh is not None:
            slices.check_batch(config.batch_size, mesh)
    except (ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    title = f"{name}, density {config.density:g}, {found.budget}"
    console.print(table(found, title=title, full_width=console.width >= 112))
    for line in summary(found):
        console.print(line, highlight=False)
    if mesh is not None:
        densities = _densities(config.budget, config.density, model, shape, where)
        network = slices.Network(model, shape, densities, where)
        with console.status(f"Compiling for {config.topology}"):
            built = {
                "initialization": slices.try_build(slices.initialization, network, mesh),
                f"step of {config.batch_size}": slices.try_build(
                    slices.training_step, network, mesh, config.batch_size
                ),
            }
        title = f"One device of {config.topology}, {meshes.MeshShape(**mesh.shape)}"
        console.print(slices.table(built, mesh.devices.flat[0].device_kind, title))


def _mesh(config: Config) -> Mesh | None:
    """Return the mesh to compile for, or None if there is no topology."""
    if config.topology is None:
        if config.mesh is not None:
            raise ValueError(
                f"mesh={config.mesh!r} is given without a topology. Name the slice of TPUs as "
                "well: --topology v5e:16x16."
            )
        return None
    shape = None if config.mesh is None else meshes.parse(config.mesh)
    devices = programs.tpu_devices(config.topology)
    return meshes.make(shape or meshes.MeshShape(data=len(devices)), devices)


def _densities(budget: str, density: float, model: Any, input_shape: Shape, where: Where) -> Any:
    """Share a density among the kernels as the drawn network has them."""
    _, params = _trace(model, input_shape)
    rule = budgets.RULES[budget.replace("-", "_")]
    return rule(params, density, where=where, layout=models.layout)


if __name__ == "__main__":
    main()
