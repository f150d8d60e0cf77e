"""One's own mixer: a causal depthwise convolution, its width a config key of its own.

python main.py --config=examples/own_mixer.py --config.model.width=6
"""

import flax.linen as nn
import jax.numpy as jnp

from fwm.config import build
from fwm.layers import MIXERS, Mixer
from fwm.layers.parts import matrix_init


class Convolution(Mixer):
    carries = "asked"
    width: int = 4  # tokens that a channel sees, its own included

    @nn.compact
    def __call__(self, x, carried=None, *, shared=None, dropout=None, last=None):
        taps = self.param("taps", matrix_init, (self.width, x.shape[-1])).astype(x.dtype)
        past = self.empty(*x.shape[::2]) if carried is None else carried
        seen = jnp.concatenate([past.astype(x.dtype), x], axis=1)
        out = sum(taps[None, None, i] * seen[:, i : i + x.shape[1]] for i in range(self.width))
        return out[:, -(last or 0) :], seen[:, x.shape[1] :].astype(past.dtype)

    def empty(self, batch_size, d_model):
        return jnp.zeros((batch_size, self.width - 1, d_model))


MIXERS["convolution"] = Convolution


def get_config(options=""):
    return build(options, mixer="convolution")
