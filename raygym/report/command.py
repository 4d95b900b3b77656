"""Writes the two files of a report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from raygym.console import sparkline
from raygym.errors import RaygymError
from raygym.report.contents import Contents, read_contents
from raygym.report.curves import Series, thinned
from raygym.report.drawing import number, svg
from raygym.whole_file import write_whole

_TREND = 32
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_REORDERING = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\N{REPLACEMENT CHARACTER}")
_VISIBLE: dict[int, int | str] = {**_PICTURES, **_REORDERING}
"""Characters that a page must not have, and those that show text in another order than it is in."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#|~!])")


def write_report(run: Path, out: Path | None = None) -> list[Path]:
    """Write report.html and report.md; returns their paths.

    Args:
        run: the run's folder.
        out: where they go, by default into the run's folder.

    Raises:
        RaygymError: it is no run's folder, or `out` cannot be written.
    """
    contents = read_contents(run)
    folder = out or run
    pages = {folder / "report.html": html(contents), folder / "report.md": markdown(contents)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, page in pages.items():
            # Half of a pair of surrogates, which a policy may write, is no UTF-8.
            write_whole(path, page.encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise RaygymError(f"--out: {folder} cannot be written ({error.strerror}); give another --out") from error
    return list(pages)


def html(contents: Contents) -> str:
    """One page with everything in it: it loads nothing, and runs nothing."""
    return _environment(escaping=True).get_template("report.html.j2").render(report=contents)


def markdown(contents: Contents) -> str:
    """The same without pictures: each curve in a row of a table, with its trend in a few characters."""
    return _environment(escaping=False).get_template("report.md.j2").render(report=contents)


def _environment(*, escaping: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=escaping,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "svg": svg, "number": number, "shown": shown, "cell": cell, "trend": trend, "fence": fence, "percent": percent,
    }  # fmt: skip
    return environment


def shown(text: str) -> str:
    """The text with its control characters to be seen."""
    return text.translate(_VISIBLE)


def cell(text: Any) -> str:
    """Text for Markdown, in which nothing is markup, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(shown(str(text)).split()))


def fence(text: str) -> str:
    """Backticks that enclose the text as code, more than it has in a row anywhere."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def trend(series: Series) -> str:
    """A curve in at most 32 characters."""
    return sparkline([value for _, value in thinned(series.points, _TREND)])


def percent(share: float) -> str:
    """A share as people write it."""
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"
