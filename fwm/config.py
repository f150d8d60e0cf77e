"""Stands in for the settings' own file, which replaces this one."""

import importlib
from typing import Any

from fwm.model import ModelConfig, build_config

__all__ = ["ModelConfig", "build", "build_config", "defaults"]


def defaults() -> Any:
    """All keys with their defaults."""
    return importlib.import_module("configs.default").defaults()


def build(options: str = "", **model: Any) -> Any:
    """The default config with a preset, fields of `model`, and options."""
    return importlib.import_module("configs.default").build(options, **model)
