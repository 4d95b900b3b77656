"""Checkpoints in a folder: each whole or not at all, the newest and the best of them kept.

`step_000012/` is a Hugging Face directory with `training_state/` and `manifest.json` in it. It is made under another
name and renamed when all of it is on the disk, so what has this name was whole once; the manifest tells what was
damaged since. `latest` and `best` are one line each: the name of a checkpoint.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygym.durable import replace_durably, sync_file, sync_tree
from raygym.file_manifest import DamagedFolderError, check_files, read_manifest, write_manifest
from raygym.testing import chaos

FORMAT = 1
"""Of what is in a checkpoint; one of another format is skipped."""
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that is whole."""

    path: Path
    step: int
    """It was made after so many steps."""
    config: dict[str, Any]
    """The resolved config of the run that made it."""

    @property
    def state(self) -> Path:
        """The folder of what is needed to go on, beside the policy itself."""
        return self.path / "training_state"


def kept_steps(steps: Iterable[int], scores: Mapping[int, float], keep_last: int, keep_best: int) -> set[int]:
    """Whose checkpoints stay: the newest and the best. `scores` is as in `CheckpointStore.retain`."""
    return {*sorted(steps)[-keep_last:], *_best(steps, scores, keep_best)}


def _best(steps: Iterable[int], scores: Mapping[int, float], count: int) -> list[int]:
    """The best of them, the best one last."""
    scored = sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step))
    return scored[max(0, len(scored) - count) :]


class CheckpointStore:
    """The `checkpoints/` folder of one run. One process writes to it at a time."""

    def __init__(self, path: Path, keep_last: int = 2, keep_best: int = 0) -> None:
        """Nothing is read or written yet.

        Args:
            path: the folder; it need not exist.
            keep_last: so many of the newest are kept.
            keep_best: so many of those with the best score are kept, too.
        """
        self.path = path
        self._keep_last = keep_last
        self._keep_best = keep_best

    def steps(self) -> list[int]:
        """Of every checkpoint that has its final name, damaged or not; rising."""
        if not self.path.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in names if match)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.path / f"step_{step:06d}"

    def clean(self) -> None:
        """Remove what a killed run had not finished writing."""
        if self.path.is_dir():
            for entry in list(self.path.iterdir()):
                if ".tmp-" in entry.name:
                    # What is left, where somebody still writes into it, goes the next time: it is no checkpoint.
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
                elif entry.name.endswith(".new"):
                    entry.unlink(missing_ok=True)

    def newest_whole(self, told: Callable[[str], None]) -> Checkpoint | None:
        """The newest one that is as it was written; None where there is none.

        Args:
            told: gets one line for each newer one that is skipped.
        """
        for step in reversed(self.steps()):
            try:
                return self._read(step)
            except DamagedFolderError as error:
                told(f"checkpoint {self.path_of(step).name} is skipped: {error}")
        return None

    @contextmanager
    def writing(self, step: int, config: Mapping[str, Any]) -> Iterator[Path]:
        """Gives an empty folder to fill. When the block ends without an error, it is the checkpoint of `step`.

        One that is there already is replaced. `retain` points `latest` to it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        final = self.path_of(step)
        partial, replaced = self._aside(step), self._aside(step)
        partial.mkdir()
        try:
            yield partial
            chaos.at("disk.checkpoint")
            write_manifest(partial, {"format": FORMAT, "step": step, "config": dict(config)})
            sync_tree(partial)
            if final.exists():
                # Two names cannot change at once; between the two there is none, which is a whole state as well.
                final.rename(replaced)
            partial.rename(final)
        except BaseException:
            if replaced.exists() and not final.exists():
                replaced.rename(final)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_file(self.path)
        shutil.rmtree(replaced, ignore_errors=True)

    def retain(self, scores: Mapping[int, float]) -> None:
        """Remove the checkpoints that are neither among the newest nor among the best; point `latest` and `best`.

        It removes first, which makes room on a full disk, and may be called again where there was still none.

        Args:
            scores: by step, the higher the better; the later of equal ones is better. Steps without one cannot be best.
        """
        steps = self.steps()
        best = _best(steps, scores, self._keep_best)
        for step in set(steps) - kept_steps(steps, scores, self._keep_last, self._keep_best):
            # Under another name first: a checkpoint that is half removed must not look like one.
            going = self.path_of(step).rename(self._aside(step))
            shutil.rmtree(going, ignore_errors=True)
        if steps:
            self._point("latest", steps[-1])
        if best:
            self._point("best", best[-1])

    def move_newer(self, step: int, folder: Path) -> None:
        """Make that of `step` the newest: move those of later steps into `folder`, which is made if it is needed."""
        for newer in (other for other in self.steps() if other > step):
            folder.mkdir(parents=True, exist_ok=True)
            self.path_of(newer).rename(folder / self.path_of(newer).name)
        self._point("latest", step)
        best = self.path / "best"
        if best.is_file() and not (self.path / best.read_text(encoding="utf-8").strip()).is_dir():
            best.unlink()

    def _read(self, step: int) -> Checkpoint:
        path = self.path_of(step)
        manifest = read_manifest(path)
        if manifest.get("format") != FORMAT:
            raise DamagedFolderError(f"its format is {manifest.get('format')}, this raygym reads {FORMAT}")
        if manifest["step"] != step:
            raise DamagedFolderError(f"it was written as that of step {manifest['step']}")
        check_files(path, manifest)
        return Checkpoint(path, step, manifest["config"])

    def _aside(self, step: int) -> Path:
        """A free name that is no checkpoint's."""
        return self.path / f"{self.path_of(step).name}.tmp-{uuid.uuid4().hex[:8]}"

    def _point(self, name: str, step: int) -> None:
        path, line = self.path / name, f"{self.path_of(step).name}\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != line:
            replace_durably(path, line.encode())
