"""DPFP features (paper section 5.3), the paper's delta rule, no attention normalisation.

    python main.py --config=configs/dpfp_delta.py:small --config.data.dir=/data/wikitext-103

Official: `--attn_type 26 --skip_attn_normalization --dpfp_n_roll 2`. Paper section 6.3.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return default.build(
        options,
        mixer="fast_weight",
        feature_map="dpfp",
        update_rule="delta",
        attn_normalization="none",
    )
