"""What stands before the application: it bounds what a client may send."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import JSONResponse

from fastpeft.serving.messages import refusal


class Guard:
    """Reads a request whole before the application gets it, so that a slow or a large body neither delays it nor
    fills the memory: a body has at most `max_bytes`, and comes within `seconds`. A connection on which no request
    begins is not bounded here.
    """

    def __init__(self, app: Any, max_bytes: int, seconds: float) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = bytearray(), True
        refused: tuple[str, int] | None = None
        try:
            async with asyncio.timeout(self._seconds):
                while more and len(body) <= self._max_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            refused = f"the body did not come within {self._seconds:g} seconds.", 408
        if len(body) > self._max_bytes:
            refused = f"the body has more than {self._max_bytes:,} bytes. Send fewer or shorter texts.", 413
        if refused:
            await JSONResponse(refusal(*refused), refused[1], {"Connection": "close"})(scope, receive, send)
            return
        given = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return given.pop() if given else await receive()

        await self._app(scope, replay, send)
