"""A server that misbehaves: the judge goes on, or stops so that the same command goes on; no label is invented, no
question is paid twice, every fault is counted.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from prefloop.errors import FeedbackError
from prefloop.feedback.annotator import Judgement
from prefloop.feedback.chat_server import Patience
from prefloop.feedback.meter import Meter
from prefloop.feedback.stage import annotate
from tests.feedback.annotators import COMPARISONS
from tests.feedback.judge_server import PATIENCE, JudgeServer, Misbehaviour, Reply, judge_of, refusal

Fault = Callable[[Reply], Reply]

PASSING: dict[str, tuple[str, Fault]] = {
    "429 with Retry-After": ("status 429", lambda reply: refusal(429, Retry_After="0.01")),
    "429 without": ("status 429", lambda reply: refusal(429)),
    "408": ("status 408", lambda reply: refusal(408)),
    "500": ("status 500", lambda reply: refusal(500)),
    "503 as a page": ("status 503", lambda reply: Reply(b"<html>busy</html>", 503, {"Content-Type": "text/html"})),
    "time-out": ("timeout", lambda reply: replace(reply, delay=0.5)),
    "half a body": ("connection", lambda reply: replace(reply, body=reply.body[:40], announced=len(reply.body))),
    "connection cut": ("connection", lambda reply: replace(reply, cut=True)),
    "half of the JSON": ("not JSON", lambda reply: replace(reply, body=reply.body[:40])),
    "a page": ("wrong JSON", lambda reply: Reply(b"<html>Welcome</html>", headers={"Content-Type": "text/html"})),
    "another JSON": ("wrong JSON", lambda reply: Reply.of({"object": "error"})),
    "a list": ("wrong JSON", lambda reply: Reply.of([])),
}
"""Fault -> the kind that it is counted as, and what goes out in place of the answer."""


def first_times(n: int, fault: Fault) -> Misbehaviour:
    """Every request meets the fault `n` times, then it is answered."""
    seen: Counter[str] = Counter()
    lock = Lock()

    def misbehave(number: int, body: dict[str, Any], reply: Reply) -> Reply:
        with lock:
            seen[json.dumps(body)] += 1
            failing = seen[json.dumps(body)] <= n
        return fault(reply) if failing else reply

    return misbehave


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> list[Judgement]:
    """What a server without faults says."""
    with JudgeServer() as server:
        return judge_of(server, tmp_path_factory.mktemp("truth") / "judgements.sqlite").judge(COMPARISONS)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "judgements.sqlite"


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_changes_no_judgement(name: str, cache: Path, truth: list[Judgement]) -> None:
    kind, fault = PASSING[name]
    times, patience = (1, replace(PATIENCE, timeout=0.15)) if name == "time-out" else (2, PATIENCE)
    with JudgeServer(misbehave=first_times(times, fault)) as server:
        judge = judge_of(server, cache, patience=patience)
        assert judge.judge(COMPARISONS) == truth
        assert (len(server.answered), server.most_asked()) == (10, 1)
    tally = judge.meter.summary()["api:small"]
    assert (tally["calls"], tally["faults"]) == (10, {kind: 10 * times})


@pytest.mark.parametrize("name", [name for name in PASSING if name != "time-out"])
def test_a_fault_that_stays_stops_and_the_rerun_pays_for_the_rest(
    name: str, cache: Path, truth: list[Judgement]
) -> None:
    kind, fault = PASSING[name]
    with JudgeServer(misbehave=lambda n, body, reply: fault(reply) if n > 4 else reply) as server:
        judge = judge_of(server, cache, concurrency=1)
        with pytest.raises(FeedbackError, match=r"failed 4 times on one question.*kept: run the same command again"):
            judge.judge(COMPARISONS)
        assert (len(server.requests), len(server.answered)) == (8, 4)
    assert judge.meter.summary()["api:small"]["faults"] == {kind: 4}
    assert judge.meter.summary()["api:small"]["calls"] == 4
    with JudgeServer() as healthy:
        again = judge_of(healthy, cache)
        assert again.judge(COMPARISONS) == truth
        assert (len(healthy.answered), again.meter.summary()["api:small"]["cache_hits"]) == (6, 4)


@pytest.mark.parametrize("concurrency", [1, 4, 16])
@pytest.mark.parametrize("dies_at", [1, 5, 10])
def test_a_server_that_dies_leaves_what_it_answered(
    concurrency: int, dies_at: int, cache: Path, truth: list[Judgement]
) -> None:
    with JudgeServer(misbehave=lambda n, body, reply: replace(reply, cut=n >= dies_at)) as server:
        judge = judge_of(server, cache, concurrency=concurrency)
        with pytest.raises(FeedbackError, match=r"^http://127\.0\.0\.1:\d+/v1 \(model 'small'\) failed \d times"):
            judge.judge(COMPARISONS)
    assert len(server.answered) == dies_at - 1
    with JudgeServer() as healthy:
        assert judge_of(healthy, cache).judge(COMPARISONS) == truth
    both = [json.dumps(body) for body in server.answered + healthy.answered]
    assert (len(both), len(set(both))) == (10, 10)


def test_a_server_that_is_not_there_is_given_up_soon(cache: Path) -> None:
    with JudgeServer() as server:
        url = server.url
    judge = judge_of(url, cache, concurrency=1, patience=replace(PATIENCE, retries=50))
    with pytest.raises(FeedbackError, match=r"failed 3 times"):
        judge.judge(COMPARISONS)
    assert judge.meter.summary()["api:small"]["faults"] == {"connection": 3}


def test_a_server_that_asks_for_an_hour_is_given_up_at_once(cache: Path) -> None:
    with JudgeServer(misbehave=lambda n, body, reply: refusal(429, "later", Retry_After="3600")) as server:
        with pytest.raises(FeedbackError, match=r"asks to wait 3600 s .*run the same command again when it is back"):
            judge_of(server, cache, concurrency=1).judge(COMPARISONS)
        assert len(server.requests) == 1


def test_retry_after_is_waited_for(cache: Path) -> None:
    times: list[float] = []

    def once(number: int, body: dict[str, Any], reply: Reply) -> Reply:
        times.append(time.monotonic())
        return refusal(429, Retry_After="0.1") if number == 1 else reply

    with JudgeServer(misbehave=once) as server:
        judge_of(server, cache, concurrency=1).judge(COMPARISONS[:1])
    assert 0.1 <= times[1] - times[0] < 0.5


def test_waits_double_up_to_the_longest() -> None:
    patience = Patience(backoff=1.0, longest_wait=10.0)
    for failures, full in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 10.0), (60, 10.0)):
        assert 0.75 * full <= patience.wait(failures) <= full


MALFORMED: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "empty choices": ("empty choices", lambda data: data.update(choices=[])),
    "no content": ("empty answer", lambda data: data["choices"][0].update(message={"content": None}, logprobs=None)),
    "empty content": ("empty answer", lambda data: data["choices"][0].update(message={"content": ""}, logprobs=None)),
    "no message": ("empty answer", lambda data: data["choices"][0].update(message={}, logprobs={"content": None})),
    "other words": (
        "the answer is not a label",
        lambda data: data["choices"][0].update(message={"content": "It depends."}, logprobs={"content": []}),
    ),
    "probabilities of other words": (
        "the answer is not a label",
        lambda data: data["choices"][0].update(
            message={"content": "It"},
            logprobs={"content": [{"token": "It", "logprob": 0.0, "top_logprobs": [{"token": "It", "logprob": 0.0}]}]},
        ),
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_says_nothing_is_asked_again_then_an_abstention_and_never_a_label(name: str, cache: Path) -> None:
    reason, change = MALFORMED[name]
    with JudgeServer(misbehave=lambda n, body, reply: reply.edit(change)) as server:
        judge = judge_of(server, cache)
        assert [(j.p, j.reason) for j in judge.judge(COMPARISONS)] == [(None, reason)] * 5
        assert judge.meter.summary()["api:small"]["faults"] == {f"malformed: {reason}": 30}
        again = judge_of(server, cache)
        assert annotate(COMPARISONS, again) == []
        assert (len(server.answered), server.most_asked()) == (30, 1)
    assert again.meter.summary()["api:small"]["cache_hits"] == 30


@pytest.mark.parametrize("top", [None, [], [{"token": "1", "logprob": 3.0}], [{"token": "1", "logprob": float("nan")}]])
def test_without_usable_log_probabilities_the_answer_is_a_vote(
    top: list[Any] | None, cache: Path, truth: list[Judgement]
) -> None:
    def change(data: dict[str, Any]) -> None:
        first = {"token": "1", "logprob": 0.0, "top_logprobs": top}
        data["choices"][0]["logprobs"] = None if top is None else {"content": [first]}

    with JudgeServer(misbehave=lambda n, body, reply: reply.edit(change)) as server:
        judge = judge_of(server, cache)
        judgements = judge.judge(COMPARISONS)
        assert (len(server.answered), server.most_asked()) == (10, 1)
    for judgement, true in zip(judgements, truth, strict=True):
        assert true.q_ab is not None and judgement.q_ab == float(true.q_ab >= 0.5)
    assert judge.meter.summary()["api:small"]["faults"] == {"without log-probabilities": 10}


@pytest.mark.parametrize("seed", range(4))
def test_all_faults_at_once(seed: int, cache: Path, truth: list[Judgement]) -> None:
    """Six of ten requests meet some fault; reruns of one command come to the same end, and pay for it once."""
    draw = random.Random(seed)
    faults = [fault for name, (_, fault) in PASSING.items() if name != "time-out"]
    sent: Counter[str] = Counter()
    lock = Lock()

    def misbehave(number: int, body: dict[str, Any], reply: Reply) -> Reply:
        with lock:
            fault = draw.choice(faults) if draw.random() < 0.6 else None
        return reply if fault is None else fault(reply)

    with JudgeServer(misbehave=misbehave) as server:
        for _ in range(50):
            meter = Meter()
            judge = judge_of(server, cache, meter=meter, concurrency=3, patience=replace(PATIENCE, retries=1))
            try:
                judgements = judge.judge(COMPARISONS)
                break
            except FeedbackError:
                continue
            finally:
                tally = meter.summary()["api:small"]
                sent["calls"] += tally["calls"]
                sent["faults"] += sum(tally["faults"].values())
        assert judgements == truth
        assert (len(server.answered), server.most_asked(), sent["calls"]) == (10, 1, 10)
        assert sent["faults"] == len(server.requests) - 10 > 5


def test_ctrl_c_keeps_what_is_under_way(cache: Path, truth: list[Judgement]) -> None:
    def interrupt(n: int = 1, /) -> None:
        if n:
            raise KeyboardInterrupt

    with JudgeServer() as server:
        with pytest.raises(KeyboardInterrupt):
            judge_of(server, cache, concurrency=4).judge(COMPARISONS, advance=interrupt)
        assert 2 <= len(server.answered) < 10
        assert judge_of(server, cache).judge(COMPARISONS) == truth
        assert (len(server.answered), server.most_asked()) == (10, 1)
