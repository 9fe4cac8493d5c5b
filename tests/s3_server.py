"""A real S3 server on this machine (moto's), in threads of the test, with faults on demand."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"


class S3Server:
    """Answers as S3 does. A fault is spent on the next GET requests whose path holds `of`."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._faults: list[tuple[str, str]] = []
        self.gets: list[tuple[str, str]] = []  # path and range of every GET
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fail(self, what: str, times: int, of: str = "") -> None:
        """`error500`, `slow_down`, `stall` (longer than the client waits), `cut` (half of the bytes that it promised)
        or `short` (half of the bytes, and says so)."""
        with self._lock:
            self._faults += [(what, of)] * times

    @property
    def faults_left(self) -> Counter[str]:
        with self._lock:
            return Counter(what for what, _ in self._faults)

    def _fault_of(self, path: str) -> str | None:
        with self._lock:
            for index, (what, of) in enumerate(self._faults):
                if of in path:
                    del self._faults[index]
                    return what
        return None

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET" or environ["PATH_INFO"].rstrip("/") == f"/{BUCKET}":
            return self._app(environ, start_response)
        with self._lock:
            self.gets.append((environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
        fault = self._fault_of(environ["PATH_INFO"])
        if fault == "error500":
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>injected</Message></Error>"]
        if fault == "slow_down":
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>injected</Message></Error>"]
        if fault == "stall":
            time.sleep(3)
            start_response("500 Internal Server Error", [])
            return [b""]
        if fault is None:
            return self._app(environ, start_response)
        answer: dict[str, Any] = {}

        def keep(status: str, headers: list[tuple[str, str]], *rest: object) -> Any:
            answer.update(status=status, headers=headers)
            return lambda data: None

        body = b"".join(self._app(environ, keep))
        half = body[: len(body) // 2]
        promised = len(body) if fault == "cut" else len(half)
        headers = [(name, value) for name, value in answer["headers"] if name.lower() != "content-length"]
        start_response(answer["status"], [*headers, ("Content-Length", str(promised))])
        return [half]


def use_server(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> None:
    """Let every S3 client of this process and of its children speak to the server."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


def upload(server: S3Server, folder: Path, prefix: str) -> Path:
    """Copy a store into the bucket; returns its place."""
    client = boto3.client("s3", endpoint_url=server.url)
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
    return Path(f"s3://{BUCKET}/{prefix}")


def put(server: S3Server, key: str, data: bytes | None) -> None:
    """Replace an object, or delete it."""
    client = boto3.client("s3", endpoint_url=server.url)
    if data is None:
        client.delete_object(Bucket=BUCKET, Key=key)
    else:
        client.put_object(Bucket=BUCKET, Key=key, Body=data)
