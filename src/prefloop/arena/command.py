"""`prefloop arena`: a page on which people vote between answers; `prefloop arena results`: what they said.

The votes of people become an annotator like any other:

    prefloop arena mine.json theirs.json --out arena.sqlite
    prefloop arena results arena.sqlite --judgements votes.jsonl
    prefloop eval --policy mine.json --against theirs.json --annotator file:votes.jsonl
"""

import secrets
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from rich.console import Console

from prefloop.atomic import write_atomically
from prefloop.commands import needed, new_file
from prefloop.config import Config
from prefloop.errors import InputError

if TYPE_CHECKING:
    from prefloop.arena.votes import Arena

SHORTEST_TOKEN = 12


class ArenaOptions(Config):
    """Two answers to one prompt side by side, blind, sides tossed; people vote in a browser, each under a name.

    The same command, or --out alone, goes on with the votes that are there.
    """

    answers: tuple[str, ...] = Field(
        default=(),
        description="a file of answers for each model (model_outputs.json, groups, prompt and response, MT-Bench), or "
        "one file with several answers a prompt",
    )
    names: tuple[str, ...] = Field(
        default=(), description="of the models in the results, in the order of the files; raters never see them"
    )
    prompts: str = Field(default="", description="prompts or MT-Bench questions; else the files must have the same")
    limit: int | None = Field(default=None, ge=1, description="only so many prompts, drawn by the seed")
    votes: int = Field(
        default=0, ge=0, description="raters wanted for each match, then it is shown to nobody else; 0: all judge all"
    )
    seed: int = Field(default=0, ge=0, description="of the order of the matches, the sides and the intervals")
    host: str = Field(
        default="127.0.0.1", description="address to listen on; one that others reach (0.0.0.0) needs a token"
    )
    port: int = Field(default=8765, ge=0, le=65535, description="to listen on; 0 takes any that is free")
    token: str = Field(default="", description="what the page asks for; made and shown where others reach the page")
    out: str = Field(default="arena.sqlite", description="the file of matches and votes; made, or gone on with")


class ArenaResultsOptions(Config):
    """Win rates of every two models with intervals, Bradley-Terry scores, agreement of the raters, sides followed."""

    file: str = Field(default="", description="what `prefloop arena` keeps its votes in")
    out: str = Field(default="", description="a JSON file to write all figures to")
    judgements: str = Field(
        default="", description="a .jsonl file to write the votes to, for --annotator file:... of eval and oaif"
    )


def run_arena(options: ArenaOptions) -> None:
    """`prefloop arena`: serve until Ctrl-C."""
    from prefloop.arena.server import ArenaServer, is_loopback
    from prefloop.arena.votes import Arena

    if options.token and not (
        len(options.token) >= SHORTEST_TOKEN and options.token.isascii() and options.token.isprintable()
    ):
        raise InputError(
            f"--token: expected at least {SHORTEST_TOKEN} characters of ASCII; leave it out to have one made"
        )
    out = Path(options.out)
    if options.answers or not out.is_file():
        arena = open_arena(options, out)
    else:
        arena = Arena(out, wanted=options.votes)
    token = options.token or ("" if is_loopback(options.host) else secrets.token_urlsafe(16))
    server = ArenaServer(arena, host=options.host, port=options.port, token=token)
    matches = len(arena.matches())
    print(f"{out}: {matches} matches of {len(arena.about.models)} models, {len(arena.votes())} votes so far")
    if arena.about.identical:
        print(f"{arena.about.identical} more are of identical answers, and nobody is asked about them")
    print(f"open {server.url} in a browser; Ctrl-C ends the page", flush=True)
    # A shell starts what runs in the background with Ctrl-C's signal off: what `kill` sends ends the page as well.
    ended = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\n{len(arena.votes())} votes in {out}; prefloop arena results {out} shows what they say")
    finally:
        signal.signal(signal.SIGTERM, ended)
        server.server_close()
        arena.close()


def open_arena(options: ArenaOptions, out: Path) -> "Arena":
    """The file of the options' answers, new or gone on with. Raises InputError for answers that do not match."""
    from prefloop.arena.matches import matches_of, read_sides
    from prefloop.arena.votes import Arena
    from prefloop.recipes.steps import some

    needed(options, "answers")
    questions, sides = read_sides(options.answers, names=options.names, prompts=options.prompts)
    drawn = {prompt.id for prompt in some([q.prompt for q in questions], options.limit, options.seed)}
    sides = {
        name: [a for a, question in zip(answers, questions, strict=True) if question.prompt.id in drawn]
        for name, answers in sides.items()
    }
    matches, identical = matches_of(sides, seed=options.seed)
    return Arena.of(
        out,
        matches,
        models=list(sides),
        prompts=len(drawn),
        identical=identical,
        seed=options.seed,
        wanted=options.votes,
    )


def run_results(options: ArenaResultsOptions) -> None:
    """`prefloop arena results`."""
    from prefloop.arena.results import figures_of, judgement_rows, results_of
    from prefloop.arena.votes import Arena
    from prefloop.evaluate.figures import table_of

    needed(options, "file")
    out = new_file(options.out) if options.out else None
    judgements = judgement_file(options.judgements) if options.judgements else None
    arena = Arena(Path(options.file))
    matches, votes = arena.matches(), arena.votes()
    arena.close()
    if not votes:
        raise InputError(f"{options.file}: nobody has voted yet; `prefloop arena --out {options.file}` opens the page")
    rows = judgement_rows(matches, votes)
    if judgements and not rows:
        raise InputError(
            f"{options.file}: no vote prefers an answer or is a tie, so there are no judgements to write; leave "
            "--judgements out"
        )
    results = results_of(arena.about, matches, votes)
    console = Console()
    for figures in figures_of(results):
        console.print(table_of(figures))
    if results.scores is None:
        print("no Bradley-Terry scores: the votes do not connect all models yet")
    if out:
        write_atomically(out, results.to_json() + "\n")
        print(f"figures {out}")
    if judgements:
        write_atomically(judgements, "".join(rows))
        decided = results.counts.preferred + results.counts.ties
        left_out = f"; left out, because an answer is empty: {decided - len(rows)}" if decided > len(rows) else ""
        print(f"judgements {judgements}: {len(rows)} votes, for --annotator file:{judgements}{left_out}")


def judgement_file(name: str) -> Path:
    """Raises InputError for a name that the annotator would not read."""
    if not name.endswith(".jsonl"):
        raise InputError(f"--judgements = {name}: expected a name that ends with .jsonl")
    return new_file(name, "--judgements")
