"""Tasks of sequences that are drawn, not read: a base for one's own."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from fwm.data import Vocabulary
from fwm.errors import UserError
from fwm.model import LanguageModel
from fwm.score import Batches
from fwm.step import Batch
from fwm.tasks.task import Task

SPLITS = ("train", "valid", "test")


class Synthetic(Task):
    """Endless training sequences; the same `n_eval` for every evaluation, of other draws.

    A subclass gives `symbols` and `draw`. Sequences are `config.train.tgt_len` long; of a trained
    model's evaluation `config.eval.tgt_len`, where that is not 0. Sequence `index` of a split is a
    function of (seed, split, index) alone, the seed `config.seed` in training and 0 in evaluation.
    """

    symbols: tuple[str, ...]
    n_eval: int = 512

    def __init__(self, config: Any, splits: Sequence[str], vocab: Vocabulary | None = None):
        self.vocab = Vocabulary(self.symbols)
        if vocab is not None and vocab.symbols != self.symbols:
            raise UserError(
                f"the task {config.task} has {len(self.symbols)} symbols and the trained model "
                f"{len(vocab)} others: give the config file that it was trained with."
            )
        self._name, self._seed = config.task, config.seed
        self._n_train, self._n_valid = config.train.batch_size, config.train.eval_batch_size
        evaluated = 0 if "train" in splits else config.eval.tgt_len
        self._length = evaluated or config.train.tgt_len

    @abstractmethod
    def draw(
        self, rng: np.random.Generator, length: int
    ) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """One sequence: tokens, the target at each, and which targets count."""

    def summary(self) -> str:
        """What is drawn."""
        return (
            f"Data: {self._name}, sequences of {self._length} drawn anew for every step, "
            f"{self.n_eval:,} for validation, {len(self.vocab):,} symbols."
        )

    def batch(self, step: int, rows: slice) -> Batch:
        """Sequences that no other step has."""
        return self._batch("train", self._seed, step, self._n_train, rows)

    def batches(self, split: str, rows: slice) -> Iterator[Batch]:
        """The `n_eval` sequences of a split, the last batch filled up with some that count not."""
        for number in range(-(-self.n_eval // self._n_valid)):
            batch = self._batch(split, 0, number, self._n_valid, rows)
            there = number * self._n_valid + batch.rows < self.n_eval
            yield batch._replace(mask=batch.mask & there[:, None])

    def protocol(self, config: Any, model: LanguageModel, variables: Any, split: str) -> Any:
        """The measures over all sequences of the split."""
        return Batches(self, model, variables, split)

    def _batch(self, split: str, seed: int, number: int, n_row: int, rows: slice) -> Batch:
        numbers = np.arange(n_row, dtype=np.int32)[rows]
        where = seed, SPLITS.index(split)
        drawn = [
            self.draw(np.random.default_rng((*where, number * n_row + int(row))), self._length)
            for row in numbers
        ]
        tokens, targets, mask = (np.stack(part) for part in zip(*drawn, strict=True))
        first = np.ones(len(numbers), bool)
        return Batch(tokens.astype(np.int32), targets.astype(np.int32), first, numbers, mask)
