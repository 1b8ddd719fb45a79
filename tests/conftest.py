"""Session settings: every test runs on the CPU, offline, with compiled programs kept on disk."""

import gc
import importlib.metadata
import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the work. Level 1 of LLVM vectorizes and fuses multiplications with additions
# as the default, level 3, does: nearly all programs round alike.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1 "
    + os.environ.get("XLA_FLAGS", "")
)
# These have a second compiler of fused loops, which takes half the time. Others would not know the
# flag, which ends the process.
if importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")):
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false " + os.environ["XLA_FLAGS"]
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"

import hypothesis
import jax
import pytest

# Started in the background by a shell, the tests would ignore the interrupts that some send.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Level 0, which halves compiling, has other roundings. These modules test the roundings of what
# users run; the others test laws that hold at either level, and which programs run at all.
OPTIMIZED = {"blocks", "givens", "planes_law", "reproducible", "rotation", "sparse_orthogonal"}
collect_ignore = ["mutants.py"]  # a program, which needs cosmic-ray
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# The processes that tests start share it.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# A first example compiles, so a deadline would only measure the compiler.
hypothesis.settings.register_profile("eoi", deadline=None, max_examples=20, print_blob=True)
hypothesis.settings.load_profile("eoi")


def pytest_collection_finish():
    """Spare the garbage collector the modules and the tests, which stay until the end."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Run the modules that need optimized programs before the others; doctests count as slow."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker("slow")
    items.sort(key=is_unoptimized)


def is_unoptimized(item):
    return item.path.stem.removeprefix("test_") not in OPTIMIZED


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compile as the module of the test asks for, in the processes that it starts too."""
    disable = str(int(is_unoptimized(item)))
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != disable:
        jax.clear_caches()  # no test meets programs of the other kind
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = disable
        jax.config.update("jax_disable_most_optimizations", disable == "1")


@pytest.fixture
def x64():
    """Run one test with 64-bit types."""
    with jax.enable_x64(True):
        yield
