"""One digest of what the rows of a set hold, so that what was made from them is known again.

It is the same wherever the files lie and however they are packed, and another one after any change of a byte, a label
or the order of the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from adaptkit.pictures import stored_bytes

__all__ = ["digest"]

AT_ONCE = 64  #: rows that are in memory together
READERS = 8  #: files that are read at a time


def digest(rows: Iterable[dict[str, Any]]) -> str:
    """Return the digest of rows whose pictures are as they are stored (``order.undecoded``): 32 hexadecimal digits."""
    whole = hashlib.blake2b(digest_size=16)
    left = iter(rows)
    with ThreadPoolExecutor(READERS) as pool:
        while some := list(islice(left, AT_ONCE)):
            for row in pool.map(_of_row, some):
                whole.update(row)
    return whole.hexdigest()


def _of_row(row: dict[str, Any]) -> bytes:
    own = hashlib.blake2b()
    for column in sorted(row):
        value = row[column]
        picture = isinstance(value, dict) and value.keys() == {"bytes", "path"} and any(value.values())
        held = stored_bytes(value) if picture else repr(value).encode()
        own.update(f"{column} {len(held)} ".encode())
        own.update(held)
    return own.digest()
