"""Documents packed into one row: every rule gives what it gives for each document by itself."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from jax.tree_util import Partial

from fwm.errors import UserError
from fwm.ops import (
    UPDATE_RULES,
    FastWeightState,
    Input,
    Rule,
    Update,
    composed,
    dpfp,
    fast_weight_attention,
    segments,
)

B, T, N, K, V = 2, 37, 2, 4, 3
# Documents of one token; borders at the first and the last token, inside of chunks and at their
# borders; ids that come again and are in no order. A row that begins with 0 goes on with the state.
IDS = np.zeros((B, T), np.int32)
IDS[0] = np.repeat([7, 0, 7, 3, 0], [1, 15, 16, 4, 1])
IDS[1] = np.repeat([0, -2], [20, 17])
DOCUMENTS = [(0, 0, 1), (0, 1, 16), (0, 16, 32), (0, 32, 36), (0, 36, 37), (1, 0, 20), (1, 20, 37)]
CARRIED = DOCUMENTS.index((1, 0, 20))
LAST = [DOCUMENTS.index((0, 36, 37)), DOCUMENTS.index((1, 20, 37))]


def bounded_step(w, k, v):
    """A rule that is no case of the algebra."""
    error = jnp.tanh(v - jnp.einsum("bnk,bnkv->bnv", k, w))
    return w + k[..., :, None] * error[..., None, :]


OWN = {
    "bounded": Rule(bounded_step),
    "decayed": composed((Input("decay", jax.nn.sigmoid),), lambda k, v, g: Update(v, log_decay=-g)),
}
# (update_rule, attn_normalization, decay, writes of a token)
CASES = {
    "sum": ("sum", "none", None, 1),
    "sum, output": ("sum", "output", None, 1),
    "sum, output, head": ("sum", "output", "head", 1),
    "delta": ("delta", "none", None, 1),
    "delta, output_and_key": ("delta", "output_and_key", None, 1),
    "delta, channel": ("delta", "none", "channel", 1),
    "delta, 2 writes": ("delta", "none", "head", 2),
    "error_free": ("error_free", "none", None, 1),
    "comba": ("comba", "none", "head", 1),
    "gated_delta2": ("gated_delta2", "none", "channel", 1),
    "token by token": ("bounded", "none", None, 1),
    "decay of its own": ("decayed", "none", None, 1),
    "on a GPU": ("delta", "none", None, 1),
    "on a GPU, head": ("delta", "none", "head", 1),
}
DTYPES = [(case, np.float32) for case in CASES] + [
    (case, jnp.bfloat16)
    for case in ("sum, output, head", "delta, 2 writes", "on a GPU", "on a GPU, head")
]


def apart(x):
    """Each document at the beginning of a row of its own, with zeros, which write nothing, after.

    x has one or several rows a token.
    """
    n = x.shape[1] // T
    cut = [x[row, begin * n : end * n] for row, begin, end in DOCUMENTS]
    fill = lambda part: [(0, T * n - len(part))] + [(0, 0)] * (part.ndim - 1)
    return np.stack([np.pad(part, fill(part)) for part in cut])


def packed(x):
    """The rows as they are, and others below that fill the batch of the same program."""
    return np.pad(x, [(0, len(DOCUMENTS) - B)] + [(0, 0)] * (x.ndim - 1))


def assert_same(together, alone, tolerance):
    """Of arrays by tokens, those of the packed rows and of the documents apart."""
    n = together.shape[1] // T
    scale = np.abs(alone).max() + 1e-9
    assert np.isfinite(together).all()
    for (row, begin, end), one in zip(DOCUMENTS, alone, strict=True):
        difference = together[row, begin * n : end * n] - one[: (end - begin) * n]
        assert np.abs(difference).max() < tolerance * scale, (row, begin)


@pytest.mark.parametrize(("case", "dtype"), DTYPES)
def test_packed_equals_apart(case, dtype, monkeypatch):
    for name, rule in OWN.items():
        monkeypatch.setitem(UPDATE_RULES, name, rule)
    if case.startswith("on a GPU"):
        monkeypatch.setattr("fwm.ops.chunks.on_cpu", lambda: False)
    name, normalization, decay, n = CASES[case]
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.uniform(0.1, 0.9, shape).astype(np.float32)
    keys = lambda length: (x := draw(B, length, N, K)) / x.sum(-1, keepdims=True)
    tokens = {"q": keys(T), "k": keys(T * n), "v": draw(B, T * n, N, V)}
    for i in UPDATE_RULES[name].inputs:
        features = (K,) if i.per_key else (V,) if i.per_value else ()
        tokens[i.name] = draw(B, T * n, N, *features)
    tokens = {name: x.astype(dtype) for name, x in tokens.items()}
    if decay:
        tokens["log_decay"] = -draw(B, T, N, *[K] * (decay == "channel"))
    state = FastWeightState(draw(B, N, K, V), draw(B, N, K))
    cotangents = draw(B, T, N, V).astype(dtype), FastWeightState(draw(B, N, K, V), draw(B, N, K))
    begun, ends = (
        FastWeightState(*(np.zeros((len(DOCUMENTS), *x.shape[1:]), np.float32) for x in state))
        for _ in range(2)
    )
    for first, last, x, y in zip(begun, ends, state, cotangents[1], strict=True):
        first[CARRIED], last[LAST] = x[1], y

    @jax.jit
    def everything(tokens, state, ids, cotangents):
        def attend(tokens, state):
            given = dict(tokens)
            q, k, v, beta = (given.pop(x, None) for x in ("q", "k", "v", "beta"))
            return fast_weight_attention(
                q, k, v, beta, state, segment_ids=ids, log_decay=given.pop("log_decay", None),
                inputs=given, update_rule=name, attn_normalization=normalization,
            )  # fmt: skip

        found, pull = jax.vjp(attend, tokens, state)
        return found, pull(cotangents)

    # Chunks begin at other tokens, so that sums differ in their last bit. In 16 bits they may then
    # round to neighbours, which lie 2^-7 of themselves apart at most.
    tolerance = 2e-5 if dtype == np.float32 else 2**-7
    over = partial(jax.tree.map, packed)
    together = everything(over(tokens), over(state), packed(IDS), over(cotangents))
    alone = everything(
        {name: apart(x) for name, x in tokens.items()}, begun, 0 * packed(IDS),
        (apart(cotangents[0]), ends),
    )  # fmt: skip
    numbers = partial(np.array, dtype=np.float32)
    (out, after), (dtokens, dstate) = jax.tree.map(numbers, together)
    (own_out, own_after), (own_dtokens, own_dstate) = jax.tree.map(numbers, alone)
    assert_same(out, own_out, tolerance)
    for of, gradient in dtokens.items():
        if of != "log_decay":
            assert_same(gradient, own_dtokens[of], tolerance)
    if decay:  # that of a document's first token decays what is not there
        first = segments.begins(jnp.asarray(IDS))
        assert (dtokens["log_decay"][:B][first] == 0).all()
        own = own_dtokens["log_decay"]
        own[np.arange(len(own)) != CARRIED, 0] = 0
        assert_same(dtokens["log_decay"], own, tolerance)
    # The sum of keys is kept where something divides by it, or where it costs little.
    if normalization != "none" or (UPDATE_RULES[name].key_sums and not decay and n == 1):
        assert relative_error(after.key_sum[:B], own_after.key_sum[LAST]) < 2e-5
        assert (dstate.key_sum[0] == 0).all()
        np.testing.assert_allclose(dstate.key_sum[1], own_dstate.key_sum[CARRIED], atol=2e-5)
    assert relative_error(after.weights[:B], own_after.weights[LAST]) < tolerance
    assert (dstate.weights[0] == 0).all()
    np.testing.assert_allclose(dstate.weights[1], own_dstate.weights[CARRIED], atol=tolerance)


def test_one_document_is_as_without_ids():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.random((B, 9, N, 2)), jnp.float32) for _ in range(2))
    v, beta = jnp.asarray(rng.random((B, 9, N, V)), jnp.float32), jnp.full((B, 9, N), 0.5)
    attend = jax.jit(
        partial(
            fast_weight_attention, update_rule="delta", attn_normalization="none",
            features=Partial(partial(dpfp, n_roll=1)),
        )
    )  # fmt: skip
    plain = attend(q, k, v, beta, None)
    ids = attend(q, k, v, beta, None, segment_ids=jnp.full((B, 9), 5))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ids, plain)


def test_where_documents_begin():
    begins = segments.begins(jnp.asarray(IDS))
    assert [(row, at) for row, at in np.argwhere(begins).tolist()] == [
        (row, begin) for row, begin, _ in DOCUMENTS if (row, begin) != (1, 0)
    ]
    number, since = segments.numbered(jnp.asarray(IDS)), segments.since_begin(jnp.asarray(IDS))
    for row, begin, end in DOCUMENTS:
        assert len(set(number[row, begin:end].tolist())) == 1
        assert since[row, begin:end].tolist() == list(range(end - begin))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"segment_ids": jnp.zeros((B, 3))},
            "segment_ids must be an integer array [B, T], got float32 of shape (2, 3).",
        ),
        (
            {"segment_ids": jnp.zeros((B, 4), int)},
            "segment_ids of shape (2, 4) does not fit q of shape (2, 3, 2, 4) in axis T",
        ),
        ({"segment_ids": [0, 1]}, "segment_ids must be an integer array [B, T], got list"),
        ({"update_rule": "own", "attn_normalization": "output"}, "begins anew with each document"),
    ],
)  # fmt: skip
def test_ids_that_are_refused(change, message, monkeypatch):
    own = UPDATE_RULES["delta"]._replace(key_sums=lambda k, before, *rest, last=False: k)
    monkeypatch.setitem(UPDATE_RULES, "own", own)
    arguments = {"update_rule": "delta", "attn_normalization": "none"}
    arguments |= {"segment_ids": jnp.zeros((B, 3), jnp.int32)} | change
    x = jnp.ones((B, 3, N, K))
    with pytest.raises(UserError) as error:
        inspect.unwrap(fast_weight_attention)(x, x, x, x[..., 0], None, **arguments)
    assert message in str(error.value)
