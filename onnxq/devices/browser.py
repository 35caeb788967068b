"""A page in a headless browser, served from this machine. Needs Python's standard library alone.

It stands alone so that what `onnxq deploy --for web` writes can carry it.
"""

from __future__ import annotations

import contextlib
import mimetypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
NO_GPU = ("--disable-gpu",)
SOFTWARE_GPU = (  # WebGPU on the CPU, by SwiftShader: the same on every machine, and slow
    "--enable-unsafe-webgpu",
    "--enable-unsafe-swiftshader",
    "--use-webgpu-adapter=swiftshader",
    "--ignore-gpu-blocklist",
)
ISOLATED = {  # what a page must be sent with to get shared memory, and so threads
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_PULSE = 0.5  # seconds between two signs of life
_START = 60.0  # seconds that a browser may take to open the page
_GRACE = 10.0  # seconds that a page may take to load itself again
# The browser and its helpers are a group of processes, which ends with the browser, and when
# nobody holds the other end of stdin any more.
_UNTIL_CLOSED = '("$@"; kill -9 -$$) & read _; kill -9 -$$'

Get = Callable[[str], "Path | bytes | None"]
Post = Callable[[str, bytes], bytes]


def find_browser() -> str | None:
    """A Chromium by name, or what $CHROMIUM says."""
    named = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else COMMANDS
    return next(filter(None, map(shutil.which, named)), None)


class Site:
    """Pages on this machine: `get` gives a path's file or bytes, `post` answers what is sent.

    A page that holds `/alive` open (an EventSource) is watched: `lost` says that it died.
    """

    def __init__(self, get: Get, post: Post) -> None:
        self._get, self._post = get, post
        self._lost_at = time.monotonic() + _START
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site._answer(self)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                _send(self, site._post(self.path, body), "application/json")

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Site:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def lost(self) -> bool:
        return time.monotonic() > self._lost_at

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if path == "/alive":
            self._watch(request)
            return
        found = self._get(path)
        if found is None or (isinstance(found, Path) and not found.is_file()):
            request.send_error(404)
            return
        _send(request, found, mimetype(str(found) if isinstance(found, Path) else path))

    def _watch(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        request.send_response(200)
        for key, value in {**ISOLATED, "Content-Type": "text/event-stream"}.items():
            request.send_header(key, value)
        request.end_headers()
        with contextlib.suppress(OSError):
            while True:
                request.wfile.write(b":\n\n")
                self._lost_at = time.monotonic() + _GRACE
                time.sleep(_PULSE)


def within(folder: Path, path: str) -> Path | None:
    """The file that a path from outside names in a folder; None where it leads out of it."""
    found = (folder / path.strip("/")).resolve()
    return found if found.is_relative_to(folder.resolve()) else None


def mimetype(path: str) -> str:
    known = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}
    suffix = os.path.splitext(path)[1]
    return known.get(suffix) or mimetypes.guess_type(path)[0] or "application/octet-stream"


def _send(request: BaseHTTPRequestHandler, content: Path | bytes, kind: str) -> None:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    request.send_response(200)
    for key, value in {**ISOLATED, "Content-Type": kind, "Content-Length": str(size)}.items():
        request.send_header(key, value)
    request.end_headers()
    with contextlib.suppress(OSError):  # a page that goes away asks for no more
        if isinstance(content, bytes):
            request.wfile.write(content)
        else:
            with content.open("rb") as file:
                shutil.copyfileobj(file, request.wfile)


@contextmanager
def opened(
    browser: str, url: str, profile: Path, flags: Sequence[str] = NO_GPU
) -> Iterator[subprocess.Popen[bytes]]:
    """The page in a browser without a window, which ends with this process, however that ends.

    `profile` is an empty folder for what the browser keeps.
    """
    root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
    command = [browser, *FLAGS, *flags, *root, f"--user-data-dir={profile}", url]
    if os.name == "posix":
        command = ["sh", "-c", _UNTIL_CLOSED, "sh", *command]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill() if os.name != "posix" else process.communicate()
        process.wait()
