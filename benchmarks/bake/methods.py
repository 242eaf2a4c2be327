"""The table of methods: what is compared, one entry a row. A new method is one more entry.

An entry gives the recipe's configuration in a `Setting`, which says what every method has: the start model, the seed's
questions and pairs, a learning rate, and how much it may do (`n` label calls, in batches of `BATCH`). What the papers
leave to the user (learning rate, number of steps, batch) is the same for all; what they publish (beta, mixtures,
coefficients, K) is taken from them, as the recipes' defaults say, with the exceptions noted here: IPO's beta, PPO's two
epochs and the learning rate of its values, the reward in CA's prompts, OPTune's two passes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake.figures import PLAIN
from bake.world import MAX_NEW_TOKENS
from prefloop.config import Config
from prefloop.data.condition import Condition
from prefloop.feedback.options import Feedback
from prefloop.pairs.weights import Weights
from prefloop.recipes.bpo import BpoConfig
from prefloop.recipes.ca import CaConfig
from prefloop.recipes.dice import DiceConfig, Filters
from prefloop.recipes.dpo import DpoConfig
from prefloop.recipes.expo import ExpoConfig
from prefloop.recipes.fa import FaConfig
from prefloop.recipes.mpo import Easy, MpoConfig
from prefloop.recipes.oaif import OaifConfig
from prefloop.recipes.optune import OptuneConfig
from prefloop.recipes.osp import OspConfig
from prefloop.recipes.ppo import Ppo, PpoConfig
from prefloop.recipes.reward_model import RewardModelConfig
from prefloop.recipes.rwr import RwrConfig
from prefloop.recipes.sail import VARIANTS, SailConfig
from prefloop.recipes.steps import LookAt
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Lora, Train

BATCH = 16


@dataclass(frozen=True)
class Case:
    """Circumstances of a row: who annotates, and how many questions there are (none: one for every pair)."""

    annotator: str
    questions: int | None = None


CASES = {
    PLAIN: Case("rule:bake.world:score"),
    "fair": Case("rule:bake.world:fair_score"),
    "weak": Case("rule:bake.world:weak_score"),
    "few": Case("rule:bake.world:score", questions=120),
}
BETAS = {"dpo": 0.1, "ipo": 0.1, "slic": 0.002}
"""The papers', but for IPO: its 1.0 stops at half a nat a pair (docs/methods/oaif.md)."""
SAMPLING = Sampling(temperature=1.0, max_new_tokens=MAX_NEW_TOKENS)
COMPUTE = Compute(dtype="float32", sampling_dtype="float32", tokens_per_forward=4096, sequences_per_batch=128)


@dataclass(frozen=True)
class Setting:
    """What a row is run with. `rate` is the learning rate, `strength` which of the row's settings it is (0, 1, 2),
    `case` the circumstances.
    """

    data: Path
    seed: int
    n: int
    rate: float
    strength: int
    case: Case

    @property
    def annotator(self) -> str:
        return self.case.annotator

    @property
    def steps(self) -> int:
        """Batches in n labels."""
        return round(self.n / BATCH)

    @property
    def common(self) -> dict[str, Any]:
        """Options of every recipe."""
        return {
            "policy": str(self.data / "start"),
            "seed": self.seed,
            "sampling": SAMPLING,
            "look_at": LookAt(answers=0, shown=0),
            "compute": COMPUTE,
            "engine": "transformers",
        }

    def train(self, steps: float, *, batch: int = BATCH, **more: Any) -> Train:
        """So many steps at the row's learning rate."""
        return Train(steps=max(1, round(steps)), batch_size=batch, learning_rate=self.rate, warmup_steps=5,
                     validation_pairs=0, checkpoint_every=1_000_000, **more)  # fmt: skip

    def pairs(self, n: int | None = None) -> dict[str, str]:
        """Options that name the first n offline pairs of the seed."""
        return {"pairs": self._first("pairs", n or self.n), "held_out": str(self.data / "watched_pairs.jsonl")}

    def answers(self) -> dict[str, str]:
        """Options that name n answers of the start model, two a question."""
        return {"data": self._first("answers", self.n // 2), "held_out": str(self.data / "watched.jsonl")}

    def prompts(self) -> dict[str, str]:
        """Options that name the questions to sample on."""
        return {"prompts": str(self.data / "prompts.jsonl"), "held_out": str(self.data / "watched.jsonl")}

    def _first(self, name: str, n: int) -> str:
        file = self.data / f"{name}-{n}.jsonl"
        if not file.is_file():
            rows = (self.data / f"{name}.jsonl").read_text().splitlines(keepends=True)[:n]
            temporary = file.with_name(f"{file.name}.{self.seed}.{id(self)}")
            temporary.write_text("".join(rows))
            temporary.replace(file)
        return str(file)


REWARD_RATE = 1e-3
"""The learning rate of reward models, whatever the strength of the row that uses one."""


@dataclass(frozen=True)
class Method:
    """A row.

    needs: "pairs" or "answers" of the start model, one of `REWARD_MODELS`, or nothing; what these took is added to what
    the run itself consumes. pace: its learning rates, in those of `RATES`, so that the middle one leads about to where
    methods are compared; nothing but that distance was looked at.
    """

    said: str
    recipe: str
    config: Callable[[Setting], Config]
    needs: str = ""
    pace: float = 1.0


def dpo(s: Setting, loss: str = "dpo", steps: float | None = None) -> DpoConfig:
    return DpoConfig(**s.common, **s.pairs(), loss=loss, beta=BETAS[loss], train=s.train(steps or s.steps))


def oaif(s: Setting, loss: str = "dpo") -> OaifConfig:
    return OaifConfig(
        **s.common, **s.prompts(), annotator=s.annotator, loss=loss, beta=BETAS[loss], train=s.train(s.steps)
    )


def dice(s: Setting, **changes: Any) -> DiceConfig:
    """DPO on all pairs makes pi(0); two rounds of half as many steps."""
    given = {"replay_fraction": 0.5, "alpha": "auto"} | changes
    return DiceConfig(**s.common, **s.pairs(), rounds=2, k=8, prompts_per_round=s.n // 4, filters=Filters(min_valid=2),
                      start=s.train(s.steps), train=s.train(s.steps / 2), **given)  # fmt: skip


def sail(s: Setting, variant: str) -> SailConfig:
    """`pr` asks for labels online: it has fewer pairs, so that all its calls are n."""
    share = VARIANTS[variant].mixture
    steps = s.steps * (1 - share) if variant == "pr" else s.steps
    return SailConfig(**s.common, **s.pairs(round(steps) * BATCH), variant=variant, evaluator=s.annotator,
                      annotator=s.annotator if variant == "pr" else "", train=s.train(steps))  # fmt: skip


def bpo(s: Setting, phases: int | str, *, reference: str = "behaviour", members: int = 1, rank: int = 0) -> BpoConfig:
    train = s.train(s.steps, lora=Lora(rank=rank, alpha=2.0 * max(rank, 1)))
    return BpoConfig(**s.common, **s.prompts(), annotator=s.annotator, phases=phases, reference=reference,
                     members=members, train=train)  # fmt: skip


def optune(s: Setting, regenerate: float) -> OptuneConfig:
    """Three iterations of two answers a question: 6 scores a question where all are new."""
    questions = s.n // 6
    return OptuneConfig(**s.common, **s.prompts(), annotator=s.annotator, n_prompts=questions, regenerate=regenerate,
                        weights=Weights(), train=s.train(2 * questions / BATCH))  # fmt: skip


def osp(s: Setting, labels: str) -> OspConfig:
    """Three rounds, 3 comparisons a question. The annotator is asked, not the policy itself: it cannot judge."""
    feedback = Feedback(labels=labels, scale=1.0)
    return OspConfig(**s.common, **s.prompts(), annotator=s.annotator, feedback=feedback, rounds=3, n=4,
                     prompts_per_round=s.n // 9, pairing="best_vs_rest", train=s.train(s.steps / 3))  # fmt: skip


def expo(s: Setting, share: float, alphas: tuple[float, float, float], rate: float = 1.0) -> ExpoConfig:
    """No training beyond DPO's, at `rate` times the middle rate: alpha is the strength."""
    common = {name: value for name, value in s.common.items() if name != "policy"}
    train = replace(s, rate=rate * RATES[1]).train(s.steps * share)
    return ExpoConfig(**common, base=str(s.data / "start"), pairs=s.pairs()["pairs"], alpha=alphas[s.strength],
                      train=train)  # fmt: skip


REWARD_MODELS = {"reward-model": 0, "cross-fitted": 2}
"""What a row may need -> folds. MPO's margins are cross-fitted; nobody else pays for that."""


def reward_model(s: Setting, needs: str) -> RewardModelConfig:
    """One epoch: with more, at this rate, the log loss on other pairs rises, and it ranks no better."""
    return RewardModelConfig(**{k: v for k, v in s.common.items() if k != "look_at"}, **s.pairs(),
                             folds=REWARD_MODELS[needs], train=s.train(s.steps))  # fmt: skip


def reinforced(s: Setting, needs: str) -> dict[str, Any]:
    """Options of PPO. The reward model was trained on the offline pairs; to ask it is free. A value model of this size
    learns at the reward model's rate.
    """
    return {
        "annotator": f"reward-model:{s.data / f'{needs}-{s.n}' / 'model'}",
        "ppo": Ppo(epochs=2, value_learning_rate=REWARD_RATE),
    }


def ppo(s: Setting, **changes: Any) -> PpoConfig:
    """One answer a question. Where the annotator itself is the reward, each is a label call."""
    return PpoConfig(**s.common, **s.prompts(), **(reinforced(s, "reward-model") | changes), train=s.train(s.steps))


def mpo(s: Setting) -> MpoConfig:
    """As many steps as the others: DPO's on the 65 % of the pairs that are easy, PPO's on the rest of the questions."""
    pairs = {"pairs": str(s.data / f"cross-fitted-{s.n}" / "cross-fit" / "pairs.jsonl")}
    return MpoConfig(**s.common, **(s.pairs() | pairs), **reinforced(s, "cross-fitted"),
                     easy=Easy(train=s.train(0.65 * s.steps)), train=s.train(0.35 * s.steps))  # fmt: skip


def scored(s: Setting, passes: int = 1) -> dict[str, Any]:
    """Options of the supervised methods: so many passes over n scored answers."""
    return s.common | s.answers() | {"reward": s.annotator, "train": s.train(passes * s.steps)}


CONDITION = Condition(template="{input} reward {reward}", decimals=0, target=2.0)
"""In words that the model has (paper: a tag, two decimals). The target is about the best score of the answers."""

RATES = (0.8e-4, 1.6e-4, 3.2e-4)
"""Learning rates: the three strengths of every row (but ExPO's, whose strength is alpha)."""

METHODS: dict[str, Method] = {
    "dpo": Method("DPO, offline", "dpo", dpo, "pairs"),
    "ipo": Method("IPO, offline (beta 0.1)", "dpo", lambda s: dpo(s, "ipo"), "pairs", pace=1.15),
    "slic": Method("SLiC, offline", "dpo", lambda s: dpo(s, "slic"), "pairs"),
    "dpo-part": Method("DPO, a fifth of the steps", "dpo", lambda s: dpo(s, steps=s.steps / 5), "pairs"),
    "expo-part": Method("ExPO on that (middle rate)", "expo", lambda s: expo(s, 0.2, (1.0, 3.0, 5.0)), "pairs"),
    "expo": Method(
        "ExPO on DPO (3/4 of the middle rate)", "expo", lambda s: expo(s, 1.0, (0.2, 0.4, 0.6), 0.75), "pairs"
    ),
    "iterative-2": Method("iterative DPO, 2 phases", "bpo", lambda s: bpo(s, 2, reference="start")),
    "iterative-5": Method("iterative DPO, 5 phases", "bpo", lambda s: bpo(s, 5, reference="start")),
    "oaif-dpo": Method("OAIF, DPO", "oaif", oaif),
    "oaif-ipo": Method("OAIF, IPO (beta 0.1)", "oaif", lambda s: oaif(s, "ipo"), pace=1.4),
    "oaif-slic": Method("OAIF, SLiC", "oaif", lambda s: oaif(s, "slic"), pace=0.9),
    "dice": Method("DICE", "dice", dice, "pairs", pace=0.35),
    "dice-no-length": Method("DICE without the length term", "dice", lambda s: dice(s, alpha=0.0), "pairs", pace=0.35),
    "dice-no-replay": Method("DICE without replay", "dice", lambda s: dice(s, replay_fraction=0.0), "pairs", pace=0.35),
    "sail-dp": Method("SAIL, DP", "sail", lambda s: sail(s, "dp"), "pairs", pace=0.85),
    "sail-pp": Method("SAIL, PP", "sail", lambda s: sail(s, "pp"), "pairs"),
    "sail-pr": Method("SAIL, PR", "sail", lambda s: sail(s, "pr"), "pairs"),
    "bpo-1": Method("BPO, F = 1", "bpo", lambda s: bpo(s, 1)),
    "bpo-2": Method("BPO, F = 2", "bpo", lambda s: bpo(s, 2)),
    "bpo-5": Method("BPO, F = 5", "bpo", lambda s: bpo(s, 5), pace=0.9),
    "bpo-all": Method("BPO, every step", "bpo", lambda s: bpo(s, "all"), pace=0.9),
    "bpo-2-lora": Method("BPO, F = 2, an adapter", "bpo", lambda s: bpo(s, 2, rank=8), pace=3.3),
    "bpo-2-lora-5": Method("BPO, F = 2, five adapters", "bpo", lambda s: bpo(s, 2, members=5, rank=8), pace=3.3),
    "optune-1": Method("OPTune, all answers new", "optune", lambda s: optune(s, 1.0)),
    "optune-half": Method("OPTune, half of them new", "optune", lambda s: optune(s, 0.5), pace=0.8),
    "osp": Method("OSP's soft labels, annotator asked", "osp", lambda s: osp(s, "soft"), pace=0.85),
    "osp-hard": Method("the same with hard labels", "osp", lambda s: osp(s, "hard"), pace=0.9),
    "ppo": Method("PPO on a reward model (RLHF)", "ppo", ppo, "reward-model", pace=0.6),
    "ppo-scored": Method("PPO on the annotator's scores", "ppo", lambda s: ppo(s, annotator=s.annotator), pace=0.45),
    "mpo": Method("MPO", "mpo", mpo, "cross-fitted", pace=0.6),
    "fa": Method("FA", "fa", lambda s: FaConfig(**scored(s)), "answers", pace=10),
    "rwr": Method("RWR", "rwr", lambda s: RwrConfig(**scored(s)), "answers", pace=15),
    "ca": Method("CA", "ca", lambda s: CaConfig(**scored(s), condition=CONDITION), "answers", pace=25),
    "fa-4": Method("FA, four passes", "fa", lambda s: FaConfig(**scored(s, 4)), "answers", pace=2.5),
    "ca-4": Method("CA, four passes", "ca", lambda s: CaConfig(**scored(s, 4), condition=CONDITION), "answers", pace=5),
}
