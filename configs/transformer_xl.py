"""Transformer-XL: softmax attention over a memory, relative positions (Dai et al. 2019).

    python main.py --config=configs/transformer_xl.py:small --config.data.dir=/data/wikitext-103

Official: `--attn_type 0`. Paper section 6.3, the baseline with context carried over.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see configs/default.py."""
    return default.build(options, mixer="transformer_xl")
