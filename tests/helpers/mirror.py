"""A web server for what the loaders download."""

import io
import tarfile
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Mirror:
    """A server of `files` on the loopback; of a file in `cut` only the first half arrives."""

    def __init__(self, files: Mapping[str, bytes], cut: frozenset[str]) -> None:
        fetched: list[str] = []
        self.fetched = fetched

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                fetched.append(self.path.removeprefix("/"))
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                name = self.path.removeprefix("/")
                content = files.get(name)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if body and content:
                    self.wfile.write(content[: len(content) // 2] if name in cut else content)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


Serve = Callable[..., Mirror]


def archive(files: Mapping[str, bytes]) -> bytes:
    """A tar.gz of these files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as members:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            members.addfile(member, io.BytesIO(data))
    return content.getvalue()
