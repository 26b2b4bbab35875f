"""Screenshots of a run's report for the docs: ``python -m benchmarks.report_pictures RUN [FOLDER]``; needs Chromium."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from rlsys.report.page import report_of

CHROMIUM = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")  # names of the program
PICTURES: dict[str, tuple[int, int, Literal["light", "dark"]]] = {  # width, height, scheme
    "report-desktop": (1280, 1800, "light"),
    "report-phone": (390, 1560, "dark"),
}
UNFOLDED = ["Overview"]  # sections of curves, so that the rollouts are in the picture of a desktop, too
COLOURS = 200  # of a picture's palette, so that it stays small


def find_chromium() -> str | None:
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


@contextmanager
def chromium(program: str) -> Iterator[Browser]:
    """The system's own; nothing is downloaded."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program)
        yield browser
        browser.close()


def take(run: Path, folder: Path) -> list[Path]:
    """The upper part of the page on a desktop, and the rollouts on a phone."""
    program = find_chromium()
    if program is None:
        sys.exit(f"found none of {', '.join(CHROMIUM)} on PATH; wanted one (Debian: apt-get install chromium)")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with chromium(program) as browser:
        for name, (width, height, scheme) in PICTURES.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(report_of(run).resolve().as_uri())
            page.locator("details.curves").evaluate_all(
                "(all, open) => all.forEach(one => { one.open = open.includes(one.firstElementChild.textContent); })",
                UNFOLDED,
            )
            if name == "report-phone":
                page.locator("#rollouts").evaluate("heading => scrollTo(0, heading.offsetTop - 12)")
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            path = folder / f"{name}.png"
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
            written.append(path)
    return written


if __name__ == "__main__":
    for path in take(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs")):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
