"""Gated DeltaNet-2: what is removed and what is written have gates of their own, by feature.

    python main.py --config=configs/gated_deltanet2.py:small --config.data.dir=/data/wikitext-103

arXiv 2605.22791: rule delta with beta 1, erase key b * k with b by key feature, values w * v with w
by value feature, decay by channel, keys SiLU and L2 norm, one write. Here b and w are sigmoids of
projections of the token at full rank.
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
        update_rule="gated_delta2",
        attn_normalization="none",
        key_norm="l2",
        decay="channel",
        short_conv=4,
        output_gate=True,
    )
