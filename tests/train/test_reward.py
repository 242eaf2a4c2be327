"""Reward models: rewards and gradients against the plain classifier, the loss in closed form, what is saved."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.feedback.annotators import save_tiny_reward_model
from tests.tiny import Template, save_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, CodeGenConfig

from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed, InputError
from prefloop.feedback.reward_model import RewardModel, conversation_ids
from prefloop.models import ModelRef, load_tokenizer
from prefloop.records import Pair, Prompt, Response
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.learner import Learner
from prefloop.train.logprobs import Path as LogpsPath
from prefloop.train.logprobs import choose_path
from prefloop.train.reward import RewardObjective, bradley_terry, conversation_group
from prefloop.train.scalar import (
    check_has_classifier,
    last_values,
    load_scalar_model,
    response_values,
    scalar_head,
)

COMPUTE = Compute(device="cpu", dtype="float32", tokens_per_forward=200)
TRAIN = Train(steps=4, batch_size=4, learning_rate=5e-3, warmup_steps=0)
ANSWERS = [("Red.", "The colour of the sky on a clear day."), ("Tea, as it is quiet.", "No"), ("1, 2, 3", "one one")]
PAIRS = [
    Pair(
        prompt=Prompt.of(f"Question {i}?", id=f"p{i}"),
        chosen=Response(text=a, score=2.0),
        rejected=Response(text=b, score=0.5),
    )
    for i, (a, b) in enumerate(ANSWERS)
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef.of(save_tiny_model(tmp_path_factory.mktemp("start") / "tiny", seed=3))


def new_learner(start: ModelRef, config: Train = TRAIN, **options: float) -> Learner[Pair]:
    objective = replace(RewardObjective(), **options)
    return Learner(start, PAIRS, objective=objective, config=config, compute=COMPUTE, seed=0)


def plain_reward(model: torch.nn.Module, chat: ChatFormat, prompt: Prompt, text: str) -> torch.Tensor:
    """The library's own forward over one conversation."""
    ids = conversation_ids(chat, prompt, text)
    return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0, 0]


@pytest.mark.parametrize("path", ["shared", "padded"])
@pytest.mark.parametrize("template", ["chatml", "zephyr", "llama3"])
def test_rewards_and_gradients_are_those_of_the_plain_classifier(
    tmp_path: Path, template: Template, path: LogpsPath
) -> None:
    folder = save_tiny_model(tmp_path / "tiny", seed=1, template=template)
    if template == "llama3":  # conversations end with the padding token, which the library passes over
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = "<|eot_id|>"
        tokenizer.save_pretrained(folder)
    ref = ModelRef.of(folder)
    chat = ChatFormat(load_tokenizer(ref))
    model = load_scalar_model(ref, head_std=1.0)
    groups = [conversation_group(chat, pair) for pair in PAIRS]
    assert all(len(group.prompt_ids) > 5 for group in groups)
    assert choose_path(model, groups)[0] == "shared"
    rewards = last_values(model, groups, path=path)
    plain = torch.stack([plain_reward(model, chat, p.prompt, r.text) for p in PAIRS for r in p.responses])
    assert torch.allclose(rewards, plain, atol=1e-5) and float(plain.detach().std()) > 0.1
    weights = torch.linspace(-1, 1, 6)
    found = torch.autograd.grad((rewards * weights).sum(), list(model.parameters()))
    expected = torch.autograd.grad((plain * weights).sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


def test_values_are_the_heads_outputs_before_every_token(start: ModelRef) -> None:
    chat = ChatFormat(load_tokenizer(start))
    model = load_scalar_model(start, head_std=1.0)
    group = conversation_group(chat, PAIRS[0])
    values = response_values(model, [group])
    for i, own in enumerate(values.tokens.split(values.counts.tolist())):
        ids = torch.tensor([[*group.prompt_ids, *group.responses[i]]])
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        expected = scalar_head(model)[1](hidden)[len(group.prompt_ids) - 1 : -1, 0]
        assert torch.allclose(own, expected, atol=1e-5)


def test_the_loss_in_closed_form() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    assert bradley_terry(zero, zero, centre=0.01).item() == pytest.approx(math.log(2))
    assert bradley_terry(2 * one, one).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert bradley_terry(2 * one, one, margin=1.0).item() == pytest.approx(math.log(2))
    assert bradley_terry(2 * one, one, centre=0.01, weight=2.0).item() == pytest.approx(
        2 * (math.log(1 + math.exp(-1)) + 0.09)
    )
    # The optimum of a soft label: sigmoid(d) = p.
    d = torch.tensor([math.log(0.8 / 0.2)], requires_grad=True)
    bradley_terry(d, torch.zeros(1), p=0.8).sum().backward()
    assert d.grad is not None and abs(float(d.grad)) < 1e-7
    # Centring moves the sum of both and leaves their difference.
    r = torch.zeros(2, requires_grad=True)
    bradley_terry(r[:1] + 3, r[1:] + 3, centre=0.01).sum().backward()
    assert r.grad is not None and r.grad.tolist() == pytest.approx([-0.5 + 0.12, 0.5 + 0.12])


def test_it_begins_at_ln_2_and_learns(start: ModelRef) -> None:
    learner = new_learner(start)
    rows = [learner.step(PAIRS, step) for step in range(4)]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert rows[0]["correct"] == 0.5 and rows[0]["chosen_reward"] == 0.0
    assert rows[-1]["loss"] < 0.6 and rows[-1]["margin"] > 0.2
    assert not learner.unmoved


def test_margins_come_from_scores(start: ModelRef) -> None:
    row = new_learner(start, margin=2.0).step(PAIRS, 0)
    assert row["loss"] == pytest.approx(math.log(1 + math.exp(3.0)))
    without = PAIRS[0].model_copy(update={"chosen": Response(text="Red.")})
    with pytest.raises(InputError, match="margin = 2: the pair of prompt 'p0' has no scores"):
        new_learner(start, margin=2.0).step([without], 0)


def test_a_head_that_is_not_zero_is_no_new_head(start: ModelRef, tmp_path: Path) -> None:
    learner = new_learner(start)
    learner.step(PAIRS, 0)
    learner.write(tmp_path / "reward")
    with pytest.raises(CheckFailed, match="the start model is a reward model already"):
        new_learner(ModelRef.of(tmp_path / "reward")).step(PAIRS, 0)


def test_a_model_without_a_classifier_is_known_from_its_configuration(start: ModelRef, tmp_path: Path) -> None:
    check_has_classifier(start)
    CodeGenConfig(n_layer=1, n_head=1, n_embd=8).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no reward or value model can be made of m \(codegen\); expected a causal"):
        check_has_classifier(ModelRef(name="m", path=tmp_path, fingerprint="", weights=""))
    save_tiny_reward_model(tmp_path / "one"), save_tiny_reward_model(tmp_path / "three", labels=3)
    check_has_classifier(ModelRef.of(tmp_path / "one"))
    with pytest.raises(InputError, match=r"three: it is a classifier with 3 labels; expected a causal"):
        check_has_classifier(ModelRef.of(tmp_path / "three"))


def test_a_padding_token_that_the_model_does_not_have_is_told(start: ModelRef, tmp_path: Path) -> None:
    """As after a pad token was added to the tokenizer, and the embeddings were not resized."""
    folder = Path(shutil.copytree(start.path, tmp_path / "model"))
    tokenizer = load_tokenizer(start)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    said = rf"pads with '<new>' \({len(tokenizer) - 1}\), and the model has {len(tokenizer) - 1} tokens; resize"
    with pytest.raises(InputError, match=said):
        load_scalar_model(ModelRef.of(folder))


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_saved_is_what_was_trained(start: ModelRef, tmp_path: Path, rank: int) -> None:
    learner = new_learner(start, TRAIN.replace(lora=Lora(rank=rank)))
    for step in range(4):
        learner.step(PAIRS, step)
    assert not learner.unmoved  # the head, and of LoRA both factors
    groups = learner.tokenise(PAIRS)
    with torch.no_grad():
        trained = last_values(learner.model, groups).tolist()
    learner.write(tmp_path / "reward")
    annotator = RewardModel(ModelRef.of(tmp_path / "reward"), compute=COMPUTE)
    found = annotator.score([(pair.prompt, response) for pair in PAIRS for response in pair.responses])
    assert found == pytest.approx(trained, abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert model.config.num_labels == 1
    plain = [plain_reward(model, learner.chat, p.prompt, r.text).item() for p in PAIRS for r in p.responses]
    assert plain == pytest.approx(trained, abs=1e-5)
    assert max(trained) - min(trained) > 0.1
