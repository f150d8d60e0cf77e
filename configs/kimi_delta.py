"""Kimi Delta Attention: the delta rule with a decay by key feature (Kimi Team 2025).

    python main.py --config=configs/kimi_delta.py:small --config.data.dir=/data/wikitext-103

arXiv 2510.26692: rule delta, decay by channel, keys SiLU and L2 norm, beta in (0, 1), one write.
Its projections of decay and gate have a low rank, and its gate is a sigmoid: here full, and SiLU.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return default.build(
        options,
        mixer="fast_weight",
        no_pos=True,
        feature_map="silu",
        update_rule="delta",
        attn_normalization="none",
        key_norm="l2",
        decay="channel",
        short_conv=4,
        output_gate=True,
    )
