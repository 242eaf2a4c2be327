"""The sampling stage on a model folder: shards, resume to the same records, counts, engines by name."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from prefloop.config import Config
from prefloop.errors import CheckFailed, InputError
from prefloop.models import ModelRef
from prefloop.records import Group, Prompt
from prefloop.run import Run, Stage
from prefloop.sample import stage as stages
from prefloop.sample.engine import Engine, shards
from prefloop.sample.engines import ENGINES, EngineKind, EngineSetting
from prefloop.sample.sampling import Sampling
from prefloop.sample.scripted import ScriptedEngine
from prefloop.sample.stage import sample
from prefloop.sample.transformers import TransformersEngine
from prefloop.train.config import Compute
from tests.sample.engines import CHAT, PROMPTS, ids_of, stopping_llama

SAMPLING = Sampling(max_new_tokens=30)
COMPUTE = Compute(device="cpu", sampling_dtype="float32", sequences_per_batch=6)


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """One batch a shard, so that a few prompts make several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "BATCHES", 1)
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    folder = tmp_path_factory.mktemp("model")
    stopping_llama().save_pretrained(folder)
    CHAT.tokenizer.save_pretrained(folder)
    return ModelRef.of(folder)


@pytest.fixture(scope="module")
def uninterrupted(policy: ModelRef) -> list[Group]:
    return sample(policy, PROMPTS, k=3, sampling=SAMPLING, seed=1, compute=COMPUTE, engine="transformers")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[list[str]]]:
    """Registers a transformers engine that notes the prompts of each shard and is killed after `kill_after` of them."""

    def watch(kill_after: int | None) -> list[list[str]]:
        sampled: list[list[str]] = []

        class Watched(TransformersEngine):
            def sample(self, prompts: Sequence[Prompt], **options) -> list[Group]:
                if len(sampled) == kill_after:
                    raise Killed
                sampled.append([prompt.id for prompt in prompts])
                return super().sample(prompts, **options)

        def load(policy: ModelRef, setting: EngineSetting) -> Engine:
            return Watched(stopping_llama(), CHAT, batch_size=setting.batch_size)

        monkeypatch.setitem(ENGINES, "transformers", EngineKind(load, lambda *_: None))
        return sampled

    return watch


def run_stage(policy: ModelRef, scratch: Path, **changes) -> tuple[list[Group], Stage]:
    stage = Stage(name="groups", scratch=scratch)
    options = {"k": 3, "sampling": SAMPLING, "seed": 1, "compute": COMPUTE, "engine": "transformers", **changes}
    return sample(policy, PROMPTS, stage=stage, **options), stage


def test_answers_of_a_folder_equal_those_of_its_model(policy: ModelRef, uninterrupted: list[Group]) -> None:
    engine = TransformersEngine(stopping_llama(), CHAT, batch_size=6)
    assert ids_of(uninterrupted) == ids_of(engine.sample(PROMPTS, k=3, sampling=SAMPLING, seed=1))


def test_shards_fill_a_batch_with_prompts_of_similar_length() -> None:
    assert shards([5, 9, 4, 8, 5], k=2, answers=4) == [[2, 0], [4, 3], [1]]
    assert shards([5, 9, 4], k=3, answers=8) == [[2, 0], [1]]
    assert shards([5, 9, 4], k=16, answers=8) == [[2], [0], [1]]


def test_a_killed_stage_continues_to_the_same_records(
    policy: ModelRef, uninterrupted: list[Group], watched: Callable[[int | None], list[list[str]]], tmp_path: Path
) -> None:
    first = watched(2)
    with pytest.raises(Killed):
        run_stage(policy, tmp_path)
    second = watched(None)
    groups, _ = run_stage(policy, tmp_path)
    assert [group.to_json() for group in groups] == [group.to_json() for group in uninterrupted]
    assert first == [["hi", "colour"], ["tea", "count"]] and second == [["capital"]]


def damage_end(data: bytes) -> bytes:
    return data[:-20]


def damage_line(data: bytes) -> bytes:
    return data[: data.rstrip().rfind(b"\n") + 1]


def damage_digit(data: bytes) -> bytes:
    at = data.rfind(b'"token_ids":[') + len(b'"token_ids":[')
    return data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :]


def damage_encoding(data: bytes) -> bytes:
    return data[:200] + b"\xff" + data[201:]


def damage_everything(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [damage_end, damage_line, damage_digit, damage_encoding, damage_everything])
def test_a_damaged_shard_is_sampled_again(
    policy: ModelRef,
    uninterrupted: list[Group],
    watched: Callable[[int | None], list[list[str]]],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
) -> None:
    run_stage(policy, tmp_path)
    victim = next(file for file in sorted(tmp_path.iterdir()) if b'"id":"tea"' in file.read_bytes())
    whole = victim.read_bytes()
    victim.write_bytes(damage(whole))
    sampled = watched(None)
    groups, _ = run_stage(policy, tmp_path)
    assert sampled == [["tea", "count"]]
    assert groups == uninterrupted
    assert victim.read_bytes() == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"k": 2},
        {"sampling": SAMPLING.replace(temperature=0.9)},
        {"compute": COMPUTE.replace(sampling_dtype="bfloat16")},
    ],
)
def test_shards_of_another_request_are_not_taken(
    policy: ModelRef, watched: Callable[[int | None], list[list[str]]], tmp_path: Path, changes: dict
) -> None:
    run_stage(policy, tmp_path)
    sampled = watched(None)
    run_stage(policy, tmp_path, **changes)
    assert sum(len(shard) for shard in sampled) == 5


def test_counts_and_note_are_those_of_the_answers(policy: ModelRef, uninterrupted: list[Group], tmp_path: Path) -> None:
    responses = [response for group in uninterrupted for response in group.responses]
    finished = sum(response.finish_reason == "stop" for response in responses)
    expected = {
        "answers": 15,
        "answers finished": finished,
        "answers unfinished": 15 - finished,
        "tokens": sum(response.length_tokens for response in responses),
    }
    assert 0 < finished < 15
    for _ in range(2):
        _, stage = run_stage(policy, tmp_path)
        assert stage.counts == expected


def test_in_a_run_the_note_gives_the_rate_and_scratch_is_removed(
    policy: ModelRef, uninterrupted: list[Group], tmp_path: Path
) -> None:
    with Run.open(tmp_path / "run", recipe="test", config=Config()) as run:
        groups = run.stage("groups", sample, policy, PROMPTS, k=3, sampling=SAMPLING, seed=1, compute=COMPUTE,
                           engine="transformers")  # fmt: skip
    assert groups == uninterrupted
    events = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8")
    assert "15 answers, " in events and " tokens/s" in events
    assert not list((tmp_path / "run").rglob("groups-*"))


def test_texts_with_other_line_separators_survive_a_resume(tmp_path: Path) -> None:
    engine = ScriptedEngine(CHAT, lambda prompt, k, seed: "one\u2028two\x85three\r\nfour")
    groups = engine.sample(PROMPTS[:1], k=1, sampling=SAMPLING, seed=0)
    file = tmp_path / "shard.jsonl"
    stages._write_shard(file, groups)
    assert stages._read_shard(file) == groups


def test_no_prompts_load_no_model() -> None:
    nowhere = ModelRef(name="nowhere", path=Path("nowhere"), fingerprint="", weights="")
    assert sample(nowhere, [], k=3, sampling=SAMPLING, seed=1, compute=COMPUTE) == []


def test_bad_requests_are_refused_before_the_model_loads() -> None:
    nowhere = ModelRef(name="nowhere", path=Path("nowhere"), fingerprint="", weights="")
    with pytest.raises(InputError, match="k = 0: expected at least 1"):
        sample(nowhere, PROMPTS, k=0, sampling=SAMPLING, seed=1, compute=COMPUTE)
    with pytest.raises(InputError, match="'tea' occurs twice"):
        sample(nowhere, [*PROMPTS, PROMPTS[3]], k=1, sampling=SAMPLING, seed=1, compute=COMPUTE)


def test_a_prompt_without_room_is_refused_before_any_shard(
    policy: ModelRef, watched: Callable[[int | None], list[list[str]]]
) -> None:
    sampled = watched(None)
    prompts = [*PROMPTS, Prompt.of("x" * 1020, id="long")]
    with pytest.raises(InputError, match="'long'"):
        sample(policy, prompts, k=1, sampling=SAMPLING, seed=1, compute=COMPUTE)
    assert sampled == []


def test_the_scripted_engine_runs_by_name(policy: ModelRef) -> None:
    groups = sample(policy, PROMPTS, k=2, sampling=SAMPLING, seed=1, compute=COMPUTE, engine="scripted")
    assert [group.prompt for group in groups] == PROMPTS
    assert groups[1].responses[1].text == "Answer 2: Hi"


def test_the_gap_between_sampler_and_trainer_is_measured(policy: ModelRef, tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", recipe="test", config=Config()) as run:
        run.stage("groups", sample, policy, PROMPTS, k=3, sampling=SAMPLING, seed=1, compute=COMPUTE,
                  engine="transformers")  # fmt: skip
        figures = run.manifest["groups"]["figures"]
    assert 0 <= figures["sampler gap, mean nats a token"] <= figures["sampler gap, 99th percentile"] < 1e-4
    assert figures["tokens/s"] > 0


def test_an_engine_with_other_weights_stops_the_run_after_its_first_shard(
    policy: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[int] = []

    class Stale(TransformersEngine):
        def sample(self, prompts: Sequence[Prompt], **options) -> list[Group]:
            sampled.append(len(prompts))
            return super().sample(prompts, **options)

    def load(policy: ModelRef, setting: EngineSetting) -> Engine:
        return Stale(stopping_llama(seed=1), CHAT, batch_size=setting.batch_size)

    monkeypatch.setitem(ENGINES, "transformers", EngineKind(load, lambda *_: None))
    with pytest.raises(
        CheckFailed, match=r"'transformers' does not sample from .*: .* differ .* at most 0.002 expected"
    ):
        sample(policy, PROMPTS, k=3, sampling=SAMPLING, seed=1, compute=COMPUTE, engine="transformers")
    assert len(sampled) == 1


def test_what_an_engine_with_other_weights_sampled_is_not_kept(
    policy: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(policy: ModelRef, setting: EngineSetting) -> Engine:
        return TransformersEngine(stopping_llama(seed=1), CHAT, batch_size=setting.batch_size)

    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "transformers", EngineKind(load, lambda *_: None))
        for k in (1, 3):  # one shard, and several
            with pytest.raises(CheckFailed, match="not kept"):
                run_stage(policy, tmp_path, k=k)
    assert not list(tmp_path.glob("groups-*"))
    run_stage(policy, tmp_path)
