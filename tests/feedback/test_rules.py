"""Rules: what each of the shipped ones wants, and functions of the user's."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.errors import InputError
from prefloop.feedback.annotator import Comparison
from prefloop.feedback.rule import RuleAnnotator, by_scores, load_rule, what_it_judges
from prefloop.feedback.rules import FORMATS, RULES, helpful, is_json, is_numbered_list, is_one_sentence, varied
from prefloop.records import Prompt, Response

ASK = Prompt.of("Tell me about rivers.")
finite = st.floats(-1e9, 1e9)


def score(prompt: Prompt, response: Response) -> float | None:
    return {"none": None, "nan": math.nan, "inf": math.inf}.get(response.text, float(len(response.text)))


def preference(prompt: Prompt, a: Response, b: Response, margin: float = 0.0) -> float:
    return 0.9 if len(a.text) > len(b.text) + margin else 0.2


def anything(*args: Any) -> float:
    return 0.7


def broken(prompt: Prompt, response: Response) -> float:
    raise KeyError("colour")


def words(prompt: Prompt, response: Response) -> Any:
    return "good"


def too_sure(prompt: Prompt, a: Response, b: Response) -> float:
    return 1.5


def three_scores(prompt: Prompt, response: Response, extra: int, more: int) -> float:
    return 1.0


def declared(*args: Any) -> float:
    return 0.7


declared.judges = "pair"
anything.judges = "neither"


def p_of(name: str, a: Response | str, b: Response | str, prompt: Prompt = ASK, scale: float | None = None) -> Any:
    responses = [Response(text=r) if isinstance(r, str) else r for r in (a, b)]
    [judgement] = load_rule(name, scale=scale).judge([Comparison(prompt, *responses)])
    return judgement.reason if judgement.p is None else judgement.p


def test_short_and_long_go_by_characters() -> None:
    assert (p_of("short", "a b", "ab"), p_of("long", "a b", "ab")) == (0.0, 1.0)
    assert (p_of("short", "ab", "cd"), p_of("long", "ab", "cd")) == (0.5, 0.5)


def test_finishes_prefers_an_answer_that_came_to_its_end() -> None:
    whole, cut = Response(text="Long.", finish_reason="stop"), Response(text="Lo", finish_reason="length")
    assert (p_of("finishes", whole, cut), p_of("finishes", cut, whole)) == (1.0, 0.0)
    assert p_of("finishes", whole, Response(text="From a file.")) == 0.5


def test_varied_is_the_share_of_distinct_trigrams() -> None:
    assert varied(ASK, Response(text="to be or not to be or not")) == pytest.approx(4 / 6)
    assert varied(ASK, Response(text="So, so so SO so!")) == pytest.approx(1 / 3)
    assert varied(ASK, Response(text="two words")) == 1.0
    assert p_of("varied", "the the the the the", "the river runs to the sea") == 0.0


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        ("Reply in JSON.", '{"a": 1}', "a is 1"),
        ("Reply in JSON.", '```json\n{"a": 1}\n```', '```json\n{"a": 1\n```'),
        ("Give me a numbered list.", "Here:\n1. One\n2) Two\n3. Three", "1. One\n3. Two"),
        ("Sum it up in three bullet points.", "- one\n- two", "one\n- two"),
        ("Say it in one sentence.", "It costs 3.50, e.g. in town.", "It is dear. It is far."),
        ("Say it in one sentence.", 'He said: "Go!"', "no end"),
    ],
)
def test_format_prefers_the_answer_in_the_format_asked_for(asked: str, good: str, bad: str) -> None:
    assert p_of("format", good, bad, Prompt.of(asked)) == 1.0
    with_system = Prompt.of([{"role": "system", "content": asked}, {"role": "user", "content": "Go on."}])
    assert p_of("format", good, bad, with_system) == 1.0


def test_format_has_no_opinion_where_no_format_is_asked_for() -> None:
    assert p_of("format", "1. a\n2. b", "a and b") == "the rule gave no answer"
    earlier = Prompt.of(
        [
            {"role": "user", "content": "In one sentence, please."},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Now go on."},
        ]
    )
    assert p_of("format", "One.", "One. Two.", earlier) == "the rule gave no answer"


def test_of_two_formats_asked_for_the_share_kept_counts() -> None:
    prompt = Prompt.of("Reply in JSON, in one sentence.")
    assert [sum(bool(pattern.search(prompt.messages[-1].content)) for pattern, _ in FORMATS)] == [2]
    assert p_of("format", "One sentence.", "One. Two.", prompt) == 1.0
    assert p_of("format", '{"a": "b"}', "One sentence.", prompt) == 0.5


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{'a': 1}", "NaN is not", "1 2"])
def test_what_is_no_json(text: str) -> None:
    assert not is_json(text)


def test_edges_of_formats() -> None:
    assert not is_numbered_list("1. only one") and not is_numbered_list("2. two\n3. three")
    assert is_one_sentence("Is it?") and not is_one_sentence("One\ntwo.") and not is_one_sentence("Go! Now.")
    assert not is_one_sentence("")


def test_the_variants_of_helpful_want_shorter_and_shorter_answers() -> None:
    """Of answers of equal quality, each variant likes the one of its own length best."""
    variants = ["helpful", "helpful-short", "helpful-very-short"]
    answers = {n: Response(text=" ".join(f"word{i}" for i in range(n))) for n in (8, 25, 60, 150)}
    best = [max(answers, key=lambda n: RULES[name](ASK, answers[n]) or 0.0) for name in variants]
    assert best == [60, 25, 8]


def test_helpful_is_quality_less_the_distance_from_its_length() -> None:
    text = "Rivers carry water about."
    utility = helpful(ASK, Response(text=text, finish_reason="length"), target_words=9)
    assert utility == pytest.approx(2 / 3 + 1.0 + 0.0 - math.log(2))


def test_hard_labels_of_scores() -> None:
    assert [by_scores(a, b, None) for a, b in ((2, 1), (1, 2), (1, 1))] == [1.0, 0.0, 0.5]


def test_a_scale_makes_them_soft() -> None:
    assert p_of("long", "four", "six ab", scale=2.0) == pytest.approx(1 / (1 + math.e))


@given(finite, finite, st.one_of(st.none(), st.floats(1e-3, 1e3)))
def test_scores_in_both_orders_sum_to_exactly_one(a: float, b: float, scale: float | None) -> None:
    p = by_scores(a, b, scale)
    assert p + by_scores(b, a, scale) == 1.0
    assert p >= 0.5 if a >= b else p <= 0.5


def test_a_function_of_the_users_is_found_and_told_apart() -> None:
    of_response = load_rule("tests.feedback.test_rules:score")
    of_pair = load_rule("tests.feedback.test_rules:preference")
    assert (of_response.judges, of_pair.judges) == ("response", "pair")
    assert "a score of each response, the higher wins" in of_response.description
    assert "a preference between two responses, asked in both orders" in of_pair.description


def test_a_preference_is_asked_in_both_orders() -> None:
    [judgement] = RuleAnnotator(preference, "longer").judge([Comparison(ASK, Response(text="abc"), Response(text="a"))])
    assert (judgement.q_ab, judgement.q_ba) == (0.9, 0.2)
    assert judgement.p == pytest.approx((0.9 + 1 - 0.2) / 2)


def test_a_declaration_counts_before_the_signature() -> None:
    assert what_it_judges(declared, "rule:declared") == "pair"
    with pytest.raises(InputError, match=r"rule:anything declares judges = 'neither'; expected \(prompt, response\)"):
        RuleAnnotator(anything, "anything")


@pytest.mark.parametrize(("function", "seen"), [(three_scores, r"takes \(prompt, response, extra, more\)"), (max, "")])
def test_a_function_that_is_neither_is_refused(function: Any, seen: str) -> None:
    with pytest.raises(InputError, match=rf"rule:x .*{seen}.*expected \(prompt, response\) or \(prompt, a, b\)"):
        RuleAnnotator(function, "x")


@pytest.mark.parametrize("text", ["none", "nan", "inf"])
def test_no_number_is_an_abstention(text: str) -> None:
    assert p_of("tests.feedback.test_rules:score", text, "abc") == "the rule gave no answer"
    assert p_of("tests.feedback.test_rules:score", "abc", text) == "the rule gave no answer"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", r"rule:tests.*:broken failed on prompt 'p-.*' \(KeyError: 'colour'\)"),
        ("words", r"returned 'good' \(str\); expected a number, or None"),
        ("too_sure", r"returned 1\.5 for a pair; expected P\(a is preferred\) in \[0, 1\]"),
    ],
)
def test_a_mistake_in_a_function_ends_the_run(function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        p_of(f"tests.feedback.test_rules:{function}", "abc", "a")


def test_the_same_text_is_never_shown_to_a_function() -> None:
    assert p_of("tests.feedback.test_rules:broken", "same", " same\n") == 0.5


def test_identities_tell_functions_and_scales_apart() -> None:
    rules = [load_rule("long"), load_rule("long", scale=1.0), load_rule("long", scale=2.0), load_rule("short")]
    rules += [load_rule(f"tests.feedback.test_rules:{name}") for name in ("score", "words")]
    rules += [load_rule(name) for name in ("helpful", "helpful-short")]
    assert len({rule.identity for rule in rules}) == len(rules)
    with pytest.raises(InputError, match=r"cannot be told from other rules .*write it as a plain function"):
        RuleAnnotator(lambda prompt, response: 1.0, "lambda")


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown rule 'shrt'; expected one of short, .*Did you mean 'short'\?"):
        load_rule("shrt")
    with pytest.raises(InputError, match=r"rule 'no_such_module:f': module 'no_such_module' cannot be imported"):
        load_rule("no_such_module:f")
