"""The paper's synthetic retrieval experiments (section 6.1): capacity, and the update rule."""

from fwm.retrieval.experiment import LIMITS, run

__all__ = ["LIMITS", "run"]
