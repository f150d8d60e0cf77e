"""Tables of what can be chosen by name, one per kind: rules, feature maps, mixers, tasks.

A config file that lies anywhere may add to them, `UPDATE_RULES["mine"] = Rule(...)`; `recording`
tells which names it added, so that a run can say which file it needs.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from fwm.errors import UserError

T = TypeVar("T")
_recordings: list[list[str]] = []
_tables: list["Table[Any]"] = []
_memories: list[Any] = []


def remembered(function: Callable) -> Callable:
    """`function` with its last results by its arguments, for what is compiled of a model.

    A model names what it is made of: all is forgotten where a name comes to mean something else.
    """
    memory = functools.lru_cache(maxsize=16)(function)
    _memories.append(memory)
    return memory


def _forget() -> None:
    for memory in _memories:
        memory.cache_clear()


class Table(MutableMapping[str, T], Generic[T]):
    """Names and what they stand for.

    Args:
        field: the config key whose values these names are.

    Raises:
        UserError: (at a look-up) the name is not in the table; the message lists those that are.
            (at an entry) while recording, an entry that was there before: what a run names would
            mean something else without the file that replaced it.
    """

    def __init__(self, field: str) -> None:
        self.field = field
        self._entries: dict[str, T] = {}
        self._recorded: set[str] = set()
        _tables.append(self)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UserError(
                f"unknown {self.field} {name!r}: expected one of {', '.join(self._entries)}."
            )
        return self._entries[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The entry, or `default` where there is none: `Mapping`'s own waits for a KeyError."""
        return self._entries.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __setitem__(self, name: str, value: T) -> None:
        if _recordings and name in self._entries and name not in self._recorded:
            raise UserError(f"{self.field} {name} is one of fwm's own: choose another name.")
        self._entries[name] = value
        _forget()
        if _recordings:
            self._recorded.add(name)
        for recording in _recordings:
            recording.append(f"{self.field}={name}")

    def __delitem__(self, name: str) -> None:
        del self._entries[name]
        _forget()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@contextmanager
def recording() -> Iterator[list[str]]:
    """The entries, as `field=name`, that are made inside the block."""
    entries: list[str] = []
    _recordings.append(entries)
    try:
        yield entries
    finally:
        _recordings.remove(entries)


def missing(settings: Mapping[str, Any]) -> list[str]:
    """The names that settings (with dotted keys) choose and no table has, as `field=name`."""
    chosen = {
        (table.field, name)
        for table in _tables
        for key, value in settings.items()
        for name in (value if isinstance(value, tuple) else (value,))
        if key.rpartition(".")[2] == table.field and isinstance(name, str) and name
    }
    known = {(table.field, name) for table in _tables for name in table}
    return [f"{field}={name}" for field, name in sorted(chosen - known)]
