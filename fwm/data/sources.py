"""Where text comes from: a local folder, the embedded corpus, or a TFDS builder."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fwm.data import embedded
from fwm.data.tokens import Span
from fwm.errors import UserError

SPLITS = ("train", "valid", "test")
WORD_SETS = ("wikitext103", "wikitext2", "ptb", "lm1b")
# Character sets with the form of their original single file.
CHARACTER_SETS = {"enwik8": "bytes", "text8": "letters"}
NAMES = ("embedded", *WORD_SETS, *CHARACTER_SETS, "tfds:<name>")


@dataclass(frozen=True)
class Source:
    """The spans of every split that is there.

    min_count: words rarer than this in the training text are `<unk>`, as the benchmark demands.
    """

    spans: Mapping[str, Span]
    unit: str
    min_count: int = 1


def locate(name: str, dir: str, cache_dir: Path, download: bool) -> Source:
    """Find the text of a corpus.

    Raises:
      UserError: an unknown name, a folder that is missing, or text that cannot be fetched.
    """
    known = name in (*WORD_SETS, *CHARACTER_SETS)
    if dir:
        return _folder(name, dir)
    if name == "embedded":
        return _folder(name, str(embedded.prepare(cache_dir)), min_count=3)
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
    return _folder(name, str(folder), CHARACTER_SETS.get(name), 3 if name == "lm1b" else 1)


def layout(name: str) -> str:
    """Describe the files that a folder of this corpus may have."""
    files = "train.txt, valid.txt and test.txt"
    if name in CHARACTER_SETS:
        return f"{files} (as prepared by Transformer-XL) or the original file {name}"
    if name == "ptb":
        return f"{files} (or ptb.train.txt, ptb.valid.txt and ptb.test.txt)"
    if name == "lm1b":
        return f"{files}, one sentence per line"
    return f"{files} (or wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens)"


def label(name: str, dir: str) -> str:
    """What a corpus is called: a folder given without a name is not the embedded corpus."""
    return Path(dir).absolute().name if dir and name == "embedded" else name


def _folder(name: str, dir: str, form: str | None = None, min_count: int = 1) -> Source:
    folder = Path(dir)
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {dir}; expected a folder with {layout(name)} as config.data.dir."
        )
    prepared = form or ("codes" if name in CHARACTER_SETS else "lines")
    sets = []
    for naming in ("{}.txt", "wiki.{}.tokens", "ptb.{}.txt"):
        files = {split: folder / naming.format(split) for split in SPLITS}
        sets.append(
            {
                split: Span(str(file), 0, os.path.getsize(file), prepared)
                for split, file in files.items()
                if file.is_file()
            }
        )
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
    return Source(spans, "character" if name in CHARACTER_SETS else "word", min_count)


def _ninety_five_five(path: str, form: str) -> dict[str, Span]:
    """Split the original file as everybody does: its last 5 and 5 of 100 million bytes."""
    size = os.path.getsize(path)
    held_out = size // 20
    borders = (0, size - 2 * held_out, size - held_out, size)
    return {
        split: Span(path, start, stop, form)
        for split, start, stop in zip(SPLITS, borders[:-1], borders[1:], strict=True)
    }
