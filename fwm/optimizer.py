"""Learning-rate schedules and the optimizer: Adam on clipped gradients, as in the paper; AdamW."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fwm.errors import UserError
from fwm.limits import NOT_NEGATIVE, RATE, SIZE, whole

Schedule = Callable[[Array], Array]


def cosine(lr: float, warmup_step: int, max_step: int, decay_step: int = 0) -> Schedule:
    """lr t / warmup below `warmup_step`, then lr/2 (1 + cos(pi t / max_step)).

    As in the official toolkit the cosine counts from the first update, not from the warmup's end.
    """
    return lambda t: jnp.where(
        t < warmup_step,
        lr * t / max(warmup_step, 1),
        # As lr sin^2(pi/2 (1 - t / max_step)) it keeps its digits to the end in float32.
        lr * jnp.sin(0.5 * jnp.pi * jnp.maximum(max_step - t, 0.0) / max_step) ** 2,
    )


def inv_sqrt(lr: float, warmup_step: int, max_step: int, decay_step: int = 0) -> Schedule:
    """lr t / warmup^1.5 below `warmup_step`, then lr / sqrt(t): peaks at lr / sqrt(warmup)."""
    return lambda t: lr * jnp.minimum(t / max(warmup_step, 1) ** 1.5, 1.0 / jnp.sqrt(t))


def constant(lr: float, warmup_step: int, max_step: int, decay_step: int = 0) -> Schedule:
    """lr t / warmup below `warmup_step`, then lr."""
    return lambda t: lr * jnp.minimum(t / max(warmup_step, 1), 1.0)


def wsd(lr: float, warmup_step: int, max_step: int, decay_step: int = 0) -> Schedule:
    """lr t / warmup below `warmup_step`, then lr, then lr (max_step - t) / decay at the end.

    Warmup, stable, decay (Hu et al. 2024, MiniCPM, section 4): what stands before the decay can be
    gone on from with any later end.

    Args:
        lr: of the stable part.
        warmup_step: updates.
        max_step: updates; the rate of the last one is 0.
        decay_step: updates; 0: a tenth of `max_step`.

    Raises:
        UserError: warmup and decay are longer than `max_step` together.
    """
    decay_step = decay_step or max(max_step // 10, 1)
    if warmup_step + decay_step > max_step:
        raise UserError(
            f"config.train.warmup_step={warmup_step} and {decay_step} steps of decay are more than "
            f"config.train.max_step={max_step}: make one of them shorter."
        )
    # optax takes no warmup as one that never leaves its first value.
    first = optax.warmup_constant_schedule(0.0 if warmup_step else lr, lr, warmup_step)
    last = optax.linear_schedule(lr, 0.0, decay_step)
    return optax.join_schedules([first, last], [max_step - decay_step])


SCHEDULES = {"cosine": cosine, "inv_sqrt": inv_sqrt, "constant": constant, "wsd": wsd}


def learning_rate(
    scheduler: str, lr: float, warmup_step: int, max_step: int, decay_step: int = 0
) -> Schedule:
    """Rate of update t = 1, 2, ...: a function of t as a float32 scalar.

    The official loop sets the rate after the step, so that its first update runs at the full lr
    and every later one with the rate of the update before; here update t has the rate for t.

    Raises:
        UserError: unknown scheduler, a number out of range, or a decay that it has not or has
            no room for.
    """
    RATE.check("lr", lr)
    for name, kind, value in (
        ("warmup_step", whole(0), warmup_step),
        ("max_step", SIZE, max_step),
        ("decay_step", whole(0), decay_step),
    ):
        kind.check(name, value)
    if scheduler not in SCHEDULES:
        raise UserError(f"unknown scheduler {scheduler!r}: expected one of {', '.join(SCHEDULES)}.")
    if decay_step and scheduler != "wsd":
        raise UserError(
            f"config.train.decay_step={decay_step} has no meaning for the scheduler {scheduler}, "
            "only for wsd: leave it at 0."
        )
    return _made(SCHEDULES[scheduler], lr, warmup_step, max_step, decay_step)


@functools.lru_cache(maxsize=16)
def _made(make: Callable[..., Any], *settings: Any) -> Any:
    """Equal settings give the same functions, so that what is compiled of them is shared."""
    return make(*settings)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)`, as `optax.scale_by_adam`.

    optax takes 1 - b2^t as a difference in float32, which is wrong by up to 3e-5 in the first
    updates (PyTorch has it in float64); expm1 keeps all digits, and with it the trajectories of
    the official code are met ten times closer.
    """

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, grads)
        bias_1, bias_2 = (-jnp.expm1(count.astype(jnp.float32) * math.log(b)) for b in (b1, b2))
        updates = jax.tree.map(lambda m, v: m / bias_1 / (jnp.sqrt(v / bias_2) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def decays(params: Any) -> Any:
    """Which parameters weight decay makes smaller: True for matrices but the tables of words.

    Not for norms, biases and other vectors of a layer; and not for the embedding and the softmax's
    rows: a word's gradient is zero in most steps, while decay would act in all of them, so that
    what is learnt of rare words would fade.
    """

    def matrix(path: Any, leaf: Any) -> bool:
        group, name = path[0].key, path[-1].key
        axes = leaf.ndim - (group == "layers")  # which stacks the layers
        return axes >= 2 and "bias" not in name and not name.startswith("table_")

    return jax.tree_util.tree_map_with_path(matrix, params)


def adam(
    schedule: Schedule, clip: float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adam (0.9, 0.999, eps 1e-8) on gradients clipped to the global norm `clip`.

    Args:
        schedule: rate of update t.
        clip: 0 leaves the gradients as they are.
        weight_decay: AdamW's (Loshchilov and Hutter 2019): update t takes rate(t) * weight_decay *
            parameter more away, of those that `decays` says.

    Raises:
        UserError: `clip` or `weight_decay` are not finite or below 0.
    """
    for name, value in (("clip", clip), ("weight_decay", weight_decay)):
        NOT_NEGATIVE.check(name, value)
    return _made(_adam, schedule, clip, weight_decay)


def _adam(schedule: Schedule, clip: float, weight_decay: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip > 0 else optax.identity(),
        scale_by_adam(0.9, 0.999, 1e-8),
        *[optax.add_decayed_weights(weight_decay, decays)] * (weight_decay > 0),
        # optax counts updates from 0, the schedule from 1.
        optax.scale_by_learning_rate(lambda count: schedule(count.astype(jnp.float32) + 1.0)),
    )
