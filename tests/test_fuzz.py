"""Random settings, bytes and arrays: a result of the right kind, or one sentence that says why."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program import call

from configs import default
from fwm import data, ops, step, train
from fwm.errors import UserError
from fwm.model import LanguageModel, build_config, empty_memory

FUZZ = settings(derandomize=True, deadline=None)
VOCABULARY = 30


def one_sentence(error):
    text = str(error)
    assert "\n" not in text.strip(), text
    assert len(text) > 20, text


# --- settings -------------------------------------------------------------------------------------

MODEL = {
    "mixer": [
        "fast_weight",
        "softmax",
        "transformer_xl",
        ("fast_weight", "softmax"),
        ("softmax", "transformer_xl"),
    ],
    "attention_window": [0, 3],
    "feature_map": ["elu", "favor", "dpfp"],
    "update_rule": ["sum", "delta"],
    "attn_normalization": ["none", "output", "output_and_key"],
    "dtype": ["float32", "bfloat16"],
    "no_pos": [False, True],
    "scale_output": [False, True],
    "same_length": [False, True],
    "tie_weight": [False, True],
    "d_model": [2, 6, 8],
    "n_head": [1, 3],
    "d_head": [1, 4],
    "d_inner": [1, 9],
    "n_layer": [1, 2],
    "d_embed": [0, 4],
    "div_val": [1, 2],
    "dropout": [0.0, 0.5],
    "dropatt": [0.0, 0.5],
    "mem_len": [0, 3],
    "clamp_len": [-1, 2],
    "cutoffs": [(), (5, 20)],
    "tie_projs": [(), (False, True, True)],
    "performer_proj_dim": [1, 4],
    "dpfp_n_roll": [1, 2],
}
WRONG = {
    "mixer": "rnn", "update_rule": "", "dtype": "int8", "d_model": 7, "n_head": 0, "d_inner": -1,
    "dropout": 1.0, "dropatt": -0.1, "mem_len": -1, "cutoffs": (5, 5), "div_val": 0,
    "tie_projs": (True,), "performer_proj_dim": 0, "dpfp_n_roll": -2, "n_layer": 0,
}  # fmt: skip
some_fields = st.fixed_dictionaries({name: st.sampled_from(v) for name, v in MODEL.items()})


DEFAULTS = default.defaults().model.to_dict()


def build(fields):
    return build_config(DEFAULTS | fields, VOCABULARY)


@settings(FUZZ, max_examples=4)
@given(st.integers(1, 2**32))
def test_settings_that_are_accepted_take_a_step(seed):
    """Every array keeps its shape and dtype; each third example is computed too, to be finite."""
    rng, model = np.random.default_rng(seed), None
    while model is None:
        fields = {name: values[rng.integers(len(values))] for name, values in MODEL.items()}
        try:
            n_layer = 1 if isinstance(fields["mixer"], str) else 2
            model = LanguageModel(build(fields | {"n_layer": n_layer}))
        except UserError as error:
            one_sentence(error)
    schedule = train.learning_rate("inv_sqrt", 0.01, 0, 10)
    optimizer = train.adam(schedule, 0.0)
    memory = jax.tree.leaves(jax.eval_shape(lambda: empty_memory(model.config, 2)))
    remembers = memory and all(leaf.size for leaf in memory)
    carry = bool(remembers) and bool(rng.integers(2))
    init = functools.partial(step.init_state, model, optimizer, 1, 2 * carry)
    options = {"batch_chunk": int(rng.integers(1, 3)), "skip": bool(rng.integers(2))}
    update = functools.partial(step.train_step, model, optimizer, schedule, **options)
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    documents = tokens // 4 if rng.integers(2) else None
    batch = step.Batch(tokens, tokens, np.ones(2, bool), np.arange(2), segment_ids=documents)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    state = jax.eval_shape(init)
    assert kinds(jax.eval_shape(update, state, batch)[0]) == kinds(state)
    if seed % 3 == 0:
        after, metrics = jax.jit(update)(jax.jit(init)(), batch)
        assert np.isfinite(float(metrics["loss"]))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@settings(FUZZ, max_examples=100)
@given(some_fields, st.sets(st.sampled_from(sorted(WRONG)), min_size=1))
def test_wrong_settings_are_refused_in_a_sentence(fields, wrong):
    with pytest.raises(UserError) as caught:
        build(fields | {name: WRONG[name] for name in wrong})
    one_sentence(caught.value)


names = st.sampled_from(["model.d_model", "train.lr", "model.cutoffs", "seed", "model", "nothing"])
values = st.one_of(st.text(max_size=8), st.sampled_from(["1e999", "()", "(1,", "None", "-1", "{}"]))


@settings(FUZZ, max_examples=40)
@given(
    st.sampled_from(["", ":", ":tiny,", ":tiny,d_head=", ":huge", ":tiny,no_pos"]), names, values
)
def test_any_command_line_is_parsed_or_refused_in_a_sentence(options, name, value):
    flags = [f"--config=configs/dpfp_delta.py{options}", f"--config.{name}={value}"]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(train, "run", lambda config, workdir, job_name, extend: 0)
        status, _, err = call(*flags, f"--workdir={folder}")
        patch.undo()
    assert status in (0, 2), err
    if status:
        assert err.startswith("error: ")
        one_sentence(err)


# --- text -----------------------------------------------------------------------------------------

words = st.text(st.sampled_from("ab é\0\t\r\n\v\x85\u2028<>"), max_size=60)
bytes_of_a_file = st.one_of(
    words.map(str.encode), st.text(max_size=30).map(str.encode), st.binary(max_size=60)
)


def load(folder, name, train_bytes, valid_bytes):
    for split, content in (("train", train_bytes), ("valid", valid_bytes)):
        (Path(folder) / f"{split}.txt").write_bytes(content)
    cache = str(Path(folder) / "cache")
    return data.load(name, dir=str(folder), cache_dir=cache, splits=("train", "valid"))


@settings(FUZZ, max_examples=150)
@given(
    st.sampled_from(["text", "ptb", "enwik8", "text8", "lm1b"]), bytes_of_a_file, bytes_of_a_file
)
def test_any_bytes_are_read_exactly_or_refused_in_a_sentence(name, train_bytes, valid_bytes):
    with tempfile.TemporaryDirectory() as folder:
        try:
            corpus = load(folder, name, train_bytes, valid_bytes)
        except UserError as error:
            one_sentence(error)
            return
        for stream in corpus.streams.values():
            assert stream.dtype == np.int32
            assert 0 <= stream.min() <= stream.max() < len(corpus.vocab)
        if corpus.unit == "word":
            text = train_bytes.decode().replace("\r\n", "\n").replace("\r", "\n")
            lines = (text + "\n" * (not text.endswith("\n"))).replace("\n", " <eos> ")
            read = [corpus.vocab.symbols[i] for i in corpus.streams["train"]]
            assert read == lines.split()
        try:
            tokens, targets, _ = corpus.train_batch(3, 2, 4, 1)
        except UserError as error:
            one_sentence(error)
            return
        assert tokens.shape == targets.shape == (2, 4)
        np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])


# --- ops ------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1, 1, 1), (2, 7, 1, 3, 5), (1, 33, 2, 4, 2)]


@functools.cache
def both_forms(rule, chunk_size):
    slow, fast = getattr(ops.recurrent, rule), getattr(ops, rule)
    return jax.jit(lambda *x: (fast(*x, chunk_size=chunk_size), slow(*x)))


@settings(FUZZ, max_examples=60)
@given(
    st.sampled_from(["sum_rule", "delta_rule"]),
    st.sampled_from([None, 5]),
    st.sampled_from(SHAPES),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e3]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_fast_weights_of_any_arrays(rule, chunk_size, shape, seed, scale, strength):
    b, t, n, k, v = shape
    rng = np.random.default_rng(seed)
    draw = lambda *s: rng.standard_normal(s, dtype=np.float32)
    # Keys of at most unit length: those for which the delta rule is a contraction.
    keys = draw(b, t, n, k)
    keys /= np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-6)
    beta = [np.full((b, t, n), strength, np.float32)] if rule == "delta_rule" else []
    memory = np.float32(scale) * draw(b, n, k, v)
    inputs = draw(b, t, n, k), keys, np.float32(scale) * draw(b, t, n, v), *beta, memory
    for ours, expected in zip(*both_forms(rule, chunk_size)(*inputs), strict=True):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * scale)


@jax.jit
def feature_maps(x):
    projection = ops.favor_projection(jax.random.key(0), 4, 3)
    return ops.elu_plus_one(x), ops.dpfp(x, 2), ops.favor(x, projection)


@settings(FUZZ, max_examples=60)
@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=4, max_size=4))
def test_feature_maps_of_any_numbers(numbers):
    maps = feature_maps(np.array(numbers, np.float32))
    assert [x.shape for x in maps] == [(4,), (16,), (6,)]
    for features in maps:
        assert np.isfinite(features).all()
        assert (np.asarray(features) >= 0).all()
