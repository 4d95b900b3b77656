"""Checkpoints in an object store: what an empty machine goes on from, whatever happened to the store before."""

from __future__ import annotations

import io
import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from rich.console import Console
from test_resume import Run, config_of, rows

import raygym.mirror_store
from raygym.actors.session import Session
from raygym.actors.trainer import Trainer
from raygym.config import ConfigError, RunConfig
from raygym.console import RunConsole
from raygym.mirror_restore import restore_newer
from raygym.mirror_store import MirrorStore
from raygym.mirror_upload import CheckpointMirror, MirrorError, mirrored
from raygym.preflight import check_inputs
from raygym.resume import resume_point
from raygym.run_files import RunFiles


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A store that fails as it is told. Its files are those of `memory://`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.works: Callable[[int], bool] = lambda call: True
        self.before_put: Callable[[], object] = lambda: None

    def _called(self) -> None:
        self.calls += 1
        if not self.works(self.calls):
            raise ConnectionError("the store is away")

    def put_file(self, *args: Any, **kwargs: Any) -> Any:
        self.before_put()
        self._called()
        return super().put_file(*args, **kwargs)

    def pipe_file(self, *args: Any, **kwargs: Any) -> Any:
        self._called()
        return super().pipe_file(*args, **kwargs)

    def rm_file(self, *args: Any, **kwargs: Any) -> Any:
        self._called()
        return super().rm_file(*args, **kwargs)

    def ls(self, *args: Any, **kwargs: Any) -> Any:
        self._called()
        return super().ls(*args, **kwargs)


@pytest.fixture
def flaky() -> Iterator[tuple[Flaky, MirrorStore]]:
    Flaky.clear_instance_cache()
    fs, root = Flaky(), f"/{uuid.uuid4().hex}"
    yield fs, MirrorStore(lambda: (fs, f"{root}/t"))
    if MemoryFileSystem().exists(root):
        MemoryFileSystem().rm(root, recursive=True)


@pytest.fixture(params=["memory", "folder"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}/runs" if request.param == "memory" else str(tmp_path / "shared")


def mirrored_config(folder: Path, url: str, steps: int = 4, **checkpoint: Any) -> RunConfig:
    options = {"every": 1, "keep_last": 2, "keep_best": 1, "mirror": url} | checkpoint
    return config_of(folder, steps=steps, checkpoint=options)


def train(
    config: RunConfig, told: list[str], *, fresh: bool = False, store: MirrorStore | None = None
) -> tuple[Run, RunFiles]:
    """One start of `raygym train`, to its end, as `raygym.actors.runs` does it."""
    store = store or MirrorStore.open(str(config.checkpoint.mirror), config.name)
    if not fresh:
        restore_newer(config, store, told.append)
    resumed = None if fresh else resume_point(config, allow_change=False, told=told.append)
    with mirrored(config, store, told.append) as mirror:
        assert mirror is not None
        mirror._first_wait_s = 0.0
        files = RunFiles(config, resumed)
        mirror.begin()
        if resumed is not None:
            mirror.submit(resumed.step, files.scores)
        run, console = Run(resumed), RunConsole(config.steps, Console(file=io.StringIO()))
        trainer = Trainer(config, cast(Session, run), files, console, resumed, _Steady(mirror))
        summary = trainer.run()
        files.close()
        files.summary(summary)
    return run, files


class _Steady(CheckpointMirror):
    """Waits for each checkpoint, so that none gives way to the next one and calls have an order."""

    def __init__(self, mirror: CheckpointMirror) -> None:
        self.__dict__ = mirror.__dict__

    def submit(self, step: int, scores: Any) -> None:
        super().submit(step, scores)
        with self._changed:
            assert self._changed.wait_for(lambda: self.left is None, 30)


def steps_of(store: MirrorStore) -> list[int]:
    return [upload.step for upload in store.uploads(store.runs()[-1])]


def test_an_empty_machine_goes_on_from_the_mirror_as_if_nothing_had_been(tmp_path: Path, url: str) -> None:
    undisturbed, expected = train(mirrored_config(tmp_path / "one", f"{url}-other", 7), [])
    first = mirrored_config(tmp_path / "two", url, 4)
    train(first, [])
    assert steps_of(MirrorStore.open(url, "t"))[-2:] == [3, 4]
    shutil.rmtree(tmp_path / "two")
    told: list[str] = []
    config = mirrored_config(tmp_path / "three", url, 7)
    run, files = train(config, told)
    assert any("taking checkpoint step_000004" in line for line in told), told
    assert run.made == undisturbed.made
    assert rows(files.path / "ledger.jsonl") == rows(expected.path / "ledger.jsonl")
    assert [row["step"] for row in rows(files.path / "metrics.jsonl")] == list(range(8))
    assert not (files.path / "mirroring").exists()
    # And once more, on the machine that has it all: nothing is fetched, no second run begins there.
    store = MirrorStore.open(url, "t")
    assert len(store.runs()) == 1
    restore_newer(config, store, pytest.fail)


def test_as_many_stay_in_the_mirror_as_in_the_run(tmp_path: Path, url: str) -> None:
    train(mirrored_config(tmp_path, url, 6, keep_last=1, keep_best=0), [])
    assert steps_of(MirrorStore.open(url, "t")) == [6]


@pytest.mark.parametrize("fails_at", range(2, 60, 3))
def test_a_store_that_dies_at_any_call_leaves_a_run_to_go_on_with(
    tmp_path: Path, flaky: tuple[Flaky, MirrorStore], fails_at: int
) -> None:
    fs, store = flaky
    fs.works = lambda call: call < fails_at
    told: list[str] = []
    train(mirrored_config(tmp_path / "lost", "memory://away", 3), told, store=store)
    shutil.rmtree(tmp_path / "lost")
    fs.works = lambda call: True
    run, files = train(mirrored_config(tmp_path / "next", "memory://away", 5), [], store=store)
    assert run.made == list(range(5))
    assert [row["step"] for row in rows(files.path / "ledger.jsonl")] == sorted(
        row["step"] for row in rows(files.path / "ledger.jsonl")
    )
    assert {row["step"] for row in rows(files.path / "ledger.jsonl")} == set(range(1, 6))
    assert any("not mirrored" in line or "cannot be used" in line or "not be removed" in line for line in told)


def test_what_fails_once_is_tried_again(tmp_path: Path, flaky: tuple[Flaky, MirrorStore]) -> None:
    fs, store = flaky
    fs.works = lambda call: call % 3 != 0
    told: list[str] = []
    train(mirrored_config(tmp_path, "memory://away", 3), told, store=store)
    assert fs.calls > 30, told
    fs.works = lambda call: True
    assert steps_of(store)[-2:] == [2, 3]
    assert not any("not mirrored" in line for line in told), told


def test_a_store_that_is_away_does_not_end_a_run_unless_told(tmp_path: Path, flaky: tuple[Flaky, MirrorStore]) -> None:
    fs, store = flaky
    told: list[str] = []
    config = mirrored_config(tmp_path, "memory://away", 3)
    fs.works = lambda call: call < 5
    run, files = train(config, told, store=store)
    assert run.made == [0, 1, 2] and (files.path / "summary.json").is_file()
    assert any("step_000003 was not mirrored" in line and "the store is away" in line for line in told)
    required = mirrored_config(tmp_path, "memory://away", 6, mirror_required=True)
    with pytest.raises(MirrorError, match="mirror_required"):
        train(required, told, store=store)
    fs.works = lambda call: True
    run, _ = train(required, told, store=store)
    assert run.made == list(range(6)) and steps_of(store)[-2:] == [5, 6]


def test_a_damaged_one_is_told_and_the_one_before_is_taken(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    train(mirrored_config(tmp_path / "lost", str(shared)), [])
    [damaged] = shared.glob("t/0001-*/step_000004-*")
    (damaged / "checkpoint/training_state/learner.json").write_text("[0, 1, 2, 9]")
    shutil.rmtree(tmp_path / "lost")
    told: list[str] = []
    run, _ = train(mirrored_config(tmp_path / "lost", str(shared), 5), told)
    assert any("skipped: training_state/learner.json has" in line for line in told), told
    assert run.made == list(range(5))
    for ledger in shared.glob("t/*/*/run/ledger.jsonl"):
        ledger.write_text("{}\n")
    shutil.rmtree(tmp_path / "lost")
    with pytest.raises(ConfigError, match="none of the checkpoints"):
        train(mirrored_config(tmp_path / "lost", str(shared), 6), told)
    assert not (tmp_path / "lost/t").exists()


def test_fresh_begins_another_run_there_before_its_first_checkpoint(tmp_path: Path, url: str) -> None:
    config = mirrored_config(tmp_path / "a", url)
    train(config, [])
    store = MirrorStore.open(url, "t")
    # 2, or 3 where the last validation was not known yet when the last checkpoint was sent.
    earlier = store.uploads(store.runs()[0])
    mirror = CheckpointMirror(config, store, pytest.fail)
    RunFiles(config).close()
    mirror.begin()
    assert len(store.runs()) == 2
    mirror.close(10)
    shutil.rmtree(tmp_path / "a")
    run, _ = train(mirrored_config(tmp_path / "a", url, 2), [])
    assert run.made == [0, 1]
    assert store.uploads(store.runs()[0]) == earlier and earlier
    assert [len(store.uploads(name)) for name in store.runs()[1:]] == [0, 2]


def test_two_runs_of_one_name_are_not_mixed(tmp_path: Path, url: str) -> None:
    here, there = mirrored_config(tmp_path / "here", url), mirrored_config(tmp_path / "there", url)
    train(here, [])
    train(there, [], fresh=True)
    with pytest.raises(ConfigError, match="another run of the name t"):
        train(here, [])
    store, told = MirrorStore.open(url, "t"), list[str]()
    before = {name: store.uploads(name) for name in store.runs()}
    mirror = CheckpointMirror(here, store, told.append, first_wait_s=0)
    mirror.begin()
    mirror.submit(4, {})
    mirror.close(30)
    assert any("begun there by another process" in line for line in told)
    assert len(before) == 2 and all(before.values())
    assert {name: store.uploads(name) for name in store.runs()} == before


def test_a_slow_store_gets_the_newest_and_holds_up_nobody(tmp_path: Path, flaky: tuple[Flaky, MirrorStore]) -> None:
    fs, store = flaky
    config = mirrored_config(tmp_path, "memory://away", 3, keep_last=3)
    train(mirrored_config(tmp_path, "memory://elsewhere", 3, keep_last=3), [])
    told: list[str] = []
    going, gate = threading.Event(), threading.Event()
    fs.before_put = lambda: (going.set(), gate.wait(30))
    mirror = CheckpointMirror(config, store, told.append)
    mirror.begin()
    mirror.submit(1, {})
    assert going.wait(30)
    mirror.submit(2, {})
    mirror.submit(3, {})
    assert "step_000002 is not mirrored: the next one was made before" in told[0]
    shutil.rmtree(config.run_dir / "checkpoints/step_000001")  # as retaining does: what is being sent is sent whole
    with pytest.raises(MirrorError, match="within 0 s"):
        CheckpointMirror.close(_required(mirror), 0)
    gate.set()
    again = CheckpointMirror(config, store, told.append)
    again.begin()
    again.submit(3, {})
    again.close(30)
    assert 3 in steps_of(store)


def _required(mirror: CheckpointMirror) -> CheckpointMirror:
    mirror._options = mirror._options.model_copy(update={"mirror_required": True})
    return mirror


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    config = mirrored_config(tmp_path, str(tmp_path / "shared"), 2)
    _, files = train(config, [])
    with (files.path / "events.jsonl").open("a") as events:
        events.write('{"kind": "replica"}\n{"kind"')
    shutil.rmtree(tmp_path / "shared")
    mirror = CheckpointMirror(config, MirrorStore.open(str(config.checkpoint.mirror), "t"), print)
    mirror.begin()
    mirror.submit(2, {})
    mirror.close(30)
    [sent] = (tmp_path / "shared").glob("t/*/step_000002-*/run/events.jsonl")
    assert [json.loads(line) for line in sent.read_text().splitlines()] == [{"kind": "replica"}]


@pytest.mark.parametrize(
    ("url", "said"), [("zz://a/b", "Protocol not known: zz"), ("github://a:b@c/d", "expected a folder or a URL")]
)
def test_a_url_that_cannot_be_opened_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, said: str
) -> None:
    if "zz" not in url:

        def missing(name: str) -> Any:
            raise ImportError("Install it to access it")

        monkeypatch.setattr(raygym.mirror_store, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=said):
        check_inputs(mirrored_config(tmp_path, url))


def test_an_empty_machine_without_its_mirror_does_not_begin_anew(
    tmp_path: Path, flaky: tuple[Flaky, MirrorStore]
) -> None:
    fs, store = flaky
    config = mirrored_config(tmp_path, "memory://away", 2)
    train(config, [], store=store)
    fs.works = lambda call: False
    told: list[str] = []
    restore_newer(config, store, told.append)
    assert "warning: checkpoint.mirror: memory://away cannot be read" in told[0]
    shutil.rmtree(config.run_dir)
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        restore_newer(config, store, told.append)
