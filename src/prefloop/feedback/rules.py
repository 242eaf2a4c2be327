"""Rules for experiments, by name: scores of one response to a prompt, higher is better.

They stand in for an annotator when a method is tried out: they are exact, free, and everybody can see what they want.
None of them knows whether an answer is true.
"""

import json
import math
import re
from collections.abc import Callable
from functools import partial

from prefloop.records import Prompt, Response

Score = Callable[[Prompt, Response], float | None]


def short(prompt: Prompt, response: Response) -> float:
    """Minus the number of characters."""
    return -float(response.length_chars)


def long(prompt: Prompt, response: Response) -> float:
    """The number of characters."""
    return float(response.length_chars)


def finishes(prompt: Prompt, response: Response) -> float:
    """1 for an answer that came to its end, 0 for one that was cut at the limit of new tokens."""
    return float(response.finish_reason != "length")


def varied(prompt: Prompt, response: Response, n: int = 3) -> float:
    """The share of word n-grams that are distinct: 1 for an answer that repeats nothing.

    >>> varied(Prompt.of("?"), Response(text="to be or not to be or not"))
    0.6666666666666666
    """
    words = _words(response.text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def follows_format(prompt: Prompt, response: Response) -> float | None:
    """The share of the formats asked for that the answer has; None where none of `FORMATS` is asked for.

    A format may be asked for in the system message or in the last one.
    """
    system = [message.content for message in prompt.messages if message.role == "system"]
    asked = "\n".join([*system, prompt.messages[-1].content])
    kept = [has_format(response.text.strip()) for pattern, has_format in FORMATS if pattern.search(asked)]
    return sum(kept) / len(kept) if kept else None


def is_json(text: str) -> bool:
    """JSON, bare or in one code fence."""
    fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def is_numbered_list(text: str) -> bool:
    """At least two lines that begin with a number, which count 1, 2, 3, ..."""
    numbers = [int(number) for number in re.findall(r"^\s*(\d{1,4})[.)]\s+\S", text, re.MULTILINE)]
    return len(numbers) >= 2 and numbers == list(range(1, len(numbers) + 1))


def is_bullet_list(text: str) -> bool:
    """At least two lines that begin with a bullet."""
    return len(re.findall(r"^\s*[-*•]\s+\S", text, re.MULTILINE)) >= 2


def is_one_sentence(text: str) -> bool:
    """One line that ends with a full stop, a question mark or an exclamation mark, and has none inside.

    A mark counts as inside when a space and a capital follow it, so that "3.5" and "e.g. this" pass.
    """
    return re.search(r"[.!?][\"')\]]*\s+[\"'(\[]*[A-ZÀ-Þ]|\n", text) is None and text.rstrip("\"')]").endswith(
        (".", "!", "?")
    )


FORMATS: tuple[tuple[re.Pattern[str], Callable[[str], bool]], ...] = (
    (re.compile(r"\bJSON\b"), is_json),
    (re.compile(r"\bnumbered (list|steps|points)\b", re.IGNORECASE), is_numbered_list),
    (re.compile(r"\bbullet(ed)? (list|points)\b", re.IGNORECASE), is_bullet_list),
    (re.compile(r"\b(in|with|exactly|only) (exactly )?(one|a single) sentence\b", re.IGNORECASE), is_one_sentence),
)
"""What in a prompt asks for a format, and whether an answer has it."""


def helpful(prompt: Prompt, response: Response, target_words: int) -> float:
    """A made-up utility with a length that it wants: the stand-in for an instruction in OAIF's length control.

        share of the prompt's content words taken up + varied + finishes - |ln((words + 1) / (target_words + 1))|

    The first three are in [0, 1]; the last is 0.69 for an answer of half or twice the length wanted.
    """
    words = _words(response.text)
    content = {word for word in _words(prompt.messages[-1].content) if len(word) > 3}
    taken_up = len(content.intersection(words)) / len(content) if content else 0.0
    quality = taken_up + varied(prompt, response) + finishes(prompt, response)
    return quality - abs(math.log((len(words) + 1) / (target_words + 1)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


RULES: dict[str, Score] = {
    "short": short,
    "long": long,
    "finishes": finishes,
    "varied": varied,
    "format": follows_format,
    "helpful": partial(helpful, target_words=60),
    "helpful-short": partial(helpful, target_words=25),
    "helpful-very-short": partial(helpful, target_words=8),
}
"""What `rule:NAME` may name."""
