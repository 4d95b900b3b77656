"""Which of vLLM's tool-call parsers fits a model: told from what its chat template writes for a call."""

from __future__ import annotations

import json
from pathlib import Path

# The first mark found decides; the more particular ones come first.
_MARKS = (
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
)


def tool_parser(choice: str, model_dir: str) -> str:
    """vLLM's name of the parser, or an empty string for none.

    Args:
        choice: `policy.tool_parser`: a name, an empty string, or `auto`.
        model_dir: the policy's files.
    """
    if choice != "auto":
        return choice
    template = chat_template(Path(model_dir))
    # A template that shows no calls says nothing about how the policy would write one; Hermes' form is the commonest.
    return next((parser for mark, parser in _MARKS if mark in template), "hermes" if template else "")


def chat_template(model_dir: Path) -> str:
    """The model's chat template; empty when it has none."""
    if (separate := model_dir / "chat_template.jinja").is_file():
        return separate.read_text(encoding="utf-8")
    if not (path := model_dir / "tokenizer_config.json").is_file():
        return ""
    template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        return "\n".join(str(entry.get("template", "")) for entry in template)
    return str(template)
