"""The replay mixture of DICE, and the validation slice: seeded draws of pairs."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import floor

from prefloop.errors import InputError
from prefloop.records import Judged, Pair
from prefloop.run import Stage
from prefloop.seeds import generator


def mix(
    generated: Sequence[Pair],
    offline: Sequence[Pair],
    *,
    fraction: float,
    size: int | None = None,
    seed: int,
    stage: Stage | None = None,
) -> list[Pair]:
    """gamma = `fraction` offline pairs among generated ones, every prompt at most once, in shuffled order.

    With N = `size`, or the number of offline pairs, and draws without replacement as in the released DICE code:

        n_gen = min(floor(N (1 - gamma)), available)    generated pairs, then
        n_off = floor(gamma n_gen / (1 - gamma))        offline pairs on prompts that are not drawn yet.

    Here the arithmetic is exact: floor(10000 (1 - 0.9)) is 1000, not the 999 of floats. gamma = 0 is all generated
    pairs and gamma = 1 all offline ones, up to `size` when it is given. Of several pairs that share a prompt, one is
    drawn. Where too few offline pairs are left, fewer generated ones are taken so that the fraction holds. Raises
    InputError when nothing can be drawn.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"replay fraction {fraction}: should be between 0 (generated pairs) and 1 (offline pairs)")
    if size is not None and size < 1:
        raise InputError(f"mixture size {size}: should be at least 1, or left out for the number of offline pairs")
    stage = stage or Stage.detached()
    new = _one_per_prompt(generated, seed, "generated")
    old = _one_per_prompt(offline, seed, "offline")

    gamma = Fraction(str(fraction))  # through the text, so that 0.9 is nine tenths
    room = size or len(new if gamma == 0 else offline)
    n_gen = min(floor(room * (1 - gamma)), len(new))
    affordable = n_gen if gamma in (0, 1) else _affordable(new[:n_gen], old, gamma)
    drawn = new[:affordable]
    taken = {pair.prompt.id for pair in drawn}
    others = [pair for pair in old if pair.prompt.id not in taken]
    replayed = others[: room if gamma == 1 else floor(gamma * affordable / (1 - gamma))]
    if not drawn and not replayed:
        raise InputError(
            f"replay fraction {fraction}: no mixture can be drawn from {len(generated)} generated and {len(offline)} "
            "offline pairs; give more of both, or a fraction of 0 (generated alone) or 1 (offline alone)"
        )
    for reason, n in {
        "generated pairs mixed": len(drawn),
        "offline pairs mixed": len(replayed),
        "generated pairs dropped: another pair of the prompt is drawn": len(generated) - len(new),
        "offline pairs dropped: another pair of the prompt is drawn": len(offline) - len(old),
        "offline pairs dropped: a generated pair of the prompt is drawn": len(old) - len(others),
        "generated pairs dropped: too few offline pairs for the fraction": n_gen - affordable,
        "generated pairs not drawn": len(new) - n_gen,
        "offline pairs not drawn": len(others) - len(replayed),
        "pairs missing to the mixture's size": room - len(drawn) - len(replayed),
    }.items():
        if n:
            stage.count(reason, n)
    return _shuffled([*drawn, *replayed], seed, "order")


def hold_out(pairs: Sequence[Judged], n: int, *, seed: int) -> tuple[list[Judged], list[Judged]]:
    """(train, validation): a seeded slice of `n` pairs for validation, no prompt on both sides, order kept.

    Prompts are taken whole as long as they fit, so a set with several pairs per prompt can end just below `n`.
    Raises InputError when no training pair would be left.
    """
    if n < 0 or n >= len(pairs):
        raise InputError(f"{n} validation pairs of {len(pairs)}: should be at least 0 and leave at least 1 to train on")
    sizes = Counter(pair.prompt.id for pair in pairs)
    held: set[str] = set()
    room = n
    for prompt_id in _shuffled(list(sizes), seed, "hold out"):
        if sizes[prompt_id] <= room:
            held.add(prompt_id)
            room -= sizes[prompt_id]
    train = [pair for pair in pairs if pair.prompt.id not in held]
    return train, [pair for pair in pairs if pair.prompt.id in held]


def _affordable(new: Sequence[Pair], old: Sequence[Pair], gamma: Fraction) -> int:
    """How many of the `new` pairs, in order, can have their share of `old` pairs on other prompts (0 < gamma < 1)."""
    old_prompts = {pair.prompt.id for pair in old}
    ratio = gamma / (1 - gamma)
    left = len(old)
    for n, pair in enumerate(new, start=1):
        left -= pair.prompt.id in old_prompts
        if floor(ratio * n) > left:
            return n - 1
    return len(new)


def _one_per_prompt(pairs: Sequence[Pair], seed: int, purpose: str) -> list[Pair]:
    """One random pair of every prompt, in random order: a prefix is a draw without replacement."""
    by_prompt: dict[str, Pair] = {}
    for pair in _shuffled(pairs, seed, purpose, "pair of a prompt"):
        by_prompt.setdefault(pair.prompt.id, pair)
    # Shuffled again, because prompts with many pairs tend to come first in the first order.
    return _shuffled(list(by_prompt.values()), seed, purpose)


def _shuffled(items: Sequence, seed: int, *purpose: str) -> list:
    order = generator(seed, "pairs", *purpose).permutation(len(items))
    return [items[i] for i in order.tolist()]
