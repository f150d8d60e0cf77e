"""Feature maps and fast weight operations on plain arrays; no parameters, no modules.

>>> import jax
>>> from fwm.ops import delta_rule, dpfp, sum_normalize
>>> x_q, x_k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 8, 16))  # each [B, T, N, H]
>>> q, k = (sum_normalize(dpfp(x, 2)) for x in (x_q, x_k))  # features that sum to one
>>> beta = jax.nn.sigmoid(jax.random.normal(jax.random.key(1), (2, 100, 8)))  # write strength
>>> out, weights = delta_rule(q, k, v, beta)
>>> q.shape, out.shape, weights.shape  # [B, T, N, K], [B, T, N, V], [B, N, K, V]
((2, 100, 8, 64), (2, 100, 8, 16), (2, 8, 64, 16))
>>> out, weights = delta_rule(q, k, v, beta, weights)  # goes on from what it has learned
"""

from fwm.ops import recurrent
from fwm.ops.chunks import Chunked
from fwm.ops.fast_weights import (
    ATTN_NORMALIZATIONS,
    FastWeightState,
    check_composition,
    fast_weight_attention,
)
from fwm.ops.feature_maps import (
    FEATURE_MAPS,
    KEY_NORMS,
    FeatureMap,
    dpfp,
    elu_plus_one,
    favor,
    favor_projection,
    l2_normalize,
    sum_normalize,
)
from fwm.ops.gates import gated_rms_norm, log_decay, short_convolution
from fwm.ops.general import composed
from fwm.ops.read_out import bounded_delta_rule, read_weights
from fwm.ops.recurrent import Input, Rule, Update
from fwm.ops.rules import UPDATE_RULES, delta_rule, sum_rule

__all__ = [
    "ATTN_NORMALIZATIONS",
    "FEATURE_MAPS",
    "KEY_NORMS",
    "UPDATE_RULES",
    "Chunked",
    "FastWeightState",
    "FeatureMap",
    "Input",
    "Rule",
    "Update",
    "bounded_delta_rule",
    "check_composition",
    "composed",
    "delta_rule",
    "dpfp",
    "elu_plus_one",
    "fast_weight_attention",
    "favor",
    "favor_projection",
    "gated_rms_norm",
    "l2_normalize",
    "log_decay",
    "read_weights",
    "recurrent",
    "short_convolution",
    "sum_normalize",
    "sum_rule",
]
