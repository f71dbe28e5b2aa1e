"""Send requests to the engines of a pool, again if need be, until an engine answers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

from megasd.engine.errors import EngineError, Unreachable
from megasd.engine.pool import EnginePool
from megasd.types import UserError

Params = dict[str, Any]
# (the prompts' token ids, the parameters of the call) -> the sampling_params of the batch: a single
# dict for all prompts, or a dict for each prompt.
ParamsOf = Callable[[list[list[int]], Params], Params | list[Params]]


def same_params(batch_ids: list[list[int]], params: Params) -> Params:
    """Every prompt of a batch is sampled with the same parameters."""
    return params


class Requester:
    """Sends /generate requests to the engines of a pool; its coroutines belong to the pool's loop.

    params_of: gives prompts sampling parameters of their own. num_retries: prompts sent again since
    the start of the run, because an engine was lost.
    """

    def __init__(self, pool: EnginePool, *, vocab_size: int, params_of: ParamsOf = same_params) -> None:
        self.pool, self.vocab_size, self.params_of = pool, vocab_size, params_of
        self.num_retries = 0
        self._serial = itertools.count()
        # Distinguishes the ids of this run's requests from another run's ids on a shared server.
        self._run = os.urandom(4).hex()

    @property
    def max_tokens(self) -> int | None:
        """Prompt + response tokens that every engine takes in a request; None if none has said."""
        limits = [engine.max_tokens for engine in self.pool.engines if engine.max_tokens is not None]
        return min(limits, default=None)

    async def send(
        self, name: str, batch_ids: list[list[int]], params: Params, **fields: Any
    ) -> list[dict[str, Any]]:
        """Return the outputs for a batch of prompts, in order.

        `fields` go into the request's body. name: a name of the batch, for error messages. Refused
        (HTTP 4xx) is passed on; EngineError if config.max_retries are used up.
        """
        max_retries = self.pool.config.max_retries
        attempt = 0
        while True:
            engine = await self.pool.health.available()
            incarnation, body = engine.incarnation, self._body(batch_ids, params, fields)
            try:
                outputs = await engine.generate(body)
            except Unreachable as error:
                self.num_retries += len(batch_ids)
                if attempt == max_retries:
                    raise EngineError(
                        f"{name}: given up after {attempt + 1} attempts (rollout.max_retries): {error}"
                    ) from error
                for one in [engine] if self.pool.router is None else self.pool.engines:
                    await self.pool.health.recover_any(one, incarnation if one is engine else one.incarnation)
                await self.pool.back_off(attempt)
                attempt += 1
                continue
            found = [output["meta_info"]["id"] for output in outputs]
            if found != body["rid"]:
                raise EngineError(f"{name}: asked for requests {body['rid']}, {engine.url} answered {found}")
            return outputs

    def _body(self, batch_ids: list[list[int]], params: Params, fields: dict[str, Any]) -> dict[str, Any]:
        """The request body of one attempt, with new request ids."""
        return {
            "rid": [f"{self._run}-{next(self._serial)}" for _ in batch_ids],
            "input_ids": batch_ids,
            "sampling_params": self.params_of(batch_ids, params),
            "return_logprob": True,
            **fields,
        }

    def check_prompt(self, name: str, ids: list[int], max_response_tokens: int) -> None:
        """Raise UserError for a prompt that no engine can take.

        SGLang would crash at a token id outside the vocabulary, and silently shorten a response for
        which there is no room.
        """
        if not ids:
            raise UserError(f"{name}: the prompt is empty")
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"{name}: token id {token} is outside the vocabulary of {self.vocab_size}; is the"
                    " tokenizer this model's?"
                )
        if self.max_tokens is not None and len(ids) + max_response_tokens > self.max_tokens:
            raise UserError(
                f"{name}: {len(ids)} prompt + {max_response_tokens} response tokens exceed the engine's"
                f" {self.max_tokens} (context length and rollout.engine.max_total_tokens, less 2); lower"
                " max_response_tokens or drop the prompt"
            )
