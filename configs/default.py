"""The default config: DPFP and the delta rule. All keys, presets and options: fwm/config.py."""

from ml_collections import ConfigDict

from fwm.config import PRESETS, build, defaults

__all__ = ["PRESETS", "build", "defaults", "get_config"]


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return build(options)
