"""Sparse networks in PyTorch: read a file of ``eoi.save`` and use or train the network there.

This module needs PyTorch, NumPy and safetensors, and no JAX, so it may be copied into another
project. The names and axes of Flax become those of PyTorch:

===================================== ===========================================================
Flax                                  PyTorch
===================================== ===========================================================
``params/block/conv/kernel``          ``block.conv.weight``; ``params`` and ``batch_stats`` are left
                                      out
kernel ``(*taps, inputs, outputs)``   weight ``(outputs, inputs, *taps)``, and its mask likewise: of
                                      linear layers and convolutions, not transposed ones
``scale``, ``bias``, ``mean``,        ``weight``, ``bias``, ``running_mean``, ``running_var``
``var`` of a normalization
layers stacked by a scan              numbered layers
images ``(n, height, width, c)``      images ``(n, c, height, width)``
===================================== ===========================================================

PyTorch has no masked optimizer. To continue training, mask the gradients before and the weights
after each step. Then clipping and momentum do not include masked weights, and these stay zero also
with weight decay::

    network = pytorch.load("net.safetensors")
    model = pytorch.ResNet()
    model.load_state_dict(network.state_dict)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for images, labels in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        pytorch.mask_(model, network.masks, gradients=True)
        optimizer.step()
        pytorch.mask_(model, network.masks)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("experiments.pytorch needs PyTorch: pip install torch") from error

__all__ = ["Mlp", "Network", "ResNet", "load", "mask_"]

_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


class Network(NamedTuple):
    """What :func:`load` returns, both by the names of PyTorch.

    Attributes:
        state_dict: Weights and statistics, for ``model.load_state_dict``.
        masks: Of each weight that is sparse, where it may be non-zero.
    """

    state_dict: dict[str, Tensor]
    masks: dict[str, Tensor]


def load(path: str | os.PathLike[str], *, stacks: Collection[str] = ()) -> Network:
    """Read a sparse network that was saved from Flax, Linen or NNX, with ``eoi.save``.

    Args:
        path: The file.
        stacks: Paths of modules that a scan has stacked, such as ``"hidden"``: leaf number ``i`` of
            ``hidden/linear/kernel`` becomes ``hidden.i.linear.weight``.

    Returns:
        The network, on the CPU.

    Raises:
        ValueError: If the file is none of ``eoi.save``, or is damaged: if it lacks a tensor, if a
            tensor or the records do not have the digest that was written with them, if a mask does
            not keep as many weights as recorded, or if a weight is not finite or is off the mask
            and not zero; if it records that a convolution is transposed, whose weights PyTorch
            stores otherwise.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> from experiments import pytorch
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> params = {"last": {"kernel": jnp.eye(8, 4), "bias": jnp.ones(4)}}
        >>> eoi.save(path, params, eoi.masks.support(params))
        >>> network = pytorch.load(path)
        >>> layer = torch.nn.Sequential()
        >>> layer.add_module("last", torch.nn.Linear(8, 4))
        >>> layer.load_state_dict(network.state_dict)
        <All keys matched successfully>
        >>> network.masks["last.weight"].sum()
        tensor(4)
    """
    where = f"path={str(path)!r}"
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("eoi_jax", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(text)
        if header.get("format") != 1:
            raise ValueError("it is outside those of eoi.save, format 1: it has no masks")
        network = Network({}, {})
        for name, record in header["leaves"].items():
            layout = record.get("layout", {})
            has_axes = not layout.keys().isdisjoint(("in_axis", "out_axis", "batch_axis"))
            if has_axes and name.endswith("kernel"):  # a weight may stand as in PyTorch
                raise ValueError(
                    f"{name!r} has axes of its own, {layout}, outside (*taps, inputs, outputs). "
                    "Bring it into that order, and save the network again"
                )
            if layout.get("transposed"):
                raise ValueError(
                    f"{name!r} is the kernel of a transposed convolution, outside the linear "
                    "layers and convolutions. Flip its taps and move them behind (inputs, "
                    "outputs) by hand, and save the network without it"
                )
            value = tensors[name]
            mask = _mask(name, record["kept"], value, tensors) if "kept" in record else None
            _check_weights(name, value, mask)
            translated = dict(_translated(name, value, stacks))
            if not translated.keys().isdisjoint(network.state_dict):
                raise ValueError(f"{name!r} is a second {min(translated)!r} in PyTorch's names")
            network.state_dict.update(translated)
            if mask is not None:
                network.masks.update(_translated(name, mask, stacks))
        _check_digests(header, tensors)
    except (AttributeError, LookupError, RecursionError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{where} is no whole file of eoi.save ({error!r}). Take another copy of the file."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{where} cannot be read: {error}. Take another copy, or save the network again."
        ) from None
    return network


def _check_digests(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Require the bytes that were written; files of the first version have no digests."""
    digests = header.get("sha256", {"tensors": {}})
    for name, digest in digests["tensors"].items():
        content: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"it has other bytes in {name!r} than those that were written")
    records = {key: value for key, value in header.items() if key != "sha256"}
    written = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    if digests.get("records", written) != written:
        raise ValueError("it has other metadata than those that were written")


def _mask(name: str, kept: int, value: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Unpack the mask of a leaf."""
    packed = tensors[f"{name}~mask"].numpy()
    if packed.dtype != np.uint8 or packed.shape != (-(-value.numel() // 8),):
        raise ValueError(f"the mask of {name!r} does not fit its {value.numel()} weights")
    bits = np.unpackbits(packed, count=value.numel())
    if bits.sum() != kept:
        raise ValueError(f"it keeps {bits.sum()} weights of {name!r}; {kept} were recorded")
    return torch.from_numpy(bits.astype(bool)).reshape(value.shape)


def _check_weights(name: str, value: Tensor, mask: Tensor | None) -> None:
    """Require finite weights, booleans that are 0 or 1, and zeros off the mask."""
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(f"{name!r} has weights that are infinite or NaN")
    if value.dtype == torch.bool and (value.view(torch.uint8) > 1).any():
        raise ValueError(f"{name!r} has booleans of other bytes than 0 and 1")
    if mask is None:
        return
    bits = value
    if value.is_floating_point():  # by bits: a subnormal number is not zero, both signs of 0 are
        sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = value.view(sizes[value.itemsize]) << 1
    off = int((bits[~mask] != 0).sum())
    if off:
        raise ValueError(f"{name!r} has {off} weights off its mask that are not zero")


def _translated(name: str, value: Tensor, stacks: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Return a leaf, or each layer of a stack, under its name in PyTorch."""
    name = name.removeprefix("params/").removeprefix("batch_stats/")
    stack = next((path for path in stacks if name.startswith(f"{path}/")), None)
    if stack is not None:
        rest = name.removeprefix(f"{stack}/")
        for number, layer in enumerate(value):
            yield from _translated(f"{stack}/{number}/{rest}", layer, ())
        return
    *modules, last = name.split("/")
    if last == "kernel":
        value = value.movedim((-1, -2), (0, 1)).contiguous()
    yield ".".join([*modules, _NAMES.get(last, last)]), value


@torch.no_grad()
def mask_(model: nn.Module, masks: Mapping[str, Tensor], *, gradients: bool = False) -> None:
    """Set weights, or their gradients, to zero off the masks, in place.

    Args:
        model: Whose parameters have the names of the masks.
        masks: As :func:`load` returns them, on the model's device.
        gradients: Whether gradients are masked in place of the weights.

    Raises:
        AttributeError: If the model has no parameter of a mask's name.

    Example:
        >>> from experiments import pytorch
        >>> layer = torch.nn.Linear(2, 2)
        >>> pytorch.mask_(layer, {"weight": torch.eye(2, dtype=torch.bool)})
        >>> layer.weight.count_nonzero()
        tensor(2)
    """
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        values = parameter.grad if gradients else parameter
        if values is not None:
            values.masked_fill_(~mask, 0)


class Mlp(nn.Module):
    """The plain network of :class:`experiments.models.Mlp`, by default MLP-7 on images of MNIST.

    Load it with ``stacks=("hidden",)``.
    """

    def __init__(
        self, inputs: int = 784, depth: int = 7, width: int = 100, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        hidden = (nn.ModuleDict({"linear": nn.Linear(width, width)}) for _ in range(depth - 2))
        self.hidden = nn.ModuleList(hidden)
        self.last = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(n, channels, height, width)`` to logits ``(n, num_classes)``."""
        # Flax has flattened pixels with the channels innermost.
        x = torch.tanh(self.first(images.permute(0, 2, 3, 1).flatten(1)))
        for layer in self.hidden:
            x = torch.tanh(layer["linear"](x))  # type: ignore[index]
        return self.last(x)


class ResNet(nn.Module):
    """The residual network of :class:`experiments.models.ResNet`, by default ResNet-32."""

    def __init__(self, depth: int = 32, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.first, self.first_norm = _conv_norm(3, width, 3, 1)
        channels, blocks = width, []
        for stage in (1, 2, 3):
            for number in range(1, (depth - 2) // 6 + 1):
                features = width * 2 ** (stage - 1)
                stride = 2 if stage > 1 and number == 1 else 1
                blocks.append(_Block(channels, features, stride))
                self.add_module(f"block{stage}_{number}", blocks[-1])
                channels = features
        self.blocks = [name for name, _ in self.named_children() if name.startswith("block")]
        self.last = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(n, channels, height, width)`` to logits ``(n, num_classes)``."""
        x = torch.relu(self.first_norm(self.first(images)))
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return self.last(x.mean((2, 3)))


class _Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv1_norm = _conv_norm(channels, features, 3, stride)
        self.conv2, self.conv2_norm = _conv_norm(features, features, 3, 1)
        self.changes = stride != 1 or channels != features
        if self.changes:
            self.shortcut, self.shortcut_norm = _conv_norm(channels, features, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv1_norm(self.conv1(x)))
        y = self.conv2_norm(self.conv2(y))
        if self.changes:
            x = self.shortcut_norm(self.shortcut(x))
        return torch.relu(x + y)


def _conv_norm(
    inputs: int, outputs: int, size: int, stride: int
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)  # whose epsilon and momentum are those of the Flax network
