"""An engine's temporary files go with Ray's session directory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from raygym.engine_files import use_folder_of


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="rg") as folder:
        yield Path(folder)


def test_this_process_and_its_children_use_it(session: Path, tmp_path: Path) -> None:
    compiled = tmp_path / "compiled"
    folder = use_folder_of(session, str(compiled))
    assert folder is not None
    assert folder.parent == session
    assert Path(tempfile.mkdtemp()).parent == folder
    code = "import tempfile; print(tempfile.mkdtemp())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(said).parent == folder
    assert folder.stat().st_mode & 0o077 == 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(compiled), "compiled code is there for the next run"
    assert (folder / "compiled").readlink() == compiled, "what looks for it among temporary files finds it"
    assert use_folder_of(session, str(tmp_path / "elsewhere")) == folder, "another engine of this node"
    assert use_folder_of(session, str(compiled)) == folder
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(compiled), "what is set, by the user or before, stays"


def test_what_is_compiled_first_on_a_machine_can_be_kept(session: Path, tmp_path: Path) -> None:
    compiled = tmp_path / "new" / "torchinductor_somebody"
    folder = use_folder_of(session, str(compiled))
    assert folder is not None
    below = folder / compiled.name / "precompiled_headers"
    below.mkdir(parents=True, exist_ok=True)
    assert (compiled / below.name).is_dir()


def test_where_compiled_code_cannot_be_kept_nothing_changes(session: Path) -> None:
    (session / "file").touch()
    assert use_folder_of(session, str(session / "file" / "compiled")) is None
    assert os.environ["TMPDIR"] == "/tmp"


def a_long_name(session: Path) -> Path:
    return session / ("long" * 20)


def a_link(session: Path) -> Path:
    (session / "engines").symlink_to("/tmp")
    return session


def a_file(session: Path) -> Path:
    (session / "engines").touch()
    return session


@pytest.mark.parametrize("make", [a_long_name, a_link, a_file])
def test_where_it_cannot_be_had_nothing_changes(session: Path, make: object) -> None:
    assert callable(make)
    assert use_folder_of(make(session), "/tmp/compiled") is None
    assert (os.environ["TMPDIR"], tempfile.gettempdir()) == ("/tmp", "/tmp")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
