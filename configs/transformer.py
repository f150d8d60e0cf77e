"""Standard Transformer: causal softmax attention, absolute positions.

    python main.py --config=configs/transformer.py:small --config.data.dir=/data/wikitext-103

Official: `--attn_type 2`. Paper section 6.3, the baseline.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return default.build(options, mixer="softmax")
