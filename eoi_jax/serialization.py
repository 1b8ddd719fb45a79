"""Sparse networks in safetensors files: weights, masks and measurements.

Each leaf of the parameters is a dense tensor. Its name is the path, with the keys joined by ``/``
as in ``block/conv/kernel``. Inside a key ``~`` is written ``~0`` and ``/`` is written ``~1`` (RFC
6901), so the names of Haiku's modules are restored. The ``value`` attribute in which NNX keeps an
array is no part of a path. A path has at most 100 keys, and only printable characters.

Each leaf whose mask is an array has a second tensor, named by its path and ``~mask``: the bits of
the mask in the order of the weights, eight to a byte, the first in the highest bit, as
:func:`numpy.packbits` packs them. This is one bit for each weight, 1/32 of float32 weights.

The metadata of the file have one entry, ``eoi_jax``, in JSON. It has the number of the format,
versions, and for every leaf the dtype and shape, and the layout of a kernel if one was given. For a
leaf with a mask it also has the number of kept weights, the density and, for a kernel whose axes
are known, the largest of its :func:`eoi_jax.spectrum.kernel_orthogonality_errors`. ``sha256`` has
digests: under ``tensors`` those of the bytes of each tensor, and under ``records`` that of
everything else in the entry, as :func:`json.dumps` writes it.

The format contains no code, and nothing is unpickled. The docstring of :func:`load` lists what is
verified. Digests detect damage, but anyone can write a file with valid digests: if a file comes
from a source that you do not trust, measure what matters to you again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from eoi_jax import spectrum
from eoi_jax._internal import checks, fan_axes, selection, shardings, trees
from eoi_jax._internal.arrays import native, nonzero
from eoi_jax._internal.files import atomic_write
from eoi_jax._internal.version import __version__
from eoi_jax.typing import Layout, LayoutOf, Mask, Params

__all__ = ["SavedNetwork", "load", "save"]

_FORMAT = 1
_ENTRY = "eoi_jax"  # of the metadata of the file
_DIGESTS = "sha256"  # in the entry; files of earlier versions have the other four keys alone
_RECORDS = {"format", "versions", "leaves", "user"}
_MAX_KEYS = 100  # of a path: functions over trees call themselves once for each
_MASK = "~mask"  # no name ends so: in names a ~ has 0 or 1 behind it
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_INTEGERS = ("int8", "int16", "int32", "int64")
_AXES = ("in_axis", "out_axis", "batch_axis")  # of a layout
_DTYPES = (*_FLOATS, "bool", *_INTEGERS, *(f"u{name}" for name in _INTEGERS))


class _Leaf(NamedTuple):
    """An array on the host, and which of its weights may be non-zero: None if all may."""

    value: NDArray[Any]
    kept: NDArray[np.bool_] | None


class SavedNetwork(NamedTuple):
    """The content of a file, as :func:`load` returns it.

    Attributes:
        params: The parameters, exactly zero outside the mask.
        mask: Which weights may be non-zero.
        metadata: The file's records, a dict: ``"format"``, ``"versions"``, ``"leaves"``, which has
            the records of each leaf by its path, ``"user"``, the ``metadata`` given to
            :func:`save`, and ``"sha256"``, the digests. An ``"orthogonality_error"`` is the
            recorded value; it is not measured again.
    """

    params: Params
    mask: Mask
    metadata: dict[str, Any]

    def layout(self, path: tuple[Any, ...], leaf: Any) -> Layout:
        """Return the recorded layout of a leaf. Pass this method as ``layout=saved.layout``."""
        del leaf
        name, records = _name(path), self.metadata["leaves"]
        if name not in records:
            raise ValueError(
                f"path={name!r} is outside the leaves of the file, such as "
                f"{min(records, default=None)!r}. Pass the whole tree: saved.params."
            )
        return _recorded_layout(records[name])


def save(
    path: str | os.PathLike[str],
    params: Params,
    mask: Mask,
    *,
    metadata: Any = None,
    layout: LayoutOf | None = None,
) -> None:
    """Write a sparse network to a safetensors file.

    The file is either complete or not there: it is written under another name and then renamed,
    and replaces an older file. Any number of threads and processes may write one path. A mask takes
    one bit for each weight, 1/32 of float32 weights. The weights are stored dense, so any program
    that reads safetensors can use them. Arrays may have any sharding, and arrays of NumPy any byte
    order: their values on the host are written and measured.

    Args:
        path: The file, usually ``*.safetensors``, in a folder that exists.
        params: A pytree of arrays, zero outside the mask: the parameters, or all variables with
            batch statistics. For an Equinox module pass ``eqx.filter(model,
            eqx.is_inexact_array)``; for an NNX model ``nnx.state(model, nnx.Param)``, or with
            statistics ``nnx.state(model, (nnx.Param, nnx.BatchStat))``.
        mask: A mask of the structure of ``params``, as from :func:`eoi_jax.masks.support` or from
            the state of an optimizer: ``optax.tree.get(state, "mask")``.
        metadata: Any value that JSON restores exactly, so without tuples and with only strings as
            keys. :func:`load` returns it under ``metadata["user"]``.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or have groups. It is
            called for the leaves that :func:`eoi_jax.masks.is_kernel` accepts, and recorded.
            Without it only kernels of two axes get an orthogonality error, since a kernel of more
            axes may be a convolution or a stack of layers.

    Returns:
        Nothing.

    Raises:
        ValueError: If the mask does not fit; if a weight outside the mask is not zero, or any
            weight is not finite; if a leaf is no array, a random key or of a dtype that the format
            does not have; if two leaves would have the same name, or a name cannot be printed or
            has more than 100 keys; if JSON does not restore the metadata exactly.
        OSError: If the file cannot be written, as on a full disk. The old file does not change.

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
    leaves: dict[str, _Leaf] = {}
    records: dict[str, dict[str, Any]] = {}
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(params)
    rows = zip(_names(params, "params"), paths_and_leaves, jax.tree.leaves(mask), strict=True)
    for name, (key_path, leaf), leaf_mask in rows:
        where = f"params[{name}]"
        value = _array(leaf, where)
        kept = _on_host(leaf_mask, f"mask[{name}]") if np.ndim(leaf_mask) else None
        leaves[name] = _Leaf(value, kept)
        _check_weights(leaves[name], where, "Mask them first: eoi.masks.apply(mask, params).")
        record = records[name] = {"dtype": value.dtype.name, "shape": list(value.shape)}
        is_kernel, found = trees.is_kernel(key_path, leaf), None
        if is_kernel and layout is not None:
            found = trees.layout(layout, key_path, leaf)
            record["layout"] = _layout_record(found, key_path, leaf)
        if kept is not None:
            record |= _counts(kept)
            record |= _measured(name, value, found) if is_kernel else {}
    versions = {"eoi_jax": __version__, "jax": jax.__version__}
    _write(Path(path), leaves, {"versions": versions, "leaves": records, "user": metadata})


def load(path: str | os.PathLike[str], like: Params | None = None) -> SavedNetwork:
    """Read a sparse network that :func:`save` wrote, and verify it.

    The digests of all tensors and of all records are verified, so the file is bit for bit what was
    written. Also verified are the names, shapes and dtypes of all tensors, the sizes, counts and
    densities of masks, that weights outside the mask are zero, that all weights are finite, and
    that all booleans are 0 or 1. A file of an earlier version has no digests: it is read with a
    warning, and changes of its weights, versions, layouts, orthogonality errors and the user's
    metadata would not be noticed. Digests detect damage, but not manipulation: anyone who writes a
    file can write valid digests too.

    Args:
        path: The file.
        like: A pytree of the structure, shapes and dtypes that were saved, of arrays or
            :class:`jax.ShapeDtypeStruct`, as ``jax.eval_shape(model.init, key, x)`` gives. If a
            leaf has a sharding or is committed to a device, the leaf that is read and its mask are
            placed in the same way. Default: nested dicts whose keys are strings.

    Returns:
        Parameters and mask in the structure of ``like``, and the metadata. To continue training,
        use ``eoi.static_sparse(optimizer, saved.mask)``.

    Raises:
        ValueError: If the file was not written by :func:`save`, is truncated, has missing or
            additional tensors, or does not agree with its digests or records; if it has a name that
            :func:`save` does not write; if it does not fit ``like``; if it has 64-bit weights and
            JAX has not enabled these dtypes.
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
    leaves, header = _read(Path(path))
    for name, leaf in leaves.items():
        if jax.dtypes.canonicalize_dtype(leaf.value.dtype) != leaf.value.dtype:
            problem = f"has {name} in {leaf.value.dtype}, outside the dtypes that JAX has enabled"
            remedy = "Enable it: JAX_ENABLE_X64=1, or jax.config.update('jax_enable_x64', True)."
            raise checks.value_error("path", str(path), problem, remedy)
    if like is None:
        params, mask = map(_nested, _on_devices(leaves, {}))
        return SavedNetwork(params, mask, header)
    names, treedef = _fitting(path, like, leaves), jax.tree.structure(like)
    places = dict(zip(names, jax.tree.leaves(like), strict=True))
    params, mask = (
        jax.tree.unflatten(treedef, [found[name] for name in names])
        for found in _on_devices(leaves, places)
    )
    return SavedNetwork(params, mask, header)


def _on_devices(
    leaves: dict[str, _Leaf], places: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put weights and masks where the leaves of ``places`` are, without a copy elsewhere."""

    def put(name: str, array: Any) -> jax.Array:
        return jnp.asarray(shardings.like(array, places.get(name)))

    params = {name: put(name, leaf.value) for name, leaf in leaves.items()}
    mask = {  # a new scalar for each dense leaf: two may not share a buffer
        name: jnp.array(True) if leaf.kept is None else put(name, leaf.kept)
        for name, leaf in leaves.items()
    }
    return params, mask


def _name(path: tuple[Any, ...]) -> str:
    """Return the name of a leaf: the keys of its path, each without a slash."""
    keys = (jax.tree_util.keystr((key,), simple=True) for key in trees.without_value(path))
    return "/".join(map(_escaped, keys))


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _unescaped(key: str) -> str:
    return key.replace("~1", "/").replace("~0", "~")


def _names(tree: Any, argument: str) -> list[str]:
    """Return the names of the leaves of a tree, one for each, none of them within another."""
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    problem = _problem_of(names)
    if problem is not None:
        name, reason = problem
        raise ValueError(
            f"{argument}[{checks.printable(name)}] {reason}. Rename it, or give a dict: "
            '{"kernel": array}; an attribute called value is no part of a name.'
        )
    return names


def _problem_of(names: Iterable[str]) -> tuple[str, str] | None:
    """Return a name that a file may not have, with the reason, if there is one."""
    for name in names:
        keys = name.split("/")
        if len(keys) > _MAX_KEYS:
            return name, f"has a path of {len(keys)} keys, outside [1, {_MAX_KEYS}]"
        if "" in keys or name == "__metadata__":
            return name, "is outside the names other than '' and '__metadata__'"
        if not name.isprintable():  # a terminal would obey
            return name, "has characters that cannot be printed"
        if any(_escaped(_unescaped(key)) != key for key in keys):
            return name, "has a ~ without 0 or 1 behind it"
    # A path comes directly before those that begin with it: no need to compare all with all.
    for path, after in itertools.pairwise(sorted(name.split("/") for name in names)):
        if after[: len(path)] == path:
            return "/".join(after), "has no unique name: another leaf has it, or a part of it"
    return None


def _array(leaf: Any, where: str) -> NDArray[Any]:
    """Accept an array of a dtype that the format has, in the order of C."""
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise ValueError(
            f"{where} is of type {type(leaf).__name__}, outside the arrays of JAX and NumPy. Save "
            "arrays only: eqx.filter(model, eqx.is_inexact_array), jnp.asarray of a number, or "
            "tensor.detach().cpu().numpy() of PyTorch, where bfloat16 needs .float() before it."
        )
    if checks.is_traced(leaf):
        raise checks.value_error(where, leaf, "is being traced", "Save outside of jit.")
    dtypes = ", ".join(_DTYPES)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"{where} is a random key, outside the arrays of {{{dtypes}}}. Save "
            "parameters only, such as nnx.state(model, (nnx.Param, nnx.BatchStat))."
        )
    if leaf.dtype.name not in _DTYPES:
        raise ValueError(
            f"{where} has dtype {leaf.dtype}, outside {{{dtypes}}}. Convert it with leaf.astype."
        )
    return _on_host(leaf, where)


def _on_host(leaf: Any, where: str) -> NDArray[Any]:
    """Copy an array to the host, from one device or many."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise ValueError(
            f"{where} is spread over other processes, outside the arrays that this one can read. "
            "Gather it first: jax.experimental.multihost_utils.process_allgather(leaf, tiled=True)."
        )
    return native(np.asarray(leaf))


def _layout_record(layout: Layout, path: Any, leaf: Any) -> dict[str, Any]:
    """Write a layout for JSON, without the axes that are as Flax stores them."""
    if np.ndim(leaf) - layout.batch_axes > 1:
        trees.view(layout, path, leaf)  # refuses axes that the leaf has not
    record = layout._asdict()
    for name in _AXES:
        axes = fan_axes.check(record.pop(name), name)
        if axes != fan_axes.check(getattr(Layout(), name), name):
            record[name] = list(axes)
    return record


def _recorded_layout(record: dict[str, Any]) -> Layout:
    """Read the layout of a leaf's record: one axis is a number, and several are a tuple."""
    fields = dict(record.get("layout", {}))
    for name in _AXES:
        if name in fields:
            axes = tuple(fields[name])
            fields[name] = axes[0] if len(axes) == 1 else axes
    return Layout(**fields)


def _measured(name: str, leaf: Any, layout: Layout | None) -> dict[str, float]:
    """Return the orthogonality error of a kernel, the largest of a stack."""
    if layout is None and leaf.ndim > 2:
        return {}  # (2, 3, 8, 8) is a convolution, or a stack of layers: its shape does not tell
    try:
        [errors] = spectrum.kernel_orthogonality_errors(
            {name: leaf},
            where=lambda *_: True,
            layout=None if layout is None else lambda *_: layout,
        ).values()
    except ValueError:
        if layout is not None:
            raise
        return {}  # it has more weights than can be counted in 32 bits
    error = float(np.max(errors, initial=0.0))
    # Finite weights may have an infinite Gram matrix, which JSON does not hold.
    return {"orthogonality_error": error} if math.isfinite(error) else {}


def _fitting(path: Any, like: Any, leaves: dict[str, _Leaf]) -> list[str]:
    """Return the names of the leaves of ``like``, which have to be those of the file."""
    names = _names(like, "like")
    for name, leaf in zip(names, map(native, jax.tree.leaves(like)), strict=True):
        if name not in leaves:
            raise ValueError(
                f"like[{name}] is not in {str(path)!r}, outside {sorted(leaves)}. "
                "Build like from the model that was saved."
            )
        saved = leaves[name].value
        if (np.shape(leaf), jnp.result_type(leaf)) != (saved.shape, saved.dtype):
            raise ValueError(
                f"like[{name}] has shape {np.shape(leaf)} and dtype {jnp.result_type(leaf)}, but "
                f"{str(path)!r} has {saved.shape} and {saved.dtype}. "
                "Build like from the model that was saved."
            )
    left = sorted(set(leaves).difference(names))
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
        *parents, last = map(_unescaped, name.split("/"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


# --- the format: named arrays with masks, to a file and back ----------------------------------


def _write(path: Path, leaves: dict[str, _Leaf], header: dict[str, Any]) -> None:
    """Check the header and write a file, all of it or nothing."""
    remedy = "Give dicts whose keys are strings, lists (no tuples), strings, finite numbers, None."
    tensors = {name: leaf.value for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        if leaf.kept is not None:
            tensors[name + _MASK] = np.packbits(leaf.kept)
    # It copies buffers as they lie in memory: one that is not in C order would come back wrong.
    tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    header = {"format": _FORMAT, **header}
    try:
        records = _digest_of_records(header)
        digests = {name: _digest(_bytes(value)) for name, value in tensors.items()}
        header |= {_DIGESTS: {"records": records, "tensors": digests}}
        text = json.dumps(header, allow_nan=False)
        is_same = json.loads(text)["user"] == header["user"]
        content = safetensors_bytes(tensors, {_ENTRY: text})
    except SafetensorError as error:
        raise ValueError(f"metadata is outside what safetensors holds: {error}. {remedy}") from None
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"metadata is outside what JSON holds: {error}. {remedy}") from None
    if not is_same:
        raise ValueError(f"metadata is outside what JSON gives back as it was. {remedy}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} is in a folder that does not exist. Make it.")
    atomic_write(path, lambda file: file.write(content))


def _read(path: Path) -> tuple[dict[str, _Leaf], dict[str, Any]]:
    """Read a file, and verify that it is what its header says."""
    if path.is_dir():
        raise IsADirectoryError(f"path={str(path)!r} is a folder. Give a file of eoi.save.")
    try:
        with safe_open(path, "numpy") as file:
            header = _header(path, (file.metadata() or {}).get(_ENTRY))
            records, names = header["leaves"], set(file.keys())
            masked = (name + _MASK for name, record in records.items() if "kept" in record)
            wanted = {*records, *masked}
            if wanted != names:
                missing, extra = sorted(wanted - names), sorted(names - wanted)
                raise _damaged(
                    path, f"lacks the tensors {_some(missing)} and has {_some(extra)} too many"
                )
            tensors = {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        problem = f"is no complete safetensors file ({checks.printable(error)})"
        raise _damaged(path, problem) from None
    except AttributeError as error:  # of NumPy, which has no float8
        problem = f"has tensors of a dtype that no sparse network has ({checks.printable(error)})"
        raise _damaged(path, problem) from None
    leaves = {name: _leaf(path, name, record, tensors) for name, record in records.items()}
    _check_digests(path, header, tensors)
    return leaves, header


def _check_digests(path: Path, header: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> None:
    """Require the bytes and the records that were written; warn if that is not known."""
    digests = header.get(_DIGESTS)
    if digests is None:
        version = checks.printable(header["versions"]["eoi_jax"])
        warnings.warn(
            f"path={str(path)!r} is of eoi_jax {version}, which wrote no digests: a changed weight "
            "would not be noticed. Save the network again.",
            stacklevel=4,
        )
        return
    for name, value in tensors.items():
        if _digest(_bytes(value)) != digests["tensors"].get(name):
            raise _damaged(path, f"has other bytes in {name} than those that were written")
    try:
        is_same = _digest_of_records(header) == digests["records"]
    except RecursionError:  # JSON is read a little deeper than it is written
        is_same = False
    if not is_same:
        raise _damaged(path, "has other metadata than those that were written")


def _digest_of_records(header: dict[str, Any]) -> str:
    """Return the digest of all metadata but the digests."""
    records = {key: value for key, value in header.items() if key != _DIGESTS}
    return _digest(json.dumps(records).encode())


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """View an array as its bytes."""
    return array.reshape(-1).view(np.uint8)


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _some(names: list[str], count: int = 5) -> str:
    """List names as Python writes them, which escapes what cannot be printed."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"[{', '.join(repr(checks.printable(name)) for name in names[:count])}]{more}"


def _counts(kept: NDArray[np.bool_]) -> dict[str, Any]:
    """Count what a mask keeps."""
    count = selection.count(kept)
    return {"kept": count, "density": selection.fraction([count], [kept.size])}


def _check_weights(leaf: _Leaf, where: str, remedy: str) -> None:
    """Require finite weights, and zeros off the mask."""
    value, kept = leaf
    if value.dtype.name in _FLOATS and not np.isfinite(value).all():
        raise ValueError(
            f"{where} has {np.count_nonzero(~np.isfinite(value))} weights that are infinite or "
            "NaN, outside the finite numbers. Go back to weights from before they appeared."
        )
    for array in (value, kept):
        # Any byte makes a bool of NumPy, and programs differ in what they read in it.
        if array is not None and array.dtype == bool and (_bytes(array) > 1).any():
            raise ValueError(
                f"{where} has booleans of other bytes than 0 and 1. Compare integers: array != 0."
            )
    off = 0 if kept is None else np.count_nonzero(nonzero(value[~kept]))
    if off:
        raise ValueError(f"{where} has {off} weights off its mask that are not zero. {remedy}")


def _header(path: Path, text: str | None) -> dict[str, Any]:
    """Parse and verify the metadata of a file."""
    if text is None:
        raise checks.value_error(
            "path",
            str(path),
            "has no masks: it was not written by eoi.save",
            "Read it with safetensors.numpy.load_file, make a mask of its tensors, as "
            "eoi.masks.support does, and write both with eoi.save.",
        )
    try:
        header = json.loads(text)
        is_known = header["format"] == _FORMAT
        is_whole = is_known and _is_whole(header)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        is_known, is_whole = True, False
    if not is_known:
        found = checks.printable(repr(header["format"]))
        problem = f"has format {found}, and this version reads format {_FORMAT}"
        raise checks.value_error("path", str(path), problem, "Update eoi_jax.")
    if not is_whole:
        raise _damaged(path, "has metadata that are not those of a sparse network")
    unfit = _problem_of(header["leaves"])
    if unfit is not None:
        name, reason = unfit
        shown = repr(checks.printable(name))
        raise _damaged(path, f"has metadata of a leaf named {shown}, which {reason}")
    return dict(header)


def _is_whole(header: Any) -> bool:
    """Tell whether metadata are those of a sparse network; raise errors of many kinds if not."""
    for record in header["leaves"].values():
        masked = [record["kept"], record["density"]] if "kept" in record else [0, 0.0]
        layout = _recorded_layout(record)
        sizes = [*record["shape"], masked[0], layout.batch_axes, layout.groups]
        numbers = [masked[1], record.get("orthogonality_error", 0.0)]
        if not (
            record["dtype"] in _DTYPES
            and all(type(size) is int and size >= 0 for size in sizes)  # a bool is an int
            and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
            and layout.groups > 0
            and ("layout" not in record or layout.batch_axes < len(record["shape"]))
            and isinstance(layout.transposed, bool)
        ):
            return False
        left = len(record["shape"]) - layout.batch_axes
        if "layout" in record and left > 1:
            fan_axes.resolve(layout.in_axis, layout.out_axis, layout.batch_axis, left)
    # A version is printed, and JSON may hold what no terminal does.
    printable = header["versions"]["eoi_jax"].isprintable()
    if _DIGESTS not in header:  # not one of another name, whose key has changed by a bit
        return printable and header.keys() == _RECORDS
    digests = header[_DIGESTS]
    return printable and "user" in header and {"records", "tensors"} <= digests.keys()


def _leaf(path: Path, name: str, record: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> _Leaf:
    """Return a leaf that agrees with its record."""
    leaf = _Leaf(tensors[name], None)
    found = (leaf.value.dtype.name, list(leaf.value.shape))
    if found != (record["dtype"], record["shape"]):
        recorded = f"{record['dtype']} and {record['shape']} were recorded"
        raise _damaged(path, f"has {name} of dtype {found[0]} and shape {found[1]}; {recorded}")
    if "kept" in record:
        leaf = _Leaf(leaf.value, _mask(path, name, record, leaf.value, tensors[name + _MASK]))
    remedy = "It was not written so: take another copy of the file."
    _check_weights(leaf, f"path={str(path)!r}: {name}", remedy)
    return leaf


def _mask(path: Path, name: str, record: dict[str, Any], value: Any, packed: Any) -> Any:
    """Unpack a mask that fits its leaf and its record."""
    needed = (-(-value.size // 8),)
    if packed.dtype != np.uint8 or packed.shape != needed:
        found = f"dtype {packed.dtype.name} and shape {packed.shape}"
        wanted = f"{value.size} weights need uint8 and {needed}"
        raise _damaged(path, f"has a mask of {name} of {found}; its {wanted}")
    bits = np.unpackbits(packed)
    if bits[value.size :].any():
        raise _damaged(path, f"has bits after the end of the mask of {name}")
    kept = bits[: value.size].astype(bool).reshape(value.shape)
    count = _counts(kept)
    if count != {key: record[key] for key in count}:
        recorded = f"{record['kept']} and density {record['density']} were recorded"
        raise _damaged(path, f"keeps {count['kept']} weights of {name}; {recorded}")
    return kept


def _damaged(path: Path, problem: str) -> ValueError:
    return checks.value_error("path", str(path), problem, "Take another copy of the file.")
