"""Gated Linear Attention: the sum rule with a decay by key feature and token (Yang et al. 2023).

    python main.py --config=configs/gla.py:small --config.data.dir=/data/wikitext-103

arXiv 2312.06635: rule sum, decay by channel, one write. Its log decay is log sigmoid(W x + b) / 16
with W of rank 16, which is exp(a) softplus of -(W x + b) with a = -log 16; here a is learned, and W
has full rank.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return default.build(
        options,
        mixer="fast_weight",
        no_pos=True,
        feature_map="identity",
        update_rule="sum",
        attn_normalization="none",
        decay="channel",
        output_gate=True,
    )
