"""Transformer-XL: softmax attention over a memory, relative positions (Dai et al. 2019).

    python main.py --config=configs/transformer_xl.py:small --config.data.dir=/data/wikitext-103

Official: `--attn_type 0`. Paper section 6.3, the baseline with context carried over.
"""

from ml_collections import ConfigDict

from configs import default

# It remembers one segment.
PRESETS = {
    "tiny": {"model": {"mem_len": 64}},
    "small": {"model": {"mem_len": 256}},
    "medium": {"model": {"mem_len": 384}, "train": {"max_step": 200_000, "warmup_step": 1000}},
}


def get_config(options: str = "") -> ConfigDict:
    """`options`: a preset (tiny, small, medium), then options; see fwm/config.py."""
    return default.build(options, presets=PRESETS, mixer="transformer_xl")
