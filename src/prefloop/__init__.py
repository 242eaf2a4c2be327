"""prefloop: align language models with preferences that the loop makes for itself.

prompts -> sample -> feedback -> pairs -> train -> (merge) -> evaluate -> report

The names below are public. They are imported when first used, so `import prefloop` is quick and loads no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Prompt": "prefloop.records",
    "Response": "prefloop.records",
    "Group": "prefloop.records",
    "Pair": "prefloop.records",
    "Demonstration": "prefloop.records",
    "Run": "prefloop.run",
    "ModelRef": "prefloop.models",
    "resolve": "prefloop.models",
    "load_prompts": "prefloop.data.mapping",
    "load_pairs": "prefloop.data.mapping",
    "load_groups": "prefloop.data.groups",
    "export_pairs": "prefloop.data.export",
    "Sampling": "prefloop.sample.sampling",
    "sample": "prefloop.sample.stage",
    "implicit_reward": "prefloop.feedback.implicit_reward",
    "length_coefficient": "prefloop.pairs.length",
    "debias_length": "prefloop.pairs.select",
    "best_vs_worst": "prefloop.pairs.select",
    "mix": "prefloop.pairs.replay",
    "PrefloopError": "prefloop.errors",
    "InputError": "prefloop.errors",
    "CheckFailed": "prefloop.errors",
    "EngineError": "prefloop.errors",
}

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'prefloop' has no attribute {name!r}")
