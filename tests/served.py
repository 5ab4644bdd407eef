"""An HTTP server of one file on this machine, which records its requests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """`address` is that of the file; with `?cut` appended, the reply is too short."""

    address: str
    requests: list[str] = field(default_factory=list)


@contextmanager
def served(content: bytes) -> Iterator[Served]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + 100 * self.path.endswith("cut")))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        asked = Served(f"http://127.0.0.1:{running.server_port}/weights.pth")
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield asked
        finally:
            running.shutdown()
            thread.join()
