"""The parts of a layer, as flax.linen modules: mixers, feed-forward, residual blocks, positions.

Axis letters: B batch, T time, N heads, H head width (d_head), D model width, F feed-forward width.

A mixer maps `x [B, T, D]` and what it carries from the past to `[B, T, D]` and what it carries on.
A block wraps a mixer and the feed-forward network into post-norm residual branches:
`h = LN(h + mixer(h)); h = LN(h + ff(h))`, as in the official toolkit.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key, UInt32

from fwm import ops
from fwm.ops import softmax

# The official initialisation (weights_init): matrices N(0, 0.02), norms N(1, 0.02), biases 0.
matrix_init = nn.initializers.normal(0.02)


def norm_init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
    """Scale of a layer norm, N(1, 0.02)."""
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


# --- randomness -------------------------------------------------------------------------------


class Dropout(NamedTuple):
    """Source of all dropout masks of one forward pass; None in its place means evaluation.

    Masks are drawn per row of the *global* batch, so they do not depend on how many devices or
    gradient-accumulation chunks the rows are spread over.

    Fields:
        key: one key for the whole batch.
        rows: index of each row in the global batch, [B].
    """

    key: Key[Array, ""]
    rows: Int[Array | np.ndarray, " B"]


def dropout(x: Array, source: Dropout | None, site: int, rate: float) -> Array:
    """Zero each element of `x [B, ...]` with probability `rate`, scale the others by 1/(1-rate).

    `site` tells apart the places of one layer. The rate is met to 2^-16: two masks are cut from
    each 32-bit random word, which halves the cost of the generator; the scale is exact for it.
    """
    if source is None or rate == 0.0:
        return x
    return _masked(x, _keep(source, site, rate, x.shape), _scale(rate))


def _masked(x: Array, keep: Array, scale: float) -> Array:
    # A product, not a where: XLA lifts the where's zeros out of the loop over layers and keeps
    # them in memory, as many as x has elements.
    return x * (keep.astype(x.dtype) * jnp.asarray(scale, x.dtype))


def _threshold(rate: float) -> int:
    return round((1.0 - rate) * 2**16)


def _scale(rate: float) -> float:
    return 2**16 / _threshold(rate)


def _keep(source: Dropout, site: int, rate: float, shape: tuple[int, ...]) -> Array:
    """The mask of one site for `[B, ...]`: True with probability 1 - rate."""
    key = jax.random.bits(jax.random.fold_in(source.key, site), (2,), jnp.uint32)
    size = math.prod(shape[1:])
    counter = jnp.arange(-(-size // 4), dtype=jnp.uint32)[None, :]
    rows = jnp.asarray(source.rows, jnp.uint32)[:, None]
    words = threefry(key, rows, counter)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    mask = jnp.concatenate([half < _threshold(rate) for half in halves], axis=1)
    return mask[:, :size].reshape(shape)


def threefry(
    key: UInt32[Array, "2"], high: UInt32[Array, "B 1"], low: UInt32[Array, "1 M"]
) -> tuple[UInt32[Array, "B M"], UInt32[Array, "B M"]]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011) of all pairs of words (high, low).

    The same bits as jax's own generator, which on CPU runs the rounds as a loop over arrays in
    memory: written out, they become one loop over registers, measured five times faster.
    """
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    keys = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    high, low = high + keys[0], low + keys[1]
    for step in range(1, 6):
        for rotation in rotations[(step - 1) % 2]:
            high = high + low
            low = high ^ (low << rotation | low >> (32 - rotation))
        high = high + keys[step % 3]
        low = low + keys[(step + 1) % 3] + np.uint32(step)
    return high, low


# What the backward pass of a layer keeps of its forward pass, by name; the rest, all of it cheap
# (feature maps, norms, the narrow dropout masks), is computed anew.
KEPT = ("memory", "mixed", "sum", "inner")


# --- positions --------------------------------------------------------------------------------


def sinusoid(positions: Float[Array, " T"], d_model: int) -> Float[Array, "T D"]:
    """`[sin(p f_0), ..., cos(p f_0), ...]` with f_j = 10000^(-2j/D): halves, not interleaved."""
    frequencies = 1.0 / (10000.0 ** (jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model))
    angles = positions[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def countdown(length: int, clamp_len: int) -> Float[Array, " T"]:
    """Positions `length-1, ..., 1, 0`: the official code counts down; at most clamp_len if > 0."""
    positions = jnp.arange(length - 1, -1, -1, dtype=jnp.float32)
    return jnp.minimum(positions, clamp_len) if clamp_len > 0 else positions


# --- mixers -----------------------------------------------------------------------------------


def _project(features: tuple[int, ...], axis: int | tuple[int, ...], dtype, name: str):
    """A linear map without bias, from the axes `axis` to `features`."""
    return nn.DenseGeneral(
        features, axis=axis, use_bias=False, dtype=dtype, kernel_init=matrix_init, name=name
    )


class FastWeightAttention(nn.Module):
    """Attention with a fast weight memory (paper sections 3 and 4).

    `q, k, v, beta = split(W x)` per head, `beta = sigmoid(.)`; `q, k` go through the feature map
    (and are divided by their sum for the delta rule); the update rule writes `v` under `k` and
    reads with `q`; heads are mixed by a linear map. The output is scaled by 1/sqrt(d_head), as in
    the official recurrent layers, or, with `scale_output=False`, the scores are (the quadratic
    layers of the official toolkit, where it cancels except against the eps of the normalisation).

    Call: `x [B, T, D]`, `state` (`FastWeightState` or None for an empty one); `last` n > 0 returns
    the last n positions only. Returns `[B, T, D]` (or `[B, n, D]`) and the new state.

    It works by itself:

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

    n_head: int
    d_head: int
    feature_map: str = "dpfp"
    update_rule: str = "delta"
    attn_normalization: str = "none"
    dpfp_n_roll: int = 2
    performer_proj_dim: int = 16
    scale_output: bool = True
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: ops.FastWeightState | None = None,
        last: int | None = None,
    ) -> tuple[Float[Array, "B _ D"], ops.FastWeightState]:
        """See the class."""
        d = self.d_head
        strengths = self.update_rule != "sum"
        # One channel more per head for the write strength beta of the delta rule.
        qkv = _project((self.n_head, 3 * d + strengths), -1, self.dtype, "qkv")(x)
        q, k, v = qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d : 3 * d]
        beta = jax.nn.sigmoid(qkv[..., 3 * d].astype(jnp.float32)) if strengths else None
        address = _address_to_one if strengths else _address
        features = Partial(address, FEATURE_MAPS[self.feature_map](self))
        if self.is_mutable_collection("intermediates"):  # for those who look inside: notebooks/03
            self.sow("intermediates", "memory_inputs", (features(q), features(k), v, beta))
        scale = d**-0.5
        if not self.scale_output:
            q, k = features(q) * scale, features(k)
        out, state = ops.fast_weight_attention(
            q,
            k,
            v,
            beta,
            state,
            update_rule=self.update_rule,
            attn_normalization=self.attn_normalization,
            features=features if self.scale_output else None,
        )
        if last is not None:
            out = out[:, -last:]
        if self.scale_output:
            out = out * jnp.asarray(scale, out.dtype)
        out = checkpoint_name(out, "mixed")
        return _project((x.shape[-1],), (-2, -1), self.dtype, "out")(out), state

    def projection(self) -> Float[Array, "H M"]:
        """FAVOR+'s random projection: a variable of the collection `favor`, not a parameter.

        Stored with the checkpoint (the official toolkit keeps it outside its state_dict) and
        redrawn by the training step, one for all heads, queries and keys, as there.
        """
        return self.variable(
            "favor",
            "projection",
            lambda: ops.favor_projection(
                self.make_rng("params"), self.d_head, self.performer_proj_dim
            ),
        ).value


# The memory sums over many tokens: from the features to the read-out in float32.


def _address(features: Callable[[Array], Array], x: Array) -> Array:
    return features(x.astype(jnp.float32))


def _address_to_one(features: Callable[[Array], Array], x: Array) -> Array:
    """Features that sum to one, as the delta rule takes them (paper, section 4.2)."""
    return ops.sum_normalize(_address(features, x))


# From the layer that has the options to the map of [..., H] to features [..., K].
FEATURE_MAPS: dict[str, Callable[[FastWeightAttention], Partial]] = {
    "elu": lambda layer: Partial(ops.elu_plus_one),
    "favor": lambda layer: Partial(ops.favor, projection=layer.projection()),
    "dpfp": lambda layer: Partial(functools.partial(ops.dpfp, n_roll=layer.dpfp_n_roll)),
}


class SoftmaxAttention(nn.Module):
    """Causal softmax attention, scores scaled by 1/sqrt(d_head) (the standard Transformer)."""

    n_head: int
    d_head: int
    dropatt: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Dropout | None = None,
        last: int | None = None,
    ) -> Float[Array, "B _ D"]:
        """`x [B, T, D]` -> `[B, T, D]`; with `last` n the last n positions only."""
        d = self.d_head
        qkv = _project((self.n_head, 3 * d), -1, self.dtype, "qkv")(x)
        q = qkv[..., :d] if last is None else qkv[:, -last:, :, :d]
        out = softmax.causal_attention(
            q,
            qkv[..., d : 2 * d],
            qkv[..., 2 * d :],
            scale=d**-0.5,
            dropout=_attention_dropout(source, self.dropatt),
        )
        out = checkpoint_name(out, "mixed")
        return _project((x.shape[-1],), (-2, -1), self.dtype, "out")(out)


class RelativeAttention(nn.Module):
    """Transformer-XL attention over a memory and the segment, with relative positions.

    Scores `((q + u) k + (q + w) r[distance]) / sqrt(d_head)` (Dai et al. 2019); u, w are shared by
    all layers and given in the call.
    """

    n_head: int
    d_head: int
    mem_len: int
    clamp_len: int = -1
    same_length: bool = False
    dropout: float = 0.0
    dropatt: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B M D"],
        length: Int[Array, " B"],
        r_w_bias: Float[Array, "N H"],
        r_r_bias: Float[Array, "N H"],
        source: Dropout | None = None,
        shared: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """`memory`: inputs of this layer at earlier positions, the last `length` rows count.

        `shared` is the key of the dropout on the position table, one for all layers and rows.
        """
        d = self.d_head
        context = jnp.concatenate([memory.astype(x.dtype), x], axis=1)
        qkv = _project((self.n_head, 3 * d), -1, self.dtype, "qkv")(context)
        positions = sinusoid(countdown(context.shape[1], self.clamp_len), x.shape[-1])
        if shared is not None:
            table = Dropout(shared, jnp.zeros((1,), jnp.int32))
            positions = dropout(positions[None], table, 0, self.dropout)[0]
        r = _project((self.n_head, d), -1, self.dtype, "r")(positions.astype(x.dtype))
        out = softmax.relative_attention(
            qkv[:, -x.shape[1] :, :, :d],
            qkv[..., d : 2 * d],
            qkv[..., 2 * d :],
            r,
            r_w_bias.astype(x.dtype),
            r_r_bias.astype(x.dtype),
            length=length,
            mem_len=self.mem_len,
            same_length=self.same_length,
            scale=d**-0.5,
            dropout=_attention_dropout(source, self.dropatt),
        )
        out = checkpoint_name(out, "mixed")
        return _project((x.shape[-1],), (-2, -1), self.dtype, "out")(out)


def _attention_dropout(source: Dropout | None, rate: float) -> Callable[[Array], Array] | None:
    if source is None or rate == 0.0:
        return None
    return lambda probabilities: dropout(probabilities, source, ATTENTION_SITE, rate)


# The places of dropout; each draws masks of its own from the same source.
ATTENTION_SITE, MIXER_SITE, INNER_SITE, OUTER_SITE, EMBEDDING_SITE, HIDDEN_SITE = range(6)


# --- feed-forward and residuals ---------------------------------------------------------------


class FeedForward(nn.Module):
    """`W_2 relu(W_1 x + b_1) + b_2`, dropout after each of the two."""

    d_inner: int
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], source: Dropout | None = None
    ) -> Float[Array, "B T D"]:
        """`[B, T, D]` -> `[B, T, D]`."""
        *batch, d_model = x.shape
        inner = _Affine(d_model, self.d_inner, name="inner")()
        outer = _Affine(self.d_inner, d_model, name="outer")()
        keep, scale = None, 1.0
        if source is not None and self.dropout > 0.0:
            keep = _keep(source, INNER_SITE, self.dropout, (*batch, self.d_inner))
            keep, scale = keep.reshape(-1, self.d_inner), _scale(self.dropout)
        x_MxD = x.astype(self.dtype).reshape(-1, d_model)
        out = _feed_forward(scale, x_MxD, keep, *inner, *outer)
        return dropout(out.reshape(x.shape), source, OUTER_SITE, self.dropout)


class _Affine(nn.Module):
    """The parameters of an affine map, as `nn.Dense` names and draws them."""

    n_in: int
    n_out: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "I O"], Float[Array, " O"]]:
        kernel = self.param("kernel", matrix_init, (self.n_in, self.n_out))
        return kernel, self.param("bias", nn.initializers.zeros, (self.n_out,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(scale, x, keep, w_1, b_1, w_2, b_2):
    """relu and dropout between two affine maps of `x [M, D]`; `keep [M, F]` is dropout's mask.

    The gradient by hand because of what automatic differentiation costs here: it keeps three
    arrays [M, F] for one (y > 0 says where relu and dropout let through), and XLA's CPU backend
    transposes those arrays in memory for the gradients of the matrices.
    """
    return _feed_forward_forward(scale, x, keep, w_1, b_1, w_2, b_2)[0]


def _feed_forward_forward(scale, x, keep, w_1, b_1, w_2, b_2):
    y = nn.relu(x @ w_1.astype(x.dtype) + b_1.astype(x.dtype)[None])
    if keep is not None:
        y = _masked(y, keep, scale)
    y = checkpoint_name(y, "inner")
    out = y @ w_2.astype(x.dtype) + b_2.astype(x.dtype)[None]
    return out, (x, y, w_1, w_2)


def _feed_forward_backward(scale, residuals, dout):
    x, y, w_1, w_2 = residuals
    # Sums over all tokens: accumulated in float32, with the narrow side in front, which is the
    # fast orientation; the barrier keeps XLA from turning it round.
    over_tokens = functools.partial(
        jnp.einsum, "md,mf->df", preferred_element_type=np.promote_types(np.float32, x.dtype)
    )

    def part(sums, tokens):
        x, y, dout = tokens
        dy = _masked(jnp.einsum("md,fd->mf", dout, w_2.astype(x.dtype)), y > 0, scale)
        dx = jnp.einsum("mf,df->md", dy, w_1.astype(x.dtype))
        dw_1, dw_2 = over_tokens(x, dy), jax.lax.optimization_barrier(over_tokens(dout, y))
        db_1, db_2 = (jnp.sum(g, axis=0, dtype=dw_1.dtype) for g in (dy, dout))
        new = (dw_1, dw_2, db_1, db_2)
        return new if sums is None else jax.tree.map(jnp.add, sums, new), dx

    # A large batch by parts: dy is the widest array of the backward pass.
    n_part = -(-len(x) // 4096)
    if n_part == 1 or len(x) % n_part:
        sums, dx = part(None, (x, y, dout))
    else:
        parts = jax.tree.map(lambda z: z.reshape(n_part, -1, z.shape[-1]), (x, y, dout))
        shapes = jax.eval_shape(lambda t: part(None, t)[0], jax.tree.map(lambda z: z[0], parts))
        zeros = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
        sums, dx = jax.lax.scan(part, zeros, parts)
    dw_1, dw_2, db_1, db_2 = sums
    return dx.reshape(x.shape), None, dw_1, db_1, dw_2.T, db_2


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)


class AddAndNorm(nn.Module):
    """Post-norm residual `LN(x + branch)`, eps 1e-5; mean and variance in float32."""

    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], branch: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """`[B, T, D]`, `[B, T, D]` -> `[B, T, D]`."""
        # Not the fast variance E[x^2] - E[x]^2: it loses digits that the goldens have. And cast
        # here: flax itself would mix dtypes, which strict promotion refuses.
        norm = nn.LayerNorm(epsilon=1e-5, scale_init=norm_init, use_fast_variance=False)
        return norm(checkpoint_name(x + branch, "sum").astype(jnp.float32)).astype(self.dtype)
