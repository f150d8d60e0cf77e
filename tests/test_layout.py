"""The direction of imports, read from the source: see the README's map of the layout."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "fwm").rglob("*.py"))
}
# What each may import of fwm, besides its own package.
ALLOWED = {
    "fwm.errors": set(),
    "fwm.ops": {"fwm.errors", "fwm.registry"},
    "fwm.data": {"fwm.errors", "fwm.files", "fwm.terminal"},
    "fwm.optimizer": {"fwm.errors", "fwm.limits"},
    "fwm.parallel": {"fwm.errors"},
    "fwm.perplexity": set(),
    "fwm.files": {"fwm.errors"},
    "fwm.version": set(),
    "fwm.registry": {"fwm.errors"},
    "fwm.checkpoint": {"fwm.errors", "fwm.files", "fwm.terminal"},
    "fwm.layers": {"fwm.errors", "fwm.limits", "fwm.ops", "fwm.registry"},
    "fwm.limits": {"fwm.errors"},
    "fwm.terminal": set(),
    "fwm.config_file": {"fwm.errors"},
    "fwm.model_config": {"fwm.errors", "fwm.layers", "fwm.limits"},
    "fwm.config": {"fwm.errors", "fwm.files", "fwm.limits", "fwm.model_config", "fwm.optimizer"},
    "fwm.model": {"fwm.errors", "fwm.config", "fwm.ops", "fwm.layers"},
    "fwm.interop": {
        "fwm.errors", "fwm.config", "fwm.model", "fwm.model_config", "fwm.ops", "fwm.registry"
    },
    "fwm.reporting": {
        "fwm.errors", "fwm.files", "fwm.parallel", "fwm.perplexity", "fwm.terminal"
    },
    "fwm.reporting.sinks": {"fwm.errors", "fwm.files"},
    "fwm.reporting.figures": {"fwm.files", "fwm.reporting.sinks"},
    "fwm.reporting.compare": {
        "fwm.errors", "fwm.files", "fwm.reporting.figures", "fwm.reporting.sinks"
    },
    "fwm.reporting.report": {
        "fwm.errors", "fwm.files", "fwm.reporting.compare", "fwm.reporting.sinks"
    },
    "fwm.reporting.trace": set(),
    "fwm.reporting.reporter": {
        "fwm.perplexity", "fwm.reporting.figures", "fwm.reporting.sinks", "fwm.terminal"
    },
    "fwm.step": {"fwm.model", "fwm.ops", "fwm.optimizer", "fwm.parallel"},
    "fwm.score": {
        "fwm.errors", "fwm.config", "fwm.model", "fwm.ops.checks", "fwm.parallel",
        "fwm.perplexity", "fwm.registry",
    },
    "fwm.tasks": {"fwm.data", "fwm.errors", "fwm.model", "fwm.registry", "fwm.score", "fwm.step"},
    "fwm.workdir": {
        "fwm.checkpoint", "fwm.config", "fwm.data", "fwm.errors", "fwm.files", "fwm.model",
        "fwm.registry", "fwm.terminal", "fwm.version",
    },
    "fwm.transfer": {"fwm.config", "fwm.data", "fwm.errors", "fwm.files", "fwm.workdir"},
    "fwm.official": {
        "fwm.checkpoint", "fwm.config", "fwm.data", "fwm.errors", "fwm.files", "fwm.interop",
        "fwm.terminal", "fwm.workdir",
    },
    "fwm.retrieval": {
        "fwm.errors", "fwm.files", "fwm.limits", "fwm.ops", "fwm.optimizer", "fwm.terminal"
    },
    "fwm.look": {"fwm.generate", "fwm.layers", "fwm.model", "fwm.ops", "fwm.tasks"},
}  # fmt: skip
# Packages that must stay out: {where: {what}}.
FORBIDDEN = {
    "fwm": {"configs", "main", "tensorflow", "torch", "absl"},
    "fwm.ops": {"flax", "ml_collections", "optax"},
    "fwm.data": {"flax", "jax", "ml_collections", "optax", "orbax"},
    "fwm.model": {"ml_collections", "optax", "orbax"},
}


def within(module, package):
    return module == package or module.startswith(package + ".")


def imports(module):
    """Absolute names of all modules that a module imports, those inside functions included."""
    path = FILES[module]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from fwm import data` names a module, `from fwm.model import X` does not.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in FILES else node.module)
    return found


def test_the_source_is_found():
    assert {"fwm.model", "fwm.ops.fast_weights", "fwm.train"} <= FILES.keys()
    assert "fwm.ops.softmax" in imports("fwm.layers.softmax")


@pytest.mark.parametrize("package", ALLOWED)
def test_nothing_is_imported_from_above(package):
    for module in (m for m in FILES if within(m, package)):
        own = {m for m in imports(module) if within(m, "fwm")}
        foreign = {m for m in own if not within(m, package)}
        wrong = {m for m in foreign if not any(within(m, allowed) for allowed in ALLOWED[package])}
        assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_that_stay_out(package):
    for module in (m for m in FILES if within(m, package)):
        out = FORBIDDEN[package] - ({"torch"} if module == "fwm.official" else set())
        wrong = {name for name in imports(module) if name.split(".")[0] in out}
        assert not wrong, f"{module} imports {sorted(wrong)}"


def test_no_circular_imports():
    graph = {module: imports(module) & FILES.keys() for module in FILES}
    done: set[str] = set()

    def visit(module, path):
        assert module not in path, f"circular: {' -> '.join([*path, module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    # A package's own __init__ gathers its parts, which import from one another, not from it.
    for module in FILES:
        visit(module, ())


# What runs the code that is in its input.
EVALUATING = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "torch"}


@pytest.mark.parametrize("path", [*FILES.values(), *ROOT.glob("configs/*.py"), ROOT / "main.py"])
def test_nothing_is_unpickled_or_evaluated(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found = {name.split(".")[0] for name in names} & EVALUATING
            assert found <= ({"torch"} if path == FILES["fwm.official"] else set())
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load":  # It reads arrays and executes nothing.
                assert "weights_only=True" in map(ast.unparse, node.keywords)
            assert called not in ("eval", "exec", "compile", "__import__")
            allowed = [k for k in node.keywords if k.arg == "allow_pickle"]
            assert all(ast.unparse(k.value) == "False" for k in allowed)


def test_no_drawer_for_everything():
    assert not {name for name in FILES if name.split(".")[-1] in ("utils", "util", "helpers")}
