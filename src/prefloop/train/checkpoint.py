"""Checkpoints inside training: weights, optimiser, schedule position, metrics and what else a method carries from step
to step, whole or not at all.

A checkpoint is a folder `checkpoint-STEP` written under another name and renamed when complete, with a list of its
files' sizes and hashes. A folder that does not match its list is refused, never loaded in part.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from prefloop.atomic import write_folder_atomically
from prefloop.errors import InputError

LISTING = "checkpoint.json"
MORE = "more.pt"


def save_checkpoint(
    scratch: Path,
    *,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    log: list[dict[str, Any]],
    more: dict[str, Any] | None = None,
) -> None:
    """Write `scratch/checkpoint-STEP`, in place of one that is there, and then remove the others.

    `more`: tensors and plain data, which `load_more` gives back.
    """

    def write(folder: Path) -> None:
        trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
        parts = {"weights.pt": trained, "optimizer.pt": optimizer.state_dict(), **({MORE: more} if more else {})}
        for name, content in parts.items():
            # On an open file: given a path, a full disk ends in a RuntimeError that hides its cause.
            with (folder / name).open("wb") as handle:
                torch.save(content, handle)
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
        files = {file.name: _size_and_hash(file) for file in sorted(folder.iterdir())}
        (folder / LISTING).write_text(json.dumps({"step": step, "files": files}), encoding="utf-8")

    older = [folder for folder in scratch.glob("checkpoint-*") if folder.name != f"checkpoint-{step}"]
    write_folder_atomically(scratch / f"checkpoint-{step}", write)
    for folder in older:
        shutil.rmtree(folder)


def load_checkpoint(
    scratch: Path | None, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, Any]]]:
    """Restore the newest checkpoint into `model` and `optimizer`; (0, []) when there is none.

    Raises InputError when a file is missing, truncated or changed.
    """
    folder = _newest(scratch)
    if folder is None:
        return 0, []
    listing = _checked_listing(folder)
    device = next(model.parameters()).device
    weights = torch.load(folder / "weights.pt", map_location=device, weights_only=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return listing["step"], log


def load_more(scratch: Path, *, device: torch.device) -> dict[str, Any] | None:
    """The `more` of the newest checkpoint, tensors on `device`; None when there is none. `load_checkpoint` comes first:
    it checks the files.
    """
    file = (_newest(scratch) or scratch) / MORE
    return torch.load(file, map_location=device, weights_only=True) if file.is_file() else None


def _newest(scratch: Path | None) -> Path | None:
    folders = scratch.glob("checkpoint-*") if scratch else []
    return max(folders, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _checked_listing(folder: Path) -> dict[str, Any]:
    fix = f"delete {folder} and run the same command again; the stage then starts from the beginning"
    try:
        listing = json.loads((folder / LISTING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"checkpoint {folder} has no readable {LISTING}; {fix}") from None
    for name, (size, digest) in listing["files"].items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise InputError(f"checkpoint file {file} is truncated: {found} bytes, expected {size}; {fix}")
        if _size_and_hash(file)[1] != digest:
            raise InputError(f"checkpoint file {file} was changed after it was written; {fix}")
    return listing


def _size_and_hash(file: Path) -> tuple[int, str]:
    with file.open("rb") as handle:
        return file.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()
