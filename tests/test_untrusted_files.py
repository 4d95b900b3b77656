"""What a run reads from its folder, or from a policy's, is data: a pickle in it is refused, and nothing of it runs."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from test_learner_state import ALONE, Tensors
from test_resume_point import config_of, resumed_at, save

from raygym.checkpoint import CheckpointStore
from raygym.config import ConfigError, RunConfig
from raygym.errors import LearnerStateError
from raygym.file_manifest import read_manifest, write_manifest
from raygym.learner_state import load_learner_state, save_learner_state
from raygym.models import ModelError, resolve_policy
from raygym.resume import checkpoint_store
from raygym.rollout_store import Request, RolloutStore
from raygym.stop_tokens import stop_token_ids


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.touched), 0o700)


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    """What would be there if the payload had run; it is tried once whether it would."""
    path = tmp_path / "touched"
    pickle.loads(pickle.dumps(Payload(path)))
    path.rmdir()
    return path


def plant(checkpoint: Path, name: str, touched: Path, *, kind: str) -> None:
    """Replace a file of a checkpoint, with a manifest that fits: checksums find damage, not malice."""
    head = {key: value for key, value in read_manifest(checkpoint).items() if key != "files"}
    if kind == "pickle":
        (checkpoint / name).write_bytes(pickle.dumps(Payload(touched)))
    else:
        torch.save(Payload(touched), checkpoint / name)
    write_manifest(checkpoint, head)


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["rollouts.json", "groups.safetensors", "run.json"])
def test_a_pickle_in_a_checkpoint_is_refused_when_the_run_goes_on(
    tmp_path: Path, touched: Path, name: str, kind: str
) -> None:
    config = config_of(tmp_path)
    save(config, 2)
    checkpoint = checkpoint_store(config).path_of(2)
    if name == "groups.safetensors":  # it is read where there are whole groups
        rollouts = json.loads((checkpoint / "training_state/rollouts.json").read_text())
        (checkpoint / "training_state/rollouts.json").write_text(json.dumps({**rollouts, "whole": [[]]}))
    plant(checkpoint, f"training_state/{name}", touched, kind=kind)
    assert CheckpointStore(checkpoint.parent).newest_whole(print) is not None, "its manifest fits"
    with pytest.raises(ConfigError, match=r"does not hold .* as raygym writes .*; restore .*step_000002, or use"):
        resumed_at(config)
    assert not touched.exists()


def test_a_pickle_in_place_of_the_manifest_is_damage(tmp_path: Path, touched: Path) -> None:
    config = config_of(tmp_path)
    save(config, 2, 4)
    (checkpoint_store(config).path_of(4) / "manifest.json").write_bytes(pickle.dumps(Payload(touched)))
    step, (told,) = resumed_at(config)
    assert step == 2 and "manifest.json cannot be read" in told
    assert not touched.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_in_the_learners_state_is_refused(tmp_path: Path, touched: Path, kind: str) -> None:
    state, folder = Tensors({"a": (2,)}, 1), tmp_path / "state"
    save_learner_state(folder, state, 0, ALONE)
    if kind == "pickle":
        (folder / "learner-00000.safetensors").write_bytes(pickle.dumps(Payload(touched)))
    else:
        torch.save(Payload(touched), folder / "learner-00000.safetensors")
    with pytest.raises(LearnerStateError, match=r"the learner state in .*state cannot be used"):
        load_learner_state(folder, state, ALONE)
    assert not touched.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", ".."])
def test_the_learners_state_names_only_files_of_its_own_folder(tmp_path: Path, name: str) -> None:
    state, folder = Tensors({"a": (2,)}, 1), tmp_path / "state"
    save_learner_state(folder, state, 0, ALONE)
    (folder / "learner-00000.safetensors").rename(tmp_path / "outside.safetensors")
    index = json.loads((folder / "learner.json").read_text())
    index["files"] = dict.fromkeys(index["files"], name)
    (folder / "learner.json").write_text(json.dumps(index))
    with pytest.raises(LearnerStateError, match="is no name of a file in it"):
        load_learner_state(folder, state, ALONE)


def test_a_pickle_among_trajectories_is_refused(tmp_path: Path, touched: Path) -> None:
    config: RunConfig = config_of(tmp_path)
    request, folder = Request(tasks=1, samples=1, split="validation"), tmp_path / "rollouts"
    RolloutStore(folder, config, request, [], fresh=False).close()
    (folder / "trajectories.jsonl").write_bytes(pickle.dumps(Payload(touched)) + b"\n")
    with pytest.raises(ConfigError, match=r"trajectories\.jsonl"):
        RolloutStore(folder, config, request, [], fresh=False)
    assert not touched.exists()


def test_a_policy_that_is_only_there_as_a_pickle_is_refused(tmp_path: Path, touched: Path) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    torch.save({"model": Payload(touched)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors file"):
        resolve_policy(str(folder))
    assert not touched.exists()


def test_code_that_comes_with_a_policy_is_not_run(tmp_path: Path, touched: Path) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    for path in resolve_policy("tiny").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(touched)!r})\nclass Own: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        stop_token_ids(folder)
    assert not touched.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\0b", "a\nb", "a\x1b[2J"])
def test_a_runs_name_is_one_folders_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="must be usable as a folder's name"):
        config_of(tmp_path, name=name)
