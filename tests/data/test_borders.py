"""Where documents begin, and what batches say of it."""

import numpy as np
import pytest
from test_corpus import folder, load

from configs import default
from fwm.data import Vocabulary
from fwm.data.borders import document_begins
from fwm.errors import UserError
from fwm.tasks import TASKS

WIKI = " \n = One = \n \n a b \n = = part = = \n \n c = \n \n = Two words = \n \n = d \n"
BLANK = "\n\na b\nc\n\nd\n \n\ne e"


def encoded(text, form):
    """A text in words, characters, bytes, or subwords of which some are several newlines."""
    symbols = {
        "words": ["<eos>", *dict.fromkeys(text.split())],
        "characters": [f"U+{ord(c):04X}" for c in dict.fromkeys(text)],
        "bytes": [str(ord(c)) for c in dict.fromkeys(text)],
    }[form]
    vocab = Vocabulary(tuple(symbols))
    return vocab.encode(text, add_eos=False), vocab


@pytest.mark.parametrize("form", ["words", "characters", "bytes"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WIKI, ["= One =", "= Two words ="]),
        (WIKI.replace(" = Two", " b = Two"), ["= One ="]),  # no line of its own
        (BLANK, ["a b", "d", "e e"]),
        ("a b\n\nc", ["a b", "c"]),
        ("a b\nc\n", ["a b"]),
        ("a b", ["a b"]),
        ("\n\n", []),
    ],
)
def test_where_documents_begin(form, text, expected):
    stream, vocab = encoded(text, form)
    begins = document_begins(stream, vocab)
    found = [vocab.decode(stream[i:]).strip(" ") for i in begins]
    assert [one.partition("\n")[0].strip() for one in found] == expected
    # Nothing but the beginnings of lines.
    assert all(i == 0 or vocab.decode(stream[i - 1 : i]) == "\n" for i in begins)


def test_subwords_that_are_several_newlines():
    class Subwords(Vocabulary):
        def decode(self, ids):
            return "".join(self.symbols[i] for i in ids)

    vocab = Subwords(("a", "\n", "\n\n", ".\n", " b", ".\n\n"))
    stream = np.array([2, 0, 3, 1, 4, 5, 3, 0, 2, 2, 4, 3, 4, 2], np.int32)
    # "\n\n|a.\n\n| b.\n\n|.\na\n\n\n\n| b.\n b\n\n"
    assert document_begins(stream, vocab).tolist() == [1, 4, 6, 10]
    assert document_begins(stream[4:6], vocab).tolist() == [0]


def test_batches_know_their_documents(tmp_path):
    lines = [f"w{i} x{i}\n" + "\n" * (i % 3 == 0) for i in range(40)]
    texts = dict(train="".join(lines), valid="".join(lines[:9]), test="a\n")
    where = {"dir": folder(tmp_path / "text", **texts), "cache_dir": str(tmp_path / "cache")}
    config = default.defaults()
    config.data.update(where | {"name": "text", "documents": True})
    config.train.update({"batch_size": 3, "tgt_len": 7, "eval_batch_size": 2})
    task = TASKS["text"](config, ("train", "valid"))
    assert "in 14 documents" in task.summary()
    assert {split: text["documents"] for split, text in task.texts.items()} == {
        "train": 14, "valid": 4, "test": 1
    }  # fmt: skip
    stream, eos = np.asarray(task.corpus.streams["train"]), task.vocab.eos_id
    first = np.flatnonzero((stream[2:] != eos) & (stream[1:-1] == eos) & (stream[:-2] == eos)) + 2
    row = len(stream) // 3
    for step in range(row // 7 + 2):
        batch = task.batch(step, slice(1, 3))
        assert batch.segment_ids.shape == batch.tokens.shape == (2, 7)
        at = step % ((row - 1) // 7) * 7
        for r, ids in zip((1, 2), batch.segment_ids, strict=True):
            places = r * row + at + np.arange(7)
            begun = (first[None] <= places[:, None]).sum(1) - (first < places[0]).sum()
            assert ids.tolist() == begun.tolist()
    # The quick validation's rows: every first token of a document has another id than the one
    # before it, or begins a row with one above 0.
    held = np.asarray(task.corpus.streams["valid"])
    count = 0
    for batch in task.batches("valid", slice(None)):
        ids = np.concatenate([np.zeros((2, 1), np.int32), batch.segment_ids], axis=1)
        count += int((np.diff(ids)[batch.mask] != 0).sum())
    assert count == ((held[2:] != eos) & (held[1:-1] == eos) & (held[:-2] == eos)).sum() + 1
    # Another text than the same one without documents; the same again from the cache.
    plain = load(tmp_path)
    assert plain.train_segment_ids(0, 3, 7) is None
    assert "documents" not in plain.texts["train"]
    assert plain.texts["train"]["digest"] != task.texts["train"]["digest"]
    assert load(tmp_path, "text", documents=True).texts == task.texts
    # A trained model's vocabulary, on one split alone.
    other = load(
        tmp_path, documents=True, vocab=Vocabulary(("<eos>", "a", "<unk>")), splits=("valid",)
    )
    assert other.documents["valid"].tolist() == task.corpus.documents["valid"].tolist()


def test_texts_without_documents(tmp_path):
    dir = folder(tmp_path / "text", "a b\nc\n")
    with pytest.raises(UserError, match="headings ` = Title = ` or blank lines, at which"):
        load(tmp_path, dir=dir, documents=True)
    with pytest.raises(UserError, match="no meaning for lm1b, whose lines are sentences"):
        load(tmp_path, name="lm1b", dir=dir, documents=True)
