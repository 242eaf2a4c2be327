"""Headless Chromium for tests and benchmarks: Debian's, or another that is on the PATH."""

import shutil
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def launch(play: Any) -> Any:
    """A browser of playwright's, with the Chromium of this machine; nothing is downloaded."""
    # The sandbox cannot be set up by root in a container.
    return play.chromium.launch(executable_path=executable(), args=["--no-sandbox"])


def log_of(tab: Any, said: list[str], *, home: str = "file:") -> None:
    """Collect what goes wrong in a tab: console errors and warnings, exceptions, requests that leave home."""
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith((home, "data:")) else said.append(request.url))


def screenshot(tab: Any, folder: Path | None, name: str) -> None:
    if folder:
        tab.screenshot(path=str(folder / f"{name}.png"), full_page=True)
