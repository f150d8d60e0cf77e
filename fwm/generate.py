"""Generation: what a trained model writes after a prompt, one word at a time.

What the next word depends on is a `Context` of constant size, so that a word takes the same time
however long the text has become:

- fast weights carried over, and Transformer-XL: the memory of all whole segments, and the tokens
  of the unfinished one; without positions a segment may be one token;
- all others: a window of the training length that slides along, as in their evaluation.

Every array has a static shape and each function is compiled once. The probabilities are those
that `evaluate.carry_over` and `evaluate.sliding_window` score.
"""

import codecs
import collections
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from fwm import data, evaluate
from fwm.config import LIMITS
from fwm.errors import UserError
from fwm.model import LanguageModel, empty_memory
from fwm.ops.checks import checked_ids
from fwm.registry import remembered
from fwm.tasks import TASKS
from fwm.terminal import give_up, say
from fwm.workdir import restore

PACED = 1000  # A long text's note compares the pace of so many first and last tokens.


class Decoder(NamedTuple):
    """A trained model and how it reads."""

    model: LanguageModel
    variables: Any  # on the device
    window: int  # tokens it was trained to see at once
    carried: bool  # starts from the memory of what came before; else the window slides


class Context(NamedTuple):
    """What the next word depends on."""

    memory: Any  # of everything before `tokens`; None where the window slides
    # The newest ids, `filled` of them from the left; right of these anything, as no position sees
    # a later one. Their positions count from the left in training and evaluation too.
    tokens: Int[Array, "1 W"]
    filled: Int[Array, ""]


def _log_probs(
    model: LanguageModel, tokens: Int[Array, "1 W"], at: Int[Array, ""], memory: Any
) -> tuple[Float[Array, " V"], Any]:
    """log p of the word after position `at`, and the memory after all positions."""
    hidden, memory = model.hidden(tokens, memory)
    x = jax.lax.dynamic_index_in_dim(hidden, at, axis=1, keepdims=False)
    return model.softmax.log_probs(x, model.embedding.tables, model.embedding.projs)[0], memory


def _feed(
    model: LanguageModel, variables: Any, context: Context, token: Int[Array, ""]
) -> tuple[Float[Array, " V"], Context]:
    memory, tokens, filled = context
    width = tokens.shape[1]
    if memory is None:
        tokens = jnp.where(filled == width, jnp.roll(tokens, -1, axis=1), tokens)
    at = jnp.minimum(filled, width - 1)
    tokens = tokens.at[0, at].set(token)
    log_probs, new = model.apply(variables, tokens, at, memory, method=_log_probs)
    filled = at + 1
    if memory is not None:
        # A whole segment moves from the tokens to the memory.
        whole = filled == width
        memory = jax.tree.map(lambda old, new: jnp.where(whole, new, old), memory, new)
        filled = jnp.where(whole, 0, filled)
    return log_probs, Context(memory, tokens, filled)


@remembered
def _compiled(model: LanguageModel) -> tuple[Callable, Callable]:
    """`_feed`, and a whole segment into the memory."""
    advance = lambda *arguments: model.apply(*arguments, method="hidden")[1]
    return jax.jit(functools.partial(_feed, model)), jax.jit(advance)


def feed(
    decoder: Decoder, context: Context, token: int | np.integer | Int[Array, ""]
) -> tuple[Float[Array, " V"], Context]:
    """Read one more token: log p of every next word, [n_token] float32, and the new context."""
    if not isinstance(token, jax.Array):
        checked_ids("the token", [token], decoder.model.config.n_token)
    step, _ = _compiled(decoder.model)
    return step(decoder.variables, context, jnp.asarray(token, jnp.int32))


def begin(
    decoder: Decoder, prompt: Sequence[int] | Int[np.ndarray, " P"]
) -> tuple[Float[Array, " V"], Context]:
    """Read a prompt of any length: log p of every next word, [n_token] float32, and the context.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary.
    """
    ids = checked_ids("the prompt", prompt, decoder.model.config.n_token)
    if len(ids) == 0:
        raise UserError("the prompt is empty: expected at least one token.")
    config, window, memory = decoder.model.config, decoder.window, None
    if decoder.carried:
        _, advance = _compiled(decoder.model)
        memory = empty_memory(config, 1)
        while len(ids) > window:
            memory = advance(decoder.variables, jnp.asarray(ids[:window])[None], memory)
            ids = ids[window:]
    # Absolute positions start anew in every segment, and what Transformer-XL sees reaches back
    # from the segment's beginning; only for fast weights without positions is one token a segment.
    width = 1 if decoder.carried and config.no_pos else window
    # Tokens of an unfinished window only have to be put into it.
    ids = ids[-window:]
    put = len(ids) - 1 if width > 1 else 0
    tokens = np.zeros((1, width), np.int32)
    tokens[0, :put] = ids[:put]
    context = Context(memory, jnp.asarray(tokens), jnp.asarray(put, jnp.int32))
    for token in ids[put:]:
        log_probs, context = feed(decoder, context, token)
    return log_probs, context


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def sample(
    key: Key[Array, ""],
    log_probs: Float[Array, " V"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, ""]:
    """Draw a word.

    Args:
        key: of this draw.
        log_probs: log p of every word.
        temperature: log p is divided by it; 0 takes the most probable word.
        top_k: draw from so many most probable words; 0: from all.
        top_p: of these, draw from the fewest most probable ones that together have this share of
            the probability (nucleus sampling, Holtzman et al. 2020); 1: from all.
    """
    if temperature == 0.0:
        return jnp.argmax(log_probs).astype(jnp.int32)
    # The most probable word has 0, so that a temperature near 0 leaves it alone above -inf; below
    # the smallest normal number 0 would be divided by 0.
    smallest = float(jnp.finfo(log_probs.dtype).tiny)
    logits = (log_probs - log_probs.max()) / max(temperature, smallest)
    if top_k == 0 and top_p == 1.0:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    size = logits.shape[0]
    logits, words = jax.lax.top_k(logits, min(top_k or size, size))  # falling
    probabilities = jax.nn.softmax(logits)
    before = jnp.cumsum(probabilities) - probabilities
    logits = jnp.where(before < top_p, logits, -jnp.inf)  # the first is always kept
    return words[jax.random.categorical(key, logits)].astype(jnp.int32)


def generate(
    decoder: Decoder,
    prompt: Sequence[int] | Int[np.ndarray, " P"],
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[int, float]]:
    """Yield (id, log p) of one new word after the other; log p is the model's own, in nats.

    The same seed gives the same words. Memory and time per word do not grow.

    Raises:
        UserError: an option out of range, an empty prompt.
    """
    chances = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, value in {"max_new_tokens": max_new_tokens, "seed": seed, **chances}.items():
        LIMITS[f"generate.{name}"].check(name, value)
    draw = functools.partial(sample, **chances)

    # A generator of its own, so that options are refused at the call.
    def words() -> Iterator[tuple[int, float]]:
        key = jax.random.key(seed)
        log_probs, context = begin(decoder, prompt)
        token: Any = None
        for number in range(max_new_tokens):
            if token is not None:
                log_probs, context = feed(decoder, context, token)
            token = draw(jax.random.fold_in(key, number), log_probs)
            yield int(token), float(log_probs[token])

    return words()


def log_probs(
    decoder: Decoder,
    prompt: Sequence[int] | Int[np.ndarray, " P"],
    continuation: Sequence[int] | Int[np.ndarray, " S"],
) -> Float[np.ndarray, " S"]:
    """log p, in nats, of every word of a given continuation, read as if it had been drawn."""
    ids = checked_ids("the continuation", continuation, decoder.model.config.n_token)
    row, context = begin(decoder, prompt)
    found = []
    for token in ids:
        found.append(row[token])
        row, context = feed(decoder, context, token)
    return np.array(found, np.float32)


def load(
    config: Any, workdir: Path, report: Callable[[str], None] = say
) -> tuple[Decoder, data.Vocabulary, int]:
    """The model of a run, its vocabulary, and the step of its checkpoint.

    Args:
        config: the run's, as `workdir.config_of_run` reads it; `config.generate.checkpoint` chooses
            the checkpoint, and what `config.eval` changes of the model's reading holds here too.
        workdir: of the run.
        report: is told about damaged checkpoints.

    Raises:
        UserError: no run in workdir, no such checkpoint, a setting of `config.eval` out of range.
    """
    vocab = data.Vocabulary.load(workdir / "vocab.txt")
    model_config, carried, window = evaluate.reading(config, len(vocab))
    model = LanguageModel(model_config)
    step, variables = restore(workdir, model, config.generate.checkpoint, report)
    return Decoder(model, jax.device_put(variables), window, carried), vocab, step


def text_pieces(vocab: data.Vocabulary, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come, in pieces that together are `vocab.decode(ids)`.

    A word with the space before it, a newline for `<eos>`, a character, or what a subword has of
    them (of bytes and subwords: when the last byte of a character has come).
    """
    if vocab.of_bytes:
        # A character may be several of them.
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        pieces = (decode(vocab.bytes_of(i)) for i in ids)
        yield from filter(None, pieces)
        yield from filter(None, [decode(b"", final=True)])
        return
    before: list[int] = []
    for i in ids:
        # What a word adds, space or none, is decided by the one before.
        yield vocab.decode([*before, i])[len(vocab.decode(before)) :]
        before = [i]


def encode_prompt(vocab: data.Vocabulary, prompt: str) -> tuple[np.ndarray, list[str]]:
    """Ids of a prompt, [P] int32, and those of its words or characters that become `<unk>`.

    Raises:
        UserError: a symbol is unknown and the vocabulary has no `<unk>`.
    """
    ids = vocab.encode(prompt, add_eos=False)
    parts = prompt.split() if vocab.eos_id is not None else prompt
    unknown = [
        part
        for part in (dict.fromkeys(parts) if vocab.unk_id in ids.tolist() else ())
        if vocab.encode(part, add_eos=False).tolist() == [vocab.unk_id] and part not in vocab.index
    ]
    return ids, unknown


def run(config: Any, workdir: Path, prompt: str) -> int:
    """Write the prompt and what the model adds to standard output, word by word.

    Notes go to standard error, so that standard output is the text alone.

    Returns:
        The exit status: 0, or 141 where nobody reads on.

    Raises:
        UserError: no run in workdir, no such checkpoint, an option out of range, a prompt that
            the vocabulary cannot write.
    """
    if not TASKS[config.task].writes:
        raise UserError(
            f"--mode=generate has no meaning for the task {config.task}: score what was learned "
            "with --mode=valid."
        )
    note = functools.partial(say, stream=sys.stderr)
    decoder, vocab, step = load(config, workdir, report=note)
    ids, unknown = encode_prompt(vocab, prompt)
    if unknown:
        note(f"note: not in the vocabulary, and read as <unk>: {', '.join(unknown)}")
    # Where there is no prompt, the end of a line announces a new one.
    newline = [] if vocab.newline_id is None else [vocab.newline_id]
    if not len(ids) and not newline:
        raise UserError("--mode=generate with a character model needs --prompt=... to go on from.")
    start = ids if len(ids) else newline
    options = config.generate.to_dict()
    del options["checkpoint"]
    words = generate(decoder, start, **options)

    first: list[float] = []
    last: collections.deque[float] = collections.deque(maxlen=PACED + 1)
    count = 0

    def new_ids() -> Iterator[int]:
        nonlocal count
        for i, _ in words:
            count += 1
            last.append(time.monotonic())
            if len(first) <= PACED:
                first.append(last[-1])
            yield i

    status, interrupt = 0, None
    try:
        for piece in text_pieces(vocab, itertools.chain(ids.tolist(), new_ids())):
            print(piece, end="", flush=True)
    except KeyboardInterrupt as error:
        interrupt = error
    except OSError as error:  # Nobody reads on, as after `| head`, or nothing can be written.
        give_up(sys.stdout)
        status = 141
        if not isinstance(error, BrokenPipeError):
            note(f"Warning: nothing more can be printed ({error}).")
    say()
    each = lambda start, end, tokens: f"{1e3 * (end - start) / tokens:.2f} ms"
    pace = ""
    if count > 1:  # The first word waits for compilation.
        pace = f", {each(first[0], last[-1], count - 1)} each"
    if count > 2 * PACED:
        of_first, of_last = each(first[0], first[-1], PACED), each(last[0], last[-1], PACED)
        pace += f" (the first {PACED}: {of_first}, the last {PACED}: {of_last})"
    note(f"note: {count} new tokens{pace}; checkpoint of step {step}.")
    if interrupt is not None:
        raise interrupt
    return status
