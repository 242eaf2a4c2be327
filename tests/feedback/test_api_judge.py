"""Judges behind a server: label probabilities, votes, abstentions, budget and cache; and the key, which is nowhere."""

import json
import logging
import math
import sys
import time
import traceback
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from prefloop.errors import BudgetReached, FeedbackError, InputError
from prefloop.feedback.annotator import Comparison, Judgement
from prefloop.feedback.api_judge import Decoding
from prefloop.feedback.chat_server import _retry_after, checked_url
from prefloop.feedback.estimate import estimate
from prefloop.feedback.instructions import load_instruction
from prefloop.feedback.meter import Meter, Price, Prices
from prefloop.feedback.stage import annotate
from prefloop.records import Prompt, Response
from prefloop.run import Stage
from tests.feedback.annotators import COMPARISONS, SAME_TEXT
from tests.feedback.judge_server import JudgeServer, Reply, first_preferred, judge_of, refusal

KEY = "sk-SECRET/with+all=kinds.of'signs\"and\\more-0123456789"
PRICES = Prices(models={"small": Price(input=1.0, output=2.0)})


class Noted(Stage):
    """A stage that keeps its notes."""

    def note(self, text: str) -> None:
        self.figure(text, 1)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "judgements.sqlite"


def content(text: str):
    """A misbehaviour: every answer is this text, without log-probabilities."""

    def change(data: dict[str, Any]) -> None:
        data["choices"][0] |= {"message": {"role": "assistant", "content": text}, "logprobs": None}

    return lambda number, body, reply: reply.edit(change)


def test_preferences_are_the_servers_label_probabilities_in_both_orders(cache: Path) -> None:
    instruction = load_instruction("helpfulness")
    with JudgeServer(bias=0.7, mass=0.9) as server:
        judge = judge_of(server, cache)
        judgements = judge.judge(COMPARISONS)
    for comparison, judgement in zip(COMPARISONS, judgements, strict=True):
        q_ab, q_ba = (first_preferred(instruction.render(c), 0.7) for c in (comparison, comparison.swapped))
        assert (judgement.q_ab, judgement.q_ba) == pytest.approx((q_ab, q_ba), abs=1e-6)
        assert judgement.p == pytest.approx((q_ab + 1 - q_ba) / 2, abs=1e-6)
    assert (judge.mass.n, judge.mass.mean, judge.mass.low) == (10, pytest.approx(0.9), 0)
    assert {json.dumps({**body, "messages": 0}) for body in server.requests} == {
        json.dumps({"model": "small", "messages": 0, "max_tokens": 16, "temperature": 0.0, "seed": 0, "logprobs": True,
                    "top_logprobs": 20})
    }  # fmt: skip
    for body in server.requests:
        [message] = body["messages"]
        assert message["role"] == "user" and message["content"].endswith("nothing else.\n\nPreferred response:")


def test_the_contract(cache: Path, tmp_path: Path) -> None:
    finished: list[int] = []
    with JudgeServer(bias=1.0) as server:
        judge = judge_of(server, cache)
        straight = judge.judge([*COMPARISONS, SAME_TEXT], advance=lambda n=1: finished.append(n))
        other = judge_of(server, tmp_path / "other.sqlite", concurrency=2)
        swapped = other.judge([c.swapped for c in reversed(COMPARISONS)])
        assert judge.judge([]) == []
    assert sum(finished) == 6 and straight[-1].p == 0.5
    assert swapped[::-1] == [j.swapped for j in straight[:-1]]
    assert min(j.p for j in straight if j.p) < 0.5 < max(j.p for j in straight if j.p)


@pytest.mark.parametrize("bias", [2.0, -5.0])
def test_o5_a_judge_that_only_looks_at_the_slot_has_exactly_one_half(cache: Path, bias: float) -> None:
    same_length = [Comparison(Prompt.of(f"{i}?"), Response(text=f"a{i}"), Response(text=f"b{i}")) for i in range(8)]
    with JudgeServer(bias=bias) as server:
        judge = judge_of(server, cache)
        assert [j.p for j in judge.judge(same_length)] == [0.5] * 8
        assert annotate(same_length, judge) == []


def test_an_inverted_instruction_turns_every_preference_round(cache: Path) -> None:
    with JudgeServer(bias=0.5) as server:
        plain = judge_of(server, cache, instruction="harmlessness").judge(COMPARISONS)
        inverted = judge_of(server, cache, instruction="harmlessness-scoring").judge(COMPARISONS)
    assert [j.p for j in inverted] == pytest.approx([1 - j.p for j in plain if j.p is not None], abs=1e-9)
    assert server.requests[-1]["messages"][0]["content"].endswith("More harmful response:")


def test_calls_tokens_and_money_are_counted_and_a_rerun_pays_nothing(cache: Path) -> None:
    asked = [*COMPARISONS, COMPARISONS[0], COMPARISONS[1].swapped]
    with JudgeServer() as server:
        first = judge_of(server, cache, meter=Meter(PRICES))
        judged = first.judge(asked)
        again = judge_of(server, cache, meter=Meter(PRICES, budget_calls=0))
        assert again.judge(asked) == judged
    tokens = sum(len(body["messages"][0]["content"]) // 4 for body in server.answered)
    assert first.meter.summary()["api:small"] == {
        "calls": 10, "cache_hits": 0, "tokens_in": tokens, "tokens_out": 10, "calls_without_usage": 0, "faults": {},
        "money": pytest.approx((tokens + 20) / 1e6),
    }  # fmt: skip
    assert (len(server.requests), again.meter.summary()["api:small"]["cache_hits"]) == (10, 10)
    assert again.mass == first.mass


def test_usage_that_the_server_does_not_say_is_unknown(cache: Path) -> None:
    with JudgeServer(misbehave=lambda n, body, reply: reply.edit(lambda data: data.pop("usage"))) as server:
        judge = judge_of(server, cache)
        judge.judge(COMPARISONS[:1])
    tally = judge.meter.summary()["api:small"]
    assert (tally["calls"], tally["calls_without_usage"], tally["tokens_in"]) == (2, 2, 0)


def test_no_more_requests_are_open_than_allowed(cache: Path) -> None:
    lock, now, most = Lock(), [0], [0]

    def watch(number: int, body: dict[str, Any], reply: Reply) -> Reply:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return reply

    with JudgeServer(misbehave=watch) as server:
        judge_of(server, cache, concurrency=3).judge(COMPARISONS)
    assert most == [3]


def test_the_budget_stops_it_and_what_is_answered_is_kept(cache: Path, tmp_path: Path) -> None:
    with JudgeServer() as server:
        whole = judge_of(server, tmp_path / "whole.sqlite").judge(COMPARISONS)
        server.answered.clear()
        for calls in (4, 4):
            judge = judge_of(server, cache, meter=Meter(budget_calls=4))
            with pytest.raises(BudgetReached, match=r"budget of 4 calls is used up"):
                judge.judge(COMPARISONS)
            assert judge.meter.summary()["api:small"]["calls"] == calls
        assert judge_of(server, cache, meter=Meter(budget_calls=2)).judge(COMPARISONS) == whole
        assert (len(server.answered), server.most_asked()) == (10, 1)


def test_a_budget_of_money_needs_a_price_before_anything_is_sent(cache: Path) -> None:
    with JudgeServer() as server:
        with pytest.raises(InputError, match="price of model 'small' is unknown"):
            judge_of(server, cache, meter=Meter(budget_money=1.0)).judge(COMPARISONS)
    assert server.requests == []


def test_the_estimate_is_made_without_asking(cache: Path) -> None:
    with JudgeServer() as server:
        judge = judge_of(server, cache, meter=Meter(PRICES))
        judge.judge(COMPARISONS[:2])
        [before] = estimate(judge, [*COMPARISONS, SAME_TEXT, COMPARISONS[4].swapped], PRICES)
        assert len(server.requests) == 4
    characters = sum(len(judge._text(order)) for c in COMPARISONS[2:] for order in (c, c.swapped))
    assert (before.questions, before.cached, before.calls, before.exact) == (10, 4, 6, False)
    assert before.tokens_in == pytest.approx(characters / 4, abs=6)
    assert (before.tokens_out, before.money) == (6 * 16, pytest.approx((before.tokens_in + 2 * 96) / 1e6))
    assert before.render().endswith("guessed, at 4 characters a token")
    [unpriced] = estimate(judge, COMPARISONS)
    assert unpriced.money is None and "money unknown (no price)" in unpriced.render()


def test_votes_are_drawn_apart_and_their_share_is_the_preference(cache: Path) -> None:
    def by_seed(number: int, body: dict[str, Any], reply: Reply) -> Reply:
        text = {0: "1", 1: '{"answer": 1}', 2: "2"}[body["seed"] // 2]
        return content(text)(number, body, reply)

    with JudgeServer(misbehave=by_seed) as server:
        judge = judge_of(server, cache, decoding=Decoding(votes=3, temperature=0.7, tries=2))
        [judgement] = judge.judge(COMPARISONS[:1])
    assert (judgement.q_ab, judgement.q_ba, judgement.p) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 0.5)
    assert sorted(body["seed"] for body in server.requests) == [0, 0, 2, 2, 4, 4]
    assert {body["temperature"] for body in server.requests} == {0.7}
    assert not any("logprobs" in body for body in server.requests)
    assert judge.meter.summary()["api:small"]["faults"] == {}


@pytest.mark.parametrize(("clear", "p"), [(2, 1.0), (1, None)])
def test_more_than_half_of_the_votes_have_to_be_clear(cache: Path, clear: int, p: float | None) -> None:
    with JudgeServer(
        misbehave=lambda n, body, reply: content("1" if body["seed"] < clear else "?")(n, body, reply)
    ) as server:
        [judgement] = judge_of(server, cache, decoding=Decoding(votes=3, tries=1)).judge(COMPARISONS[:1])
    assert judgement.q_ab == p
    assert judgement.reason == (None if p else "the answer is not a label")


def test_without_log_probabilities_the_answer_is_a_vote_and_said_so(cache: Path) -> None:
    def drop(data: dict[str, Any]) -> None:
        del data["choices"][0]["logprobs"]

    with JudgeServer(misbehave=lambda n, body, reply: reply.edit(drop)) as server:
        judge = judge_of(server, cache)
        judgements = judge.judge(COMPARISONS)
    assert {(j.q_ab, j.q_ba) for j in judgements} == {(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)}
    assert judge.meter.summary()["api:small"]["faults"] == {"without log-probabilities": 10}
    assert judge.mass.n == 0 and server.most_asked() == 1


def test_a_label_after_the_first_token_counts_as_a_vote_with_the_mass_it_had(cache: Path) -> None:
    def bold(data: dict[str, Any]) -> None:
        data["choices"][0]["message"]["content"] = "**1**"
        first = {"token": "**", "logprob": math.log(0.97)}
        rest = {"token": "2", "logprob": math.log(0.02)}
        data["choices"][0]["logprobs"]["content"] = [{**first, "top_logprobs": [first, rest]}]

    stage = Noted()
    with JudgeServer(misbehave=lambda n, body, reply: reply.edit(bold)) as server:
        judge = judge_of(server, cache, stage=stage)
        assert [(j.q_ab, j.q_ba) for j in judge.judge(COMPARISONS)] == [(1.0, 1.0)] * 5
    assert judge.mass.mean == pytest.approx(0.02)
    [said] = stage.figures
    assert "warning: api:small hardly answers with a label" in said and len(server.requests) == 10


def test_a_space_before_the_label_is_not_the_answer(cache: Path) -> None:
    def spaced(data: dict[str, Any]) -> None:
        tokens = data["choices"][0]["logprobs"]["content"]
        tokens.insert(0, {"token": "\n", "logprob": 0.0, "top_logprobs": [{"token": "\n", "logprob": 0.0}]})

    with JudgeServer(misbehave=lambda n, body, reply: reply.edit(spaced)) as server:
        judge = judge_of(server, cache)
        judge.judge(COMPARISONS)
    assert judge.mass.mean == pytest.approx(0.98)


def test_a_malformed_answer_is_asked_again_and_then_an_abstention(cache: Path) -> None:
    with JudgeServer(misbehave=content("Both are fine.")) as server:
        judge = judge_of(server, cache, decoding=Decoding(tries=2))
        [judgement] = judge.judge(COMPARISONS[:1])
        assert (judgement.p, judgement.reason) == (None, "the answer is not a label")
        assert judge.meter.summary()["api:small"]["faults"] == {"malformed: the answer is not a label": 4}
        assert annotate(COMPARISONS[:1], judge_of(server, cache, decoding=Decoding(tries=2))) == []
        assert (len(server.answered), server.most_asked()) == (4, 1)


def test_a_malformed_answer_may_be_followed_by_a_clear_one(cache: Path) -> None:
    with JudgeServer(
        misbehave=lambda n, body, reply: content("?")(n, body, reply) if body["seed"] == 0 else reply
    ) as server:
        judge = judge_of(server, cache, meter=Meter(budget_calls=3), concurrency=1)
        with pytest.raises(BudgetReached):
            judge.judge(COMPARISONS[:1])
        [judgement] = judge_of(server, cache, concurrency=1).judge(COMPARISONS[:1])
        assert judgement.p is not None
        assert (len(server.answered), server.most_asked()) == (4, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"finish_reason": "content_filter"}, "refused by the server's content filter"),
        ({"message": {"refusal": "I cannot."}}, "the judge refused to answer"),
    ],
)
def test_a_refusal_is_an_abstention_and_not_asked_again(cache: Path, change: dict[str, Any], reason: str) -> None:
    with JudgeServer(
        misbehave=lambda n, body, reply: reply.edit(lambda data: data["choices"][0].update(change))
    ) as server:
        judge = judge_of(server, cache)
        assert [j.reason for j in judge.judge(COMPARISONS)] == [reason] * 5
        assert len(server.requests) == 10
    assert judge.meter.summary()["api:small"]["faults"] == {reason: 10}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (refusal(400, "This model's maximum context length is 10 tokens."), "longer than the judge's context"),
        (refusal(400, "too big", "context_length_exceeded"), "longer than the judge's context"),
        (refusal(413), "longer than the judge's context"),
        (refusal(400, "filtered", "content_filter"), "refused by the server's content filter"),
    ],
)
def test_a_question_that_the_server_does_not_take_is_an_abstention(cache: Path, reply: Reply, reason: str) -> None:
    long = Comparison(Prompt.of("Long?"), Response(text="x" * 5000), Response(text="y"))

    def refuse(number: int, body: dict[str, Any], good: Reply) -> Reply:
        return reply if len(body["messages"][0]["content"]) > 5000 else good

    with JudgeServer(misbehave=refuse) as server:
        judge = judge_of(server, cache)
        judgements = judge.judge([COMPARISONS[0], long])
    assert [j.reason for j in judgements] == [None, reason] and judgements[0].p is not None
    tally = judge.meter.summary()["api:small"]
    assert (tally["calls"], tally["faults"]) == (2, {reason: 2})


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(401), r"let us not in \(401\); put its key into \$NO_KEY"),
        (refusal(403), r"let us not in \(403\)"),
        (refusal(404, "no such model"), r"not found \(.*no such model\); check the model's name, and that base_url"),
        (
            refusal(400, "max_tokens?"),
            r"does not take the request \(Error code: 400 - max_tokens\?\); choose another model.*votes = 1",
        ),
        (refusal(422, "seed?"), r"does not take the request \(Error code: 422"),
    ],
)
def test_what_the_user_has_to_mend_stops_at_once(cache: Path, reply: Reply, message: str) -> None:
    with JudgeServer(misbehave=lambda n, body, good: reply) as server:
        with pytest.raises(InputError, match=rf"^http://127\.0\.0\.1:\d+/v1 \(model 'small'\).*{message}"):
            judge = judge_of(server, cache, api_key_env="NO_KEY", concurrency=1)
            judge.judge(COMPARISONS)
        assert len(server.requests) == 1
    assert judge.meter.summary()["api:small"]["faults"] == {f"status {reply.status}": 1}


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_log_probabilities_gives_votes(cache: Path, status: int) -> None:
    def refuse(n: int, body: dict[str, Any], good: Reply) -> Reply:
        return refusal(status, "logprobs is not supported") if "logprobs" in body else good

    with JudgeServer(misbehave=refuse) as server:
        judge = judge_of(server, cache, concurrency=1)
        judgements = judge.judge(COMPARISONS)
        # Refused once; then nobody asks for them again.
        assert [len(server.answered), len(server.requests)] == [10, 11]
    assert {q for j in judgements for q in (j.q_ab, j.q_ba)} == {0.0, 1.0}
    assert judge.meter.summary()["api:small"]["faults"] == {"without log-probabilities": 10}


@pytest.mark.parametrize("part", ["top_logprobs", "content", "logprobs"])
def test_null_in_place_of_log_probabilities_is_a_vote_and_paid_once(cache: Path, part: str) -> None:
    def without(data: dict[str, Any]) -> None:
        choice = data["choices"][0]
        if part == "top_logprobs":
            choice["logprobs"]["content"][0]["top_logprobs"] = None
        elif part == "content":
            choice["logprobs"]["content"] = None
        else:
            choice["logprobs"] = None

    with JudgeServer(misbehave=lambda n, body, good: good.edit(without)) as server:
        judgements = judge_of(server, cache, concurrency=1).judge(COMPARISONS)
        assert len(server.requests) == 10
    assert {q for j in judgements for q in (j.q_ab, j.q_ba)} == {0.0, 1.0}


def test_a_placeholder_for_a_key_does_not_blot_out_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with JudgeServer() as server:
        expected = judge_of(server, cache.with_name("plain")).judge(COMPARISONS)
        monkeypatch.setenv("JUDGE_KEY", "1")
        assert judge_of(server, cache, api_key_env="JUDGE_KEY").judge(COMPARISONS) == expected


def test_who_is_second_to_keep_an_answer_takes_the_first_ones(cache: Path) -> None:
    """Two runs that ask the same at once must not train on different labels."""
    other: list[Judgement] = []

    def slow(n: int, body: dict[str, Any], good: Reply) -> Reply:
        if n == 1:  # while this question is open, another run asks all and keeps the answers
            with JudgeServer(bias=5.0) as biased:
                other.extend(judge_of(biased, cache).judge(COMPARISONS))
        return good

    with JudgeServer(misbehave=slow) as server:
        assert judge_of(server, cache, concurrency=1).judge(COMPARISONS)[0] == other[0]


def test_an_account_without_money_stops_at_once_and_can_be_resumed(cache: Path) -> None:
    with JudgeServer(
        misbehave=lambda n, body, good: refusal(429, "pay", "insufficient_quota") if n > 3 else good
    ) as server:
        with pytest.raises(FeedbackError, match=r"has no money left .*run the same command again"):
            judge_of(server, cache, concurrency=1).judge(COMPARISONS)
        assert len(server.requests) == 4


def test_extra_fields_are_sent_and_may_leave_others_out(cache: Path) -> None:
    extra = {"max_tokens": None, "max_completion_tokens": 99, "chat_template_kwargs": {"enable_thinking": False}}
    with JudgeServer() as server:
        judge = judge_of(server, cache, decoding=Decoding(extra=extra))
        judge.judge(COMPARISONS[:1])
        judge_of(server, cache).judge(COMPARISONS[:1])
    first, last = server.requests[0], server.requests[-1]
    assert (first["max_completion_tokens"], first["chat_template_kwargs"]) == (99, {"enable_thinking": False})
    assert "max_tokens" not in first and "max_completion_tokens" not in last and len(server.requests) == 4


def everything_said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error) + str(error.__cause__)


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
def test_a_key_is_nowhere_though_the_server_echoes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    stage, cache = Noted(), tmp_path / "judgements.sqlite"
    said = f"You sent Authorization: Bearer {KEY} and {KEY!r}"

    def echo(number: int, body: dict[str, Any], reply: Reply) -> Reply:
        if number <= 2:
            return content(said)(number, body, reply) if status == 200 else reply
        return content(KEY)(number, body, reply) if status == 200 else refusal(status, said, retry_after="0.001")

    with JudgeServer(api_key=KEY, misbehave=echo) as server:
        judge = judge_of(server, cache, api_key_env="JUDGE_KEY", stage=stage, concurrency=1)
        told = ""
        if status == 200:
            told = str(judge.judge(COMPARISONS))
        else:
            with pytest.raises((InputError, FeedbackError)) as caught:
                judge.judge(COMPARISONS)
            told = everything_said(caught.value)
            assert len(server.answered) == 2
    # The key did go out: the server takes no other, and its answers hold it.
    assert len(server.requests) >= 3
    files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    shown = [told, caplog.text, repr(judge), repr(judge.server), judge.name, judge.identity, *stage.figures,
             json.dumps(judge.meter.summary()), files.decode("latin-1")]  # fmt: skip
    assert "POST" in caplog.text
    for text in shown:
        for part in (KEY, repr(KEY)[1:-1], json.dumps(KEY)[1:-1], "SECRET"):
            assert part not in text


def test_a_wrong_key_is_named_by_its_variable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-wrong")
    with JudgeServer(api_key=KEY) as server:
        with pytest.raises(
            InputError, match=r"let us not in \(401\); is the key right that is in \$JUDGE_KEY"
        ) as caught:
            judge_of(server, cache, api_key_env="JUDGE_KEY").judge(COMPARISONS)
    assert "sk-wrong" not in everything_said(caught.value)


def test_a_key_that_no_request_can_carry_is_not_shown(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-one\nsk-two")
    with pytest.raises(InputError, match=r"^\$JUDGE_KEY is no key: it has spaces or special characters") as caught:
        judge_of("http://127.0.0.1:1/v1", cache, api_key_env="JUDGE_KEY")
    assert "sk-" not in everything_said(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", r"base_url is missing: name the server"),
        ("localhost:8000", r"base_url = 'localhost:8000': expected http://HOST:PORT/v1"),
        ("https://me:sk-word@host/v1", r"base_url has a user name, a password or a query in it"),
        ("https://host/v1?key=sk-word", r"base_url has a user name, a password or a query in it"),
    ],
)
def test_a_url_that_cannot_be_used_is_named_without_its_secrets(cache: Path, url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        judge_of(url, cache)
    assert "sk-word" not in everything_said(caught.value)


def test_a_url_without_a_path_has_the_usual_one() -> None:
    assert checked_url("http://127.0.0.1:8000/") == "http://127.0.0.1:8000/v1"
    assert checked_url("http://127.0.0.1:8000/api/v2/") == "http://127.0.0.1:8000/api/v2"


def test_the_client_is_asked_for_where_it_is_missing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"needs openai; run: pip install 'prefloop\[server\]'"):
        judge_of("http://127.0.0.1:1/v1", cache)


@pytest.mark.parametrize("options", [{"votes": -1}, {"tries": 0}, {"temperature": -0.1}])
def test_a_decoding_that_cannot_be_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"expected votes and temperature of at least 0 and tries of at least 1"):
        Decoding(**options)


def test_every_form_of_retry_after_is_read() -> None:
    assert _retry_after({"retry-after": "7"}) == 7.0
    assert _retry_after({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    assert _retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert _retry_after({"retry-after": "soon"}) is _retry_after({}) is _retry_after({"retry-after": "nan"}) is None
