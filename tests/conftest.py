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
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The shapes in public signatures are checked here and nowhere else: users pay nothing.
_hook = install_import_hook("fwm", "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="of test_survival.py's training run")


@pytest.fixture(scope="module")
def kept_programs(tmp_path_factory):
    """What a module compiles is kept for the rest of the module, and not for the next one."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def place(tmp_path_factory, kept_programs):
    """A folder with a text, where calls of main.py keep what they cache."""
    from program import write_text

    folder = tmp_path_factory.mktemp("main")
    write_text(folder / "text")
    return folder


@pytest.fixture
def train(place):
    """A function that trains into a workdir, with changed settings."""
    from program import DPFP, SIZES, call

    def run(workdir, *arguments, config=DPFP, **changes):
        fields = SIZES | {"data.dir": place / "text", "data.cache_dir": place / "cache"}
        fields |= {name.replace("__", "."): value for name, value in changes.items()}
        overrides = [f"--config.{name}={value}" for name, value in fields.items()]
        return call(f"--config={config}", f"--workdir={workdir}", *overrides, *arguments)

    return run
