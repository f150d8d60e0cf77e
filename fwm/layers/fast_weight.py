"""Attention with a fast weight memory: feature map, update rule, normalisation."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from fwm import ops
from fwm.errors import UserError
from fwm.layers.mixer import Mixer, Shared
from fwm.layers.parts import Heads, norm_init, project
from fwm.limits import SIZE, none_or_several, number, one_of, whole
from fwm.ops.checks import check
from fwm.ops.dropout import Dropout

DECAYS = ("none", "constant", "head", "channel")
CONVOLUTION = none_or_several("none", "a token and the one before")


class ConvolvedState(NamedTuple):
    """What a layer with a short convolution carries."""

    memory: ops.FastWeightState
    recent: Float[Array, "B P N C"]  # what the next tokens are convolved with


class FastWeightAttention(Mixer):
    """Attention with a fast weight memory (paper sections 3 and 4).

    `q, k, v, ... = split(W x)` per head, and so what else the rule reads, through the rule's own
    activation (`beta = sigmoid(.)` for the delta rule); `q, k` go through the feature map and are
    divided by their norm (by their sum for the delta rule, by nothing for the sum rule, unless
    `key_norm` says otherwise); the update rule writes `v` under `k` and reads with `q`; heads are
    mixed by a linear map. The output is scaled by 1/sqrt(d_head), as in the official recurrent
    layers, or, with `scale_output=False`, the scores are (the quadratic layers of the official
    toolkit, where it cancels except against the eps of the normalisation).

    The wider family (docs/rules.md) is made of switches. `short_conv`: a causal depthwise
    convolution of q, k and v, before the map; v then goes through SiLU (Yang et al. 2024, arXiv
    2406.06484). `decay`: the memory is multiplied before each token, by 1 - 2^(-5-h) in head h
    (`constant`: RetNet, arXiv 2307.08621) or by exp(-exp(a) softplus(W x + b)), with one number of
    the token per `head` (arXiv 2412.06464) or per key feature, `channel` (arXiv 2510.26692).
    `beta_max`: beta is beta_max sigmoid(.) (arXiv 2411.12537). `n_step`: keys, values and what else
    the rule reads of several writes a token (arXiv 2502.10297). `output_gate`: what is read goes
    through an RMS norm per head, times SiLU of a gate of its own (arXiv 2412.06464).

    It carries a `FastWeightState`, with a convolution a `ConvolvedState`, and works by itself:

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
    packs = True
    limits = MappingProxyType(
        {
            "dpfp_n_roll": whole(1, 1000),  # every roll is a part of the program
            "performer_proj_dim": SIZE,
            "decay": one_of(DECAYS),
            "beta_max": number("above 0 and at most 2", lambda x: 0 < x <= 2),
            "n_step": whole(1, 64),  # and so is every write
            "short_conv": CONVOLUTION,
        }
    )

    n_head: int
    d_head: int
    feature_map: str = "dpfp"  # elu, favor, dpfp, tanh, silu, identity
    update_rule: str = "delta"  # sum, delta, error_free, comba, gated_delta2
    attn_normalization: str = "none"  # none, output, output_and_key
    dpfp_n_roll: int = 2  # nu of DPFP; 2 nu d_head features
    performer_proj_dim: int = 16  # random directions of FAVOR+; 2 x as many features
    scale_output: bool = True  # False: the official quadratic layers' 1/sqrt(d_head)
    key_norm: str = ""  # of the features of q and k: sum, l2, none; "": the update rule's own
    decay: str = "none"  # of the memory: none, constant (by head), head, channel (per key feature)
    beta_max: float = 1.0  # above 0, at most 2: with l2, a write's eigenvalue is above 1 - beta_max
    n_step: int = 1  # writes of a token
    short_conv: int = 0  # width of a causal convolution of q, k, v before the map, tokens; 0: none
    output_gate: bool = False  # RMS norm and a gate after the read
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        carried: ops.FastWeightState | ConvolvedState | None = None,
        *,
        shared: Shared | None = None,
        dropout: Dropout | None = None,
        last: int | None = None,
        norm: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B _ D"], ops.FastWeightState | ConvolvedState]:
        """See `Mixer`; `norm`: k, v and the rule's inputs are made of norm(x), q of x."""
        check("FastWeightAttention", x=(x, "B T D"))
        features, rule = self._features(self._arrays()), ops.UPDATE_RULES[self.update_rule]
        projection = Heads(self.n_head, self._widths(), self.dtype, name="qkv")
        columns = projection(x if norm is None else norm(x))
        ids = None if shared is None else shared.segment_ids
        memory, recent = carried if isinstance(carried, ConvolvedState) else (carried, None)
        if self.short_conv:
            columns, recent = self._convolved(columns, recent, ids)
        q, k, v, *given, decay, gate = columns
        if norm is not None:
            q = projection(x)[0]
        k, v = self._writes(k), self._writes(v)
        if self.short_conv:
            v = jax.nn.silu(v.astype(jnp.float32)).astype(v.dtype)
        inputs = {}
        for i, part in zip(rule.inputs, given, strict=True):
            part = self._writes(part.astype(jnp.float32))
            part = i.activation(part if i.wide else part[..., 0])
            inputs[i.name] = self.beta_max * part if i.name == "beta" else part
        if self.is_mutable_collection("intermediates"):  # for those who look inside: notebooks/03
            read = (features(q), features(k), v, *inputs.values())
            self.sow("intermediates", "memory_inputs", read)
        scale = self.d_head**-0.5
        if not self.scale_output:
            q, k = features(q) * scale, features(k)
        out, memory = ops.fast_weight_attention(
            q,
            k,
            v,
            inputs.pop("beta", None),
            memory,
            update_rule=self.update_rule,
            attn_normalization=self.attn_normalization,
            inputs=inputs,
            log_decay=self._log_decay(decay),
            features=features if self.scale_output else None,
            segment_ids=ids,
        )
        if last is not None:
            out, gate = out[:, -last:], gate[:, -last:]
        if self.scale_output:
            out = out * jnp.asarray(scale, out.dtype)
        if self.output_gate:
            out = ops.gated_rms_norm(out, gate, self.param("out_scale", norm_init, out.shape[-1:]))
        out = checkpoint_name(out, "mixed")
        y = project((x.shape[-1],), (-2, -1), self.dtype, "out")(out)
        return y, memory if recent is None else ConvolvedState(memory, recent)

    def _widths(self) -> tuple[int, ...]:
        """Of the columns that are projected for a head: q, k, v, the rule's inputs, decay, gate."""
        d, n, n_key = self.d_head, self.n_step, self._n_key()
        inputs = [n * i.width(n_key, d) for i in ops.UPDATE_RULES[self.update_rule].inputs]
        decay = {"head": 1, "channel": n_key}.get(self.decay, 0)
        return d, n * d, n * d, *inputs, decay, d if self.output_gate else 0

    def _writes(self, x: Float[Array, "B T N F"]) -> Float[Array, "B S N G"]:
        """What a token has of its n writes side by side, as one write after the other."""
        if self.n_step == 1:
            return x
        n_batch, length, n_head, width = x.shape
        x = x.reshape(n_batch, length, n_head, self.n_step, width // self.n_step)
        return jnp.moveaxis(x, 3, 2).reshape(n_batch, -1, n_head, width // self.n_step)

    def _convolved(
        self,
        columns: list[Float[Array, "B T N _"]],
        recent: Float[Array, "B P N C"] | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[list[Array], Array]:
        """The columns with q, k and v convolved; what the next tokens are convolved with."""
        width = self._n_convolved()
        recent = self._recent(len(columns[0])) if recent is None else recent
        bound = self.short_conv**-0.5  # as a convolution of PyTorch begins
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        taps = self.param("taps", init, (self.short_conv, self.n_head, width))
        qkv = jnp.concatenate(columns[:3], axis=-1)
        qkv, recent = ops.short_convolution(qkv, taps, recent, segment_ids)
        ends = np.cumsum(self._widths())[:2]
        return [*jnp.split(qkv, ends, axis=-1), *columns[3:]], recent

    def _n_convolved(self) -> int:
        """Channels of q, k and v of a head."""
        return (1 + 2 * self.n_step) * self.d_head

    def _recent(self, n_batch: int) -> Float[Array, "B P N C"]:
        """No tokens before the first one."""
        shape = (n_batch, self.short_conv - 1, self.n_head, self._n_convolved())
        return jnp.zeros(shape, self.dtype)

    def _log_decay(self, x: Float[Array, "B T N F"]) -> Array | None:
        """[B, T, N], or [B, T, N, K] where each key feature has its own."""
        if self.decay == "none":
            return None
        if self.decay == "constant":
            each = np.log1p(-(2.0 ** (-5.0 - np.arange(self.n_head)))).astype(np.float32)
            return jnp.broadcast_to(each[None, None], x.shape[:3])
        log_rate = self.param("decay_rate", _log_rate_init, (self.n_head,))
        bias = self.param("decay_bias", _decay_bias_init, x.shape[2:])
        log_decay = ops.log_decay(x.astype(jnp.float32), log_rate, bias)
        return log_decay if self.decay == "channel" else log_decay[..., 0]

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

    def empty(self, batch_size: int, d_model: int) -> ops.FastWeightState | ConvolvedState:
        """A memory of zeros."""
        shape = (batch_size, self.n_head, self._n_key())
        memory = ops.FastWeightState(jnp.zeros((*shape, self.d_head)), jnp.zeros(shape))
        return ConvolvedState(memory, self._recent(batch_size)) if self.short_conv else memory

    def draw(self, key: Key[Array, ""]) -> dict[str, Array]:
        """The feature map's draws."""
        draws = ops.FEATURE_MAPS[self.feature_map].draws.items()
        return {
            name: draw(jax.random.fold_in(key, i) if i else key, self)
            for i, (name, draw) in enumerate(draws)
        }

    def check(self) -> None:
        """Names that are known, and switches that the rule has."""
        self._features({})
        n = self.n_step
        self._check_composition()
        names = [i.name for i in ops.UPDATE_RULES[self.update_rule].inputs]
        if self.beta_max != 1 and "beta" not in names:
            raise UserError(
                f"beta_max={self.beta_max:g} has no meaning for update_rule {self.update_rule}, "
                "which reads no beta: leave it at 1."
            )
        if n > 1 and self.update_rule == "sum":
            raise UserError(
                f"n_step={n} has no meaning for update_rule sum, whose writes do not depend on one "
                "another: use delta, or n_step=1 with more heads."
            )
        if self.switched() and not self.scale_output:
            raise UserError(
                "scale_output=False is for the official quadratic layers, which have no decay, "
                "beta_max, n_step, short_conv or output_gate: leave it at True."
            )

    def check_packs(self) -> None:
        """A sum of keys that can begin anew, where there is one."""
        self._check_composition(documents=True)

    def _check_composition(self, documents: bool = False) -> None:
        switches = self.decay != "none", self.n_step, documents
        ops.check_composition(self.update_rule, self.attn_normalization, *switches)

    def name_parts(self, name: str) -> list[str]:
        """Feature map, update rule, normalisation, the map's own settings, and what is switched."""
        own = ops.FEATURE_MAPS[self.feature_map].label(self)
        parts = [self.feature_map, self.update_rule, self.attn_normalization, own, self.key_norm]
        return [part for part in (*parts, *self.switched()) if part]

    def switched(self) -> list[str]:
        """What is not as in the paper's own layers."""
        parts = {
            f"{self.decay}decay": self.decay != "none",
            f"beta{self.beta_max:g}": self.beta_max != 1,
            f"n{self.n_step}": self.n_step != 1,
            f"conv{self.short_conv}": self.short_conv != 0,
            "gate": self.output_gate,
        }
        return [part for part, there in parts.items() if there]

    def floats_per_token(self, length: int) -> int:
        """Features, and what the rule makes of them."""
        return 6 * self.n_head * self._n_key() * self.n_step

    def flops(self, d_model: int, length: int) -> float:
        """Projections, and the rule by its least arithmetic."""
        rule = ops.UPDATE_RULES[self.update_rule].flops * self.n_step
        projected = 2 * d_model * (sum(self._widths()) + self.d_head)
        return self.n_head * (projected + rule * self._n_key() * self.d_head)


def _log_rate_init(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """log of a rate between 1 and 16, as Mamba-2 and Gated DeltaNet begin."""
    return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))


def _decay_bias_init(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """softplus of it is between 0.001 and 0.1, evenly in its logarithm."""
    low, high = np.log(0.001), np.log(0.1)
    return jnp.log(jnp.expm1(jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))))


# The memory sums over many tokens: from the features to the read-out in float32.


def _address(
    function: Callable[..., Array],
    norm: Callable[[Array], Array],
    arrays: Mapping[str, Array],
    x: Array,
) -> Array:
    return norm(function(x.astype(jnp.float32), **arrays))
