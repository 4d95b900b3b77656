"""What single tokens say, and where a policy's text would be tokenized in another way than it was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WORD_BEGIN = "\N{LOWER ONE EIGHTH BLOCK}"  # a space, in the vocabularies of SentencePiece
_MOST_TOLD = 100
"""Other tokens of one place that are told by their texts."""


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
    """The texts of the tokens that would stand there; none where they are too many."""


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
        return [
            Retokenized(start + a, start + b, tuple(map(self.text, again[c:d])) if d - c <= _MOST_TOLD else ())
            for a, b, c, d in self._differing(ids, again)
        ]

    def _differing(self, ids: Sequence[int], again: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
        """Where two ways to write the same text differ: begin and end in both. The time grows with their lengths."""
        pieces, others = ([self._tokenizer.id_to_token(token_id) or "" for token_id in each] for each in (ids, again))
        if "".join(pieces) != "".join(others):
            # A tokenizer that changes texts has no places to compare: one span, from the first to the last difference.
            shorter = min(len(ids), len(again))
            front = next((n for n in range(shorter) if ids[n] != again[n]), shorter)
            back = next((n for n in range(shorter - front) if ids[-1 - n] != again[-1 - n]), shorter - front)
            yield front, len(ids) - back, front, len(again) - back
            return
        at, other = 0, 0  # tokens; both have the same text before them
        begin: tuple[int, int] | None = None
        while at < len(ids) or other < len(again):
            if at < len(ids) and other < len(again) and ids[at] == again[other]:
                if begin is not None:
                    yield begin[0], at, begin[1], other
                    begin = None
                at, other = at + 1, other + 1
                continue
            begin = begin or (at, other)
            ahead = 0  # characters that `ids` has more
            while True:
                if at < len(ids) and (ahead <= 0 or other == len(again)):
                    ahead += len(pieces[at])
                    at += 1
                else:
                    ahead -= len(others[other])
                    other += 1
                if ahead == 0 or (at == len(ids) and other == len(again)):
                    break
        if begin is not None:
            yield begin[0], at, begin[1], other

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
