"""What single tokens say, and where a policy's text would be tokenized in another way than it was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WORD_BEGIN = "\N{LOWER ONE EIGHTH BLOCK}"  # a space, in the vocabularies of SentencePiece
_MOST_ALIGNED = 3000
"""Tokens of a turn that are compared one by one: the time grows with their square."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable bytes stand for themselves, the others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert set(letters) == set(ByteLevel.alphabet())
    return letters


_BYTES = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class Retokenized:
    """Tokens that would not come back if their turn's text were tokenized again."""

    start: int
    end: int
    """One past the last, in the trajectory. Equal to `start` where tokens would be added."""
    instead: tuple[str, ...]
    """The texts of the tokens that would stand there."""


class TokenText:
    """One policy's tokenizer, read from its file: no code of the model's is run, and no engine imported."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._kept: dict[int, str] = {}

    @classmethod
    def of(cls, directory: Path) -> TokenText | None:
        """The tokenizer of a policy's folder; None where it has none that can be read alone."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception:  # the library raises plain Exception for a file that it cannot read
            return None

    def is_special(self, token_id: int) -> bool:
        """Such as the end of a turn."""
        return token_id in self._special

    def text(self, token_id: int) -> str:
        r"""What one token says. Bytes that are no whole character are told as `\xe2`."""
        found = self._kept.get(token_id)
        if found is None:
            found = self._kept[token_id] = self._decoded(token_id)
        return found

    def retokenized(self, token_ids: Sequence[int], start: int) -> list[Retokenized]:
        """Where one turn's tokens are not what its text gives.

        Args:
            token_ids: of one turn; special ones at its end are left out.
            start: the index of the first in its trajectory.
        """
        ids = list(token_ids)
        while ids and ids[-1] in self._special:
            ids.pop()
        again = self._tokenizer.encode(
            self._tokenizer.decode(ids, skip_special_tokens=False), add_special_tokens=False
        ).ids
        if again == ids:
            return []
        if max(len(ids), len(again)) > _MOST_ALIGNED:
            same = next((n for n, pair in enumerate(zip(ids, again, strict=False)) if pair[0] != pair[1]), len(ids))
            return [Retokenized(start + same, start + len(ids), ())]
        differing = SequenceMatcher(None, ids, again, autojunk=False).get_opcodes()
        return [
            Retokenized(start + a, start + b, tuple(self.text(token_id) for token_id in again[c:d]))
            for what, a, b, c, d in differing
            if what != "equal"
        ]

    def _decoded(self, token_id: int) -> str:
        raw = self._tokenizer.id_to_token(token_id)
        if raw is None:
            return f"[{token_id}]"
        if token_id in self._special:
            return str(raw)
        if raw.startswith(_WORD_BEGIN):
            return str(raw).replace(_WORD_BEGIN, " ")  # decoding a single one drops the space
        text = str(self._tokenizer.decode([token_id], skip_special_tokens=False))
        if _REPLACEMENT in text and all(letter in _BYTES for letter in raw):
            data = bytes(_BYTES[letter] for letter in raw)
            return data.decode(errors="backslashreplace")
        return text
