"""Files that are there whole or not at all. Imports nothing heavy: what only watches a run writes
them too.
"""

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file so that a reader, or a kill at any instant, finds the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")  # what a kill leaves, the next write replaces
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
