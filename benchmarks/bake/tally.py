"""What a run consumes, counted where it is consumed: label calls, tokens sampled, and tokens through models."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts everything that happens inside, whatever the recipe.

    label_calls        questions to the annotator: a comparison of two different answers, or a score of one
    tokens_sampled     of the answers that were sampled, their end tokens included
    tokens_trained     positions that went through a model with gradients, prompts included
    tokens_scored      the same without gradients, but for those of sampling, and of a proof that is made once a process
                       (a training proves its path each time, on a hundred tokens, a reward model how it is
                       read when it is loaded, on a few: these are counted)
    """
    from transformers.models.llama.modeling_llama import LlamaModel

    from prefloop.feedback.rule import RuleAnnotator
    from prefloop.sample.transformers import TransformersEngine
    from prefloop.train import learner, logprobs

    # Imported in the block below for the first time, it would keep for good what stands in for this function there.
    assert learner.choose_path is logprobs.choose_path

    tally: Counter[str] = Counter()
    aside = [False]
    judge, score = RuleAnnotator.judge, RuleAnnotator.score
    sample, forward, prove = TransformersEngine.sample, LlamaModel.forward, logprobs.choose_path

    @wraps(judge)
    def counted_judge(self: Any, comparisons: Any, **more: Any) -> Any:
        tally["label_calls"] += sum(not comparison.identical for comparison in comparisons)
        return judge(self, comparisons, **more)

    @wraps(score)
    def counted_score(self: Any, answers: Any) -> Any:
        tally["label_calls"] += len(answers)
        return score(self, answers)

    @wraps(sample)
    def counted_sample(self: Any, *args: Any, **more: Any) -> Any:
        aside[0] = True
        try:
            groups = sample(self, *args, **more)
        finally:
            aside[0] = False
        tally["tokens_sampled"] += sum(response.length_tokens for group in groups for response in group.responses)
        return groups

    @wraps(prove)
    def uncounted_proof(*args: Any, **more: Any) -> Any:
        aside[0] = True
        try:
            return prove(*args, **more)
        finally:
            aside[0] = False

    @wraps(forward)
    def counted_forward(self: Any, *args: Any, **more: Any) -> Any:
        import torch

        if not aside[0]:
            given = args[0] if args else more["input_ids"] if more.get("input_ids") is not None else None
            positions = given if given is not None else more["inputs_embeds"][..., 0]
            kind = "tokens_trained" if torch.is_grad_enabled() else "tokens_scored"
            tally[kind] += positions.numel()
        return forward(self, *args, **more)

    with (
        patch.object(RuleAnnotator, "judge", counted_judge),
        patch.object(RuleAnnotator, "score", counted_score),
        patch.object(TransformersEngine, "sample", counted_sample),
        patch.object(LlamaModel, "forward", counted_forward),
        patch.object(logprobs, "choose_path", uncounted_proof),
    ):
        yield tally
