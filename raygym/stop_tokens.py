"""Which tokens end a policy's generations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raygym.models import ModelError
from raygym.tokenizer_loading import load_tokenizer


def stop_token_ids(model_dir: Path) -> tuple[int, ...]:
    """The IDs that end a generation, sorted: the eos of config.json, generation_config.json and the tokenizer.

    They differ in published models (config.json often names the end of text, the tokenizer the end of turn), and
    every one of them ends a turn.
    """
    config = _read_json(model_dir / "config.json")
    found = _as_ids(config.get("eos_token_id")) | _as_ids((config.get("text_config") or {}).get("eos_token_id"))
    if (generation := model_dir / "generation_config.json").is_file():
        found |= _as_ids(_read_json(generation).get("eos_token_id"))
    found |= _as_ids(load_tokenizer(model_dir).eos_token_id)
    if not found:
        raise ModelError(str(model_dir), "names no end-of-turn token; set eos_token_id in its generation_config.json")
    return tuple(sorted(found))


def _as_ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, list) else {value}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            str(path.parent), f"{path.name} is not JSON ({error}); copy the model's files again"
        ) from error
    assert isinstance(data, dict), path
    return data
