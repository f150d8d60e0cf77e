"""Reading the golden files: numbers measured from the official code, and models made of them."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fwm.interop import from_lmtool
from fwm.model import LanguageModel

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())


def files(*kinds: str) -> list:
    """Names of the files of these kinds, as parameters of a test; the first of each is quick."""
    parameters = []
    for kind in kinds:
        first, *others = (f["file"] for f in MANIFEST["files"] if f["kind"] == kind)
        parameters += [pytest.param(first, marks=pytest.mark.quick), *others]
    return parameters


def load(name: str, **changes):
    """A file as (arrays, its config, model, variables); `changes` to the model's arguments."""
    with np.load(GOLDEN / name) as npz:
        arrays = dict(npz)
    config = json.loads(str(arrays["config"]))
    projections = part(arrays, "proj_matrix/") or None
    arguments = config["model_kwargs"] | changes
    model_config, variables = from_lmtool(arguments, part(arrays, "param/"), projections)
    return arrays, config, LanguageModel(model_config), variables


def part(arrays: dict, prefix: str) -> dict:
    """The arrays under a prefix, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def batch_first(array: np.ndarray) -> jnp.ndarray:
    """[T, B, ...] as [B, T, ...]."""
    return jnp.asarray(np.swapaxes(array, 0, 1))
