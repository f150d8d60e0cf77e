"""Every test runs strict: no silent dtype or rank promotion, two devices, shapes checked."""

import os

# Before jax is imported: two CPU devices, so that everything parallel is really parallel. Tests
# compile a lot and compute little: without LLVM's optimisations they take two thirds of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The shapes in public signatures are checked here and nowhere else: users pay nothing.
_hook = install_import_hook("fwm", "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="of test_survival.py's training run")
