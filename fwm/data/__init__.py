"""From text to batches: sources, vocabulary, token cache, segments."""

from fwm.data.corpus import Corpus, load
from fwm.data.segments import eval_segments, segments_per_epoch, train_batch
from fwm.data.vocabulary import Vocabulary

__all__ = ["Corpus", "Vocabulary", "eval_segments", "load", "segments_per_epoch", "train_batch"]
