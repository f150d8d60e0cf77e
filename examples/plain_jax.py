"""An op in plain jax: jit, grad, vmap, remat, shard_map, and products with the Hessian.

python -m examples.plain_jax
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fwm.ops import delta_rule, elu_plus_one, sum_normalize


def loss(x_q, x_k, v, beta):
    """[B, T, N, H] (beta [B, T, N]) -> []: how far what is read lies from the value written."""
    q, k = (sum_normalize(elu_plus_one(x)) for x in (x_q, x_k))
    out, _ = delta_rule(q, k, v, beta)
    return jnp.mean((out - v) ** 2)


mesh = jax.make_mesh((len(jax.devices()),), ("rows",), axis_types=(AxisType.Auto,))
batch = 2 * len(jax.devices())
x_q, x_k, v = jax.random.normal(jax.random.key(0), (3, batch, 12, 2, 4))
beta = jax.nn.sigmoid(jax.random.normal(jax.random.key(1), (batch, 12, 2)))
arrays = (x_q, x_k, v, beta)

gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
whole = jax.jit(gradient)(*arrays)

# Computed again in the backward pass instead of kept.
recomputed = jax.jit(jax.grad(jax.remat(loss), argnums=(0, 1, 2, 3)))(*arrays)

# One gradient per row of the batch: what does not belong to it is not in it.
rows = jax.tree.map(lambda x: x[:, None], arrays)
per_row = jax.jit(jax.vmap(gradient))(*rows)

# Each device its own rows; the mean over the devices is the mean over the batch.
split = jax.shard_map(
    lambda *arrays: jax.lax.pmean(loss(*arrays), "rows"),
    mesh=mesh, in_specs=P("rows"), out_specs=P(),
)  # fmt: skip
on_devices = jax.jit(jax.grad(split, argnums=(0, 1, 2, 3)))(*arrays)

# The Hessian times a direction, forward over reverse. Forward mode alone is refused: the ops have
# gradients by hand; `fwm.ops.recurrent` has the same rules for any derivative, token by token.
direction = jax.tree.map(jnp.ones_like, arrays)
_, hessian_product = jax.jit(lambda x: jax.jvp(lambda x: gradient(*x), (x,), (direction,)))(arrays)

if __name__ == "__main__":
    print(f"loss {loss(*arrays):.4f} on {len(jax.devices())} device(s)")
    for name, found in (("remat", recomputed), ("vmap", per_row), ("shard_map", on_devices)):
        scale = batch if name == "vmap" else 1  # each row's own mean, not the batch's
        pairs = zip(found, whole, strict=True)
        error = max(float(jnp.abs(a.reshape(b.shape) / scale - b).max()) for a, b in pairs)
        print(f"{name}: the same gradients, off by {error:.0e}")
