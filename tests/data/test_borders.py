"""Where documents begin, and what batches say of it."""

import json

import numpy as np
import pytest
from test_corpus import folder, load

from configs import default
from fwm import data
from fwm.data import Vocabulary, borders
from fwm.data.tokens import Span
from fwm.errors import UserError
from fwm.model import LanguageModel, build_config
from fwm.score import CarryOver, SlidingWindow
from fwm.tasks import TASKS

WIKI = " \n = One = \n \n a b \n = = part = = \n \n c = \n \n = Two words = \n \n = d \n"
BLANK = "\n\na b\nc\n\nd\n \n\ne e"


@pytest.mark.parametrize("form", ["words", "characters"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WIKI, ["= One =", "= Two words ="]),
        (WIKI.replace(" = Two", " b = Two"), ["= One ="]),  # no line of its own
        (WIKI.replace("\n", "\r\n"), ["= One =", "= Two words ="]),
        ("\ufeff= B =\n\n= A =", ["= B =", "= A ="]),
        (BLANK, ["a b", "d", "e e"]),
        ("a b\n\nc", ["a b", "c"]),
        ("a <eos> b\n\nc", ["a", "c"]),
        ("a b\nc\n", ["a b"]),
        ("a b", ["a b"]),
        ("\n\n", []),
    ],
)
def test_where_documents_begin(form, text, expected, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text, newline="")
    form = {"words": "lines"}.get(form, form)
    span = Span(str(path), 0, path.stat().st_size, form)
    _, lines = borders.first_lines({"train": span}, {})
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if form == "lines":
        vocab = Vocabulary(("<eos>", *dict.fromkeys(text.replace("<eos>", "").split())))
    else:
        vocab = Vocabulary(tuple(f"U+{ord(c):04X}" for c in dict.fromkeys(text)))
        expected = ["a <eos> b" if one == "a" else one for one in expected]
    stream = vocab.encode(text, add_eos=False)
    begins = borders.places(stream, vocab, lines["train"])
    found = [vocab.decode(stream[i:]).strip(" ") for i in begins]
    assert [one.partition("\n")[0].strip() for one in found] == expected
    # Nothing but the beginnings of lines.
    assert all(i == 0 or vocab.decode(stream[i - 1 : i]) == "\n" for i in begins)


def test_all_splits_begin_alike(tmp_path):
    spans = {}
    for split, text in {"train": WIKI, "valid": BLANK, "test": "a\n\nb\n\n= C =\n"}.items():
        (tmp_path / split).write_text(text)
        spans[split] = Span(str(tmp_path / split), 0, len(text), "lines")
    at, lines = borders.first_lines(spans, {})
    assert (at, lines) == ("headings", {"train": [1, 8], "valid": [], "test": [4]})


def test_subwords_that_are_several_newlines():
    class Subwords(Vocabulary):
        def decode(self, ids):
            return "".join(self.symbols[i] for i in ids)

    vocab = Subwords(("a", "\n", "\n\n", ".\n", " b"))
    # "\n\n|a|.\n|\n| b|\n\n|a": lines 0 to 6, of which some begin inside of a subword.
    stream = np.array([2, 0, 3, 1, 4, 2, 0], np.int32)
    assert borders.places(stream, vocab, [0, 1, 2, 4, 5, 6, 7]).tolist() == [0, 1, 4, 6]
    assert borders.places(stream[:6], vocab, [6]).tolist() == []


@pytest.mark.parametrize(("n", "tokenizer"), [(40, "words"), (6, "characters"), (40, "bpe")])
def test_records_are_documents(n, tokenizer, tmp_path):
    """Whatever stands in them, and where a text of few is cut inside of one."""
    path = tmp_path / "mine.jsonl"
    record = "new \n\n= A =\r\nx <eos> \r y\n\n z" + 9 * "\n\nx y" + "\n"
    path.write_text(n * (json.dumps({"text": record}) + "\n"))
    options = {"vocab_size": 300} if tokenizer == "bpe" else {}
    options |= {"file": str(path), "cache_dir": str(tmp_path / "cache"), "tokenizer": tokenizer}
    corpus = data.load("mine", documents=True, **options)
    count = 0
    for split, begun in corpus.documents.items():
        stream = corpus.streams[split]
        assert len(begun) == len(stream) + 1
        assert begun[-1] == corpus.texts[split]["documents"]
        cut = np.flatnonzero(np.diff(begun))
        if n > 6 or split == "train":
            assert cut[0] == 0
        for text in map(corpus.vocab.decode, np.split(stream, cut)[1:]):
            assert (text.split()[0], text.count("new")) == ("new", 1)
        count += len(cut)
        assert corpus.texts[split]["begin_at"] == "files or records"
    assert count == n


def test_batches_know_their_documents(tmp_path):
    lines = [f"w{i} x{i}\n" + "\n" * (i % 3 == 0) for i in range(40)]
    texts = dict(train="".join(lines), valid="".join(lines[:9]), test="a\n")
    where = {"dir": folder(tmp_path / "text", **texts), "cache_dir": str(tmp_path / "cache")}
    config = default.defaults()
    config.data.update(where | {"name": "text", "documents": True})
    config.train.update({"batch_size": 3, "tgt_len": 7, "eval_batch_size": 2})
    task = TASKS["text"](config, ("train", "valid"))
    assert "in 14 documents (blank lines)," in task.summary()
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
    # And the exact protocols.
    model = LanguageModel(build_config(config.model.to_dict() | {"no_pos": True}, len(task.vocab)))
    for config.train.carry_over_fast_weight, kind in ((False, SlidingWindow), (True, CarryOver)):
        protocol = task.protocol(config, model, None, "valid")
        assert isinstance(protocol, kind)
        np.testing.assert_array_equal(protocol.segment_ids, task.corpus.documents["valid"][1:])
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
    with pytest.raises(UserError, match="with headings ` = Title = ` or with blank lines, at"):
        load(tmp_path, dir=dir, documents=True)
    for name, what in [("lm1b", "sentences that"), ("text8", "characters without documents")]:
        with pytest.raises(UserError, match=f"no meaning for {name}, {what}"):
            load(tmp_path, name=name, dir=dir, documents=True)
