"""The package's exceptions.

    PrefloopError               anything that a run reports in one line; the command line exits with status 2
    ├── InputError              what the user gave cannot be used (also a ValueError)
    │   └── OutOfRange          a weight that the dtype it is to be stored in does not hold
    ├── CheckFailed             a truth that a run checks about itself does not hold
    ├── EngineError             a sampling engine failed or died
    └── FeedbackError           an annotator failed for good
        └── BudgetReached       the calls or the money that the user allowed are used up

Messages name the value, what was expected, and the fix.
"""


class PrefloopError(Exception):
    """Base class of every error that prefloop raises on purpose."""


class InputError(PrefloopError, ValueError):
    """A file, option or model that the user gave cannot be used."""


class OutOfRange(InputError):
    """A weight is beyond the range of the dtype that it is to be stored in."""


class CheckFailed(PrefloopError):
    """A self-check of the run failed: the message says what was seen, what was expected and what to change."""


class EngineError(PrefloopError):
    """A sampling engine could not produce what it promised."""


class FeedbackError(PrefloopError):
    """An annotator could not be asked, and further questions would fare no better. What it has answered is kept."""


class BudgetReached(FeedbackError):
    """The next question would go beyond the calls or the money that the user allowed."""


def did_you_mean(given: str, known: list[str]) -> str:
    """`" Did you mean 'beta'?"` for the nearest of `known`, or an empty string when nothing is near."""
    import difflib

    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
