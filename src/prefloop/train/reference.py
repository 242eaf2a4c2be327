"""Log-probabilities of whole files of responses under one model folder: scoring and reference passes.

The model is loaded, used and released here, so a caller that needs two models never holds both. Finished rows are
kept in the stage's scratch folder: a pass that is killed goes on where it was.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed
from prefloop.models import ModelRef, choose_device, load_model, load_tokenizer
from prefloop.records import Pair, Prompt, Response
from prefloop.run import Stage
from prefloop.train.config import Compute
from prefloop.train.logprobs import choose_path, response_logps, rows
from prefloop.train.packing import TokenGroup


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
    stage = stage or Stage.detached()
    if not items:
        return []
    chat = ChatFormat(load_tokenizer(ref))
    groups = [token_group(chat, prompt, responses) for prompt, responses in items]
    device = choose_device(compute.device)
    dtype = choose_dtype(compute, device)
    model = load_model(ref, device=device).requires_grad_(False)
    path, why = choose_path(model, groups)
    stage.event("path", model=ref.name, path=path, why=why)

    finished = stage.scratch / f"{part}.jsonl" if stage.scratch else None
    result = _read_finished(finished)
    with stage.progress(len(items), unit="prompts", description=f"log-probabilities under {ref.name}") as advance:
        advance(len(result))
        for row in rows(groups, compute.tokens_per_forward, path=path):
            if all(index in result for index in row):
                continue
            with torch.inference_mode():
                flat = response_logps(model, [groups[i] for i in row], path=path, dtype=dtype).sums.tolist()
            values = iter(flat)
            computed = {index: [next(values) for _ in groups[index].responses] for index in row}
            _append(finished, computed)
            result.update(computed)
            advance(len(row))
    for index, (prompt, _) in enumerate(items):
        if not all(value == value and value > float("-inf") for value in result[index]):
            raise CheckFailed(
                f"log-probability {result[index]} of a response to prompt {prompt.id!r} under {ref.name} is not "
                "finite; the model's weights are probably damaged, or its context is shorter than the row"
            )
    return [result[index] for index in range(len(items))]


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
    pairs: Sequence[Pair], reference: ModelRef, *, compute: Compute, stage: Stage | None = None
) -> list[Pair]:
    """Pairs whose `reference_logps` are those of `reference`: kept where the scorer computed them, else computed."""
    stage = stage or Stage.detached()
    missing = [i for i, pair in enumerate(pairs) if pair.reference != reference.fingerprint]
    stage.count("reference log-probabilities already known from scoring", len(pairs) - len(missing))
    stage.count("reference log-probabilities computed", len(missing))
    items = [(pairs[i].prompt, (pairs[i].chosen, pairs[i].rejected)) for i in missing]
    completed = list(pairs)
    for i, (chosen, rejected) in zip(missing, logps_under(reference, items, compute=compute, stage=stage), strict=True):
        update = {"reference_logps": (chosen, rejected), "reference": reference.fingerprint}
        completed[i] = pairs[i].model_copy(update=update)
    return completed
