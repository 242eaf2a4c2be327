"""For all tests: no network, and every shape annotation of the tensor code is executed."""

import os

from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
# Before any test imports these modules. With the hook a [3] against a [3, 1] is refused; without it, it broadcasts.
install_import_hook(["prefloop.train.losses", "prefloop.train.logprobs", "prefloop.sample.draw"], "beartype.beartype")
