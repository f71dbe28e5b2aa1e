"""The weights that every engine of a run should hold, and how one engine gets them."""

from __future__ import annotations

import asyncio

from megasd.engine.client import EngineClient
from megasd.engine.errors import EngineError, Unreachable
from megasd.engine.push_requests import PushRequests
from megasd.types import UserError

# The version of an engine whose stamp is no number. It holds the weights of somebody else.
FOREIGN = -1


class TargetWeights:
    """The current weights of a run: their version, and where an engine finds them.

    version: 0 is the start model; only engines with this version are asked for samples.
    directory: safetensors of these weights; None when only the actor has them. An engine then gets
    them by a push, which `push_requests` asks the main thread for.
    """

    def __init__(self, model_path: str, push_requests: PushRequests) -> None:
        self.model_path, self.push_requests = model_path, push_requests
        self.version = 0
        self.directory: str | None = model_path

    @property
    def is_start_model(self) -> bool:
        """Whether a process started on model_path holds these weights without a load or a push."""
        return self.version == 0 and self.directory == self.model_path

    async def greet(self, engine: EngineClient) -> None:
        """Give the start model to an engine that this run did not start.

        It may hold the weights of another run, or half of them. UserError if it cannot load them.
        """
        try:
            await engine.applied.leave_update()
            await engine.applied.load(self.model_path, 0)
        except (EngineError, Unreachable) as error:
            raise UserError(
                f"rollout.engine.urls: {engine.url} cannot load model.path {self.model_path}: {error}"
            ) from error

    async def apply(self, engine: EngineClient) -> None:
        """Bring an engine to `version`, from the directory or by a push from the actor.

        If a push is needed and no thread waits to do it, the engine stays without weights. Raises
        Unreachable if the engine dies meanwhile, and the errors of the push.
        """
        engine.applied.version = None
        if self.directory is not None:
            await engine.applied.leave_update()
            await engine.applied.load(self.directory, self.version)
        elif self.push_requests.is_open:
            request = self.push_requests.submit(
                lambda: engine.alive and engine.applied.version != self.version
            )
            try:
                await asyncio.wrap_future(request)
            except Exception as error:
                # The push failed. If the engine died again, the caller restarts it.
                if isinstance(error.__cause__, Unreachable):
                    raise Unreachable(str(error)) from error
                raise

    async def read_version(self, engine: EngineClient) -> int | None:
        """The version that an engine names; FOREIGN for a stamp that is no number.

        None if the engine does not answer.
        """
        try:
            return stamped_version(await engine.applied.read_stamp())
        except Unreachable:
            return None


def stamped_version(stamp: str) -> int:
    """The version of a stamp (/model_info's weight_version); FOREIGN if it is no number."""
    return int(stamp) if stamp.isdecimal() else FOREIGN
