"""Files that are written whole or not at all."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a file so that a reader sees all of it or nothing; raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        draft.write_bytes(contents if isinstance(contents, bytes) else contents.encode("utf-8"))
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
