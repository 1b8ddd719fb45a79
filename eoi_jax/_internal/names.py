"""Layouts of kernels from the names that frameworks give them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from eoi_jax._internal import checks, trees
from eoi_jax.typing import Layout, LayoutOf, Params

__all__ = ["Named", "by_name", "known"]

# Wider windows are no convolutions but channels in another order.
_LARGEST_WINDOW = 15
_ATTENTION = ("query", "key", "value", "out")
_GPT2 = ("c_attn", "q_attn", "c_fc", "c_proj")  # whose kernels Hugging Face stores (out, in)
# Of PyTorch and Equinox, with the outputs first.
_TORCH = ("weight_ih", "weight_hh", "weight_hr", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_OUTPUTS_FIRST = Layout(in_axis=1, out_axis=0)


@dataclasses.dataclass(frozen=True)
class Named:
    """A layout by the names of a tree's leaves: ``(path, leaf) -> Layout``."""

    layouts: Mapping[str, Layout]  # of the kernels whose names tell their axes
    batch_axes: int | Callable[[tuple[Any, ...]], int]
    strict: bool  # whether shapes that may mean several things are refused

    def __call__(self, path: tuple[Any, ...], leaf: Any) -> Layout:
        """Return the layout of a leaf."""
        name = _name(path)
        if name in self.layouts:
            return self.layouts[name]
        stacked = _batch_axes(self.batch_axes, path, leaf)
        if self.strict and trees.is_kernel_name(path):
            _unambiguous(path, tuple(leaf.shape), stacked)
        return Layout(batch_axes=stacked)


def by_name(
    params: Params,
    *,
    per_head: bool = False,
    batch_axes: int | Callable[[tuple[Any, ...]], int] = 0,
    strict: bool = True,
) -> Named:
    """Read the kernels of a tree by their names; see :func:`eoi_jax.layouts.by_name`."""
    leaves = {
        path: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if trees.is_kernel_name(path) and len(getattr(leaf, "shape", ())) > 1
    }
    found: dict[str, Layout] = {}
    modules: dict[tuple[str, ...], dict[str, tuple[str, tuple[int, ...]]]] = {}
    fused = {}
    for path, leaf in leaves.items():
        *parent, module, _ = ("", "", *_parts(path))
        name, stacked = _name(path), _batch_axes(batch_axes, path, leaf)
        shape = tuple(leaf.shape[stacked:])
        modules.setdefault(tuple(parent), {})[module] = (name, tuple(leaf.shape))
        if len(shape) != 2:
            continue
        if _is_attribute(path, "weight") or _parts(path)[-1].startswith(_TORCH):
            found[name] = _OUTPUTS_FIRST._replace(batch_axes=stacked)
        if module == "c_attn" or _parts(path)[-1] == "in_proj_weight":
            fused[name] = stacked, shape, module
    for name, (stacked, shape, _) in fused.items():
        if shape[1] == 3 * shape[0]:
            found[name] = Layout(batch_axes=stacked, groups=3)
        elif shape[0] == 3 * shape[1]:
            found[name] = _OUTPUTS_FIRST._replace(batch_axes=stacked, groups=3)
    # GPT-2's own kernels tell which axes the others have; those of PyTorch only without them.
    telling = [kernel for kernel in fused.values() if kernel[2] == "c_attn"] or fused.values()
    if any(shape[0] == 3 * shape[1] for _, shape, _ in telling):
        for of_module in modules.values():
            for module in _GPT2:
                name, shape = of_module.get(module, ("", ()))
                if len(shape) < 2 or name in found:
                    continue
                groups = 2 if module == "c_attn" else 1  # keys and values of cross-attention
                if groups == 1 or ("q_attn" in of_module and shape[-2] == 2 * shape[-1]):
                    found[name] = _OUTPUTS_FIRST._replace(batch_axes=len(shape) - 2, groups=groups)
    for of_module in modules.values():
        if all(module in of_module for module in _ATTENTION):
            found |= _attention([of_module[module] for module in _ATTENTION], per_head)
    return Named(found, batch_axes, strict)


def known(layout: LayoutOf | None, params: Params, *, strict: bool = True) -> LayoutOf:
    """Return a layout as it is, and without one what the names tell."""
    return by_name(params, strict=strict) if layout is None else layout


def _attention(kernels: list[tuple[str, tuple[int, ...]]], per_head: bool) -> dict[str, Layout]:
    """Read query, key, value and output of attention, if their shapes fit together."""
    shapes = [shape for _, shape in kernels]
    stacked = len(shapes[0]) - 3
    if stacked < 0 or len({(len(shape), shape[:stacked]) for shape in shapes}) > 1:
        return {}
    query, key, value, out = (shape[stacked:] for shape in shapes)
    heads, kv_heads = query[1], key[1]
    fits = query[2] == key[2] and kv_heads == value[1] and out[:2] == (heads, value[2])
    if not fits or kv_heads == 0 or heads % kv_heads:
        return {}
    into = Layout(stacked, in_axis=0, out_axis=(1, 2))
    back = Layout(stacked, in_axis=(0, 1), out_axis=2)
    if per_head:
        into = Layout(stacked, in_axis=0, out_axis=2, batch_axis=1)
        back = Layout(stacked, in_axis=1, out_axis=2, batch_axis=0)
    return {name: into for name, _ in kernels[:3]} | {kernels[3][0]: back}


def _unambiguous(path: Any, shape: tuple[int, ...], stacked: int) -> None:
    """Refuse shapes that may mean several things, where no name tells which."""
    if len(shape) - stacked < 2:
        return
    *taps, inputs, outputs = shape[stacked:]
    readings = ""
    if not taps and "c_attn" in _parts(path):
        readings = "q, k and v of unequal widths, to be drawn apart, or one matrix"
    elif len(taps) == 1:
        readings = "a stack of layers, a 1-D convolution or attention"
    elif len(taps) > 2:
        readings = "a stack of convolutions, or one of 3 or more spatial axes"
    elif _is_attribute(path, "weight") and taps:
        readings = "a kernel (outputs, inputs, *taps), as Equinox stores it, or (*taps, ...)"
    elif taps and max(taps) > _LARGEST_WINDOW:
        readings = f"a window of {' x '.join(map(str, taps))} or other axes"
    elif taps and inputs == 1 and outputs > 1:
        readings = "a depthwise convolution or one of a single input channel"
    if readings:
        raise ValueError(
            f"params[{trees.path_name(path)}] of shape {shape} is outside the kernels that a name "
            f"and a shape explain: {readings}. Say which with layout=lambda path, leaf: "
            "Layout(...): batch_axes=1 for a stack, in_axis=0, out_axis=(1, 2) for attention's "
            "(d, heads, k), in_axis=(0, 1) for (heads, k, d), in_axis=1, out_axis=0 for (outputs, "
            "inputs, *taps), groups for depthwise ones, Layout() for (*taps, inputs, outputs)."
        )


def _batch_axes(
    batch_axes: int | Callable[[tuple[Any, ...]], int], path: tuple[Any, ...], leaf: Any
) -> int:
    number = batch_axes(path) if callable(batch_axes) else batch_axes
    name = f"batch_axes({trees.path_name(path)})" if callable(batch_axes) else "batch_axes"
    checks.integer(number, low=0, name=name)
    # A bias of a stack has fewer axes than its kernel, and other leaves may have none.
    return min(number, max(len(leaf.shape) - 1, 0))


def _is_attribute(path: tuple[Any, ...], name: str) -> bool:
    return getattr(path[-1] if path else None, "name", None) == name


def _parts(path: tuple[Any, ...]) -> list[str]:
    """Return the names along a path; a flat one has several in each key."""
    return trees.path_name(trees.without_value(path)).replace(".", "/").split("/")


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(_parts(path))
