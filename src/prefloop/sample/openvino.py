"""Sampling with OpenVINO GenAI on a CPU: continuous batching with a paged cache, several times as fast as transformers.

The policy is written as GGUF (`gguf_export`) and the pipeline builds its own graph from that. Token ids go in and come
out: its tokenizer is never asked. A prompt is one request with one seed, and its K answers branch off its cache.

Two ways of the pipeline are kept off, because it then samples from a cache that is not the answer's (seen with release
2026.4 on a tiny model: log-probabilities wrong by whole nats, no error): prefix caching, when a cached block is taken
back for other tokens, and running out of cache with several answers to a prompt, when it cuts answers short. So the
cache has room for every answer that is under way, and no request is made before there is.
"""

import math
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from prefloop.data.chat import ChatFormat
from prefloop.errors import EngineError
from prefloop.models import ModelRef, model_config
from prefloop.progress import Advance, ignore
from prefloop.records import Group, Prompt, Response
from prefloop.sample.engine import answer_seed, check_request, checked_prompt_ids, ends, finish_reason
from prefloop.sample.gguf_export import gguf_obstacle, write_gguf
from prefloop.sample.sampling import Sampling

# Mean distance, in nats a token, from the float32 trainer's log-probabilities. Seen on SmolLM2-135M: 0.003 with float32
# products (over weights rounded to float16) and 0.03 with bfloat16 ones.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.1}

PRECISION = {"float32": "f32", "bfloat16": "bf16"}
BLOCK = 32
"""Tokens of one block of the pipeline's cache on a CPU."""

EVERY_TOKEN = 2**31 - 1
"""`top_k` that leaves nothing out; the pipeline's own default is 50."""


def openvino_obstacle(policy: ModelRef, sampling: Sampling, device: str) -> str | None:
    """Why this engine cannot sample from this model in exactly this way here, or None."""
    if device != "cpu":
        return f"it runs on CPUs, and the device is {device}"
    for module, package in (("openvino_genai", "openvino-genai"), ("gguf", "gguf")):
        if find_spec(module) is None:
            return f"{package} is not installed (pip install 'prefloop[openvino]')"
    if sampling.min_p is not None and sampling.top_p < 1:
        return "it applies min_p before top_p, which transformers does after it (use one of them)"
    if not list(policy.path.glob("*.safetensors")):
        return "its weights are not in safetensors files"
    return gguf_obstacle(model_config(policy))


@dataclass
class _Answer:
    """One answer as it comes."""

    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


@dataclass(eq=False)
class _Request:
    """The answers to one prompt. The pipeline numbers its sequences in an order of its own; we sort them."""

    prompt: int
    handle: Any
    answers: dict[int, _Answer] = field(default_factory=dict)


class OpenVinoEngine:
    """An `Engine` over a model folder of a family that `gguf_obstacle` lets pass.

    `dtype`: precision of products and cache ("float32" or "bfloat16"); the weights are float16 either way.
    `batch_size`: answers that are under way at once; when those to one prompt have ended, those to the next take their
    place. The random numbers of an answer belong to (seed, prompt id, K): with another K the answers to a prompt are
    others. `folder`: where the policy's file may lie meanwhile, as large as its weights in float16.
    """

    def __init__(
        self,
        policy: ModelRef,
        chat: ChatFormat,
        *,
        dtype: str = "float32",
        batch_size: int = 64,
        context: int | None,
        folder: Path | None = None,
    ) -> None:
        self.chat, self.context, self.batch_size = chat, context, batch_size
        self.tolerance: float | None = TOLERANCE[dtype]
        self.name = policy.name
        self._precision = PRECISION[dtype]
        self._policy = policy
        self._folder = Path(tempfile.mkdtemp(prefix="openvino-", dir=folder))
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._pipeline: Any = None
        self._blocks = self._longest = self._requests = 0

    def prompt_lengths(self, prompts: Sequence[Prompt], *, sampling: Sampling) -> list[int]:
        found = [len(ids) for ids in checked_prompt_ids(self.chat, prompts, sampling, self.context)]
        # The cache is made for the longest once, and not again for every shard that is longer than the last.
        self._longest = max([self._longest, *found])
        return found

    def sample(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seed: int, advance: Advance = ignore
    ) -> list[Group]:
        check_request(prompts, k)
        prompt_ids = checked_prompt_ids(self.chat, prompts, sampling, self.context)
        if not prompts:
            return []
        # The pipeline branches only where it draws; greedy answers to a prompt are all the same one.
        distinct = k if sampling.temperature > 0 else 1
        at_once = min(distinct, self.batch_size)
        longest = max(self._longest, *map(len, prompt_ids)) + sampling.max_new_tokens
        pipeline = self._pipeline_for(self.batch_size * (math.ceil(longest / BLOCK) + 1))
        found: list[list[_Answer]] = [[] for _ in prompts]
        try:
            for start in range(0, distinct, at_once):
                part = min(at_once, distinct - start)
                seeds = [answer_seed(seed, prompt.id, start) for prompt in prompts]
                for request in self._decode(pipeline, prompt_ids, seeds, part, sampling, advance):
                    found[request.prompt] += [request.answers[number] for number in sorted(request.answers)]
            advance((k - distinct) * len(prompts))
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed on {self.name}: {' '.join(str(error).split())[:300]}") from None
        return [
            Group(
                prompt=prompt,
                responses=tuple(self._response(answer, prompt, sampling) for answer in answers) * (k // distinct),
            )
            for prompt, answers in zip(prompts, found, strict=True)
        ]

    def close(self) -> None:
        self._pipeline = None
        self._remove()

    def _decode(
        self,
        pipeline: Any,
        prompt_ids: list[list[int]],
        seeds: list[int],
        k: int,
        sampling: Sampling,
        advance: Advance,
    ) -> Iterator[_Request]:
        """Yields the answers to a prompt as the last of them ends; an interruption leaves nothing on the pipeline."""
        waiting = deque(range(len(prompt_ids)))
        requests: list[_Request] = []
        try:
            while waiting or requests:
                while waiting and (len(requests) + 1) * k <= self.batch_size:
                    prompt = waiting.popleft()
                    requests.append(self._ask(pipeline, prompt, prompt_ids[prompt], seeds[prompt], k, sampling))
                pipeline.step()
                done = [request for request in requests if self._read(request)]
                requests = [request for request in requests if request not in done]
                for request in done:
                    advance(len(request.answers))
                yield from done
        finally:
            for request in requests:
                request.handle.cancel()
            while pipeline.has_non_finished_requests():
                pipeline.step()

    def _ask(
        self, pipeline: Any, prompt: int, prompt_ids: list[int], seed: int, k: int, sampling: Sampling
    ) -> _Request:
        import openvino

        config = generation_config(self.chat, sampling, seed)
        config.num_return_sequences = k
        self._requests += 1
        ids = openvino.Tensor(np.array([prompt_ids], dtype=np.int64))
        return _Request(prompt, pipeline.add_request(self._requests, ids, config))

    def _read(self, request: _Request) -> bool:
        """Take what has come: token by token of a single answer, all at the end of several. True when that is all."""
        import openvino_genai

        if request.handle.can_read():
            for number, output in request.handle.read().items():
                answer = request.answers.setdefault(number, _Answer())
                answer.token_ids += output.generated_ids
                answer.logps += output.generated_log_probs
        return request.handle.get_status() != openvino_genai.GenerationStatus.RUNNING

    def _response(self, answer: _Answer, prompt: Prompt, sampling: Sampling) -> Response:
        ids, logps = answer.token_ids, answer.logps
        # The pipeline knows nothing of stop strings and has gone on.
        end = next((n for n in range(1, len(ids)) if ends(self.chat, ids[:n], sampling)), len(ids))
        ids, logps = ids[:end], logps[:end]
        bad = next((i for i, logp in enumerate(logps) if not math.isfinite(logp)), None)
        if bad is not None:
            raise EngineError(
                f"the log-probability of token {bad} of an answer to prompt {prompt.id!r} is not finite; the weights "
                f"of {self.name} overflow in {self._precision} (try --compute.sampling-dtype float32)"
            )
        try:
            reason = finish_reason(self.chat, ids, sampling)
        except ValueError as error:
            raise EngineError(
                f"OpenVINO cut an answer to prompt {prompt.id!r} short ({error}); use --engine transformers"
            ) from None
        return Response(
            text=self.chat.decode(ids),
            token_ids=tuple(ids),
            finish_reason=reason,
            sampling_logps=tuple(round(logp, 6) for logp in logps),
        )

    def _pipeline_for(self, blocks: int) -> Any:
        """The pipeline with at least so many cache blocks; built again when the one there is has fewer."""
        import openvino_genai

        if not self._folder.is_dir():
            raise EngineError("this engine was closed; load another")
        if not (self._folder / "policy.gguf").is_file():
            write_idle_tokenizer(self._folder)
            write_gguf(self._policy, self._folder / "policy.gguf")
        if self._pipeline is None or blocks > self._blocks:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.num_kv_blocks = blocks
            scheduler.max_num_seqs = self.batch_size
            scheduler.max_num_batched_tokens = max(2048, self.batch_size)
            scheduler.enable_prefix_caching = False
            properties = {"INFERENCE_PRECISION_HINT": self._precision, "KV_CACHE_PRECISION": self._precision}
            self._pipeline = None  # the old one's memory, before the new one's
            try:
                self._pipeline = openvino_genai.ContinuousBatchingPipeline(
                    str(self._folder / "policy.gguf"),
                    openvino_genai.Tokenizer(str(self._folder)),
                    scheduler,
                    "CPU",
                    **properties,
                )
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise EngineError(f"OpenVINO cannot load {self.name}: {reason}") from None
            self._blocks = blocks
        return self._pipeline


def generation_config(chat: ChatFormat, sampling: Sampling, seed: int) -> Any:
    """`sampling` in the pipeline's words, every value stated. Stop strings are not among them: it would take back the
    tokens of one, and its idle tokenizer cannot spell them; `OpenVinoEngine` looks for them itself.
    """
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = sampling.max_new_tokens
    config.do_sample = sampling.temperature > 0
    config.temperature = sampling.temperature or 1.0
    config.top_k = sampling.top_k or EVERY_TOKEN
    config.top_p = sampling.top_p
    config.min_p = sampling.min_p or 0.0
    config.rng_seed = seed
    config.logprobs = 1
    # Left unset, it would be that of the idle tokenizer, which is a token like any other of the model's.
    config.eos_token_id = chat.end_token_id
    config.stop_token_ids = {*chat.stop_token_ids, *sampling.stop_token_ids}
    config.include_stop_str_in_output = True
    config.repetition_penalty = 1.0
    config.presence_penalty = config.frequency_penalty = 0.0
    return config


def write_idle_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes. The pipeline does not start without one, and a model's own takes seconds to convert;
    only ids go in and out.
    """
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=alphabet[0], pad_token=alphabet[0])
    converted: Any = convert_tokenizer(tokenizer, with_detokenizer=True)
    encoder, decoder = converted
    openvino.save_model(encoder, folder / "openvino_tokenizer.xml")
    openvino.save_model(decoder, folder / "openvino_detokenizer.xml")
