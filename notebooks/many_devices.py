# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Many devices: one network, the same bits on every mesh
#
# You learn how to draw a sparse network directly on the devices that store its parts, so that no
# device holds a whole matrix, and how its mask and optimizer state are placed. Eight devices are
# simulated on the CPU; real devices need the same lines. Where the TPU compiler is installed, the
# last cell compiles the same program for a slice of 16 chips, without a TPU.
#
# The same lines run on TPU and GPU; this notebook needs only a CPU, and under two minutes on two
# cores.

# %%
import os
import sys

REPOSITORY = "https://github.com/OWNER/eoi_jax"
if "google.colab" in sys.modules:
    import subprocess

    package = f"eoi_jax[experiments] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %% tags=["parameters"]
SIZE = 1024  # rows and columns of one matrix
WIDTH = 256  # units of a network
DENSITY = 0.1
STEPS = 20  # of training
SEED = 0

# %% [markdown]
# JAX reads the number of devices to simulate when it starts, so set it before the first import.
# On a machine with real devices, leave this cell out.

# %%
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

# %%
import importlib.util
import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eoi_jax as eoi

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})
key = jax.random.key(SEED)
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
print(mesh)


# %% [markdown]
# ## One matrix
#
# `jit` with `out_shardings` compiles a program that draws each part on its device. The text of
# the compiled program shows what devices send to each other: at most sums. The bits are the same
# as on one device, with every mesh.


# %%
def collectives(compiled):
    """Count what devices say to each other in a compiled program."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return dict(Counter(re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text())))


def draw(key):
    return eoi.orthogonal(key, (SIZE, SIZE), DENSITY)


one = jax.jit(draw)(key)
SPECS = (P("model"), P(None, "model"), P("data", "model"), P(("data", "model")))
figure, axes = plt.subplots(1, len(SPECS), figsize=(9, 2.6))
for axis, spec in zip(axes, SPECS, strict=True):
    compiled = jax.jit(draw, out_shardings=NamedSharding(mesh, spec)).lower(key).compile()
    matrix = compiled(key)
    assert np.array_equal(matrix, one)
    shard = matrix.addressable_shards[0].data.nbytes / 2**20
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    sent = collectives(compiled) or "nothing sent"
    print(f"{spec!s:30} {shard:.2f} MiB a device, {memory:.1f} temporary, {sent}")
    owner = np.zeros(matrix.shape, np.int8)
    for part in matrix.addressable_shards:
        owner[part.index] = part.device.id
    axis.imshow(owner, cmap="Set2", vmin=0, vmax=7)
    axis.set(title=str(spec), xticks=(), yticks=())
plt.show()

# %% [markdown]
# Each color is a device. With four colors, two devices hold the same part. Divided by columns,
# devices do not communicate: the rotations mix rows, so each column is drawn independently.
# Divided by rows, they exchange one sum of counts.

# %% [markdown]
# ## Memory
#
# The picture shows the memory that one device needs to draw its columns, against the number of
# devices.

# %%
counts = (1, 2, 4, 8)
held, temporary = [], []
for count in counts:
    line = jax.sharding.Mesh(jax.devices()[:count], ("model",))
    program = jax.jit(draw, out_shardings=NamedSharding(line, P(None, "model")))
    analysis = program.lower(key).compile().memory_analysis()
    held.append(analysis.output_size_in_bytes / 2**20)
    temporary.append(analysis.temp_size_in_bytes / 2**20)
figure, axis = plt.subplots(figsize=(5, 3))
axis.plot(counts, held, "o-", color="#0072B2", label="the columns it holds")
axis.plot(counts, temporary, "s--", color="#D55E00", label="temporary")
axis.set(xlabel="devices", ylabel="MiB a device", xticks=counts, xticklabels=counts)
axis.legend()
plt.show()

# %% [markdown]
# The part that a device holds halves as the number of devices doubles. The rest is the plan of
# the rotations, which every device has; it is as large on eight devices as on one.

# %% [markdown]
# ## A whole network
#
# `jax.eval_shape` gives the shapes of the parameters without making them. A rule gives each
# parameter a sharding, and one program draws parameters and mask into these shardings.

# %%
model = nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(WIDTH), nn.tanh, nn.Dense(16)])
x = jnp.ones((8, WIDTH))


def start(key):
    params = model.init(key, x)["params"]
    return eoi.exact_orthogonal(key, params, DENSITY)


def place(leaf):
    """Divide the outputs of kernels; biases and scalars are everywhere."""
    return NamedSharding(mesh, P(None, "model") if len(leaf.shape) == 2 else P())


shapes = jax.eval_shape(start, key)
params, mask = jax.jit(start, out_shardings=jax.tree.map(place, shapes))(key)
expected = jax.jit(start)(key)
for leaf, other in zip(jax.tree.leaves((params, mask)), jax.tree.leaves(expected), strict=True):
    assert np.array_equal(leaf, other)
print(params["layers_0"]["kernel"].sharding.spec, mask["layers_0"]["kernel"].sharding.spec)

# %% [markdown]
# ## Training
#
# The optimizer's state has the shardings of the parameters, and the examples are divided along the
# other axis. The step needs no annotations: the compiler takes the shardings from the arrays. The
# mask holds on every device.

# %%
tx = eoi.static_sparse(optax.adamw(1e-3), mask)
state = jax.jit(tx.init)(params)
batch = jax.device_put(jax.random.normal(key, (64, WIDTH)), NamedSharding(mesh, P("data")))
labels = jax.device_put(jnp.arange(64) % 16, NamedSharding(mesh, P("data")))


@jax.jit
def step(params, state):
    def loss_fn(params):
        logits = model.apply({"params": params}, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def losses_of(params, state):
    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses, params


losses, trained = losses_of(params, state)
kernel, kept = trained["layers_0"]["kernel"], mask["layers_0"]["kernel"]
assert not np.any(np.asarray(kernel)[~np.asarray(kept)])
print("the kernel after training:", kernel.sharding.spec)

batch, labels = (jax.device_put(np.asarray(array), jax.devices()[0]) for array in (batch, labels))
step = jax.jit(step.__wrapped__)  # the arrays that it uses are others now
on_one = jax.device_put(jax.tree.map(np.asarray, (params, state)), jax.devices()[0])
alone, _ = losses_of(*on_one)
print(f"largest difference of the losses: {np.abs(np.subtract(losses, alone)).max():.1e}")
figure, axis = plt.subplots(figsize=(5, 3))
axis.plot(losses, "-", color="#0072B2", label="eight devices")
axis.plot(alone, "o", color="#D55E00", markersize=4, label="one")
axis.set(xlabel="step", ylabel="loss (nats)")
axis.legend()
plt.show()

# %% [markdown]
# The start is equal bit for bit. On eight devices, training adds the same numbers in another
# order, so losses agree up to rounding.

# %% [markdown]
# ## A program for a slice of TPUs
#
# The TPU compiler runs on a CPU; the extra `tpu-aot` installs it. It reports how much memory a
# chip needs and what chips send to each other. `python -m experiments plan --topology v5e:16x16`
# does this for whole networks and their training.

# %%
if importlib.util.find_spec("libtpu"):
    # What libtpu would otherwise look for on the machine, and how much it tells.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    from jax.experimental import topologies

    slice_of_16 = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    chips = jax.sharding.Mesh(np.array(slice_of_16.devices).reshape(16), ("model",))
    abstract = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(chips, P()))
    program = jax.jit(draw, out_shardings=NamedSharding(chips, P(None, "model")))
    compiled = program.trace(abstract).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    print(f"output {memory.output_size_in_bytes / 2**20:.2f} MiB a chip,", end=" ")
    print(f"temporary {memory.temp_size_in_bytes / 2**20:.1f} MiB, {collectives(compiled)}")
else:
    print("libtpu is not installed; this cell was left out")
