"""Other people's weights <-> ours, one file per origin."""

from fwm.interop.gated_deltanet import GatedDeltaNet, from_gated_deltanet
from fwm.interop.lmtool import (
    ATTN_TYPES,
    arguments_to_lmtool,
    config_from_lmtool,
    from_lmtool,
    to_lmtool,
)

__all__ = [
    "ATTN_TYPES",
    "GatedDeltaNet",
    "arguments_to_lmtool",
    "config_from_lmtool",
    "from_gated_deltanet",
    "from_lmtool",
    "to_lmtool",
]
