"""The engine of an analysis or an evaluation.

It is a server that is started on a directory, or a server that somebody else runs, as it stands.

A training run gives its own weights to the servers of `rollout.engine.urls`. An analysis must not:
it measures what is served. So nothing is sent to such a server. If its weights change meanwhile,
the analysis stops, so that it does not mix two models.
"""

from __future__ import annotations

from pathlib import Path

from megasd.config.schema import Config
from megasd.data.chat import Chat
from megasd.engine.applied_weights import PARTIAL
from megasd.engine.client import EngineClient
from megasd.engine.errors import EngineError
from megasd.engine.sampler import Sampler, make_sampler
from megasd.engine.target_weights import TargetWeights, stamped_version
from megasd.types import UserError


class ServedWeights(TargetWeights):
    """The weights that servers given by URL hold already; nothing is sent to them.

    Engines that this process starts serve model_path, as in a training run.
    """

    async def greet(self, engine: EngineClient) -> None:
        """Take over the version that a server names. UserError when a push is under way there."""
        stamp = await engine.applied.read_stamp()
        if stamp.startswith(PARTIAL):
            raise UserError(
                f"{engine.url}: a push of weights is under way there (weight version {stamp}); wait until"
                " it has ended"
            )
        self.version = engine.applied.version = stamped_version(stamp)

    async def apply(self, engine: EngineClient) -> None:
        """EngineError for a server given by URL, which holds other weights than at the start."""
        if engine.owned:
            return await super().apply(engine)
        raise EngineError(
            f"{engine.url}: was restarted or given other weights while it was analysed; start the analysis"
            " again"
        )


def open_guest_engine(config: Config, *, chat: Chat, out: Path) -> Sampler:
    """The engine of an analysis, as a context manager.

    It is the server of rollout.engine.urls as it stands, or one that is started on model.path.
    With rollout.engine.dtype=auto a started engine computes in bfloat16 on a GPU and in float32 on
    a CPU. Its log is out/engine.log.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return make_sampler(
        config.rollout,
        model_path=config.model.path,
        device=device,
        dtype="bfloat16" if device == "cuda" else "float32",
        run_dir=out,
        seed=config.run.seed,
        stop_token_ids=chat.eos_token_ids,
        vocab_size=chat.vocab_size,
        make_target=ServedWeights,
    )
