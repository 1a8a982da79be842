"""The report in a real browser: no sideways scrolling of the page, the right figures shown, light and dark, no errors.

Chromium is driven over its command line: Debian's package `chromium`, or what `CHROMIUM` names. Screenshots stay in
the folder that `EORA_SCREENSHOTS` names, if any.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gptqmodel_eora_ext.evaluate.report.page import render
from tests.evaluate.records import record

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PHONE, DESKTOP = (390, 844), (1280, 900)
# Asked of the page itself, which writes the answer into its title for the command line to read.
QUESTION = """<script>addEventListener("load", () => {
  const shown = one => one.getClientRects().length > 0;
  const page = document.documentElement;
  const scale = svg => svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  const size = one => parseFloat(getComputedStyle(one).fontSize) * scale(one.ownerSVGElement);
  document.title = JSON.stringify({
    width: page.clientWidth, content: page.scrollWidth, background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color, figures: [...document.querySelectorAll("svg")].filter(shown).length,
    smallest: Math.min(...[...document.querySelectorAll("svg text, td, p, li")].filter(shown).map(size)),
    label: getComputedStyle([...document.querySelectorAll("svg text")].filter(shown)[0]).fill,
  });
});</script>"""
# In the page around it: the frame's title, once there is one, as text.
TOLD = """<pre id="told"></pre><script>addEventListener("load", () => setTimeout(() => {
  document.getElementById("told").textContent = document.getElementById("f").contentDocument.title;
}, 300));</script>"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, or name one in CHROMIUM"),
]


def chromium(page: Path, size: tuple[int, int], *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
               f"--user-data-dir={page.parent / 'profile'}", f"--window-size={size[0]},{size[1]}", *arguments,
               page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def framed(folder: Path, html: str, size: tuple[int, int]) -> Path:
    """A page that shows the report in a frame of a phone's width: Chromium makes no window narrower than 500."""
    (folder / "report.html").write_text(html, encoding="utf-8")
    page = folder / "frame.html"
    style = f"border:0;width:{size[0]}px;height:{size[1]}px"
    page.write_text(f'<body style="margin:0"><iframe id="f" src="report.html" style="{style}"></iframe>')
    return page


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_reads_well(size: tuple[int, int], dark: bool, tmp_path: Path) -> None:
    scheme = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0") if dark else (
        "--blink-settings=preferredColorScheme=1",
    )  # fmt: skip
    html = render(record(30))
    asked = html.replace("</body>", QUESTION + "</body>")
    # The frame's title is copied to where `--dump-dom` shows it.
    page = framed(tmp_path, asked, size)
    page.write_text(page.read_text() + TOLD)
    local = ("--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom")
    dom = chromium(page, DESKTOP, *scheme, *local)
    match = re.search(r'<pre id="told">(\{.*?\})</pre>', dom, re.DOTALL)
    assert match is not None, dom[-500:]
    told: dict[str, Any] = json.loads(match[1].replace("&quot;", '"'))
    assert told["width"] == size[0] and told["content"] <= size[0], told
    assert told["figures"] == 5, told  # of each pair, the one for this width
    assert told["smallest"] >= 10, told  # CSS pixels, on the screen
    light = "rgb(255, 255, 255)"
    assert (told["background"] == light) is not dark and told["background"] != told["ink"]
    assert told["label"] == told["ink"]
    folder = os.environ.get("EORA_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"{'phone' if size == PHONE else 'desktop'}-{'dark' if dark else 'light'}.png"
        tall = (size[0], 6000)
        shot = framed(tmp_path, html, tall)
        chromium(shot, tall, *scheme, f"--screenshot={Path(folder) / name}")
