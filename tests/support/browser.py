"""A real browser and a real TensorBoard, for tests of what a person sees."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@contextmanager
def chromium(**page: Any) -> Iterator[Any]:
    """Open a page of a headless Chromium; skip the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install .[dev]"
    )
    # Root, as in containers, has no sandbox.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            opened = browser.new_page(**page)
            opened.set_default_timeout(60_000)
            yield opened
        finally:
            browser.close()


@contextmanager
def tensorboard(folder: Path, *flags: str) -> Iterator[str]:
    """Serve TensorBoard on a free port of the loopback, and say where."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), *flags]
    process = subprocess.Popen(
        [*command, "--host=127.0.0.1", "--port=0", "--reload_interval=1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)
        yield next(match.group() for match in found if match)
    finally:
        process.terminate()
        process.wait(20)
