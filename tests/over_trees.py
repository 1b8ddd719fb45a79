"""The public functions over parameter trees, each as one call on a small network.

``python tests/over_trees.py auto explicit`` compares them on meshes of four CPU devices, with axes
of each kind, with one device. It needs XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import contextlib
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eoi_jax as eoi
from eoi_jax._internal import shardings

KEY = jax.random.key(0)
SHAPES = {
    "conv": {"kernel": (3, 2, 2, 4), "bias": (4,)},
    "first": {"kernel": (4, 8), "bias": (8,)},
    "last": {"kernel": (8, 4), "bias": (4,)},
    "square": {"kernel": (4, 4), "bias": (4,)},
}
SPECS = {
    "conv": {"kernel": (None, None, None, "model"), "bias": ("model",)},
    "first": {"kernel": ("data", "model"), "bias": (None,)},
    "last": {"kernel": ("model", None), "bias": ("data",)},
    "square": {"kernel": (("data", "model"), None), "bias": (None,)},
}
X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


def trees():
    """Return parameters, gradients and a mask on one device."""
    names = [(layer, name) for layer in SHAPES for name in SHAPES[layer]]
    drawn = []
    for seed in (1, 2):
        keys = jax.random.split(jax.random.key(seed), len(names))
        tree = {layer: {} for layer in SHAPES}
        for (layer, name), key in zip(names, keys, strict=True):
            tree[layer][name] = jax.random.normal(key, SHAPES[layer][name])
        drawn.append(tree)
    return (*drawn, eoi.masks.random(KEY, drawn[0], 0.5))


def on_mesh(tree, mesh):
    """Divide the arrays of a tree, as SPECS says; a scalar mask stays where it is."""
    return jax.tree.map(
        lambda leaf, spec: (
            jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec))) if leaf.ndim else leaf
        ),
        tree,
        {layer: {name: SPECS[layer][name] for name in tree[layer]} for layer in tree},
    )


def of_mlp(tree):
    return {layer: tree[layer] for layer in ("first", "last")}


def apply_fn(params, x):
    for layer, activation in (("first", jax.nn.relu), ("last", lambda x: x)):
        kernel = params[layer]["kernel"]
        sharding = jax.typeof(kernel).sharding
        # Along explicit axes a product says how its result is divided: not at all, here.
        out = NamedSharding(sharding.mesh, PartitionSpec()) if any(sharding.spec) else None
        x = activation(jnp.matmul(x, kernel, out_sharding=out) + params[layer]["bias"])
    return x


def loss_fn(params, x):
    return jnp.mean((apply_fn(params, x) - 1.0) ** 2)


def scores(params):
    return jax.tree.map(lambda leaf: jnp.abs(leaf) if leaf.ndim > 1 else jnp.inf, params)


def reset(params, grads, mask):
    _, state = ADAM.update(grads, ADAM.init(params), params)
    return eoi.dynamic.reset_state(ADAM, mask, params, state)


def train(make):
    def steps(params, grads, mask):
        # One kernel, since compiling takes long.
        params, grads, mask = ({"first": tree["first"]} for tree in (params, grads, mask))
        tx = make(mask)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, optax.tree.get(state, "mask")

    return steps


ADAM = optax.adam(0.1)
# By the name in the public face: (params, gradients, mask) -> a tree of arrays or numbers.
FUNCTIONS = {
    "masks.support": lambda p, g, m: eoi.masks.support(p),
    "masks.apply": lambda p, g, m: eoi.masks.apply(m, p),
    "masks.random": lambda p, g, m: eoi.masks.random(KEY, p, 0.4),
    "masks.top_k": lambda p, g, m: eoi.masks.top_k(scores(p), 0.3),
    "masks.fill": lambda p, g, m: eoi.masks.fill(KEY, m, 0.75),
    "masks.shuffle": lambda p, g, m: eoi.masks.shuffle(KEY, m),
    "masks.density": lambda p, g, m: eoi.masks.density(m),
    "masks.densities": lambda p, g, m: eoi.masks.densities(m),
    "masks.overlap": lambda p, g, m: eoi.masks.overlap(m, eoi.masks.top_k(scores(p), 0.3)),
    "masks.adopt": lambda p, g, m: eoi.masks.adopt(m, p),
    "budgets.uniform": lambda p, g, m: eoi.budgets.uniform(p, 0.5),
    "budgets.erdos_renyi": lambda p, g, m: eoi.budgets.erdos_renyi(p, 0.5),
    "budgets.erdos_renyi_kernel": lambda p, g, m: eoi.budgets.erdos_renyi_kernel(p, 0.5),
    "criteria.magnitude": lambda p, g, m: eoi.criteria.magnitude(p),
    "criteria.random": lambda p, g, m: eoi.criteria.random(KEY, p),
    "criteria.invert": lambda p, g, m: eoi.criteria.invert(scores(p)),
    "criteria.snip": lambda p, g, m: eoi.criteria.snip(loss_fn, of_mlp(p), X),
    "criteria.grasp": lambda p, g, m: eoi.criteria.grasp(loss_fn, of_mlp(p), X, micro_batch_size=2),
    "criteria.synflow": lambda p, g, m: eoi.criteria.synflow(apply_fn, of_mlp(p), X),
    "criteria.prune": lambda p, g, m: eoi.criteria.prune(
        lambda p: eoi.criteria.snip(loss_fn, p, X), of_mlp(p), 0.5, num_steps=2
    ),
    "networks.masked": lambda p, g, m: eoi.networks.masked(p, m),
    "networks.rescaled": lambda p, g, m: eoi.networks.rescaled(p, m, per="unit"),
    "networks.redraw": lambda p, g, m: eoi.networks.redraw(
        KEY, p, jax.nn.initializers.orthogonal()
    ),
    "networks.approximate_isometry": lambda p, g, m: eoi.networks.approximate_isometry(
        p, m, num_steps=5
    ),
    "networks.exact_orthogonal": lambda p, g, m: eoi.networks.exact_orthogonal(
        KEY, {layer: p[layer] for layer in ("conv", "first")}, 0.6
    ),
    "networks.sparsity_aware_orthogonal": (
        lambda p, g, m: eoi.networks.sparsity_aware_orthogonal(KEY, {"square": p["square"]}, 0.5)
    ),
    "optim.mask_updates": train(lambda m: optax.chain(ADAM, eoi.optim.mask_updates(m))),
    "optim.scale_by_density": train(
        lambda m: eoi.static_sparse(optax.chain(ADAM, eoi.optim.scale_by_density(m)), m)
    ),
    "optim.static_sparse": train(lambda m: eoi.optim.static_sparse(ADAM, m)),
    "dynamic.sparse_evolutionary_training": train(
        lambda m: eoi.dynamic.sparse_evolutionary_training(ADAM, m, key=KEY, update_every=1)
    ),
    "dynamic.reset_state": reset,
    "dynamic.rigl": train(lambda m: eoi.dynamic.rigl(ADAM, m, update_every=1)),
    "spectrum.kernel_orthogonality_errors": lambda p, g, m: (
        eoi.spectrum.kernel_orthogonality_errors(p)
    ),
    "spectrum.kernel_singular_values": lambda p, g, m: eoi.spectrum.kernel_singular_values(
        p, spatial_shape=(4, 3)
    ),
}
# They read masks and shapes on the host.
NOT_TRACED = {"masks.adopt", *(name for name in FUNCTIONS if name.startswith("budgets."))}


def check(found, expected, mesh, *, asked_only=False):
    """Require the values of one device, and of each leaf the sharding of its parameter.

    Where it was asked for only, a leaf may be divided along other axes, and no less.
    """
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, leaf), value in pairs:
        kind = np.asarray(value).dtype.kind
        np.testing.assert_allclose(leaf, value, rtol=0, atol=0 if kind in "bi" else 1e-5)
        layer, name = [getattr(key, "key", None) for key in ([None, None, *path])][-2:]
        if (
            layer in SHAPES
            and np.shape(leaf) == SHAPES[layer][name]
            and isinstance(leaf, jax.Array)
        ):
            sharding = NamedSharding(mesh, PartitionSpec(*SPECS[layer][name]))
            is_same = leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            part, right = (math.prod(s.shard_shape(leaf.shape)) for s in (leaf.sharding, sharding))
            assert is_same or (asked_only and part <= right), (path, leaf.sharding)


def failures(kind, on_one, expected):
    """Count the functions that fail on a mesh with axes of a kind, and say how."""
    axis_types = (AxisType[kind.capitalize()],) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axis_types)
    divided = [on_mesh(tree, mesh) for tree in on_one]
    failed = 0
    for name, function in FUNCTIONS.items():
        for is_jitted in (False, True):
            if name in NOT_TRACED if is_jitted else name not in NOT_TRACED and kind == "auto":
                continue  # Eagerly, axes of both kinds take the same way.
            # With the mesh entered, new arrays belong to it too.
            context = contextlib.nullcontext() if is_jitted else jax.set_mesh(mesh)
            try:
                with context:
                    found = (jax.jit(function) if is_jitted else function)(*divided)
                # JAX 0.12 has no way to demand a sharding while auto axes are traced.
                asked_only = is_jitted and kind == "auto" and shardings._shard_alike is None
                check(found, expected[name], mesh, asked_only=asked_only)
            except Exception as error:
                failed += 1
                where = f"{name}{' under jit' * is_jitted}, axes {kind}"
                print(f"{where}: {type(error).__name__}: {error}\n")
    # Shapes may ask for a sharding, and a mask of one device is brought to the parameters.
    params, _, mask = on_one
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        divided[0],
    )
    check(eoi.masks.random(KEY, shapes, 0.4), eoi.masks.random(KEY, params, 0.4), mesh)
    bound = jax.device_put(mask, jax.devices()[0])
    check(eoi.masked(divided[0], bound), eoi.masked(params, mask), mesh)
    print(f"{failed} of {len(FUNCTIONS)} functions failed with axes {kind}")
    return failed


def main(*kinds):
    on_one = trees()
    expected = {name: function(*on_one) for name, function in FUNCTIONS.items()}
    sys.exit(sum(failures(kind, on_one, expected) for kind in kinds) > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
