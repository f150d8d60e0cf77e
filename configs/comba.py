"""Comba: the delta rule that removes a part c of what it finds (Hu et al. 2025).

    python main.py --config=configs/comba.py:small --config.data.dir=/data/wikitext-103

arXiv 2506.02475: rule delta, erase key c k with c by head and token, decay by head, keys SiLU and
L2 norm, beta in (0, 1), one write. Its correction of the query, q - d k, is not there.
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
        update_rule="comba",
        attn_normalization="none",
        key_norm="l2",
        decay="head",
        short_conv=4,
        output_gate=True,
    )
