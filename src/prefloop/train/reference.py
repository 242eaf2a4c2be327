"""Log-probabilities of whole files of responses under one model: scoring and reference passes.

The model of a pass is loaded, used and released here, so a caller that needs two models never holds both. Finished rows
are kept in the stage's scratch folder: a pass that is killed goes on where it was.

Log-probabilities under the reference of a training round come from the first of these that has them:

1. the scorer, where it has just scored the responses under this very model (DICE);
2. the disk cache: an earlier reference pass over the same rows;
3. the policy in training with its adapter switched off, where that is the reference (`Learner.with_reference_logps`);
4. a second model.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from prefloop.atomic import write_atomically
from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.fingerprints import sha256
from prefloop.models import ModelRef, cache_folder, choose_device, load_model, load_tokenizer
from prefloop.records import Judged, Pair, Prompt, Response
from prefloop.run import Stage, environment
from prefloop.train.checks import check_finite
from prefloop.train.config import Compute
from prefloop.train.logprobs import known_path, response_logps, rows
from prefloop.train.memory import reused_memory
from prefloop.train.packing import TokenGroup, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFINITION = "sum over response tokens of log pi(y_i | x, y_<i), nats, temperature 1, end token included; 1"
"""What a cached number means; the last figure counts changes of the computation that change its result."""


class Pass(NamedTuple):
    """Log-probabilities of every response of every group, in nats, and the path that gave them."""

    sums: list[list[float]]
    path: str
    why: str


def choose_dtype(compute: Compute, device: str) -> str:
    """The precision of matrix products in scoring and training."""
    if compute.dtype != "auto":
        return compute.dtype
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def token_group(chat: ChatFormat, prompt: Prompt, responses: Sequence[Response]) -> TokenGroup:
    """The ids of a prompt and of its responses; sampled ids are taken as they are, text is tokenised."""
    encoded = tuple(chat.with_token_ids(response).token_ids or () for response in responses)
    return TokenGroup(tuple(chat.prompt_ids(prompt)), encoded)


def logps_under(
    ref: ModelRef,
    items: Sequence[tuple[Prompt, Sequence[Response]]],
    *,
    compute: Compute,
    part: str = "logps",
    stage: Stage | None = None,
) -> list[list[float]]:
    """For every (prompt, responses): the summed log-probability of each response under the model, in nats.

    `part` names the finished rows in the stage's scratch folder; a stage with two passes gives each its own.
    Raises CheckFailed when one is not a number.
    """
    if not items:
        return []
    chat = ChatFormat(load_tokenizer(ref))
    groups = [token_group(chat, prompt, responses) for prompt, responses in items]
    sums = loaded_pass(groups, ref, compute=compute, part=part, stage=stage or Stage.detached()).sums
    check_finite(sums, [prompt.id for prompt, _ in items], ref.name)
    return sums


def loaded_pass(groups: Sequence[TokenGroup], ref: ModelRef, *, compute: Compute, part: str, stage: Stage) -> Pass:
    """`model_pass` under a model that is loaded for it and released after it."""
    model = load_model(ref, device=choose_device(compute.device)).requires_grad_(False)
    return model_pass(groups, model, ref.name, compute=compute, part=part, stage=stage)


@reused_memory()
def model_pass(
    groups: Sequence[TokenGroup], model: "PreTrainedModel", name: str, *, compute: Compute, part: str, stage: Stage
) -> Pass:
    """Log-probabilities of all groups under a model in memory, row by row under the token budget.

    A group that is larger than the budget goes through in pieces, its prompt with each.
    """
    dtype = choose_dtype(compute, model.device.type)
    path, why = known_path(model, groups)
    stage.event("path", model=name, path=path, why=why)
    owners, pieces = zip(*split(groups, compute.tokens_per_forward, shared=path == "shared"), strict=True)
    finished = stage.scratch / f"{part}.jsonl" if stage.scratch else None
    result = _read_finished(finished)
    with stage.progress(len(pieces), unit="groups", description=f"log-probabilities under {name}") as advance:
        advance(len(result))
        for row in rows(pieces, compute.tokens_per_forward, path=path):
            if all(index in result for index in row):
                continue
            with torch.no_grad():
                flat = response_logps(model, [pieces[i] for i in row], path=path, dtype=dtype).sums.tolist()
            values = iter(flat)
            computed = {index: [next(values) for _ in pieces[index].responses] for index in row}
            _append(finished, computed)
            result.update(computed)
            advance(len(row))
    sums: list[list[float]] = [[] for _ in groups]
    for index, owner in enumerate(owners):
        sums[owner] += result[index]
    return Pass(sums, path, why)


def _append(file: Path | None, computed: dict[int, list[float]]) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(list(computed.items())) + "\n")


def _read_finished(file: Path | None) -> dict[int, list[float]]:
    """Rows finished before a kill; a half-written last line is one row computed again."""
    finished: dict[int, list[float]] = {}
    if file is not None and file.is_file():
        text = file.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            file.write_text(complete, encoding="utf-8")
        for line in complete.splitlines():
            finished.update({index: values for index, values in json.loads(line)})
    return finished


def with_reference_logps(
    items: Sequence[Judged],
    reference: ModelRef,
    *,
    compute: Compute,
    prefixes: bool = False,
    stage: Stage | None = None,
) -> list[Judged]:
    """Items whose `reference_logps` are those of `reference`: from the scorer, the disk cache or a second model.

    `prefixes`: pairs get their `reference_prefix_logps` too.
    """
    stage = stage or Stage.detached()

    def run_pass(groups: Sequence[TokenGroup], part: str) -> Pass:
        return loaded_pass(groups, reference, compute=compute, part=part, stage=stage)

    return fill_in(
        items,
        reference,
        run_pass,
        source="computed",
        why="a second model, loaded for this pass: neither scorer nor cache has them, and it is no adapter's base",
        compute=compute,
        prefixes=prefixes,
        stage=stage,
    )


def fill_in(
    items: Sequence[Judged],
    reference: ModelRef,
    run_pass: Callable[[Sequence[TokenGroup], str], Pass],
    *,
    source: str,
    why: str,
    compute: Compute,
    prefixes: bool = False,
    stage: Stage,
) -> list[Judged]:
    """Items with the log-probabilities of `reference`; what neither scorer nor disk knows comes from `run_pass`.

    Every source that was used, and why, is noted, counted and put into the event log; a pass is kept on disk, and
    `run_pass` keeps its finished rows under the name that it is given. `prefixes`: see `with_reference_logps`.
    """
    found = _fill_in(items, reference, run_pass, "logps", source, why, compute, stage)
    if not prefixes:
        return found
    chat = ChatFormat(load_tokenizer(reference))
    cut = [prefixes_of(item, chat) for item in items if isinstance(item, Pair)]
    stage.note(
        "log-probabilities of the tokens that both answers of a pair have room for come from a pass of their own"
    )
    known = _fill_in(cut, reference, run_pass, "prefix-logps", source, why, compute, stage)
    return [
        item.model_copy(update={"reference_prefix_logps": one.reference_logps})
        for item, one in zip(found, known, strict=True)
    ]


def prefixes_of(pair: Pair, chat: ChatFormat) -> Pair:
    """The pair with both responses cut to the tokens of the shorter one, and without log-probabilities."""
    ids = [chat.with_token_ids(response).token_ids or () for response in pair.responses]
    shorter = min(map(len, ids))
    chosen, rejected = (
        response.model_copy(update={"token_ids": own[:shorter]})
        for response, own in zip(pair.responses, ids, strict=True)
    )
    return pair.model_copy(update={"chosen": chosen, "rejected": rejected, "reference_logps": None, "reference": None})


def _fill_in(
    pairs: Sequence[Judged],
    reference: ModelRef,
    run_pass: Callable[[Sequence[TokenGroup], str], Pass],
    part: str,
    source: str,
    why: str,
    compute: Compute,
    stage: Stage,
) -> list[Judged]:
    missing = [pair for pair in pairs if pair.reference != reference.fingerprint]
    known = len(pairs) - len(missing)
    _report(stage, known, "already known from scoring", f"scored under {reference.name}, which is the reference")
    if not missing:
        return list(pairs)
    chat = ChatFormat(load_tokenizer(reference))
    groups = [token_group(chat, pair.prompt, pair.responses) for pair in missing]
    key = cache_key(groups, reference, compute)
    file = cache_folder() / "logps" / f"{key}.logps"
    found = read_cached(file, key, stage)
    if found:
        stage.event("path", model=reference.name, path=found.path, why=found.why)
        source, why = "read from the disk cache", f"an earlier pass over the same rows, {file.name[:12]}..."
    else:
        found = run_pass(groups, part)
        check_finite(found.sums, [pair.prompt.id for pair in missing], reference.name)
        write_cached(file, key, groups, found, stage)
    _report(stage, len(missing), source, why)
    values = iter(found.sums)
    return [
        pair
        if pair.reference == reference.fingerprint
        else pair.model_copy(update={"reference_logps": tuple(next(values)), "reference": reference.fingerprint})
        for pair in pairs
    ]


def _report(stage: Stage, n: int, source: str, why: str) -> None:
    if n:
        stage.note(f"reference log-probabilities of {n} pairs {source}: {why}")
        stage.event("reference", source=source, pairs=n, why=why)
    stage.count(f"reference log-probabilities {source}", n)


def cache_key(groups: Sequence[TokenGroup], ref: ModelRef, compute: Compute) -> str:
    """A hash of what decides the result of a pass: token ids, model, precision, budget, definition, kind of device and
    library versions. On one machine, the result to the last bit.

    The path (shared or padded) is a function of these, so it is stored with the result: it is known only once a model
    is loaded. The model counts with its configuration, which decides the numbers as much as the weights do.
    """
    device = choose_device(compute.device)
    numerics = [device, choose_dtype(compute, device), compute.tokens_per_forward, torch.get_num_threads()]
    total = hashlib.sha256(json.dumps([DEFINITION, ref.fingerprint, numerics, environment()]).encode())
    for group in groups:
        total.update(json.dumps([group.prompt_ids, group.responses]).encode())
    return total.hexdigest()


def read_cached(file: Path, key: str, stage: Stage) -> Pass | None:
    """The pass stored under `key`; None when there is none. A file that is not as it was written is never believed.

    A whole file is believed for its key, without a model to compare with: to load one is most of the cost that the
    cache saves. Where the reference is the model in training, `check_zero_margin` compares at the first step.
    """
    try:
        digest, _, content = file.read_text(encoding="utf-8", errors="replace").partition("\n")
    except OSError:
        return None
    if digest != sha256(key + content):
        stage.note(f"{file} is damaged; its log-probabilities are computed again")
        return None
    stored = json.loads(content)
    return Pass(stored["sums"], stored["path"], stored["why"])


def write_cached(file: Path, key: str, groups: Sequence[TokenGroup], result: Pass, stage: Stage) -> None:
    """Keep a pass: a line with the hash of key and content, then sums and predicted tokens of every response.

    A cache that cannot be written costs time later, not the run.
    """
    counts = [[len(ids) - (not group.prompt_ids) for ids in group.responses] for group in groups]
    content = json.dumps({"definition": DEFINITION, "counts": counts, **result._asdict()})
    try:
        write_atomically(file, f"{sha256(key + content)}\n{content}")
    except InputError as error:
        stage.note(f"reference log-probabilities are not kept for later: {error}")
