"""For all tests: no network, and every shape annotation of the tensor code is executed."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
# Before any test imports these modules. With the hook a [3] against a [3, 1] is refused; without it, it broadcasts.
install_import_hook(["prefloop.train.losses", "prefloop.train.logprobs", "prefloop.sample.draw"], "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def fresh_cache() -> Iterator[None]:
    """A cache of this session's own, so that no earlier one answers for the code; converted models are shared."""
    from prefloop.models import cache_folder

    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        (Path(folder) / "models").symlink_to(models)
        patch.setenv("PREFLOOP_CACHE", folder)
        yield
