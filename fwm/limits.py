"""What a value may be: kinds, each a test and the words for what it asks.

    whole(1).check("config.train.tgt_len", 0)

raises "config.train.tgt_len must be a whole number of at least 1, got 0."
"""

import dataclasses
import math
import numbers
import reprlib
from collections.abc import Callable, Collection
from typing import Any

from fwm.errors import UserError

INT32 = 2**31 - 1  # Steps and sizes are int32 on the devices.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


@dataclasses.dataclass(frozen=True)
class Kind:
    """Values that are `expected`, a noun for a sentence: those that `fits` is true of.

    `at_most`: a limit that is of no use but to who is beyond it, and is told then only.
    """

    expected: str
    fits: Callable[[Any], bool]
    at_most: int | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise `UserError` unless `value` is of this kind."""
        if not self.fits(value):
            got = _short.repr(value).replace("\n", " ")
            limit = ""
            if self.at_most and isinstance(value, numbers.Integral) and int(value) > self.at_most:
                limit = f" and at most {self.at_most}"
            raise UserError(f"{name} must be {self.expected}{limit}, got {got}.")


def whole(low: int, high: int = INT32) -> Kind:
    """Whole numbers from `low` to `high`; True and False are none."""
    upper = "" if high == INT32 else f" and at most {high}"
    return Kind(
        f"a whole number of at least {low}{upper}",
        lambda x: isinstance(x, numbers.Integral) and type(x) is not bool and low <= int(x) <= high,
        at_most=None if upper else high,
    )


def none_or_several(none: str, several: str) -> Kind:
    """0 tokens, which means `none`, or at least 2, which mean `several`; 1 would mean nothing."""
    return Kind(
        f"0 ({none}) or at least 2 tokens ({several})", lambda x: whole(0).fits(x) and x != 1
    )


def number(which: str, fits: Callable[[Any], bool]) -> Kind:
    """Finite numbers that are `which`, as in "above 0"."""
    return Kind(f"a number {which}", lambda x: _is_finite(x) and fits(x))


def _is_finite(x: Any) -> bool:
    try:
        return isinstance(x, numbers.Real) and type(x) is not bool and math.isfinite(x)
    except OverflowError:  # A whole number that no float is as large as.
        return False


def one_of(names: Collection[str]) -> Kind:
    """One of some names."""
    return Kind(f"one of {', '.join(names)}", lambda x: isinstance(x, str) and x in names)


def several(kind: Kind, which: str) -> Kind:
    """Tuples, or lists, of values of a kind; `which` says what they are, in the plural."""
    return Kind(
        f"a tuple of {which}", lambda x: isinstance(x, tuple | list) and all(map(kind.fits, x))
    )


FLAG = Kind("True or False", lambda x: type(x) is bool)
# A file's name cannot have NUL, and no terminal or log shows it.
TEXT = Kind("text without NUL", lambda x: isinstance(x, str) and "\0" not in x)
# Nearer to 1 all is dropped: dropout meets its rate to 2^-16.
PROBABILITY = number("of at least 0 and at most 0.9999", lambda x: 0 <= x <= 0.9999)
RATE = number("above 0", lambda x: x > 0)
NOT_NEGATIVE = number("of at least 0", lambda x: x >= 0)
SEED = whole(0, 2**32 - 1)
SIZE = whole(1)
CHECKPOINT = Kind(
    "best, latest or the number of a step",
    lambda x: isinstance(x, str) and (x in ("best", "latest") or (x.isdecimal() and x.isascii())),
)
CHECKPOINTS = Kind(
    "best, latest or the number of a step, or several of these with commas between them",
    lambda x: isinstance(x, str) and all(map(CHECKPOINT.fits, x.split(","))),
)
STEPS = Kind(
    "the first and the last step to trace, such as (10, 15), or () for none",
    lambda x: several(SIZE, "steps").fits(x) and (len(x) == 0 or (len(x) == 2 and x[0] <= x[1])),
)


def of_type(kind: type) -> Kind:
    """All values of a plain type, for keys that no more is known of."""
    plain = {
        bool: FLAG,
        str: TEXT,
        int: whole(-INT32 - 1),
        float: number("that is finite", lambda x: True),
        tuple: Kind("a tuple", lambda x: isinstance(x, tuple | list)),
    }
    return plain.get(kind) or Kind(f"of type {kind.__name__}", lambda x: isinstance(x, kind))
