"""Performer: FAVOR+ features, sum rule, normalised output (Choromanski et al. 2021).

    python main.py --config=configs/performer_sum.py:small --config.data.dir=/data/wikitext-103

Official: `--attn_type 35 --performer_proj_dim 16`. Paper section 6.3.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return default.build(
        options,
        mixer="fast_weight",
        feature_map="favor",
        update_rule="sum",
        attn_normalization="output",
    )
