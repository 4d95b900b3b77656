"""Sends each finished checkpoint to the mirror, beside training: what fails there is told and does not end a run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from raygym.backoff import Backoff
from raygym.checkpoint import kept_steps
from raygym.config import RunConfig
from raygym.file_manifest import MANIFEST, write_manifest
from raygym.mirror_store import MirrorStore, Upload, upload_name
from raygym.whole_file import write_whole

RUN_FILES = ("config.yaml", "metrics.jsonl", "ledger.jsonl", "events.jsonl", "tracking.json")
"""What a run goes on with, beside its checkpoint. Trajectories stay where they were made."""
_IDENTITY = "mirror.json"
_TRIES = 5
_BEGIN_WAIT_S = 30.0
"""How long a new run's start waits until the mirror knows of it."""
_BEGIN_AGAIN_S = 60.0

T = TypeVar("T")


class MirrorError(RuntimeError):
    """A checkpoint could not be mirrored, and `checkpoint.mirror_required` makes that the run's end."""


class MirrorTaken(Exception):
    """Another run of this name has begun in the mirror since, or another process writes this one."""


def run_in_mirror(run_dir: Path, url: str) -> str | None:
    """Which run of the mirror the one in `run_dir` is; None where it has none there."""
    run = _identity(run_dir, url).get("run")
    return run if isinstance(run, str) else None


def begins_there(run_dir: Path, url: str) -> bool:
    """Whether the run in `run_dir` is a new one of which the mirror does not know yet: those that it has are others."""
    known = _identity(run_dir, url)
    return "run" in known and known["run"] is None


def write_identity(run_dir: Path, url: str, run: str | None) -> None:
    """Note what `run_in_mirror` tells; with None, what `begins_there` tells."""
    write_whole(run_dir / _IDENTITY, json.dumps({"url": url, "run": run}) + "\n")


@dataclass(frozen=True, slots=True)
class _Staged:
    step: int
    folder: Path
    """A hard link to each of the checkpoint's files: they outlive their removal until they are sent."""
    seal: str
    scores: Mapping[int, float]


class CheckpointMirror:
    """The writer of one run's checkpoints to the mirror: one thread, which sends one at a time."""

    def __init__(
        self, config: RunConfig, store: MirrorStore, told: Callable[[str], None], *, first_wait_s: float = 1.0
    ) -> None:
        """Nothing is sent yet.

        Args:
            config: the run's; `checkpoint.mirror` is set.
            store: the mirror.
            told: gets lines for a person, from any thread.
            first_wait_s: after the first failure of several in a row; then twice as long each time.
        """
        assert config.checkpoint.mirror is not None
        self._url: str = config.checkpoint.mirror
        self._options = config.checkpoint
        self._run_dir = config.run_dir
        self._staging = config.run_dir / "mirroring"
        self._store = store
        self._told = told
        self._first_wait_s = first_wait_s
        self._changed = threading.Condition()
        self._waiting: _Staged | None = None
        self._sending: _Staged | None = None
        self._claim: str | None = None
        self._tried_to_claim = threading.Event()
        self._ended = threading.Event()
        self._problem = ""

    def begin(self) -> None:
        """Note in the mirror that this run goes on, or that a new one has begun, and begin to send.

        Returns at once where it goes on. A new one waits for the mirror, though not for ever, since a start that finds
        an earlier run there goes on with that.
        """
        shutil.rmtree(self._staging, ignore_errors=True)
        anew = run_in_mirror(self._run_dir, self._url) is None
        if anew:
            with suppress(OSError):  # a full disk: then the mirror alone will tell
                write_identity(self._run_dir, self._url, None)
        threading.Thread(target=self._work, name="checkpoint-mirror", daemon=True).start()
        if anew:
            self._tried_to_claim.wait(_BEGIN_WAIT_S)
            if self._claim is None:
                self._told(
                    f"warning: checkpoint.mirror: {self._url} does not know of this run yet; until it does, a start "
                    f"without {self._run_dir} would go on with an earlier run of this name, if there is one"
                )

    @property
    def left(self) -> int | None:
        """The step of the newest checkpoint that is still to be sent; None where there is none."""
        with self._changed:
            staged = self._waiting or self._sending
            return None if staged is None else staged.step

    def submit(self, step: int, scores: Mapping[int, float]) -> None:
        """Have the checkpoint of a step sent, with the run's files as they are now. Returns at once.

        One that still waits gives way to it: what is behind may not fall behind for ever.

        Args:
            step: has a checkpoint.
            scores: as for `CheckpointStore.retain`: which of those that are there stay.

        Raises:
            MirrorError: an earlier one was not sent, and must have been.
        """
        self._require_sent()
        try:
            staged = self._stage(step, scores)
        except OSError as error:
            self._failed(step, error)
            return
        with self._changed:
            passed, self._waiting = self._waiting, staged
            self._changed.notify_all()
        if passed is not None:
            shutil.rmtree(passed.folder, ignore_errors=True)
            self._told(
                f"checkpoint step_{passed.step:06d} is not mirrored: the next one was made before it could be sent; "
                "where that happens often, raise checkpoint.every"
            )

    def close(self, wait_s: float) -> None:
        """Wait for what is still to be sent, at most `wait_s` seconds, and end.

        Raises:
            MirrorError: something was not sent, and must have been.
        """
        deadline = time.monotonic() + wait_s
        if wait_s and (step := self.left) is not None:
            self._told(
                f"waiting for checkpoint step_{step:06d}, which is being sent to {self._url}, at most {wait_s:g} s "
                "(checkpoint.mirror_wait_s); Ctrl-C ends that"
            )
        try:
            with self._changed:
                while self.left is not None:
                    if (left_s := deadline - time.monotonic()) <= 0:
                        self._problem = f"the newest checkpoint was not sent to {self._url} within {wait_s:g} s"
                        self._told(f"{self._problem}; the run's next start sends it")
                        break
                    self._changed.wait(left_s)
        finally:
            with self._changed:
                self._ended.set()
                self._changed.notify_all()
        if not self._problem:
            shutil.rmtree(self._staging, ignore_errors=True)
        self._require_sent()

    def _require_sent(self) -> None:
        if self._problem and self._options.mirror_required:
            raise MirrorError(f"{self._problem} (checkpoint.mirror_required)")

    def _stage(self, step: int, scores: Mapping[int, float]) -> _Staged:
        checkpoint = self._run_dir / "checkpoints" / f"step_{step:06d}"
        folder = self._staging / f"step_{step:06d}-{uuid.uuid4().hex[:8]}"
        try:
            shutil.copytree(checkpoint, folder / "checkpoint", copy_function=_link)
            (folder / "run").mkdir()
            for name in RUN_FILES:
                if (self._run_dir / name).is_file():
                    data = (self._run_dir / name).read_bytes()
                    # Another thread may be in the middle of a line.
                    (folder / "run" / name).write_bytes(data[: data.rfind(b"\n") + 1])
            write_manifest(folder / "run", {"step": step})
            return _Staged(step, folder, seal_of(checkpoint), dict(scores))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # on a full disk, its room is missed
            raise

    def _work(self) -> None:
        try:
            # Before the first checkpoint: a start after --fresh must not find what was before that.
            self._own_run()
        except Exception as error:  # of any type: each kind of store has its own
            self._told(
                f"warning: checkpoint.mirror: {self._url} cannot be used now ({_said(error)}); it is tried again"
            )
        self._tried_to_claim.set()
        while True:
            with self._changed:
                again_s = _BEGIN_AGAIN_S if self._claim is None else None
                self._changed.wait_for(lambda: self._waiting is not None or self._ended.is_set(), again_s)
                if self._ended.is_set():
                    return
                staged, self._waiting, self._sending = self._waiting, None, self._waiting
            if staged is None:
                with suppress(Exception):  # that was told
                    self._own_run()
                continue
            try:
                self._send(staged)
            except Exception as error:
                self._failed(staged.step, error)
            finally:
                shutil.rmtree(staged.folder, ignore_errors=True)
                with self._changed:
                    self._sending = None
                    self._changed.notify_all()

    def _send(self, staged: _Staged) -> None:
        run = self._own_run()
        known = {(upload.step, upload.seal): upload.folder for upload in self._tried(lambda: self._store.uploads(run))}
        folder = known.get((staged.step, staged.seal)) or self._put(run, staged)
        if self._problem:
            self._told(f"checkpoint step_{staged.step:06d} is mirrored at {self._url} again")
        self._problem = ""
        try:
            self._prune(run, staged, folder)
        except Exception as error:
            self._told(
                f"older checkpoints could not be removed from {self._url} ({_said(error)}); the next one does it"
            )

    def _put(self, run: str, staged: _Staged) -> str:
        assert self._claim is not None
        folder, files = upload_name(staged.step, self._claim), dict[str, int]()
        for path in sorted(path for path in staged.folder.rglob("*") if path.is_file()):
            name = path.relative_to(staged.folder).as_posix()
            self._tried(partial(self._store.put, run, folder, name, path))
            files[name] = path.stat().st_size
        upload = Upload(folder, staged.step, staged.seal, files)

        def complete() -> None:
            self._require_claim(run)  # or else somebody may have removed what was put
            self._store.complete(run, upload)

        self._tried(complete)
        return folder

    def _own_run(self) -> str:
        run = run_in_mirror(self._run_dir, self._url)
        if run is None:
            run = self._tried(self._store.begin_run)
            write_identity(self._run_dir, self._url, run)
        if (runs := self._tried(self._store.runs)) and runs[-1] != run:
            raise MirrorTaken(f"a run of this name was begun there by another process ({runs[-1]}, this one is {run})")
        if self._claim is None:
            self._claim = self._tried(partial(self._store.claim, run))
        self._tried(lambda: self._require_claim(run))
        return run

    def _require_claim(self, run: str) -> None:
        if (claims := self._store.claims(run)) and claims[-1] != self._claim:
            raise MirrorTaken(
                f"this run was gone on with by another process, which sends its checkpoints there ({run}, claimed as "
                f"{claims[-1]}, here as {self._claim}); end one of the two"
            )

    def _prune(self, run: str, staged: _Staged, newest: str) -> None:
        uploads = self._tried(lambda: self._store.uploads(run))
        steps = {upload.step for upload in uploads}
        kept = kept_steps(steps, staged.scores, self._options.keep_last, self._options.keep_best) | {staged.step}
        same = {upload.folder for upload in uploads if upload.step == staged.step and upload.folder != newest}
        claim, stay = self._claim, {u.folder for u in uploads if u.step in kept} - same
        assert claim is not None

        def remove() -> None:
            self._require_claim(run)
            self._store.remove_all_but(run, stay, claim)

        self._tried(remove)

    def _tried(self, call: Callable[[], T]) -> T:
        backoff = Backoff(self._first_wait_s, 30.0)
        while True:
            try:
                return call()
            except MirrorTaken:
                raise
            except Exception:
                backoff.failed()
                if backoff.failures == _TRIES or self._ended.wait(backoff.wait_s()):
                    raise

    def _failed(self, step: int, error: Exception) -> None:
        self._problem = f"checkpoint step_{step:06d} was not mirrored to {self._url}: {_said(error)}"
        instead = "the run ends" if self._options.mirror_required else "the run goes on, and the next one is tried"
        self._told(f"{self._problem}; {instead}")


@contextmanager
def mirrored(
    config: RunConfig,
    store: MirrorStore | None,
    told: Callable[[str], None],
    cause: Callable[[Exception], str] | None = None,
) -> Iterator[CheckpointMirror | None]:
    """Gives the mirror of a run, which has not begun; at its end, what still has to be sent is waited for.

    Not after an interrupt, which is to be quick. None where `store` is.

    Args:
        config: the run's.
        store: its mirror.
        told: gets lines for a person, from any thread.
        cause: why a run ends, in one line, which is told before it is waited.

    Raises:
        MirrorError: the run has ended well, and something was not sent that must have been.
    """
    if store is None:
        yield None
        return
    mirror = CheckpointMirror(config, store, told)
    try:
        yield mirror
    except BaseException as error:
        wait_s = 0.0
        if isinstance(error, Exception):
            wait_s = config.checkpoint.mirror_wait_s
            if mirror.left is not None:
                told(f"the run ends: {(cause or _said)(error)}")
        # Why the run ends must not be hidden, neither by the mirror nor by whoever does not want to wait for it.
        try:
            mirror.close(wait_s)
        except MirrorError:
            pass
        except KeyboardInterrupt:
            told("it is not waited for any longer; the run's next start sends the checkpoint")
        raise
    mirror.close(config.checkpoint.mirror_wait_s)


def seal_of(checkpoint: Path) -> str:
    """What `Upload.seal` is of a checkpoint."""
    return hashlib.blake2b((checkpoint / MANIFEST).read_bytes(), digest_size=16).hexdigest()


def _identity(run_dir: Path, url: str) -> dict[str, Any]:
    try:
        known: Any = json.loads((run_dir / _IDENTITY).read_text(encoding="utf-8"))
        return dict(known) if known["url"].rstrip("/") == url.rstrip("/") else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
