"""The engine of an analysis: a Rollout that starts a server on a directory, or asks a server that
somebody else runs as it stands.

A training run gives its own weights to the servers of `rollout.engine.urls`. An analysis must not:
it measures what is served. So nothing is sent there, and should the weights change meanwhile, the
analysis stops instead of mixing two models.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

from megasd.config.schema import Config
from megasd.data.chat import Chat
from megasd.engine.client import PARTIAL, EngineClient, EngineError
from megasd.engine.sampler import Sampler
from megasd.types import UserError

# weight version of a server whose stamp is no number, as generate.py reads it
FOREIGN = -1
# requests for top log-probs in flight: an answer holds top_k numbers a token
AT_ONCE = 4


class EvalSampler(Sampler):
    """A Rollout that leaves the weights of servers given by URL alone. Started servers serve
    model_path, as in a run.
    """

    async def _wait_ready(self) -> None:
        for engine in self.engines:
            await engine.wait_ready()
            if engine.owned:
                continue
            stamp = await engine.weight_version()
            if stamp.startswith(PARTIAL):
                raise UserError(
                    f"{engine.url}: a push of weights is under way there (weight version {stamp}); wait until"
                    " it has ended"
                )
            self.version = engine.held = int(stamp) if stamp.isdecimal() else FOREIGN

    async def _version_of(self, engine: EngineClient) -> str:
        stamp = await super()._version_of(engine)
        return stamp if stamp.isdecimal() or stamp == "unknown" else str(FOREIGN)

    async def _give_weights(self, engine: EngineClient) -> None:
        if engine.owned:
            return await super()._give_weights(engine)
        raise EngineError(
            f"{engine.url}: was restarted or given other weights while it was analysed; start the analysis"
            " again"
        )

    @property
    def longest(self) -> int | None:
        """Tokens of prompt and response that every engine takes in one request; None where none has said."""
        limits = [engine.max_tokens for engine in self.engines if engine.max_tokens is not None]
        return min(limits, default=None)

    def top_logprobs(
        self, sequences: list[tuple[list[int], list[int]]], k: int
    ) -> list[list[dict[int, float]]]:
        """For each (prompt, response): at every response token, log-probs (nats, temperature 1) of
        the engine's k most probable ids and of the response's own. k is clipped to the vocabulary:
        SGLang dies of a larger one.
        """
        for prompt, response in sequences:
            self._check_prompt("top log-probs", prompt + response, 0)
        return self._call_and_serve(self._top_logprobs(sequences, min(k, self.vocab_size)))

    async def _top_logprobs(
        self, sequences: list[tuple[list[int], list[int]]], k: int
    ) -> list[list[dict[int, float]]]:
        await self._attend()
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(prompt: list[int], response: list[int]) -> list[dict[int, float]]:
            # the first position asked for is answered with null
            fields = {"logprob_start_len": len(prompt) - 1, "top_logprobs_num": k}
            params = {"max_new_tokens": 0, "temperature": 1.0}
            async with slots:
                outputs = await self._request(
                    lambda: self._body([prompt + response], params, **fields), "top log-probs"
                )
            return self._read_top(outputs[0], response)

        return await asyncio.gather(*(one(prompt, response) for prompt, response in sequences))

    def _read_top(self, output: dict[str, Any], response: list[int]) -> list[dict[int, float]]:
        meta = output["meta_info"]
        if self._why_not(output) is not None:
            raise EngineError(
                "top log-probs: the server's weights changed while it was analysed; start the analysis again"
            )
        sampled, top = meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:]
        # SGLang 0.5.23 labels the vocabulary's last id 0 in the first list; the log-prob beside it
        # is the right one.
        if len(top) != len(response) or any(
            token not in (own, 0) for (_, token, *_), own in zip(sampled, response, strict=True)
        ):
            raise EngineError(
                f"top log-probs: asked for {len(response)} tokens, got those of {len(top)} or of others"
            )
        found = []
        for own, (logp, *_), best in zip(response, sampled, top, strict=True):
            at_token = {int(token): float(value) for value, token, *_ in best} | {own: float(logp)}
            found.append({token: value for token, value in at_token.items() if math.isfinite(value)})
        return found


def open_guest_engine(config: Config, *, chat: Chat, out: Path) -> EvalSampler:
    """The engine of an analysis, a context manager: that of rollout.engine.urls as it stands, else
    one started on model.path.

    The dtype of a started one, where rollout.engine.dtype=auto: bfloat16 on a GPU, float32 on a
    CPU. Its log is out/engine.log.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return EvalSampler(
        config.rollout,
        model_path=config.model.path,
        device=device,
        dtype="bfloat16" if device == "cuda" else "float32",
        run_dir=out,
        seed=config.run.seed,
        stop_token_ids=chat.eos_token_ids,
        vocab_size=chat.vocab_size,
    )
