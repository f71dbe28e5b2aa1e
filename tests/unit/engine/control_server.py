"""SGLang's control endpoints as a state machine (0.5.23: pause, update session, version stamps), to
break answers that a real server cannot be made to break: lost ones, late ones, refusals between two
steps. No model behind it; tests/integration has real servers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

Answer = tuple[int, dict[str, Any]]


class ControlServer:
    """`fail[path]`: called with the body before the endpoint; a (status, body) that it returns is
    answered instead. May be a coroutine.
    """

    def __init__(self, architectures: list[str], port: int = 0) -> None:
        self.architectures, self.fail = architectures, {}
        # served_model_name; API key asked for; samples given
        self.name, self.key, self.asked = "", None, 0
        # requests that a pause holds back
        self.waiting = 0
        self.restart()
        self._loop, ready = asyncio.new_event_loop(), threading.Event()

        async def run() -> None:
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", self._handle)
            self._runner = web.AppRunner(app, shutdown_timeout=0.2)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", port)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            ready.set()

        def serve() -> None:
            self._loop.create_task(run())
            self._loop.run_forever()

        threading.Thread(target=serve, daemon=True).start()
        assert ready.wait(120)
        self.url = f"http://127.0.0.1:{self.port}"

    def restart(self) -> None:
        """As after a crash: start weights, nothing open."""
        self.version, self.paused, self.session = "default", False, False

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(120)
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if request.path in self.fail:
            answer = self.fail[request.path](body)
            answer = await answer if asyncio.iscoroutine(answer) else answer
            if answer is not None:
                return web.json_response(answer[1], status=answer[0])
        if request.path == "/generate":
            return await self._generate(body)
        status, content = self._control(request.path, body)
        return web.json_response(content, status=status)

    def _control(self, path: str, body: dict[str, Any]) -> Answer:
        ok, no = (
            (200, {"success": True, "message": "ok"}),
            (400, {"success": False, "message": "no such session, or one is open already"}),
        )
        if path in ("/begin_weight_update", "/end_weight_update"):
            if self.session == (path == "/begin_weight_update"):
                return no
            self.session = not self.session
        elif path in ("/pause_generation", "/continue_generation"):
            self.paused = path == "/pause_generation"
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/update_weights_from_disk":
            self.version = body["weight_version"]
        elif path == "/update_weights_from_tensor" and not self.session:
            return no
        return 200, ok[1] | {
            "weight_version": self.version,
            "architectures": self.architectures,
            "tp_size": 1,
            "served_model_name": self.name,
            "ranks": [{"checksums": {}, "parallelism_info": [{"tp_rank": 0}]}],
        }

    async def _generate(self, body: dict[str, Any]) -> web.Response:
        self.waiting += 1
        while self.paused:
            await asyncio.sleep(0.02)
        self.waiting -= 1
        length, outputs = body["sampling_params"]["max_new_tokens"], []
        self.asked += len(body["rid"])
        for rid, ids in zip(body["rid"], body["input_ids"], strict=True):
            meta = {
                "id": rid,
                "weight_version": self.version,
                "finish_reason": {"type": "stop"},
                "input_token_logprobs": [[-1.0, token, None] for token in ids],
                "output_token_logprobs": [[-1.0, 5, None]] * length,
            }
            outputs.append({"output_ids": [5] * length, "meta_info": meta})
        return web.json_response(outputs)


def once(answer: Answer) -> Callable[[dict[str, Any]], Answer | None]:
    """Fail the first request alone."""
    left = [answer]
    return lambda body: left.pop() if left else None
