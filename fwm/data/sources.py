"""Where text comes from: a local file or folder, the embedded corpus, or a TFDS builder."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fwm.data import documents, embedded
from fwm.data.tokens import Span
from fwm.errors import UserError

SPLITS = ("train", "valid", "test")
WORD_SETS = ("wikitext103", "wikitext2", "ptb", "lm1b")
# Character sets with the form of their original single file.
CHARACTER_SETS = {"enwik8": "bytes", "text8": "letters"}
NAMES = ("embedded", *WORD_SETS, *CHARACTER_SETS, "tfds:<name>")
# What can be read into what: the form of a span, and what a token of it is called.
TOKENIZERS = {
    "words": ("lines", "word"),
    "characters": ("characters", "character"),
    "bpe": ("bpe", "subword"),
}
USES = {"valid": "validation", "test": "testing"}
SEARCHED = 1 << 20  # bytes that the end of a line is looked for in


@dataclass(frozen=True)
class Source:
    """The spans of every split that is there.

    min_count: words rarer than this in the training text are `<unk>`, as the benchmark demands.
    called: what a span is called where its path would not help: it is a file of our own.
    gathered: whether the spans are of documents that came as such, `documents.gather`.
    note: a sentence on splits that were made of others, where their names had promised none.
    """

    spans: Mapping[str, Span]
    unit: str
    min_count: int = 1
    called: Mapping[str, str] = field(default_factory=dict)
    gathered: bool = False
    note: str = ""

    def where(self, split: str) -> str:
        """What the text of a split is called in a message."""
        return self.called.get(split, self.spans[split].path)


def locate(
    name: str,
    dir: str,
    cache_dir: Path,
    download: bool,
    *,
    file: str = "",
    tokenizer: str = "",
    field: str = "text",
) -> Source:
    """Find the text of a corpus; `fwm.data.load` has the arguments.

    Raises:
      UserError: an unknown name, a file or folder that is missing, text that cannot be read,
        split or fetched, or a tokenizer without meaning for it.
    """
    if tokenizer and tokenizer not in TOKENIZERS:
        raise UserError(
            f"unknown config.data.tokenizer {tokenizer!r}: expected one of {', '.join(TOKENIZERS)}."
        )
    if dir and file:
        raise UserError(
            f"config.data.dir={dir} and config.data.file={file} are two texts: give one of them."
        )
    if name in CHARACTER_SETS:
        if tokenizer not in ("", "characters"):
            raise UserError(
                f"{name} is read by its characters, but config.data.tokenizer is {tokenizer!r}:"
                " leave it out, or the name to have a file read as any other text."
            )
        return _located(name, dir, file, cache_dir, download, field)
    source = _located(name, dir, file, cache_dir, download, field)
    form, unit = TOKENIZERS[tokenizer or "words"]
    if form == "lines":
        _check_words(source)
        return source
    spans = {split: replace(span, form=form) for split, span in source.spans.items()}
    return replace(source, spans=spans, unit=unit, min_count=1)


def _located(name: str, dir: str, file: str, cache_dir: Path, download: bool, field: str) -> Source:
    known = name in (*WORD_SETS, *CHARACTER_SETS)
    if file:
        return _file(name, file, cache_dir, field)
    if dir:
        return _folder(name, dir, cache_dir, field)
    if name == "embedded":
        return _folder(name, str(embedded.prepare(cache_dir)), cache_dir, min_count=3)
    if not known and not name.startswith("tfds:"):
        raise UserError(
            f"Unknown config.data.name {name!r}; choose one of {', '.join(NAMES)}, or give the"
            " folder of any other text as --config.data.dir."
        )
    folder = cache_dir / f"text-{name.replace(':', '-').replace('/', '-')}"
    if not folder.exists():
        if known and not download:
            raise UserError(
                f"{name} is not part of the program: make a folder with {layout(name)} and give it"
                " as --config.data.dir, or allow the download with --config.data.download."
            )
        try:
            # Heavy, and needed only here: everything else works without TFDS.
            from fwm.data import tfds_builder
        except ModuleNotFoundError as error:
            raise UserError(
                f"Fetching {name} needs the package {error.name}: `pip install tensorflow-datasets"
                f" importlib_resources array_record`, or make a folder with {layout(name)} and give"
                " it as --config.data.dir."
            ) from None
        tfds_builder.prepare(name, folder, cache_dir / "tfds", layout(name))
    return _folder(
        name,
        str(folder),
        cache_dir,
        form=CHARACTER_SETS.get(name),
        min_count=3 if name == "lm1b" else 1,
    )


def layout(name: str) -> str:
    """Describe the files that a folder of this corpus may have."""
    files = "train.txt, valid.txt and test.txt"
    if name in CHARACTER_SETS:
        return f"{files} (as prepared by Transformer-XL) or the original file {name}"
    if name == "ptb":
        return f"{files} (or ptb.train.txt, ptb.valid.txt and ptb.test.txt)"
    if name == "lm1b":
        return f"{files}, one sentence per line"
    return (
        f"{files} (or wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens), or files"
        f" {', '.join(documents.KINDS)}"
    )


def label(name: str, dir: str, file: str = "") -> str:
    """What a corpus is called: text given without a name is not the embedded corpus."""
    if file and name not in CHARACTER_SETS:
        # No other name is that of one file.
        path = Path(file)
        return path.name[: -len(documents.kind(path) or path.suffix) or None] or path.name
    return Path(dir).absolute().name if dir and name == "embedded" else name


def _file(name: str, file: str, cache_dir: Path, field: str) -> Source:
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{file} is a folder: give it as --config.data.dir.")
    if not path.is_file():
        raise UserError(f"There is no file {file}; expected a text as config.data.file.")
    if name in CHARACTER_SETS:
        return Source(_ninety_five_five(file, CHARACTER_SETS[name]), "character")
    if documents.kind(path) in ("", ".txt"):
        return Source(_cut(file, file), "word")
    return _gathered({"": [path]}, file, cache_dir, field)


def _gathered(files: documents.Files, where: str, cache_dir: Path, field: str) -> Source:
    folder, borders = documents.gather(files, field, cache_dir)
    if "" not in files:
        paths = {split: str(folder / f"{split}.txt") for split in SPLITS if split in files}
        spans = {split: Span(p, 0, os.path.getsize(p), "lines") for split, p in paths.items()}
        spans, note = _with_valid(spans, where)
        called = {s: f"The {s} split of {where}" for s in spans}
        return Source(spans, "word", called=called, gathered=True, note=note)
    text = str(folder / f"{documents.WHOLE}.txt")
    spans = {s: Span(text, *ends, "lines") for s, ends in borders.items()} or _cut(text, where)
    return Source(spans, "word", called=dict.fromkeys(spans, where), gathered=True)


def _with_valid(spans: dict[str, Span], where: str) -> tuple[dict[str, Span], str]:
    """The spans, and where only train or train and test are there the others, of train's end."""
    if "train" not in spans or "valid" in spans:
        return spans, ""
    made = tuple(split for split in SPLITS if split not in spans)
    cut = _cut(spans["train"].path, where, ("train", *made))
    note = (
        f"{where} has no {' and no '.join(made)} split: the last {5 * len(made)}% of its training "
        "text are held out."
    )
    return spans | cut, note


def _cut(path: str, where: str, splits: Sequence[str] = SPLITS) -> dict[str, Span]:
    """Split a text by place, 5% for each but the first, at the end of a line, or of a word.

    Raises:
      UserError: it is empty or too small for it.
    """
    size = os.path.getsize(path)
    if not size:
        raise UserError(f"{where} is empty; expected text.")
    held_out = size // 20
    borders = [0]
    with open(path, "rb") as file:
        for mark in (size - n * held_out for n in range(len(splits) - 1, 0, -1)):
            file.seek(mark)
            text = file.read(min(held_out, SEARCHED))
            # After a line of usual length; else after a word. Text without any white space is cut
            # at a character, whose first byte is no continuation.
            found = 1 + text.find(b"\n", 0, len(text) // 2)
            found = found or 1 + min((p for p in map(text.find, b" \t\r") if p >= 0), default=-1)
            if not found:
                found = next((i for i, byte in enumerate(text) if byte & 0xC0 != 0x80), 0)
            borders.append(mark + found)
        borders.append(size)
        for start, stop in itertools.pairwise(borders):
            file.seek(start)
            if not file.read(min(stop - start, SEARCHED)).strip():
                uses = " and 5% for ".join(USES[split] for split in splits[1:])
                raise UserError(
                    f"{where} has {size} bytes of text: too few to hold out 5% for {uses}; give a"
                    " longer one, or a folder with train.txt, valid.txt and test.txt as"
                    " --config.data.dir."
                )
    return {
        split: Span(path, start, stop, "lines")
        for split, start, stop in zip(splits, borders[:-1], borders[1:], strict=True)
    }


def _check_words(source: Source) -> None:
    """Raise `UserError` where a span of a longer text begins inside of a word."""
    for split, span in source.spans.items():
        with open(span.path, "rb") as file:
            file.seek(max(span.start - 1, 0))
            if span.start and file.read(1) not in (b" ", b"\t", b"\r", b"\n"):
                raise UserError(
                    f"{source.where(split)} has no white space where it would be cut into splits,"
                    " after 90 and 95% of it: read it with --config.data.tokenizer=characters or"
                    " bpe."
                )


def _folder(
    name: str,
    dir: str,
    cache_dir: Path,
    field: str = "text",
    *,
    form: str | None = None,
    min_count: int = 1,
) -> Source:
    folder = Path(dir)
    if folder.is_file():
        raise UserError(f"{dir} is a file: give it as --config.data.file.")
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {dir}; expected a folder with {layout(name)} as config.data.dir."
        )
    prepared = form or ("codes" if name in CHARACTER_SETS else "lines")
    sets = []
    for naming in ("{}.txt", "wiki.{}.tokens", "ptb.{}.txt"):
        spans = {}
        for split, names in documents.NAMES.items():
            files = [file for name in names if (file := folder / naming.format(name)).is_file()]
            for file in files[:1]:
                spans[split] = Span(str(file), 0, os.path.getsize(file), prepared)
        sets.append(spans)
    there = [spans for spans in sets if spans]
    if len(there) > 1:
        one, other = (Path(next(iter(spans.values())).path).name for spans in there[:2])
        raise UserError(
            f"{dir} has two sets of splits, those of {one} and of {other}; expected one of them:"
            " move the other to a folder of its own."
        )
    spans = there[0] if there else {}
    if not spans and name in CHARACTER_SETS and (folder / name).is_file():
        spans = _ninety_five_five(str(folder / name), CHARACTER_SETS[name])
    if not spans and name not in CHARACTER_SETS and (found := documents.find(folder)):
        return _gathered(found, dir, cache_dir, field)
    if name in CHARACTER_SETS:
        return Source(spans, "character", min_count)
    # A text of one's own; those of benchmarks have splits that everybody uses.
    spans, note = (spans, "") if name in WORD_SETS else _with_valid(spans, dir)
    return Source(spans, "word", min_count, note=note)


def _ninety_five_five(path: str, form: str) -> dict[str, Span]:
    """Split the original file as everybody does: its last 5 and 5 of 100 million bytes."""
    size = os.path.getsize(path)
    held_out = size // 20
    borders = (0, size - 2 * held_out, size - held_out, size)
    return {
        split: Span(path, start, stop, form)
        for split, start, stop in zip(SPLITS, borders[:-1], borders[1:], strict=True)
    }
