"""The networks of the experiments, in Flax Linen. All return logits.

========== ==================== ===================================================================
name       input                network
========== ==================== ===================================================================
mlp7       28 x 28 x 1          7 linear layers of width 100, tanh
mlp1000    28 x 28 x 1          1000 linear layers of width 128, tanh
resnet32   32 x 32 x 3          residual, 32 layers of 16, 32 and 64 channels, ReLU
========== ==================== ===================================================================

Every network is called as ``model.apply(variables, images, train=False)``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from eoi_jax.typing import Array, Initializer, Layout
from experiments.resnet import ResNet

__all__ = ["ACTIVATIONS", "NAMES", "Mlp", "ResNet", "choose", "create", "input_shape", "layout"]


class Mlp(nn.Module):
    """A plain deep network: ``depth`` linear layers, no residuals, no normalization.

    The layers between the first and the last are scanned, so compile time does not grow with depth;
    their kernels are stacked in one ``(depth - 2, width, width)`` leaf (see :func:`layout`).

    Attributes:
        depth: number of linear layers, at least 2.
        width: units of every layer but the last.
        num_classes: units of the last layer.
        activation: applied after every layer but the last.
        kernel_init: initializer of every kernel.
        bias_init: initializer of every bias.
    """

    depth: int
    width: int
    num_classes: int
    activation: Callable[[Array], Array] = jnp.tanh
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Map images ``(..., height, width, channels)`` to logits ``(..., num_classes)``.

        ``train`` changes nothing here; every network of the experiments takes it.
        """
        del train
        x = images.reshape(*images.shape[:-3], -1)
        layer = functools.partial(nn.Dense, kernel_init=self.kernel_init, bias_init=self.bias_init)
        x = self.activation(layer(self.width, name="first")(x))
        if self.depth > 2:
            hidden = nn.scan(
                _Hidden,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth - 2,
            )
            x, _ = hidden(layer, self.width, self.activation, name="hidden")(x, None)
        return layer(self.num_classes, name="last")(x)


class _Hidden(nn.Module):
    """One scanned layer: ``(x, nothing) -> (x, nothing)``."""

    layer: Callable[..., nn.Module]
    width: int
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        return self.activation(self.layer(self.width, name="linear")(x)), None


def _identity(x: Array) -> Array:
    return x


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "identity": _identity,
    "tanh": jnp.tanh,
    "hard_tanh": nn.hard_tanh,
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,  # slope 0.01
    "selu": nn.selu,
}


class _Entry(NamedTuple):
    module: Any
    sizes: dict[str, int]
    input_shape: tuple[int, int, int]
    activation: str


_MODELS = {
    "mlp7": _Entry(Mlp, {"depth": 7, "width": 100}, (28, 28, 1), "tanh"),
    "mlp1000": _Entry(Mlp, {"depth": 1000, "width": 128}, (28, 28, 1), "tanh"),
    "resnet32": _Entry(ResNet, {"depth": 32}, (32, 32, 3), "relu"),
}
NAMES = tuple(_MODELS)


def create(
    name: str,
    num_classes: int = 10,
    *,
    activation: str | Callable[[Array], Array] | None = None,
    kernel_init: Initializer | None = None,
    conv_init: Initializer | None = None,
    bias_init: Initializer | None = None,
) -> nn.Module:
    """Build a network by its name.

    Args:
        name: one of :data:`NAMES`.
        num_classes: number of logits, at least 1.
        activation: one of :data:`ACTIVATIONS` by name, or any function of arrays; default: the
            network's own, tanh for MLPs and ReLU for residual networks.
        kernel_init: initializer of the linear layers' kernels; default: He's normal for ReLU and
            leaky ReLU, LeCun's normal for every other activation.
        conv_init: initializer of the convolutions' kernels, with the same default. A network
            without convolutions has no use for it.
        bias_init: initializer of the biases; default: zeros.

    Returns:
        A Linen module: ``init(key, images)`` and ``apply(variables, images, train=False)``, from
        images ``(..., height, width, channels)`` to logits ``(..., num_classes)``.

    Raises:
        ValueError: for a name that is none, of the network or of the activation, or for less than
            one class.

    Example:
        >>> import jax
        >>> import eoi_jax as eoi
        >>> from experiments import models
        >>> model = models.create("mlp7", activation="relu", kernel_init=eoi.dense(density=0.1))
        >>> images = jax.ShapeDtypeStruct((2, *models.input_shape("mlp7")), "float32")
        >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
        (2, 10)
    """
    entry = _MODELS[choose(name, NAMES)]
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} is outside [1, ...). Give a larger number.")
    function = entry.activation if activation is None else activation
    if not callable(function):
        function = ACTIVATIONS[choose(function, ACTIVATIONS, "activation")]
    rectifies = function in (nn.relu, nn.leaky_relu)
    default = nn.initializers.he_normal() if rectifies else nn.initializers.lecun_normal()
    options = {
        "num_classes": num_classes,
        "activation": function,
        "kernel_init": kernel_init or default,
        "conv_init": conv_init or default,
        "bias_init": bias_init or nn.initializers.zeros,
    }
    fields = {field.name for field in dataclasses.fields(entry.module)}
    own = {option: value for option, value in options.items() if option in fields}
    model: nn.Module = entry.module(**entry.sizes, **own)
    return model


def input_shape(name: str) -> tuple[int, int, int]:
    """Return the ``(height, width, channels)`` of one image, as the paper feeds a network.

    Args:
        name: one of :data:`NAMES`.

    Returns:
        The shape, without a batch axis.

    Raises:
        ValueError: for another name.

    Example:
        >>> from experiments import models
        >>> models.input_shape("resnet32")
        (32, 32, 3)
    """
    return _MODELS[choose(name, NAMES)].input_shape


def layout(path: tuple[Any, ...], leaf: Any) -> Layout:
    """Tell which axes of a kernel stack layers: those of a scan, which are named ``hidden``.

    Args:
        path: the key path of the leaf, as :func:`jax.tree_util.tree_map_with_path` gives it.
        leaf: the leaf, anything with a shape; weights and masks have one layout.

    Returns:
        One batch axis for the scanned kernels of :class:`Mlp`, none for other leaves.

    Example:
        >>> import jax
        >>> from eoi_jax import budgets
        >>> from experiments import models
        >>> model, images = models.create("mlp7"), jax.ShapeDtypeStruct((1, 28, 28, 1), "float32")
        >>> params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        >>> budgets.uniform(params, 0.1, layout=models.layout)["hidden"]["linear"]["kernel"]
        array([0.1, 0.1, 0.1, 0.1, 0.1])
    """
    scanned = "hidden" in (getattr(key, "key", None) for key in path)
    return Layout(batch_axes=1 if scanned and len(leaf.shape) == 3 else 0)


def choose(value: str, options: Iterable[str], name: str = "name") -> str:
    """Accept one of the names, or suggest the closest.

    Args:
        value: what the user wrote.
        options: the allowed names.
        name: how the argument is called in the message.

    Returns:
        ``value``.

    Raises:
        ValueError: for anything else, with the allowed names and the closest of them.

    Example:
        >>> from experiments import models
        >>> models.choose("mpl7", ["mlp7", "resnet32"])
        Traceback (most recent call last):
        ValueError: name='mpl7' is outside {'mlp7', 'resnet32'}. Did you mean 'mlp7'?
    """
    options = tuple(options)
    if value in options:
        return value
    close = difflib.get_close_matches(str(value), options, n=1)
    remedy = f"Did you mean {close[0]!r}?" if close else "Choose one of them."
    raise ValueError(f"{name}={value!r} is outside {{{', '.join(map(repr, options))}}}. {remedy}")
