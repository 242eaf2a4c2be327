"""The server engine beyond the contract: what it asks for, what it checks, what it says when a server misbehaves."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from prefloop.config import parse_config
from prefloop.errors import EngineError, InputError, PrefloopError
from prefloop.records import Group
from prefloop.sample.completions import Ask, Choice, Completion, Logprobs, Model, choose_model, response
from prefloop.sample.engine import answer_seed, ends
from prefloop.sample.options import Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.server import ServerEngine, in_threads, server_obstacle
from tests.sample.engines import CHAT, PROMPTS, ids_of, stopping_llama
from tests.sample.loopback import Loopback, Misbehaviour, Reply, refusal, server, shared

SAMPLING = Sampling(max_new_tokens=20)
LETTERS = [CHAT.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "etaoin"]


def engine(url: str, **options: Any) -> ServerEngine:
    return ServerEngine(CHAT, Server(url=url, retries=0, **options), dtype="float32")


@contextmanager
def loopback(**manners: Any) -> Iterator[Loopback]:
    with Loopback(stopping_llama(), CHAT.tokenizer, **manners) as running:
        yield running


def flat(groups: list[Group]) -> list[tuple[Group, Any]]:
    return [(group, answer) for group in groups for answer in group.responses]


def test_log_probabilities_are_those_of_the_model_before_temperature_and_truncation() -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=20)
    model = stopping_llama()
    for group, answer in flat(server(8).sample(PROMPTS, k=2, sampling=sampling, seed=1)):
        prompt = CHAT.prompt_ids(group.prompt)
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.inference_mode():
            logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=1)
        expected = logps.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
        assert answer.sampling_logps == pytest.approx(expected, abs=1e-4)
        assert all(logp == round(logp, 6) for logp in answer.sampling_logps)


def test_every_value_that_decides_a_draw_is_stated() -> None:
    sampling = Sampling(temperature=0.7, top_k=5, min_p=0.1, max_new_tokens=7, stop=("\n\n", "x"), stop_token_ids=(3,))
    before = len(shared().requests)
    server(1).sample(PROMPTS[:2], k=2, sampling=sampling, seed=9)
    asked = shared().requests[before:]
    wanted = [(prompt, number) for prompt in PROMPTS[:2] for number in range(2)]
    assert [body.pop("prompt") for body in asked] == [CHAT.prompt_ids(prompt) for prompt, _ in wanted]
    assert [body.pop("seed") for body in asked] == [answer_seed(9, prompt.id, number) for prompt, number in wanted]
    assert (
        asked
        == [
            {
                "model": "tiny",
                "n": 1,
                "max_tokens": 7,
                "temperature": 0.7,
                "top_p": 1.0,
                "top_k": 5,
                "min_p": 0.1,
                "stop": ["\n\n", "x"],
                "stop_token_ids": sorted([3, *CHAT.stop_token_ids]),
                "ignore_eos": True,
                "include_stop_str_in_output": True,
                "skip_special_tokens": True,
                "add_special_tokens": False,
                "min_tokens": 0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "watermarking": False,
                "logprobs": 1,
                "return_token_ids": True,
            }
        ]
        * 4
    )


def test_truncations_that_are_off_are_stated_as_off() -> None:
    server(1).sample(PROMPTS[:1], k=1, sampling=SAMPLING, seed=9)
    asked = shared().requests[-1]
    assert {name: asked[name] for name in ("temperature", "top_p", "top_k", "min_p", "stop")} == {
        "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "stop": [],
    }  # fmt: skip


def test_the_model_s_own_list_of_end_tokens_ends_nothing_on_vllm_and_is_noticed_elsewhere() -> None:
    plain = ids_of(server(64).sample(PROMPTS, k=4, sampling=SAMPLING, seed=2))
    assert any(set(LETTERS) & set(ids or ()) for answers in plain.values() for ids in answers)
    with loopback(eos=LETTERS) as vllm:
        assert ids_of(engine(vllm.url).sample(PROMPTS, k=4, sampling=SAMPLING, seed=2)) == plain
    with loopback(eos=LETTERS, owner="someone") as other:
        with pytest.raises(EngineError, match=r"says 'stop' and 'no end' is right; .*--generation-config vllm"):
            engine(other.url).sample(PROMPTS, k=4, sampling=SAMPLING, seed=2)


def test_stop_strings_and_stop_ids_end_an_answer_and_stay_in_it() -> None:
    free = [answer for _, answer in flat(server(64).sample(PROMPTS, k=4, sampling=SAMPLING, seed=2))]
    text = max((answer.text for answer in free), key=len)
    string = next(text[i : i + 2] for i in range(3, len(text)) if text[i : i + 2].isascii())
    id = free[0].token_ids[4]
    sampling = SAMPLING.replace(stop=(string,), stop_token_ids=(id,))
    lasts = set()
    for (_, ours), whole in zip(flat(server(64).sample(PROMPTS, k=4, sampling=sampling, seed=2)), free, strict=True):
        n = next((n for n in range(1, 1 + len(whole.token_ids)) if ends(CHAT, whole.token_ids[:n], sampling)), None)
        assert ours.token_ids == whole.token_ids[:n]
        assert ours.finish_reason == ("length" if n is None else "stop")
        lasts |= {"string"} if string in ours.text else {ours.token_ids[-1]}
    assert {"string", id, CHAT.end_token_id} <= lasts


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"min_p": 0.1, "top_p": 0.9}, "min_p before top_p, which transformers does after it"),
        ({"temperature": 0.005}, "raises temperatures below 0.01"),
    ],
)
def test_what_vllm_draws_otherwise_is_refused_before_anything_is_sent(changes: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        engine("http://127.0.0.1:9").sample(PROMPTS, k=1, sampling=SAMPLING.replace(**changes), seed=0)


def test_top_k_with_min_p_is_drawn_as_transformers_does() -> None:
    sampling = SAMPLING.replace(top_k=5, min_p=0.1)
    assert len(server(8).sample(PROMPTS, k=1, sampling=sampling, seed=0)) == len(PROMPTS)


def drop_end(choice: dict[str, Any]) -> None:
    if choice["finish_reason"] == "stop":
        choice["token_ids"].pop()
        choice["logprobs"]["token_logprobs"].pop()


def run_on(choice: dict[str, Any]) -> None:
    if choice["finish_reason"] == "stop":
        choice["token_ids"].insert(0, CHAT.end_token_id)
        choice["logprobs"]["token_logprobs"].append(-1.0)


def add_many(choice: dict[str, Any]) -> None:
    choice["token_ids"] = [LETTERS[0]] * 21
    choice["logprobs"]["token_logprobs"] = [-1.0] * 21


def edited(change: Callable[[dict[str, Any]], object]) -> Misbehaviour:
    return lambda request, reply: reply.edit(change)


def replaced(reply: Reply) -> Misbehaviour:
    return lambda *_: reply


def spoil(request: dict[str, Any], reply: Reply) -> Reply:
    return reply.edit(lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, float("nan")))


MISBEHAVIOURS: dict[str, tuple[Misbehaviour, type[PrefloopError], str]] = {
    "no ids": (edited(lambda c: c.pop("token_ids")), InputError, "text without token ids .*; use vLLM 0.10.2"),
    "no logps": (edited(lambda c: c.pop("logprobs")), InputError, "returns no log-probabilities"),
    "another prompt": (edited(lambda c: c["prompt_token_ids"].insert(0, 1)), EngineError, r"changed prompt '\w+': "),
    "a logp too few": (edited(lambda c: c["logprobs"]["token_logprobs"].pop()), EngineError, r"sent \d+ log-prob"),
    "a logp of NaN": (spoil, EngineError, r"1 of \d+ log-probabilities are not numbers.*try float32"),
    "no end token": (edited(drop_end), EngineError, "says 'stop' and 'no end' is right"),
    "goes on past the end": (edited(run_on), EngineError, "goes on past its end; the server does not honour"),
    "too many tokens": (edited(add_many), EngineError, "has 21 tokens; expected 1 to 20"),
    "no tokens": (
        edited(lambda c: c.update(token_ids=[], logprobs={"token_logprobs": []})),
        EngineError,
        "has 0 tokens; expected 1 to 20",
    ),
    "another reason": (
        edited(lambda c: c.update(finish_reason="abort")),
        EngineError,
        "says 'abort' and '(stop|length)'",
    ),
    "no answer": (replaced(Reply.of({"choices": []})), EngineError, "sent 0 answers in place of 1"),
    "no JSON": (replaced(Reply(b"<html>")), EngineError, "is not JSON; check server.url"),
    "other JSON": (
        replaced(Reply.of({"answer": 42})),
        EngineError,
        r"not what the completions protocol says \(choices\)",
    ),
    "half an answer": (
        lambda _, r: replace(r, announced=len(r.body) + 9),
        EngineError,
        "cannot be reached, or broke off",
    ),
    "an error": (replaced(refusal(500, "out of memory")), EngineError, "failed on answer .*500: .*out of memory"),
    "a refusal": (
        replaced(refusal(400, "no top_k here")),
        InputError,
        "does not take .* answer .*400: .*no top_k here",
    ),
    "not found": (replaced(refusal(404, "no such path")), InputError, "404: .*no such path.*check server.url"),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_server_that_misbehaves_is_told_by_its_url_and_the_fault(name: str) -> None:
    misbehave, error, says = MISBEHAVIOURS[name]
    with loopback(misbehave=misbehave) as bad, pytest.raises(error, match=says) as caught:
        engine(bad.url).sample(PROMPTS, k=2, sampling=SAMPLING, seed=3)
    assert bad.url in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_does_not_know_stop_strings_is_noticed() -> None:
    ids = CHAT.response_ids("red, blue")
    choice = Choice(finish_reason="stop", token_ids=ids, logprobs=Logprobs(token_logprobs=[-1.0] * len(ids)))
    ask = Ask(place=0, k=1, prompt=PROMPTS[0], prompt_ids=[1], seed=0)
    assert response(Completion(choices=[choice]), ask, CHAT, SAMPLING, "url").text == "red, blue"
    with pytest.raises(EngineError, match="url: answer 1 to prompt 'colour' goes on past its end"):
        response(Completion(choices=[choice]), ask, CHAT, SAMPLING.replace(stop=(", ",)), "url")


def test_an_answer_that_takes_too_long_is_not_waited_for() -> None:
    started = time.monotonic()
    with loopback(misbehave=lambda _, reply: replace(reply, delay=5)) as slow:
        with pytest.raises(EngineError, match=r"nothing came back within 0.3 s \(answer \d to prompt '\w+'\); raise"):
            engine(slow.url, timeout=0.3).sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)
    assert time.monotonic() - started < 3


def test_a_failed_request_is_sent_again() -> None:
    unlucky, seen = {answer_seed(3, "hi", number) for number in range(2)}, list[int]()

    def fail_first(request: dict[str, Any], reply: Reply) -> Reply:
        seen.append(request["seed"])
        return refusal(503, "busy") if request["seed"] in unlucky and seen.count(request["seed"]) == 1 else reply

    with loopback(misbehave=fail_first) as busy:
        patient = ServerEngine(CHAT, Server(url=busy.url, retries=1), dtype="float32")
        groups = patient.sample(PROMPTS, k=2, sampling=SAMPLING, seed=3)
    assert len(seen) == 12 and len(set(seen)) == 10
    assert ids_of(groups) == ids_of(server(64).sample(PROMPTS, k=2, sampling=SAMPLING, seed=3))


def test_one_failure_among_many_ends_the_call_and_what_was_not_sent_stays_unsent() -> None:
    def fail_one(request: dict[str, Any], reply: Reply) -> Reply:
        return refusal(500, "once") if request["seed"] == answer_seed(3, "hi", 1) else reply

    finished = list[int]()
    with loopback(misbehave=fail_one) as bad, pytest.raises(EngineError, match="answer 1 to prompt 'hi'"):
        engine(bad.url, concurrency=1).sample(
            PROMPTS, k=4, sampling=SAMPLING, seed=3, advance=lambda n=1: finished.append(n)
        )
    assert len(finished) == 5 and len(bad.requests) == 6


def test_an_interruption_comes_through_and_the_engine_goes_on() -> None:
    def interrupt(n: int = 1, /) -> None:
        raise KeyboardInterrupt

    ours = server(2)
    with pytest.raises(KeyboardInterrupt):
        ours.sample(PROMPTS, k=4, sampling=SAMPLING, seed=3, advance=interrupt)
    assert len(ours.sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)) == 5


def test_a_server_that_is_not_there() -> None:
    with loopback() as running:
        url = running.url
    with pytest.raises(EngineError, match=f"{url} cannot be reached.*Connection refused.*is it running"):
        engine(url).sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)


def test_a_path_without_the_protocol() -> None:
    with pytest.raises(InputError, match=r"not found \(404.*\) asking for the list of models; check server.url"):
        engine(shared().url + "/elsewhere").sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)


def test_models_are_named() -> None:
    with loopback(names=["llama-8b", "qwen-7b"]) as two:
        with pytest.raises(InputError, match=r"serves 2 models \(llama-8b, qwen-7b\); name one with server.model"):
            engine(two.url).sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)
        with pytest.raises(InputError, match=r"'llama8b'; it serves llama-8b, qwen-7b. Did you mean 'llama-8b'\?"):
            engine(two.url, model="llama8b").sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)
        engine(two.url, model="qwen-7b").sample(PROMPTS[:1], k=1, sampling=SAMPLING, seed=3)
        assert two.requests[-1]["model"] == "qwen-7b"


def test_an_adapter_is_taken_by_its_name_only() -> None:
    models = [Model(id="base"), Model(id="adapter", parent="base")]
    assert choose_model(models, "", "url").id == "base"
    assert choose_model(models, "adapter", "url").id == "adapter"


def test_the_key_opens_the_server_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback(api_key="open-sesame") as running:
        monkeypatch.delenv("SERVER_KEY", raising=False)
        with pytest.raises(InputError, match=r"let us not in \(401\); put its key into \$SERVER_KEY"):
            engine(running.url, api_key_env="SERVER_KEY").sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)
        monkeypatch.setenv("SERVER_KEY", "open-barley")
        with pytest.raises(InputError, match=r"is the key right that is in \$SERVER_KEY") as caught:
            engine(running.url, api_key_env="SERVER_KEY").sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)
        assert "barley" not in str(caught.value)
        monkeypatch.setenv("SERVER_KEY", "open-sesame")
        ours = engine(running.url, api_key_env="SERVER_KEY")
        assert len(ours.sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)) == 5
        running.misbehave = replaced(refusal(500, "who said open-sesame?"))
        with pytest.raises(EngineError, match=r"who said \*\*\*\?"):
            ours.sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)


def test_a_proxy_of_the_environment_is_not_asked_for_a_server_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(engine(shared().url).sample(PROMPTS[:1], k=1, sampling=SAMPLING, seed=3)) == 1


def test_no_more_requests_are_open_than_allowed() -> None:
    lock, open_now, most = threading.Lock(), 0, 0

    def work(item: int) -> int:
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        time.sleep(0.02)
        with lock:
            open_now -= 1
        return item * item

    assert sorted(in_threads(work, range(12), 3)) == [(n, n * n) for n in range(12)]
    assert most == 3


def test_the_smaller_of_two_contexts_counts() -> None:
    small = ServerEngine(CHAT, Server(url=shared().url), context=40)
    with pytest.raises(InputError, match="context of 40"):
        small.prompt_lengths(PROMPTS, sampling=SAMPLING)
    large = ServerEngine(CHAT, Server(url=shared().url), context=10**6)
    with pytest.raises(InputError, match="context of 1024"):
        large.prompt_lengths(PROMPTS, sampling=SAMPLING.replace(max_new_tokens=1024))


def test_nothing_is_sampled_after_close() -> None:
    ours = server(1)
    ours.close()
    ours.close()
    with pytest.raises(InputError, match="this engine was closed"):
        ours.sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)


def test_without_the_client_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'prefloop\[server\]'"):
        server(1)
    assert server_obstacle(SAMPLING) == "openai is not installed (pip install 'prefloop[server]')"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("", ""),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("https://host/some/path", "https://host/some/path"),
    ],
)
def test_urls_are_completed(given: str, used: str) -> None:
    assert Server(url=given).url == used


def test_arguments_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(InputError, match=r"server.args = .*: no closing quotation; quote as in a shell"):
        parse_config(Server, {"args": "--name 'a"})


def test_urls_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match=r"server.url = '127.0.0.1:8000': expected http://HOST:PORT/v1"):
        parse_config(Server, {"url": "127.0.0.1:8000"})
    with pytest.raises(InputError, match=r"put the key into server.api_key_env") as caught:
        parse_config(Server, {"url": "http://me:secret@host/v1"})
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match=r"server.url is missing"):
        ServerEngine(CHAT, Server())


def test_the_shared_server_reads_what_it_is_sent() -> None:
    """A value left out would be the server's own, and change the answers: the contract battery rests on this."""
    server(1).sample(PROMPTS[:1], k=1, sampling=SAMPLING, seed=3)
    body = shared().requests[-1]
    whole = json.loads(shared().complete(body).body)
    colder = json.loads(shared().complete({name: body[name] for name in body if name != "temperature"}).body)
    assert whole["choices"][0]["token_ids"] != colder["choices"][0]["token_ids"]
    del body["repetition_penalty"]
    assert shared().complete(body).status == 400
