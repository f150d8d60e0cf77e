"""Mamba-2's recurrence: the sum rule with a decay by head and token (Dao and Gu 2024).

    python main.py --config=configs/mamba2.py:small --config.data.dir=/data/wikitext-103

arXiv 2405.21060: rule sum, decay by head, one write; C, B, x there are q, k, v here, and go through
a short convolution and SiLU. Its step size weighs what is written, too, its skip D x goes around
the memory, all heads share B and C, and its gate comes before the norm: not so here.
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
        update_rule="sum",
        attn_normalization="none",
        decay="head",
        short_conv=4,
        output_gate=True,
    )
