"""What is useful alone: the examples in the docstrings, and the package that pip installs."""

import collections
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

from program import SIZES, write_text

ROOT = Path(__file__).parents[1]


# Of fwm as installed, outside the checkout: modules and the failures of their examples.
INSTALLED = """
import doctest, importlib, importlib.util
for name in ("fwm.ops", "fwm.layers.fast_weight"):
    module = importlib.import_module(name)
    print(module.__file__, *doctest.testmod(module))
print(importlib.util.find_spec("configs"), importlib.util.find_spec("main"))

# One's own rule, in a file that lies here, is trained and evaluated.
from pathlib import Path
from fwm import evaluate, train, workdir
import own_rule
config, run = own_rule.get_config(), Path("run")
config.update_from_flattened_dict(SETTINGS)
silent = train.run(config, run) or evaluate.run(config, run, ["valid"], report=lambda line: None)
print(silent[0]["tokens"], workdir.open(run).model.config.update_rule)
"""


def required(path):
    """The lines of a list of requirements, without comments."""
    lines = (ROOT / path).read_text().splitlines()
    return {line for line in lines if line and line[0] != "#"}


def check_requirements(installed):
    """What pip is told is what the lists say: of the package, and of its extras."""
    by_extra = collections.defaultdict(set)
    for line in installed.requires:
        needed, _, condition = line.partition("; ")
        by_extra[condition].add(needed)
    extra = lambda name: by_extra.pop(f'extra == "{name}"')
    assert by_extra.pop("") == required("requirements.txt")
    assert extra("cuda") == {"jax[cuda13]>=0.10"}
    several = extra("text") | extra("wandb")
    assert extra("test") - {"fwm[text,wandb]"} | several == required("tests/requirements.txt")
    assert not by_extra


def test_the_installed_package(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "fwm", source / "fwm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "main.py"):
        shutil.copy(ROOT / name, source)
    # Neither an index nor a network: setuptools is here already.
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-index", "--no-deps", "--verbose"]
    done = subprocess.run(
        [*build, "--no-build-isolation", f"--wheel-dir={tmp_path}"],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "DeprecationWarning" not in done.stdout
    (wheel,) = tmp_path.glob("fwm-*.whl")
    with ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    check_requirements(metadata.PathDistribution(next((tmp_path / "site").glob("*.dist-info"))))
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fwm").rglob("*.py")}
    assert files == modules | {"fwm/reporting/report.html", "fwm/reporting/report.js"}
    shutil.rmtree(source)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(ROOT / "examples" / "own_rule.py", elsewhere)
    text = write_text(elsewhere / "text")
    settings = SIZES | {"data.dir": str(text), "data.cache_dir": str(elsewhere / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", f"SETTINGS = {settings}\n{INSTALLED}"],
        cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *examples, others = done.stdout.splitlines()[:3]
    assert done.stdout.splitlines()[-1] == "23 decayed_sum"
    for line, name in zip(examples, ("ops/__init__.py", "layers/fast_weight.py"), strict=True):
        file, failed, attempted = line.rsplit(" ", 2)
        assert (file, failed) == (str(tmp_path / "site" / "fwm" / name), "0")
        assert int(attempted) >= 7
    assert others == "None None"
