"""How the benchmarks of a suite's run have ended, and where that and their results are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from harness.result import Result, ResultError, read_result
from pydantic import BaseModel, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from raygym.whole_file import write_whole

Status = Literal["done", "failed", "over", "skipped", "not run"]
_FILE = "suite.json"


class Outcome(BaseModel):
    """Of one benchmark."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    status: Status
    """`over`: it was ended at its time limit; `not run`: no time was left for it, or the suite was interrupted."""
    seconds: FiniteFloat
    limit_s: FiniteFloat
    why: str = ""
    """What went wrong, or what is missing here; empty when it is done."""

    @property
    def good(self) -> bool:
        """Whether nothing went wrong. What is skipped says what is missing, which is no failure."""
        return self.status in ("done", "skipped")


_OUTCOMES: TypeAdapter[dict[str, Outcome]] = TypeAdapter(dict[str, Outcome])


class Kept:
    """A folder of results: `<benchmark>.json` of each that is done, and how all of them ended."""

    def __init__(self, folder: Path) -> None:
        """Made when something is written."""
        self.folder = folder

    def result_file(self, name: str) -> Path:
        """Where the result of a benchmark is."""
        return self.folder / f"{name}.json"

    def forget(self, names: Iterable[str]) -> None:
        """These will run now: what an earlier run has left must not be taken for theirs."""
        outcomes = self.outcomes()
        for name in names:
            outcomes.pop(name, None)
            self.result_file(name).unlink(missing_ok=True)
        self._write_outcomes(outcomes)

    def keep(self, name: str, outcome: Outcome, result: Result | None) -> None:
        """One benchmark has ended."""
        self._write_outcomes({**self.outcomes(), name: outcome})
        if result is not None:
            write_whole(self.result_file(name), result.model_dump_json(indent=1) + "\n")

    def outcomes(self) -> dict[str, Outcome]:
        """By benchmark.

        Raises:
            ResultError: the file of them is broken.
        """
        path = self.folder / _FILE
        try:
            return _OUTCOMES.validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise ResultError(f"{path}: is not what the suite has written ({_first_line(error)}); remove it") from None

    def results(self) -> dict[str, Result]:
        """By benchmark, those that there are.

        Raises:
            ResultError: a file is none that the suite has written.
        """
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.name == _FILE:
                continue
            found[path.stem] = result = read_result(path)
            if result.name != path.stem:
                raise ResultError(f"{path}: is a result of {result.name}; expected one of {path.stem}")
        return found

    def _write_outcomes(self, outcomes: Mapping[str, Outcome]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / _FILE, _OUTCOMES.dump_json(dict(outcomes), indent=1).decode() + "\n")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
