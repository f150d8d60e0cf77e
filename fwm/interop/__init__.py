"""Other people's weights <-> ours, one file per origin."""

from fwm.interop.lmtool import (
    ATTN_TYPES,
    arguments_to_lmtool,
    config_from_lmtool,
    from_lmtool,
    to_lmtool,
)

__all__ = [
    "ATTN_TYPES", "arguments_to_lmtool", "config_from_lmtool", "from_lmtool", "to_lmtool",
]  # fmt: skip
