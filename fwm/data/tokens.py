"""From the bytes of a text file to int32 indices: exact, in one pass, on all cores.

Every word gets a provisional index in the order of its first occurrence; the vocabulary, known only
after the last word, then maps them to their final indices with one table lookup per token.
"""

import codecs
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
from codecs import BOM_UTF8
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fwm.data import subwords
from fwm.data.vocabulary import EOS, Vocabulary, code_point
from fwm.errors import UserError

BLOCK_BYTES = 1 << 19
TEXT_BYTES = 1 << 16  # smaller, as some of what reads text needs a hundred bytes a character
HEAD_BYTES = 1 << 12  # of a file that are looked at before it is read
# Below this a second process costs more than it saves.
PARALLEL_BYTES = 1 << 24
# What ends a word or line beside the space, the newline and the tab, and the byte that pads words.
RARE = "\0" + "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in " \n\t")
SHIFT = np.uint64(44)
SLOTS = 1 << 20
MASKS = np.array([(1 << 8 * length) - 1 for length in range(9)], np.uint64)
MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)
CHARACTERS = 0x110000  # code points there are


@dataclass(frozen=True)
class Span:
    """The bytes [start, stop) of a file and how they are read.

    form: `lines` (words with one `<eos>` per line), `codes` (lower-cased symbols between white
    space, no `<eos>`), `bytes` (every byte a symbol, its decimal code), `letters` (the same, the
    character itself with `_` for the space), `characters` (code points, newlines among them) or
    `bpe` (subwords).
    """

    path: str
    start: int
    stop: int
    form: str


@dataclass(frozen=True)
class Part:
    """A span in provisional indices, the int32 file `ids`; `words[i]` occurs `counts[i]` times.

    sizes: of its text, where tokens are not words: `words` (ends of lines included, as a set of
    words has them), `characters`, `bytes`.
    """

    words: list[str]
    counts: np.ndarray
    ids: Path
    sizes: Mapping[str, int] = field(default_factory=dict)


def texts(file: io.BufferedIOBase, name: str, length: int = -1) -> Iterator[str]:
    """Yield what a file has from here on, `length` bytes, in pieces of text.

    A byte order mark at the beginning is left out, and every line ends with a newline alone.

    Raises:
      UserError: it is not UTF-8; the file is called `name`.
    """
    begin = position = file.tell()
    if begin == 0:
        _refuse_wide(file, name)
    left = length if length >= 0 else sys.maxsize
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    first = begin == 0
    while True:
        block = file.read(min(TEXT_BYTES, left))
        position, left = position + len(block), left - len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(name, position - len(error.object) + error.start)) from None
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text
        if not block:
            return


def _not_utf8(name: str, position: int) -> str:
    return f"{name} is not UTF-8 text: byte {position} cannot be read; convert the file to UTF-8."


def _refuse_wide(file: io.BufferedIOBase, name: str) -> None:
    """UTF-16 without a byte order mark is UTF-8 as well, with NUL in every other place.

    Reads what a file begins with, and goes back.
    """
    head = file.read(HEAD_BYTES)
    file.seek(0)
    # A mark is no UTF-8 at all, which whoever decodes it says.
    if head[:1] not in (b"\xff", b"\xfe") and head.count(b"\0") > len(head) // 8:
        raise UserError(
            f"{name} is not UTF-8 text: it has NUL every few characters, as UTF-16 has; convert the"
            " file to UTF-8."
        )


def span_texts(span: Span) -> Iterator[str]:
    """The `texts` of a span."""
    with open(span.path, "rb") as file:
        file.seek(span.start)
        yield from texts(file, span.path, span.stop - span.start)


def _measured(span: Span, sizes: dict[str, int]) -> Iterator[str]:
    """The texts of a span; at the end `sizes` has its words, characters and bytes."""
    sizes |= {"words": 0, "characters": 0, "bytes": 0}
    between, text = True, "\n"
    for text in span_texts(span):
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        space = np.isin(codes, SPACES)
        begins = ~space & np.concatenate([[between], space[:-1]])
        between = bool(space[-1])
        sizes["words"] += int(begins.sum()) + int((codes == ord("\n")).sum())
        sizes["characters"] += len(codes)
        sizes["bytes"] += len(text.encode("utf-8"))
        yield text
    # As in a set of words, the last line of a file ends there.
    if span.stop == os.path.getsize(span.path) and not text.endswith("\n"):
        sizes["words"] += 1


def _pieces(span: Span) -> Iterator[tuple[bytes, str]]:
    """Yield a span in pieces that end at white space, as bytes and as text."""
    with open(span.path, "rb") as file:
        position, rest = span.start, b""
        if position == 0:
            _refuse_wide(file, span.path)
        if position == 0 and file.read(len(BOM_UTF8)) == BOM_UTF8:
            position = len(BOM_UTF8)
        file.seek(position)
        while position + len(rest) < span.stop:
            unread = span.stop - position - len(rest)
            # As much again where no white space was found: what is read is not copied forever.
            size = max(BLOCK_BYTES, len(rest))
            rest += file.read(min(size, unread))
            # In UTF-8 these two bytes are never part of another character.
            cut = 1 + max(rest.rfind(b"\n"), rest.rfind(b" "))
            if unread <= size:
                cut = len(rest)
            try:
                text = rest[:cut].decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(_not_utf8(span.path, position + error.start)) from None
            yield rest[:cut], text
            position, rest = position + cut, rest[cut:]


class _Words:
    """Provisional indices of words: a dict, and a hash table that NumPy reads for a whole piece.

    The table holds words of at most 16 bytes as two exact integers, one word per slot; words that
    are not in it, and pieces with rare kinds of white space, take the way through the dict.
    """

    def __init__(self) -> None:
        self.index: defaultdict[str, int] = defaultdict(itertools.count().__next__)
        self._keys = np.zeros((2, SLOTS), np.uint64)
        self._ids = np.full(SLOTS, -1, np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Return the indices of the words between white space."""
        words = text.split()
        return np.fromiter(map(self.index.__getitem__, words), np.int32, len(words))

    def encode_lines(self, piece: bytes, text: str) -> np.ndarray:
        """Return the indices of the words and of an `<eos>` for every newline."""
        if any(character in text for character in RARE):
            for newline in ("\r\n", "\r", "\n"):
                text = text.replace(newline, f" {EOS} ")
            return self.encode(text)
        data = np.frombuffer(piece + b" " + bytes(24), np.uint8)
        ends = np.flatnonzero((data == 32) | (data == 10) | (data == 9))
        starts = np.concatenate([[0], ends[:-1] + 1])
        lengths = ends - starts
        eight = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))
        low = eight[starts] & MASKS[np.minimum(lengths, 8)]
        high = eight[starts + 8] & MASKS[np.clip(lengths - 8, 0, 8)]
        slots = (low * MULTIPLIERS[0] + high * MULTIPLIERS[1]) >> SHIFT
        ids = self._ids[slots]
        known = (self._keys[0, slots] == low) & (self._keys[1, slots] == high) & (lengths <= 16)
        # Free slots hold the key of the empty word, whose index -1 is dropped below.
        ids[lengths == 0] = -1
        unknown = np.flatnonzero(~known & (lengths > 0))
        ids[unknown] = [
            self.index[piece[start:end].decode("utf-8")]
            for start, end in zip(starts[unknown].tolist(), ends[unknown].tolist(), strict=True)
        ]
        new = unknown[(self._ids[slots[unknown]] < 0) & (lengths[unknown] <= 16)]
        taken, first = np.unique(slots[new], return_index=True)
        self._keys[:, taken] = low[new[first]], high[new[first]]
        self._ids[taken] = ids[new[first]]
        both = np.stack([ids, np.where(data[ends] == 10, np.int32(0), np.int32(-1))], axis=1)
        return both[both >= 0]


def _encode_words(span: Span, ids: Path) -> Part:
    with_eos = span.form == "lines"
    words = _Words()
    if with_eos:
        words.index[EOS]
    counts = np.zeros(len(words.index), np.int64)
    text = "\n"
    with open(ids, "wb") as file:
        for piece, text in _pieces(span):
            block = words.encode_lines(piece, text) if with_eos else words.encode(text.lower())
            old, counts = counts, np.bincount(block, minlength=len(words.index))
            counts[: len(old)] += old
            file.write(block.data)
        # The last line of a file may lack its newline.
        if with_eos and span.stop == os.path.getsize(span.path) and not text.endswith(("\n", "\r")):
            file.write(np.zeros(1, np.int32).data)
    return Part(list(words.index), counts, ids)


def _encode_bytes(span: Span, ids: Path) -> Part:
    data = np.memmap(span.path, np.uint8, "r")[span.start : span.stop]
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
    table, counts = np.full(256, -1, np.int32), np.zeros(256, np.int64)
    codes: list[int] = []
    with open(ids, "wb") as file:
        for block in blocks:
            counts += np.bincount(block, minlength=256)
            new = np.flatnonzero((counts > 0) & (table < 0)).tolist()
            for code in sorted(new, key=lambda code: int(np.argmax(block == code))):
                table[code] = len(codes)
                codes.append(code)
            file.write(table[block].data)
    if span.form == "letters" and not set(codes) <= set(b"abcdefghijklmnopqrstuvwxyz "):
        raise UserError(
            f"{span.path} is not text8: expected only the letters a-z and the space; use the"
            " original file."
        )
    counts = counts[codes]
    if span.form == "letters":
        return Part([chr(code).replace(" ", "_") for code in codes], counts, ids)
    return Part([str(code) for code in codes], counts, ids)


def _encode_characters(span: Span, ids: Path) -> Part:
    table, counts = np.full(CHARACTERS, -1, np.int32), np.zeros(0, np.int64)
    words: list[str] = []
    sizes: dict[str, int] = {}
    with open(ids, "wb") as file:
        for text in _measured(span, sizes):
            codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
            new, first = np.unique(codes[table[codes] < 0], return_index=True)
            new = new[np.argsort(first)]
            table[new] = np.arange(len(words), len(words) + len(new))
            words += [code_point(code) for code in new.tolist()]
            block = table[codes]
            old, counts = counts, np.bincount(block, minlength=len(words))
            counts[: len(old)] += old
            file.write(block.data)
    return Part(words, counts, ids, sizes)


def _encode_subwords(span: Span, ids: Path, vocab: Vocabulary) -> Part:
    counts, sizes = np.zeros(len(vocab), np.int64), dict[str, int]()
    with open(ids, "wb") as file:
        for block in subwords.encode(vocab.bpe, _measured(span, sizes)):
            counts += np.bincount(block, minlength=len(vocab))
            file.write(block.data)
    return Part(list(vocab.symbols), counts, ids, sizes)


def _split(span: Span, parts: int) -> list[Span]:
    """Cut a span after white space into about equal parts."""
    borders = [span.start]
    with open(span.path, "rb") as file:
        for i in range(1, parts):
            file.seek(span.start + (span.stop - span.start) * i // parts)
            # A line is short enough to be read at once, or else the text is one line of words.
            while (block := file.read(1 << 16)) and b" " not in block and b"\n" not in block:
                pass
            found = min((p for p in (block.find(b" "), block.find(b"\n")) if p >= 0), default=-1)
            if found >= 0:
                borders.append(min(file.tell() - len(block) + found + 1, span.stop))
    borders.append(span.stop)
    return [
        Span(span.path, start, stop, span.form)
        for start, stop in itertools.pairwise(borders)
        if start < stop
    ]


def cores() -> int:
    """How many processes run at once."""
    if hasattr(os, "sched_getaffinity"):  # Linux; it knows what a container allows.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_span(span: Span, folder: Path, name: str, vocab: Vocabulary | None = None) -> list[Part]:
    """Encode a span into files `name.*` of the folder, with one process per core if it is large.

    `vocab` has the subwords of the form `bpe`; all other forms find their symbols.

    Raises:
      UserError: the text is not UTF-8, or not of this form.
      OSError: the disk is full.
    """
    if span.form in ("bytes", "letters"):
        return [_encode_bytes(span, folder / f"{name}.0.ids")]
    if span.form == "characters":
        return [_encode_characters(span, folder / f"{name}.0.ids")]
    if span.form == "bpe":
        if vocab is None:
            raise ValueError(
                "a text is encoded into the subwords of a vocabulary, but none is given"
            )
        return [_encode_subwords(span, folder / f"{name}.0.ids", vocab)]
    if span.stop - span.start < PARALLEL_BYTES:
        return [_encode_words(span, folder / f"{name}.0.ids")]
    # Plain subprocesses: forking after JAX has started threads may hang, and the spawn method of
    # multiprocessing would run the user's main module, JAX included, once more in every worker.
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    spans = _split(span, cores())
    program = "import sys; from fwm.data.tokens import work; work(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": path}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(asdict(part)), f"{folder / name}.{i}"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, part in enumerate(spans)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate()
            if worker.returncode == 2:
                raise UserError(errors.strip())
            if worker.returncode == 3:
                raise OSError(int(errors), os.strerror(int(errors)))
            if worker.returncode:
                raise RuntimeError(f"Preparing {span.path} failed: {errors.strip()}")
    finally:
        for worker in workers:
            worker.kill()
            with worker:  # Waits and closes the pipe.
                pass
    return [_read_part(Path(f"{folder / name}.{i}")) for i in range(len(spans))]


def _write_part(part: Part, stem: Path) -> None:
    Path(f"{stem}.words").write_bytes("\n".join(part.words).encode("utf-8"))
    np.save(f"{stem}.counts.npy", part.counts)


def _read_part(stem: Path) -> Part:
    words = Path(f"{stem}.words").read_bytes().decode("utf-8").split("\n")
    return Part(words, np.load(f"{stem}.counts.npy"), Path(f"{stem}.ids"))


def count(parts: Sequence[Part]) -> dict[str, int]:
    """Add up the counts of all words but `<eos>`, in the order of their first occurrence."""
    total: dict[str, int] = {}
    for part in parts:
        for word, number in zip(part.words, part.counts.tolist(), strict=True):
            total[word] = total.get(word, 0) + number
    total.pop(EOS, None)
    return total


def write_stream(
    parts: Sequence[Part], index: Mapping[str, int], unknown: int, stream: Path
) -> tuple[int, str]:
    """Write the parts in final indices, words outside the index as `unknown`.

    Returns:
      The number of tokens and their digest.
    """
    tokens, digest = 0, hashlib.blake2b(digest_size=16)
    with open(stream, "wb") as out:
        for part in parts:
            table = np.array([index.get(word, unknown) for word in part.words], np.int32)
            with open(part.ids, "rb") as file:
                while block := file.read(4 * BLOCK_BYTES):
                    final = table[np.frombuffer(block, np.int32)].data
                    out.write(final)
                    digest.update(final)
                    tokens += len(block) // 4
        out.flush()
        os.fsync(out.fileno())
    return tokens, digest.hexdigest()


def work(span_json: str, stem: str) -> None:
    """Encode a span in a process of its own; errors become exit statuses, see `encode_span`."""
    try:
        _write_part(_encode_words(Span(**json.loads(span_json)), Path(f"{stem}.ids")), Path(stem))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(error.errno, file=sys.stderr)
        sys.exit(3)
