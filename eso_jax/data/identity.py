"""Is the data of a run still the data that it began with? A hash of it is in the work directory, W/data.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from eso_jax.data.prepared import PreparedWindows, Windows
from eso_jax.errors import EsoError, reason_of
from eso_jax.files import as_json, write_whole

FILE = "data.json"


def identity(windows: Windows) -> dict[str, Any]:
    """The number of windows and a hash of them; for a prepared folder, of its shards' checksums."""
    digest = hashlib.sha256()
    if isinstance(windows, PreparedWindows):
        digest.update(json.dumps(windows.checksums).encode())
    else:
        for start in range(0, len(windows), 2**16):
            digest.update(windows[start:start + 2**16].astype("<u4").tobytes())
    return {"windows": len(windows), "sha256": digest.hexdigest()}


def claim(directory: Path, source: str, identities: dict[str, dict[str, Any]]) -> None:
    """Compares the identities of a run's splits with those that it began with; writes them if none are recorded: the
    run is new, or of an earlier version.

    Raises:
      EsoError: they differ.
    """
    path = directory / FILE
    try:
        recorded = json.loads(path.read_text("utf-8"))
        windows = [part["windows"] for part in recorded.values()]
    except FileNotFoundError:
        return write_whole(path, as_json(identities), "--workdir")
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise EsoError(f"--workdir = {str(directory)!r}: {FILE} is not what was written ({reason_of(error)}); remove "
                       "it if data.source is what the run began with") from error
    if recorded != identities:
        counts = [" and ".join(f"{number:,}" for number in numbers)
                  for numbers in (windows, [part["windows"] for part in identities.values()])]
        raise EsoError(f"data.source = {source!r}: is not what this run began with ({counts[0]} windows to train and "
                       f"to validate on then, {counts[1]} now); restore it, or give another --workdir (to go on with "
                       f"other data, remove {path})")
