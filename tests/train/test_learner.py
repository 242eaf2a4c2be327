"""Training rounds on a tiny real model: closed forms, invariances, resume to the same bytes, broken things stopped."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import save_tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed, InputError
from prefloop.models import ModelRef, load_tokenizer
from prefloop.records import Pair, Prompt, Response
from prefloop.run import Run
from prefloop.train.attention import NAME, shared_prefix
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.learner import Learner, batch_of_step, fit, recompute_activations
from prefloop.train.logprobs import Path as LogpsPath
from prefloop.train.logprobs import response_logps, rows
from prefloop.train.losses import parse_loss
from prefloop.train.objective import PairObjective
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import logps_under, with_reference_logps

DPO = PairObjective(parse_loss("dpo"))
COMPUTE = Compute(device="cpu", dtype="float32")
TRAIN = Train(steps=4, batch_size=3, learning_rate=1e-3, warmup_steps=2, validation_pairs=0, checkpoint_every=2,
              validate_every=2)  # fmt: skip
WORDS = ["red", "green tea", "a long walk home", "no", "yes, but later", "seven", "ask again"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Log-probabilities that earlier runs of the tests have cached are not seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFLOOP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef.of(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def pairs(policy: ModelRef) -> list[Pair]:
    chat = ChatFormat(load_tokenizer(policy))
    made = [
        Pair(
            prompt=Prompt.of(f"Question {i}: what is best?", id=f"p{i}"),
            chosen=chat.with_token_ids(Response(text=WORDS[i])),
            rejected=chat.with_token_ids(Response(text=WORDS[(i + 3) % 7] * 2)),
        )
        for i in range(7)
    ]
    return with_reference_logps(made, policy, compute=COMPUTE)


def new_learner(policy: ModelRef, pairs: list[Pair], config: Train = TRAIN, compute: Compute = COMPUTE) -> Learner:
    return Learner(policy, pairs, objective=DPO, config=config, compute=compute, seed=0)


def train(folder: Path, policy: ModelRef, pairs: list[Pair], config: Train = TRAIN) -> Path:
    with Run.open(folder, recipe="test", config=config) as run:
        made = run.stage("model", fit, policy, pairs, pairs[:2], objective=DPO, config=config,
                         compute=COMPUTE, seed=5)  # fmt: skip
    return made.path


def test_d1_first_step_reports_ln_2_and_no_margin(policy: ModelRef, pairs: list[Pair]) -> None:
    row = new_learner(policy, pairs).step(pairs[:3], 0)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert row["margin"] == pytest.approx(0, abs=1e-5)
    assert row["learning_rate"] == pytest.approx(5e-4)


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in learner.trained if weight.grad is not None}


@pytest.mark.parametrize("path", ["shared", "padded"])
@pytest.mark.parametrize("budget", [1, 150, 400])
def test_o14_a_step_does_not_depend_on_how_memory_cuts_the_batch(
    policy: ModelRef, pairs: list[Pair], budget: int, path: LogpsPath
) -> None:
    whole = new_learner(policy, pairs, compute=COMPUTE.replace(tokens_per_forward=10_000))
    cut = new_learner(policy, pairs, compute=COMPUTE.replace(tokens_per_forward=budget))
    whole.path = cut.path = path
    assert len(rows(whole.tokenise(pairs), 10_000, path=path)) == 1 < len(rows(cut.tokenise(pairs), budget, path=path))
    logged = [whole.step(pairs, 0), cut.step(pairs, 0)]
    # h is 0 to rounding, so the margin and what is counted from its sign are no more than that.
    for name in ("loss", "grad_norm"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-6)
    expected, found = gradients(whole), gradients(cut)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-6, name


def test_gradient_is_that_of_the_mean_loss(policy: ModelRef, pairs: list[Pair]) -> None:
    # At h = 0 the gradient of a pair's loss is -beta/2 times that of its h (D2); before clipping, averaged over pairs.
    learner = new_learner(policy, pairs, TRAIN.replace(max_grad_norm=1e9))
    learner.step(pairs[:3], 0)
    found = gradients(learner)
    fresh = new_learner(policy, pairs)
    h = DPO.pair_logps(pairs[:3], fresh._logps(pairs[:3], fresh.tokenise(pairs[:3]), fresh.path)).h
    (-0.05 * h.mean()).backward()
    for name, weight in fresh.trained:
        assert weight.grad is not None
        assert torch.allclose(found[name], weight.grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from torch's own tracing
def test_compiled_layers_have_the_same_gradients(policy: ModelRef, pairs: list[Pair]) -> None:
    plain, compiled = new_learner(policy, pairs), new_learner(policy, pairs, TRAIN.replace(compile=True))
    counters = torch._dynamo.utils.counters
    counters.clear()
    for learner in (plain, compiled):
        learner.step(pairs[:3], 0)
    assert counters["stats"]["unique_graphs"] > 0
    for name, gradient in gradients(plain).items():
        assert float((gradients(compiled)[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_compiling_and_recomputing_are_refused_together() -> None:
    with pytest.raises(ValueError, match="choose one"):
        Train(compile=True, gradient_checkpointing=True)


def test_a_pair_longer_than_the_window_takes_the_padded_path(policy: ModelRef, pairs: list[Pair]) -> None:
    learner = new_learner(policy, pairs[:1])
    assert learner.path == "shared"
    learner.model.config.sliding_window = 200
    long = Response(text="x" * 240, token_ids=(*range(5, 245),), finish_reason="length")
    # Of that batch alone: a run that was stopped and goes on takes the same path for every batch.
    assert learner.path_of(learner._groups([pairs[0].model_copy(update={"chosen": long})])) == "padded"
    assert learner.path_of(learner._groups(pairs[:1])) == learner.path == "shared"


def test_training_raises_chosen_over_rejected(policy: ModelRef, pairs: list[Pair], tmp_path: Path) -> None:
    folder = train(tmp_path / "run", policy, pairs, TRAIN.replace(steps=12))
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    steps = [row for row in log if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.01
    looks = [row for row in log if "validation" in row]
    assert [row["step"] for row in looks] == [2, 4, 6, 8, 10, 12]
    trained = ModelRef.of(folder)
    items = [(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    margins = [
        (new[0] - old[0]) - (new[1] - old[1])
        for new, old in zip(
            logps_under(trained, items, compute=COMPUTE), [p.reference_logps for p in pairs], strict=True
        )
        if old is not None
    ]
    assert sum(margin > 0 for margin in margins) >= 6


def test_d17_the_start_model_is_left_as_it_was(policy: ModelRef, pairs: list[Pair], tmp_path: Path) -> None:
    train(tmp_path / "run", policy, pairs)
    assert ModelRef.of(policy.path).fingerprint == policy.fingerprint


def test_the_trained_folder_is_an_ordinary_transformers_folder(
    policy: ModelRef, pairs: list[Pair], tmp_path: Path
) -> None:
    folder = train(tmp_path / "run", policy, pairs)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation != "prefloop_shared_prefix"
    assert "prefloop" not in (folder / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(folder).chat_template
    before, after = load_file(policy.path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


class Stop(Exception):
    pass


RESUMED = {
    "adamw": TRAIN,
    "lora": TRAIN.replace(lora=Lora(rank=2).model_dump()),
    "adafactor": TRAIN.replace(optimizer="adafactor", schedule="cosine"),
    "adamw-8bit": TRAIN.replace(optimizer="adamw-8bit", schedule="linear"),
    "checkpointed": TRAIN.replace(gradient_checkpointing=True),
}


@pytest.mark.parametrize("stop_at", [1, 3])
@pytest.mark.parametrize("kind", RESUMED)
def test_a_round_that_stops_ends_in_the_same_bytes(
    policy: ModelRef, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, kind: str
) -> None:
    config = RESUMED[kind]
    if config.optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    whole = train(tmp_path / "whole", policy, pairs, config)
    step = Learner.step

    def stopping(self: Learner, batch: list[Pair], number: int) -> dict[str, float]:
        if number == stop_at:
            raise Stop
        return step(self, batch, number)

    monkeypatch.setattr(Learner, "step", stopping)
    with pytest.raises(Stop):
        train(tmp_path / "stopped", policy, pairs, config)
    monkeypatch.undo()
    stopped = train(tmp_path / "stopped", policy, pairs, config)
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (stopped / "training_log.jsonl").read_bytes() == (whole / "training_log.jsonl").read_bytes()


def stopped_after_checkpoint(
    folder: Path, policy: ModelRef, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run folder with a checkpoint after step 2; returns the checkpoint."""
    step = Learner.step

    def stopping(self: Learner, batch: list[Pair], number: int) -> dict[str, float]:
        if number == 2:
            raise Stop
        return step(self, batch, number)

    monkeypatch.setattr(Learner, "step", stopping)
    with pytest.raises(Stop):
        train(folder, policy, pairs)
    monkeypatch.undo()
    (checkpoint,) = folder.rglob("checkpoint-2")
    return checkpoint


def test_a_truncated_checkpoint_is_refused_by_name(
    policy: ModelRef, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stopped_after_checkpoint(tmp_path / "run", policy, pairs, monkeypatch)
    file = checkpoint / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"optimizer\.pt is truncated: \d+ bytes, expected \d+; delete"):
        train(tmp_path / "run", policy, pairs)


def test_a_changed_checkpoint_is_refused_by_name(
    policy: ModelRef, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stopped_after_checkpoint(tmp_path / "run", policy, pairs, monkeypatch)
    file = checkpoint / "weights.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"weights\.pt was changed"):
        train(tmp_path / "run", policy, pairs)


def test_lora_trains_adapters_only_and_saves_a_merged_model(
    policy: ModelRef, pairs: list[Pair], tmp_path: Path
) -> None:
    config = TRAIN.replace(lora__rank=2)
    learner = new_learner(policy, pairs, config)
    assert learner.trained and all("lora_" in name for name, _ in learner.trained)
    folder = train(tmp_path / "run", policy, pairs, config)
    before, after = load_file(policy.path / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)
    assert not list(folder.glob("adapter*"))


def test_a_pair_is_tokenised_once_and_not_once_a_step(
    policy: ModelRef, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    prompt_ids = ChatFormat.prompt_ids

    def counting(self: ChatFormat, prompt: Prompt) -> list[int]:
        seen.append(prompt.id)
        return prompt_ids(self, prompt)

    monkeypatch.setattr(ChatFormat, "prompt_ids", counting)
    train(tmp_path / "run", policy, pairs)
    assert sorted(id for id in seen if id.startswith("p") and len(id) == 2) == sorted(
        [*(pair.prompt.id for pair in pairs), "p0", "p1"]  # two of them are watched as well
    )


def test_the_longest_row_of_all_data_decides_on_the_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    windowed = MistralForCausalLM(
        MistralConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                      num_attention_heads=4, num_key_value_heads=2, sliding_window=90)
    )  # fmt: skip
    windowed.save_pretrained(tmp_path / "windowed")
    tokenizer.save_pretrained(tmp_path / "windowed")
    model = ModelRef.of(tmp_path / "windowed")
    short = [Pair(prompt=Prompt.of(text), chosen=Response(text="b"), rejected=Response(text="c")) for text in "xyz"]
    long = Pair(prompt=Prompt.of("a"), chosen=Response(text="b" * 100), rejected=Response(text="c"))
    assert new_learner(model, short).path == "shared"
    learner = new_learner(model, [*short, long])
    assert learner.path == "padded" and "windows of 90 tokens" in learner.why


def saved_bytes(learner: Learner, pairs: list[Pair]) -> int:
    """Bytes of activations (not of weights) that the loss of `pairs` keeps for its backward pass."""
    weights = {weight.data_ptr() for weight in learner.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        shared_prefix(learner.model) if learner.path == "shared" else nullcontext(),
    ):
        logps = learner._logps(pairs, learner.tokenise(pairs), learner.path)
        alive.append(learner.objective.losses(pairs, logps))
    return sum(kept.values())


@pytest.mark.parametrize("path", ["shared", "padded"])
@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_gives_the_same_bits_from_less_memory(
    policy: ModelRef, pairs: list[Pair], path: LogpsPath, rank: int
) -> None:
    config = TRAIN.replace(lora=Lora(rank=rank).model_dump())
    plain = new_learner(policy, pairs, config)
    frugal = new_learner(policy, pairs, config.replace(gradient_checkpointing=True))
    plain.path = frugal.path = path
    assert saved_bytes(frugal, pairs) < 0.4 * saved_bytes(plain, pairs)
    assert plain.step(pairs, 0) == frugal.step(pairs, 0)
    expected, found = gradients(plain), gradients(frugal)
    assert expected.keys() == found.keys() and expected
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert not any(module.training for module in frugal.model.modules())
    assert frugal.model.config._attn_implementation == plain.model.config._attn_implementation != NAME


def test_gradient_checkpointing_switches_no_dropout_on() -> None:
    # OPT's layers apply dropout where they are in training mode, which transformers' own switch asks for.
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=2,
                                     num_attention_heads=2, word_embed_proj_dim=16, dropout=0.5)).eval()  # fmt: skip
    groups = [TokenGroup((5, 6, 7), ((8, 9), (10,)))]
    plain = response_logps(model, groups, path="padded").sums
    recompute_activations(model)
    assert torch.equal(response_logps(model, groups, path="padded").sums, plain)


def test_a_model_whose_layers_cannot_be_computed_again_is_refused() -> None:
    class Own(LlamaForCausalLM):
        supports_gradient_checkpointing = False

    model = Own(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=1))  # fmt: skip
    with pytest.raises(InputError, match="gradient_checkpointing = True: transformers marks no layers of Own"):
        recompute_activations(model)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_bfloat16_is_of_the_products_alone(policy: ModelRef, pairs: list[Pair], optimizer: str) -> None:
    compute = COMPUTE.replace(dtype="bfloat16")
    bare = [pair.model_copy(update={"reference_logps": None, "reference": None}) for pair in pairs]
    known = with_reference_logps(bare, policy, compute=compute)
    learner = new_learner(policy, known, TRAIN.replace(optimizer=optimizer), compute)
    seen = set()
    learner.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    learner.step(known[:3], 0)
    assert seen == {torch.bfloat16}
    for name, weight in learner.trained:
        assert weight.grad is not None
        states = [value for value in learner.optimizer.state[weight].values() if torch.is_tensor(value)]
        assert {tensor.dtype for tensor in (weight, weight.grad, *states)} == {torch.float32}, name


def test_no_pairs_is_an_error(policy: ModelRef, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="no pairs to train on"):
        train(tmp_path / "run", policy, [])


def test_data_order_is_a_permutation_each_epoch_and_a_function_of_the_step() -> None:
    order = [i for step in range(6) for i in batch_of_step(9, 3, step, seed=1)]
    assert sorted(order[:9]) == sorted(order[9:18]) == list(range(9))
    assert order[:9] != order[9:18]
    assert batch_of_step(9, 3, 4, seed=1) == order[12:15]
    assert batch_of_step(9, 3, 4, seed=2) != order[12:15]
    # A batch may run across the end of an epoch.
    assert len(batch_of_step(2, 5, 0, seed=1)) == 5


def test_known_references_are_kept_and_missing_ones_computed(
    policy: ModelRef, pairs: list[Pair], tmp_path: Path
) -> None:
    marked = pairs[0].model_copy(update={"reference_logps": (-1.0, -2.0)})
    other = pairs[1].model_copy(update={"reference_logps": (-1.0, -2.0), "reference": "another model"})
    with Run.open(tmp_path / "run", recipe="test", config=TRAIN) as run:
        done = run.stage("pairs", with_reference_logps, [marked, other], policy, compute=COMPUTE)
    assert done[0].reference_logps == (-1.0, -2.0)
    assert done[1].reference_logps == pytest.approx(pairs[1].reference_logps, abs=1e-4)
    assert all(pair.reference == policy.fingerprint for pair in done)


def test_scoring_continues_after_a_kill_with_the_same_numbers(
    policy: ModelRef, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prefloop.train.reference as reference

    compute = Compute(device="cpu", tokens_per_forward=1)
    bare = [pair.model_copy(update={"reference_logps": None, "reference": None}) for pair in pairs]

    def scored(folder: Path) -> bytes:
        monkeypatch.setenv("PREFLOOP_CACHE", f"{folder}-cache")
        with Run.open(folder, recipe="test", config=TRAIN) as run:
            return run.stage("pairs", with_reference_logps, bare, policy, compute=compute).path.read_bytes()

    whole = scored(tmp_path / "whole")
    calls = []

    def counting(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise Stop
        return response_logps(*args, **kwargs)

    response_logps = reference.response_logps
    monkeypatch.setattr(reference, "response_logps", counting)
    with pytest.raises(Stop):
        scored(tmp_path / "stopped")
    (partial_file,) = (tmp_path / "stopped").rglob("logps.jsonl")
    partial_file.write_text(partial_file.read_text() + "[[5, [-1.")  # the line that the kill cut
    assert scored(tmp_path / "stopped") == whole
    assert len(calls) == 4 + 2 * len(pairs) - 3  # every response went alone; three were kept, the others computed
