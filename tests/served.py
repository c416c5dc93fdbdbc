"""A server of the tests."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from typing import Any


class Server:
    """An application on a free port, in a thread, until a `with` ends."""

    def __init__(self, app: Any) -> None:
        import uvicorn

        self._socket = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=10))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self.port = self._socket.getsockname()[1]
        self._thread.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(
        self, method: str, path: str, body: Any = None, kind: str = "application/json"
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, answer and headers; bytes are sent as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": kind}, method=method
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
                status, headers, got = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            status, headers, got = error.code, error.headers, error.read()
        is_json = headers.get_content_type() == "application/json"
        return status, json.loads(got or b"null") if is_json else got.decode(), dict(headers)

    def send(self, sent: bytes, listen: bool = True) -> bytes:
        """What comes back for bytes that may be no HTTP, until the server closes; nothing to who leaves at once."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(sent)
            found = b""
            while listen and (got := connection.recv(65_536)):
                found += got
            return found

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
