"""Tokenizers that many tests share: loading one takes half a second."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from transformers import AutoTokenizer

from raygym.models import resolve_policy


@cache
def _loaded(policy: str) -> Any:
    return AutoTokenizer.from_pretrained(resolve_policy(policy))


def tokenizer(policy: str) -> Any:
    """A policy's tokenizer; its chat template may be replaced without others seeing it."""
    return copy.copy(_loaded(policy))
