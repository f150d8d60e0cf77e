"""Attention with a fast weight memory: feature map, update rule, normalisation."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key

from fwm import ops
from fwm.errors import UserError
from fwm.layers.mixer import Mixer, Shared
from fwm.layers.parts import Heads, project
from fwm.ops.dropout import Dropout


class FastWeightAttention(Mixer):
    """Attention with a fast weight memory (paper sections 3 and 4).

    `q, k, v, ... = split(W x)` per head, and so what else the rule reads, through the rule's own
    activation (`beta = sigmoid(.)` for the delta rule); `q, k` go through the feature map and are
    divided by their norm (by their sum for the delta rule, by nothing for the sum rule, unless
    `key_norm` says otherwise); the update rule writes `v` under `k` and reads with `q`; heads are
    mixed by a linear map. The output is scaled by 1/sqrt(d_head), as in the official recurrent
    layers, or, with `scale_output=False`, the scores are (the quadratic layers of the official
    toolkit, where it cancels except against the eps of the normalisation).

    It carries a `FastWeightState`, and works by itself:

    >>> import jax
    >>> from fwm.layers import FastWeightAttention
    >>> layer = FastWeightAttention(n_head=8, d_head=16, feature_map="dpfp", dpfp_n_roll=2)
    >>> x = jax.random.normal(jax.random.key(0), (2, 100, 128))  # [B, T, D]
    >>> variables = layer.init(jax.random.key(1), x)
    >>> y, state = layer.apply(variables, x)
    >>> y.shape, state.weights.shape  # [B, T, D], [B, N, K, V]
    ((2, 100, 128), (2, 8, 64, 16))
    >>> y, state = layer.apply(variables, x, state)  # the next 100 tokens, after those
    """

    carries = "asked"

    n_head: int
    d_head: int
    feature_map: str = "dpfp"  # elu, favor, dpfp, tanh, silu, identity
    update_rule: str = "delta"  # sum, delta
    attn_normalization: str = "none"  # none, output, output_and_key
    dpfp_n_roll: int = 2  # nu of DPFP; 2 nu d_head features
    performer_proj_dim: int = 16  # random directions of FAVOR+; 2 x as many features
    scale_output: bool = True  # False: the official quadratic layers' 1/sqrt(d_head)
    key_norm: str = ""  # of the features of q and k: sum, l2, none; "": the update rule's own
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        carried: ops.FastWeightState | None = None,
        *,
        shared: Shared | None = None,
        dropout: Dropout | None = None,
        last: int | None = None,
        norm: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B _ D"], ops.FastWeightState]:
        """See `Mixer`; `norm`: k, v and the rule's inputs are made of norm(x), q of x."""
        d = self.d_head
        features, n_key = self._features(self._arrays()), self._n_key()
        rule = ops.UPDATE_RULES[self.update_rule]
        widths = [n_key if i.per_key else 1 for i in rule.inputs]
        projection = Heads(self.n_head, (d, d, d, *widths), self.dtype, name="qkv")
        q, k, v, *columns = projection(x if norm is None else norm(x))
        if norm is not None:
            q = projection(x)[0]
        inputs = {}
        for i, column in zip(rule.inputs, columns, strict=True):
            column = column if i.per_key else column[..., 0]
            inputs[i.name] = i.activation(column.astype(jnp.float32))
        if self.is_mutable_collection("intermediates"):  # for those who look inside: notebooks/03
            read = (features(q), features(k), v, *inputs.values())
            self.sow("intermediates", "memory_inputs", read)
        scale = d**-0.5
        if not self.scale_output:
            q, k = features(q) * scale, features(k)
        out, state = ops.fast_weight_attention(
            q,
            k,
            v,
            inputs.pop("beta", None),
            carried,
            update_rule=self.update_rule,
            attn_normalization=self.attn_normalization,
            inputs=inputs,
            features=features if self.scale_output else None,
        )
        if last is not None:
            out = out[:, -last:]
        if self.scale_output:
            out = out * jnp.asarray(scale, out.dtype)
        out = checkpoint_name(out, "mixed")
        return project((x.shape[-1],), (-2, -1), self.dtype, "out")(out), state

    @property
    def norms_itself(self) -> bool:
        """Only the quadratic layers do."""
        return not self.scale_output

    def _arrays(self) -> dict[str, Array]:
        """The feature map's own arrays: parameters, and variables of the collection `favor`.

        The latter are stored with the checkpoint (the official toolkit keeps FAVOR+'s projection
        outside its state_dict) and drawn anew by the training step.
        """
        feature_map = ops.FEATURE_MAPS[self.feature_map]
        arrays = {
            name: self.param(f"feature_map_{name}", init, self)
            for name, init in feature_map.parameters.items()
        }
        for name, draw in feature_map.draws.items():
            make = lambda draw=draw: draw(self.make_rng("params"), self)
            arrays[name] = self.variable("favor", name, make).value
        return arrays

    def _features(self, arrays: Mapping[str, Array]) -> Partial:
        """The map of [..., H] to normalised features [..., K]."""
        function = ops.FEATURE_MAPS[self.feature_map].of(self)
        norm = ops.KEY_NORMS[self.key_norm or ops.UPDATE_RULES[self.update_rule].key_norm]
        return Partial(functools.partial(_address, function, norm), arrays)

    def _n_key(self) -> int:
        """K, the width of keys and queries after the feature map."""
        feature_map = ops.FEATURE_MAPS[self.feature_map]
        makers = {**feature_map.parameters, **feature_map.draws}

        def features():
            arrays = {name: make(jax.random.key(0), self) for name, make in makers.items()}
            return self._features(arrays)(jnp.zeros((self.d_head,)))

        return jax.eval_shape(features).shape[-1]

    def empty(self, batch_size: int, d_model: int) -> ops.FastWeightState:
        """A memory of zeros."""
        shape = (batch_size, self.n_head, self._n_key())
        return ops.FastWeightState(jnp.zeros((*shape, self.d_head)), jnp.zeros(shape))

    def draw(self, key: Key[Array, ""]) -> dict[str, Array]:
        """The feature map's draws."""
        draws = ops.FEATURE_MAPS[self.feature_map].draws.items()
        return {
            name: draw(jax.random.fold_in(key, i) if i else key, self)
            for i, (name, draw) in enumerate(draws)
        }

    def check(self) -> None:
        """Names that are known, sizes, and a normalisation that the rule has."""
        for field in ("dpfp_n_roll", "performer_proj_dim"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} must be at least 1, got {getattr(self, field)}.")
        self._features({})
        ops.check_composition(self.update_rule, self.attn_normalization)

    def name_parts(self, name: str) -> list[str]:
        """Feature map, update rule, normalisation, and the map's own settings."""
        own = ops.FEATURE_MAPS[self.feature_map].label(self)
        parts = [self.feature_map, self.update_rule, self.attn_normalization, own, self.key_norm]
        return [part for part in parts if part]

    def floats_per_token(self, length: int) -> int:
        """Features, and what the rule makes of them."""
        return 6 * self.n_head * self._n_key()

    def flops(self, d_model: int, length: int) -> float:
        """Projections, and the rule by its least arithmetic."""
        rule, n_key = ops.UPDATE_RULES[self.update_rule], self._n_key()
        inputs = sum(n_key if i.per_key else 1 for i in rule.inputs)
        projected = 2 * d_model * (4 * self.d_head + inputs)
        return self.n_head * (projected + rule.flops * n_key * self.d_head)


# The memory sums over many tokens: from the features to the read-out in float32.


def _address(
    function: Callable[..., Array],
    norm: Callable[[Array], Array],
    arrays: Mapping[str, Array],
    x: Array,
) -> Array:
    return norm(function(x.astype(jnp.float32), **arrays))
