"""The public names exist, and importing the package loads nothing heavy."""

import subprocess
import sys

import pytest

import prefloop

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "peft")


@pytest.mark.parametrize("name", prefloop.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(prefloop, name) is not None


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = prefloop.nothing


@pytest.mark.parametrize(
    "code",
    [
        "import prefloop, prefloop.cli",
        "from prefloop.cli import main; main(['--help'])",
        "from prefloop.cli import main; main(['dice', '--help'])",
        "from prefloop.cli import main; main(['score', '--help'])",
        "from prefloop.cli import main; main(['dice', '--preset', 'demo', '--k', '1'])",
    ],
)
def test_help_and_refusals_load_nothing_heavy(code: str) -> None:
    check = f"{code}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("[]"), done.stdout[-500:] + done.stderr[-500:]
