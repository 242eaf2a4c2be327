"""Where reference log-probabilities come from: scorer, disk cache, adapter off, second model; same bytes from all."""

import json
from pathlib import Path

import pytest
import torch
from tests.tiny import save_tiny_model

import prefloop.train.reference as reference
from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed
from prefloop.models import ModelRef, load_tokenizer
from prefloop.recipes.dpo import dpo_round
from prefloop.records import Pair, Prompt, Response
from prefloop.run import Run
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.learner import Learner
from prefloop.train.losses import parse_loss
from prefloop.train.objective import PairObjective
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import cache_key, with_reference_logps

DPO = PairObjective(parse_loss("dpo"))
COMPUTE = Compute(device="cpu", dtype="float32", tokens_per_forward=200)
TRAIN = Train(steps=2, batch_size=2, learning_rate=1e-3, warmup_steps=0, validation_pairs=1)
KNOWN, CACHED, OFF, COMPUTED = (
    f"reference log-probabilities {source}"
    for source in (
        "already known from scoring",
        "read from the disk cache",
        "computed with the adapter off",
        "computed",
    )
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/logps"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef.of(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def pairs(model: ModelRef) -> list[Pair]:
    chat = ChatFormat(load_tokenizer(model))
    words = ["red", "green tea", "a long walk home", "no", "yes, but later"]
    return [
        Pair(
            prompt=Prompt.of(f"Question {i}?", id=f"p{i}"),
            chosen=chat.with_token_ids(Response(text=words[i])),
            rejected=chat.with_token_ids(Response(text=words[(i + 2) % 5] * 2)),
        )
        for i in range(5)
    ]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that reference passes have loaded."""
    names: list[str] = []
    load_model = reference.load_model

    def counting(ref: ModelRef, **options: str) -> torch.nn.Module:
        names.append(ref.name)
        return load_model(ref, **options)

    monkeypatch.setattr(reference, "load_model", counting)
    return names


class Done:
    """A stage of reference log-probabilities, with what its run says of it."""

    def __init__(self, folder: Path, pairs: list[Pair], model: ModelRef, compute: Compute = COMPUTE) -> None:
        with Run.open(folder, recipe="test", config=TRAIN) as run:
            self.pairs = run.stage("pairs", with_reference_logps, pairs, model, compute=compute)
            self.bytes = self.pairs.path.read_bytes()
            self.counts = run.manifest["pairs"]["counts"]
        self.events = events(folder)
        self.notes = [event["text"] for event in self.events if event["event"] == "note"]


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def sources(folder: Path) -> list[tuple[str, int]]:
    return [(event["source"], event["pairs"]) for event in events(folder) if event["event"] == "reference"]


def test_what_the_scorer_knew_is_kept_and_no_model_is_loaded(
    tmp_path: Path, model: ModelRef, pairs: list[Pair], cache: Path, loads: list[str]
) -> None:
    known = [
        pair.model_copy(update={"reference_logps": (-1.0, -2.0), "reference": model.fingerprint}) for pair in pairs
    ]
    done = Done(tmp_path / "run", known, model)
    assert list(done.pairs) == known and done.counts == {KNOWN: 5} and loads == []
    assert sources(tmp_path / "run") == [("already known from scoring", 5)]
    assert not cache.exists()


def test_a_second_model_is_the_last_resort_and_its_pass_is_kept(
    tmp_path: Path, model: ModelRef, pairs: list[Pair], cache: Path, loads: list[str]
) -> None:
    first = Done(tmp_path / "first", pairs, model)
    assert first.counts == {KNOWN: 0, COMPUTED: 5} and loads == [model.name]
    (file,) = cache.iterdir()
    stored = json.loads(file.read_text().partition("\n")[2])
    assert stored["sums"] == [list(pair.reference_logps or ()) for pair in first.pairs]
    assert stored["counts"] == [[pair.chosen.length_tokens, pair.rejected.length_tokens] for pair in pairs]
    assert stored["path"] == "shared"

    second = Done(tmp_path / "second", pairs, model)
    assert second.bytes == first.bytes
    assert second.counts == {KNOWN: 0, CACHED: 5} and loads == [model.name]
    assert "5 pairs read from the disk cache: an earlier pass over the same rows" in second.notes[-1]
    assert [event["path"] for event in second.events if event["event"] == "path"] == ["shared"]


def test_the_cached_number_is_used_and_not_computed_again(
    tmp_path: Path, model: ModelRef, pairs: list[Pair], cache: Path
) -> None:
    Done(tmp_path / "first", pairs, model)
    (file,) = cache.iterdir()
    key = file.stem
    stored = json.loads(file.read_text().partition("\n")[2])
    stored["sums"][3] = [-1.5, -2.5]
    content = json.dumps(stored)
    file.write_text(f"{reference.sha256(key + content)}\n{content}")
    assert Done(tmp_path / "second", pairs, model).pairs[3].reference_logps == (-1.5, -2.5)


@pytest.mark.parametrize("damage", ["a digit", "cut", "bytes that are no text", "empty", "another key"])
def test_a_damaged_file_is_never_believed(
    tmp_path: Path, model: ModelRef, pairs: list[Pair], cache: Path, damage: str
) -> None:
    first = Done(tmp_path / "first", pairs, model)
    (file,) = cache.iterdir()
    text = file.read_text()
    start = text.index('"sums": [[-') + len('"sums": [[-')
    if damage == "another key":
        Done(tmp_path / "other", pairs[:4], model)
        (other,) = set(cache.iterdir()) - {file}
        file.write_bytes(other.read_bytes())
    else:
        changed = {
            "a digit": text[:start] + str(9 - int(text[start])) + text[start + 1 :],
            "cut": text[:-20],
            "empty": "",
        }
        file.write_bytes(changed[damage].encode() if damage in changed else b"\xff\xfe" + text.encode())
    again = Done(tmp_path / "again", pairs, model)
    assert again.bytes == first.bytes and again.counts == {KNOWN: 0, COMPUTED: 5}
    assert any("is damaged; its log-probabilities are computed again" in note for note in again.notes)
    assert file.read_text() == text


def test_everything_that_decides_the_numbers_is_in_the_key(model: ModelRef, tmp_path: Path) -> None:
    groups = [TokenGroup((1, 2), ((3, 4), (5,)))]
    other = ModelRef.of(save_tiny_model(tmp_path / "other", seed=1))
    keys = [
        cache_key(groups, model, COMPUTE),
        cache_key([TokenGroup((1, 2), ((3, 4), (6,)))], model, COMPUTE),
        cache_key([TokenGroup((1,), ((2, 3, 4), (5,)))], model, COMPUTE),
        cache_key(groups * 2, model, COMPUTE),
        cache_key(groups, other, COMPUTE),
        cache_key(groups, model, COMPUTE.replace(dtype="bfloat16")),
        cache_key(groups, model, COMPUTE.replace(tokens_per_forward=201)),
    ]
    assert len(set(keys)) == len(keys)
    # What does not touch the numbers does not miss the cache.
    assert cache_key(groups, model, COMPUTE.replace(sequences_per_batch=3)) == keys[0]


def test_a_cache_that_cannot_be_written_costs_time_and_not_the_run(
    tmp_path: Path, model: ModelRef, pairs: list[Pair], cache: Path
) -> None:
    Done(tmp_path / "first", pairs, model)
    (file,) = cache.iterdir()
    file.unlink()
    file.mkdir()
    done = Done(tmp_path / "second", pairs, model)
    assert done.counts == {KNOWN: 0, COMPUTED: 5}
    assert any("are not kept for later: cannot write" in note for note in done.notes)


def test_numbers_that_are_none_stop_the_run_and_are_not_kept(
    tmp_path: Path, model: ModelRef, pairs: list[Pair], cache: Path
) -> None:
    from prefloop.models import load_model, write_model

    broken = load_model(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[ord("r") - 33] = float("nan")
    write_model(tmp_path / "broken", broken, load_tokenizer(model))
    with pytest.raises(CheckFailed, match=r"log-probability \[.*nan.*\] of a response to prompt 'p\d' under .* finite"):
        with_reference_logps(pairs, ModelRef.of(tmp_path / "broken"), compute=COMPUTE)
    assert not cache.exists()


def lora_round(folder: Path, model: ModelRef, pairs: list[Pair], against: ModelRef | None = None) -> Path:
    config = TRAIN.replace(lora=Lora(rank=2).model_dump())
    with Run.open(folder, recipe="test", config=config) as run:
        trained = dpo_round(
            run.round(1), model, against or model, pairs, beta=0.1, train=config, compute=COMPUTE, seed=3
        )
    return trained.path


def test_with_an_adapter_its_base_is_the_reference_and_no_second_model_is_loaded(
    tmp_path: Path, model: ModelRef, pairs: list[Pair], loads: list[str]
) -> None:
    lora_round(tmp_path / "run", model, pairs)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert loads == [] and sources(tmp_path / "run") == [("computed with the adapter off", 5)]
    assert manifest["stages"]["round-1/model"]["counts"] == {KNOWN: 0, OFF: 5}


def test_adapter_off_gives_the_bytes_of_a_second_model_and_leaves_the_adapter_trainable(
    model: ModelRef, pairs: list[Pair], cache: Path, loads: list[str]
) -> None:
    config = TRAIN.replace(lora=Lora(rank=2).model_dump())
    learner = Learner(model, pairs, objective=DPO, config=config, compute=COMPUTE, seed=0)
    with torch.no_grad():
        for name, weight in learner.trained:
            if "lora_B" in name:
                weight.fill_(0.1)
    off = learner.with_reference_logps(pairs)
    assert loads == []
    (file,) = cache.iterdir()
    kept = file.read_bytes()
    file.unlink()
    assert with_reference_logps(pairs, model, compute=COMPUTE) == off and loads == [model.name]
    assert file.read_bytes() == kept
    # Switched on again, it is another model, and all of it is in training.
    on = learner.evaluate(off)
    assert abs(on["chosen_change"]) > 0.1
    assert all(weight.requires_grad for _, weight in learner.trained)


def test_an_adapter_round_reads_the_cache_before_it_switches_the_adapter_off(
    tmp_path: Path, model: ModelRef, pairs: list[Pair]
) -> None:
    first = lora_round(tmp_path / "first", model, pairs)
    second = lora_round(tmp_path / "second", model, pairs)
    assert sources(tmp_path / "second") == [("read from the disk cache", 5)]
    for name in ("model.safetensors", "training_log.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_an_adapter_with_another_reference_takes_a_second_model(
    tmp_path: Path, model: ModelRef, pairs: list[Pair], loads: list[str]
) -> None:
    other = ModelRef.of(save_tiny_model(tmp_path / "other", seed=1))
    lora_round(tmp_path / "run", model, pairs, against=other)
    assert loads == [other.name] and sources(tmp_path / "run") == [("computed", 5)]
