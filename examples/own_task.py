"""A task of one's own: is the number of ones so far odd?

A random half of the positions counts; chance is an accuracy of 0.5.
"""

import math

from fwm.config import build
from fwm.tasks import TASKS, Synthetic


class Parity(Synthetic):
    symbols = ("0", "1")

    def draw(self, rng, length):
        bits = rng.integers(2, size=length)
        return bits, bits.cumsum() % 2, rng.random(length) < 0.5

    def measures(self, nll, batch):
        return {"accuracy": (nll < math.log(2)).astype("float32")}  # Of two symbols the likelier.


TASKS["parity"] = Parity


def get_config(options="tiny"):
    config = build(options, feature_map="dpfp", d_model=64, d_inner=128, dropout=0.0)
    config.update({"task": "parity", "train": {"batch_size": 32, "tgt_len": 16, "max_step": 1000}})
    return config
