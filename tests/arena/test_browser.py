"""The arena in headless Chromium: keys vote, hostile text stays text, both schemes and widths, no errors.

With the environment variable SCREENSHOTS set to a folder, pictures of both widths and schemes are left there.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefloop.arena.votes import Arena
from tests.arena.arenas import answers, make_arena, serving
from tests.report.browser import executable, launch, log_of, screenshot

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra dev-browser (playwright)")
pytestmark = pytest.mark.skipif(
    executable() is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)"
)

HOSTILE = '</script><script>window.owned = 1</script><img src=x onerror="window.owned = 1">'
SHOTS = Path(os.environ["SCREENSHOTS"]) if "SCREENSHOTS" in os.environ else None
LONG = (
    "Wasps can be kept away from a garden table in several ways; it usually takes more than one.\n\n"
    "1. Cover food and drinks, and clear away leftovers as soon as you have finished.\n"
    "2. Put ripe fruit some ten metres away, as a table of their own.\n"
    "3. Leave out perfume and bright, flowery clothes.\n\n"
    "If there is a nest near by, leave it alone and ask the local authority: wasps are protected in many places."
)
PROMPT = "How do I keep wasps away from the garden table?"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        opened = launch(play)
        yield opened
        opened.close()


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    mine = {PROMPT: LONG, HOSTILE: HOSTILE, "Name a colour.": "Red.", "Say nothing.": ""}
    theirs = {
        PROMPT: "Use a trap.",
        HOSTILE: "harmless",
        "Name a colour.": "Blue, I think.",
        "Say nothing.": "Nothing.",
    }
    return make_arena(
        tmp_path, [answers(tmp_path / "mine.json", mine), answers(tmp_path / "theirs.json", theirs)], seed=2
    )


def enter(browser: Any, url: str, said: list[str], name: str = "Ann", **options: Any) -> Any:
    """A tab of a new rater, at the first match."""
    tab = browser.new_context(**options).new_page()
    log_of(tab, said, home=url.partition("#")[0].rstrip("/"))
    tab.goto(url)
    tab.fill("#name", name)
    tab.press("#name", "Enter")
    tab.wait_for_selector("#match:not([hidden])")
    return tab


def after(tab: Any, action: Any, place: str) -> None:
    """Do something, and wait until the page says where the rater is then."""
    action()
    tab.wait_for_function("place => document.getElementById('place').textContent === place", arg=place)


def go_to(tab: Any, prompt: str) -> None:
    """Vote until this prompt is shown."""
    while tab.inner_text("#prompt") != prompt:
        done = int(tab.inner_text("#place").split()[0])
        after(tab, lambda: tab.keyboard.press("t"), f"{done + 1} of 4")


def test_keys_and_buttons_vote_and_text_stays_text(browser: Any, arena: Arena) -> None:
    said: list[str] = []
    choices = {"1": "1", "t": "tie", "B": "both bad"}
    with serving(arena) as url:
        tab = enter(browser, url, said)
        for done, (key, choice) in enumerate(choices.items(), start=1):
            shown = [tab.inner_text(f"#answer-{i}") for i in (1, 2)]
            after(tab, lambda key=key: tab.keyboard.press(key), f"{done} of 4")
            vote = arena.votes()[-1]
            match = arena.match(vote.match)
            texts = [match.response_1, match.response_2]
            expected = [text.strip() or "(an empty answer)" for text in (texts if vote.side_1 == 1 else texts[::-1])]
            assert vote.choice == choice and shown == expected
        after(tab, lambda: tab.keyboard.press("u"), "2 of 4")
        tab.keyboard.press("Control+1")  # the browser's own keys are no votes
        after(tab, lambda: tab.click("[data-choice=skip]"), "3 of 4")
        assert [vote.choice for vote in arena.votes()] == ["1", "tie", "skip"]
        # Another day: the page knows the rater, and goes on where it was.
        tab.reload()
        tab.wait_for_selector("#match:not([hidden])")
        assert tab.inner_text("#rater") == "Ann" and tab.inner_text("#place") == "3 of 4"
        after(tab, lambda: tab.click("[data-choice='2']"), "4 of 4")
        assert tab.is_visible("#end") and tab.is_hidden("#match") and tab.is_disabled("[data-choice='1']")
        after(tab, lambda: tab.click("#undo"), "3 of 4")
        # Somebody else at the same machine starts at the beginning; letters of a name are no votes.
        tab.click("#rater")
        tab.fill("#name", "")
        tab.type("#name", "Bo t b s 1")
        after(tab, lambda: tab.press("#name", "Enter"), "0 of 4")
        assert len(arena.votes()) == 3
        go_to(tab, HOSTILE)
        assert HOSTILE in (tab.inner_text("#answer-1"), tab.inner_text("#answer-2"))
        assert tab.locator("img").count() == 0 and tab.locator("script").count() == 1
        assert tab.evaluate("window.owned") is None and said == []
        # Nor would it run if it did become mark-up.
        with tab.expect_console_message():
            tab.evaluate(
                "document.body.append(Object.assign(document.createElement('script'), {text: 'window.owned = 1'}))"
            )
        assert tab.evaluate("window.owned") is None


def test_a_server_that_is_gone_loses_no_click(browser: Any, arena: Arena) -> None:
    said: list[str] = []
    with serving(arena) as url:
        tab = enter(browser, url, said)
    assert said == []
    tab.keyboard.press("1")
    tab.wait_for_selector("#message:not([hidden])")
    assert "was not saved" in tab.inner_text("#message")
    again = Arena(arena.path)
    assert again.votes() == []
    with serving(again, port=int(url.rpartition(":")[2])):
        after(tab, lambda: tab.click("#again"), "1 of 4")
        assert tab.is_hidden("#message") and [vote.choice for vote in again.votes()] == ["1"]


@pytest.mark.parametrize("width", [1280, 390])
def test_both_colour_schemes_and_both_widths(browser: Any, arena: Arena, width: int) -> None:
    said: list[str] = []
    phone = width < 500
    size = {"width": width, "height": 844}
    with serving(arena) as url:
        tab = enter(browser, url, said, viewport=size, color_scheme="light", has_touch=phone, is_mobile=phone)
        go_to(tab, PROMPT)
        assert tab.evaluate("document.documentElement.scrollWidth") == width  # nothing runs off the side
        box = tab.locator("[data-choice='2']").bounding_box()
        assert box and box["y"] + box["height"] <= 844 and box["height"] >= 36  # in sight, and large enough
        one, two = (tab.locator(f"#answer-{i}").bounding_box() for i in (1, 2))
        assert one and two and ((one["y"] < two["y"]) == phone)  # side by side; stacked on a phone
        for scheme, colours in (
            ("light", ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]),
            ("dark", ["rgb(21, 24, 28)", "rgb(223, 227, 232)"]),
        ):
            tab.emulate_media(color_scheme=scheme)
            read = "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
            assert tab.evaluate(read) == colours
            screenshot(tab, SHOTS, f"arena-{width}-{scheme}")
        tab.click("#rater")
        screenshot(tab, SHOTS, f"arena-enter-{width}")
    assert said == []


def test_a_token_comes_with_the_address_or_is_asked_for(browser: Any, arena: Arena) -> None:
    said: list[str] = []
    with serving(arena, token="open sesame %#+") as url:
        tab = enter(browser, f"{url}/#open%20sesame%20%25%23%2B", said)
        assert tab.url == f"{url}/" and said == []
        other = browser.new_context().new_page()
        other.goto(url)
        other.fill("#name", "Bo")
        other.press("#name", "Enter")
        other.wait_for_selector("#ask-token:not([hidden])")
        assert other.is_hidden("#match")
        other.fill("#token", "open sesame %#+")
        other.press("#token", "Enter")
        other.wait_for_selector("#match:not([hidden])")
