"""FastWeightAttention in a flax.nnx model, through nnx's bridge to linen; trained by nnx.Optimizer.

python -m examples.nnx_model
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fwm.layers import FastWeightAttention


class Model(nnx.Module):
    """[B, T] int32 -> logits [B, T, n_token]."""

    def __init__(self, n_token, width, rngs):
        self.embed = nnx.Embed(n_token, width, rngs=rngs)
        mixer = nnx.bridge.ToNNX(FastWeightAttention(n_head=2, d_head=8), rngs=rngs)
        # Its parameters are made from the shape of what it will read.
        self.mixer = nnx.bridge.lazy_init(mixer, jnp.zeros((1, 1, width)))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, n_token, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        read, _ = self.mixer(self.norm(x))
        return self.out(x + read)


@nnx.jit
def update(model, optimizer, tokens):
    def loss(model):
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


model = Model(n_token=8, width=16, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 8)
tokens = jnp.concatenate([tokens, tokens], axis=1)  # the second half can be known from the first
losses = [float(update(model, optimizer, tokens)) for _ in range(40)]

if __name__ == "__main__":
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
