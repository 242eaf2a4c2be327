"""The page and the four questions that it asks, over HTTP.

    GET  /            the page; /arena.css, /arena.js, /page.css (the report's) what it is made of
    POST /api/next    {rater}                  -> where the rater is, and the next match
    POST /api/vote    {rater, match, choice}   -> the same, after the vote is on the disk; 409: voted otherwise before
    POST /api/undo    {rater}                  -> the same, with the match whose vote was taken back

Nothing says which model an answer is of. Requests of other web pages are refused: POST takes JSON from the page's own
origin only, and a server on loopback answers to loopback's names only, so that no foreign name can be pointed at it.
With a token, every POST must carry it; the page takes it from what stands after # in its address, which browsers do not
send.
"""

import hmac
import json
import socket
import sys
import unicodedata
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from prefloop.arena.matches import side_1
from prefloop.arena.votes import CHOICES, Arena
from prefloop.errors import InputError
from prefloop.report import page as report_page

FOLDER = Path(__file__).parent
FILES = {
    "/": (FOLDER / "page.html", "text/html"),
    "/arena.css": (FOLDER / "page.css", "text/css"),
    "/arena.js": (FOLDER / "page.js", "text/javascript"),
    "/page.css": (report_page.FOLDER / "page.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LONGEST_BODY = 4096
DRAINED = 1 << 20
"""Bytes of a longer body that are read before it is refused."""
LONGEST_NAME = 40
LARGEST_ID = 1 << 63


class Refused(Exception):
    """A request that gets an error in place of an answer."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class ArenaServer(ThreadingHTTPServer):
    """A server of one arena. `token`: what every POST must carry, none if empty. Port 0 takes any that is free.

    Raises InputError when it cannot listen there.
    """

    daemon_threads = True

    def __init__(self, arena: Arena, *, host: str = "127.0.0.1", port: int = 0, token: str = "") -> None:
        self.arena, self.host, self.token = arena, host, token
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}, port {port} ({error.strerror or error}); give another --port (0 takes any "
                "that is free), or a --host of this machine"
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that is closed while it waits is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is, with the token if there is one. An address of all interfaces is told by the machine's
        name.
        """
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.server_address[1]}/" + (f"#{quote(self.token, safe='')}" if self.token else "")


class Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "prefloop", ""
    timeout = 30

    @property
    def site(self) -> ArenaServer:
        assert isinstance(self.server, ArenaServer)
        return self.server

    def do_GET(self) -> None:
        self._answer(self._file)

    def do_POST(self) -> None:
        self._answer(self._api)

    def _answer(self, work: Callable[[], tuple[bytes, str]]) -> None:
        status = HTTPStatus.OK
        try:
            self._check_host()
            body, kind = work()
        except (Refused, InputError) as error:
            status = error.status if isinstance(error, Refused) else HTTPStatus.BAD_REQUEST
            body, kind = json.dumps({"error": str(error)}).encode(), "application/json"
        self.send_response(status)
        for name, value in {
            **HEADERS, "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _check_host(self) -> None:
        if is_loopback(self.site.host) and not is_loopback(_host_of(f"//{self.headers.get('Host')}")):
            raise Refused(HTTPStatus.FORBIDDEN, "this server answers to 127.0.0.1 and localhost only")

    def _file(self) -> tuple[bytes, str]:
        file = FILES.get(self.path.partition("?")[0])
        if file is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        return file[0].read_bytes(), file[1]

    def _api(self) -> tuple[bytes, str]:
        body = self._body()
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
        own = f"{self.headers.get('Host')}"
        if origin not in (None, f"http://{own}", f"https://{own}") or site != "same-origin":
            raise Refused(HTTPStatus.FORBIDDEN, "votes are taken from the arena's own page only")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected Content-Type: application/json")
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.site.token and not hmac.compare_digest(given.encode(), self.site.token.encode()):
            raise Refused(HTTPStatus.UNAUTHORIZED, "the token is missing or another one")
        data = _object(body)
        answer = {"/api/next": self._next, "/api/vote": self._vote, "/api/undo": self._undo}.get(self.path)
        if answer is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such question")
        return json.dumps(answer(rater_of(data.get("rater")), data)).encode(), "application/json"

    def _body(self) -> bytes:
        """What was sent. It is read before anything is refused: a connection that is closed on unread data is reset,
        and the refusal is lost with it.
        """
        length = self.headers.get("Content-Length", "")
        body = self.rfile.read(min(int(length), DRAINED)) if length.isascii() and length.isdigit() else b""
        if not 0 < len(body) <= LONGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected a body of 1 to {LONGEST_BODY} bytes")
        return body

    def _next(self, rater: str, data: dict[str, Any]) -> dict[str, Any]:
        return self._state(rater)

    def _vote(self, rater: str, data: dict[str, Any]) -> dict[str, Any]:
        match, choice = data.get("match"), data.get("choice")
        if type(match) is not int or not 0 < match < LARGEST_ID or choice not in CHOICES:
            raise InputError(f"expected the number of a match, and one of {', '.join(CHOICES)} as choice")
        if not self.site.arena.vote(rater, match, choice):
            raise Refused(HTTPStatus.CONFLICT, "you have voted otherwise on this one, perhaps in another window")
        return self._state(rater)

    def _undo(self, rater: str, data: dict[str, Any]) -> dict[str, Any]:
        return self._state(rater, self.site.arena.undo(rater))

    def _state(self, rater: str, match: int | None = None) -> dict[str, Any]:
        """Where a rater is, with `match` or the next one as it is shown."""
        arena = self.site.arena
        place = arena.place(rater)
        match = match or place.match
        shown = None
        if match is not None:
            found = arena.match(match)
            answers = [found.response_1, found.response_2]
            shown = {
                "match": match,
                "prompt": [{"role": m.role, "content": m.content} for m in found.prompt.messages],
                "answers": answers if side_1(arena.about.seed, match, rater) == 1 else answers[::-1],
            }
        return {"shown": shown, "done": place.done, "of": place.of}

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who voted when is nobody's business on a terminal."""


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise Refused(HTTPStatus.BAD_REQUEST, "expected a JSON object")
    return data


def _host_of(url: str) -> str:
    """The host in an address, without port; nothing where it is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def rater_of(name: Any) -> str:
    """A rater's name, its spaces and accents written in one way. Raises InputError for what is no name."""
    clean = " ".join(unicodedata.normalize("NFC", name).split()) if isinstance(name, str) else ""
    if not clean or len(clean) > LONGEST_NAME or not clean.isprintable():
        raise InputError(f"expected a name of 1 to {LONGEST_NAME} characters as rater")
    return clean


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address or name.

    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "example.org")]
    [True, True, True, False, False]
    """
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
