"""The vocabulary: symbols and their indices, in the official order."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fwm.data import subwords
from fwm.errors import UserError
from fwm.files import write_text

EOS = "<eos>"
UNK = "<unk>"
CODE = "U+"  # `U+0065`: a character by its code point, as white space has no place in a symbol
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """Symbols in the order of their indices: `vocab.symbols[id]`, `vocab.index[symbol]`.

    Word sets begin with `<eos>`, which ends every line. Character sets have none: their symbols are
    the decimal codes of bytes (enwik8), characters with `_` for the space (text8), or characters by
    their code points (`U+0065`, any other text). Subwords are those of a byte-level BPE, with
    every byte among them; `bpe` is its `tokenizer.json`, empty for all other sets.
    """

    symbols: tuple[str, ...]
    bpe: str = ""

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], *, eos: bool = True) -> "Vocabulary":
        """Order the symbols by falling count; ties keep the order of the mapping.

        `counts` has its keys in the order of first occurrence. With `eos`, `<eos>` comes first and
        is not counted; a literal `<eos>` in the text is the same symbol.
        """
        # sorted() is stable, which keeps first occurrence for ties.
        ordered = sorted(counts, key=counts.__getitem__, reverse=True)
        if eos:
            ordered = [EOS, *(symbol for symbol in ordered if symbol != EOS)]
        return cls(tuple(ordered))

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def index(self) -> dict[str, int]:
        """The index of every symbol."""
        return {symbol: i for i, symbol in enumerate(self.symbols)}

    @cached_property
    def eos_id(self) -> int | None:
        """The index of `<eos>`, None for character sets."""
        return self.symbols.index(EOS) if EOS in self.symbols else None

    @cached_property
    def unk_id(self) -> int | None:
        """The index of `<unk>`, None where there is none."""
        return self.symbols.index(UNK) if UNK in self.symbols else None

    @cached_property
    def tokenizer(self) -> str:
        """What reads a text into these symbols: `words`, `characters`, `bpe`.

        Empty for the sets that have their own way (enwik8, text8, and tasks that read no text).
        """
        if self.eos_id is not None:
            return "words"
        if self.index.keys() >= subwords.BYTES:
            return "bpe"
        characters = [symbol for symbol in self.symbols if symbol != UNK]
        coded = all(symbol.startswith(CODE) for symbol in characters)
        return "characters" if characters and coded else ""

    @cached_property
    def newline_id(self) -> int | None:
        """The index of the symbol that ends a line, None where there is none."""
        names = {"words": EOS, "characters": f"{CODE}000A", "bpe": subwords.NEWLINE}
        return self.index.get(names.get(self.tokenizer, "10" if self._bytes else ""))

    @property
    def of_bytes(self) -> bool:
        """Whether symbols are bytes or several of them, `bytes_of`."""
        return self.tokenizer == "bpe" or self._bytes

    @cached_property
    def _bytes(self) -> bool:
        return all(symbol.isascii() and symbol.isdigit() for symbol in self.symbols)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one symbol per line, and for subwords `tokenizer.json` beside it, atomically."""
        path = Path(path)
        tokenizer = path.with_name(TOKENIZER_FILE)
        if self.bpe:
            write_text(tokenizer, self.bpe)
        else:
            tokenizer.unlink(missing_ok=True)
        write_text(path, self.text())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Read what `save` wrote.

        Raises:
          UserError: the file is missing or not UTF-8, or a line is empty, repeated or two words;
            of subwords, `tokenizer.json` is missing or of others.
        """
        try:
            content = Path(path).read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            raise UserError(
                f"There is no vocabulary file {path}; expected one symbol per line."
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"The vocabulary file {path} is not UTF-8 at byte {error.start}; restore it."
            ) from None
        vocab = cls(tuple(content.split()))
        if not vocab.symbols or vocab.text() != content or len(set(vocab.symbols)) != len(vocab):
            raise UserError(
                f"The vocabulary file {path} is damaged: expected one symbol without white space"
                " per line, none twice; restore it."
            )
        if vocab.tokenizer != "bpe":
            return vocab
        tokenizer = Path(path).with_name(TOKENIZER_FILE)
        bpe = tokenizer.read_text("utf-8", "replace") if tokenizer.is_file() else ""
        if subwords.symbols(bpe) != vocab.symbols:
            raise UserError(
                f"{tokenizer} is missing, damaged or not that of the subwords in {path}; restore"
                " both as the training wrote them."
            )
        return cls(vocab.symbols, bpe)

    def text(self) -> str:
        """Return what `save` writes: one symbol per line."""
        return "\n".join((*self.symbols, ""))

    def encode(self, text: str, *, add_eos: bool = True) -> np.ndarray:
        """Turn text into indices, an int32 array [T].

        Word sets: words are split at white space and every newline is one `<eos>`; with `add_eos`
        a last line without a newline gets its `<eos>` too (a prompt wants `add_eos=False`). Words
        outside the vocabulary become `<unk>`. Character sets: the bytes, letters or characters of
        the text, newlines among them. Subwords: those of its bytes, of which none is unknown.

        Raises:
          UserError: a symbol is unknown and the vocabulary has no `<unk>`, or subwords without the
            package `tokenizers`.
        """
        if self.tokenizer in ("characters", "bpe"):
            # A command line's bytes that are no UTF-8 come as surrogates.
            text = text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
        if self.tokenizer == "bpe":
            return np.array(subwords.load(self.bpe).encode(text).ids, np.int32)
        if self.eos_id is not None:
            ends_open = add_eos and not text.endswith("\n")
            symbols: Sequence[str] = (text + "\n" * ends_open).replace("\n", f" {EOS} ").split()
        elif self._bytes:
            # A command line's bytes that are no UTF-8 come as surrogates.
            symbols = [str(code) for code in text.encode("utf-8", errors="surrogateescape")]
        elif self.tokenizer == "characters":
            symbols = [code_point(ord(character)) for character in text]
        else:
            symbols = list(text.lower().replace(" ", "_"))
        ids = [self.index.get(symbol, self.unk_id) for symbol in symbols]
        if None in ids:
            raise UserError(
                f"{symbols[ids.index(None)]!r} is not in the vocabulary, which has no <unk>; leave"
                " it out of the text."
            )
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Turn indices into text: the inverse of `encode(text, add_eos=False)`.

        Of words all but the spaces; an unknown character is `\ufffd`.
        """
        symbols = [self.symbols[int(i)] for i in ids]
        if self.eos_id is not None:
            words = ["\n" if symbol == EOS else symbol for symbol in symbols]
            return " ".join(words).replace(" \n", "\n").replace("\n ", "\n")
        if self.tokenizer == "characters":
            return "".join("\ufffd" if s == UNK else chr(int(s[len(CODE) :], 16)) for s in symbols)
        if self.of_bytes:
            return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")
        return "".join(symbols).replace("_", " ")

    def shown(self, symbol: str) -> str:
        """A symbol in a message: a character as itself."""
        coded = self.tokenizer == "characters" and symbol.startswith(CODE)
        return repr(chr(int(symbol[len(CODE) :], 16)) if coded else symbol)

    def bytes_of(self, i: int | np.integer) -> bytes:
        """The bytes that an index stands for, `of_bytes`."""
        symbol = self.symbols[int(i)]
        return bytes([int(symbol)]) if self._bytes else subwords.to_bytes(symbol)


def code_point(code: int) -> str:
    """The symbol of a character."""
    return f"{CODE}{code:04X}"
