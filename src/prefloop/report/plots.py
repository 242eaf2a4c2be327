"""The plots of a report, as PNG files. Same run, same bytes."""

from itertools import cycle
from math import nan
from pathlib import Path

from prefloop.report.story import Story

# Colours that stay apart in print and for colour-blind readers (Okabe and Ito).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def plot_alpha(story: Story, file: Path) -> bool:
    """Mean length gap against the length coefficient, a line per round. False when no round has one."""
    rounds = [round for round in story.rounds if round.length and round.length.curve]
    if not rounds:
        return False
    figure, axes = _axes(1)
    for colour, round in zip(cycle(COLOURS), rounds, strict=False):
        assert round.length is not None
        alphas, gaps = zip(*round.length.curve, strict=True)
        axes[0].step(alphas, gaps, where="post", color=colour, label=round.label)
        axes[0].plot([round.length.alpha], [round.length.gap], "o", color=colour)
    axes[0].axhline(0, color="grey", linewidth=0.8)
    unit = rounds[0].length.unit if rounds[0].length else "chars"
    largest = max(round.length.alpha for round in rounds if round.length)
    axes[0].set_xlim(0, 3 * largest if largest > 0 else None)
    axes[0].set(xlabel=f"length coefficient alpha (nats per {unit[:-1]})", ylabel=f"winner - loser, mean ({unit})")
    axes[0].set_title("Length gap of best against worst; the dot is the alpha used")
    axes[0].legend()
    _save(figure, file)
    return True


def plot_training(story: Story, file: Path) -> bool:
    """Loss by step (the preference loss where a run has one, whose loss is a surrogate), and of pairs margin and
    log-probability changes (of a reward model, rewards), rounds one after another. False when nothing was trained.
    """
    rounds = [round for round in story.rounds if any("loss" in row for row in round.training)]
    if not rounds:
        return False
    pairs = any("margin" in row for round in rounds for row in round.training)
    rewards = any("chosen_reward" in row for round in rounds for row in round.training)
    preference = any("preference_loss" in row for round in rounds for row in round.training)
    loss = "preference_loss" if preference else "loss"
    what = "reward" if rewards else "change"
    figure, axes = _axes(3 if pairs else 1)
    offset = 0
    for colour, round in zip(cycle(COLOURS), rounds, strict=False):
        steps = [row for row in round.training if "loss" in row]
        looks = [row for row in round.training if "validation" in row]
        x = [offset + row["step"] for row in steps]
        of_pairs = any("margin" in row for row in steps)  # a first round may train on something else than pairs
        for axis, name in zip(axes, (loss, "margin") if of_pairs else (loss,), strict=False):
            axis.plot(x, [row.get(name, nan) for row in steps], color=colour, label=round.label)
            axis.plot([offset + row["step"] for row in looks], [row["validation"].get(name, nan) for row in looks], "s",
                      color=colour, markersize=4)  # fmt: skip
        if of_pairs:
            for side, line in (("chosen", "-"), ("rejected", "--")):
                values = [row.get(f"{side}_{what}", nan) for row in steps]  # no reference, no change from it
                axes[2].plot(x, values, line, color=colour, label=f"{round.label} {side}")
        offset += max(row["step"] for row in steps)
    axes[0].set(title="Preference loss" if preference else "Loss (squares: validation)", xlabel="step", ylabel="nats")
    if pairs:
        axes[1].set(title=f"{'Reward' if rewards else 'Implicit-reward'} margin", xlabel="step",
                    ylabel="r(chosen) - r(rejected)" if rewards else "beta h")  # fmt: skip
        axes[2].set(title="Reward" if rewards else "Log-probability change in the round", xlabel="step",
                    ylabel="reward" if rewards else "nats a response")  # fmt: skip
    for axis in axes:
        axis.legend(fontsize=7)
    _save(figure, file)
    return True


def _axes(n: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * n if n > 1 else 7, 3.6), layout="constrained")
    return figure, [figure.add_subplot(1, n, i + 1) for i in range(n)]


def _save(figure, file: Path) -> None:
    import io

    from prefloop.atomic import write_atomically

    buffer = io.BytesIO()
    # Without the Software entry the bytes would change with matplotlib's version string only.
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    write_atomically(file, buffer.getvalue())
