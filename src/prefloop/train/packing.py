"""Packing: several prompts and their responses, end to end, in rows under a token budget. No padding.

Legend: R responses in all, S tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """One prompt's ids (possibly none) and the ids of the responses that branch from it."""

    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.responses or not all(self.responses):
            raise ValueError("every group needs at least one response, and every response at least one token")

    @property
    def tokens(self) -> int:
        """Tokens this group adds to a row: the prompt once, each response without its last token.

        The last token of a response is predicted but predicts nothing, so it is never an input.
        """
        return len(self.prompt_ids) + sum(len(response) - 1 for response in self.responses)

    @property
    def predicted(self) -> int:
        """Response tokens whose log-probability counts: all, or all but the first where the prompt is empty."""
        return sum(len(response) - (not self.prompt_ids) for response in self.responses)


def split(groups: Sequence[TokenGroup], token_budget: int, *, shared: bool) -> list[tuple[int, TokenGroup]]:
    """Groups in pieces, each with the index of its group: of the responses in order, as many as the budget takes.

    `shared`: a piece costs its prompt once; else responses go through the model alone, and each is a piece of its own.
    """
    pieces = []
    for index, group in enumerate(groups):
        room, taken = 0, []
        for response in group.responses:
            if taken and (not shared or len(response) - 1 > room):
                pieces.append((index, TokenGroup(group.prompt_ids, tuple(taken))))
                taken = []
            room = (room if taken else token_budget - len(group.prompt_ids)) - (len(response) - 1)
            taken.append(response)
        pieces.append((index, TokenGroup(group.prompt_ids, tuple(taken))))
    return pieces


def pack(sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """Rows of indices whose sizes sum to at most `token_budget`: longest first, each into the fullest row that fits.

    Deterministic. An item larger than the budget gets a row of its own. Indices within a row ascend.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget = {token_budget}: should be at least 1")
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = [row for row in range(len(rows)) if room[row] >= sizes[index]]
        if fitting:
            row = min(fitting, key=lambda r: (room[r], r))
            rows[row].append(index)
            room[row] -= sizes[index]
        else:
            rows.append([index])
            room.append(token_budget - sizes[index])
    return [sorted(row) for row in rows]
