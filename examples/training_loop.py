"""fwm's language model in a training loop by hand, with optax: bytes of this very file.

python -m examples.training_loop

The memory goes from segment to segment (`no_pos`, as the paper's carry-over), as data: gradients
stop at the border.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fwm.model import LanguageModel, ModelConfig, empty_memory

ROWS, LENGTH, STEPS = 4, 32, 60
sizes = dict(d_model=32, n_head=2, d_head=8, d_inner=64, n_layer=1)
model = LanguageModel(ModelConfig(n_token=256, no_pos=True, **sizes))
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01))

text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
text = text[: len(text) // ROWS * ROWS].reshape(ROWS, -1)


@jax.jit
def update(params, opt_state, memory, tokens, targets):
    def loss(params):
        nll, after = model.apply({"params": params}, tokens, targets, memory)
        return jnp.mean(nll), after

    (value, memory), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    changes, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, changes), opt_state, memory, value


segment = text[:, :LENGTH]
params = jax.jit(model.init)(jax.random.key(0), segment, segment)["params"]
opt_state, losses = optimizer.init(params), []
n_segment = (text.shape[1] - 1) // LENGTH
for step in range(STEPS):
    start = step % n_segment * LENGTH
    if start == 0:
        memory = empty_memory(model.config, ROWS)
    tokens, targets = (text[:, start + shift :][:, :LENGTH] for shift in (0, 1))
    params, opt_state, memory, value = update(params, opt_state, memory, tokens, targets)
    losses.append(float(value))

if __name__ == "__main__":
    print(f"{losses[0]:.2f} nats per byte at first, {losses[-1]:.2f} after {STEPS} steps")
