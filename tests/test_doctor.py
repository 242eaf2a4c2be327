"""`prefloop doctor`: the figures against arithmetic, broken models found out, and the command as its user meets it."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from prefloop.cli import main
from prefloop.data.chat import ChatFormat
from prefloop.doctor import machine as machine_module
from prefloop.doctor.data import Percentiles, evenly, look_at_data, read_data, token_groups
from prefloop.doctor.estimate import (
    Line,
    Pass,
    ScoreEstimate,
    StepEstimate,
    Workload,
    head_bytes,
    row_tokens,
    training_pass,
    typical,
)
from prefloop.doctor.examine import examine, look_at_path
from prefloop.doctor.machine import Memory, processor_name, product_rate, system_memory
from prefloop.doctor.model import outline
from prefloop.doctor.parity import gradient_difference, value_difference
from prefloop.doctor.report import Report, problems
from prefloop.errors import CheckFailed, InputError
from prefloop.models import ModelRef
from prefloop.records import Pair
from prefloop.train.config import Compute, Lora
from prefloop.train.learner import add_lora
from prefloop.train.logprobs import plain_sums
from prefloop.train.packing import TokenGroup
from tests.tiny import save_tiny_model, tiny_llama, tiny_tokenizer

HIDDEN, LAYERS, VOCABULARY = 32, 2, 259
# Embedding; per layer: q and o, k and v (half the heads), three MLP matrices of 2 x hidden, two norms; the last norm.
PARAMETERS = VOCABULARY * HIDDEN + LAYERS * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
# Rank 4 on q, k, v, o, gate, up, down: rank * (inputs + outputs).
ADAPTERS = LAYERS * 4 * (64 + 48 + 48 + 64 + 96 + 96 + 96)
GROUPS = [
    TokenGroup((5, 6, 7, 8), ((9, 10, 11), (13, 14, 15, 16, 17))),
    TokenGroup((20, 21), ((22, 23, 24, 25), (26,))),
    TokenGroup(tuple(range(30, 50)), ((51, 52, 53), (60, 61))),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(autouse=True)
def one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are measured on one small product."""
    monkeypatch.setattr(machine_module, "PRODUCT_SECONDS", 0.0)
    monkeypatch.setitem(machine_module.PRODUCT_SIZE, "cpu", 64)


def look(model: str, data: str = "seed", **changes: Any) -> Report:
    options = {"split": None, "on_bad_row": "error", "compute": Compute(device="cpu"), "batch_size": 4, "lora": Lora()}
    return examine(model, data, **{**options, **changes}, say=lambda _: None)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("windowed")
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# The whole report


def test_a_tiny_model_is_ready_and_its_counts_are_those_of_arithmetic(model: str) -> None:
    report = look(model, lora=Lora(rank=4))
    assert report.problems == ()
    facts = report.model
    assert (facts.parameters, facts.layers, facts.vocabulary) == (PARAMETERS, LAYERS, VOCABULARY)
    assert (facts.context, facts.dtype_on_disk, facts.architecture) == (1024, "F32", "LlamaForCausalLM")
    assert "end of turn <|im_end|> (258)" in facts.tokens

    assert (report.mode, report.lora_rank) == ("lora", 4)
    full, lora = report.steps
    assert (full.mode, full.trained, lora.mode, lora.trained) == ("full", PARAMETERS, "lora", ADAPTERS)
    assert (full.weights, full.gradients, full.optimizer) == (4 * PARAMETERS, 4 * PARAMETERS, 8 * PARAMETERS)
    assert (lora.weights, lora.gradients, lora.optimizer) == (4 * (PARAMETERS + ADAPTERS), 4 * ADAPTERS, 8 * ADAPTERS)
    for step in report.steps:
        assert step.activations and step.temporary and step.head and step.seconds and step.fits
        parts = (step.weights, step.gradients, step.optimizer, step.activations, step.temporary, step.head)
        assert step.total == sum(parts)
    assert report.scoring and report.scoring.seconds > 0 and report.scoring.total < (full.total or 0)
    assert report.path and report.path.path == "shared"
    assert report.path.value_difference < 1e-5
    assert report.path.gradient_difference is not None and 0 < report.path.gradient_difference < 1e-3
    assert report.measured_tokens and report.measured_tokens >= 512


def test_a_report_survives_json(model: str) -> None:
    report = look(model)
    assert Report.from_json(report.to_json()) == report


def test_a_memory_smaller_than_the_weights_is_found_before_they_are_loaded(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prefloop.doctor.examine as module

    monkeypatch.setattr(machine_module, "system_memory", lambda: Memory(4 * PARAMETERS, 4 * PARAMETERS - 1))
    monkeypatch.setattr(module, "load_model", None)
    report = look(model)
    assert report.path is None and report.scoring is None and report.steps[0].total is None
    (problem,) = report.problems
    assert problem == (
        "a training step (full) needs at least 430.1 kB and 107.5 kB are available: does not fit; "
        "use a smaller model or more memory"
    )


@pytest.mark.parametrize(
    ("mode", "available", "remedies"),
    [
        ("full", 999, ["compute.tokens_per_forward (now 64)", "LoRA", "gradient checkpointing"]),
        ("lora", 999, ["compute.tokens_per_forward (now 64)", "gradient checkpointing"]),
        ("full", 200, ["LoRA"]),
        ("lora", 200, ["smaller model"]),
        ("full", 90, ["smaller model"]),
    ],
)
def test_a_step_that_does_not_fit_is_told_what_can_help(
    model: str, mode: Literal["full", "lora"], available: int, remedies: list[str]
) -> None:
    step = StepEstimate(mode=mode, trained=1, weights=100, gradients=100, optimizer=200, total=1000, fits=False)
    report = look(model)
    machine = report.machine.model_copy(update={"memory_available": available})
    update = {"machine": machine, "mode": mode, "steps": (step,), "tokens_per_forward": 64}
    (problem,) = problems(report.model_copy(update=update))
    assert f"needs 1.0 kB and {available} bytes are available: does not fit; " in problem
    known = ["compute.tokens_per_forward (now 64)", "LoRA", "gradient checkpointing", "smaller model"]
    assert [word for word in known if word in problem.split("does not fit; ")[1]] == remedies


def test_where_only_lora_fits_only_lora_is_timed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "system_memory", lambda: Memory(None, 8 * PARAMETERS - 1))
    small = Compute(device="cpu", tokens_per_forward=1)
    full, lora = look(model, lora=Lora(rank=1), compute=small).steps
    assert full.fits is False and full.seconds is None
    assert lora.seconds is not None and lora.activations is not None


def test_a_broken_shared_path_is_reported_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    import prefloop.train.attention as attention

    llama = tiny_llama(97)
    monkeypatch.setattr(
        attention.Layout, "mask", lambda self, branch, prompt, like: like.new_zeros(branch, prompt + branch)
    )
    found = look_at_path(llama, GROUPS, gradients=True)
    assert found.path == "padded" and "differs from the plain forward" in found.why
    assert found.value_difference < 1e-5 and (found.gradient_difference or 1) < 1e-3
    # The comparison sees the same fault, in values and in gradients.
    assert value_difference(llama, GROUPS, "shared") > 1e-2
    assert gradient_difference(llama, GROUPS, "shared") > 1e-2


def test_a_windowed_model_is_reported_padded_with_the_reason(windowed: str) -> None:
    report = look(windowed)
    assert report.path and report.path.path == "padded"
    assert "windows of 8 tokens" in report.path.why
    assert report.path.value_difference < 1e-5
    assert report.problems == () and any("padded path" in note for note in report.notes)


def test_a_head_that_the_core_does_not_know_stops_it(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import prefloop.doctor.examine as module

    load = module.load_model

    def halved(ref: ModelRef, *, device: str) -> PreTrainedModel:
        loaded = load(ref, device=device)
        loaded.lm_head.register_forward_hook(lambda _, __, logits: logits / 2)
        return loaded

    monkeypatch.setattr(module, "load_model", halved)
    with pytest.raises(CheckFailed, match="does something to its logits that prefloop does not know"):
        look(model)


def test_prompts_without_room_are_a_problem_and_long_rows_a_note(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(4)]
    rows[1]["chosen"] = "y" * 1100
    rows[2]["prompt"] = "q" * 1100
    report = look(model, write(tmp_path / "pairs.jsonl", rows))
    assert (report.data.over_context, report.data.without_room) == (2, 1)
    assert report.problems == (
        "1 of 4 prompts leave no room for an answer in the model's context of 1024 tokens; "
        "shorten them or leave them out",
    )
    assert any(note.startswith("1 of 4 rows are longer than the model's context of 1024") for note in report.notes)


def test_prompts_are_looked_at_with_answers_of_the_packaged_pairs(model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "prompts.jsonl", [{"prompt": "q" * n} for n in (2, 3, 5)])
    report = look(model, source)
    assert (report.data.kind, report.data.rows, report.data.row_tokens) == ("prompts", 3, None)
    assert report.data.prompt_tokens.max - report.data.prompt_tokens.median == 2
    assert report.problems == () and any("packaged pairs" in note for note in report.notes)


# The parts


def test_activations_lie_on_the_line_through_two_passes() -> None:
    line = Line.through(Pass(100, 1.0, 5_000), Pass(300, 2.0, 13_000))
    assert line == (1000.0, 40.0)
    assert line.at(100) == 5_000 and line.at(1000) == 41_000
    # Less kept by the longer pass is noise, not a negative slope.
    assert Line.through(Pass(100, 1.0, 500), Pass(300, 2.0, 400)) == (400.0, 0.0)


def test_a_pass_keeps_bytes_in_proportion_to_tokens_and_leaves_nothing_behind() -> None:
    llama = tiny_llama(97)
    one, two, four = (training_pass(llama, GROUPS[:1] * n, "shared", "float32") for n in (1, 2, 4))
    assert (one.tokens, two.tokens, four.tokens) == (10, 20, 40)
    assert Line.through(one, two).at(40) == pytest.approx(four.kept, rel=0.02)
    # A token keeps at least the inputs of the seven matrices of both layers, and never a copy of the weights.
    assert one.kept > 10 * 4 * 2 * (32 + 32 + 32 + 64)
    assert Line.through(one, two).fixed < 4 * sum(weight.numel() for weight in llama.parameters()) / 10
    assert all(weight.grad is None for weight in llama.parameters())


def test_time_and_memory_of_a_step_are_scaled_to_the_work() -> None:
    step = StepEstimate(mode="full", trained=10, weights=40, gradients=40, optimizer=80)
    work = Workload(step_tokens=1000, group_tokens=50, training_row=200, scoring_row=400)
    done = step.measured(work, Line(100, 2), Pass(250, 0.5, 600), head=7, available=918)
    assert (done.activations, done.temporary, done.total, done.seconds) == (500, 250, 917, 2.0)
    assert done.fits is True
    assert step.measured(work, Line(100, 2), Pass(250, 0.5, 600), head=7, available=916).fits is False
    assert step.measured(work, Line(100, 2), Pass(250, 0.5, 600), head=7, available=None).fits is None


def test_scoring_a_hundred_responses_is_fifty_groups_of_two_and_one_layer_at_a_time() -> None:
    work = Workload(step_tokens=1000, group_tokens=50, training_row=200, scoring_row=400)
    done = ScoreEstimate.of(40, work, 1.5, Pass(250, 0.5, 0), head=7, available=647)
    assert (done.activations, done.total, done.seconds, done.fits) == (600, 647, pytest.approx(0.002 * 50 * 50), True)
    assert ScoreEstimate.of(40, work, None, Pass(250, 0.5, 0), head=7, available=46).fits is False


def test_the_heads_logits_are_two_tiles_and_no_more_than_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import prefloop.doctor.estimate as module

    monkeypatch.setitem(module.TILE, "cpu", 1000)
    assert [head_bytes(tiny_llama(97), tokens) for tokens in (10, 11)] == [2 * 4 * 970, 2 * 4 * 1000]


def test_the_work_of_a_step_is_cut_as_training_cuts_it() -> None:
    # Shared: 10, 5 and 23 tokens. A batch of two of three groups is the first two; the budget of 12 splits it.
    assert [row_tokens([group], "shared") for group in GROUPS] == [10, 5, 23]
    work = Workload.of(GROUPS, 2, 12, "shared")
    assert (work.step_tokens, work.training_row, work.scoring_row) == (15, 23, 23)
    assert work.group_tokens == pytest.approx(38 / 3)
    # Fewer groups than a batch: they are repeated. Padded: 2 rows of 9, of 6 and of 23.
    assert Workload.of(GROUPS[:1], 4, 1000, "shared").step_tokens == 40
    assert [row_tokens([group], "padded") for group in GROUPS] == [18, 12, 46]
    assert row_tokens(GROUPS, "padded") == 6 * 23


def test_typical_groups_are_of_median_size_and_enough() -> None:
    assert typical(GROUPS, 12) == [GROUPS[0], GROUPS[1]]
    assert typical(GROUPS, 10_000) == [GROUPS[0], GROUPS[1], GROUPS[2]]
    assert typical(GROUPS[:1], 1) == [GROUPS[0], GROUPS[0]]


def test_plain_sums_are_those_of_transformers_own_loss() -> None:
    llama = tiny_llama(97)
    with torch.no_grad():
        found = plain_sums(llama, GROUPS[:1])
        for response, value in zip(GROUPS[0].responses, found, strict=True):
            prompt = GROUPS[0].prompt_ids
            ids = torch.tensor([[*prompt, *response]])
            labels = torch.tensor([[*([-100] * len(prompt)), *response]])
            assert value.item() == pytest.approx(-llama(input_ids=ids, labels=labels).loss.item() * len(response))


def test_a_nan_is_no_parity(model: str) -> None:
    report = look(model)
    assert report.path is not None
    broken = report.path.model_copy(update={"value_difference": math.nan})
    (problem,) = problems(report.model_copy(update={"path": broken}))
    assert "differs from the plain transformers forward by nan" in problem


def test_percentiles_are_counts_that_occur() -> None:
    assert Percentiles.of(list(range(1, 101))) == Percentiles(median=51, p90=91, p99=100, max=100)
    assert Percentiles.of([7]) == Percentiles(median=7, p90=7, p99=7, max=7)


def test_lengths_are_those_of_the_longer_response(tmp_path: Path) -> None:
    row = {"prompt": "abc", "chosen": "four", "rejected": "sixsix"}
    loaded = read_data(write(tmp_path / "p.jsonl", [row]), split=None, on_bad_row="error")
    chat = ChatFormat(tiny_tokenizer())
    groups = token_groups(loaded.records, chat)
    (pair,) = loaded.records
    assert isinstance(pair, Pair)
    prompt = len(chat.prompt_ids(pair.prompt))
    # Seven tokens: six bytes and the end.
    for context, over, without in ((prompt + 7, 0, 0), (prompt + 6, 1, 0), (prompt + 1, 1, 0), (prompt, 1, 1)):
        facts = look_at_data(loaded, groups, context)
        assert facts.row_tokens and facts.row_tokens.max == prompt + 7
        assert (facts.over_context, facts.without_room) == (over, without)


def test_a_large_source_is_looked_at_evenly() -> None:
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly(range(3), 4) == [0, 1, 2]


def test_adapters_are_counted_without_weights(model: str) -> None:
    bare = outline(ModelRef.of(Path(model)))
    assert next(bare.parameters()).device.type == "meta"
    assert StepEstimate.of_weights("lora", add_lora(bare, Lora(rank=4), 0)).trained == ADAPTERS


def test_memory_of_the_system_and_of_a_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  1000 kB\nMemFree:  100 kB\nMemAvailable:  800 kB\nHugePages_Total:  0\n")
    assert system_memory(meminfo, tmp_path / "none") == (1_024_000, 819_200)
    (tmp_path / "memory.max").write_text("max\n")
    assert system_memory(meminfo, tmp_path) == (1_024_000, 819_200)
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\ninactive_file 50000\n")
    assert system_memory(meminfo, tmp_path) == (500_000, 250_000)
    # Elsewhere only the total is known.
    total, available = system_memory(tmp_path / "absent", tmp_path)
    assert total is not None and total > 2**28 and available is None


def test_a_processor_is_named(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU: fast\n")
    assert processor_name(tmp_path / "cpuinfo") == "Some CPU: fast"
    assert processor_name(tmp_path / "absent")


def test_a_product_rate_counts_two_operations_a_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.25, 0.5, 0.75])
    monkeypatch.setattr(machine_module.time, "perf_counter", lambda: next(clock))
    assert product_rate("cpu", "float32", 0.6) == pytest.approx(3 * 2 * 64**3 / 0.75 / 1e9)


# The command


def test_the_command_prints_all_sections_and_writes_all_figures(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    assert (
        main(["doctor", "--model", model, "--data", "seed:held_out", "--compute.device", "cpu", "--out", str(out)]) == 0
    )
    printed = capsys.readouterr().out
    for title in ("machine", "model", "data", "path", "estimate, from passes over"):
        assert f"\n{title}" in "\n" + printed
    assert "trained (lora of rank 16)" in " ".join(printed.split())
    assert printed.rstrip().endswith("\nready")
    report = Report.from_json(out.read_text(encoding="utf-8"))
    assert (report.machine.device, report.batch_size, report.data.source) == ("cpu", 32, "seed")
    assert main(["doctor", "--model", model, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_problem_is_exit_status_1_and_said_last(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in ("q" * 1100, "short?")]
    out = tmp_path / "figures.json"
    data = write(tmp_path / "pairs.jsonl", rows)
    assert main(["doctor", "--model", model, "--data", data, "--compute.device", "cpu", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "problem: 1 of 2 prompts leave no room" in printed and printed.rstrip().endswith("not ready: 1 problem")
    assert len(Report.from_json(out.read_text(encoding="utf-8")).problems) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data", "seed"], "--model is missing: hub id"),
        (["--model", "a/b/c"], "nor a hub id"),
        (["--model", "MODEL", "--data", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
        (["--model", "MODEL", "--data", "seed", "--split", "trian"], "trian"),
        (["--model", "MODEL", "--compute.device", "tpu"], "device 'tpu' is not available here"),
        (["--model", "MODEL", "--data", "LONG"], "all 1 rows looked at are longer than the model's context of 1024"),
        (["--model", "BAD"], "does not describe a causal language model that transformers knows"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    bad = save_tiny_model(tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    long = write(tmp_path / "long.jsonl", [{"prompt": "Q?", "chosen": "y" * 1100, "rejected": "n" * 1100}])
    names = {"MODEL": model, "BAD": str(bad), "LONG": long}
    capsys.readouterr()
    assert main(["doctor", *(names.get(arg, arg) for arg in args)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prefloop: ") and said in line


def test_a_damaged_weight_file_is_bad_input(tmp_path: Path) -> None:
    weights = save_tiny_model(tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged .*; get the file again"):
        look(str(tmp_path / "cut"))
