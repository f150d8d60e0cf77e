"""Generation: the evaluator's probabilities, sampling against its definition, text as it comes."""

import gc
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_score import STREAM, WINDOW, make

from fwm import evaluate, generate
from fwm.data import Vocabulary
from fwm.errors import UserError
from fwm.generate import Decoder

# Whole segments: positions count down to the end of one, and the last would be a shorter one.
TEXT = STREAM[: 3 * WINDOW + 1]
DRAWS = 2000


def agrees(decoder, score):
    """A text after its first token, and after prompts of less and more than one window."""
    found = generate.log_probs(decoder, TEXT[:1], TEXT[1:])
    assert found.shape == (score.count,)
    assert -found.sum(dtype=np.float64) == pytest.approx(score.total_nll, rel=1e-5)
    for prompt in (2, WINDOW, WINDOW + 1, 2 * WINDOW + 3):
        rest = generate.log_probs(decoder, TEXT[:prompt], TEXT[prompt:])
        np.testing.assert_allclose(rest, found[prompt - 1 :], rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        dict(feature_map="elu", cutoffs=(10, 20)),
        dict(mixer=("fast_weight", "softmax"), attention_window=4),
    ],
)
def test_a_sliding_window_has_the_evaluators_probabilities(fields):
    model, variables = make(**fields)
    score = evaluate.sliding_window(model, variables, TEXT, window=WINDOW, batch_size=8)
    agrees(Decoder(model, variables, WINDOW, carried=False), score)


@pytest.mark.parametrize(
    "fields",
    [
        dict(feature_map="favor", performer_proj_dim=4, no_pos=True, attn_normalization="output"),
        dict(feature_map="elu", no_pos=True, attn_normalization="output_and_key"),
        dict(feature_map="elu", update_rule="sum", attn_normalization="output"),  # with positions
        dict(mixer="transformer_xl", mem_len=WINDOW),
        dict(mixer="transformer_xl", mem_len=3),
        dict(mixer=("fast_weight", "softmax"), attention_window=4, no_pos=True),
        dict(mixer="transformer_xl"),  # each segment by itself
    ],
)
def test_a_carried_memory_has_the_evaluators_probabilities(fields):
    model, variables = make(**fields)
    score = evaluate.carry_over(model, variables, TEXT, segment=WINDOW)
    agrees(Decoder(model, variables, WINDOW, carried=True), score)


@pytest.mark.parametrize("carried", [False, True])
def test_a_long_text_takes_no_more_memory_and_no_other_program(carried):
    model, variables = make(no_pos=True)
    decoder = Decoder(model, variables, WINDOW, carried)
    step, _ = generate._compiled(model)

    def held():
        """Programs, and the arrays that are alive."""
        gc.collect()
        sizes = [array.nbytes for array in jax.live_arrays()]
        return step._cache_size(), generate.sample._cache_size(), len(sizes), sum(sizes)

    words = generate.generate(decoder, STREAM, max_new_tokens=200, top_k=5)
    measured = [held() for number, _ in enumerate(words, 1) if number % 50 == 0]
    assert measured == [measured[0]] * 4
    # The one program, on a context whose shapes are the same.
    _, context = generate.begin(decoder, STREAM)
    _, after = generate.feed(decoder, context, 1)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, context)
    assert step._cache_size() == measured[0][0]


def test_words_and_their_log_probs():
    model, variables = make(no_pos=True)
    decoder = Decoder(model, variables, WINDOW, True)
    found = list(generate.generate(decoder, [1, 2], max_new_tokens=20, seed=3))
    assert found == list(generate.generate(decoder, [1, 2], max_new_tokens=20, seed=3))
    assert found != list(generate.generate(decoder, [1, 2], max_new_tokens=20, seed=4))
    words, values = zip(*found, strict=True)
    assert len(words) == 20
    # Options change what is drawn, never what the model says of it.
    np.testing.assert_allclose(values, generate.log_probs(decoder, [1, 2], words), rtol=1e-5)
    safe = list(generate.generate(decoder, [1, 2], max_new_tokens=9, temperature=0.0))
    assert safe == list(generate.generate(decoder, [1, 2], max_new_tokens=9, top_k=1, seed=5))
    words, values = zip(*safe, strict=True)
    np.testing.assert_allclose(values, generate.log_probs(decoder, [1, 2], words), rtol=1e-5)
    row, _ = generate.begin(decoder, [1, 2])
    assert (int(row.argmax()), float(row.max())) == safe[0]
    assert list(generate.generate(decoder, [1, 2], max_new_tokens=0)) == []


P = np.array([0.05, 0.4, 0.15, 0.3, 0.1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-40, "top_k": 3, "top_p": 0.9}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 9}, P),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.72}, [0, 8 / 17, 3 / 17, 6 / 17, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        # First the two words, which then share all of the probability; 4/7 is below 0.6.
        ({"top_k": 2, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(options, expected):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    log_p = jnp.log(jnp.asarray(P, jnp.float32))
    words = jax.vmap(lambda key: generate.sample(key, log_p, **options))(keys)
    shares = np.bincount(words, minlength=len(P)) / DRAWS
    assert (shares[np.array(expected) == 0] == 0).all()
    # Five standard deviations.
    assert np.abs(shares - expected).max() < 5 * 0.5 / DRAWS**0.5


def test_ties_do_not_widen_top_k():
    log_p = jnp.log(jnp.full(6, 1 / 6))
    keys = jax.random.split(jax.random.key(0), 100)
    words = jax.vmap(lambda key: generate.sample(key, log_p, top_k=2))(keys)
    assert len(set(words.tolist())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be a number of at least 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be a number above 0 and at most 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"seed": 2**32}, "seed must be a whole number of at least 0"),
    ],
)
def test_options_out_of_range(options, message):
    decoder = Decoder(*make(), WINDOW, False)
    with pytest.raises(UserError, match=message):
        generate.generate(decoder, [1], **options)  # before the first word is asked for


def test_an_empty_prompt():
    with pytest.raises(UserError, match="the prompt is empty"):
        generate.begin(Decoder(*make(), WINDOW, False), [])


WORDS = Vocabulary(("<eos>", "the", "cat", "<unk>", "."))
BYTES = Vocabulary(tuple(map(str, range(256))))
LETTERS = Vocabulary((*"abc", "_"))


@pytest.mark.parametrize(
    ("vocab", "ids", "pieces"),
    [
        (WORDS, [1, 2, 4, 0, 1, 3], ["the", " cat", " .", "\n", "the", " <unk>"]),
        (WORDS, [0, 0, 1, 0], ["\n", "\n", "the", "\n"]),
        (LETTERS, [0, 3, 1, 3], ["a", " ", "b", " "]),
        (BYTES, list("aé b".encode()), ["a", "é", " ", "b"]),
        (BYTES, list("日本".encode()), ["日", "本"]),
        (BYTES, [*"é".encode(), 0xC3], ["é", "\N{REPLACEMENT CHARACTER}"]),
        (WORDS, [], []),
    ],
)
def test_text_comes_in_pieces(vocab, ids, pieces):
    assert list(generate.text_pieces(vocab, ids)) == pieces
    assert "".join(pieces) == vocab.decode(ids)


def test_pieces_do_not_wait_for_what_follows():
    for vocab, ids in ((WORDS, [1, 0, 2]), (BYTES, list("aé".encode()))):
        source = iter(ids)
        first = next(generate.text_pieces(vocab, source))
        assert first == vocab.decode(ids[:1])
        assert len(list(source)) == len(ids) - 1


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_any_bytes_are_the_whole(seed):
    rng = np.random.default_rng(seed)
    letters = rng.choice(list("aé日🙂"), 40)
    stray = [rng.integers(0, 256, 1).astype(np.uint8).tobytes() for _ in letters]
    ids = list(b"".join(itertools.chain(*zip((x.encode() for x in letters), stray, strict=True))))
    text = "".join(generate.text_pieces(BYTES, ids))
    assert text == BYTES.decode(ids)


def test_unknown_words_of_a_prompt():
    ids, unknown = generate.encode_prompt(WORDS, "the dog\nthe dog bit .")
    assert ids.tolist() == [1, 3, 0, 1, 3, 3, 4]
    assert unknown == ["dog", "bit"]
    assert generate.encode_prompt(WORDS, "")[0].tolist() == []
    assert generate.encode_prompt(LETTERS, "A b")[0].tolist() == [0, 3, 1]
    with pytest.raises(UserError, match="'d' is not in the vocabulary, which has no <unk>"):
        generate.encode_prompt(LETTERS, "d")
