"""The actors' logs of a run, kept in its folder under names that say whose they are."""

from __future__ import annotations

import re
from pathlib import Path

# Ray begins a worker's log with lines that name its job and its actor.
_ACTOR = re.compile(rb"^:actor_name:(.+)$", re.MULTILINE)
_NAMING_LINES = re.compile(rb"^:(?:actor_name|job_id|task_name):.*\n?", re.MULTILINE)
# worker-<worker's id>-<job's id>-<pid>.out or .err
_WORKER = re.compile(r"worker-[0-9a-f]+-(?:[0-9a-f]+|ffffffff)-(\d+)\.(out|err)")
_UNSAFE = re.compile(r"[^\w.-]+")


def gather_logs(session_logs: Path, folder: Path, most_bytes: int = 16 << 20) -> list[Path]:
    """Copy what actors have written, as `<actor>-<pid>.out` and `.err`; of a long log its end.

    Args:
        session_logs: the folder `logs` of a Ray session.
        folder: where they are kept; made if there is anything to keep. Files of the same name are replaced.
        most_bytes: of each.

    Returns:
        The files; what cannot be read or written is left out, since a log must not hide why a run ends.
    """
    kept = []
    for path in sorted(session_logs.glob("worker-*")):
        found = _WORKER.fullmatch(path.name)
        try:
            text = _end_of(path, most_bytes) if found else b""
            named = _ACTOR.search(_start_of(path)) if text else None
            if found is None or named is None or not (said := _NAMING_LINES.sub(b"", text)).strip():
                continue
            name = _UNSAFE.sub("_", named[1].decode("utf-8", "replace"))
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / f"{name}-{found[1]}.{found[2]}"
            target.write_bytes(said)
        except OSError:
            continue
        kept.append(target)
    return kept


def _start_of(path: Path, size: int = 4096) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _end_of(path: Path, most_bytes: int) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - most_bytes))
        return file.read()
