"""The parts of a model as flax.linen modules: mixers, blocks, embedding and softmax."""

from fwm.layers.blocks import Block
from fwm.layers.fast_weight import FastWeightAttention
from fwm.layers.mixer import Mixer, Shared
from fwm.layers.mixers import MIXERS
from fwm.layers.parts import FeedForward, Norm
from fwm.layers.softmax import SoftmaxAttention
from fwm.layers.transformer_xl import RelativeAttention
from fwm.layers.vocabulary import AdaptiveEmbedding, AdaptiveSoftmax
from fwm.ops.dropout import Dropout

__all__ = [
    "MIXERS",
    "AdaptiveEmbedding",
    "AdaptiveSoftmax",
    "Block",
    "Dropout",
    "FastWeightAttention",
    "FeedForward",
    "Mixer",
    "Norm",
    "RelativeAttention",
    "Shared",
    "SoftmaxAttention",
]
