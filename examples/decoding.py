"""Decoding one token at a time: a layer and a model, in constant time and memory per token.

python -m examples.decoding

Without positions what a model knows of the past is its memory alone, so that it can go on from any
token. (`python main.py --mode=generate` does this for trained runs, with positions as well.)
"""

import jax
import jax.numpy as jnp

from fwm.layers import FastWeightAttention
from fwm.model import LanguageModel, ModelConfig, empty_memory

# A layer: `state` is all that it keeps of the tokens before.
layer = FastWeightAttention(n_head=2, d_head=8)
x = jax.random.normal(jax.random.key(0), (3, 20, 16))  # [B, T, D]
layer_variables = jax.jit(layer.init)(jax.random.key(1), x)


def read(state, token):
    """One token [B, D] -> the next state, and what the layer has read [B, D]."""
    y, state = layer.apply(layer_variables, token[:, None], state)
    return state, y[:, 0]


whole, _ = jax.jit(layer.apply)(layer_variables, x)
by_token = jax.jit(lambda x: jax.lax.scan(read, layer.empty(3, 16), x.swapaxes(0, 1))[1])(x)

# A model: what it writes after a prompt, the most probable token every time.
sizes = dict(d_model=16, n_head=2, d_head=8, d_inner=32, n_layer=2)
model = LanguageModel(ModelConfig(n_token=11, no_pos=True, **sizes))
prompt = jnp.array([[1, 2, 3, 4]])
variables = jax.jit(model.init)(jax.random.key(2), prompt, prompt)


def write(carry, _):
    """The last token [B] and the memory -> those after one more token, and that token."""
    token, memory = carry
    log_probs, memory = model.apply(variables, token[:, None], memory, method="log_probs")
    token = jnp.argmax(log_probs, axis=-1)
    return (token, memory), token


@jax.jit
def answer(prompt):
    _, memory = model.apply(
        variables, prompt[:, :-1], empty_memory(model.config, 1), method="hidden"
    )
    return jax.lax.scan(write, (prompt[:, -1], memory), length=12)[1][:, 0]


written = answer(prompt)

if __name__ == "__main__":
    print(f"layer, token by token: off by {jnp.abs(by_token.swapaxes(0, 1) - whole).max():.0e}")
    print("after", *prompt[0].tolist(), "comes", *written.tolist())
