"""The client of an sglang-router in front of the engines.

Requests for samples go to the router. All other requests (weights, versions, health) go to the
engines themselves.

sglang-router 0.3.2 behaves so. /generate takes one request at a time with one rid (it answers 422 to
a list of rids), and passes rid, log-probs, weight versions and the Authorization header through. The
control endpoints, such as begin_weight_update, are 404. Start the router without --api-key, which
would show in process lists, and without workers: the run enlists its engines, and takes them out
when it ends. The router adds and removes a worker in the background (202), and names it by an id.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import aiohttp

from megasd.config.schema import EngineConfig
from megasd.engine.client import EngineClient
from megasd.engine.errors import Refused, Unreachable
from megasd.types import UserError


class Router(EngineClient):
    """A router that is asked for samples in place of its engines.

    It makes progress as long as one of the engines does.
    """

    def __init__(self, config: EngineConfig, engines: list[EngineClient], **kwargs: Any) -> None:
        super().__init__(config, url=config.router, log_path=Path("engine.log"), **kwargs)
        self.engines = engines
        # The URL under which each engine was made a worker.
        self._listed: dict[EngineClient, str] = {}

    async def wait_ready(self) -> None:
        """Make the run's engines workers of the router, and remove dead workers of an earlier run.

        UserError if the router does not answer, or has a living worker that is no engine of this
        run.
        """
        ours = {engine.url for engine in self.engines}
        for url in sorted(set(await self._workers()) - ours):
            if await _answers(url):
                raise UserError(
                    f"rollout.engine.router: {self.url} has the worker {url}, which is no engine of this run;"
                    " take it out"
                )
            await self._remove(url)
        for engine in self.engines:
            await self.enlist(engine)
        deadline = asyncio.get_running_loop().time() + self.config.start_timeout
        while True:
            workers = await self._workers()
            if set(workers) == ours and all(workers.values()):
                return
            if asyncio.get_running_loop().time() > deadline:
                wrong = sorted(ours ^ set(workers)) or sorted(
                    url for url, healthy in workers.items() if not healthy
                )
                raise UserError(
                    f"rollout.engine.router: {self.url} does not hold this run's engines, all healthy: see"
                    f" {', '.join(wrong)}"
                )
            await asyncio.sleep(0.2)

    async def enlist(self, engine: EngineClient) -> None:
        """Make an engine a worker; the engine may have come back under another URL."""
        before = self._listed.get(engine, engine.url)
        if before != engine.url:
            await self._remove(before)
        if engine.url not in await self._workers():
            await self._ask("POST", "/workers", {"url": engine.url})
        self._listed[engine] = engine.url

    async def close(self) -> None:
        """Remove the run's engines from the router, and close the connections."""
        # The router may be gone.
        with contextlib.suppress(UserError):
            for url in self._listed.values():
                await self._remove(url)
        self._listed.clear()
        await super().close()

    async def _list(self) -> list[dict[str, Any]]:
        answer = await self._ask("GET", "/workers")
        return [worker | {"url": worker["url"].rstrip("/")} for worker in answer["workers"]]

    async def _workers(self) -> dict[str, bool]:
        """URL of a worker -> whether the router counts the worker as healthy."""
        return {worker["url"]: bool(worker["is_healthy"]) for worker in await self._list()}

    async def _remove(self, url: str) -> None:
        for worker in await self._list():
            if worker["url"] == url:
                await self._ask("DELETE", f"/workers/{worker['id']}")

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            return await self.request(method, path, body, timeout=30)
        except (Unreachable, Refused) as error:
            raise UserError(
                f"rollout.engine.router: no sglang-router answers there ({error}); start it first, or set it"
                " to null"
            ) from error

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Send a request and return the parsed JSON answer; /generate takes a batch of one."""
        if path != "/generate" or body is None:
            return await super().request(method, path, body, timeout=timeout)
        single = body | {"rid": body["rid"][0], "input_ids": body["input_ids"][0]}
        return [await super().request(method, path, single, timeout=timeout)]

    async def is_progressing(self) -> bool:
        """Whether one of the engines makes progress, or is paused by a push."""
        moved = await asyncio.gather(*(engine.is_progressing() for engine in self.engines if engine.alive))
        return any(moved) or any(engine.applied.paused for engine in self.engines)


async def _answers(url: str) -> bool:
    """Whether a server answers.

    The router may count a dead server as healthy until its next check. The request goes without
    this run's key, since the server may belong to somebody else.
    """
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
            session.get(f"{url}/health"),
        ):
            return True
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
