"""The networks of the experiments by name, in Flax Linen. All return logits.

================ ============= =====================================================================
name             input         network
================ ============= =====================================================================
mlp7             28 x 28 x 1   7 linear layers of width 100, tanh
mlp1000          28 x 28 x 1   1000 linear layers of width 128, tanh
mlp7_wide        28 x 28 x 1   7 linear layers of width 2048, tanh; not of the paper
mlp1000_wide     28 x 28 x 1   1000 linear layers of width 512, tanh; not of the paper
cnn1000          32 x 32 x 3   997 convolutions of width 128, circular padding, tanh, and a linear
                               layer
resnet20         32 x 32 x 3   residual, 20 layers of 16, 32 and 64 channels, ReLU; not of the paper
resnet32         32 x 32 x 3   residual, 32 layers of 16, 32 and 64 channels, ReLU
resnet56         32 x 32 x 3   the same of 56 layers
resnet110        32 x 32 x 3   the same of 110 layers
resnet50         224 x 224 x 3 residual, bottlenecks of three convolutions, ReLU
vgg16            32 x 32 x 3   configuration C with batch normalization, ReLU
efficientnet_b0  64 x 64 x 3   inverted residuals with depthwise convolutions, SiLU
deit_s           224 x 224 x 3 DeiT III, small: 12 blocks of width 384 with 6 heads, GELU
vit              32 x 32 x 3   its blocks: 4 of width 256 with 4 heads, GELU; not of the paper
vit_plain        32 x 32 x 3   the same without normalization; not of the paper
gpt              64 x 96       6 causal blocks of width 64 with 4 heads, GELU; not of the paper
gpt_plain        64 x 96       the same without normalization; not of the paper
================ ============= =====================================================================

Every network is called as ``model.apply(variables, images, train=False)``. Those with batch
normalization have a collection ``batch_stats``, which has to be mutable with ``train=True``.
:func:`layout` tells how their kernels are read, :func:`where` which of them are pruned.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from eoi_jax import masks
from eoi_jax.typing import Array, Initializer, Layout, Where
from experiments.models import (
    block_sparse,
    deit,
    efficientnet,
    gpt,
    plain,
    resnet,
    transformer,
    vgg,
)
from experiments.models.block_sparse import Blocks
from experiments.models.deit import Deit, Vit, VitPlain
from experiments.models.efficientnet import EfficientNet
from experiments.models.gpt import Gpt, GptPlain
from experiments.models.plain import Cnn, Mlp
from experiments.models.resnet import BottleneckResNet, ResNet
from experiments.models.spec import Spec
from experiments.models.transformer import HeadProjection, gelu
from experiments.models.vgg import Vgg

__all__ = [
    "ACTIVATIONS",
    "BLOCK_SPARSE",
    "NAMES",
    "SPECS",
    "Blocks",
    "BottleneckResNet",
    "Cnn",
    "Deit",
    "EfficientNet",
    "Gpt",
    "GptPlain",
    "HeadProjection",
    "Mlp",
    "ResNet",
    "Vgg",
    "Vit",
    "VitPlain",
    "block_sparse",
    "choose",
    "create",
    "input_shape",
    "layout",
    "transformer",
    "where",
]

# Adding a network takes its file and one line.
SPECS: dict[str, Spec] = {
    **plain.SPECS,
    **resnet.SPECS,
    **vgg.SPECS,
    **efficientnet.SPECS,
    **deit.SPECS,
    **gpt.SPECS,
}
NAMES = tuple(SPECS)
BLOCK_SPARSE = tuple(  # networks whose pruned layers may be block-sparse ones
    name
    for name, spec in SPECS.items()
    if spec.pruned is not None and "blocks" in spec.module.__dataclass_fields__
)
_STACKED = {name for spec in SPECS.values() for name in spec.stacked}
_DEPTHWISE = {name for spec in SPECS.values() for name in spec.depthwise}


def _identity(x: Array) -> Array:
    return x


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "identity": _identity,
    "tanh": jnp.tanh,
    "hard_tanh": nn.hard_tanh,
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,  # slope 0.01
    "selu": nn.selu,
    "silu": nn.silu,
    "gelu": gelu,
}


def create(
    name: str,
    num_classes: int | None = None,
    *,
    depth: int | None = None,
    width: int | None = None,
    activation: str | Callable[[Array], Array] | None = None,
    kernel_init: Initializer | None = None,
    conv_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    blocks: Blocks | None = None,
) -> nn.Module:
    """Build a network by its name.

    Args:
        name: One of :data:`NAMES`.
        num_classes: Number of logits, at least 1; default: as in the paper, 10, for EfficientNet
            200, for the networks of ImageNet 1000.
        depth: Layers or blocks as the network's class counts them; default: what its name
            says. VGG-16 has no other depth.
        width: Units of a hidden layer, or channels of the first stage, with which those of the
            others are scaled; default: the network's.
        activation: One of :data:`ACTIVATIONS` by name, or any function of arrays; default: the
            network's, in the table above.
        kernel_init: Initializer of the linear layers' kernels; default: He's normal for ReLU and
            leaky ReLU, LeCun's normal for every other activation, and for DeiT a normal of
            standard deviation 0.02.
        conv_init: Initializer of the convolutions' kernels; default: He's or LeCun's normal, as
            above. A network without convolutions has no use for it.
        bias_init: Initializer of the biases; default: zeros.
        blocks: If given, the layers that :func:`where` selects are block-sparse, with density and
            size of these blocks; for the networks of :data:`BLOCK_SPARSE`.

    Returns:
        A Linen module: ``init(key, images)`` and ``apply(variables, images, train=False)``, from
        images ``(..., height, width, channels)`` to logits ``(..., num_classes)``.

    Raises:
        ValueError: For a name that is none, of the network or of the activation, for less than
            one class, or for a depth, width or blocks that the network cannot have.

    Example:
        >>> import jax
        >>> import eoi_jax as eoi
        >>> from experiments import models
        >>> model = models.create("mlp7", activation="relu", kernel_init=eoi.dense(density=0.1))
        >>> images = jax.ShapeDtypeStruct((2, *models.input_shape("mlp7")), "float32")
        >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
        (2, 10)
    """
    spec = SPECS[choose(name, NAMES)]
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes={num_classes} is outside [1, ...). Give a larger number.")
    sizes = {"depth": depth, "width": width}
    sizes = {size: value for size, value in sizes.items() if value is not None}
    for size, value in sizes.items():
        if size not in spec.sizes:
            raise ValueError(
                f"{size}={value} is given, but {name} has one {size} only. Leave {size} out."
            )
    if blocks is not None and name not in BLOCK_SPARSE:
        raise ValueError(
            f"blocks={blocks} is given, but {name} has no layers that may be block-sparse. Choose "
            f"one of {', '.join(BLOCK_SPARSE)}."
        )
    function = spec.activation if activation is None else activation
    if not callable(function):
        function = ACTIVATIONS[choose(function, ACTIVATIONS, "activation")]
    rectifies = function in (nn.relu, nn.leaky_relu)
    default = nn.initializers.he_normal() if rectifies else nn.initializers.lecun_normal()
    options = {
        "num_classes": spec.num_classes if num_classes is None else num_classes,
        "activation": function,
        "kernel_init": kernel_init or spec.kernel_init or default,
        "conv_init": conv_init or default,
        "bias_init": bias_init or nn.initializers.zeros,
        "blocks": blocks,
    }
    fields = {field.name for field in dataclasses.fields(spec.module)}
    options = {option: value for option, value in options.items() if option in fields}
    model: nn.Module = spec.module(**{**spec.sizes, **sizes}, **options)
    return model


def input_shape(name: str) -> tuple[int, ...]:
    """Return the ``(height, width, channels)`` of one image, as the paper feeds a network.

    Of a network for text, the ``(length, characters)`` of a one-hot text.

    Args:
        name: One of :data:`NAMES`.

    Returns:
        The shape, without a batch axis.

    Raises:
        ValueError: For another name.

    Example:
        >>> from experiments import models
        >>> models.input_shape("resnet32")
        (32, 32, 3)
    """
    return SPECS[choose(name, NAMES)].input_shape


def layout(path: tuple[Any, ...], leaf: Any) -> Layout:
    """Tell which axes of a kernel stack layers or heads, and which kernels are depthwise.

    The networks' files declare which of their submodules stack kernels or convolve each channel by
    itself; one function reads the kernels of all networks.

    Args:
        path: The key path of the leaf, as :func:`jax.tree_util.tree_map_with_path` gives it.
        leaf: The leaf, anything with a shape; weights and masks have one layout.

    Returns:
        One batch axis for a scan and one for heads, so that each head of each block has its matrix;
        a group for each channel of a depthwise kernel; ``Layout()`` for other leaves.

    Example:
        >>> import jax
        >>> from eoi_jax import budgets
        >>> from experiments import models
        >>> model, images = models.create("mlp7"), jax.ShapeDtypeStruct((1, 28, 28, 1), "float32")
        >>> params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        >>> budgets.uniform(params, 0.1, layout=models.layout)["hidden"]["linear"]["kernel"]
        array([0.1, 0.1, 0.1, 0.1, 0.1])
    """
    names = _names(path)
    if names[-1:] != ["kernel"] or len(leaf.shape) < 2:
        return Layout()
    return Layout(
        batch_axes=len(_STACKED.intersection(names)),
        groups=leaf.shape[-1] if _DEPTHWISE.intersection(names) else 1,
    )


@functools.cache
def where(name: str, *, attention: bool = False, perceptrons: bool = True) -> Where:
    """Return which leaves of a network are pruned: the predicate that tree functions take.

    All kernels of linear layers and convolutions, the first, the last and the shortcuts' included;
    of DeiT only those of the perceptrons in its blocks, as in the paper, and so of the other
    transformers; of the wide perceptrons those between the first and the last.

    Args:
        name: One of :data:`NAMES`.
        attention: Whether the heads of attention are pruned too. Beyond the paper.
        perceptrons: Whether the perceptrons beside the heads are pruned; False for the heads alone.

    Returns:
        ``(path, leaf) -> bool``, one object for equal arguments: programs that take it as a static
        argument compile once.

    Raises:
        ValueError: For another name, for the attention of a network that has none, or if nothing is
            left to prune.

    Example:
        >>> import jax
        >>> from eoi_jax import masks
        >>> from experiments import models
        >>> model = models.create("deit_s")
        >>> images = jax.ShapeDtypeStruct((1, *models.input_shape("deit_s")), "float32")
        >>> params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        >>> def pruned(where):
        ...     leaves = jax.tree_util.tree_leaves_with_path(params)
        ...     return sum(leaf.size for path, leaf in leaves if where(path, leaf))
        >>> pruned(models.where("deit_s")), pruned(models.where("deit_s", attention=True))
        (14155776, 21233664)
    """
    spec = SPECS[choose(name, NAMES)]
    if attention and not spec.attention:
        raise ValueError(f"attention=True is given, but {name} has no attention. Leave it out.")
    if not (perceptrons or attention):
        raise ValueError(
            "perceptrons=False is given without attention=True, so that no kernel is pruned. Prune "
            "the heads of attention, in a network that has them."
        )
    if spec.pruned is None:
        return masks.is_kernel
    pruned = {*(spec.pruned if perceptrons else ()), *(spec.attention if attention else ())}

    def selected(path: tuple[Any, ...], leaf: Any) -> bool:
        return masks.is_kernel(path, leaf) and not pruned.isdisjoint(_names(path))

    return selected


def _names(path: tuple[Any, ...]) -> list[Any]:
    return [getattr(key, "key", None) for key in path]


def choose(value: str, options: Iterable[str], name: str = "name") -> str:
    """Accept one of the names, or suggest the closest.

    Args:
        value: What the user wrote.
        options: The allowed names.
        name: how the argument is called in the message.

    Returns:
        ``value``.

    Raises:
        ValueError: For anything else, with the allowed names and the closest of them.

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
