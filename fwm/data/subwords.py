"""Subwords: a byte-level BPE, trained on a text by the `tokenizers` library (Sennrich et al. 2016).

Its symbols are bytes written in GPT-2's alphabet, in which every byte is a printable character
(Radford et al. 2019): every text can be written, and is read back exactly.
"""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from fwm.errors import UserError

VOCAB_SIZE = 8192
BATCH = 16  # pieces that are encoded at once, on all cores


def _alphabet() -> dict[str, int]:
    """The character of each byte: itself where it is printable, else one from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTES = _alphabet()
BYTES = _BYTES.keys()  # the symbols of single bytes
NEWLINE = next(symbol for symbol, byte in _BYTES.items() if byte == 10)


def to_bytes(symbol: str) -> bytes:
    """The bytes of a subword."""
    return bytes(_BYTES[character] for character in symbol)


def _library() -> Any:
    try:
        # Needed by subwords only.
        import tokenizers
    except ModuleNotFoundError:
        raise UserError(
            "A text is read into subwords by the package tokenizers: `pip install tokenizers`, or"
            " choose another config.data.tokenizer (words, characters)."
        ) from None
    return tokenizers


def train(texts: Iterable[str], vocab_size: int) -> str:
    """A tokenizer for a text that comes in pieces, as JSON: the bytes, and the merges up to a size.

    Raises:
      UserError: the size leaves no room beside the bytes, or `tokenizers` is not installed.
    """
    size = vocab_size or VOCAB_SIZE
    if size <= len(BYTES):
        raise UserError(
            f"config.data.vocab_size must be above {len(BYTES)}, the bytes that subwords are made"
            f" of, got {size}."
        )
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(BYTES), show_progress=False
    )
    tokenizer.train_from_iterator(_whole(texts), trainer)
    return tokenizer.to_str()


@functools.lru_cache(maxsize=4)
def load(tokenizer: str) -> Any:
    """The library's tokenizer of a JSON.

    Raises:
      UserError: `tokenizers` is not installed, or does not know what the JSON says.
    """
    library = _library()
    try:
        return library.Tokenizer.from_str(tokenizer)
    except Exception as error:  # The library has no class of its own for it.
        raise UserError(
            f"tokenizers {library.__version__} cannot read the run's tokenizer.json ({error}):"
            " restore the file, or install the version that wrote it."
        ) from error


@functools.lru_cache(maxsize=4)
def symbols(tokenizer: str) -> tuple[str, ...]:
    """The subwords of a tokenizer's JSON in the order of their indices; () where it has none."""
    try:
        index = json.loads(tokenizer)["model"]["vocab"]
        found = tuple(sorted(index, key=index.__getitem__))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ()
    return found if [index[s] for s in found] == list(range(len(found))) else ()


def encode(tokenizer: str, texts: Iterable[str]) -> Iterator[Int32[np.ndarray, "T"]]:
    """The indices of a text that comes in pieces: the same, wherever they are cut."""
    library, pieces = load(tokenizer), _whole(texts)
    while batch := list(itertools.islice(pieces, BATCH)):
        for found in library.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array(found.ids, np.int32)


def _whole(texts: Iterable[str]) -> Iterator[str]:
    """Cut a text anew, where no subword goes across: before or after a single white space."""
    rest = ""
    for text in texts:
        rest += text
        if border := _last_border(rest):
            yield rest[:border]
            rest = rest[border:]
    if rest:
        yield rest


def _last_border(text: str) -> int:
    """Where the last word begins that follows one space or newline; 0: nowhere.

    A space belongs to the word after it, a newline to none. In longer runs of white space it
    depends on what follows which of it goes together.
    """
    at = len(text) - 1
    while (at := max(text.rfind(" ", 1, at), text.rfind("\n", 1, at))) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + (text[at] == "\n")
    return 0
