"""RetNet: the sum rule with a constant decay by head, 1 - 2^(-5-h) (Sun et al. 2023).

    python main.py --config=configs/retnet.py:small --config.data.dir=/data/wikitext-103

arXiv 2307.08621: rule sum, decay constant by head, one write. Its rotations of q and k (xPos) are
not there; its norm and gate of what is read are.
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
        decay="constant",
        output_gate=True,
    )
