"""FastWeightAttention in a flax.linen model of one's own, read in one piece and in two.

python -m examples.linen_model
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fwm.layers import FastWeightAttention


class Model(nn.Module):
    """[B, T] int32 -> logits [B, T, n_token], and what each layer's memory holds at the end."""

    n_token: int
    n_layer: int = 2
    width: int = 16

    @nn.compact
    def __call__(self, tokens, memory=None):
        x, after = nn.Embed(self.n_token, self.width)(tokens), []
        for state in memory or [None] * self.n_layer:
            read, state = FastWeightAttention(n_head=2, d_head=8)(nn.LayerNorm()(x), state)
            x = x + read
            x = x + nn.Dense(self.width)(nn.relu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))
            after.append(state)
        return nn.Dense(self.n_token)(x), after


model = Model(n_token=11)
tokens = jax.random.randint(jax.random.key(0), (3, 20), 0, 11)
variables = jax.jit(model.init)(jax.random.key(1), tokens)

logits, memory = jax.jit(model.apply)(variables, tokens)
first, half = jax.jit(model.apply)(variables, tokens[:, :9])
second, end = jax.jit(model.apply)(variables, tokens[:, 9:], half)

if __name__ == "__main__":
    print(f"logits {logits.shape}, memory of a layer {memory[0].weights.shape}")
    error = jnp.abs(jnp.concatenate([first, second], axis=1) - logits).max()
    print(f"in two pieces, the second from the memory of the first: off by {error:.0e}")
