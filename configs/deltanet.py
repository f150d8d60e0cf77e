"""DeltaNet: the delta rule with normalised keys and a short convolution (Yang et al. 2024).

    python main.py --config=configs/deltanet.py:small --config.data.dir=/data/wikitext-103

arXiv 2406.06484: rule delta, no decay, keys SiLU and L2 norm, beta in (0, 1), one write. Its norm
of what is read comes with a gate here: `output_gate=True`.
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
        update_rule="delta",
        attn_normalization="none",
        key_norm="l2",
        short_conv=4,
    )
