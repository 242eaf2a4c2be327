"""The page in headless Chromium: no errors, nothing fetched, the sample browser finds, hostile text stays text.

With the environment variable SCREENSHOTS set to a folder, pictures of both widths and schemes are left there.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefloop.records import Pair, Response
from prefloop.report.page import write_page
from prefloop.report.story import read_story
from tests.report.browser import executable, launch, log_of, screenshot
from tests.report.runs import answers, checkup, evaluation, pair, prompt, steps, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra dev-browser (playwright)")
pytestmark = pytest.mark.skipif(
    executable() is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)"
)

HOSTILE = '</script><script>window.owned = 1</script><img src=x onerror="window.owned = 1">'
SHOTS = Path(os.environ["SCREENSHOTS"]) if "SCREENSHOTS" in os.environ else None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        opened = launch(play)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 generated pairs and 3 offline ones, one of them hostile; answers before and after, judged at step 20."""
    folder = tmp_path_factory.mktemp("run")
    pairs = [
        pair(i, f"the quick answer {i}", f"the slow answer {i}", source="generated", chosen_score=i / 10,
             rejected_score=0.0, category="odd" if i % 2 else "even")
        for i in range(120)
    ]  # fmt: skip
    bad = Pair(prompt=prompt(900, HOSTILE), chosen=Response(text=HOSTILE), rejected=Response(text="harmless"))
    now = answers(["one three four", "ja"])
    judged = {"step": 20, "evaluation": evaluation(0.7, 0.9, groups=now, preferred=[0.9, 0.5])}
    run = write_run(
        folder / HOSTILE.replace("/", ""),
        config={"policy": HOSTILE, "annotator": "rule:a", "evaluator": HOSTILE},
        checkups={"start": checkup(), "round-1": checkup(finished=0.5)},
        answers={"start": answers(["one two four", "ja"]), "round-1": answers(["one three four", "ja"], "length")},
        pairs={"round-1": [*pairs, pair(901, "a", "b"), pair(902, "c", "d"), bad]},
        training={"round-1": [*steps(20, loss=0.6, margin=4.0, chosen_change=-2.0, rejected_change=-5.0), judged]},
    )
    return write_page([read_story(run)], folder / "report.html")


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page in a tab 1280 wide, and all that goes wrong in it."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    log_of(tab, said)
    tab.goto(page.as_uri())
    yield tab, said
    assert tab.evaluate("window.owned") is None
    tab.close()
    assert said == []


def found(tab: Any) -> int:
    return int(tab.inner_text("#found").split()[0])


def choose(tab: Any, **chosen: str) -> None:
    for name, label in chosen.items():
        tab.select_option(f"#{name.replace('_', '-')}", label=label)


def search(tab: Any, words: str) -> None:
    before = tab.inner_text("#found")
    tab.fill("#search", words)
    tab.wait_for_function("before => document.getElementById('found').textContent !== before", arg=before)


def test_before_and_after_show_the_words_that_differ(opened: tuple[Any, list[str]]) -> None:
    tab, _ = opened
    assert found(tab) == 2
    first = tab.locator(".sample").first
    assert first.locator(".left mark").all_inner_texts() == ["two"]
    assert first.locator(".right mark").all_inner_texts() == ["three"]
    assert tab.locator(".sample").nth(1).locator("mark").count() == 0
    tab.uncheck("#mark")
    assert tab.locator("mark").count() == 0
    # The last model is the evaluation, which was judged; another one can be chosen.
    choose(tab, outcome="right preferred")
    assert found(tab) == 1 and "P(right preferred) = 0.9" in tab.inner_text(".sample")
    choose(tab, outcome="all", after="round-1")
    assert found(tab) == 2 and tab.inner_text(".sample .right h4").endswith("cut at the limit")


def test_pairs_are_paged_searched_filtered_and_ordered(opened: tuple[Any, list[str]]) -> None:
    tab, _ = opened
    choose(tab, view="training pairs")
    assert found(tab) == 123 and tab.locator(".sample").count() == 50
    tab.click("#next")
    tab.click("#next")
    assert tab.inner_text("#place") == "101 to 123 of 123" and tab.locator(".sample").count() == 23
    assert tab.is_disabled("#next") and not tab.is_disabled("#previous")
    colour = "getComputedStyle(document.querySelector('.{} mark')).backgroundColor"
    chosen, rejected = (tab.evaluate(colour.format(side)) for side in ("left", "right"))
    choose(tab, source="offline")
    assert found(tab) == 3 and tab.is_hidden("#next")
    choose(tab, source="all", category="odd")
    assert found(tab) == 60 and tab.locator(".sample").count() == 50
    search(tab, "Quick 117")
    assert found(tab) == 1 and "score 11.7" in tab.inner_text(".sample .left h4")
    search(tab, "")
    choose(tab, category="all", order="score gap, largest first")
    assert tab.inner_text(".sample .left .answer") == "the quick answer 119"
    search(tab, "nothing has this")
    assert found(tab) == 0 and tab.locator(".sample").count() == 0
    tab.fill("#search", "")
    choose(tab, view="before and after")
    # What is new has the colour of what is chosen.
    assert tab.evaluate(colour.format("right")) == chosen != rejected == tab.evaluate(colour.format("left"))


def test_hostile_text_is_shown_and_not_run(opened: tuple[Any, list[str]]) -> None:
    tab, _ = opened
    choose(tab, view="training pairs", source="offline")
    search(tab, "owned")
    assert tab.inner_text(".sample .left .answer") == HOSTILE and tab.inner_text(".sample .prompt") == HOSTILE
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 2
    # Nor would it run if it did become mark-up: the page's policy knows its own script alone.
    with tab.expect_console_message():
        tab.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'window.owned = 1'}))"
        )
    assert tab.evaluate("window.owned") is None
    opened[1].clear()  # the browser's complaint about the script that this test made


def test_the_word_comparison_in_its_own_terms(opened: tuple[Any, list[str]]) -> None:
    tab, _ = opened
    marked = "(a, b) => differing(a, b).map((words) => words.filter(([, m]) => m).map(([w]) => w.trim()))"

    def differ(a: str, b: str) -> list[list[str]]:
        return tab.evaluate(f"([a, b]) => ({marked})(a, b)", [a, b])

    assert differ("a b c d", "a x c d e") == [["b"], ["x", "e"]]
    assert differ("a b a b", "b a b a") == [["a"], ["a"]]
    assert differ("", "new\nlines") == [[], ["new", "lines"]]
    # Beyond the largest table, words that the other text has nowhere are marked.
    long = " ".join(["w"] * 600)
    assert differ(long + " left", long + " right") == [["left"], ["right"]]


@pytest.mark.parametrize("width", [1280, 390])
def test_both_colour_schemes_and_both_widths(browser: Any, page: Path, width: int) -> None:
    backgrounds = {}
    for scheme in ("light", "dark"):
        tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        said: list[str] = []
        log_of(tab, said)
        tab.goto(page.as_uri())
        read = "getComputedStyle(document.body)"
        backgrounds[scheme] = tab.evaluate(f"{read}.backgroundColor"), tab.evaluate(f"{read}.color")
        assert tab.evaluate("document.documentElement.scrollWidth") == width  # nothing runs off the side
        screenshot(tab, SHOTS, f"{width}-{scheme}")
        tab.click("#theme")
        other = tab.evaluate(f"{read}.backgroundColor"), tab.evaluate(f"{read}.color")
        tab.click("#theme")
        assert other != backgrounds[scheme] and tab.evaluate(f"{read}.backgroundColor") == backgrounds[scheme][0]
        backgrounds[f"{scheme}, toggled"] = other
        assert said == []
        tab.close()
    assert backgrounds["light"] == backgrounds["dark, toggled"] == ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
    assert backgrounds["dark"] == backgrounds["light, toggled"] == ("rgb(21, 24, 28)", "rgb(223, 227, 232)")


def test_a_run_without_samples_has_a_page_without_errors(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", counts={"data/pairs": {"pairs kept": 4}})
    tab = browser.new_page()
    said: list[str] = []
    log_of(tab, said)
    tab.goto(write_page([read_story(run)], tmp_path / "report.html").as_uri())
    assert "no samples yet" in tab.inner_text("#samples") and tab.is_hidden("#browser") and said == []
    tab.close()
