"""Feature maps and fast weight operations on plain arrays; no parameters, no modules."""

from fwm.ops import recurrent
from fwm.ops.fast_weights import (
    ATTN_NORMALIZATIONS,
    UPDATE_RULES,
    FastWeightState,
    delta_rule,
    fast_weight_attention,
    sum_rule,
)
from fwm.ops.feature_maps import dpfp, elu_plus_one, favor, favor_projection, sum_normalize

__all__ = [
    "ATTN_NORMALIZATIONS",
    "UPDATE_RULES",
    "FastWeightState",
    "delta_rule",
    "dpfp",
    "elu_plus_one",
    "fast_weight_attention",
    "favor",
    "favor_projection",
    "recurrent",
    "sum_normalize",
    "sum_rule",
]
