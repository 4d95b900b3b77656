"""Write the API reference, made of the docstrings, to build/docs: every pure module. Not the actors, whose import takes
a minute: `raygym` is what users call."""

from __future__ import annotations

import argparse
from pathlib import Path

import pdoc
import pdoc.render

import raygym

ROOT = Path(__file__).resolve().parent.parent


def modules() -> list[str]:
    """The names of what is in raygym/, without the Ray layer."""
    paths = sorted((ROOT / "raygym").rglob("*.py"))
    inside = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    names = [parts[:-1] if parts[-1] == "__init__" else parts for parts in inside]
    return [".".join(parts) for parts in names if "actors" not in parts and parts[-1] != "__main__"]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build/docs", help="default: build/docs")
    parser.add_argument("modules", nargs="*", help="default: all")
    options = parser.parse_args()
    for name in raygym.__all__:  # which are imported when they are asked for, and pdoc only looks at what is there
        setattr(raygym, name, getattr(raygym, name))
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*(options.modules or modules()), output_directory=options.out)
    print(f"see {options.out / 'index.html'}")


if __name__ == "__main__":
    main()
