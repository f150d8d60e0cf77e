"""Three layers of fast weights, then one of softmax attention in a sliding window.

    python main.py --config=configs/hybrid.py:small --config.data.dir=/data/wikitext-103
    python main.py --config=configs/hybrid.py:tiny,carry_over_fast_weight

The delta rule with SiLU features of L2 norm 1, and softmax layers in between that see a window
only, so that memory and time per token stay constant: the hybrids of Yang et al. 2024 (arXiv
2406.06484, section 4), there layer about layer; three to one as in Kimi Linear (Kimi Team 2025,
arXiv 2510.26692). Their models are larger and of other texts: there is no number to reach.
Another pattern: `--config.model.mixer="('fast_weight', 'softmax')"`.
"""

from ml_collections import ConfigDict

from configs import default

# The window is half a segment.
PRESETS = {
    "tiny": {"model": {"n_layer": 4, "attention_window": 32}},
    "small": {"model": {"attention_window": 128}},
    "medium": {"model": {"attention_window": 192}},
}


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return default.build(
        options,
        presets=PRESETS,
        mixer=("fast_weight", "fast_weight", "fast_weight", "softmax"),
        feature_map="silu",
        key_norm="l2",
        update_rule="delta",
        attn_normalization="none",
    )
