"""Linear Transformer: elu+1 features, sum rule, normalised output (Katharopoulos et al. 2020).

    python main.py --config=configs/linear_sum.py:small --config.data.dir=/data/wikitext-103

Official: `--attn_type 34`. Paper section 6.3.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return default.build(
        options,
        mixer="fast_weight",
        feature_map="elu",
        update_rule="sum",
        attn_normalization="output",
    )
