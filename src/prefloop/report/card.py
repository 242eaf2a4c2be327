"""The model card that goes into a trained model's folder."""

import re
from pathlib import Path

import yaml

from prefloop.report.story import Story
from prefloop.report.table import markdown_table


def model_card(story: Story) -> str:
    """A card in the hub's format: front matter, how it was made, with what data and seeds, and the figures.

    It holds no time and no path, so that the same run writes the same card.
    """
    start = str(story.config.get("policy") or story.config.get("base") or "")
    data = next((story.config[name] for name in ("data", "pairs", "prompts") if story.config.get(name)), None)
    supervised = "data" in story.config
    rewards = story.recipe == "reward-model"
    kind = "AutoModelForSequenceClassification" if rewards else "AutoModelForCausalLM"
    by_pairs = ["preference-optimization"] if story.recipe in ("expo", "ppo") else ["dpo", "preference-optimization"]
    tags = ["reward-model"] if rewards else [] if supervised else by_pairs
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if rewards else "text-generation",
        "tags": list(dict.fromkeys(["prefloop", story.recipe, *tags])),
        **({"base_model": start} if is_hub_id(start) else {}),
    }
    options = yaml.safe_dump(story.config, sort_keys=False, allow_unicode=True)
    versions = ", ".join(f"{name} {story.environment[name]}" for name in ("prefloop", "torch", "transformers")
                         if story.environment.get(name))  # fmt: skip
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {f"reward model made from {start}" if rewards else f"{start or 'model'} aligned with {story.recipe}"}

{_made(story, start, data)}, with seed {story.config.get("seed")}. Made with {versions}.

```python
from transformers import {kind}, AutoTokenizer

model = {kind}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## Figures

Held out: {_held_out(story)}.

{markdown_table(story)}

## All options

```yaml
{options.strip()}
```
"""


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one of the hub: `org/name`, and no folder here, which would have been taken."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _held_out(story: Story) -> str:
    """What the figures are of."""
    given = story.config.get("held_out")
    if given:
        return f"`{given}`"
    if story.config.get("folds"):
        return "every pair in turn, from models that were trained without its prompt"
    if story.recipe == "reward-model" and not any(round.ranking for round in story.rounds):
        return "nothing"
    return "a tenth of the data"


def _made(story: Story, start: str, data: str | None) -> str:
    """How the model came about, in half a sentence."""
    config = story.config
    if story.recipe != "expo":
        return f"Trained with prefloop by the recipe `{story.recipe}`, from `{start}`, on\n`{data}`"
    aligned = f"`{config['aligned']}`" if config.get("aligned") else f"a DPO round on the pairs `{config.get('pairs')}`"
    return (
        "Extrapolated with prefloop by the recipe `expo`: theta_1 + alpha (theta_1 - theta_0),\n"
        f"alpha = {story.alpha}, theta_0 = `{start}`, theta_1 = {aligned}"
    )
