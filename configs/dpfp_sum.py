"""DPFP features (paper section 5.3), sum rule, normalised output.

    python main.py --config=configs/dpfp_sum.py:small --config.data.dir=/data/wikitext-103

Official: `--attn_type 36`, documented but broken there. Works here.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return default.build(
        options,
        mixer="fast_weight",
        feature_map="dpfp",
        update_rule="sum",
        attn_normalization="output",
    )
