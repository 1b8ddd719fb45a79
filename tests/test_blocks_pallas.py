"""Products by Pallas kernels: equal to dense ones, interpreted on the CPU, and lowered for CUDA."""

import contextlib
import dataclasses
import functools
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses

from eoi_jax import blocks, spectrum
from eoi_jax.blocks import kernels
from eoi_jax.blocks.product import _multiply_by_kernels

KEY = jax.random.key(18)
SIZE = 32
pallas = functools.partial(blocks.matmul, implementation="pallas")


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut sides of blocks and batches of more than 32 rows into tiles."""
    for name, value in (
        ("_TPU_TILES", (SIZE // 2,)),
        ("_TPU_ELEMENTS", SIZE // 2 * 32),
        ("_GPU_TILE", SIZE // 2),
        ("_GPU_ROWS", 16),
    ):
        monkeypatch.setattr(kernels, name, value)


def interpreted(kernel):
    """Multiply ``(batch, inputs)`` by one of the kernels, on a CPU."""
    return lambda x, w: _multiply_by_kernels(x, w.values, w.rows, w.slots, (None, kernel))


def ragged(size=(SIZE, SIZE), dtype=jnp.float32):
    """A matrix with a row of blocks and a column of blocks without any, and the others uneven."""
    pattern = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]], bool)
    mask = np.kron(pattern, np.ones(size, bool))
    return blocks.from_dense(jnp.where(mask, jax.random.normal(KEY, mask.shape, dtype), 0), size)


def drawn(key=KEY, size=SIZE):
    """An orthogonal matrix of blocks of two sizes by one, in a pattern by chance."""
    return blocks.orthogonal(key, (4 * size, 4 * size), 0.5, block_size=size)


def products(multiply, w, x):
    """The product, and gradients of a function of it by x and by the values."""

    def loss(x, values):
        y = multiply(x, dataclasses.replace(w, values=values))
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape)).astype(y.dtype)).sum(), y

    (dx, dw), y = jax.grad(loss, (0, 1), has_aux=True)(x, w.values)
    return y, dx, dataclasses.replace(w, values=dw)


def dense_products(w, x):
    dense, mask = np.asarray(w.to_dense(), np.float64), np.asarray(w.mask())
    x = np.asarray(x, np.float64)
    y = x @ dense
    dy = np.cos(np.arange(y.size).reshape(y.shape))
    return y, dy @ dense.T, x.T @ dy * mask


def assert_equal_to_dense(found, w, x, atol):
    y, dx, dw = found
    present = np.asarray(w.rows) < w.slots.shape[0]
    assert (np.asarray(dw.values)[~present] == 0).all()
    for one, expected in zip((y, dx, dw.to_dense()), dense_products(w, x), strict=True):
        np.testing.assert_allclose(one, expected, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "size"), [(32, (SIZE, SIZE)), (37, (16, 48)), (37, (48, 16))])
@pytest.mark.parametrize("kernel", ["mosaic", "triton"])
def test_products_and_gradients_are_those_of_the_dense_matrix(
    x64, small_tiles, kernel, batch, size
):
    w = ragged(size, jnp.float64)
    x = jax.random.normal(jax.random.key(1), (batch, w.shape[0]), jnp.float64)
    found = jax.jit(functools.partial(products, interpreted(kernel)))(w, x)
    assert_equal_to_dense(found, w, x, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["mosaic", "triton"])
def test_narrow_products_are_summed_in_float32(kernel):
    """In bfloat16 a sum of ones stays at 256."""
    w = blocks.from_dense(jnp.ones((512, 512), jnp.bfloat16), 256)
    x = jnp.ones((512, 512), jnp.bfloat16)

    @jax.jit
    def found(w, x):
        y, pull = jax.vjp(interpreted(kernel), x, w)
        return y, *pull(jnp.ones_like(y))

    y, dx, dw = found(w, x)
    for one in (y, dx, dw.values):
        assert one.dtype == jnp.bfloat16
        assert (one == 512).all()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["mosaic", "triton"])
@pytest.mark.parametrize("axes", [(None, 0), (0, 0)], ids=["inputs", "both"])
def test_vmap_over_inputs_and_over_matrices(kernel, axes):
    """A mapped matrix has mapped indices, which Mosaic would have prefetched."""
    stack = jax.vmap(functools.partial(drawn, size=16))(jax.random.split(KEY, 2))
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))

    def at(index, tree):
        return jax.tree.map(lambda leaf: leaf[index], tree)

    arguments = [
        tree if axis == 0 else at(0, tree) for tree, axis in zip((stack, x), axes, strict=True)
    ]
    mapped = jax.jit(jax.vmap(functools.partial(products, interpreted(kernel)), axes))(*arguments)
    for index in range(2):
        pairs = zip(arguments, axes, strict=True)
        one = [at(index, tree) if axis == 0 else tree for tree, axis in pairs]
        assert_equal_to_dense(at(index, mapped), *one, 1e-5)


@pytest.mark.slow
def test_the_public_product_takes_all_shapes_of_inputs():
    w = ragged((16, 16))
    x = jax.random.normal(jax.random.key(1), (2, 3, w.shape[0]))
    multiply = jax.jit(pallas)
    np.testing.assert_allclose(multiply(x, w), x @ w, atol=1e-5)
    np.testing.assert_allclose(multiply(x[0, 0], w), x[0, 0] @ w, atol=1e-5)
    y, pull = jax.vjp(pallas, x[:, :0], w)
    assert y.shape == (2, 0, w.shape[1])
    assert (pull(y)[1].values == 0).all()
    mixed = multiply(x.astype(jnp.float16), dataclasses.replace(w, values=w.values * 1.0))
    assert mixed.dtype == jnp.float32


@pytest.mark.slow
def test_second_derivatives():
    """Hessian-vector products, forward over reverse and reverse over reverse, by both arguments."""
    w = ragged((16, 16))
    x = jax.random.normal(jax.random.key(1), (3, w.shape[0]))

    def loss(multiply, arguments):
        x, values = arguments
        return (jnp.sin(multiply(x, dataclasses.replace(w, values=values))) ** 2).sum()

    def hessian_products(multiply, arguments, tangents):
        grad = jax.grad(functools.partial(loss, multiply))
        _, forward = jax.jvp(grad, (arguments,), (tangents,))
        _, pull = jax.vjp(grad, arguments)
        return forward, pull(tangents)[0]

    at, along = (x, w.values), (jnp.cos(x), jnp.cos(w.values))
    forward, reverse = jax.jit(functools.partial(hessian_products, pallas))(at, along)
    dense = functools.partial(hessian_products, lambda x, w: x @ w.to_dense())
    expected, _ = jax.jit(dense)(at, along)
    present = (w.rows < w.slots.shape[0])[..., None, None]
    expected = (expected[0], expected[1] * present)
    for found in (forward, reverse):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_spectra_need_reverse_mode():
    w = drawn(size=16)
    x = jnp.ones((1, 64))
    values = spectrum.singular_values(lambda x: pallas(x, w), x, mode="reverse")
    np.testing.assert_allclose(values, 1, atol=2e-6)
    with refuses("fn", "mode='reverse'"):
        spectrum.extreme_singular_values(KEY, lambda x: pallas(x, w), x, num_steps=2)


@pytest.mark.slow
def test_products_that_no_kernel_computes_are_refused():
    w = drawn(size=16)
    x = jnp.ones((2, 64))
    for implementation in ("mosaic", "", 1):
        with refuses(f"implementation={implementation!r}", "'xla'", "'pallas'"):
            blocks.matmul(x, w, implementation=implementation)
    for precision in ("BF16_BF16_F32", "best"):
        with refuses(f"precision={precision!r}", "'highest'", "'xla'"):
            pallas(x, w, precision=precision)
    with refuses("block_size=(8, 16)", "multiples of 16", "'xla'"):
        pallas(x[:, :32], drawn(size=8))


@pytest.mark.slow
def test_the_library_imports_pallas_when_a_kernel_is_called():
    script = "import sys, eoi_jax; sys.exit('jax.experimental.pallas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_an_implementation_is_xla_by_default():
    w = drawn(size=8)
    x = jnp.ones((2, 32))
    texts = [
        jax.jit(functools.partial(blocks.matmul, **given)).lower(x, w).as_text()
        for given in ({}, {"implementation": None}, {"implementation": "xla"})
    ]
    assert texts[0] == texts[1] == texts[2]


def described_gpu():
    """Newer versions of JAX lower Triton kernels for a GPU that is there, or described."""
    device = jax.sharding.AbstractDevice
    if "platform" not in inspect.signature(device).parameters:
        return contextlib.nullcontext()
    gpu = device("NVIDIA H100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("gpu",), abstract_device=gpu)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_triton_kernels_lower_for_cuda(dtype):
    w = jax.eval_shape(lambda: blocks.orthogonal(KEY, (512, 1024), 0.5, block_size=128))
    w = dataclasses.replace(w, values=w.values.update(dtype=dtype))
    x = jax.ShapeDtypeStruct((100, 512), dtype)
    with described_gpu():
        traced = jax.jit(functools.partial(products, pallas)).trace(w, x)
        lowered = traced.lower(lowering_platforms=("cuda",))
    # The forward product, and both of the gradient.
    assert lowered.as_text().count("xla.gpu.triton") == 3
