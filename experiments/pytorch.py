"""Sparse networks in PyTorch: read a file of ``eoi.save``, and go on there.

A recipe: it needs PyTorch, NumPy and safetensors, and no JAX, so it may be copied into another
project. What changes on the way:

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

PyTorch has no masked optimizer. To train on, mask gradients and weights around each step, so that
clipping and momentum do not see weights that are off, and these stay zero under weight decay too::

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

import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

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
        ValueError: If the file has no masks, or one that does not keep as many weights as recorded;
            if it records that a convolution is transposed, whose weights PyTorch stores otherwise.

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
    network = Network({}, {})
    with safe_open(path, "pt") as file:
        header = json.loads((file.metadata() or {}).get("eoi_jax", "{}"))
        if header.get("format") != 1:
            raise ValueError(
                f"path={str(path)!r} is outside the files of eoi.save, format 1: it has no masks. "
                "Save the network with it."
            )
        for name, record in header["leaves"].items():
            if record.get("layout", {}).get("transposed"):
                raise ValueError(
                    f"path={str(path)!r}: {name} is the kernel of a transposed convolution, "
                    "outside the linear layers and convolutions. Save the network without it, and "
                    "translate it by hand: flip its taps and move them behind (inputs, outputs)."
                )
            value = file.get_tensor(name)
            network.state_dict.update(_translated(name, value, stacks))
            if "kept" in record:
                bits = file.get_tensor(f"{name}~mask").numpy()
                mask = torch.from_numpy(np.unpackbits(bits, count=value.numel()).astype(bool))
                if int(mask.sum()) != record["kept"]:
                    raise ValueError(
                        f"path={str(path)!r} keeps {int(mask.sum())} weights of {name}; "
                        f"{record['kept']} were recorded. Take another copy of the file."
                    )
                network.masks.update(_translated(name, mask.reshape(value.shape), stacks))
    return network


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
