"""Pages in a real browser: nothing in the console, nothing fetched, something to see."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from test_ranking_report import make_ranking

from stunet.reports.figures import write_ranking

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
)  # fmt: skip

#: Its own questions, for the time for example, which no flag keeps it from asking.
OF_THE_BROWSER = re.compile(r"^https?://[\w.-]+\.(google|googleapis|gvt1)\.com/")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def _browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)


def _open(page: Path, folder: Path) -> tuple[list[str], list[str], np.ndarray]:
    """What the browser wrote to its console, the addresses that it asked for, and what it showed."""
    shot, log = folder / "shot.png", folder / "net.json"
    got = _browse(page, "--window-size=1300,2600", f"--screenshot={shot}", f"--log-net-log={log}")
    console = [line for line in got.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    urls = {str(event.get("params", {}).get("url", "")) for event in events}
    fetched = [url for url in urls if url.startswith(("http", "ws", "ftp")) and not OF_THE_BROWSER.search(url)]
    return console, sorted(fetched), imread(shot)


def test_ranking_page(tmp_path: Path) -> None:
    write_ranking(make_ranking(), tmp_path)
    console, fetched, shown = _open(tmp_path / "ranking.html", tmp_path)
    assert console == []
    assert fetched == []
    assert (shown[..., :3].min(-1) < 0.5).mean() > 0.005  # ink
    colours = (np.abs(shown[..., :3] - np.array([0x0B, 0x6E, 0x8F]) / 255).max(-1) < 0.02).sum()
    assert colours > 200  # the best candidate's dots and line


def test_a_wide_ranking_is_not_cut_off(tmp_path: Path) -> None:
    """Nine candidates with long names and seven scores, at 1200 pixels: nothing is wider than its place."""
    names = [f"models/STUNetTrainer_pretrain__STUNetPlans_base__3d_fullres/fold_{i}/checkpoint_final" for i in range(9)]
    metrics = ("ccfv", "logme", "transrate", "leep", "gbc", "gbc-full", "zero-shot")
    ranking = make_ranking(*names)
    rows = tuple(replace(row, scores=dict.fromkeys(metrics, -10.123)) for row in ranking.rows)
    page = write_ranking(replace(ranking, rows=rows, metrics=metrics), tmp_path)[2].read_text()
    measure = (
        "<script>document.title = Math.max(...[...document.querySelectorAll('.wide, html')]"
        ".map(e => e.scrollWidth - e.clientWidth))</script></body>"
    )
    (tmp_path / "measured.html").write_text(
        page.replace('http-equiv="Content-Security-Policy"', "").replace("</body>", measure)
    )
    dom = _browse(tmp_path / "measured.html", "--window-size=1200,1600", "--dump-dom").stdout
    assert re.search(r"<title>(-?\d+)</title>", dom).group(1) == "0"  # type: ignore[union-attr]


def test_the_browser_would_tell(tmp_path: Path) -> None:
    """A page that breaks the rules, so that the test above can fail."""
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('broken')</script><img src='http://127.0.0.1:9/x.png'>")
    console, fetched, _ = _open(page, tmp_path)
    assert any("broken" in line for line in console)
    assert "http://127.0.0.1:9/x.png" in fetched
