"""The page in a browser: headless Chromium, on a desktop and on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from diagnostics.report.html import verification_html
from diagnostics.verification import verify
from tests.diagnostics import synthetic_claims

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"desktop": (1280, 900), "phone": (390, 844), "paper": (680, 960)}

# Runs inside a frame of the wanted width: a headless window has a smallest width that is wider than a phone.
INSPECTION = """
<script>
window.addEventListener("load", () => {
  const root = document.documentElement;
  const boxes = [...document.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect());
  const beyond = [...document.querySelectorAll("main *")]
    .filter((node) => !node.closest(".scroll, svg") && node.getBoundingClientRect().right > root.clientWidth + 0.5)
    .map((node) => node.tagName);
  parent.postMessage(JSON.stringify({
    width: root.clientWidth,
    scrollWidth: root.scrollWidth,
    figures: boxes.map((box) => [box.left, box.right, box.height]),
    beyond: beyond,
    tables: [...document.querySelectorAll("table")].map((table) => table.getBoundingClientRect().right),
    loaded: performance.getEntriesByType("resource").map((entry) => entry.name),
  }), "*");
});
</script>
"""

FRAME = """<!DOCTYPE html><body style="margin: 0"><pre id="seen"></pre>
<script>
window.addEventListener("message", (event) => {{ document.getElementById("seen").textContent = event.data; }});
</script>
<iframe src="page.html" style="border: 0; width: {width}px; height: {height}px"></iframe></body>"""


@dataclass(frozen=True)
class Visit:
    """What a browser made of a page."""

    seen: dict
    console: list[str]


class Silent(SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Generator[str, None, None]:
    """Serves a folder on this machine and gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def visit(page: str, size: str, folder: Path) -> Visit:
    """Opens the page in a frame of the given size and reports what its inspection saw."""
    # Over HTTP, because a browser keeps no record of what a page loads from files; names other than ours lead nowhere.
    browser = next(path for name in BROWSERS if (path := shutil.which(name)))
    width, height = SIZES[size]
    (folder / "page.html").write_text(page.replace("</body>", INSPECTION + "</body>"), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width, height=height), encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},{height}",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        "--dump-dom",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    with serving(folder) as address:
        result = subprocess.run(
            [*command, f"{address}/frame.html"], capture_output=True, text=True, timeout=120, check=True
        )
    found = re.search(r'<pre id="seen">(.*?)</pre>', result.stdout, flags=re.DOTALL)
    assert found is not None, result.stdout[:500] + result.stderr[-2000:]
    return Visit(json.loads(html.unescape(found.group(1))), re.findall(r".*CONSOLE.*", result.stderr))


@pytest.fixture(scope="module")
def page() -> str:
    return verification_html(verify(synthetic_claims.catalogue().values()))


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_page_fits_and_shows_every_figure(page, size, tmp_path):
    result = visit(page, size, tmp_path)
    width = SIZES[size][0]
    assert result.console == []
    assert result.seen["loaded"] == []
    assert width - 20 <= result.seen["width"] <= width
    assert result.seen["scrollWidth"] <= result.seen["width"]
    assert result.seen["beyond"] == []
    assert len(result.seen["figures"]) == 8
    for left, right, height in result.seen["figures"]:
        assert 0 <= left < right <= width
        assert right - left > 250
        assert height > 50


def test_page_fits_on_paper(page, tmp_path):
    # A4 within margins of 1.5 cm; the rules for paper are made to hold on the screen.
    assert "@media print" in page
    result = visit(page.replace("@media print", "@media all"), "paper", tmp_path)
    assert result.seen["scrollWidth"] <= result.seen["width"]
    assert result.seen["tables"] != []
    assert max(result.seen["tables"]) <= result.seen["width"]


def test_a_page_that_misbehaves_would_be_caught(page, tmp_path):
    wrong = (
        '<div style="width: 2000px">wide</div><img src="missing.png" alt=""><script>console.error("wrong")</script>'
        "<style>figure { display: none }</style></main>"
    )
    result = visit(page.replace("</main>", wrong), "phone", tmp_path)
    assert any("wrong" in line for line in result.console)
    assert any(name.endswith("missing.png") for name in result.seen["loaded"])
    assert result.seen["scrollWidth"] > result.seen["width"]
    assert "DIV" in result.seen["beyond"]
    assert all(height == 0 for _, _, height in result.seen["figures"])
