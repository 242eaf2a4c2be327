"""The page of a large run: how long it takes to write, how large it is, how fast it opens in headless Chromium.

    python -m benchmarks.report_page [--samples 20000] [--words 60]

Half of the samples are pairs that a round was trained on, half answers of three models to the same prompts. `opens`
is from the start of the navigation to the first list of samples, `searches` from a typed word to its list. The last
line is JSON. Needs the extra `dev-browser` and a Chromium (Debian: apt-get install chromium).
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright
from tests.report.browser import launch
from tests.report.runs import answers, checkup, pair, steps, write_run

from prefloop.report.page import REPORT, write_page
from prefloop.report.story import read_story


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000, help="pairs and answers together")
    parser.add_argument("--words", type=int, default=60, help="mean length of a text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = synthetic_run(Path(folder) / "run", options.samples, options.words)
        start = time.monotonic()
        page = write_page([read_story(run)], run / REPORT)
        figures = {"samples": options.samples, "words": options.words, "written_s": round(time.monotonic() - start, 2)}
        figures |= {"mb": round(page.stat().st_size / 1e6, 2), **opened(page)}
    print(json.dumps(figures))


def synthetic_run(folder: Path, samples: int, words: int) -> Path:
    """A run of one round; texts of random words, so that nothing about them is favourable."""
    rng = random.Random(0)
    known = ["".join(rng.choices("abcdefghijklmnoprstuvwy", k=rng.randint(2, 9))) for _ in range(4000)]

    def text() -> str:
        return " ".join(rng.choices(known, k=rng.randint(words // 2, words * 3 // 2)))

    n = samples // 2
    models = ("start", "round-0", "round-1")
    return write_run(
        folder,
        answers={label: answers([text() for _ in range(n // 3)]) for label in models},
        checkups=dict.fromkeys(models, checkup()),
        pairs={"round-1": [pair(i, text(), text(), chosen_score=1.0, rejected_score=0.5) for i in range(n)]},
        training={"round-1": steps(300, loss=0.6, margin=1.0, chosen_change=-2.0, rejected_change=-6.0, correct=0.9)},
    )


def opened(page: Path) -> dict[str, float]:
    """Seconds until the list shows, the median of five openings, and until a search shows."""
    with sync_playwright() as play:
        browser = launch(play)
        seconds = []
        for _ in range(5):
            tab = browser.new_page()
            start = time.monotonic()
            tab.goto(page.as_uri())
            tab.wait_for_selector(".sample")
            seconds.append(time.monotonic() - start)
            if len(seconds) < 5:
                tab.close()
        before = tab.inner_text("#found")
        start = time.monotonic()
        tab.fill("#search", "zz-not-there")
        tab.wait_for_function("before => document.getElementById('found').textContent !== before", arg=before)
        searched = time.monotonic() - start
        browser.close()
    return {"opens_s": round(sorted(seconds)[2], 2), "searches_s": round(searched, 2)}


if __name__ == "__main__":
    main()
