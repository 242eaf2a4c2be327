"""How tokens are drawn. Imports no torch, so that the command line can show the options at once.

Every value in force is written here: a model's own `generation_config` is never read.
"""

from pydantic import Field, field_validator

from prefloop.config import Config

COLDEST = 1e-3
"""The lowest temperature above zero; anything colder is greedy but for ties, which 0 says plainly."""


class Sampling(Config):
    """Decoding settings, with the meaning they have in transformers: temperature, then top_k, then top_p, then min_p.

    Each truncation works on the distribution that the one before has left, renormalised; at least one token is kept.
    """

    temperature: float = Field(
        default=1.0,
        ge=0,
        le=100,
        description="logits are divided by it; 0 takes the most likely token (DICE: 0.7 for Zephyr, 0.9 for Llama-3)",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="smallest set of most likely tokens with at least this probability (Holtzman et al. 2020; "
        "DICE: 0.9 for Zephyr, 1.0 for Llama-3)",
    )
    top_k: int | None = Field(
        default=None, ge=1, description="only the k most likely tokens, and those tied with the k-th (Fan et al. 2018)"
    )
    min_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="only tokens at least this fraction as likely as the most likely one (Nguyen et al. 2024)",
    )
    max_new_tokens: int = Field(
        default=256, ge=1, description="tokens an answer may have, its end token counted (DICE: 2048)"
    )

    stop: tuple[str, ...] = Field(
        default=(), description="texts that end an answer; the answer keeps them, as its token ids do"
    )
    stop_token_ids: tuple[int, ...] = Field(
        default=(), description="ids that end an answer besides the model's own end tokens; the answer keeps them"
    )

    @field_validator("stop")
    @classmethod
    def _stops_are_text(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("stop = '': expected texts of at least one character; leave the empty one out")
        return stop

    @field_validator("temperature")
    @classmethod
    def _greedy_is_zero(cls, temperature: float) -> float:
        if 0 < temperature < COLDEST:
            raise ValueError(
                f"temperature = {temperature}: expected 0 (the most likely token) or at least {COLDEST}; use 0"
            )
        return temperature

    @property
    def truncations(self) -> list[str]:
        """The names of the truncations in force."""
        return [
            name
            for name, on in (
                ("top_k", self.top_k is not None),
                ("top_p", self.top_p < 1),
                ("min_p", self.min_p is not None),
            )
            if on
        ]

    @property
    def truncates(self) -> bool:
        """True when some tokens may be left out of the draw."""
        return bool(self.truncations)
