"""The config.json of `policy.model`: from the policy's files, or those of published models in `architectures/`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygym.models import is_hub_id

_PUBLISHED = Path(__file__).parent / "architectures"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A config.json and where it is from."""

    config: dict[str, Any]
    source: str
    """For people."""


def read_architecture(model: str, model_dir: str | None) -> Architecture | None:
    """What `policy.model` looks like, or None where nothing on this machine says so. Asks nobody else.

    Args:
        model: `policy.model`.
        model_dir: the policy's files, where they are here.
    """
    if model_dir is not None:
        return _from_file(Path(model_dir) / "config.json", "its files")
    if not is_hub_id(model):
        return None
    return _from_cache(model) or _published(model)


def published_models() -> list[str]:
    """Hugging Face ids of all models in `architectures/`, sorted."""
    return sorted(model for models, _ in _entries() for model in models)


def _published(model: str) -> Architecture | None:
    for models, config in _entries():
        if model in models:
            return Architecture(config, "raygym's list of published models")
    return None


def _entries() -> Iterator[tuple[list[str], dict[str, Any]]]:
    for path in sorted(_PUBLISHED.glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        yield entry["models"], entry["config"]


def _from_cache(model: str) -> Architecture | None:
    from huggingface_hub import try_to_load_from_cache  # takes a part of a second, and only hub ids need it

    found = try_to_load_from_cache(model, "config.json")
    return _from_file(Path(found), "the Hugging Face cache") if isinstance(found, str) else None


def _from_file(path: Path, source: str) -> Architecture:
    return Architecture(json.loads(path.read_text(encoding="utf-8")), source)
