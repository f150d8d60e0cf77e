"""What a mean nll is as a perplexity, or in bits, wherever one is computed, told or drawn."""

import math


def perplexity(mean_nll: float) -> float:
    """exp(mean nll in nats); infinity where no float is that large."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def in_words(mean_nll: float, unit: str) -> str:
    """A mean nll in nats as it is told: the perplexity, and of characters their bits too."""
    value = perplexity(mean_nll)
    text = f"perplexity {value:.2f}" if value < 1e5 else f"perplexity {value:.2e}"
    return f"{text}  {mean_nll / math.log(2):.4f} bits/{unit}" if unit == "character" else text
