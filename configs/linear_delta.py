"""Delta Net: elu+1 features, the paper's delta rule, no attention normalisation.

    python main.py --config=configs/linear_delta.py:small --config.data.dir=/data/wikitext-103

Official: `--attn_type 24 --skip_attn_normalization`. Paper section 6.3, at small: 34.1 (valid),
35.2 (test).
"""

from ml_collections import ConfigDict

from configs import default


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return default.build(
        options,
        mixer="fast_weight",
        feature_map="elu",
        update_rule="delta",
        attn_normalization="none",
    )
