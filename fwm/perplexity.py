"""What a mean nll is as a perplexity, wherever one is computed, told or drawn."""

import math


def perplexity(mean_nll: float) -> float:
    """exp(mean nll in nats); infinity where no float is that large."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
