"""What goes wrong around a mirror: two processes, a store that hangs, an end that was not sent, a kill at a start."""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_mirror import Flaky, flaky, mirrored_config, steps_of, train

import raygym.mirror_upload
from raygym.actors import runs
from raygym.config import ConfigError, RunConfig
from raygym.mirror_restore import restore_newer
from raygym.mirror_store import MirrorStore
from raygym.mirror_upload import CheckpointMirror, mirrored
from raygym.preflight import check_inputs
from raygym.resume import resume_point
from raygym.run_files import RunFiles
from raygym.watched_call import watched

__all__ = ["flaky"]


def store_at(url: str) -> MirrorStore:
    return MirrorStore.open(url, "t")


def begun(config: RunConfig, store: MirrorStore, told: list[str]) -> CheckpointMirror:
    mirror = CheckpointMirror(config, store, told.append, first_wait_s=0)
    mirror.begin()
    assert mirror._tried_to_claim.wait(30)
    return mirror


def sent(mirror: CheckpointMirror, step: int) -> None:
    mirror.submit(step, {})
    with mirror._changed:
        assert mirror._changed.wait_for(lambda: mirror.left is None, 30)


# 1: the end of a run


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig], None]:
    """`raygym train` of a run that has nothing to do but to look."""
    monkeypatch.setattr(runs, "prepared", lambda config, model_dir: (config, 0))
    monkeypatch.setattr(runs, "_train", lambda *args: pytest.fail("it was begun"))
    return lambda config: runs.train(config, "")


def test_the_next_start_of_a_finished_run_sends_what_its_end_could_not(
    tmp_path: Path, start: Callable[[RunConfig], None], capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    config = mirrored_config(tmp_path, url, 4, keep_last=1)
    train(config, [])
    MemoryFileSystem().rm(url.removeprefix("memory:/"), recursive=True)
    start(config)
    store = store_at(url)
    assert steps_of(store) == [4] and "has made its 4 steps" in capsys.readouterr().out
    claims = store.claims(store.runs()[0])
    start(config)
    assert store.claims(store.runs()[0]) == claims, "a start that has nothing to send takes it from nobody"


# 2: an upload of which something is gone


def test_an_upload_that_has_lost_a_file_is_told_and_the_one_before_is_taken(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    train(mirrored_config(tmp_path / "lost", str(shared)), [])
    [damaged] = shared.glob("t/0001-*/step_000004-*")
    (damaged / "checkpoint/training_state/learner.json").unlink()
    shutil.rmtree(tmp_path / "lost")
    told: list[str] = []
    run, _ = train(mirrored_config(tmp_path / "lost", str(shared), 5), told)
    assert any("skipped: checkpoint/training_state/learner.json is missing there" in line for line in told), told
    assert run.made == list(range(5))


# 3: two processes that write one run


def two_drivers(tmp_path: Path, url: str, told: list[str]) -> tuple[CheckpointMirror, CheckpointMirror, MirrorStore]:
    """One that lives on, and the one that was started on an empty disk in its place."""
    old, new = mirrored_config(tmp_path / "old", url, 3, keep_last=3), mirrored_config(tmp_path / "new", url, 3)
    train(old, [])
    first = begun(old, store_at(url), told)
    restore_newer(new, store_at(url), lambda _: None)
    return first, begun(new, store_at(url), []), store_at(url)


def test_a_process_whose_run_another_one_goes_on_with_sends_nothing_more(tmp_path: Path) -> None:
    told: list[str] = []
    first, second, store = two_drivers(tmp_path, str(tmp_path / "shared"), told)
    run = store.runs()[0]
    before = store.uploads(run)
    shutil.rmtree(tmp_path / "shared/t" / run / before[-1].folder)
    sent(first, 3)
    assert any("gone on with by another process" in line for line in told), told
    assert store.uploads(run) == before[:-1]
    assert not list((tmp_path / "shared/t" / run).glob("step_000003-*")), "nothing is sent in vain"
    sent(second, 3)
    assert steps_of(store)[-1] == 3
    first.close(10)
    second.close(10)


def test_a_process_that_is_in_the_middle_of_sending_does_not_complete_what_is_not_its_own_any_more(
    tmp_path: Path, flaky: tuple[Flaky, MirrorStore]
) -> None:
    fs, store = flaky
    config = mirrored_config(tmp_path, "memory://away", 3, keep_last=3)
    train(mirrored_config(tmp_path, str(tmp_path / "elsewhere"), 3, keep_last=3), [])
    told: list[str] = []
    going, gate = threading.Event(), threading.Event()
    fs.before_put = lambda: (going.set(), gate.wait(30))
    first = begun(config, store, told)
    first.submit(3, {})
    assert going.wait(30)
    run = store.runs()[0]
    store.claim(run)
    gate.set()
    first.close(30)
    assert not store.uploads(run) and any("gone on with by another process" in line for line in told), told


def test_what_a_newer_claim_writes_is_removed_by_nobody_else(tmp_path: Path) -> None:
    store = store_at(str(tmp_path))
    run = store.begin_run()
    claims = [store.claim(run) for _ in range(3)]
    assert store.claims(run) == claims
    (tmp_path / "a").write_text("a")
    names = ["step_000001-9c41d2e7", *(f"step_00000{n}-{claim}-9c41d2e7" for n, claim in enumerate(claims, 2))]
    for name in names:
        store.put(run, name, "a", tmp_path / "a")
    store.remove_all_but(run, [], claims[1])
    assert [path.name for path in (tmp_path / "t" / run).glob("step_*")] == names[-1:]


def test_claims_are_in_order_beyond_four_digits(tmp_path: Path) -> None:
    store = store_at(str(tmp_path))
    run = store.begin_run()
    (tmp_path / "t" / run / "claims").mkdir()
    (tmp_path / "t" / run / "claims/9999-00000000").write_text("")
    claim = store.claim(run)
    assert claim.startswith("10000-") and store.claims(run)[-1] == claim


# 4: the end of a run that fails


@pytest.mark.parametrize("interrupted", [False, True])
def test_why_a_run_fails_is_told_before_the_mirror_is_waited_for(
    tmp_path: Path, flaky: tuple[Flaky, MirrorStore], interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, store = flaky
    config = mirrored_config(tmp_path, "memory://away", 2, mirror_wait_s=0.2)
    train(config, [], store=store)
    told: list[str] = []
    gate = threading.Event()
    fs.before_put = lambda: gate.wait(30)
    shutil.rmtree(config.run_dir / "checkpoints/step_000001")
    (config.run_dir / "checkpoints/step_000002/manifest.json").write_text("{}")  # another one than that which is there
    if interrupted:

        def interrupt(self: threading.Condition, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    with pytest.raises(ZeroDivisionError), mirrored(config, store, told.append, lambda error: "no learner") as mirror:
        assert mirror is not None
        mirror.begin()
        mirror.submit(2, {})
        while mirror._sending is None:
            time.sleep(0.01)
        if interrupted:
            monkeypatch.setattr(mirror._changed, "wait", interrupt.__get__(mirror._changed))
        raise ZeroDivisionError
    gate.set()
    assert told[:2] == [
        "the run ends: no learner",
        "waiting for checkpoint step_000002, which is being sent to memory://away, at most 0.2 s "
        "(checkpoint.mirror_wait_s); Ctrl-C ends that",
    ]
    assert ("not waited for any longer" in told[2]) == interrupted
    assert mirror._ended.is_set()


# 5


def test_what_trackers_call_the_run_is_there_on_an_empty_machine(tmp_path: Path) -> None:
    url = str(tmp_path / "shared")
    config = mirrored_config(tmp_path / "one", url, 2)
    train(config, [])
    known = '{\n  "wandb": {\n    "id": "abc",\n    "step": 2\n  }\n}\n'
    (config.run_dir / "tracking.json").write_text(known)
    train(mirrored_config(tmp_path / "one", url, 3), [])
    other = mirrored_config(tmp_path / "two", url, 3)
    restore_newer(other, store_at(url), lambda _: None)
    assert (other.run_dir / "tracking.json").read_text() == known


# 6: --fresh


def fresh(config: RunConfig, store: MirrorStore, told: list[str]) -> None:
    """`raygym train --fresh`, which is killed when it has begun."""
    RunFiles(config).close()
    begun(config, store, told).close(0)


def test_a_fresh_run_is_known_to_the_mirror_before_it_begins(tmp_path: Path) -> None:
    config = mirrored_config(tmp_path / "a", str(tmp_path / "shared"), 2)
    train(config, [])
    store = store_at(str(tmp_path / "shared"))
    RunFiles(config).close()
    mirror = CheckpointMirror(config, store, pytest.fail)
    mirror.begin()
    assert len(store.runs()) == 2
    mirror.close(0)


@pytest.mark.parametrize("saved", [False, True])
def test_after_a_fresh_run_of_which_the_mirror_does_not_know_the_old_one_is_not_restored(
    tmp_path: Path, flaky: tuple[Flaky, MirrorStore], saved: bool
) -> None:
    fs, store = flaky
    config = mirrored_config(tmp_path, "memory://away", 2)
    train(config, [], store=store)
    old = steps_of(store)
    fs.works = lambda call: False
    told: list[str] = []
    if saved:
        train(config, told, fresh=True, store=store)
    else:
        fresh(config, store, told)
    assert any("does not know of this run yet" in line for line in told), told
    fs.works = lambda call: True
    restore_newer(config, store, told.append)
    point = resume_point(config, allow_change=False, told=told.append) if not saved else None
    assert point is None and "goes on; memory://away does not know" in told[-1]
    run, _ = train(mirrored_config(tmp_path, "memory://away", 3), [], store=store)
    assert run.made == [0, 1, 2] and len(store.runs()) == 2
    assert [upload.step for upload in store.uploads(store.runs()[0])] == old and steps_of(store)[-1] == 3


def test_a_store_that_hangs_holds_up_a_new_run_for_a_bounded_time(
    tmp_path: Path, flaky: tuple[Flaky, MirrorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, store = flaky
    gate = threading.Event()
    fs.works = lambda call: gate.wait(30)
    monkeypatch.setattr(raygym.mirror_upload, "_BEGIN_WAIT_S", 0.05)
    monkeypatch.setattr(raygym.mirror_upload, "_BEGIN_AGAIN_S", 0.01)
    config, told = mirrored_config(tmp_path, "memory://away"), list[str]()
    RunFiles(config).close()
    mirror = CheckpointMirror(config, store, told.append)
    mirror.begin()
    assert "does not know of this run yet" in told[0]
    gate.set()
    assert mirror._tried_to_claim.wait(30)
    assert store.runs()
    mirror.close(0)


def test_what_could_not_be_claimed_at_the_start_is_claimed_without_a_checkpoint(
    tmp_path: Path, flaky: tuple[Flaky, MirrorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, store = flaky
    monkeypatch.setattr(raygym.mirror_upload, "_BEGIN_AGAIN_S", 0.01)
    fs.works = lambda call: call > 7  # more than are tried at the start
    config = mirrored_config(tmp_path, "memory://away")
    RunFiles(config).close()
    mirror = begun(config, store, [])
    deadline = time.monotonic() + 30
    while mirror._claim is None and time.monotonic() < deadline:
        time.sleep(0.01)
    mirror.close(0)
    assert store.runs() and fs.calls > 7


# 7: a store that cannot be opened, or hangs


class Refusing(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Connects when it is made, as ftp's does."""

    protocol = "refusing"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        raise ConnectionRefusedError(111, "Connection refused")


def test_a_check_does_not_connect_and_a_start_tells_why_it_cannot(tmp_path: Path) -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    config = mirrored_config(tmp_path, "refusing://host/runs")
    with pytest.raises(ConfigError, match=r"policy|env"):  # what else is wrong with it: the mirror is not
        check_inputs(config)
    with pytest.raises(ConfigError, match=r"refusing://host/runs cannot be read \(ConnectionRefusedError: "):
        restore_newer(config, store_at("refusing://host/runs"), print)


@pytest.mark.parametrize("url", ["simplecache::zz://a/b", "zz::memory://a"])
def test_each_part_of_a_chained_url_is_known(url: str) -> None:
    store_at("simplecache::memory://a/b")
    with pytest.raises(ConfigError, match="Protocol not known: zz"):
        store_at(url)


def test_a_store_that_hangs_is_given_up(tmp_path: Path, flaky: tuple[Flaky, MirrorStore]) -> None:
    fs, store = flaky
    gate = threading.Event()
    fs.works = lambda call: gate.wait(30)
    with pytest.raises(ConfigError, match=r"cannot be read \(TimeoutError: nothing has come for 0.05 s\)"):
        restore_newer(mirrored_config(tmp_path, "memory://away"), store, print, idle_s=0.05)
    gate.set()


def test_what_gets_on_is_not_given_up() -> None:
    count, gate = iter(range(1000)), threading.Event()
    done = threading.Timer(0.3, gate.set)
    done.start()
    assert watched(lambda: gate.wait(30), 0.1, lambda: next(count))
    with pytest.raises(ZeroDivisionError):
        watched(lambda: 1 // 0, 1)


# 8


def test_what_could_not_be_staged_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mirrored_config(tmp_path, str(tmp_path / "shared"), 2)
    train(config, [])
    told: list[str] = []
    mirror = begun(config, store_at(str(config.checkpoint.mirror)), told)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(raygym.mirror_upload, "write_manifest", full)
    mirror.submit(2, {})
    assert "No space left" in told[-1] and not list((config.run_dir / "mirroring").iterdir())
    mirror.close(0)


def test_a_slash_at_the_end_of_the_url_makes_no_other_mirror(tmp_path: Path) -> None:
    url = str(tmp_path / "shared")
    train(mirrored_config(tmp_path / "a", url, 2), [])
    run, _ = train(mirrored_config(tmp_path / "a", f"{url}/", 3), [])
    assert run.made == [0, 1, 2] and len(store_at(url).runs()) == 1


def test_a_kill_between_the_two_renames_of_a_restore_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "shared")
    config = mirrored_config(tmp_path / "a", url, 2)
    train(config, [])
    shutil.copytree(config.run_dir, tmp_path / "b/t")
    shutil.rmtree(tmp_path / "b/t/checkpoints/step_000002")
    behind = mirrored_config(tmp_path / "b", url, 2)
    real = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == ".t.restoring":
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        restore_newer(behind, store_at(url), lambda _: None)
    assert not behind.run_dir.exists()
    shutil.rmtree(url)
    restore_newer(behind, store_at(url), pytest.fail)
    known = json.loads((behind.run_dir / "mirror.json").read_text())
    assert known["url"] == url and (behind.run_dir / "checkpoints/step_000002").is_dir()
