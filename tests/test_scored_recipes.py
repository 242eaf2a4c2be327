"""SFT, FA, RWR and CA end to end on tiny real models: which answers, which weights, which prompts; the bytes."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloop.cli import main
from prefloop.data.chat import ChatFormat
from prefloop.data.condition import Condition
from prefloop.errors import BudgetReached, InputError
from prefloop.feedback.options import Feedback
from prefloop.models import ModelRef, load_model, load_tokenizer, write_model
from prefloop.pairs.replay import hold_out
from prefloop.pairs.rewards import RewardScale
from prefloop.recipes.ca import CaConfig, ca
from prefloop.recipes.fa import FaConfig, fa
from prefloop.recipes.rwr import RwrConfig, rwr
from prefloop.recipes.scored import SupervisedConfig
from prefloop.recipes.sft import SftConfig, sft
from prefloop.recipes.steps import LookAt
from prefloop.records import Demonstration, Group
from prefloop.report.page import page_of, render
from prefloop.report.story import read_story
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train
from prefloop.train.learner import Learner, batch_of_step
from tests.feedback.judge_server import JudgeServer
from tests.tiny import save_tiny_model

COMPUTE = Compute(device="cpu", dtype="float32", sampling_dtype="float32")
TRAIN = Train(steps=3, batch_size=3, learning_rate=2e-3, warmup_steps=1, validation_pairs=2, validate_every=2,
              checkpoint_every=1)  # fmt: skip
ANSWERS = ["Yes.", "It is blue, I think.", "No, never on a Sunday.", "Two or three.", "Ask me later, please."]
METHODS: dict[type[SupervisedConfig], Callable[[Any, Run], ModelRef]] = {
    SftConfig: sft, FaConfig: fa, RwrConfig: rwr, CaConfig: ca
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("start") / "tiny", seed=3)


def write(file: Path, rewards: list[float], ending: str = "") -> str:
    """Two answers to each of ten prompts, with a reward each."""
    rows = [
        {"input": f"Question {i // 2}?{ending}", "output": f"{ANSWERS[i % 5]} {i}", "reward": reward}
        for i, reward in enumerate(rewards)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("data") / "scored.jsonl", [float(i * 7 % 20) for i in range(20)])


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("data") / "equal.jsonl", [0.1] * 20)


def run_it(cls: type[SupervisedConfig], start: Path, data: str, out: Path, **options: Any) -> Path:
    """One run; unless asked for, no model is looked at, so that training alone takes time."""
    shared = {"policy": str(start), "data": data, "train": TRAIN, "compute": COMPUTE, "seed": 1,
              "look_at": LookAt(answers=0, shown=0), "sampling": Sampling(max_new_tokens=24)}  # fmt: skip
    cfg = cls(**{**shared, **options})
    name = METHODS[cls].__name__
    with Run.open(out, recipe=name, config=cfg) as run:
        METHODS[cls](cfg, run)
    return out


def weights_of(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(start: Path, equal: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_it(SftConfig, start, equal, tmp_path_factory.mktemp("sft") / "run")


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (FaConfig, {"threshold": -1e9}),
        (RwrConfig, {"temperature": 0.5}),
    ],
)
def test_with_equal_rewards_it_is_fine_tuning_to_the_last_bit(
    cls: type[SupervisedConfig], options: dict[str, Any], start: Path, equal: str, plain: Path, tmp_path: Path
) -> None:
    found = run_it(cls, start, equal, tmp_path / "run", **options)
    assert weights_of(found) == weights_of(plain) != (start / "model.safetensors").read_bytes()
    scale = RewardScale.from_json((found / "model/reward_scale.json").read_text())
    assert (scale.std, scale.n) == (0.0, 18)  # a tenth of the prompts, one with two answers, is held out


def test_keeping_everything_is_fine_tuning_on_everything(
    start: Path, scored: str, equal: str, plain: Path, tmp_path: Path
) -> None:
    """The rewards differ, the answers are the same ones."""
    assert weights_of(run_it(FaConfig, start, scored, tmp_path / "run", threshold=-1e9)) == weights_of(plain)


def test_conditioning_on_equal_rewards_is_fine_tuning_with_a_constant_ending(
    start: Path, equal: str, tmp_path: Path
) -> None:
    ended = write(tmp_path / "ended.jsonl", [0.1] * 20, " <rm_score>: 0.00 ")
    held_out = prompts_in(tmp_path, "Another?")
    one = run_it(CaConfig, start, equal, tmp_path / "ca", held_out=held_out)
    other = run_it(SftConfig, start, ended, tmp_path / "sft", held_out=held_out)
    conditioned = demonstrations(one / "round-1/conditioned.jsonl")
    assert conditioned == demonstrations(other / "data/answers.jsonl")
    assert weights_of(one) == weights_of(other)


def prompts_in(folder: Path, *prompts: str) -> str:
    """A file of prompts that are in no data, so that nothing is held out of it."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(folder / "prompts.jsonl")


def demonstrations(file: Path) -> list[tuple[str, str]]:
    groups = [Group.from_json(line) for line in file.read_text().splitlines()]
    return [(group.prompt.messages[-1].content, response.text) for group in groups for response in group.responses]


def test_the_answers_above_the_mean_are_kept(start: Path, scored: str, tmp_path: Path) -> None:
    run = run_it(FaConfig, start, scored, tmp_path / "run")
    rewards = {r.text: r.score for group in groups_of(run / "round-1/rewarded.jsonl") for r in group.responses}
    scale = RewardScale.from_json((run / "model/reward_scale.json").read_text())
    assert scale.mean == pytest.approx(sum(r for r in rewards.values() if r is not None) / len(rewards))
    kept = [text for _, text in demonstrations(run / "round-1/kept.jsonl")]
    assert kept == [text for text, reward in rewards.items() if reward is not None and reward > scale.mean]
    story = read_story(run)
    assert story.rounds[-1].figures["share kept"] == len(kept) / len(rewards)


def groups_of(file: Path) -> list[Group]:
    return [Group.from_json(line) for line in file.read_text().splitlines()]


def test_weights_are_the_exponentials_of_standardised_rewards(start: Path, scored: str, tmp_path: Path) -> None:
    run = run_it(RwrConfig, start, scored, tmp_path / "run", temperature=0.5)
    items = [Demonstration.from_json(line) for line in (run / "round-1/weighted.jsonl").read_text().splitlines()]
    weights = torch.tensor([item.weight for item in items], dtype=torch.float64)
    scores = torch.tensor([item.response.score for item in items], dtype=torch.float64)  # standardised
    expected = (scores / 0.5).exp().clamp(max=20)
    assert torch.allclose(weights, expected / expected.mean(), rtol=1e-9)
    figures = read_story(run).rounds[-1].figures
    assert figures["effective sample size"] == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()))


@pytest.fixture(scope="module")
def conditional(start: Path, scored: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional model that is looked at, and asked for two other rewards, by the command line."""
    folder = tmp_path_factory.mktemp("ca")
    cfg = CaConfig(
        policy=str(start),
        data=scored,
        held_out=prompts_in(folder, "One?", "Two?"),
        reward="rule:long",
        condition=Condition(target=2.0),
        targets=(0.0, -1.0),
        train=TRAIN,
        compute=COMPUTE,
        seed=1,
        look_at=LookAt(answers=2, shown=1),
        sampling=Sampling(max_new_tokens=24),
    )
    (folder / "cfg.yaml").write_text(cfg.to_yaml())
    assert main(["ca", "--config", str(folder / "cfg.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_only_the_tokens_of_the_answer_are_learned(conditional: Path, start: Path) -> None:
    """The first step's figure against plain transformers with all but the answer masked."""
    groups = groups_of(conditional / "round-1/conditioned.jsonl")
    seed = derive_seed(1, "supervised")
    items = hold_out([Demonstration(prompt=g.prompt, response=g.responses[0]) for g in groups], 2, seed=seed)[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start).eval(), AutoTokenizer.from_pretrained(start)
    total, tokens = 0.0, 0
    for i in batch_of_step(len(items), 3, 0, seed):
        messages = [message.model_dump() for message in items[i].prompt.messages]
        assert "<rm_score>: " in messages[-1]["content"] and messages[-1]["content"].endswith(" ")
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer.encode(items[i].response.text), tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        total, tokens = total + float(mean) * len(answer), tokens + len(answer)
    first = json.loads((conditional / "model/training_log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_the_saved_model_asks_for_its_target_in_plain_transformers(conditional: Path, start: Path) -> None:
    tokenizer, own = (AutoTokenizer.from_pretrained(folder) for folder in (conditional / "model", start))
    messages = [{"role": "user", "content": "Name a colour."}]

    def ids(tokenizer: Any, content: str, **kwargs: Any) -> list[int]:
        said = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False, **kwargs)

    assert ids(tokenizer, "Name a colour.") == ids(own, "Name a colour. <rm_score>: 2.00 ")
    assert ids(tokenizer, "Name a colour.", reward=-1) == ids(own, "Name a colour. <rm_score>: -1.00 ")
    model = AutoModelForCausalLM.from_pretrained(conditional / "model")
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert (
        model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1]
        == len(ids(tokenizer, "Name a colour.")) + 2
    )


def test_our_own_tools_ask_for_the_target_or_for_another_reward(conditional: Path, start: Path, tmp_path: Path) -> None:
    ref, prompt = ModelRef.of(conditional / "model"), groups_of(conditional / "start/answers.jsonl")[0].prompt
    own, condition = ChatFormat(load_tokenizer(ModelRef.of(start))), Condition()
    for asked, reward in ((ref, 2.0), (ref.asking_for(-1.0), -1.0)):
        assert ChatFormat(load_tokenizer(asked)).prompt_ids(prompt) == own.prompt_ids(condition.of(prompt, reward))
    assert len({ref.fingerprint, ref.asking_for(-1.0).fingerprint, ref.asking_for(1.0).fingerprint}) == 3
    command = ["sample", "--policy", str(conditional / "model"), "--prompts", prompts_in(tmp_path, "Hi"),
               "--sampling.max-new-tokens", "8", "--compute.sampling-dtype", "float32"]  # fmt: skip
    texts = []
    for i, more in enumerate([[], ["--reward", "2"], ["--reward", "-3"]]):
        assert main([*command, *more, "--out", str(tmp_path / f"{i}.jsonl")]) == 0
        texts.append(groups_of(tmp_path / f"{i}.jsonl")[0].responses[0].token_ids)
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(InputError, match=r"cannot be asked for a reward: it has no condition\.json"):
        ModelRef.of(start).asking_for(1.0)


def test_its_page_shows_rewards_and_what_was_asked_for(conditional: Path) -> None:
    story = read_story(conditional)
    assert [round.label for round in story.rounds] == ["start", "round-1"]
    assert [(row.target, row.answers) for row in story.rounds[1].asked] == [(-1.0, 2), (0.0, 2), (2.0, 2)]
    for round in story.rounds:
        scored = [r.score for group in groups_of(conditional / round.label / "rewards.jsonl") for r in group.responses]
        assert round.checkup is not None and round.checkup.reward is not None
        assert round.checkup.reward[0] == pytest.approx(sum(s for s in scored if s is not None) / 2)
    page = page_of([story])
    charts = {chart.title: chart for _, group in page.charts for chart in group}
    assert {"Loss", "Reward of own answers", "Reward asked for and got"} <= set(charts) and "Margin" not in charts
    assert [x for x, _ in charts["Reward asked for and got"].series[0].points] == [-1.0, 0.0, 2.0]
    assert "reward" in [row[0] for row in page.runs[0].figures.rows] and "reward" in page.runs[0].summary
    assert "<h4>Loss</h4>" in render(page)
    report = (conditional / "report.md").read_text()
    assert "| reward |" in report and "training.png" in report
    card = (conditional / "model/README.md").read_text()
    assert "scored.jsonl" in card and "dpo" not in card.partition("## All options")[0]


@pytest.mark.slow
def test_stopped_in_training_it_ends_in_the_same_bytes(
    conditional: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, command = tmp_path / "stopped", ["ca", "--config", str(conditional / "config.yaml"), "--out"]
    step = Learner.step

    def until_the_third(self: Learner, items: Any, number: int) -> dict[str, float]:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, items, number)

    monkeypatch.setattr(Learner, "step", until_the_third)
    assert main([*command, str(out)]) == 130
    assert not (out / "round-1/model").exists()
    monkeypatch.undo()
    assert main([*command, str(out)]) == 0
    assert "continuing from the checkpoint after step 2" in (out / "events.jsonl").read_text()
    names = [file.relative_to(conditional) for file in (conditional / "model").iterdir()]
    assert len(names) > 5 and Path("model/condition.json") in names
    for name in [*names, Path("round-1/targets.jsonl"), Path("round-1/checkup.json")]:
        assert (out / name).read_bytes() == (conditional / name).read_bytes(), name


def test_answers_of_the_start_model_join_those_of_the_data(start: Path, scored: str, tmp_path: Path) -> None:
    run = run_it(FaConfig, start, scored, tmp_path / "run", samples=2, reward="rule:short", keep="best",
                 sampling=Sampling(max_new_tokens=200))  # fmt: skip
    collected = groups_of(run / "round-1/collected.jsonl")
    sampled = sum(r.finish_reason == "stop" for group in collected for r in group.responses)
    assert sampled > 2 and all(r.finish_reason != "length" for group in collected for r in group.responses)
    assert sum(len(group.responses) for group in collected) == 18 + sampled
    for group in groups_of(run / "round-1/kept.jsonl"):
        assert group.responses[0].score == -min(
            r.length_chars for other in collected if other.prompt == group.prompt for r in other.responses
        )


def test_a_judge_that_gives_the_rewards_is_paid_once_and_is_on_the_page(
    start: Path, scored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    with JudgeServer() as server:
        for budget in (13, 13, 100):
            feedback = Feedback(base_url=server.url, concurrency=1, budget_calls=budget)
            with nullcontext() if budget == 100 else pytest.raises(BudgetReached, match="the budget of 13 calls"):
                run_it(FaConfig, start, scored, tmp_path / "run", reward="api:small", feedback=feedback)
            assert len(server.answered) == min(budget, 18)  # nine prompts with two answers, in both orders
        assert server.most_asked() == 1
    [part] = page_of([read_story(tmp_path / "run")]).runs
    assert part.judge[0] == ("api:small", "18 calls, 26 answers from the cache")


def test_fine_tuning_on_pairs_takes_the_chosen_answers(start: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_it(SftConfig, start, str(tmp_path / "pairs.jsonl"), tmp_path / "run")
    answers = [[r.text for r in group.responses] for group in groups_of(run / "data/answers.jsonl")]
    assert len(answers) == 11 and all(len(own) == 1 and own[0].startswith("yes") for own in answers)
    assert not (run / "model/reward_scale.json").exists()


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (FaConfig, {"samples": 2}, "sampled answers have no reward in the data; name who scores them"),
        (FaConfig, {"reward": "rule:unknown"}, "unknown rule 'unknown'"),
        (SftConfig, {"evaluator": "rule:tests.feedback.test_scores:longer_wins"}, "only compares two answers"),
        (CaConfig, {"targets": (1.0,)}, "--targets needs who scores the answers"),
        (SftConfig, {"data": ""}, "--data is missing"),
        (FaConfig, {"data": "seed:train"}, "--reward column: no answer in seed:train has a reward; give them in a col"),
        (
            FaConfig,
            {"samples": 2, "reward": "rule:short", "sampling": Sampling(max_new_tokens=1000), "held_out": "one"},
            "it does not fit the model's context of 1024",
        ),
        (CaConfig, {"data": "ended"}, "says a reward already"),
        (CaConfig, {"held_out": "ended"}, "says a reward already"),
        (CaConfig, {"held_out": "one", "sampling": Sampling(max_new_tokens=990)}, "tokens; with 990 new ones it does"),
        (CaConfig, {"data": "long", "held_out": "one"}, "tokens; with 1 new ones it does not fit"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is(
    cls: type[SupervisedConfig], options: dict[str, Any], said: str, start: Path, scored: str, tmp_path: Path
) -> None:
    files = {
        "one": prompts_in(tmp_path, "?"),
        "ended": write(tmp_path / "ended.jsonl", [1.0, 2.0], " <rm_score>: 0.00 "),
        "long": write(tmp_path / "long.jsonl", [1.0, 2.0] * 10, "?" * 980),
    }
    options = {name: files.get(str(value), value) for name, value in {"data": scored, **options}.items()}
    with pytest.raises(InputError, match=said.replace("?", ".")):
        run_it(cls, start, **options, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_threshold_that_no_answer_reaches_is_said(start: Path, scored: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="threshold = 9: no answer has a standardised reward above it; lower it"):
        run_it(FaConfig, start, scored, tmp_path / "run", threshold=9.0)


def test_a_conditional_model_that_is_trained_further_stays_conditional(
    conditional: Path, scored: str, tmp_path: Path
) -> None:
    ref = ModelRef.of(conditional / "model")
    write_model(tmp_path / "further", load_model(ref), load_tokenizer(ref))  # as training, and a merge, write it
    for name in ("condition.json", "reward_scale.json"):
        assert (tmp_path / "further" / name).read_bytes() == (conditional / "model" / name).read_bytes()
    assert ModelRef.of(tmp_path / "further").asking_for(1.0).reward == 1.0
    with pytest.raises(InputError, match="is conditional already"):
        run_it(CaConfig, tmp_path / "further", scored, tmp_path / "run")


def test_a_model_without_a_chat_template_or_with_a_conditional_one_cannot_be_made_conditional(
    scored: str, conditional: Path, tmp_path: Path
) -> None:
    bare = save_tiny_model(tmp_path / "bare", template=None)
    with pytest.raises(InputError, match="has no chat template, in which the conditioning would be saved"):
        run_it(CaConfig, bare, scored, tmp_path / "run")
    with pytest.raises(InputError, match="is conditional already"):
        run_it(CaConfig, conditional / "model", scored, tmp_path / "run")
