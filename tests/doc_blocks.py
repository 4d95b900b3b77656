"""The code blocks of the documentation, with where they are and what is said of them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "benchmarks" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
_FENCE = re.compile(r"^ *```(.*)$")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
_FILE = re.compile(r"^# ([\w./-]+\.(?:py|yaml))$")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    not_run: str | None
    """Why a test cannot run it; it is still parsed."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that its first line names."""
        match = _FILE.match(self.text.partition("\n")[0])
        return match[1] if match else None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line, comments and continuations resolved."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """Of one page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    opened, language, before = 0, "", ""
    for number, line in enumerate(lines, 1):
        match = _FENCE.match(line)
        if match and not opened:
            opened, language = number, match[1].strip()
            before = lines[number - 2] if number > 1 else ""
        elif match:
            why = _NOT_RUN.search(before)
            text = "\n".join(lines[opened : number - 1]) + "\n"
            found.append(Block(page, opened, language, text, why[1] if why else None))
            opened = 0
    assert not opened, f"{page}:{opened}: the block has no end"
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """All that `page#...` can name."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}


def links(page: Path) -> list[str]:
    """The targets of all links and pictures of a page that are no URL."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if "://" not in target and not target.startswith("mailto:")]
