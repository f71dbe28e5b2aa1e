"""The client of one SGLang server over HTTP: health, requests for samples, and weights.

    engine = EngineClient(config, model_path="runs/q/model", device="cpu", dtype="float32", ...)
    engine.launch()                                   # a process on loopback; output in log_path
    await engine.wait_ready()                         # until it has generated a token
    await engine.applied.load("runs/q/weights/3", 3)  # and /model_info says 3
    engine.kill()                                     # the whole process tree

A trainer that is killed takes its engines with it.

An engine is dead when its process has exited, when it refuses connections repeatedly, or when
requests wait in it and none has finished nor grown by a token for `progress_timeout` seconds:
SGLang's own /health goes on answering for a while in each of these cases. sglang is never imported
here.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import aiohttp

from megasd.config.schema import EngineConfig
from megasd.engine.applied_weights import PARTIAL, AppliedWeights
from megasd.engine.auth import VARIABLE, engine_key
from megasd.engine.errors import Refused, StartError, Unreachable
from megasd.engine.process import EngineProcess
from megasd.types import UserError

# Seconds an idle connection is kept. SGLang closes it after 5, and a request that is sent in that
# moment is lost.
KEEP_ALIVE = 2.0
# After so many refused connections in a row an engine counts as dead.
PROBES = 4


class EngineClient(EngineProcess):
    """A server, its weights (`applied`), and its known health.

    Every coroutine and `launch` belong to one event loop, in a thread that lives as long as the
    engine: the server dies with that thread. `restartable`: the engine can come back as a new
    process, by `launch` and `wait_ready`.
    """

    def __init__(self, config: EngineConfig, **kwargs: Any) -> None:
        """Make a client that is not started; `kwargs` go to EngineProcess."""
        super().__init__(config, **kwargs)
        self.applied = AppliedWeights(self)
        # Whether the engine answers, as far as is known.
        self.alive = False
        # Why the engine is not alive, once it was found dead.
        self.reason = "not started"
        self.restartable, self.restarts = self.owned, 0
        # The engine is dead and its restarts are used up. The other engines go on without it.
        self.lost = False
        # Only one caller at a time revives the engine.
        self.lock = asyncio.Lock()
        self.tp_size = config.tensor_parallel_size
        # The name that the engine was started under (served_model_name).
        self.answers_as: str | None = None
        # The prompt + response tokens that a request may have; None before the engine has said.
        self.max_tokens: int | None = None
        # The running generate requests, and the prompt and response tokens that they ask for.
        self.in_flight = self.busy = 0
        # Requests wait in the engine, and it makes no progress.
        self.hung = False
        # The load of the scheduler when it was last asked, and the time of the last progress.
        self._load: list[list[Any]] | None = None
        self._last_progress = 0.0
        self._session: aiohttp.ClientSession | None = None

    @property
    def up(self) -> bool:
        """Whether the engine may be asked for samples."""
        return self.alive and self.applied.version is not None

    def launch(self) -> None:
        """Start the process and return at once; see EngineProcess."""
        super().launch()
        self.hung = False
        self.applied.forget_update()

    def kill(self) -> None:
        """Kill the process tree of an owned engine and wait until it is gone."""
        self.alive = False
        super().kill()

    async def close(self) -> None:
        """Close the connections and kill an owned engine."""
        await self.disconnect()
        self.kill()

    async def disconnect(self) -> None:
        """Close the connections; the next request opens them again."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ---- HTTP ------------------------------------------------------------------------------------

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
            key = engine_key()
            headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)
        return self._session

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Send a request and return the parsed JSON answer.

        Refused on 4xx; Unreachable on 5xx, on a broken connection and after `timeout` seconds.
        """
        try:
            async with self._open_session().request(
                method,
                self.url + path,
                json=body,
                timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=10),
            ) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise Unreachable(f"{self.url}{path}: {type(error).__name__} {error}".strip()) from error
        if response.status == 401:
            raise Refused(
                f"{self.url}{path} answered 401: set {VARIABLE} to the key that the engine was started with"
            )
        if 400 <= response.status < 500:
            raise Refused(f"{self.url}{path} answered {response.status}: {_message(text)}")
        if response.status >= 300:
            raise Unreachable(f"{self.url}{path} answered {response.status}: {_message(text)}")
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise Refused(
                f"{self.url}{path} answered {_message(text)!r}, which is no JSON; is it an SGLang server?"
            ) from error

    async def generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """POST /generate for a batch of `input_ids`; one output for each prompt, in order.

        Unreachable if the engine makes no progress.
        """
        if self.in_flight == 0:
            self._last_progress = time.monotonic()
        params = body["sampling_params"]
        room = (params[0] if isinstance(params, list) else params)["max_new_tokens"]
        size = sum(len(ids) + room for ids in body["input_ids"])
        self.in_flight, self.busy = self.in_flight + 1, self.busy + size
        task = asyncio.ensure_future(self.request("POST", "/generate", body))
        try:
            while True:
                patience = self._last_progress + self.config.progress_timeout - time.monotonic()
                done, _ = await asyncio.wait({task}, timeout=max(patience, 0.0))
                if done:
                    outputs = task.result()
                    self._last_progress = time.monotonic()
                    return outputs
                if time.monotonic() >= self._last_progress + self.config.progress_timeout:
                    # A push may be under way. Or answers are long: none is finished, and all grow.
                    if self.applied.paused or await self.is_progressing():
                        self._last_progress = time.monotonic()
                        continue
                    self.hung = True
                    raise Unreachable(f"{self.url}: no token in {self.config.progress_timeout:g} s")
        finally:
            self.in_flight, self.busy = self.in_flight - 1, self.busy - size
            task.cancel()

    async def is_progressing(self) -> bool:
        """Whether the scheduler's load (requests and tokens in use) has changed since the last call.

        The first answer counts as a change.
        """
        try:
            answer = await self.request("GET", "/v1/loads", timeout=10)
        except (Unreachable, Refused):
            return False
        names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        before, self._load = self._load, [[load.get(name) for name in names] for load in answer["loads"]]
        return self._load != before

    # ---- health ----------------------------------------------------------------------------------

    async def wait_ready(self) -> None:
        """Wait until the engine has generated a token, at most start_timeout.

        StartError with the log's last error.

        A server given by URL is asked once: UserError if it does not answer, or serves another model.
        """
        if not self.owned:
            return await self._check_url()
        deadline = time.monotonic() + self.config.start_timeout
        body = {"input_ids": [[0]], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        while True:
            if self.exit_code() is not None:
                raise StartError(
                    f"the engine exited with status {self.exit_code()} while starting: {self.last_error()}"
                    f" (log: {self.log_path})"
                )
            if time.monotonic() > deadline:
                self.kill()
                limit = f"rollout.engine.start_timeout={self.config.start_timeout:g} s"
                raise StartError(
                    f"the engine gave no token within {limit}: {self.last_error()} (log: {self.log_path})"
                )
            # Another program answers at this port.
            if self.port_was_taken():
                self.kill()
                self.launch()
            try:
                await self.request("POST", "/generate", body, timeout=max(deadline - time.monotonic(), 1.0))
                break
            except Unreachable:
                await asyncio.sleep(0.2)
        await self._read_limits()
        self.alive, self.applied.version = True, 0

    async def _check_url(self) -> None:
        try:
            info = await self.request("GET", "/model_info", timeout=10)
        except (Unreachable, Refused) as error:
            raise UserError(
                f"rollout.engine.urls: no SGLang server answers there ({error}); start it first, or leave the"
                " list empty"
            ) from error
        wanted = json.loads((Path(self.model_path) / "config.json").read_text()).get("architectures")
        if not isinstance(info, dict) or "weight_version" not in info:
            raise UserError(
                f"rollout.engine.urls: {self.url}/model_info is not that of an SGLang 0.5.23 server"
            )
        if info.get("architectures") != wanted:
            raise UserError(
                f"rollout.engine.urls: {self.url} serves {info.get('architectures')}, model.path is {wanted}"
            )
        await self._read_limits()
        self.incarnation += 1
        self.hung, self.alive = False, True
        self.applied.forget_update()
        # A trainer that died in the middle of a push has left the engine paused. A server that was
        # restarted since then knows nothing of the push.
        self.applied.paused = self.applied.updating = str(info["weight_version"]).startswith(PARTIAL)

    async def _read_limits(self) -> None:
        info = await self.request("GET", "/server_info", timeout=30)
        # SGLang silently shortens max_new_tokens so that prompt + response <= min(context, KV pool)
        # - 2. max_req_input_len is this limit - 4.
        limit = info.get("max_req_input_len")
        self.max_tokens = None if limit is None else int(limit) + 4
        self.answers_as = info.get("served_model_name")
        self.tp_size = int(info.get("tp_size") or self.tp_size)
        for key in ("dp_size", "pp_size"):
            if int(info.get(key) or 1) > 1:
                raise UserError(
                    f"rollout.engine.urls: {self.url} runs with {key}={info[key]}; weights go to servers with"
                    " 1: start several"
                )

    async def why_dead(self) -> str | None:
        """Why the engine counts as dead, None if it lives.

        A refused connection is tried again for some seconds.
        """
        if self.hung:
            return f"no token in {self.config.progress_timeout:g} s"
        reason = ""
        for attempt in range(PROBES):
            if self.exit_code() is not None:
                return f"its process exited with status {self.exit_code()}"
            try:
                await self.request("GET", "/model_info", timeout=10)
                return None
            except (Unreachable, Refused) as error:
                reason = str(error)
            await asyncio.sleep(0.25 * 2**attempt)
        return reason


def _message(text: str) -> str:
    """The error message of the server, on one line."""
    try:
        parsed = json.loads(text)
        error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        pass
    return " ".join(text.split())[:500]
