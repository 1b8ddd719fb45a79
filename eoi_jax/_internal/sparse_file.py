"""The format of :mod:`eoi_jax.serialization`: named arrays with masks, to a file and back.

Nothing here knows of pytrees: a network is a dict from the names of its leaves to their values and
masks, and a header that says what they ought to be.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eoi_jax._internal import checks
from eoi_jax.typing import Layout

__all__ = ["DTYPES", "Leaf", "check_weights", "clash", "counts", "read", "write"]

FORMAT = 1
ENTRY = "eoi_jax"  # of the metadata of the file
MASK = "~mask"  # no name ends so: in names a ~ has 0 or 1 behind it
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_SIZES = ("int8", "int16", "int32", "int64")
DTYPES = (*_FLOATS, "bool", *_SIZES, *(f"u{name}" for name in _SIZES))


class Leaf(NamedTuple):
    """An array, and which of its weights may be non-zero: None if all may."""

    value: NDArray[Any]
    kept: NDArray[np.bool_] | None


def write(path: Path, leaves: dict[str, Leaf], header: dict[str, Any]) -> None:
    """Write a file so that, whenever the machine stops, the old one or the new one is there."""
    remedy = "Give dicts whose keys are strings, lists (no tuples), strings, finite numbers, None."
    try:
        text = json.dumps({"format": FORMAT, **header}, allow_nan=False)
        same = json.loads(text)["user"] == header["user"]
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"metadata is outside what JSON holds: {error}. {remedy}") from None
    if not same:
        raise ValueError(f"metadata is outside what JSON gives back as it was. {remedy}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} is in a folder that does not exist. Make it.")
    tensors = {name: leaf.value for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        if leaf.kept is not None:
            tensors[name + MASK] = np.packbits(leaf.kept)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # It copies buffers as they lie in memory: one that is not in C order would come back wrong.
        tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        save_file(tensors, partial, {ENTRY: text})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """Read a file, and verify that it is what its header says."""
    if path.is_dir():
        raise IsADirectoryError(f"path={str(path)!r} is a folder. Give a file of eoi.save.")
    try:
        with safe_open(path, "numpy") as file:
            header = _header(path, (file.metadata() or {}).get(ENTRY))
            records, names = header["leaves"], set(file.keys())
            wanted = {*records, *(name + MASK for name, own in records.items() if "kept" in own)}
            if wanted != names:
                missing, extra = sorted(wanted - names), sorted(names - wanted)
                raise _damaged(path, f"lacks the tensors {missing} and has {extra} too many")
            tensors = {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise _damaged(path, f"is no complete safetensors file ({error})") from None
    except AttributeError as error:  # of NumPy, which has no float8
        raise _damaged(
            path, f"has tensors of a dtype that no sparse network has ({error})"
        ) from None
    return {name: _leaf(path, name, own, tensors) for name, own in records.items()}, header


def clash(names: Iterable[str]) -> str | None:
    """Return a name that occurs twice or lies within another, as ``a/b`` does in ``a``, if any."""
    known: set[str] = set()
    for name in sorted(names, key=len):
        parts = name.split("/")
        if not known.isdisjoint("/".join(parts[:end]) for end in range(1, len(parts) + 1)):
            return name
        known.add(name)
    return None


def counts(kept: NDArray[np.bool_]) -> dict[str, Any]:
    """Count what a mask keeps."""
    count = int(np.count_nonzero(kept))
    return {"kept": count, "density": count / kept.size if kept.size else 1.0}


def check_weights(leaf: Leaf, where: str, remedy: str) -> None:
    """Require finite weights, and zeros off the mask."""
    value, kept = leaf
    if value.dtype.name in _FLOATS and not np.isfinite(value).all():
        raise ValueError(
            f"{where} has {np.count_nonzero(~np.isfinite(value))} weights that are infinite or "
            "NaN, outside the finite numbers. Go back to weights from before they appeared."
        )
    off = 0 if kept is None else np.count_nonzero(value[~kept])
    if off:
        raise ValueError(
            f"{where} has {off} weights off its mask that are not zero, outside {{0}}. {remedy}"
        )


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
        known = header["format"] == FORMAT
        whole = known and _whole(header)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        known, whole = True, False
    if not known:
        problem = f"has format {header['format']!r}, outside {{{FORMAT}}}"
        raise checks.value_error("path", str(path), problem, "Update eoi_jax.")
    if not whole:
        raise _damaged(path, "has metadata that are not those of a sparse network")
    return dict(header)


def _whole(header: Any) -> bool:
    """Tell whether metadata are those of a sparse network; raise errors of many kinds if not."""
    for own in header["leaves"].values():
        masked = [own["kept"], own["density"]] if "kept" in own else [0, 0.0]
        layout = Layout(**own.get("layout", {}))
        sizes = [*own["shape"], masked[0], layout.batch_axes, layout.groups]
        numbers = [masked[1], own.get("orthogonality_error", 0.0)]
        if not (
            own["dtype"] in DTYPES
            and all(type(size) is int and size >= 0 for size in sizes)  # a bool is an int
            and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
            and layout.groups > 0
            and ("layout" not in own or layout.batch_axes < len(own["shape"]))
            and isinstance(layout.transposed, bool)
        ):
            return False
    # A version is printed, and JSON may hold what no terminal does.
    printable = header["versions"]["eoi_jax"].isprintable()
    return printable and "user" in header and clash(header["leaves"]) is None


def _leaf(path: Path, name: str, own: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Leaf:
    """Return a leaf that agrees with its record."""
    leaf = Leaf(tensors[name], None)
    found = (leaf.value.dtype.name, list(leaf.value.shape))
    if found != (own["dtype"], own["shape"]):
        recorded = f"{own['dtype']} and {own['shape']} were recorded"
        raise _damaged(path, f"has {name} of dtype {found[0]} and shape {found[1]}; {recorded}")
    if "kept" in own:
        leaf = Leaf(leaf.value, _mask(path, name, own, leaf.value, tensors[name + MASK]))
    remedy = "It was not written so: take another copy of the file."
    check_weights(leaf, f"path={str(path)!r}: {name}", remedy)
    return leaf


def _mask(path: Path, name: str, own: dict[str, Any], value: Any, packed: Any) -> Any:
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
    count = counts(kept)
    if count != {key: own[key] for key in count}:
        recorded = f"{own['kept']} and density {own['density']} were recorded"
        raise _damaged(path, f"keeps {count['kept']} weights of {name}; {recorded}")
    return kept


def _damaged(path: Path, problem: str) -> ValueError:
    return checks.value_error("path", str(path), problem, "Take another copy of the file.")
