"""A world in which the true reward is known exactly: questions, a small language model trained on the spot, the truth,
and an annotator that is noisy and likes length.

Asked about three of twelve things, the model answers with words. Each thing has two facts (words); fillers say
nothing. The model that is trained here talks as its data does: half of its words are facts of the things asked about,
often said before, a quarter facts of something else and a quarter fillers; and it ends at random.

    truth(x, y)  = facts asked for, each once - wrong facts - 0.15 words         (-1 for no word at all)
    score(x, y)  = truth(x, y) + 0.2 words + 0.5 Gumbel noise

So a filler or a repetition loses 0.15 by the truth and gains 0.05 by the annotator: an answer with all six facts and
nothing else is the best there is (5.1 where they differ), and an annotator is pleased most by one that goes on to the
limit (2.4).
The difference of two Gumbel variables is logistic, so the higher of two scores wins with the Bradley-Terry probability
of twice their difference: one function is the annotator of pairs, of single answers, and of soft labels. Its noise is
drawn by a hash of question and answer: who asks again gets the same answer, as of a judge at temperature 0.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefloop.records import Prompt, Response
from prefloop.seeds import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

THINGS = "apple lantern river saddle garden violin hammer teapot feather anchor blanket candle".split()
FACTS = "green wooden shiny heavy small round yellow narrow cheap old sweet loud rare soft sharp warm".split()
FILLERS = "well so really quite indeed anyway".split()
ASKED = ("describe {}", "tell me about {}", "what of {}", "say what you know of {}")
NUMBERS = [str(number) for number in range(-9, 10)]
"""Rewards in prompts (conditional alignment)."""
SPECIAL = ["<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_NEW_TOKENS = 24
"""23 words and the end, or 24 words."""
WRONG, WORD, SILENCE = 1.0, 0.15, 1.0
"""What they cost."""
LENGTH_BIAS, NOISE = 0.2, 0.5
"""Of the annotator: a word, and the scale of the logistic noise of a comparison."""
WEAK_NOISE = 2.0
"""Of another one."""


def facts_of(thing: int) -> tuple[str, str]:
    """One of the first eight and one of the others."""
    return FACTS[thing % 8], FACTS[8 + (3 * thing + thing // 4) % 8]


FACTS_OF = {name: facts_of(i) for i, name in enumerate(THINGS)}


def questions(n: int, *names: str | int) -> list[str]:
    """n different questions, drawn by the names."""
    rng = generator(0, "questions", *names)
    found: dict[str, None] = {}
    while len(found) < n:
        things = rng.choice(THINGS, size=3, replace=False)
        found[str(rng.choice(ASKED)).format(" ".join(things))] = None
    return list(found)


def asked_for(question: str) -> list[str]:
    """The facts that an answer should have."""
    return [fact for word in question.split() for fact in FACTS_OF.get(word, ())]


def answer(question: str, rng: np.random.Generator) -> str:
    """An answer as the model learns to give them."""
    right, said = asked_for(question), []
    wrong = [fact for fact in FACTS if fact not in right]
    while len(said) < MAX_NEW_TOKENS - 1 and (not said or rng.random() > 0.3):
        u = rng.random()
        said.append(str(rng.choice(right if u < 0.5 else wrong if u < 0.75 else FILLERS)))
    return " ".join(said)


def best_answer(question: str) -> str:
    """The oracle's."""
    return " ".join(dict.fromkeys(asked_for(question)))


def truth(prompt: Prompt, response: Response) -> float:
    """The true reward."""
    words = response.text.split()
    right = set(asked_for(prompt.messages[-1].content))
    wrong = sum(word in FACTS and word not in right for word in words)
    said = len(right.intersection(words)) - WRONG * wrong - WORD * len(words)
    return said if words else -SILENCE


def expected_score(prompt: Prompt, response: Response) -> float:
    """What the annotator likes, without its noise."""
    return truth(prompt, response) + LENGTH_BIAS * len(response.text.split())


def noise(prompt: Prompt, response: Response, scale: float = NOISE) -> float:
    """The annotator's, of an answer: a Gumbel variable."""
    text = f"{prompt.messages[-1].content}\x1f{response.text}"
    u = (int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") + 0.5) / 2**48
    return -scale * math.log(-math.log(u))


def score(prompt: Prompt, response: Response) -> float:
    """The annotator: `rule:bake.world:score`."""
    return expected_score(prompt, response) + noise(prompt, response)


def fair_score(prompt: Prompt, response: Response) -> float:
    """Another one, with the same noise, that does not like length: `rule:bake.world:fair_score`."""
    return truth(prompt, response) + noise(prompt, response)


def weak_score(prompt: Prompt, response: Response) -> float:
    """Another one, that likes the same and errs far more often: `rule:bake.world:weak_score`."""
    return expected_score(prompt, response) + noise(prompt, response, WEAK_NOISE)


def start_model(folder: Path, *, seed: int, steps: int = 350, batch: int = 64) -> Path:
    """Train the model by next-token prediction, and write it as an ordinary transformers folder; one that is there is
    taken as it is.
    """
    import torch
    from torch import Tensor

    from prefloop.data.chat import ChatFormat
    from prefloop.models import write_model
    from small_world import pretrained

    if (folder / "model.safetensors").is_file():
        return folder
    tokenizer = _tokenizer()
    rng, chat = generator(seed, "bake world"), ChatFormat(tokenizer)
    asked = questions(steps * batch // 16, "start", seed)
    known = {question: chat.prompt_ids(Prompt.of(question)) for question in asked}
    words = tokenizer.get_vocab()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(steps):
            inputs = torch.zeros(batch, 16 + MAX_NEW_TOKENS, dtype=torch.long)
            labels = torch.full_like(inputs, -100)
            for i in range(batch):
                question = asked[(step * batch + i) % len(asked)]
                said = [words[word] for word in answer(question, rng).split()]
                row = [*known[question], *said, chat.end_token_id]
                inputs[i, : len(row)] = torch.tensor(row)
                labels[i, len(known[question]) : len(row)] = inputs[i, len(known[question]) : len(row)]
            yield inputs, labels

    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 64}
    model = pretrained(tokenizer, batches(), steps=steps, rate=5e-3, seed=seed, initializer_range=0.1, **shape)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    write_model(folder, model, tokenizer)
    return folder


def _tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    others = {word for asked in ASKED for word in asked.split() if word != "{}"}
    words = [*SPECIAL, *THINGS, *FACTS, *FILLERS, *sorted(others), "reward", *NUMBERS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=SPECIAL[0], eos_token="<|end|>", pad_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer
