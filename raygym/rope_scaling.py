"""Rotary frequencies that depend on how long the longest sequence is: what a learner cannot compute exactly.

Transformers chooses the frequencies of `longrope` (arXiv 2402.13753) and of `dynamic` NTK scaling by the longest
position of a forward pass. A micro-batch has several sequences, so one that is longer than the policy was first trained
on would change what is computed for the others, and results would depend on how sequences are packed. An engine chooses
once, by the longest that it takes. Up to that length nothing is chosen, and learner and engine agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from raygym.config_section import ConfigError

# `su` is what the first models with longrope call it.
_CHOSEN_BY_LENGTH = ("longrope", "su", "dynamic")


def check_rope_scaling(architecture: Mapping[str, Any], longest: int | None, key: str) -> None:
    """Refuse a run whose sequences may be longer than those for which the frequencies are fixed.

    Args:
        architecture: the policy's config.json.
        longest: tokens of the longest sequence that the run can have; None: what vLLM takes by default.
        key: the config's key that sets `longest`.

    Raises:
        ConfigError: it may; the text says at which length it would not.
    """
    text = architecture.get("text_config") or architecture
    for rope in _sections(text):
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in _CHOSEN_BY_LENGTH:
            continue
        fixed = _fixed_length(text, rope, dynamic=kind == "dynamic")
        reached = _default_length(text, rope, dynamic=kind == "dynamic") if longest is None else longest
        if fixed is not None and reached is not None and reached > fixed:
            raise ConfigError(
                f"{key}: sequences may have {reached} tokens, but the policy's rope_type {kind} has other frequencies "
                f"beyond {fixed} tokens, for all sequences of a micro-batch, so that results would depend on how they "
                f"are packed; expected at most {fixed}"
            )


def _sections(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parameters of all layers, or those of each kind of layer. Older files call them `rope_scaling`."""
    for name in ("rope_parameters", "rope_scaling"):
        section = text.get(name)
        if isinstance(section, Mapping):
            yield section
            yield from (part for part in section.values() if isinstance(part, Mapping))


def _fixed_length(text: Mapping[str, Any], rope: Mapping[str, Any], *, dynamic: bool) -> int | None:
    """Tokens up to which the frequencies are the original ones."""
    name, most = "original_max_position_embeddings", text.get("max_position_embeddings")
    # Transformers' dynamic scaling looks at max_position_embeddings only.
    return most if dynamic else text.get(name) or rope.get(name) or most


def _default_length(text: Mapping[str, Any], rope: Mapping[str, Any], *, dynamic: bool) -> int | None:
    """What vLLM takes without `max_model_len`."""
    most = text.get("max_position_embeddings")
    if dynamic:
        return int(most * (rope.get("factor") or 1)) if most is not None else None
    return text.get("original_max_position_embeddings") or most
