"""Error-free linear attention: the delta rule as an exact step in time, by the key's length.

    python main.py --config=configs/efla.py:small --config.data.dir=/data/wikitext-103

arXiv 2512.12602: rule delta with the strength (1 - exp(-beta l)) / l, l = k.k, no decay, keys not
normalised, one write. Here beta is a sigmoid and keys go through SiLU, as in DeltaNet.
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
        update_rule="error_free",
        attn_normalization="none",
        key_norm="none",
        short_conv=4,
    )
