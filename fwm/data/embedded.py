"""The embedded corpus: English prose of the Python standard library, zero downloads.

The language reference (`pydoc_data.topics`) and the docstrings of all modules, read with `ast` and
never imported, tokenised as WikiText is. It differs between Python versions.
"""

import ast
import contextlib
import hashlib
import os
import platform
import pydoc_data.topics
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from fwm.data.cache import build_once

# Part of the cache key: raise it when the text below comes out otherwise.
VERSION = 1
# Slow to parse and poor in prose: tests, tables, an editor; and what is not the library's own.
SKIPPED = {"test", "tests", "lib2to3", "encodings", "idlelib", "turtledemo", "pydoc_data"}
SKIPPED |= {"site-packages", "dist-packages"}


def prepare(cache_dir: Path) -> Path:
    """Return the folder of the corpus as train.txt, valid.txt and test.txt, written if needed."""
    python = f"{platform.python_implementation()}-{platform.python_version()}"
    folder = cache_dir / f"embedded-{VERSION}-{python}"
    build_once(folder, _write)
    return folder


def _write(folder: Path) -> None:
    seen: set[str] = set()
    with contextlib.ExitStack() as stack:
        files = {
            split: stack.enter_context(open(folder / f"{split}.txt", "w", encoding="utf-8"))
            for split in ("train", "valid", "test")
        }
        for name, paragraphs in _documents():
            # One paragraph in one place: copies would leak from training into the held-out text.
            new = [p for p in dict.fromkeys(paragraphs) if p not in seen]
            seen.update(new)
            if new:
                bucket = hashlib.blake2b(name.encode()).digest()[0]
                split = "valid" if bucket < 20 else "test" if bucket < 40 else "train"
                lines = [[], *(_tokens(p) for p in (f"= {name} =", *new))]
                files[split].writelines(" ".join(line) + "\n" for line in lines)


def _documents() -> Iterator[tuple[str, list[str]]]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield name, _prose(text)
    library = sysconfig.get_path("stdlib")
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(set(folders) - SKIPPED)
        for file in sorted(file for file in files if file.endswith(".py")):
            path = os.path.join(folder, file)
            with tokenize.open(path) as source, warnings.catch_warnings():
                # Old escapes in the library's own strings are not the user's business.
                warnings.simplefilter("ignore")
                module = ast.parse(source.read())
            name = os.path.relpath(path, library).removesuffix(".py").replace(os.sep, " ")
            yield name, _prose("\n\n".join(_docstrings(module)))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings(child)


def _prose(text: str) -> list[str]:
    """The paragraphs that are sentences, each on one line: no code, tables or signatures."""
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", textwrap.dedent(text)))
    return [p for p in paragraphs if _is_prose(p)]


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    plain = sum(
        re.fullmatch(r"[\"'(*]*[A-Za-z][a-z]*(['-][a-z]+)*[.,;:!?)\"'*]*", w) is not None
        for w in words
    )
    return len(words) >= 5 and plain >= 0.7 * len(words) and ">>>" not in paragraph


def _tokens(paragraph: str) -> list[str]:
    """Words and punctuation as in WikiText: `it 's`, `built @-@ in`, `3 @.@ 5`, `1 @,@ 000`."""
    paragraph = re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", paragraph)
    paragraph = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", paragraph)
    return re.findall(r"@[-.,]@|\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+|[^\w\s]", paragraph)
