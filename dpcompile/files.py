"""Writing a file so that a crash at any moment leaves the old one or the new one, whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_whole(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside `path`, and put it in its place when it is on the disk.

    A crash may leave the file beside it, which the next call takes over. One process at a time writes a path.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)  # the new name is on disk only when its directory is
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
