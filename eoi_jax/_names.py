"""Leaves by their names: which are kernels, and which mask from elsewhere belongs to which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import _checks, _tree_checks
from eoi_jax.typing import Mask, Params, Where

__all__ = ["adopt", "is_kernel"]

_KERNEL_NAMES = ("kernel", "weight", "w")
_NAMED = 5  # so many names a message lists


def is_kernel(path: tuple[Any, ...], leaf: Any) -> bool:
    """Tell whether a leaf of a parameter tree is a kernel, judged by its name.

    A kernel is a floating leaf with at least two axes whose last name is ``kernel`` (Flax),
    ``weight`` (Equinox) or ``w`` (Haiku); the ``value`` attribute in which NNX variables and
    Linen's partitioned boxes keep their array is no name. Biases have other names, stacked by a
    scan over layers or not.

    A name says no more than that: Equinox calls the table of an ``Embedding`` and the scale of
    a norm ``weight`` too. Pass your own ``where=`` to functions over trees to leave one dense.

    Args:
        path: The key path of the leaf, as :func:`jax.tree_util.tree_map_with_path` gives it.
        leaf: The leaf; anything with a shape and a dtype, other leaves are no kernels.

    Returns:
        Whether the leaf is a kernel.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.tree_util import DictKey
        >>> is_kernel((DictKey("dense"), DictKey("kernel")), jnp.ones((3, 2)))
        True
        >>> is_kernel((DictKey("dense"), DictKey("bias")), jnp.ones((8, 2)))
        False
    """
    path = _tree_checks.without_value(path)
    if not path or not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return False
    name = getattr(path[-1], "key", getattr(path[-1], "name", None))
    return (
        name in _KERNEL_NAMES and len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def adopt(
    tree: Any,
    params: Params,
    *,
    order: Literal["jax", "torch"] = "jax",
    where: Where = is_kernel,
) -> Mask:
    """Make a mask of this library from one of another.

    Leaves belong together by name, whatever the containers: names are joined by ``/``, a ``.`` is
    a ``/`` too, the last of ``kernel``, ``weight`` and ``w`` are one, and a ``_mask`` behind it
    (``torch.nn.utils.prune``) is dropped. So the flat ``{"fc1.weight_mask": ...}`` of PyTorch is
    for ``params["fc1"]["kernel"]``. Where modules have other names, rename the keys first; of
    Linen's variables give ``variables["params"]``.

    A square mask in the wrong order has the right shape, so know the order. And PyTorch flattens
    images with channels first: reorder the inputs of a linear layer behind such a flattening.

    Args:
        tree: A pytree, such as a flat or nested dict, of boolean or 0/1 arrays that NumPy can
            read: one for each kernel, or a scalar ``True`` for a kernel that stays dense. Other
            leaves may be left out or be all ones.
        params: The parameters, or their shapes, that the mask is for.
        order: ``"jax"`` for axes as those of ``params``; ``"torch"`` for ``(outputs, inputs,
            *taps)`` where ``params`` has ``(*taps, inputs, outputs)``, in linear layers and
            convolutions, grouped or not, but not in transposed ones. Equinox stores kernels as
            PyTorch does, so that its order is ``"jax"``.
        where: ``(path, leaf) -> bool``, which leaves of ``params`` are kernels.

    Returns:
        The mask: boolean arrays of the kernels' shapes, scalar ``True`` elsewhere.

    Raises:
        ValueError: If a kernel has no mask, or a mask no leaf; if a shape does not fit; if a value
            is neither 0 nor 1; or if something other than a kernel is masked.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> import eoi_jax as eoi
        >>> params = {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
        >>> outside = {"fc.weight": np.array([[1, 0, 1], [0, 1, 1]])}  # or a torch.Tensor
        >>> mask = eoi.masks.adopt(outside, params, order="torch")
        >>> mask["fc"]["kernel"].astype(int).tolist()
        [[1, 0], [0, 1], [1, 1]]

        Keep the mask as it is, or take only its densities for an orthogonal start:

        >>> kept = eoi.masked(params, mask)
        >>> drawn = eoi.exact_orthogonal(jax.random.key(0), params, eoi.masks.densities(mask))
        >>> int(kept.mask["fc"]["kernel"].sum()), int(drawn.mask["fc"]["kernel"].sum())
        (4, 4)
    """
    _checks.one_of(order, ("jax", "torch"), name="order", remedy="Say who stores the kernels so.")
    kernels = _tree_checks.kernels(params, where, required=where is is_kernel)
    given = _by_name(tree, "tree")
    own = _by_name(params, "params")
    needed = [name for name, kernel in _by_name(kernels, "params").items() if kernel]
    unknown = [name for name in given if name not in own]
    missing = [name for name in needed if name not in given]
    if unknown or missing:
        raise ValueError(
            f"tree has {_listed(unknown)} that params has not, and lacks {_listed(missing)}; its "
            f"names are outside those of params, {_listed(list(own))}. Rename the keys: "
            "{rename(name): mask for name, mask in tree.items()}, or leave out those that params "
            "has not; a kernel that stays dense takes a scalar True, and leaves that are no "
            "kernels may be left out."
        )

    def leaf_mask(path: Any, leaf: Any, kernel: bool) -> Any:
        name = _name(path)
        if name not in given:
            return jnp.array(True)
        found = _zero_or_one(given[name], name)
        expected = tuple(leaf.shape)
        if order == "torch" and len(expected) >= 2:
            expected = (expected[-1], expected[-2], *expected[:-2])
        if found.shape not in ((), expected):
            raise ValueError(
                f"tree[{name}] has shape {found.shape}, outside {{(), {expected}}}: that of the "
                f"weights is {tuple(leaf.shape)}, order={order!r}. {_remedy(found, leaf, order)}"
            )
        if not found.all() and (found.ndim == 0 or not kernel):
            raise ValueError(
                f"tree[{name}] has {np.sum(~found)} zeros, outside {{1}}: a scalar stands for a "
                "leaf that stays dense, and so does all of what is no kernel. Give an array of "
                "the weights' shape, or select the leaf with where=."
            )
        if found.ndim == 0 or not kernel:
            return jnp.array(True)
        if order == "torch":
            found = np.moveaxis(found, (1, 0), (-2, -1))
        return jnp.asarray(found)

    return jax.tree_util.tree_map_with_path(leaf_mask, params, kernels)


def _name(path: Sequence[Any]) -> str:
    """Name a leaf so that frameworks agree."""
    # The value of an NNX variable or of Linen's boxes is an attribute, in a flat dict a word.
    name = _tree_checks.path_name(path).replace(".", "/").removesuffix("/value")
    *modules, last = name.split("/")
    last = last.removesuffix("_mask")
    return "/".join([*modules, "kernel" if last in _KERNEL_NAMES else last])


def _by_name(tree: Any, argument: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = _name(path)
        if name in found:
            raise ValueError(
                f"{argument}[{_tree_checks.path_name(path)}] is a second {name!r}, outside the "
                "names that differ. Rename one of the two, or leave it out."
            )
        found[name] = leaf
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{{{', '.join(names[:_NAMED])}}}{more}"


def _zero_or_one(leaf: Any, name: str) -> Any:
    """Read a mask of any library as booleans."""
    try:
        values = np.asarray(leaf)
    except Exception as error:  # each library has its own for devices, gradients and tracing
        raise ValueError(
            f"tree[{name}] of type {type(leaf).__name__} is outside what NumPy can read: {error} "
            "Bring it to the host first, from PyTorch with tensor.detach().cpu().numpy()."
        ) from error
    good = (values == 0) | (values == 1)
    if not np.all(good):
        raise _checks.fail(
            f"tree[{name}]",
            values[~good].flat[0].item() if np.ndim(values) else values.item(),
            "is outside {0, 1}",
            "Scores become masks through masks.top_k, weights with `weights != 0`.",
        )
    return np.asarray(values == 1)


def _remedy(found: Any, leaf: Any, order: str) -> str:
    """Say what to do about a shape: that of the other order, perhaps."""
    shape, own = tuple(found.shape), tuple(leaf.shape)
    if order == "torch" and shape == own:
        return 'It fits as it is: order="jax".'
    if order == "jax" and len(own) >= 2 and shape == (own[-1], own[-2], *own[:-2]):
        return 'Transposed it fits: order="torch".'
    return "Give a mask of the weights' shape; split or stack those of several layers."
