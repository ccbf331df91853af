"""The report is one file that a browser displays completely: no request, no error, no overflow, light and dark."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_rkd.cli.experiments.report import render

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=5000", "--dump-dom",
]  # fmt: skip
HEAD = "<script>const wrong = []; onerror = (text) => { wrong.push(text) };</script>"
LOOK = """<script>addEventListener("load", async () => {
  const images = [...document.images];
  await Promise.all(images.map((image) => image.decode().catch(() => wrong.push("an image"))));
  const asked = performance.getEntriesByType("resource").map((one) => one.name).filter((n) => !n.startsWith("data:"));
  document.documentElement.dataset.seen = JSON.stringify({
    wrong, asked, width: innerWidth, needed: document.documentElement.scrollWidth,
    images: images.map((image) => [image.naturalWidth, image.currentSrc.length]),
    paper: getComputedStyle(document.body).backgroundColor,
  });
});</script>"""


def figure(colour: str) -> Figure:
    drawn = Figure(figsize=(12, 4), facecolor=colour)
    FigureCanvasAgg(drawn)
    return drawn


@pytest.fixture(scope="module")
def page() -> str:
    rows = [[f"network {n}", "174,008", *["0.123 ± 0.456"] * 4] for n in range(3)]
    heads = ["network", "parameters", "recall_at_1", "map_at_r", "distance_correlation", "seconds"]
    light, dark = (
        {name: figure(colour) for name in ("neighbours", "relations", "angles", "map")}
        for colour in ("#ffffff", "#000000")
    )
    texts = {"data": "Something <is> small & more", "command": "make demo " * 20, "student": "rkd", "made": "today"}
    return render([heads, *rows], ["Below."], light, dark, **texts)


def seen(page: str, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """The page as a browser sees it."""
    assert BROWSER is not None
    path = folder / "report.html"
    path.write_text(page.replace("<head>", f"<head>{HEAD}", 1).replace("</body>", f"{LOOK}</body>", 1))
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [BROWSER, *FLAGS, *scheme, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-seen="(.*?)"', done.stdout)
    assert found is not None, done.stdout[-500:]
    said: dict[str, Any] = json.loads(html.unescape(found[1]))
    return said


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the PATH")
@pytest.mark.parametrize(("width", "dark"), [(500, False), (1200, True)])
def test_a_browser_needs_no_request_and_no_scroll_bar(width: int, dark: bool, page: str, tmp_path: Path) -> None:
    said = seen(page, tmp_path, width, dark)
    assert said["wrong"] == []
    assert said["asked"] == []
    assert [natural for natural, _ in said["images"]] == [1200] * 4
    assert said["width"] == width
    assert said["needed"] <= width
    assert said["paper"] == ("rgb(22, 24, 29)" if dark else "rgb(255, 255, 255)")


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    links = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(links) == 8
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "http" not in page
    assert "url(" not in page


def test_text_is_escaped(page: str) -> None:
    assert "Something &lt;is&gt; small &amp; more" in page
