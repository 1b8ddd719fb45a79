"""Inspect a saved network: how sparse and orthogonal it is, and whether its mask holds.

The network is a file that eoi.save wrote, or the last checkpoint of a run's folder. Each kernel, or
stack of kernels, has a line: the number of weights that its mask keeps, the orthogonality error
(the largest entry of the difference of a Gram matrix and the identity), the smallest and the
largest singular value, and whether all weights outside the mask are zero. A kernel of blocks is
shown as the dense kernel with these blocks. Convolutions are measured with stride 1 and circular
padding. In a file that was saved without layout=, only kernels of two axes are measured.

Example:
    python -m experiments inspect runs/train/0123456789ab
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import eoi_jax as eoi
from eoi_jax import linen
from eoi_jax._internal import checks
from eoi_jax._internal.arrays import nonzero
from eoi_jax.typing import Layout, LayoutOf, Mask, Params
from experiments import models
from experiments.training import checkpoints

__all__ = ["Kernel", "Saved", "inspect", "main", "read", "read_run"]


class Saved(NamedTuple):
    """A saved network.

    Attributes:
        title: What it is.
        variables: Parameters and statistics, nested dicts.
        mask: A mask of their structure.
        layout: How kernels are read; None where only shapes tell.
    """

    title: str
    variables: Params
    mask: Mask
    layout: LayoutOf | None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The measurements of :func:`inspect` for one kernel, or for a stack of kernels.

    Attributes:
        name: Its path, with escapes for what a terminal would obey.
        shape: Shape of one layer.
        num_layers: Layers of the stack; 1 for a kernel of its own.
        kept: Weights of all layers that the mask keeps; None for a kernel without a mask.
        off: Weights off the mask that are not zero.
        errors: Orthogonality error of each layer; None of what is no kernel, and of one of more
            than two axes without a layout.
        extremes: Smallest and largest singular value of all layers; None likewise.
    """

    name: str
    shape: tuple[int, ...]
    num_layers: int
    kept: int | None
    off: int
    errors: tuple[float, ...] | None
    extremes: tuple[float, float] | None

    @property
    def size(self) -> int:
        """Weights of all layers."""
        return self.num_layers * math.prod(self.shape)

    @property
    def nonzeros(self) -> int:
        """Weights that may be non-zero: those that the mask keeps, or all."""
        return self.size if self.kept is None else self.kept


def inspect(saved: Saved, *, grid: int = 8) -> list[Kernel]:
    """Measure the kernels of a network.

    Args:
        saved: The network.
        grid: Length of each side of the circular grid on which convolutions have their singular
            values.
    """
    checks.integer(grid, low=1, name="grid")
    saved = _dense(saved)
    leaves = jax.tree_util.tree_leaves_with_path(saved.variables)
    return [
        _kernel(path, np.asarray(leaf), np.asarray(leaf_mask), saved.layout, grid)
        for (path, leaf), leaf_mask in zip(leaves, jax.tree.leaves(saved.mask), strict=True)
        if np.ndim(leaf_mask) or eoi.masks.is_kernel(path, leaf)
    ]


def _dense(saved: Saved) -> Saved:
    """Return a network whose block-sparse kernels are dense ones under masks."""
    if not {"params", "pattern"} <= set(saved.variables):
        return saved
    params, blocks = linen.to_dense(saved.variables)
    old = saved.mask["params"]
    mask = jax.tree.map(lambda new, old: old if np.ndim(old) else new, blocks, old)

    def others(tree: Any) -> dict[str, Any]:
        return {name: tree[name] for name in tree if name not in ("params", "pattern")}

    return saved._replace(
        variables={"params": params, **others(saved.variables)},
        mask={"params": mask, **others(saved.mask)},
    )


def _kernel(path: Any, leaf: Any, mask: Any, layout_of: LayoutOf | None, grid: int) -> Kernel:
    layout = Layout() if layout_of is None else layout_of(path, leaf)
    shape, layers = leaf.shape[layout.batch_axes :], math.prod(leaf.shape[: layout.batch_axes])
    errors, extremes = None, None
    # Without a layout (2, 3, 8, 8) is a convolution or a stack of layers: it is not guessed.
    if eoi.masks.is_kernel(path, leaf) and (layout_of is not None or leaf.ndim == 2):
        one: Any = {"params": {"kernel": leaf}, "layout": lambda *_: layout}
        with contextlib.suppress(ValueError):  # of a recorded layout that does not fit
            [found] = eoi.spectrum.kernel_orthogonality_errors(**one).values()
            errors = tuple(np.ravel(found).tolist())
    if errors is not None:
        spatial = (grid,) * (len(shape) - 2) or None
        [values] = eoi.spectrum.kernel_singular_values(**one, spatial_shape=spatial).values()
        extremes = (float(values.min(initial=np.inf)), float(values.max(initial=0.0)))
    name = checks.printable(jax.tree_util.keystr(path, simple=True, separator="/"))
    kept = None if mask.ndim == 0 else int(np.count_nonzero(mask))
    off = 0 if mask.ndim == 0 else int(np.count_nonzero(nonzero(leaf[~mask])))
    return Kernel(name, shape, layers, kept, off, errors, extremes)


def read(path: Path, seed: int | None = None) -> Saved:
    """Read a network from a file, or from the last checkpoint of a run's folder.

    Args:
        path: The file, or the folder.
        seed: Which of the run's seeds; default: its first.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {str(path)!r}. Give a file of eoi.save or a run's folder, "
            "runs/<experiment>/<digest>."
        )
    if path.is_dir():
        return read_run(path, seed)
    if seed is not None:
        raise ValueError(
            f"seed={seed} is for a run's folder, and {str(path)!r} is a file. Leave it out."
        )
    network = eoi.load(path)
    versions, leaves = network.metadata["versions"], network.metadata["leaves"]
    known = any("layout" in record for record in leaves.values())
    title = f"{path}, written by eoi_jax {versions['eoi_jax']}"
    return Saved(title, network.params, network.mask, network.layout if known else None)


def read_run(folder: Path, seed: int | None = None) -> Saved:
    """Read the last checkpoint of a run that trains, also while it does.

    Args:
        folder: Folder of the run.
        seed: Which of its seeds; default: the first.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        seeds = config["seeds"] if config["kind"] == "Train" else None
    except (OSError, KeyError, TypeError, ValueError):
        seeds = None
    if not seeds:
        raise ValueError(
            f"folder={str(folder)!r} is outside the folders of runs that train: there is no "
            "config.json of one. Give runs/<experiment>/<digest>."
        )
    if seed is None:
        seed = seeds[0]
    if seed not in seeds:
        raise ValueError(f"seed={seed} is outside {seeds}, those of the run. Choose one of them.")
    if config.get("learning_rates"):
        raise ValueError(
            f"folder={str(folder)!r} is that of a run at the best of several learning rates: the "
            f"checkpoints are in the folders of its single rates and seeds, beside it in "
            f"{str(folder.parent)!r}. Give one of those."
        )
    found = checkpoints.read(folder / "checkpoints")
    state = jax.tree.map(jnp.asarray, found.tree)
    variables = {"params": state["params"], **state.get("others", {})}
    mask = state["optimizer"]["mask"]
    if len(seeds) > 1:
        index = seeds.index(seed)
        variables, mask = jax.tree.map(lambda leaf: leaf[index], (variables, mask))
    others = {name: leaf for name, leaf in variables.items() if name != "params"}
    dense = jax.tree.map(lambda _: np.array(True), others)
    title = f"{folder}, {config['model']} {config['method']}, seed {seed}, step {found.step}"
    return Saved(title, variables, {"params": mask, **dense}, models.layout)


def table(kernels: list[Kernel], title: str = "") -> Table:
    """Tabulate kernels, with the totals below."""
    size, nonzeros = (
        sum(getattr(kernel, name) for kernel in kernels) for name in ("size", "nonzeros")
    )
    errors = [error for kernel in kernels for error in kernel.errors or ()]
    extremes = [value for kernel in kernels for value in kernel.extremes or ()]
    totals = [
        *(_density(nonzeros, size), f"{nonzeros:,}", f"{size:,}"),
        f"{max(errors):.2g}" if errors else "–",
        *(f"{of(extremes):.3g}" if extremes else "–" for of in (min, max)),
        _holds(sum(kernel.off for kernel in kernels)),
    ]
    out = Table(
        title=checks.printable(title, limit=1000),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        show_footer=True,
    )
    out.add_column("kernel", "total", overflow="fold")
    out.add_column("shape", justify="right", no_wrap=True)
    heads = ("density", "kept", "weights", "error", "smallest", "largest", "mask")
    for head, total in zip(heads, totals, strict=True):
        out.add_column(head, total, justify="right", no_wrap=True)
    for kernel in kernels:
        out.add_row(
            kernel.name + (f" ({kernel.num_layers} layers)" if kernel.num_layers > 1 else ""),
            "x".join(map(str, kernel.shape)),
            _density(kernel.nonzeros, kernel.size),
            f"{kernel.nonzeros:,}",
            f"{kernel.size:,}",
            " to ".join(f"{error:.2g}" for error in _ends(kernel.errors)) or "–",
            *(f"{value:.3g}" for value in kernel.extremes or ()),
            *(() if kernel.extremes else ("–", "–")),
            "dense" if kernel.kept is None else _holds(kernel.off),
            style="red" if kernel.off else None,
        )
    return out


def _density(nonzeros: int, size: int) -> str:
    return f"{nonzeros / size:.4f}" if size else "–"


def _ends(errors: tuple[float, ...] | None) -> list[float]:
    """Return the smallest and the largest, once if there is but one."""
    return sorted({min(errors), max(errors)}) if errors else []


def _holds(off: int) -> str:
    return f"{off:,} off" if off else "holds"


@dataclasses.dataclass(frozen=True)
class Config:
    """Arguments of the command."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """File that eoi.save wrote, or folder of a run: runs/<experiment>/<digest>."""
    seed: int | None = None
    """Which of the run's seeds; default: its first."""
    grid: int = 8
    """Side of the circular grid for the singular values of convolutions."""


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line; status 1 if a mask does not hold, 2 for what cannot be read."""
    prog = "python -m experiments inspect"
    config = tyro.cli(Config, args=arguments, description=__doc__, prog=prog)
    width = None if Console().is_terminal else 120
    console = Console(width=width, markup=False, emoji=False)  # names may have brackets and colons
    try:
        saved = read(Path(config.path), config.seed)
        kernels = inspect(saved, grid=config.grid)
    except (OSError, ValueError) as error:
        print(f"error: {checks.printable(error, limit=1000)}", file=sys.stderr)
        sys.exit(2)
    console.print(table(kernels, saved.title))
    lines = [
        "error: largest entry by which a Gram matrix misses the identity; smallest, largest: "
        f"singular values, of convolutions on a circular grid of side {config.grid}"
    ]
    if any(kernel.errors is None for kernel in kernels):
        lines.append(
            "–: no kernel, or its axes are not known; eoi.save(..., layout=...) tells them"
        )
    off = [kernel.name for kernel in kernels if kernel.off]
    if off:
        lines.append(f"Weights off the mask are not zero in {', '.join(off)}.")
    for line in lines:
        console.print(line, highlight=False)
    if off:
        sys.exit(1)


if __name__ == "__main__":
    main()
