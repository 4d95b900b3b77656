"""Make the README's picture of the viewer, docs/images/viewer.png, from a simulated run.

    .venv/bin/python tools/screenshots.py

It needs Chromium (apt-get install chromium) and Playwright, which the tests use as well.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from playwright.sync_api import Page, sync_playwright  # noqa: E402
from viewer_browser import ARGUMENTS, CHROMIUM, viewing  # noqa: E402
from viewer_runs import SimulatedRun  # noqa: E402

VIEWS = {
    "overview": "#/overview",
    "trajectories": "#/trajectories",
    "conversation": "#/trajectory?file=trajectories/step_000030&number=1",
    "tokens": "#/trajectory?file=trajectories/step_000030&number=1&view=tokens",
    "group": "#/group?file=trajectories/step_000030&group_id=train-180",
}
READY = {
    "overview": ".chart polyline",
    "trajectories": "tbody tr.opens",
    "conversation": ".message",
    "tokens": ".tokens .token.drifted",
    "group": ".cell.head",
}


def take(page: Page, address: str, view: str, path: Path) -> None:
    """One picture of one view."""
    page.goto(f"{address}{VIEWS[view]}")
    page.locator(READY[view]).first.wait_for()
    if view == "tokens":
        page.locator(READY[view]).first.hover()
    page.wait_for_timeout(400)  # charts draw once they know their width
    page.screenshot(path=path)


def main() -> int:
    """Take the README's picture, or with --all one of each view, light and dark, wide and narrow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", type=Path, metavar="DIR", help="every view, to look at, into this folder instead")
    options = parser.parse_args()
    if CHROMIUM is None:
        print("error: there is no Chromium; apt-get install chromium", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        run = SimulatedRun(Path(folder) / "simulated-demo", steps=40, groups=6)
        run.write(36)
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        with viewing(run.path) as address:
            if options.all is None:
                page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
                path = ROOT / "docs" / "images" / "viewer.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                take(page, address, "tokens", path)
                print(path.relative_to(ROOT))
            else:
                options.all.mkdir(parents=True, exist_ok=True)
                for theme, width in (("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)):
                    page = browser.new_page(viewport={"width": width, "height": 860}, color_scheme=theme)
                    for view in VIEWS:
                        take(page, address, view, options.all / f"{view}-{theme}-{width}.png")
            browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
