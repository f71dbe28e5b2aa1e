"""Know and change the weights that an engine holds, by SGLang's control endpoints."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

from megasd.engine.errors import EngineError, Refused

# Seconds an engine may take to read pushed weights. A silent engine must not block all ranks for
# ever.
LOAD_TIMEOUT = 1800.0
# Seconds in which aborted requests must have left the engine's scheduler.
FLUSH_TIMEOUT = 120.0
# SGLang's words if aborted requests have not left the scheduler.
NOT_FLUSHED = "the cache was not flushed"
# Stamp of an engine in the middle of a live update. Samples with it do not count.
PARTIAL = "partial-"


class Server(Protocol):
    """The part of an engine client that AppliedWeights needs."""

    url: str

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Send a request and return the parsed JSON answer.

        Refused on HTTP 4xx; Unreachable on 5xx, a broken connection, a timeout.
        """


class AppliedWeights:
    """The known state of an engine's weights, and the requests that change them.

    All coroutines belong to the engine's event loop.

    version: the weight version that the engine holds whole; None: the engine must not be asked for
    samples. distrusted: the engine was found to hold other weights than were sent. released: tags
    of memory that the engine has given back. paused: a live update has stopped generation.
    updating: SGLang's update session is open.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.version: int | None = None
        self.distrusted = False
        self.released: set[str] = set()
        self.paused = self.updating = False

    def forget_update(self) -> None:
        """Reset pause, update session and released memory, for a new process of the engine."""
        self.paused = self.updating = False
        self.released = set()

    # ---- the stamp -------------------------------------------------------------------------------

    async def read_stamp(self) -> str:
        """The weight version that the engine itself names (/model_info)."""
        return str((await self.server.request("GET", "/model_info", timeout=30))["weight_version"])

    async def stamp(self, version: str) -> None:
        """Set the weight version that answers carry."""
        await self._post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    async def holds(self, version: int) -> bool:
        """Whether the engine holds this version, by the state here and by the engine's stamp.

        The stamp is read because a server may have been restarted behind its URL.
        """
        return self.version == version and await self.read_stamp() == str(version)

    async def _confirm(self, version: int) -> None:
        served = await self.read_stamp()
        if served != str(version):
            raise EngineError(
                f"{self.server.url} serves weight version {served} after a push of version {version}"
            )
        self.version, self.distrusted = version, False

    # ---- weights from a directory ----------------------------------------------------------------

    async def load(self, directory: str, version: int) -> None:
        """Load a safetensors directory and stamp it.

        EngineError if the engine refuses, or names another version afterwards.
        """
        self.version = None
        await self._resume("weights")
        body = {
            "model_path": os.path.abspath(directory),
            "weight_version": str(version),
            "flush_cache": True,
            # A request that still runs was given up by its caller.
            "abort_all_requests": True,
        }
        deadline = time.monotonic() + FLUSH_TIMEOUT
        while True:
            try:
                answer = await self._post("/update_weights_from_disk", body)
                break
            except Refused as error:
                # Aborted requests leave with the scheduler's next step; the weights may come before it.
                if NOT_FLUSHED not in str(error) or time.monotonic() > deadline:
                    raise EngineError(f"the engine did not load {directory}: {error}") from error
                await asyncio.sleep(0.1)
        if not answer.get("success"):
            raise EngineError(f"the engine did not load {directory}: {answer.get('message')}")
        await self._resume("kv_cache")
        await self._confirm(version)

    # ---- a live update: pause, update session, stamp ---------------------------------------------

    async def enter_update(self, version: int, mode: str) -> None:
        """Pause generation (mode: retract | abort) and open SGLang's update session.

        EngineError when the session of another trainer is open.

        From here on the engine holds no version. It is stamped "partial-<version>", so that every
        reader of the stamp knows.
        """
        if not self.paused:
            served = await self.read_stamp()
            if served.startswith(PARTIAL):
                raise EngineError(
                    f"{self.server.url}: another push is under way (weight version {served}); one trainer at"
                    " a time, or restart it"
                )
            # Set before the answer, so that a request that waits meanwhile does not count as hung.
            self.paused = True
            await self._post("/pause_generation", {"mode": mode})
        await self._resume("weights")
        await self._end_session(broken_off=True)
        try:
            await self._post("/begin_weight_update", {})
        except Refused as error:
            await self._post("/continue_generation", {})
            self.paused = False
            raise EngineError(
                f"{self.server.url}: another push is under way ({error}); one trainer at a time"
            ) from error
        self.updating, self.version = True, None
        await self.stamp(f"{PARTIAL}{version}")

    async def update(self, path: str, body: dict[str, Any]) -> None:
        """Send one request of a live update.

        EngineError with the engine's words if the engine refuses, Unreachable if it died.
        """
        answer = await self._post(path, body)
        if not answer.get("success"):
            raise EngineError(f"{self.server.url}{path}: {answer.get('message')}")

    async def leave_update(self, version: int | None = None) -> None:
        """Close the session, stamp `version` (if given) and let generation go on.

        Does nothing if no update is open.
        """
        await self._end_session(broken_off=version is None)
        if version is not None:
            await self.stamp(str(version))
            await self._confirm(version)
        if self.paused:
            await self._resume("kv_cache")
            await self._post("/continue_generation", {})
            self.paused = False

    async def _end_session(self, *, broken_off: bool) -> None:
        """Close the update session if it is open.

        After an update that broke off, a refusal is no error: the server may have closed the
        session while its answer was lost.
        """
        if not self.updating:
            return
        try:
            await self._post("/end_weight_update", {})
        except Refused:
            if not broken_off:
                raise
        self.updating = False

    # ---- memory ----------------------------------------------------------------------------------

    async def release(self) -> None:
        """Give back the memory of weights and KV cache; no requests may run.

        On a CPU the server says yes and frees nothing.
        """
        self.version = None
        tags = [tag for tag in ("kv_cache", "weights") if tag not in self.released]
        if tags:
            await self._post("/release_memory_occupation", {"tags": tags})
            self.released.update(tags)

    async def _resume(self, tag: str) -> None:
        # A second resume of the same memory would kill the engine.
        if tag in self.released:
            await self._post("/resume_memory_occupation", {"tags": [tag]})
            self.released.remove(tag)

    # ---- proof -----------------------------------------------------------------------------------

    async def checksums(self, skip: Sequence[str] = ()) -> list[dict[str, str]]:
        """For each tensor-parallel rank: engine parameter -> checksum of its present values.

        Synchronises the engine's devices. Names that contain an entry of `skip` are left out.
        """
        answer = await self._post("/weights_checker", {"action": "checksum", "skip_tensor_list": list(skip)})
        ranks = sorted(answer["ranks"], key=lambda rank: rank["parallelism_info"][0]["tp_rank"])
        return [rank["checksums"] for rank in ranks]

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        return await self.server.request("POST", path, body, timeout=LOAD_TIMEOUT)
