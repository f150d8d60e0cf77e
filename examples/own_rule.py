"""One's own update rule: the sum rule with a decay that a projection of the token decides.

    python main.py --config=examples/own_rule.py

W_t = exp(g_t) W_(t-1) + k_t v_t^T with a log decay g_t <= 0 per head and token (Mamba-2's
recurrence). `step` alone is enough; `forward` is what a group of chunks makes of it, faster.
"""

import jax
import jax.numpy as jnp

from fwm.config import build
from fwm.ops import UPDATE_RULES, Chunked, Input, Rule


def step(w, k, v, g):
    return jnp.exp(g)[..., None, None] * w + k[..., :, None] * v[..., None, :]


def forward(m, q, k, v, g):
    def chunk(m, tokens):
        q, k, v, g = tokens
        g = jnp.cumsum(g, axis=1)  # [R, C, 1]: the log decay since the chunk began
        reads = (q @ k.mT) * jnp.exp(jnp.where(jnp.tri(g.shape[1]) > 0, g - g.mT, -jnp.inf))
        out = reads @ v + (jnp.exp(g) * q) @ m.mT
        return jnp.exp(g[:, -1:]) * m + v.mT @ (jnp.exp(g[:, -1:] - g) * k), out

    return *jax.lax.scan(chunk, m, (q, k, v, g)), None


DECAY = Input("decay", lambda x: -jax.nn.softplus(x))
UPDATE_RULES["decayed_sum"] = Rule(step, (DECAY,), chunked=Chunked(forward))


def get_config(options=""):
    return build(options, feature_map="elu", update_rule="decayed_sum")
