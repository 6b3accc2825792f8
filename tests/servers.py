"""Servers for tests, on loopback: an S3 emulator, and a web server that answers byte ranges and fails on demand."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class Faults:
    """What the web server does wrong: the next `errors` answers are 503; the next `cut` stop half way; the next `slow` hang; and
    every answer for a key in `broken` is 503."""

    errors: int = 0
    cut: int = 0
    slow: int = 0
    broken: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)


def _handler(root: Path, faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes: the second would wait 40 ms for the first's answer

        def log_message(self, *args: object) -> None:
            """Quiet."""

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            key = self.path.lstrip("/")
            faults.requests.append(key)
            if key in faults.broken or faults.errors > 0:
                faults.errors -= 1
                return self._plain(503)
            path = root / key
            if not path.is_file():
                return self._plain(404)
            if body and faults.slow > 0:
                faults.slow -= 1
                time.sleep(4)
            data = path.read_bytes()
            total = len(data)
            wanted = self.headers.get("Range")
            if wanted is not None:
                start, _, end = wanted.removeprefix("bytes=").partition("-")
                first = int(start) if start else total - int(end)
                last = int(end) if start and end else total - 1
                data = data[first : last + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Last-Modified", "Sun, 22 Nov 2026 00:00:00 GMT")
            self.end_headers()
            if body and faults.cut > 0 and len(data) > 1:
                faults.cut -= 1
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif body:
                self.wfile.write(data)
            return None

        def _plain(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@contextlib.contextmanager
def web_server(root: Path) -> Iterator[tuple[str, Faults]]:
    """(address, faults) of a server of a folder's files."""
    faults = Faults()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(root, faults))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[str]:
    """Address of an empty bucket of an S3 emulator; the environment says how to reach it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=settings["AWS_ENDPOINT_URL"]).create_bucket(Bucket=bucket)
    try:
        yield f"s3://{bucket}"
    finally:
        server.stop()
