"""Which form of an op runs, of those that have two: one for a CPU, and one for everything else.

| op | on a CPU | elsewhere |
|---|---|---|
| delta rule, a decay per head | groups of chunks in the cache (`chunks`) | all at once (`whole`) |
| feed-forward | keeps the wide activation | computes it again, masks within the matmuls |
| adaptive softmax | blocks for the cache, as many as there are tokens | few blocks, known sizes |
| causal attention | blocks of 64 queries, whose scores the cache holds | of 256, gradient by hand |
| dropout mask | a concatenation | one byte for four elements |

A second form is there where one costs the other's platform 15% of a step or more; what each costs
stands in benchmarks/results/gpu_cost.md. Both are tested against the definition everywhere.
"""

import jax


def on_cpu() -> bool:
    """Whether what is traced now is meant for a CPU."""
    return jax.default_backend() == "cpu"
