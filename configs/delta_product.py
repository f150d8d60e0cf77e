"""DeltaProduct: two steps of the delta rule a token, eigenvalues down to -1 (Siems et al. 2025).

    python main.py --config=configs/delta_product.py:small --config.data.dir=/data/wikitext-103

arXiv 2502.10297: rule delta, no decay (with one it is Gated DeltaProduct: `decay=head`), keys SiLU
and L2 norm, beta in (0, 2), two writes; `n_step=3` makes three.
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
        beta_max=2.0,
        n_step=2,
        short_conv=4,
        output_gate=True,
    )
