"""The command line: `prefloop RECIPE ...` runs a method, and each step is a command of its own, file in, file out.

Every option comes from the recipe's or step's configuration. Errors are one line on stderr and exit status 2.
Nothing heavy is imported until a command really runs.
"""

import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

from prefloop import __version__
from prefloop.config import Config, first_problem, parse_config, read_yaml
from prefloop.errors import InputError, PrefloopError, did_you_mean


@dataclass(frozen=True)
class Command:
    """One word after `prefloop`. `config`, `run` and `estimate` are `module:name`, imported when the command is used.

    estimate: lines that `--dry-run` prints in place of a run, where a recipe has that option.
    """

    family: str
    line: str
    config: str
    run: str
    presets: tuple[str, ...] = ()
    estimate: str = ""

    @property
    def is_recipe(self) -> bool:
        """Whether it works in a run folder."""
        return self.family.startswith(RECIPES)


RECIPES = "recipes"
PREFERENCES, SCORED = f"{RECIPES}, from preferences", f"{RECIPES}, from answers and their rewards"
REINFORCEMENT = f"{RECIPES}, by reinforcement learning"

COMMANDS = {
    "dice": Command(
        PREFERENCES,
        "bootstrap: sample, rank by the model's own DPO reward, pair, replay, DPO, repeat (arXiv 2406.09760)",
        "prefloop.recipes.dice:DiceConfig",
        "prefloop.recipes.dice:dice",
        ("demo", "paper"),
    ),
    "dpo": Command(
        PREFERENCES,
        "direct preference optimisation on preference pairs (arXiv 2305.18290)",
        "prefloop.recipes.dpo:DpoConfig",
        "prefloop.recipes.dpo:dpo",
        ("demo",),
    ),
    "oaif": Command(
        PREFERENCES,
        "online feedback: every step two fresh answers, an annotator's choice, one step (arXiv 2402.04792)",
        "prefloop.recipes.oaif:OaifConfig",
        "prefloop.recipes.oaif:oaif",
        ("demo", "paper"),
        "prefloop.recipes.oaif:estimate_feedback",
    ),
    "optune": Command(
        PREFERENCES,
        "online DPO that samples anew for the lowest rewards only, pairs weighed by their gap (arXiv 2406.07657)",
        "prefloop.recipes.optune:OptuneConfig",
        "prefloop.recipes.optune:optune",
        ("demo", "paper"),
    ),
    "osp": Command(
        PREFERENCES,
        "the model judges its own answers against a baseline; soft-preference training (arXiv 2405.14103)",
        "prefloop.recipes.osp:OspConfig",
        "prefloop.recipes.osp:osp",
        ("demo",),
    ),
    "expo": Command(
        PREFERENCES,
        "extrapolation: further along the line from a base to its aligned model, no training (arXiv 2404.16792)",
        "prefloop.recipes.expo:ExpoConfig",
        "prefloop.recipes.expo:expo",
        ("demo",),
    ),
    "sail": Command(
        PREFERENCES,
        "DPO with the gradient through the policy's own answers and labels (arXiv 2406.15567)",
        "prefloop.recipes.sail:SailConfig",
        "prefloop.recipes.sail:sail",
        ("demo",),
        "prefloop.recipes.sail:estimate_feedback",
    ),
    "bpo": Command(
        PREFERENCES,
        "online alignment whose reference is the model that sampled, taken anew by phases (arXiv 2406.12168)",
        "prefloop.recipes.bpo:BpoConfig",
        "prefloop.recipes.bpo:bpo",
        ("demo", "paper"),
        "prefloop.recipes.bpo:estimate_feedback",
    ),
    "sft": Command(SCORED, "supervised fine-tuning on answers to imitate", "prefloop.recipes.sft:SftConfig",
                   "prefloop.recipes.sft:sft", ("demo",)),
    "fa": Command(SCORED, "filtering alignment: fine-tuning on the answers with a high reward (arXiv 2308.12050)",
                  "prefloop.recipes.fa:FaConfig", "prefloop.recipes.fa:fa", ("demo",)),
    "rwr": Command(SCORED, "reward-weighted regression: fine-tuning with a weight for every answer (arXiv 2308.12050)",
                   "prefloop.recipes.rwr:RwrConfig", "prefloop.recipes.rwr:rwr", ("demo",)),
    "ca": Command(SCORED, "conditional alignment: prompts say the reward, and ask for a high one (arXiv 2308.12050)",
                  "prefloop.recipes.ca:CaConfig", "prefloop.recipes.ca:ca", ("demo",)),
    "reward-model": Command(REINFORCEMENT, "a reward model from preference pairs, cross-fitted (arXiv 2203.02155)",
                            "prefloop.recipes.reward_model:RewardModelConfig",
                            "prefloop.recipes.reward_model:reward_model", ("demo",)),
    "ppo": Command(REINFORCEMENT, "PPO: every step fresh answers, a reward, clipped updates (arXiv 2203.02155)",
                   "prefloop.recipes.ppo:PpoConfig", "prefloop.recipes.ppo:ppo", ("demo",)),
    "mpo": Command(REINFORCEMENT, "DPO on the easy pairs, then PPO on the prompts of the hard ones (arXiv 2403.19443)",
                   "prefloop.recipes.mpo:MpoConfig", "prefloop.recipes.mpo:mpo", ("demo",)),
    "sample": Command("steps", "K answers of a model to every prompt of a file", "prefloop.commands:SampleOptions",
                      "prefloop.commands:sample"),
    "score": Command("steps", "implicit reward of (prompt, responses) under any policy and reference",
                     "prefloop.commands:ScoreOptions", "prefloop.commands:score"),
    "pairs": Command("steps", "best-against-worst pairs of scored answers, length debiased, with replay",
                     "prefloop.commands:PairsOptions", "prefloop.commands:pairs"),
    "eval": Command("steps", "win rate against another model or file, implicit reward on pairs, drift; with intervals",
                    "prefloop.evaluate.evaluation:EvalOptions", "prefloop.evaluate.evaluation:run_eval"),
    "inspect": Command("steps", "rows of a file as a model will see them, token by token",
                       "prefloop.commands:InspectOptions", "prefloop.commands:inspect"),
    "judge check": Command("steps", "how far an annotator can be trusted, on pairs whose answer is known",
                           "prefloop.commands:JudgeCheckOptions", "prefloop.commands:judge_check"),
    "arena": Command("steps", "a page on which people vote between answers, blind, side by side",
                     "prefloop.arena.command:ArenaOptions", "prefloop.arena.command:run_arena"),
    "arena results": Command("steps", "what they said: win rates, scores, agreement; judgements for eval and oaif",
                             "prefloop.arena.command:ArenaResultsOptions", "prefloop.arena.command:run_results"),
    "report": Command("steps", "one page of a run, or of several side by side, to open in a browser",
                      "prefloop.commands:ReportOptions", "prefloop.commands:report"),
    "doctor": Command("steps", "what this machine makes of a model: path, parity, memory and time a step",
                      "prefloop.commands:DoctorOptions", "prefloop.commands:doctor"),
}  # fmt: skip


UNNAMED = ("file", "runs", "answers", "base", "aligned")
"""Options that may stand first on the command line, in this order, without their names."""


def load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def overview() -> str:
    """What `prefloop --help` prints."""
    lines = ["prefloop: align language models with preferences that the loop makes for itself.", "",
             "usage: prefloop COMMAND [OPTIONS]        prefloop COMMAND --help lists the options", ""]  # fmt: skip
    for family in dict.fromkeys(command.family for command in COMMANDS.values()):
        lines.append(f"{family}:")
        lines += [f"  {name:<15}{command.line}" for name, command in COMMANDS.items() if command.family == family]
        lines.append("")
    lines += [
        "A recipe keeps its work in a run folder (--out); the same command run again continues it.",
        *(
            f"  --preset {name:<7}{', '.join(having(name))}"
            for name in dict.fromkeys(p for c in COMMANDS.values() for p in c.presets)
        ),
    ]
    return "\n".join(lines)


def having(preset: str) -> list[str]:
    """The recipes with a preset of this name."""
    return [name for name, command in COMMANDS.items() if preset in command.presets]


def parse(config: type[Config], args: Sequence[str], *, prog: str, default: Config | None = None) -> Any:
    """`args` as `config`, or one InputError line for what is wrong.

    An unknown option is answered with the nearest known one. `--help` prints and exits with 0.
    """
    import tyro
    from pydantic import ValidationError

    shown = io.StringIO()
    markers = (tyro.conf.FlagConversionOff, tyro.conf.PositionalRequiredArgs)
    try:
        with redirect_stderr(shown):
            cli: Any = tyro.cli  # its overloads do not know a default that may be absent
            given = {} if default is None else {"default": default}
            parsed, unknown = cli(
                config, prog=prog, args=with_booleans(args, config), config=markers, return_unknown_args=True, **given
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(one_line(shown.getvalue())) from None
    except ValidationError as error:
        raise InputError(first_problem(error)) from None
    if unknown:
        name = unknown[0].split("=")[0]
        raise InputError(f"unknown option {name!r}.{did_you_mean(name, option_names(config))} See {prog} --help")
    return parsed


def with_booleans(args: Sequence[str], config: type[Config]) -> list[str]:
    """`--dry-run`, `--dry-run` and `--dry-run=true` as the parser wants them: `--dry-run True`."""
    switches = [name for name, kind in options(config) if kind is bool]
    given: list[str] = []
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        switch = name.replace("_", "-") in switches
        if switch and equals:
            given += [name, value.capitalize()]
        elif given and given[-1] in switches and arg.lower() in ("true", "false"):
            given.append(arg.capitalize())
        else:
            given.append(arg)
            if switch and (i + 1 == len(args) or args[i + 1].startswith("--")):
                given.append("True")
    return given


def with_names(args: Sequence[str], config: type[Config]) -> list[str]:
    """`BASE ALIGNED --alpha 0.5` as the parser wants it: `--base BASE --aligned ALIGNED --alpha 0.5`.

    What comes first needs no name: `prefloop inspect FILE` reads better than `prefloop inspect --file FILE`.
    """
    names = [name for name in UNNAMED if name in config.model_fields]
    unnamed = list(takewhile(lambda arg: not arg.startswith("-"), args))[: len(names)]
    named = [part for name, arg in zip(names, unnamed, strict=False) for part in (f"--{name}", arg)]
    return [*named, *args[len(unnamed) :]]


def option_names(config: type[Config]) -> list[str]:
    """Every option of a recipe or step as it is typed: `--train.learning-rate`."""
    return ["--out", "--preset", "--config", *(name for name, _ in options(config))]


def options(config: type[Config], prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Every option as it is typed, and its type."""
    for name, field in config.model_fields.items():
        option, kind = prefix + name.replace("_", "-"), field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            yield from options(kind, option + ".")
        else:
            yield option, kind


KINDS = {"INT": "a whole number", "FLOAT": "a number"}
"""The parser's names of what an option takes."""


def one_line(box: str) -> str:
    """The message of a framed error text, without its frame and without the help text below it."""
    message = re.split(r"─{8,}\s*│|Argument helptext|For full helptext", box.replace("\n", " \n"), maxsplit=2)
    text = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", " ".join(message[:2])).split())
    # Of the configuration as a whole, where no option is named.
    whole = re.search(r"validation errors? for \w+ Value error, (.+?) \[type=value_error", text)
    if whole:
        return whole[1]
    refused = re.search(r"validation errors? for \w+ (\S+) (.+?) \[type=[^,]+, input_value=(.+?), input_type=", text)
    if refused:
        name, reason, value = refused.groups()
        own = reason.removeprefix("Value error, ")
        return own if own != reason else f"{name.replace('_', '-')} = {value}: {reason[0].lower()}{reason[1:]}"
    several = re.search(r"(--\S+): no type matching (\S+) could be instantiated from \['(.*?)'\]", text)
    if several:
        name, kinds, value = several.groups()
        expected = [KINDS.get(kind, kind.strip("{}").replace(",", " or ")) for kind in kinds.split("|")]
        return f"{name} {value}: expected {' or '.join(expected)}"
    return re.sub(r"^(Value error|Invalid choice|Missing argument|Required options|Parsing error)\s+", "", text)


def split_leading(args: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Take `--name VALUE` and `--name=VALUE` for these names out of `args`: they decide what the others mean."""
    taken: dict[str, str] = {}
    rest: list[str] = []
    position = 0
    while position < len(args):
        name, equals, value = args[position].partition("=")
        if name.removeprefix("--") in names and name.startswith("--"):
            if not equals:
                position += 1
                if position >= len(args):
                    raise InputError(f"{name} needs a value")
                value = args[position]
            taken[name.removeprefix("--")] = value
        else:
            rest.append(args[position])
        position += 1
    return taken, rest


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping."""
    return {
        **base,
        **{
            key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
            for key, value in over.items()
        },
    }


def base_config(name: str, command: Command, preset: str | None, file: str | None) -> Config:
    """The configuration that the other options change: defaults, or a preset, under what a file says."""
    config: type[Config] = load(command.config)
    if preset is not None and preset not in command.presets:
        raise InputError(
            f"unknown preset {preset!r} for {name}.{did_you_mean(preset, list(command.presets))} "
            f"Presets: {', '.join(command.presets)}"
        )
    base = load(command.config.split(":")[0] + ":" + preset)() if preset else config()
    if file is None:
        return base
    return parse_config(config, merged(base.model_dump(), read_yaml(file)), origin=file)


def run_recipe(name: str, command: Command, args: list[str]) -> None:
    """Parse, open the run folder, run, and show what came out."""
    taken, rest = split_leading(args, ("preset", "config", "out"))
    base = base_config(name, command, taken.get("preset"), taken.get("config"))
    if {"-h", "--help"} & set(rest):
        print(recipe_help(name, command))
    cfg = parse(type(base), with_names(rest, type(base)), prog=f"prefloop {name}", default=base)
    if command.estimate and cfg.dry_run:
        print("\n".join(load(command.estimate)(cfg)))
        return
    from prefloop.recipes.steps import run_in_folder

    run_in_folder(name, load(command.run), cfg, Path(taken.get("out", f"runs/{name}")))


def recipe_help(name: str, command: Command) -> str:
    """What precedes the list of a recipe's options."""
    return "\n".join(
        [
            f"prefloop {name}: {command.line}",
            "",
            f"  --out DIR        the run folder (default: runs/{name}); the same command continues it",
            f"  --preset NAME    start from a preset: {', '.join(command.presets)}",
            "  --config FILE    options from a YAML file (such as a run folder's config.yaml), over the preset",
            "",
        ]
    )


def run_step(name: str, command: Command, args: list[str]) -> None:
    """Parse the options of a single step and run it."""
    config: type[Config] = load(command.config)
    load(command.run)(parse(config, with_names(args, config), prog=f"prefloop {name}"))


def dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if argv[0] in ("--version", "-V"):
        print(f"prefloop {__version__}")
        return
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, args = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}.{did_you_mean(name, list(COMMANDS))} See prefloop --help")
    command = COMMANDS[name]
    run: Callable[[str, Command, list[str]], None] = run_recipe if command.is_recipe else run_step
    run(name, command, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 `doctor` found a problem, 2 bad input or a failed check (one line on stderr), 130
    interrupted.
    """
    try:
        dispatch(list(sys.argv[1:] if argv is None else argv))
    except PrefloopError as error:
        print(f"prefloop: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as `| head`, has seen enough
            sys.stderr.close()
            return 0
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"prefloop: {place}{error.strerror or error}; check the path, its permissions and the disk", file=sys.stderr
        )
        return 2
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
