"""Run folders: resume to the same bytes from a kill at any point, refusals, fingerprints, records of what happened."""

import io
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from rich.console import Console

from prefloop import progress
from prefloop.artifacts import FolderArtifact, Records
from prefloop.atomic import write_atomically
from prefloop.config import Config, free
from prefloop.errors import CheckFailed, InputError
from prefloop.fingerprints import fingerprint
from prefloop.progress import Pace
from prefloop.records import Group, Prompt, Record, Response
from prefloop.run import Run, Stage


class Training(Config):
    steps: int = 20
    rate: float = 1e-5


class Service(Config):
    url: str = free(default="")
    model: str = ""


class Options(Config):
    seed: int = 0
    device: str = "cpu"
    budget: int = free(default=1)
    train: Training = Field(default_factory=Training)
    service: Service = Field(default_factory=Service)


class Figure(Record):
    mean: float
    n: int = 0


PROMPTS = [Prompt.of(f"Question {i}?", id=f"p{i}") for i in range(3)]
calls: list[str] = []


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def draw(prompts: Sequence[Prompt], *, seed: int, stage: Stage | None = None) -> list[Group]:
    """One answer a prompt; answers of an attempt that was killed are found in the scratch folder."""
    stage = stage or Stage.detached()
    calls.append("draw")
    groups = []
    with stage.progress(len(prompts), unit="answers", description="drawing") as advance:
        for prompt in prompts:
            file = stage.scratch / prompt.id if stage.scratch else None
            if file is None or not file.is_file():
                calls.append(prompt.id)
                if file:
                    write_atomically(file, f"answer to {prompt.id}, {seed}")
            text = file.read_text() if file else f"answer to {prompt.id}, {seed}"
            groups.append(Group(prompt=prompt, responses=(Response(text=text, score=0.1 + 0.2),)))
            advance(1)
    stage.count("answers", len(groups))
    return groups


def measure(groups: Sequence[Group]) -> dict[str, float]:
    calls.append("measure")
    scores = [response.score or 0.0 for group in groups for response in group.responses]
    return {"mean": sum(scores) / 7, "n": len(scores)}


def fit(groups: Sequence[Group], *, stage: Stage) -> Path:
    calls.append("fit")
    assert stage.output is not None
    (stage.output / "tokenizer").mkdir(parents=True)
    (stage.output / "weights.bin").write_text(groups[0].responses[0].text)
    (stage.output / "tokenizer" / "vocabulary").write_text("abc")
    return stage.output


def loop(folder: Path, seed: int = 0, **options: Any) -> tuple[Records[Group], dict[str, float], FolderArtifact]:
    """A run of three stages, one of each kind."""
    with Run.open(folder, recipe="test", config=Options(**options)) as run:
        groups = run.round(1).stage("groups", draw, PROMPTS, seed=seed)
        return groups, run.stage("figures", measure, groups), run.round(1).stage("model", fit, groups)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a run folder without what may differ: the lock, the event log and the manifest's times."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    manifest = json.loads(found["manifest.json"])
    for entry in manifest["stages"].values():
        del entry["seconds"], entry["finished"]
    found["manifest.json"] = json.dumps(manifest).encode()
    return {name: data for name, data in found.items() if name not in ("events.jsonl", ".lock")}


def rewrite(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def stages(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "manifest.json").read_text())["stages"]


def in_child(work: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """The exit status of `work` in a forked process: 0, 1 for an exception, minus the signal that killed it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(*args, **kwargs)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_when(due: Callable[[str, tuple[Any, ...]], bool]) -> None:
    """SIGKILL this process just before the file system operation for which `due(audit event, its arguments)` holds."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and due(event, args):
            kill_self()

    sys.addaudithook(hook)


# Resume


def test_finished_stages_are_reused(tmp_path: Path) -> None:
    first = loop(tmp_path / "run")
    before = contents(tmp_path / "run")
    assert calls == ["draw", "p0", "p1", "p2", "measure", "fit"]
    calls.clear()
    assert loop(tmp_path / "run") == first
    assert calls == []
    assert contents(tmp_path / "run") == before


def test_a_stage_whose_input_changed_is_computed_again_with_all_that_follows(tmp_path: Path) -> None:
    loop(tmp_path / "run")
    calls.clear()
    _, _, model = loop(tmp_path / "run", seed=1)
    assert calls == ["draw", "p0", "p1", "p2", "measure", "fit"]
    assert (model.path / "weights.bin").read_text() == "answer to p0, 1"
    loop(tmp_path / "fresh", seed=1)
    assert contents(tmp_path / "run") == contents(tmp_path / "fresh")


def test_two_runs_of_the_same_inputs_have_the_same_bytes(tmp_path: Path) -> None:
    loop(tmp_path / "a")
    loop(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: os.truncate(run / "round-1/groups.jsonl", 100),
        lambda run: rewrite(run / "round-1/groups.jsonl", "p0", "pX"),
        lambda run: (run / "figures.json").unlink(),
        lambda run: (run / "round-1/model/tokenizer/vocabulary").write_text("abcd"),
        lambda run: (run / "round-1/model/weights.bin").unlink(),
    ],
    ids=["truncated", "edited", "gone", "longer file in folder", "file in folder gone"],
)  # fmt: skip
def test_an_artifact_that_is_not_as_it_was_written_is_made_again(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    loop(tmp_path / "run")
    before = contents(tmp_path / "run")
    damage(tmp_path / "run")
    loop(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_name_cannot_stand_for_two_stages(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", recipe="test", config=Options()) as run:
        groups = run.stage("groups", draw, PROMPTS, seed=0)
        assert run.stage("groups", draw, PROMPTS, seed=0) == groups
        with pytest.raises(ValueError, match="stage 'groups' has already run with other inputs"):
            run.stage("groups", draw, PROMPTS, seed=1)


@pytest.mark.parametrize("name", ["", "/groups", "../groups", "round-1/", "manifest", "a b", "groups.partial"])
def test_a_stage_needs_a_usable_name(tmp_path: Path, name: str) -> None:
    with (
        Run.open(tmp_path / "run", recipe="test", config=Options()) as run,
        pytest.raises(ValueError, match="stage name"),
    ):
        run.stage(name, draw, PROMPTS, seed=0)


# Kills


@pytest.mark.slow
def test_killed_before_any_file_system_operation_a_run_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every point at which a kill can matter, one after another, from the first file to the last."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # it matters when the power fails, not when a process dies
    loop(tmp_path / "whole")
    expected = contents(tmp_path / "whole")

    def killed_at(operation: int, folder: Path) -> None:
        left = iter(range(operation))
        kill_when(lambda event, args: next(left, None) is None)
        loop(folder)

    operation = 0
    while in_child(killed_at, operation, folder := tmp_path / str(operation)) == -signal.SIGKILL:
        loop(folder)
        assert contents(folder) == expected, f"killed before operation {operation}"
        operation += 1
    assert operation > 40
    assert contents(folder) == expected


def test_answers_drawn_before_a_kill_are_not_drawn_again(tmp_path: Path) -> None:
    def killed() -> None:
        kill_when(lambda event, args: event == "open" and str(args[0]).endswith("p2"))
        loop(tmp_path / "run")

    assert in_child(killed) == -signal.SIGKILL
    assert (tmp_path / "run/round-1/groups.partial").is_dir()
    loop(tmp_path / "run")
    assert calls == ["draw", "p2", "measure", "fit"]
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_partial_work_for_other_inputs_is_thrown_away(tmp_path: Path) -> None:
    def killed() -> None:
        kill_when(lambda event, args: event == "open" and str(args[0]).endswith("p2"))
        loop(tmp_path / "run", seed=1)

    assert in_child(killed) == -signal.SIGKILL
    loop(tmp_path / "run", seed=0)
    assert calls == ["draw", "p0", "p1", "p2", "measure", "fit"]


def test_killed_in_the_middle_of_writing_a_file(tmp_path: Path) -> None:
    loop(tmp_path / "whole")
    size = (tmp_path / "whole/round-1/groups.jsonl").stat().st_size

    def killed() -> None:
        # The system kills a process that writes beyond the limit, with the file written up to there.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 10, size - 10))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        with Run.open(tmp_path / "run", recipe="test", config=Options()) as run:
            (tmp_path / "run/events.jsonl").unlink()
            run.round(1).stage("groups", draw, PROMPTS, seed=0)

    assert in_child(killed) == -signal.SIGXFSZ
    (half,) = [file for file in (tmp_path / "run/round-1").iterdir() if file.is_file()]
    assert half.stat().st_size == size - 10 and half.name != "groups.jsonl"
    loop(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_folder_of_the_same_sizes_that_a_kill_left_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    """Inputs A; then B, killed between the model's renaming and the manifest; then A again."""
    run = tmp_path / "run"
    loop(run, seed=0)
    before = contents(run)

    def model_of_b() -> bool:
        weights = run / "round-1/model/weights.bin"
        return weights.is_file() and weights.read_text() == "answer to p0, 1"

    def killed() -> None:
        kill_when(lambda event, args: event == "os.rename" and "manifest" in str(args[0]) and model_of_b())
        loop(run, seed=1)

    assert in_child(killed) == -signal.SIGKILL
    assert model_of_b()
    loop(run, seed=0)
    assert contents(run) == before


def test_leftovers_of_a_kill_are_removed_unless_the_folder_is_refused(tmp_path: Path) -> None:
    loop(tmp_path / "run")
    before = contents(tmp_path / "run")
    write_atomically(tmp_path / "run/round-1/.tmp-old/weights.bin", "half")
    write_atomically(tmp_path / "run/.tmp-old.jsonl", "half")
    refused(tmp_path / "run", device="cuda")
    assert len(contents(tmp_path / "run")) == len(before) + 2
    loop(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_half_line_in_the_event_log_stays_a_line_of_its_own(tmp_path: Path) -> None:
    loop(tmp_path / "run")
    log = tmp_path / "run/events.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-20])
    loop(tmp_path / "run")
    lines = log.read_text().splitlines()
    cut = whole.count("\n") - 1
    assert lines[cut] == whole.splitlines()[-1][:-19]
    assert json.loads(lines[cut + 1])["event"] == "opened"


# Refusals


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        loop(folder, **options)
    return str(caught.value)


def test_an_option_that_changes_no_result_may_change_and_nothing_is_computed_again(tmp_path: Path) -> None:
    loop(tmp_path / "run")
    before = (tmp_path / "run/manifest.json").read_bytes()
    loop(tmp_path / "run", budget=2, service=Service(url="http://127.0.0.1:1"))
    assert (tmp_path / "run/manifest.json").read_bytes() == before
    assert "service.model" in refused(tmp_path / "run", service=Service(model="other"))


def test_free_options_are_named_and_left_out_of_the_identity() -> None:
    assert Options.free_options() == {"budget", "service.url"}
    same = fingerprint(Options(budget=2, service=Service(url="u")))
    assert fingerprint(Options()) == same != fingerprint(Options(service=Service(model="m")))


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = tmp_path / "run"
    loop(run)
    before = contents(run)
    fix = "give another --out, or the same options as before"
    assert refused(run, train=Training(steps=30)) == (
        f"{run} was started with other options (train.steps: 20 here, 30 asked for); {fix}"
    )
    assert refused(run, train=Training(steps=30), device="cuda") == (
        f"{run} was started with other options "
        f"(device: cpu here, cuda asked for; train.steps: 20 here, 30 asked for); {fix}"
    )
    assert contents(run) == before
    loop(run)


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    loop(tmp_path / "run")
    with (
        pytest.raises(InputError, match="is a run of test, not of dice"),
        Run.open(tmp_path / "run", recipe="dice", config=Options()),
    ):
        pass


def test_a_refused_opening_leaves_the_folder_free(tmp_path: Path) -> None:
    loop(tmp_path / "run")
    with pytest.raises(InputError) as caught:
        loop(tmp_path / "run", device="cuda")
    loop(tmp_path / "run")  # while `caught` keeps the failed attempt alive
    assert "device" in str(caught.value)


@pytest.mark.parametrize("files", [["notes.txt"], ["config.yaml"], ["config.yaml", "notes.txt", ".tmp-draft/page"]])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("a: 1\n")
    assert "not a run folder" in refused(tmp_path / "mine")
    left = sorted(str(file.relative_to(tmp_path / "mine")) for file in (tmp_path / "mine").rglob("*") if file.is_file())
    assert left == sorted(files)


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert f"cannot write {tmp_path / 'file/run'}: Not a directory" in refused(tmp_path / "file/run")
    assert f"cannot write {tmp_path / 'file'}: File exists" in refused(tmp_path / "file")


@pytest.mark.parametrize("text", ['{"recipe": "test", "sta', "[]", '{"stages": {"figures": {}}}', ""])
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, text: str) -> None:
    loop(tmp_path / "run")
    before = contents(tmp_path / "run")
    (tmp_path / "run/manifest.json").write_text(text)
    message = refused(tmp_path / "run")
    assert str(tmp_path / "run/manifest.json") in message and "delete it to compute the stages again" in message
    (tmp_path / "run/manifest.json").unlink()
    loop(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_damaged_configuration_is_refused_by_name(tmp_path: Path) -> None:
    loop(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("# prefloop test\nseed: [1\n")
    assert f"{tmp_path / 'run/config.yaml'} line 3: not valid YAML" in refused(tmp_path / "run")


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with Run.open(tmp_path / "run", recipe="test", config=Options()):
            os.write(writer, b"x")
            signal.pause()
    try:
        os.read(reader, 1)
        assert f"{tmp_path / 'run'} is in use by another prefloop process (pid {child})" in refused(tmp_path / "run")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    loop(tmp_path / "run")


def big(n: int, *, stage: Stage) -> list[Response]:
    assert stage.scratch is not None
    (stage.scratch / "kept").write_text("partial work")
    return [Response(text="x" * 1000)] * n


def big_folder(n: int, *, stage: Stage) -> Path:
    assert stage.output is not None
    stage.output.mkdir()
    (stage.output / "weights.bin").write_bytes(b"x" * 1000 * n)
    return stage.output


class RustError(Exception):
    """As safetensors reports what the system said."""


def big_by_a_library(n: int, *, stage: Stage) -> Path:
    try:
        return big_folder(n, stage=stage)
    except OSError as error:
        raise RustError(f"I/O error: {error.strerror} (os error {error.errno})") from None


def big_by_another(n: int, *, stage: Stage) -> Path:
    """As torch.save into an open file: an error of its own while the system's is being handled."""
    try:
        return big_folder(n, stage=stage)
    except OSError:
        raise RuntimeError("unexpected position")  # noqa: B904


@pytest.mark.parametrize(
    ("function", "artifact"),
    [(big, "out.jsonl"), (big_folder, "out"), (big_by_a_library, "out"), (big_by_another, "out")],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    tmp_path: Path, function: Callable[..., object], artifact: str
) -> None:
    run_folder, report = tmp_path / "run", tmp_path / "report"

    def work() -> None:
        with Run.open(run_folder, recipe="test", config=Options()) as run:
            run.stage("out", function, 50)

    def with_little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            work()
        except InputError as error:
            report.write_text(str(error))

    assert in_child(with_little_room) == 0
    message = report.read_text()
    assert message.startswith(f"cannot write {run_folder / artifact}: File too large; ") and "\n" not in message
    large = [file for file in run_folder.rglob("*") if file.is_file() and file.stat().st_size > 2000]
    assert large == [] and not (run_folder / artifact).exists() and not list(run_folder.rglob(".tmp-*"))
    assert function is not big or (run_folder / "out.partial/kept").is_file()
    assert events(run_folder)[-1]["event"] == "failed"
    work()
    assert (run_folder / artifact).exists()


# Artifacts


def odd_records() -> list[Response]:
    line_separator, surrogate_pair = chr(0x2028), chr(0x1F600)
    return [
        Response(text=f"a{line_separator}b\r\n\x85{surrogate_pair}", score=0.1 + 0.2, token_ids=(1, 2)),
        Response(text="", score=5e-324, sampling_logps=(-1.7976931348623157e308, -0.1)),
        Response(text="none", score=None, failure="the scorer gave none"),
    ]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", recipe="test", config=Options()) as run:
        first = run.stage("odd", odd_records)
        again = run.stage("odd", odd_records)
    assert first == again == odd_records()
    assert type(first) is type(again) is Records
    assert first.path == tmp_path / "run/odd.jsonl"
    assert first.path.read_bytes() == "".join(record.to_json() + "\n" for record in odd_records()).encode()
    assert first.fingerprint == again.fingerprint == fingerprint(odd_records())


def test_records_of_a_stage_cannot_be_changed(tmp_path: Path) -> None:
    """Their fingerprint names the file, so a changed list would pass for the file's."""
    with Run.open(tmp_path / "run", recipe="test", config=Options()) as run:
        records = run.stage("odd", odd_records)
    for change in (
        lambda: records.append(records[0]),
        lambda: records.sort(key=lambda r: r.text),
        lambda: records.__setitem__(0, records[1]),
        lambda: records.__iadd__([records[0]]),
    ):
        with pytest.raises(TypeError, match=r"read-only; change a copy: list\(records\)"):
            change()
    assert records == odd_records()
    assert type(records[:2]) is type(records * 1) is type(records.copy()) is list


def nothing() -> list[Response]:
    return []


def a_figure() -> Figure:
    return Figure(mean=0.1 + 0.2, n=3)


def a_config() -> Options:
    return Options(seed=7, train=Training(rate=3e-6))


def a_dictionary() -> dict[str, Any]:
    return {"b": [0.1 + 0.2, (1, 2)], "a": None, "é": {3: True}}


@pytest.mark.parametrize(
    ("function", "value", "name"),
    [
        (nothing, [], "x.jsonl"),
        (a_figure, a_figure(), "x.json"),
        (a_config, a_config(), "x.json"),
        (a_dictionary, {"b": [0.1 + 0.2, [1, 2]], "a": None, "é": {"3": True}}, "x.json"),
    ],
)
def test_a_first_run_and_a_resumed_one_see_the_same_value(
    tmp_path: Path, function: Callable[[], object], value: object, name: str
) -> None:
    with Run.open(tmp_path / "run", recipe="test", config=Options()) as run:
        assert [run.stage("x", function), run.stage("x", function)] == [value, value]
    assert (tmp_path / "run" / name).is_file()


def a_nan_score() -> list[Response]:
    return [Response(text="fine", score=1.0), Response(text="broken", score=float("nan"))]


def an_infinite_figure() -> Figure:
    return Figure(mean=float("inf"))


@pytest.mark.parametrize("function", [a_nan_score, an_infinite_figure])
def test_a_number_that_json_cannot_hold_is_not_lost_in_silence(tmp_path: Path, function: Callable[[], object]) -> None:
    with (
        Run.open(tmp_path / "run", recipe="test", config=Options()) as run,
        pytest.raises(CheckFailed, match=r"stage x: .*infinite"),
    ):
        run.stage("x", function)
    assert not (tmp_path / "run/x.json").exists() and not (tmp_path / "run/x.jsonl").exists()


def mixed() -> list[Record]:
    return [Figure(mean=1.0), Prompt.of("?")]


def elsewhere(*, stage: Stage) -> Path:
    assert stage.scratch is not None
    return stage.scratch


def a_set() -> set[int]:
    return {1}


@pytest.mark.parametrize(
    ("function", "message"),
    [(mixed, "records of one kind"), (elsewhere, r"not its stage\.output"), (a_set, "returned a set")],
)
def test_other_results_are_refused(tmp_path: Path, function: Callable[..., object], message: str) -> None:
    with Run.open(tmp_path / "run", recipe="test", config=Options()) as run, pytest.raises(TypeError, match=message):
        run.stage("x", function)


def test_a_folder_artifact_has_a_fingerprint_of_names_and_contents(tmp_path: Path) -> None:
    _, _, model = loop(tmp_path / "a")
    _, _, same = loop(tmp_path / "b")
    _, _, other = loop(tmp_path / "c", seed=1)
    assert model.path == tmp_path / "a/round-1/model" and model.name == "round-1/model"
    assert model.fingerprint == same.fingerprint == fingerprint(model) == fingerprint(model.path) != other.fingerprint
    (tmp_path / "c/round-1/model/weights.bin").write_bytes((model.path / "weights.bin").read_bytes())
    assert fingerprint(other.path) == model.fingerprint
    (other.path / "weights.bin").rename(other.path / "renamed.bin")
    assert fingerprint(other.path) != model.fingerprint


# Fingerprints


def test_different_values_have_different_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    values = [
        None, "None", True, "True", 1, 1.0, "1", 0, 0.0, -0.0, False, "", "a" * 200, "a" * 201,
        [1], [[1]], [1, 1], [1.0], ["1"], {"1": 1}, {1: 1}, {"1": 1.0}, [["1", 1]], {"a": {"b": 1}}, {"a": 1, "b": 1},
        PROMPTS[0], PROMPTS[1], PROMPTS[:1], PROMPTS[:2], [PROMPTS[:2]], [PROMPTS[:1], PROMPTS[1:2]],
        Options(), Options(seed=1), Options(train=Training(rate=2e-5)),
        tmp_path / "a", tmp_path / "b", str(tmp_path / "a"), tmp_path,
        draw, measure, f"{__name__}:draw", partial(draw, seed=1), partial(draw, seed=2),
        partial(draw, PROMPTS), partial(draw, PROMPTS[:1]),
        partial(measure, []), [draw, [], {"seed": 1}],
    ]  # fmt: skip
    prints = [fingerprint(value) for value in values]
    clashes = [(values[i], values[j]) for i in range(len(values)) for j in range(i) if prints[i] == prints[j]]
    assert clashes == []


def test_equal_values_have_equal_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("a")
    for one, other in [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (PROMPTS, tuple(PROMPTS)),
        (PROMPTS[0], Prompt.of("Question 0?", id="p0")),
        (Options(), Options(seed=0)),
        (tmp_path / "a", tmp_path / "b"),
        (partial(draw, seed=1), partial(draw, seed=1)),
    ]:
        assert fingerprint(one) == fingerprint(other)


def test_what_has_no_stable_content_has_no_fingerprint(tmp_path: Path) -> None:
    def local() -> None:
        pass

    for value, message in [
        ({1}, "set"),
        (object(), "object"),
        (lambda: 1, "<lambda>"),
        (local, "<locals>"),
        (Options().to_yaml, "method"),
    ]:
        with pytest.raises(TypeError, match=message):
            fingerprint(value)
        with pytest.raises(TypeError, match=message):
            fingerprint([{"deep": (value,)}])
    with pytest.raises(InputError, match="gone does not exist"):
        fingerprint(tmp_path / "gone")


# What a run says and records


def test_the_manifest_says_what_was_done(tmp_path: Path) -> None:
    run = tmp_path / "run"
    groups, _, model = loop(run)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["recipe"] == "test"
    assert {"prefloop", "python", "torch", "transformers", "numpy", "platform", "cpus"} <= manifest[
        "environment"
    ].keys()
    assert list(manifest["stages"]) == ["round-1/groups", "figures", "round-1/model"]
    entry = manifest["stages"]["round-1/groups"]
    assert entry["inputs"]["kwargs"] == {"seed": "int:0"}
    assert entry["counts"] == {"answers": 3}
    assert entry["artifact"] == {
        "path": "round-1/groups.jsonl",
        "kind": "records",
        "type": "prefloop.records:Group",
        "sha256": groups.fingerprint,
        "bytes": groups.path.stat().st_size,
    }
    assert manifest["stages"]["round-1/model"]["artifact"]["sha256"] == model.fingerprint
    assert entry["seconds"] >= 0 and entry["finished"].endswith("+00:00")
    with Run.open(run, recipe="test", config=Options()) as opened:
        assert opened.manifest == manifest["stages"]
        with pytest.raises(TypeError):
            opened.manifest["x"] = {}


def counting(*, stage: Stage) -> dict[str, int]:
    stage.count("dropped: unfinished", 3)
    stage.count("dropped: unfinished")
    stage.count("kept", 2)
    stage.event("looked", at="this")
    stage.note("a note with [brackets]")
    return {}


def test_counts_events_and_notes_of_a_stage(tmp_path: Path) -> None:
    out = io.StringIO()
    with Run.open(tmp_path / "run", recipe="test", config=Options(), console=Console(file=out)) as run:
        run.note("before")
        run.stage("x", counting)
        run.stage("x", counting)
    assert stages(tmp_path / "run")["x"]["counts"] == {"dropped: unfinished": 4, "kept": 2}
    seen = [(event["stage"], event["event"]) for event in events(tmp_path / "run")]
    assert seen == [
        (None, "opened"), (None, "note"), ("x", "started"), ("x", "looked"), ("x", "note"), ("x", "finished"),
    ]  # fmt: skip
    assert events(tmp_path / "run")[3]["at"] == "this"
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["before", "x: started", "x: a note with [brackets]"]
    assert lines[3].startswith("x: 0.") and lines[3].endswith(" s; 4 dropped: unfinished, 2 kept")
    assert lines[4:] == ["x: done before, reused"]


def test_a_detached_stage_keeps_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    stage = Stage.detached()
    assert stage.scratch is None and stage.output is None
    stage.note("quiet")
    stage.event("quiet")
    stage.count("quiet")
    groups = draw(PROMPTS, seed=0)
    assert [group.responses[0].text for group in groups] == [f"answer to p{i}, 0" for i in range(3)]
    assert capfd.readouterr() == ("", "")


def stopping(error: BaseException, *, stage: Stage) -> dict[str, int]:
    assert stage.output is not None
    stage.output.mkdir()
    (stage.output / "half").write_text("x")
    raise error


class Unhurried(Exception):
    fingerprint = "unhurried"


class Interrupt(KeyboardInterrupt):
    fingerprint = "interrupt"


def test_an_interruption_is_recorded_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        Run.open(tmp_path / "run", recipe="test", config=Options(), console=Console(file=out, width=30)) as run,
    ):
        run.stage("round-1/x", stopping, Interrupt())
    assert out.getvalue().splitlines()[-1] == "interrupted in round-1/x; run the same command again to continue"
    last = events(tmp_path / "run")[-1]
    assert (last["stage"], last["event"]) == ("round-1/x", "interrupted")
    assert not list((tmp_path / "run").rglob("half"))


def test_a_failure_is_recorded_with_its_type_and_message(tmp_path: Path) -> None:
    with pytest.raises(Unhurried), Run.open(tmp_path / "run", recipe="test", config=Options()) as run:
        run.stage("x", stopping, Unhurried("no hurry"))
    last = events(tmp_path / "run")[-1]
    assert {name: last[name] for name in ("stage", "event", "type", "message")} == {
        "stage": "x", "event": "failed", "type": "Unhurried", "message": "no hurry",
    }  # fmt: skip


def test_an_event_log_that_cannot_be_written_hides_no_failure(tmp_path: Path) -> None:
    with pytest.raises(Unhurried), Run.open(tmp_path / "run", recipe="test", config=Options()):
        (tmp_path / "run/events.jsonl").unlink()
        (tmp_path / "run/events.jsonl").mkdir()
        raise Unhurried


# Progress


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    yield


@pytest.mark.usefixtures("every_line")
def test_a_log_file_gets_plain_lines_on_stderr_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Run.open(tmp_path / "run", recipe="test", config=Options(), console=Console(stderr=True, width=200)) as run:
        run.round(1).stage("groups", draw, PROMPTS, seed=0)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" and "\x1b" not in err
    assert lines[0] == "round-1/groups: started"
    assert lines[1].startswith("round-1/groups: drawing: 1/3 answers")
    assert lines[2].startswith("round-1/groups: drawing: 2/3 answers, ") and " answers/s, " in lines[2]
    assert lines[3].endswith(" s; 3 answers") and len(lines) == 4


def test_a_log_file_does_not_get_a_line_for_every_step(tmp_path: Path) -> None:
    out = io.StringIO()
    with Run.open(tmp_path / "run", recipe="test", config=Options(), console=Console(file=out)) as run:
        run.stage("groups", draw, PROMPTS, seed=0)
    assert len(out.getvalue().splitlines()) == 2


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Run.open(tmp_path / "run", recipe="test", config=Options(), console=console) as run:
        run.round(1).stage("groups", draw, PROMPTS, seed=0)
    assert "round-1/groups: drawing" in out.getvalue() and "3/3" in out.getvalue() and "answers" in out.getvalue()


def test_the_pace_is_that_of_the_work_done_now_not_of_the_work_found_done() -> None:
    pace = Pace(1000, unit="steps")
    pace.advance(500, now=0.0)
    assert pace.rate is None and pace.seconds_left is None
    pace.advance(10, now=20.0)
    assert pace.rate == 0.5 and pace.seconds_left == 980
    # Of the last minute, and of the last two steps when these took longer.
    pace.advance(40, now=40.0)
    pace.advance(50, now=100.0)
    assert pace.rate == pytest.approx(50 / 60)
    pace.advance(100, now=600.0)
    assert pace.rate == pytest.approx(0.2) and pace.seconds_left == pytest.approx(1500)


def test_the_pace_is_said_with_its_end() -> None:
    pace = Pace(10, unit="answers")
    assert str(pace) == ""
    pace.advance(0, now=0.0)
    pace.advance(4, now=2.0)
    assert str(pace).startswith("2.00 answers/s, ends ") and str(pace).endswith(" (in 0:00:03)")


def test_a_command_that_failed_before_its_first_stage_does_not_stand_in_the_way_of_the_corrected_one(
    tmp_path: Path,
) -> None:
    with (
        pytest.raises(InputError, match="no such file"),
        Run.open(tmp_path / "run", recipe="dpo", config=Options(seed=1)),
    ):
        raise InputError("no such file")
    with Run.open(tmp_path / "run", recipe="dice", config=Options(seed=2)) as run:
        run.stage("draw", draw, PROMPTS, seed=2)
    assert "seed: 2" in (tmp_path / "run/config.yaml").read_text()
    with (
        pytest.raises(InputError, match="seed: 2 here, 3 asked for"),
        Run.open(tmp_path / "run", recipe="dice", config=Options(seed=3)),
    ):
        pass
