"""The contract of a task: its vocabulary, its batches with a mask, its score."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxtyping import Array, Float

from fwm.data import Vocabulary
from fwm.errors import UserError
from fwm.model import LanguageModel
from fwm.step import Batch, masked_sums, restart


class Task(ABC):
    """What a model is trained on, opened from all settings.

    Args:
        config: all settings.
        splits: those that are needed, of train, valid, test.
        vocab: of a trained model, to be used instead of the task's own.

    Raises:
        UserError: the task cannot be opened so.
    """

    vocab: Vocabulary  # what tokens and targets stand for
    unit: str = "symbol"  # or word, character, ...
    warnings: tuple[str, ...] = ()  # sentences for the user
    # By split, the text that is read: name, dir, digest, tokens, documents. Empty where none is.
    texts: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    size: int = 0  # training tokens there are; 0: they never end
    writes: bool = False  # what a model goes on to say has a meaning (`--mode=generate`)

    @abstractmethod
    def __init__(self, config: Any, splits: Sequence[str], vocab: Vocabulary | None = None):
        """See the class."""

    @abstractmethod
    def summary(self) -> str:
        """One line that says what there is to learn from."""

    def identity(self) -> Any:
        """What must be the same in all processes of a run, as JSON."""
        return self.vocab.text()

    @abstractmethod
    def batch(self, step: int, rows: slice) -> Batch:
        """These rows of the training batch of a step, a pure function of (settings, step)."""

    @abstractmethod
    def batches(self, split: str, rows: slice) -> Iterator[Batch]:
        """These rows of the batches of a split, for the quick validation; all have one shape.

        Where a memory is carried, a batch continues the one before, but for `first` rows.
        """

    def measures(self, nll: Float[Array, "B T"], batch: Batch) -> dict[str, Float[Array, "B T"]]:
        """What else than the nll is to be averaged over the targets that count, by name."""
        return {}

    def score(
        self, model: LanguageModel, variables: Any, batch: Batch, memory: Any
    ) -> tuple[dict[str, Float[Array, ""]], Any]:
        """Sums over the targets that count: `nll`, `count`, the measures; and the next memory."""
        memory = restart(memory, batch.first)
        nll, new = model.apply(
            variables, batch.tokens, batch.targets, memory, segment_ids=batch.segment_ids
        )
        sums = masked_sums(batch, nll=nll, **self.measures(nll, batch))
        return sums, None if memory is None else new

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What sums of `score` over many batches say: `loss` in nats per target, the measures.

        Raises:
            UserError: no target has counted.
        """
        count = sums["count"]
        if not count:
            raise UserError(
                "no target of these batches counts: their masks must be True somewhere."
            )
        means = {name: sums[name] / count for name in sums if name not in ("nll", "count")}
        return {"loss": sums["nll"] / count} | means

    @abstractmethod
    def protocol(self, config: Any, model: LanguageModel, variables: Any, split: str) -> Any:
        """How a trained model is scored exactly: a value of `fwm.score`."""
