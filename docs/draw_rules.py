"""Draws docs/pictures/rules.png, what a memory keeps under each switch: python -m docs.draw_rules.

Every token writes a value of its own. At row j and column t is how much of the value of token j is
read at its key once token t has been written.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from fwm.ops import delta_rule, l2_normalize, sum_rule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH, WIDTH, SAME = 32, 16, (6, 20)  # the second of these tokens has the key of the first one


def kept(rule, k, n=1, **options):
    """[LENGTH, LENGTH]: rows are one batch each, that asks for its own key after every token."""
    q = jnp.broadcast_to(k[n - 1 :: n, None, None], (LENGTH, LENGTH, 1, WIDTH))
    values = jnp.repeat(jnp.eye(LENGTH), n, axis=0)
    k, v = (jnp.broadcast_to(x[None, :, None], (LENGTH, LENGTH * n, 1, x.shape[-1]))
            for x in (k, values))  # fmt: skip
    options = {
        name: jnp.broadcast_to(x[None, :, None], (LENGTH, len(x), 1, *x.shape[1:]))
        for name, x in options.items()
    }
    out, _ = rule(q, k, v, **options)
    return np.stack([out[j, :, 0, j] for j in range(LENGTH)])


def main():
    """Six memories beside one another."""
    keys = l2_normalize(jax.random.normal(jax.random.key(0), (LENGTH, WIDTH)))
    keys = keys.at[SAME[1]].set(keys[SAME[0]])
    ones = jnp.ones(LENGTH)
    by_channel = jnp.where(jnp.arange(WIDTH) < WIDTH // 2, -0.4, -0.005)[None] * ones[:, None]
    panels = {
        "sum": kept(sum_rule, keys),
        "sum, decay by head (RetNet)": kept(sum_rule, keys, log_decay=-0.1 * ones),
        "delta (DeltaNet)": kept(delta_rule, keys, beta=0.9 * ones),
        "delta, decay by head (Gated DeltaNet)": kept(
            delta_rule, keys, beta=0.9 * ones, log_decay=-0.1 * ones
        ),
        "delta, decay by channel (Kimi Delta)": kept(
            delta_rule, keys, beta=0.9 * ones, log_decay=by_channel
        ),
        "delta that removes 0.4 of it (Comba)": kept(
            delta_rule, keys, beta=0.9 * ones, erase_key=0.4 * keys
        ),
    }
    figure, axes = plt.subplots(2, 3, figsize=(9.5, 6.4), layout="constrained")
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=True):
        image = axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu", interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("after token", fontsize=8)
        axis.set_ylabel("of the value of token", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=axes, shrink=0.6)
    figure.savefig(Path(__file__).parent / "pictures" / "rules.png", dpi=80)


if __name__ == "__main__":
    main()
