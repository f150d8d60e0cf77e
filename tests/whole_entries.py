"""Makes jax write an entry of its compilation cache whole, or not at all.

Workers, their processes and later runs of the tests share one cache (conftest.py). jax writes an
entry in place and never again: a process that reads it then, or finds what a killed one left,
warns and compiles anew, and warnings are errors here.
"""

import os
from pathlib import Path

from jax._src.lru_cache import LRUCache


def put(cache: LRUCache, key: str, value: bytes) -> None:
    """Write beside the entry's place and rename."""
    path = Path(str(cache.path), f"{key}-cache")
    if not path.exists():
        part = path.with_name(f"{path.name}-{os.getpid()}")
        part.write_bytes(value)
        part.replace(path)


LRUCache.put = put  # type: ignore[method-assign]
