"""The Gated DeltaNet layer of Qwen3-Next: read from its state_dict, and computed as there.

transformers 5.24, `Qwen3NextGatedDeltaNet` (Yang et al. 2024, arXiv 2412.06464). Nk key heads of
width Hk, Nv value heads of width Hv, r = Nv / Nk value heads to a key head.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fwm import ops
from fwm.errors import UserError

ARGUMENTS = (
    "n_key_head", "n_value_head", "head_k_dim", "head_v_dim", "conv_kernel", "norm_eps"
)  # fmt: skip


class GatedDeltaNetState(NamedTuple):
    """What the layer carries: its memory, and the last inputs of its convolution."""

    weights: Float[Array, "B N K V"]
    recent: Float[Array, "B P C"]


class GatedDeltaNet(nn.Module):
    """q, k, v, z, b, a = W x; q, k, v through a short convolution and SiLU; delta rule with decay.

    q and k are L2-normalised, q divided by sqrt(Hk), beta = sigmoid(b), the log decay of a value
    head is -exp(A_log) softplus(a + dt_bias); what is read goes through an RMS norm over Hv and is
    multiplied by SiLU(z). All in float32. Parameters have the names and axes of the original.
    """

    n_key_head: int
    n_value_head: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel: int
    norm_eps: float

    def shapes(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """Of all parameters, by their official names."""
        keys, values = self.n_key_head * self.head_k_dim, self.n_value_head * self.head_v_dim
        return {
            "in_proj_qkvz.weight": (2 * keys + 2 * values, d_model),
            "in_proj_ba.weight": (2 * self.n_value_head, d_model),
            "conv1d.weight": (2 * keys + values, 1, self.conv_kernel),
            "A_log": (self.n_value_head,),
            "dt_bias": (self.n_value_head,),
            "norm.weight": (self.head_v_dim,),
            "out_proj.weight": (d_model, values),
        }

    def empty(self, n_batch: int) -> GatedDeltaNetState:
        """What is carried before the first token."""
        shape = (n_batch, self.n_value_head, self.head_k_dim, self.head_v_dim)
        channels = self.shapes(0)["conv1d.weight"][0]
        recent = jnp.zeros((n_batch, self.conv_kernel - 1, channels))
        return GatedDeltaNetState(jnp.zeros(shape), recent)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], state: GatedDeltaNetState | None = None
    ) -> tuple[Float[Array, "B T D"], GatedDeltaNetState]:
        """`[B, T, D]` and what an earlier call returned (None: nothing) -> the same."""
        n_batch, length, d_model = x.shape
        n_key, n_value, d_k, d_v = (
            self.n_key_head, self.n_value_head, self.head_k_dim, self.head_v_dim
        )  # fmt: skip
        ratio = n_value // n_key
        draw = nn.initializers.normal(0.02)
        p = {name: self.param(name, draw, shape) for name, shape in self.shapes(d_model).items()}
        weights, recent = self.empty(n_batch) if state is None else state

        def project(name: str, x: Array) -> Array:
            return jnp.einsum("btd,cd->btc", x.astype(jnp.float32), p[name])

        def heads(x: Array, width: int) -> Array:
            return x.reshape(n_batch, length, -1, width)

        columns = heads(project("in_proj_qkvz.weight", x), 2 * (d_k + ratio * d_v))
        q, k, v, z = jnp.split(columns, (d_k, 2 * d_k, 2 * d_k + ratio * d_v), axis=-1)
        b, a = jnp.split(heads(project("in_proj_ba.weight", x), 2 * ratio), 2, axis=-1)
        flat = [part.reshape(n_batch, length, -1) for part in (q, k, v)]
        taps = p["conv1d.weight"][:, 0].T
        qkv, recent = ops.short_convolution(jnp.concatenate(flat, axis=-1), taps, recent)
        q, k, v = jnp.split(jax.nn.silu(qkv), (n_key * d_k, 2 * n_key * d_k), axis=-1)
        q, k = (jnp.repeat(ops.l2_normalize(heads(y, d_k)), ratio, axis=2) for y in (q, k))
        log_decay = ops.log_decay(heads(a, 1), p["A_log"], p["dt_bias"][:, None])
        out, weights = ops.delta_rule(
            q * d_k**-0.5,
            k,
            heads(v, d_v),
            jax.nn.sigmoid(heads(b, 1))[..., 0],
            weights,
            log_decay=log_decay[..., 0],
        )
        out = ops.gated_rms_norm(out, heads(z, d_v), p["norm.weight"], self.norm_eps)
        y = project("out_proj.weight", out.reshape(n_batch, length, -1))
        return y.astype(x.dtype), GatedDeltaNetState(weights, recent)


def from_gated_deltanet(
    arguments: Mapping[str, Any], state_dict: Mapping[str, Any]
) -> tuple[GatedDeltaNet, dict[str, dict[str, Array]]]:
    """A layer of Qwen3-Next: `y, state = module.apply(variables, x, state)`, any T at a time.

    Args:
        arguments: n_key_head, n_value_head, head_k_dim, head_v_dim, conv_kernel, norm_eps; and
            activation, where it is given, is silu.
        state_dict: arrays by their official names.

    Returns:
        The module, and its variables: the arrays as they are, in float32.

    Raises:
        UserError: an argument is missing, unknown or has no meaning, or an array is, or does not
            have the shape that the arguments give it.
    """
    given = dict(arguments)
    activation = given.pop("activation", "silu")
    if set(given) != set(ARGUMENTS) or activation != "silu":
        raise UserError(
            f"from_gated_deltanet takes the arguments {', '.join(ARGUMENTS)} (and activation, if "
            f"it is silu), got {', '.join(map(str, arguments)) or 'none'} with activation "
            f"{activation!r}."
        )
    module = GatedDeltaNet(**given)
    if any(given[name] < 1 for name in ARGUMENTS[:-1]) or module.n_value_head % module.n_key_head:
        raise UserError(
            "from_gated_deltanet needs sizes of at least 1 and a multiple of n_key_head as "
            f"n_value_head, got {given}."
        )
    first = state_dict.get("in_proj_qkvz.weight")
    shapes = module.shapes(0 if first is None else jnp.shape(first)[-1])
    if set(state_dict) != set(shapes):
        raise UserError(
            f"from_gated_deltanet needs the arrays {', '.join(shapes)}, got "
            f"{', '.join(map(str, state_dict)) or 'none'}."
        )
    for name, shape in shapes.items():
        if jnp.shape(state_dict[name]) != shape:
            raise UserError(
                f"from_gated_deltanet: {name} must have the shape {shape} by the arguments "
                f"{given}, got {jnp.shape(state_dict[name])}."
            )
    params = {name: jnp.asarray(state_dict[name], jnp.float32) for name in shapes}
    return module, {"params": params}
