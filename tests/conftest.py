"""Every test runs strict: no silent dtype or rank promotion, two devices, shapes checked."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Before jax is imported, and for the processes that tests start. Two CPU devices, so that all that
# is parallel is really parallel. Tests compile a lot and compute little: without LLVM's
# optimisations and the newer emitters of fusions that takes a third of the time (from 0.11 on,
# jaxlib has no others, and ends a process that names them), and a sixth less where a program is
# not cut into 32 parts. What is compiled is kept for all tests, workers and later runs; jax names
# it by its version, flags and program.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    + " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * (version("jaxlib") < "0.11")
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest
import whole_entries  # noqa: F401
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The shapes in public signatures are checked here and nowhere else: users pay nothing. Files that
# have none are left out: of some the functions are called a million times, and a check takes time.
ROOT = Path(__file__).parents[1]
_shaped = [path for path in (ROOT / "fwm").rglob("*.py") if "jaxtyping" in path.read_text()]
_names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in _shaped]
_hook = install_import_hook(_names, "beartype.beartype")


# What takes longest is begun first, so that two workers end together.
LONGEST = (
    "test_survival.py::test_killed",
    "test_docs.py::test_commands_run",
    "test_distributed.py::test_two_processes",
    "test_notebooks.py::test_runs_from_top_to_bottom",
    "test_retrieval.py::test_an_interrupt",
    "::test_real_wandb",
)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="of test_survival.py's training run")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What a module registers, as by a config file of one's own, does not outlive it."""
    from fwm import registry

    before = [(table, set(table)) for table in registry._tables]
    yield
    for table, names in before:
        for name in set(table) - names:
            del table[name]


def pytest_collection_finish():
    # What is imported stays, and tracing makes many small objects that live: no collection need
    # look through all of it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
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
