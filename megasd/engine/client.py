"""One SGLang server over HTTP: know whether it is alive, ask it, give it weights. HTTP only; sglang
is never imported here.

    engine = Engine(config, model_path="runs/q/model", device="cpu", dtype="float32", log_path=Path("runs/q/engine.log"), seed=1)
    engine.launch()                                   # a process on loopback; output in runs/q/engine.log
    await engine.wait_ready()                         # until it has generated a token
    await engine.load_weights("runs/q/weights/3", 3)  # and /model_info says 3
    # the whole process tree; also when the trainer is killed
    engine.kill()

An engine is dead when its process has exited, when it refuses connections repeatedly, or when
requests wait in it and none has finished nor grown by a token for `progress_timeout` seconds:
SGLang's own /health goes on answering for a while in each of these cases.
"""  # noqa: E501

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from megasd.config.schema import EngineConfig
from megasd.engine.auth import VARIABLE, engine_key
from megasd.engine.process import EngineProcess
from megasd.types import UserError

# seconds; SGLang closes an idle connection after 5, and a request that meets the closing is lost
KEEP_ALIVE = 2.0
# seconds an engine may take to read pushed weights; a silent one must not hold all ranks for ever
LOAD_TIMEOUT = 1800.0
# connections refused in a row that make an engine dead
PROBES = 4
# stamp of an engine in the middle of a live update: nothing that it samples counts
PARTIAL = "partial-"


class EngineError(RuntimeError):
    """An engine that did not do what it was asked, and would not if asked again."""


class StartError(EngineError, UserError):
    """An engine that does not start; its log says why, most often about rollout.engine's settings
    or the machine's memory.
    """


class Refused(EngineError):
    """HTTP 4xx: asking again would be refused again."""


class Unreachable(Exception):
    """Connection refused, reset or closed, HTTP 5xx, or no progress: worth asking again, perhaps
    elsewhere.
    """


class EngineClient(EngineProcess):
    """A server and what is known of it. `restartable`: it can come back as a new process, by
    `launch` and `wait_ready`.

    Every coroutine and `launch` belong to one event loop, in a thread that lives as long as the
    engine: the server dies with that thread.
    """

    def __init__(self, config: EngineConfig, **kwargs: Any) -> None:
        """`kwargs`: those of Server."""
        super().__init__(config, **kwargs)
        self.session: aiohttp.ClientSession | None = None
        # answers, as far as is known
        self.alive = False
        # weight version that it holds whole; None = it must not be asked for samples
        self.applied_version: int | None = None
        # was found to hold something else than was sent
        self.distrusted = False
        # tags of memory that it has given back
        self.released: set[str] = set()
        # in a live update: generation stopped; SGLang's update session open
        self.paused = self.updating = False
        # why it is not alive, once it was found dead
        self.reason = "not started"
        self.restartable, self.restarts = self.owned, 0
        # dead, and its restarts are used up: the others go on without it
        self.lost = False
        self.tp_size = config.tensor_parallel_size
        # the name that it was started under
        self.answers_as: str | None = None
        # prompt + response tokens that a request may have
        self.max_tokens: int | None = None
        # generate requests
        self.in_flight = 0
        # tokens that they ask for, prompt and response
        self.busy = 0
        self.hung = False
        # the scheduler's load when it was last asked
        self._load: list | None = None
        self._last_progress = 0.0
        # one caller revives
        self.lock = asyncio.Lock()

    @property
    def up(self) -> bool:
        """May be asked for samples."""
        return self.alive and self.applied_version is not None

    def launch(self) -> None:
        """As Server's; the new process knows nothing of the old one's weights or pauses."""
        super().launch()
        self.hung = self.paused = self.updating = False
        self.released = set()

    def kill(self) -> None:
        """As Server's."""
        self.alive = False
        super().kill()

    # ---- HTTP ------------------------------------------------------------------------------------

    def _session(self) -> aiohttp.ClientSession:
        if self.session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
            key = engine_key()
            headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
            self.session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)
        return self.session

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """The parsed JSON answer. Refused on 4xx; Unreachable on 5xx, on a broken connection and
        after `timeout` seconds.
        """
        try:
            async with self._session().request(
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
        """POST /generate for a batch of `input_ids`; one output each, in order. Unreachable when
        the engine makes no progress.
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
                    # a push is under way; or long answers: none is finished, and all grow
                    if self.paused or await self._generating():
                        self._last_progress = time.monotonic()
                        continue
                    self.hung = True
                    raise Unreachable(f"{self.url}: no token in {self.config.progress_timeout:g} s")
        finally:
            self.in_flight, self.busy = self.in_flight - 1, self.busy - size
            task.cancel()

    async def _generating(self) -> bool:
        """Whether the scheduler's load (requests and tokens in use) has moved since this was last
        asked; the first answer counts as moved.
        """
        try:
            answer = await self.request("GET", "/v1/loads", timeout=10)
        except (Unreachable, Refused):
            return False
        names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        before, self._load = self._load, [[load.get(name) for name in names] for load in answer["loads"]]
        return self._load != before

    async def close(self) -> None:
        """Close the connections and kill an owned engine."""
        if self.session is not None:
            await self.session.close()
            self.session = None
        self.kill()

    # ---- life ------------------------------------------------------------------------------------

    async def wait_ready(self) -> None:
        """Until the engine has generated a token (at most start_timeout). StartError with the log's
        last error; UserError for a URL.
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
            # whoever answers there is another
            if self.port_was_taken():
                self.kill()
                self.launch()
            try:
                await self.request("POST", "/generate", body, timeout=max(deadline - time.monotonic(), 1.0))
                break
            except Unreachable:
                await asyncio.sleep(0.2)
        await self._read_limits()
        self.alive, self.applied_version = True, 0

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
        self.hung, self.alive, self.released = False, True, set()
        # A trainer that died in the middle of a push has left it so; a server that was restarted
        # since knows nothing of it.
        self.paused = self.updating = str(info["weight_version"]).startswith(PARTIAL)

    async def _read_limits(self) -> None:
        info = await self.request("GET", "/server_info", timeout=30)
        # SGLang silently shortens max_new_tokens so that prompt + response <= min(context, KV pool)
        # - 2; max_req_input_len is that - 4.
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
        """Why the engine counts as dead, None if it lives. Takes some seconds to be sure of a
        refused connection.
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

    async def weight_version(self) -> str:
        """What /model_info says."""
        return str((await self.request("GET", "/model_info", timeout=30))["weight_version"])

    async def load_weights(self, directory: str, version: int) -> None:
        """Load a safetensors directory and stamp it. EngineError if the engine refuses or then
        names another version.
        """
        self.applied_version = None
        await self._resume("weights")
        body = {
            "model_path": os.path.abspath(directory),
            "weight_version": str(version),
            "flush_cache": True,
            # whatever still runs belongs to a request that was given up
            "abort_all_requests": True,
        }
        try:
            answer = await self.request("POST", "/update_weights_from_disk", body, timeout=LOAD_TIMEOUT)
        except Refused as error:
            raise EngineError(f"the engine did not load {directory}: {error}") from error
        if not answer.get("success"):
            raise EngineError(f"the engine did not load {directory}: {answer.get('message')}")
        await self._resume("kv_cache")
        await self._confirm(version)

    async def _confirm(self, version: int) -> None:
        served = await self.weight_version()
        if served != str(version):
            raise EngineError(f"{self.url} serves weight version {served} after a push of version {version}")
        self.applied_version, self.distrusted = version, False

    # ---- a live update: pause, update session, stamp ---------------------------------------------

    async def enter_update(self, version: int, mode: str) -> None:
        """Pause generation (mode: retract | abort) and open SGLang's update session. EngineError
        when somebody else's is open.

        From here on the engine holds no version; it is stamped so too, for whoever else asks it.
        """
        if not self.paused:
            served = await self.weight_version()
            if served.startswith(PARTIAL):
                raise EngineError(
                    f"{self.url}: another push is under way (weight version {served}); one trainer at a time,"
                    " or restart it"
                )
            # before the answer: whoever is waiting meanwhile is not hung
            self.paused = True
            await self.request("POST", "/pause_generation", {"mode": mode}, timeout=LOAD_TIMEOUT)
        await self._resume("weights")
        await self._end(broken_off=True)
        try:
            await self.request("POST", "/begin_weight_update", {}, timeout=LOAD_TIMEOUT)
        except Refused as error:
            await self.request("POST", "/continue_generation", {}, timeout=LOAD_TIMEOUT)
            self.paused = False
            raise EngineError(
                f"{self.url}: another push is under way ({error}); one trainer at a time"
            ) from error
        self.updating, self.applied_version = True, None
        await self.stamp(f"{PARTIAL}{version}")

    async def update_weights(self, path: str, body: dict[str, Any]) -> None:
        """One request of a live update. EngineError with the engine's words if it refuses,
        Unreachable if it died.
        """
        answer = await self.request("POST", path, body, timeout=LOAD_TIMEOUT)
        if not answer.get("success"):
            raise EngineError(f"{self.url}{path}: {answer.get('message')}")

    async def leave_update(self, version: int | None = None) -> None:
        """Close the session, stamp `version` (if given) and let generation go on. Nothing to do
        where no update is open.
        """
        await self._end(broken_off=version is None)
        if version is not None:
            await self.stamp(str(version))
            await self._confirm(version)
        if self.paused:
            await self._resume("kv_cache")
            await self.request("POST", "/continue_generation", {}, timeout=LOAD_TIMEOUT)
            self.paused = False

    async def _end(self, *, broken_off: bool) -> None:
        """Close the update session if one is open. After an update that broke off the server may
        have closed it: its answer was lost.
        """
        if not self.updating:
            return
        try:
            await self.request("POST", "/end_weight_update", {}, timeout=LOAD_TIMEOUT)
        except Refused:
            if not broken_off:
                raise
        self.updating = False

    async def holds(self, version: int) -> bool:
        """Whether it holds this version, by what is known here and by its own word: a server may
        have been restarted behind its URL.
        """
        return self.applied_version == version and await self.weight_version() == str(version)

    async def release(self) -> None:
        """Give back the memory of weights and KV cache; no requests may run. On a CPU the server
        says yes and frees nothing.
        """
        self.applied_version = None
        tags = [tag for tag in ("kv_cache", "weights") if tag not in self.released]
        if tags:
            await self.request("POST", "/release_memory_occupation", {"tags": tags}, timeout=LOAD_TIMEOUT)
            self.released.update(tags)

    async def _resume(self, tag: str) -> None:
        # a second resume would kill the engine
        if tag in self.released:
            await self.request("POST", "/resume_memory_occupation", {"tags": [tag]}, timeout=LOAD_TIMEOUT)
            self.released.remove(tag)

    async def stamp(self, version: str) -> None:
        """Set the weight version that answers carry."""
        body = {"new_version": version, "abort_all_requests": False}
        await self.request("POST", "/update_weight_version", body, timeout=LOAD_TIMEOUT)

    async def checksums(self, skip: Sequence[str] = ()) -> list[dict[str, str]]:
        """Per tensor-parallel rank: engine parameter -> checksum of what it holds now. Synchronises
        the engine's devices.

        `skip`: names that contain one of these are left out.
        """
        body = {"action": "checksum", "skip_tensor_list": list(skip)}
        answer = await self.request("POST", "/weights_checker", body, timeout=LOAD_TIMEOUT)
        ranks = sorted(answer["ranks"], key=lambda rank: rank["parallelism_info"][0]["tp_rank"])
        return [rank["checksums"] for rank in ranks]


def _message(text: str) -> str:
    """The server's own words, on one line."""
    try:
        parsed = json.loads(text)
        error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        pass
    return " ".join(text.split())[:500]
