"""A call of each public function that can be compiled, and why each of the others cannot be.

A call is ``(function, *shapes)``: the function of arrays of these shapes, of a key if the shape is
``KEY``. Functions over trees are taken from over_trees.
"""

import importlib

import jax
import jax.numpy as jnp
import over_trees

import eoi_jax as eoi

MODULES = [
    name for name in dir(eoi) if name in eoi.__all__ and hasattr(getattr(eoi, name), "__all__")
]
FLAX = ("linen", "nnx")
KEY = jax.eval_shape(lambda: jax.random.key(0))
SQUARE = jax.ShapeDtypeStruct((256, 256), "float32")
MASK = jax.ShapeDtypeStruct((256, 256), "bool")
BATCH = jax.ShapeDtypeStruct((8, 256), "float32")
BLOCKS = jax.eval_shape(
    lambda: eoi.blocks.orthogonal(jax.random.key(0), (256, 256), 1 / 2, block_size=64)
)
CONDENSED = eoi.condensed.Condensed(
    jax.ShapeDtypeStruct((32, 256), "float32"), jax.ShapeDtypeStruct((32, 256), "int32"), 256
)
ROTATIONS = eoi.givens.Rotations(
    *(jax.ShapeDtypeStruct((64,), dtype) for dtype in ("int32", "int32", "float32"))
)
PAIRS = jax.ShapeDtypeStruct((64, 2), "int32")


def public():
    """Yield the names of all functions and classes of the public modules, as ``givens.sample``."""
    for name in (*MODULES, *FLAX):
        for symbol in importlib.import_module(f"eoi_jax.{name}").__all__:
            yield f"{name}.{symbol}"


def of_map(function, **options):
    """A function that measures ``x -> tanh(x W)``, which is given W and a batch."""
    return lambda w, x: function(lambda x: jnp.tanh(x @ w), x, **options)


def of_map_with_key(function):
    return lambda key, w, x: function(key, lambda x: jnp.tanh(x @ w), x, num_steps=4)


def kernel(init, shape=(256, 256)):
    return lambda key: init(key, shape, jnp.float32)


def planes(law):
    return lambda key: eoi.orthogonal(key, (256, 256), 0.1, planes=law)


def blocks_from(name):
    def call(key, *arrays):
        layer = importlib.import_module("eoi_jax.linen")
        return getattr(layer, name)(256, density=1 / 2, block_size=128).init(key, *arrays)

    return call


def nnx_layer(name, *sizes):
    def call(key, x):
        from flax import nnx

        layers = importlib.import_module("eoi_jax.nnx")
        layer = getattr(layers, name)(*sizes, density=1 / 2, block_size=128, rngs=nnx.Rngs(key))
        return layer(x)

    return call


CONSTRUCTION = {
    "blocks.orthogonal": (
        lambda key: eoi.blocks.orthogonal(key, (256, 256), 1 / 2, block_size=64),
        KEY,
    ),
    "givens.from_pairs": (eoi.givens.from_pairs, KEY, PAIRS),
    "givens.hadamard_angle": (lambda key: eoi.givens.hadamard_angle(key), KEY),
    "givens.num_nonzeros": (lambda r: eoi.givens.num_nonzeros(r, (256, 256)), ROTATIONS),
    "givens.sample": (lambda key: eoi.givens.sample(key, 256, 64), KEY),
    "givens.support": (lambda r: eoi.givens.support(r, (256, 256)), ROTATIONS),
    "givens.uniform_angle": (lambda key: eoi.givens.uniform_angle(key), KEY),
    "givens.waves": (lambda r: eoi.givens.waves(r, 256), ROTATIONS),
    "initializers.conv": (kernel(eoi.conv(0.1), (3, 3, 64, 64)), KEY),
    "initializers.dense": (kernel(eoi.dense(0.1)), KEY),
    "initializers.sao_conv": (
        kernel(eoi.initializers.sao_conv(1 / 8), (3, 3, 64, 64)),
        KEY,
    ),
    "initializers.sao_dense": (kernel(eoi.initializers.sao_dense(1 / 8)), KEY),
    "n_to_m.orthogonal": (lambda key: eoi.n_to_m.orthogonal(key, (256, 256), 2, 4), KEY),
    "planes.independent": (planes(eoi.planes.independent), KEY),
    "planes.matching": (planes(eoi.planes.matching), KEY),
    "rotation.as_matrix": (lambda r: eoi.rotation.as_matrix(r, 256), ROTATIONS),
    "rotation.rotate": (eoi.rotation.rotate, SQUARE, ROTATIONS),
    "sao.orthogonal": (lambda key: eoi.sao.orthogonal(key, 256, 32), KEY),
    "sparse_orthogonal.orthogonal": (lambda key: eoi.orthogonal(key, (256, 256), 0.1), KEY),
}
SELECTION = {
    "blocks.all_blocks": (eoi.blocks.all_blocks, BLOCKS),
    "blocks.growable": (eoi.blocks.growable, BLOCKS),
    "n_to_m.top_n": (lambda scores: eoi.n_to_m.top_n(scores, 2, 4), SQUARE),
    "blocks.rigl_step": (
        eoi.blocks.rigl_step,
        jax.eval_shape(eoi.blocks.growable, BLOCKS),
        jax.ShapeDtypeStruct((2, 4), "float32"),
    ),
    "blocks.set_step": (eoi.blocks.set_step, KEY, jax.eval_shape(eoi.blocks.growable, BLOCKS)),
}
OTHERS = {
    "blocks.gradient_norms": (
        lambda x, dy: eoi.blocks.gradient_norms(x, dy, (64, 128)),
        BATCH,
        BATCH,
    ),
    "blocks.matmul": (eoi.blocks.matmul, BATCH, BLOCKS),
    "condensed.matmul": (eoi.condensed.matmul, BATCH, CONDENSED),
    "initializers.conv_orthogonal": (
        kernel(eoi.initializers.conv_orthogonal(), (3, 3, 8, 8)),
        KEY,
    ),
    "initializers.delta_orthogonal": (
        kernel(eoi.initializers.delta_orthogonal(), (3, 3, 8, 8)),
        KEY,
    ),
    "isometry.approximate_isometry": (
        lambda w, m: eoi.isometry.approximate_isometry(w, m, num_steps=4),
        SQUARE,
        MASK,
    ),
    "spectrum.conv_singular_values": (
        lambda w: eoi.spectrum.conv_singular_values(w, (4, 4)),
        jax.ShapeDtypeStruct((3, 3, 4, 4), "float32"),
    ),
    "spectrum.extreme_singular_values": (
        of_map_with_key(eoi.spectrum.extreme_singular_values),
        *(KEY, SQUARE, BATCH),
    ),
    "spectrum.jacobian": (of_map(eoi.spectrum.jacobian), SQUARE, BATCH),
    "spectrum.layerwise": (
        lambda stack, x: eoi.spectrum.layerwise(lambda w, h: jnp.tanh(h @ w), stack, x),
        *(jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 8, 8), (4, 8))),
    ),
    "spectrum.orthogonality_error": (eoi.spectrum.orthogonality_error, SQUARE),
    "spectrum.singular_values": (
        of_map(eoi.spectrum.singular_values),
        *(jax.ShapeDtypeStruct(shape, "float32") for shape in ((8, 8), (4, 8))),
    ),
    "spectrum.spectral_density": (
        of_map_with_key(eoi.spectrum.spectral_density),
        *(KEY, SQUARE, BATCH),
    ),
    "spectrum.summarize": (
        eoi.spectrum.summarize,
        jax.ShapeDtypeStruct((8, 256), "float32"),
    ),
    "linen.BlockSparseConv": (
        blocks_from("BlockSparseConv"),
        *(KEY, jax.ShapeDtypeStruct((2, 8, 8, 256), "float32")),
    ),
    "linen.BlockSparseDense": (blocks_from("BlockSparseDense"), KEY, BATCH),
    "linen.BlockSparseMlp": (blocks_from("BlockSparseMlp"), KEY, BATCH),
    "nnx.BlockSparseConv": (
        nnx_layer("BlockSparseConv", 256, 256),
        *(KEY, jax.ShapeDtypeStruct((2, 8, 8, 256), "float32")),
    ),
    "nnx.BlockSparseLinear": (nnx_layer("BlockSparseLinear", 256, 256), KEY, BATCH),
    "nnx.BlockSparseMlp": (nnx_layer("BlockSparseMlp", 256, 256), KEY, BATCH),
}
# (parameters, gradients, mask) -> a tree, of the small network there.
TREES = {
    name: function
    for name, function in over_trees.FUNCTIONS.items()
    if name not in over_trees.NOT_TRACED
}
# Dividing JAX's QR decomposition of a small matrix ends libtpu 0.0.42 with a segmentation fault.
TREES["networks.redraw"] = lambda p, g, m: eoi.networks.redraw(
    over_trees.KEY, p, jax.nn.initializers.normal()
)

_TYPE, _HOST = "a type, compiled with the functions that take it", "computes on the host, in NumPy"
_PATTERN = "reads a pattern on the host, which decides shapes"
NOT_COMPILED = {
    **dict.fromkeys(
        [
            *("blocks.BlockSparse", "blocks.Rewired", "condensed.Condensed", "givens.AngleLaw"),
            *("givens.Rotations", "mean_field.Activation", "mean_field.PredictedSpectrum"),
            *("networks.SparseInit", "nnx.Pattern", "optim.MaskUpdatesState", "planes.PlaneLaw"),
            *("optim.ScaleByDensityState", "optim.StaticSparseState", "dynamic.DynamicSparseState"),
            *("spectrum.ExtremeSingularValues", "spectrum.SpectralDensity"),
            *("spectrum.SpectrumSummary", "serialization.SavedNetwork"),
        ],
        _TYPE,
    ),
    **dict.fromkeys((f"typing.{name}" for name in eoi.typing.__all__), _TYPE),
    **dict.fromkeys((f"theory.{name}" for name in eoi.theory.__all__), _HOST),
    **dict.fromkeys((f"budgets.{name}" for name in eoi.budgets.__all__), _HOST),
    **dict.fromkeys(
        (f"mean_field.{name}" for name in eoi.mean_field.__all__ if name[0].islower()), _HOST
    ),
    **dict.fromkeys(
        ["sao.degree", "isometry.structural_rank", "masks.is_kernel", "layouts.by_name"], _HOST
    ),
    **dict.fromkeys(
        [
            *("blocks.from_dense", "condensed.from_dense", "linen.from_dense", "linen.to_dense"),
            *("nnx.from_dense", "nnx.to_dense", "masks.adopt", "planes.within"),
        ],
        _PATTERN,
    ),
    "givens.continuous": "marks a law of angles and computes nothing",
    "planes.check": "checks an argument and computes nothing",
    "serialization.load": "reads a file",
    "serialization.save": "writes a file",
    "spectrum.monitor": "calls a function of the user's at chosen steps",
}
