"""Sparse networks in files: weights, masks and what was measured of them, in safetensors.

Each leaf of the parameters is a dense tensor under its path, the keys joined by ``/`` as in
``block/conv/kernel``. Inside a key ``~`` is written ``~0`` and ``/`` is written ``~1`` (RFC 6901),
so the names of Haiku's modules come back as they were. The ``value`` attribute in which NNX keeps
an array is no part of a path.

Each leaf with a mask of its own has a second tensor, its path and ``~mask``: the mask's bits in the
order of the weights, eight to a byte, the first in the highest bit, as :func:`numpy.packbits` packs
them. That is one bit a weight, 1/32 of float32 weights.

The file's metadata have one entry, ``eoi_jax``, in JSON: the number of the format, versions, and of
every leaf its dtype and shape, and of a kernel the layout if one was given; of one with a mask also
how many weights it keeps, its density and, of a kernel whose axes are known, the largest of its
:func:`eoi_jax.spectrum.kernel_orthogonality_errors`.

The format has no code in it and nothing is unpickled. What is verified of a file, and what is not,
stands at :func:`load`; of a stranger's file measure what matters, as ``inspect`` of the experiments
does.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from eoi_jax import masks
from eoi_jax._internal import checks, sparse_file, trees
from eoi_jax._internal.version import __version__
from eoi_jax.spectrum import errors
from eoi_jax.typing import Layout, LayoutOf, Mask, Params

__all__ = ["SavedNetwork", "load", "save"]


class SavedNetwork(NamedTuple):
    """What a file holds.

    Attributes:
        params: The parameters, exactly zero off the mask.
        mask: Which weights may be non-zero.
        metadata: The file's records, a dict: ``"format"``, ``"versions"``, ``"leaves"``, which has
            the records of each leaf by its path, and ``"user"``, what the user gave to
            :func:`save`. An ``"orthogonality_error"`` is as recorded, not verified.
    """

    params: Params
    mask: Mask
    metadata: dict[str, Any]

    def layout(self, path: tuple[Any, ...], leaf: Any) -> Layout:
        """Return how a leaf is read, as recorded: pass it on as ``layout=saved.layout``."""
        del leaf
        name, records = _name(path), self.metadata["leaves"]
        if name not in records:
            raise ValueError(
                f"path={name!r} is outside the leaves of the file, such as "
                f"{min(records, default=None)!r}. Pass the whole tree: saved.params."
            )
        return Layout(**records[name].get("layout", {}))


def save(
    path: str | os.PathLike[str],
    params: Params,
    mask: Mask,
    *,
    metadata: Any = None,
    layout: LayoutOf | None = None,
) -> None:
    """Write a sparse network to a file, in safetensors.

    The file is complete or not there: it is written under another name and then renamed, and
    replaces an older one. A mask takes one bit a weight, 1/32 of what float32 weights take; the
    weights are stored dense, so any program that reads safetensors can use them.

    Args:
        path: The file, usually ``*.safetensors``, in a folder that exists.
        params: A pytree of arrays, zero off the mask: the parameters, or all variables with batch
            statistics. Of an Equinox module its arrays, ``eqx.filter(model,
            eqx.is_inexact_array)``; of an NNX model ``nnx.state(model, nnx.Param)``, or with
            statistics ``nnx.state(model, (nnx.Param, nnx.BatchStat))``.
        mask: A mask of its structure, as :func:`eoi_jax.masks.support` makes it or as the state of
            an optimizer has it: ``optax.tree.get(state, "mask")``.
        metadata: Anything that JSON gives back as it was, found again under ``metadata["user"]``:
            no tuples, and no keys other than strings.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or have groups. It is
            asked for the leaves that :func:`eoi_jax.masks.is_kernel` names, and recorded. Without
            it only kernels of two axes have an orthogonality error: one of more may be a
            convolution or a stack of layers, and is not guessed.

    Returns:
        Nothing.

    Raises:
        ValueError: If the mask does not fit; if a weight off the mask is not zero, or any weight is
            not finite; if a leaf is no array, a random key or of a dtype that the format has not;
            if two leaves would have one name; if JSON does not give back the metadata.
        OSError: If the file cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> params = {"dense": {"kernel": jnp.eye(8, 4), "bias": jnp.ones(4)}}
        >>> eoi.save(path, params, eoi.masks.support(params), metadata={"accuracy": 0.98})
        >>> saved = eoi.load(path)
        >>> saved.params["dense"]["bias"].tolist(), saved.metadata["user"]
        ([1.0, 1.0, 1.0, 1.0], {'accuracy': 0.98})
        >>> record = saved.metadata["leaves"]["dense/kernel"]
        >>> record["kept"], record["density"], record["orthogonality_error"]
        (4, 0.125, 0.0)
    """
    trees.arrays(params)
    trees.mask_fits(mask, params)
    trees.mask_leaves(mask)
    leaves: dict[str, sparse_file.Leaf] = {}
    records: dict[str, dict[str, Any]] = {}
    rows = zip(_names(params, "params"), jax.tree.leaves(mask), strict=True)
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (name, own), (key_path, leaf) in zip(rows, paths, strict=True):
        where = f"params[{name}]"
        value = _array(leaf, where)
        records[name] = {"dtype": value.dtype.name, "shape": list(value.shape)}
        leaves[name] = sparse_file.Leaf(value, np.asarray(own) if np.ndim(own) else None)
        remedy = "Mask them first: eoi.masks.apply(mask, params)."
        sparse_file.check_weights(leaves[name], where, remedy)
        kernel = masks.is_kernel(key_path, leaf)
        if kernel and layout is not None:
            records[name]["layout"] = trees.layout(layout, key_path, leaf)._asdict()
        if np.ndim(own):
            records[name] |= sparse_file.counts(np.asarray(own))
            records[name] |= _measured(key_path, leaf, layout) if kernel else {}
    versions = {"eoi_jax": __version__, "jax": jax.__version__}
    header = {"versions": versions, "leaves": records, "user": metadata}
    sparse_file.write(Path(path), leaves, header)


def load(path: str | os.PathLike[str], like: Params | None = None) -> SavedNetwork:
    """Read a sparse network that :func:`save` wrote, and verify it.

    Verified are the names, shapes and dtypes of all tensors, a mask of the right size for each
    leaf that has one, the number of weights that it keeps and their density, zeros off the mask,
    and that all weights are finite. Versions, layouts, orthogonality errors and the user's own
    metadata are as recorded, not verified.

    Args:
        path: The file.
        like: A pytree of the structure, shapes and dtypes that were saved, of arrays or
            :class:`jax.ShapeDtypeStruct`, as ``jax.eval_shape(model.init, key, x)`` gives. Default:
            nested dicts whose keys are strings.

    Returns:
        Parameters and mask in the structure of ``like``, and the metadata. Training goes on with
        ``eoi.static_sparse(optimizer, saved.mask)``.

    Raises:
        ValueError: If the file is none that :func:`save` wrote, is truncated, has a tensor too few
            or too many, or does not agree with its own records; if it does not fit ``like``; if it
            has 64-bit weights, which JAX has not enabled.
        OSError: If there is no file, or it cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> params = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
        >>> eoi.save(path, params, eoi.masks.support(params))
        >>> params, mask, metadata = eoi.load(path, like=params)
        >>> eoi.masks.density(mask), metadata["leaves"]["kernel"]["kept"]
        (0.3333333333333333, 3)
    """
    leaves, header = sparse_file.read(Path(path))
    for name, leaf in leaves.items():
        if jax.dtypes.canonicalize_dtype(leaf.value.dtype) != leaf.value.dtype:
            problem = f"has {name} in {leaf.value.dtype}, outside the dtypes that JAX has enabled"
            remedy = "Enable it: JAX_ENABLE_X64=1, or jax.config.update('jax_enable_x64', True)."
            raise checks.value_error("path", str(path), problem, remedy)
    params = {name: jnp.asarray(leaf.value) for name, leaf in leaves.items()}
    mask = {  # a scalar of its own for each dense leaf: two may not share a buffer
        name: jnp.array(True if leaf.kept is None else leaf.kept) for name, leaf in leaves.items()
    }
    if like is None:
        return SavedNetwork(_nested(params), _nested(mask), header)
    names, treedef = _fitting(path, like, params), jax.tree.structure(like)
    own_params = jax.tree.unflatten(treedef, [params[name] for name in names])
    return SavedNetwork(own_params, jax.tree.unflatten(treedef, [mask[n] for n in names]), header)


def _name(path: tuple[Any, ...]) -> str:
    """Return the name of a leaf: the keys of its path, each without a slash."""
    keys = (jax.tree_util.keystr((key,), simple=True) for key in trees.without_value(path))
    return "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)


def _names(tree: Any, argument: str) -> list[str]:
    """Return the names of the leaves of a tree, one for each, none of them within another."""
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for name in names:
        if "" in name.split("/") or name == "__metadata__":
            raise ValueError(
                f"{argument}[{name}] is outside the leaves that have a name, other than '' and "
                '__metadata__. Give a dict: {"kernel": array}.'
            )
    clash = sparse_file.clash(names)
    if clash is not None:
        raise ValueError(
            f"{argument}[{clash}] is outside the leaves with a name of their own: another has this "
            "name or a part of it. Rename it; an attribute called value counts for nothing."
        )
    return names


def _array(leaf: Any, where: str) -> NDArray[Any]:
    """Accept an array of a dtype that the format has, in the order of C."""
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise ValueError(
            f"{where} is of type {type(leaf).__name__}, outside the arrays of JAX and NumPy. Save "
            "arrays only: eqx.filter(model, eqx.is_inexact_array), jnp.asarray of a number, or "
            "tensor.detach().cpu().numpy() of PyTorch."
        )
    if checks.is_traced(leaf):
        raise checks.value_error(where, leaf, "is being traced", "Save outside of jit.")
    dtypes = ", ".join(sparse_file.DTYPES)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"{where} is a random key, outside the arrays of {{{dtypes}}}. Save "
            "parameters only, such as nnx.state(model, (nnx.Param, nnx.BatchStat))."
        )
    if leaf.dtype.name not in sparse_file.DTYPES:
        raise ValueError(
            f"{where} has dtype {leaf.dtype}, outside {{{dtypes}}}. Convert it with leaf.astype."
        )
    return np.asarray(leaf)


def _measured(path: Any, leaf: Any, layout: LayoutOf | None) -> dict[str, float]:
    """Return the orthogonality error of a kernel, the largest of a stack."""
    if layout is None and leaf.ndim > 2:
        return {}  # (2, 3, 8, 8) is a convolution, or a stack of layers: its shape does not tell
    try:
        error = float(np.max(errors.errors_of(path, leaf, layout), initial=0.0))
    except ValueError:
        if layout is not None:
            raise
        return {}  # it has more weights than can be counted in 32 bits
    # Finite weights may have an infinite Gram matrix, which JSON does not hold.
    return {"orthogonality_error": error} if math.isfinite(error) else {}


def _fitting(path: Any, like: Any, params: dict[str, Any]) -> list[str]:
    """Return the names of the leaves of ``like``, which have to be those of the file."""
    names = _names(like, "like")
    for name, leaf in zip(names, jax.tree.leaves(like), strict=True):
        if name not in params:
            raise ValueError(
                f"like[{name}] is not in {str(path)!r}, outside {sorted(params)}. "
                "Build like from the model that was saved."
            )
        saved = params[name]
        if (np.shape(leaf), jnp.result_type(leaf)) != (saved.shape, saved.dtype):
            raise ValueError(
                f"like[{name}] has shape {np.shape(leaf)} and dtype {jnp.result_type(leaf)}, but "
                f"{str(path)!r} has {saved.shape} and {saved.dtype}. "
                "Build like from the model that was saved."
            )
    left = sorted(set(params).difference(names))
    if left:
        raise ValueError(
            f"like has no leaf {left[0]}, one of {len(left)} that only {str(path)!r} has. "
            "Build like from the model that was saved, with its batch statistics if it had them."
        )
    return names


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Make nested dicts of names."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = (key.replace("~1", "/").replace("~0", "~") for key in name.split("/"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
