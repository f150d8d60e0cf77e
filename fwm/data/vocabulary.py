"""The vocabulary: symbols and their indices, in the official order."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fwm.errors import UserError
from fwm.files import write_text

EOS = "<eos>"
UNK = "<unk>"


@dataclass(frozen=True)
class Vocabulary:
    """Symbols in the order of their indices: `vocab.symbols[id]`, `vocab.index[symbol]`.

    Word sets begin with `<eos>`, which ends every line. Character sets have none: their symbols are
    either the decimal codes of bytes (enwik8) or characters with `_` for the space (text8).
    """

    symbols: tuple[str, ...]

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
    def _bytes(self) -> bool:
        return all(symbol.isascii() and symbol.isdigit() for symbol in self.symbols)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one symbol per line, atomically."""
        write_text(Path(path), self.text())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Read what `save` wrote.

        Raises:
          UserError: the file is missing or not UTF-8, or a line is empty, repeated or two words.
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
        return vocab

    def text(self) -> str:
        """Return what `save` writes: one symbol per line."""
        return "\n".join((*self.symbols, ""))

    def encode(self, text: str, *, add_eos: bool = True) -> np.ndarray:
        """Turn text into indices, an int32 array [T].

        Word sets: words are split at white space and every newline is one `<eos>`; with `add_eos`
        a last line without a newline gets its `<eos>` too (a prompt wants `add_eos=False`). Words
        outside the vocabulary become `<unk>`. Character sets: the bytes or letters of the text.

        Raises:
          UserError: a symbol is unknown and the vocabulary has no `<unk>`.
        """
        if self.eos_id is not None:
            ends_open = add_eos and not text.endswith("\n")
            symbols: Sequence[str] = (text + "\n" * ends_open).replace("\n", f" {EOS} ").split()
        elif self._bytes:
            # A command line's bytes that are no UTF-8 come as surrogates.
            symbols = [str(code) for code in text.encode("utf-8", errors="surrogateescape")]
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
        """Turn indices into text: the inverse of `encode(text, add_eos=False)` but for spaces."""
        symbols = [self.symbols[int(i)] for i in ids]
        if self.eos_id is not None:
            words = ["\n" if symbol == EOS else symbol for symbol in symbols]
            return " ".join(words).replace(" \n", "\n").replace("\n ", "\n")
        if self._bytes:
            return bytes(map(int, symbols)).decode("utf-8", errors="replace")
        return "".join(symbols).replace("_", " ")
