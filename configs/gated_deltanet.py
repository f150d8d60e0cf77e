"""Gated DeltaNet: the delta rule with a decay by head and token (Yang et al. 2024).

    python main.py --config=configs/gated_deltanet.py:small --config.data.dir=/data/wikitext-103

arXiv 2412.06464: rule delta, decay by head, keys SiLU and L2 norm, beta in (0, 1), one write. As in
Qwen3-Next, whose own layers `fwm.interop.from_gated_deltanet` reads.
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
        decay="head",
        short_conv=4,
        output_gate=True,
    )
