"""Checkpoints on disk: whole or not at all, whatever happens while they are written and to them afterwards."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raygym.durable
from raygym.checkpoint import CheckpointStore
from raygym.file_manifest import DamagedFolderError, check_files, read_manifest, write_manifest

CONFIG = {"name": "t", "learner": {"lr": 1e-6}}


def fill(folder: Path, step: int) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes([step % 256]) * 1000)
    (folder / "training_state").mkdir()
    (folder / "training_state/run.json").write_text(f'{{"step": {step}}}')


def write(store: CheckpointStore, step: int) -> None:
    with store.writing(step, CONFIG) as folder:
        fill(folder, step)


def save(store: CheckpointStore, step: int) -> None:
    write(store, step)
    store.retain({})


def newest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    told: list[str] = []
    found = store.newest_whole(told.append)
    return (found.step if found else None), told


def test_the_newest_is_found_and_pointed_to(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert newest(store) == (None, [])
    for step in (3, 12):
        save(store, step)
    assert newest(store) == (12, [])
    assert (store.path / "latest").read_text() == "step_000012\n"
    checkpoint = store.newest_whole(print)
    assert checkpoint is not None and checkpoint.config == CONFIG
    assert (checkpoint.state / "run.json").read_text() == '{"step": 12}'
    save(store, 12)
    assert sorted(entry.name for entry in store.path.iterdir()) == ["latest", "step_000003", "step_000012"]


class Killed(BaseException):
    """Stands for the end of the process: nothing that would clean up after an error may run."""


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    """Every system call that changes something on the disk is the last one, one after the other."""
    calls, limit = 0, 0
    dead = False

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls, dead
            if dead:
                raise Killed
            calls += 1
            if calls > limit:
                dead = True
                raise Killed
            return real(*args, **kwargs)

        return call

    changing = [(os, "mkdir"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync")]
    changing += [(Path, "write_text"), (Path, "write_bytes")]
    for limit in range(200):
        folder = tmp_path / f"{limit}"
        store = CheckpointStore(folder / "checkpoints", keep_last=1)
        write(store, 1)
        if existing:
            write(store, 2)
        calls, dead = 0, False
        with monkeypatch.context() as patch:
            for owner, name in changing:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            with suppress(Killed):
                save(store, 2)
        step, told = newest(store)
        assert step in (1, 2) and not told, limit
        store.clean()
        assert {entry.name for entry in store.path.iterdir()} <= {"latest", "step_000001", "step_000002"}
        if not dead:
            assert step == 2
            break
    else:
        pytest.fail("it was killed every time")
    assert limit > 10


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training_state/run.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove", "empty"])
def test_damage_of_each_kind_to_each_file_is_told_and_the_next_older_is_taken(
    tmp_path: Path, name: str, how: str
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    path = tmp_path / "step_000002" / name
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "remove":
        path.unlink()
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": data[:middle], "empty": b""}[how])
    step, (line,) = newest(store)
    assert step == 1
    assert line.startswith("checkpoint step_000002 is skipped: ")
    assert name in line


def test_a_file_that_the_disk_cannot_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    real = Path.open

    def broken(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == tmp_path / "step_000002/model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    line = "checkpoint step_000002 is skipped: model.safetensors cannot be read (Input/output error)"
    assert newest(store) == (1, [line])


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (tmp_path / "step_000009").mkdir()  # as an earlier raygym left it: a policy without a training state
    (tmp_path / "step_x").mkdir()
    assert newest(store) == (None, ["checkpoint step_000009 is skipped: has no manifest.json"])
    save(store, 4)
    shutil.copytree(tmp_path / "step_000004", tmp_path / "step_000010")
    step, (line, _) = newest(store)
    assert step == 4 and "written as that of step 4" in line
    write_manifest(tmp_path / "step_000010", {"format": 99, "step": 10, "config": {}})
    assert "its format is 99, this raygym reads 1" in newest(store)[1][0]


def test_leftovers_into_which_somebody_still_writes_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    (tmp_path / "step_000004.tmp-12345678").mkdir()

    def not_empty(path: object, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", not_empty)
        store.clean()
    assert store.steps() == [] and store.newest_whole(pytest.fail) is None
    store.clean()
    assert not list(tmp_path.iterdir())


def test_leftovers_go_and_later_ones_are_moved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=9, keep_best=1)
    for step in (1, 2, 3):
        save(store, step)
    store.retain({3: 1.0})
    (store.path / "step_000004.tmp-12345678").mkdir()
    (store.path / "latest.new").touch()
    store.clean()
    assert {e.name for e in store.path.iterdir()} == {"step_000001", "step_000002", "step_000003", "latest", "best"}
    store.move_newer(1, tmp_path / "discarded")
    assert store.steps() == [1]
    assert (store.path / "latest").read_text() == "step_000001\n"
    assert not (store.path / "best").exists(), "what it pointed to is gone"
    assert sorted(entry.name for entry in (tmp_path / "discarded").iterdir()) == ["step_000002", "step_000003"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_the_last_and_the_best_are_kept(
    tmp_path_factory: pytest.TempPathFactory, scored: list[tuple[bool, int]], last: int, best: int
) -> None:
    store = CheckpointStore(tmp_path_factory.mktemp("checkpoints"), last, best)
    scores: dict[int, float] = {}
    kept_before: set[int] = set()
    for step, (has, score) in enumerate(scored):
        (store.path_of(step)).mkdir()
        if has:
            scores[step] = score
        store.retain(scores)
        steps = kept_before | {step}
        newest_steps = set(sorted(steps)[-last:])
        others = [scores[s] for s in steps if s in scores]
        best_steps = {s for s in steps if s in scores and sum(o > scores[s] for o in others) < best}
        kept_before = set(store.steps())
        assert newest_steps <= kept_before <= newest_steps | best_steps
        assert len(kept_before) <= last + best
        if best and others:
            pointed = (store.path / "best").read_text().strip()
            assert scores[int(pointed.removeprefix("step_"))] == max(others)
            assert (store.path / pointed).is_dir()
    assert not [entry for entry in store.path.iterdir() if ".tmp-" in entry.name]


def test_a_manifest_covers_all_files_and_no_more(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    write_manifest(tmp_path, {"x": 1})
    manifest = read_manifest(tmp_path)
    assert manifest["x"] == 1
    assert set(manifest["files"]) == {"config.json", "model.safetensors", "training_state/run.json"}
    (tmp_path / "added later").touch()
    check_files(tmp_path, manifest)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DamagedFolderError, match=r"config.json has another checksum"):
        check_files(tmp_path, manifest)


def test_a_durable_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    raygym.durable.replace_durably(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        raygym.durable.replace_durably(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_link_at_a_durable_files_new_name_leads_nobody_out(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "latest"
    victim.write_bytes(b"untouched")
    path.with_name("latest.new").symlink_to(victim)
    raygym.durable.replace_durably(path, b"new")
    assert (path.read_bytes(), victim.read_bytes()) == (b"new", b"untouched")
