"""The mixers that fwm has, by name."""

from fwm.layers.fast_weight import FastWeightAttention
from fwm.layers.mixer import MIXERS
from fwm.layers.softmax import SoftmaxAttention
from fwm.layers.transformer_xl import RelativeAttention

MIXERS["fast_weight"] = FastWeightAttention
MIXERS["softmax"] = SoftmaxAttention
MIXERS["transformer_xl"] = RelativeAttention
