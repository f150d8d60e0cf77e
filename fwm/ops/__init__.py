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
from fwm.ops.read_out import bounded_delta_rule, read_weights

__all__ = [
    "ATTN_NORMALIZATIONS",
    "UPDATE_RULES",
    "FastWeightState",
    "bounded_delta_rule",
    "delta_rule",
    "dpfp",
    "elu_plus_one",
    "fast_weight_attention",
    "favor",
    "favor_projection",
    "read_weights",
    "recurrent",
    "sum_normalize",
    "sum_rule",
]
