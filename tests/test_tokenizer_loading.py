"""The tokenizer that AutoTokenizer would load, for half of its price."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoTokenizer

import raygym.tokenizer_loading
from raygym.models import resolve_policy
from raygym.tokenizer_loading import load_tokenizer

MESSAGES = [
    {"role": "system", "content": "You add."},
    {"role": "user", "content": "What is 2 + 40?\n\tIn words: *zwei*, \N{SNOWMAN}."},
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYGYM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often AutoTokenizer was."""
    found: list[str] = []
    original = AutoTokenizer.from_pretrained

    def noted(path: Any, **options: Any) -> Any:
        found.append(str(path))
        return original(path, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", noted)
    return found


def model(folder: Path, model_type: str = "llama", **tokenizer_config: Any) -> Path:
    """The tiny policy's files, as another model's would say what they are."""
    shutil.copytree(resolve_policy("tiny"), folder)
    for name, changes in (("config.json", {"model_type": model_type}), ("tokenizer_config.json", tokenizer_config)):
        known = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
    return folder


# What AutoTokenizer makes of these pairs has reasons of its own; whatever it is, it is the same.
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2", "mistral", "phi3", "nemotron"])
@pytest.mark.parametrize(
    "named",
    [None, "PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2TokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"],
)
def test_it_is_the_one_that_autotokenizer_loads(
    model_type: str, named: str | None, cache: Path, asked: list[str], tmp_path: Path
) -> None:
    folder = model(tmp_path / "model", model_type, tokenizer_class=named)
    expected = AutoTokenizer.from_pretrained(folder)
    asked.clear()
    first = load_tokenizer(folder)
    assert len(asked) == 1
    second = load_tokenizer(str(folder))
    assert len(asked) == 1, "it was known"
    for loaded in (first, second):
        assert type(loaded) is type(expected)
        assert loaded.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
        assert loaded.special_tokens_map == expected.special_tokens_map
        assert loaded.eos_token_id == expected.eos_token_id
        options = {"add_generation_prompt": True, "return_dict": False}
        assert loaded.apply_chat_template(MESSAGES, **options) == expected.apply_chat_template(MESSAGES, **options)


def test_files_that_change_are_looked_at_anew(cache: Path, asked: list[str], tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    load_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    assert load_tokenizer(folder).eos_token == "<|endoftext|>"
    (folder / "tekken.json").write_text("{}")
    load_tokenizer(folder)
    assert len(asked) == 3
    load_tokenizer(folder)
    assert len(asked) == 3 and len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    "kept", ["", "[]", "{}", '{"module": "os", "name": "system"}', '{"module": "transformers.models", "name": "Gone"}',
             '{"module": "transformers.gone", "name": "Gone"}', '{"module": 1, "name": 2}']
)  # fmt: skip
def test_what_was_kept_and_makes_no_sense_is_found_anew(
    kept: str, cache: Path, asked: list[str], tmp_path: Path
) -> None:
    folder = model(tmp_path / "model")
    load_tokenizer(folder)
    (file,) = cache.iterdir()
    file.write_text(kept)
    assert load_tokenizer(folder).eos_token == "<|im_end|>"
    assert len(asked) == 2 and "TokenizersBackend" in file.read_text()


def test_a_cache_that_cannot_be_written_costs_only_time(cache: Path, asked: list[str], tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("in the way")
    for _ in range(2):
        assert load_tokenizer(folder).eos_token == "<|im_end|>"
    assert len(asked) == 2


def test_a_user_without_a_home_has_no_cache(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "model")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(raygym.tokenizer_loading, "cache_dir", no_home)
    for _ in range(2):
        assert load_tokenizer(folder).eos_token == "<|im_end|>"
    assert len(asked) == 2


def test_a_known_one_needs_no_pytorch(tmp_path: Path) -> None:
    """Nor does what else an EnvRunner loads, or a simulated replica."""
    model_dir = resolve_policy("tiny")
    load_tokenizer(model_dir)
    code = f"""
import asyncio, sys
from pathlib import Path
from raygym.actors import env_runner, policy_server
from raygym.chat import ChatRenderer
from raygym.simulate import SimulatedConfig, SimulatedEngine
from raygym.stop_tokens import stop_token_ids
from raygym.tokenizer_loading import load_tokenizer
from raygym.weights import checkpoint_shapes
model_dir = {str(model_dir)!r}
assert len(ChatRenderer(load_tokenizer(model_dir)).render_initial([{{"role": "user", "content": "x"}}]))
engine = SimulatedEngine(SimulatedConfig(), stop_token_ids(Path(model_dir)), model_dir, "tiny")
assert asyncio.run(engine.asgi_app()) and checkpoint_shapes(model_dir)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "False\n", done.stderr
