"""report.html in a real browser: nothing is fetched, nothing runs, nothing sticks out, and it is
readable on a dark screen and on a light one, on a phone and on a desk.

Needs Chromium (Debian: apt-get install chromium); skipped without.
"""

import shutil
import subprocess
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from simulated import at_the_end, events_of_a_run, pictures_of
from test_report_page import facts_of, page_of_run

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium is installed (apt-get install chromium)"
    ),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr"),
)
PHONE, DESK = (390, 3000), (1200, 3000)
# Writes down, in the document around, what reaches beyond the screen and cannot be scrolled to
# inside a frame of its own.
MEASURE = """<script>
const wide = [...document.body.querySelectorAll("*")].filter(each =>
  each.getBoundingClientRect().right > innerWidth + 1 && !each.closest(".scroll, .plot"));
const result = parent.document.documentElement.dataset;
result.wide = wide.map(each => each.outerHTML.slice(0, 80)).join(" | ");
const inner = [...document.querySelectorAll("#data .scroll")];
result.cut = inner.filter(each => each.scrollWidth > each.clientWidth + 1).length;
result.scrolls = document.documentElement.scrollWidth > innerWidth;
result.width = innerWidth;
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run_with_a_name_that_is_longer_than_a_phone_is_wide_" * 2)
    names = ("cat", "a_name_without_any_place_to_break_it_" * 3, "<b>&", *map(str, range(20)))
    val = pictures_of(folder / "val", names, count=30)
    sizes = val.sizes.clone()
    sizes[0] = torch.tensor([1080, 1920])
    named = "instances_of_a_dataset_with_a_long_name_validation2017.json"
    val = replace(val, source=named, sizes=sizes)
    events = events_of_a_run(val, (0.4, 0.8))
    page_of_run(folder, facts_of(folder, (val, val)), [*events, at_the_end(events[-1])])
    return folder / "report.html"


def browse(path: Path, profile: Path, size: tuple[int, int], *flags: str) -> tuple[str, str]:
    """What the browser writes to its output, and to its log."""
    assert BROWSER is not None
    words = [BROWSER, *FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
    done = subprocess.run(
        [*words, *flags, path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(("size", "dark"), [(DESK, False), (PHONE, True)], ids=["desk", "phone"])
def test_it_is_readable(page: Path, tmp_path: Path, size: tuple[int, int], dark: bool) -> None:
    """Ground and ink change with what the reader prefers, and the console stays silent: whatever
    is refused under the page's policy (a script, an address) would be named there.
    """
    shot = tmp_path / "shot.png"
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    _, log = browse(page, tmp_path / "profile", size, *scheme, f"--screenshot={shot}")
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    pixels = np.asarray(Image.open(shot).convert("L"))
    ground = pixels[5, 5]
    assert ground < 40 if dark else ground > 230
    opposite = pixels > 200 if dark else pixels < 60
    assert 0.002 < opposite.mean() < 0.15, "ink, and no more than that, stands out"


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_nothing_sticks_out(page: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    measured = tmp_path / "measured.html"
    text = page.read_text(encoding="utf-8")
    head, policy, rest = text.partition('<meta http-equiv="Content-Security-Policy"')
    assert policy
    inner = (head + rest.partition(">")[2]).replace("</body>", MEASURE)
    # A window has a least width, a frame has none.
    frame = f'<iframe width="{size[0]}" height="900" style="border: 0" srcdoc="{escape(inner)}">'
    measured.write_text(f"<!DOCTYPE html><html><body>{frame}</iframe></body>", encoding="utf-8")
    dom, _ = browse(measured, tmp_path / "profile", size, "--dump-dom")
    head = dom[: dom.index(">", dom.index("<html"))]
    assert f'data-width="{size[0]}"' in head
    assert 'data-cut="0"' in head, "both splits' numbers are seen without scrolling"
    assert 'data-wide=""' in head and 'data-scrolls="false"' in head


def test_a_console_that_has_something_to_say_is_heard(page: Path, tmp_path: Path) -> None:
    """So that the silence above means something."""
    loud = tmp_path / "loud.html"
    text = page.read_text(encoding="utf-8")
    address = '<img src="http://127.0.0.1:9/none.png" alt=""></body>'
    loud.write_text(text.replace("</body>", address), encoding="utf-8")
    _, log = browse(loud, tmp_path / "profile", DESK, f"--screenshot={tmp_path / 'shot.png'}")
    assert [line for line in log.splitlines() if "CONSOLE" in line and "127.0.0.1" in line]
