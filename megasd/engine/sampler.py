"""Sample P prompts x G responses from SGLang engines, each sample exactly once.

A sample comes from the weights that the engines hold when the call begins, or from newer weights.

    with make_sampler(config.rollout, model_path=..., device="cpu", dtype="float32", ...) as sampler:
        groups = sampler.generate(prompts, prompt_ids, chat.decode, num_samples=8, ...)
        sampler.weights.push("runs/q/weights/1", version=1)

A sample's log-probs are log softmax(logits / temperature) of the sampled tokens, in nats, before
top-k and top-p (measured against transformers; with temperature 0 they are those of temperature 1).
SGLang ignores a per-request sampling_seed on CPU, so samples are reproducible only as far as the
engine's --random-seed and the order of arrival are.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasd.config.schema import RolloutConfig
from megasd.engine.answers import response_of, scores_of, top_of, versions_of
from megasd.engine.errors import EngineError, Refused
from megasd.engine.event_loop import cancel_on_error
from megasd.engine.pool import EnginePool
from megasd.engine.pool_weights import PoolWeights
from megasd.engine.push_requests import PushRequests
from megasd.engine.requester import Params, ParamsOf, Requester, same_params
from megasd.engine.target_weights import FOREIGN, TargetWeights
from megasd.types import Group, Prompt, Sample

# Response tokens of one HTTP request. Many short answers share a request (measured on 2 cores, 256
# samples x 6 tokens: 0.56 s in requests of 128, 1.1 s one by one). A long answer has a request of
# its own, so that a lost request loses little.
BATCH_TOKENS = 4096
MAX_BATCH = 128
# So many requests for top log-probs are in flight at most: an answer holds top_k numbers a token.
TOP_LOGPROBS_IN_FLIGHT = 4


@dataclass(frozen=True)
class SampleRequest:
    """A requested sample: the index-th of a prompt, at `position` of the flat [P*G] result."""

    position: int
    prompt: Prompt
    prompt_ids: list[int]
    index: int


@dataclass(frozen=True)
class _Call:
    """The state that all requests of one `generate` call use."""

    params: Params
    # The target version when the call began.
    oldest: int
    # A slot for each request that may be in flight.
    slots: asyncio.Semaphore


class Sampler:
    """Samples and log-probs from the engines of `pool`, which hold the weights of `weights`.

    Used by one thread at a time. It is one class of about 260 lines, since all its requests share the
    counters and the retries. stats: counters of the last `generate`.
    """

    def __init__(
        self,
        pool: EnginePool,
        weights: PoolWeights,
        *,
        stop_token_ids: list[int],
        vocab_size: int,
        params_of: ParamsOf = same_params,
    ) -> None:
        self.pool, self.weights, self.config = pool, weights, pool.config
        self.requester = Requester(pool, vocab_size=vocab_size, params_of=params_of)
        self.stop_token_ids = list(stop_token_ids)
        self.stats: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> Sampler:
        self.pool.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.close()

    @property
    def max_tokens(self) -> int | None:
        """Prompt + response tokens that every engine takes in a request; None if none has said."""
        return self.requester.max_tokens

    # ---- generate --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[Prompt],
        prompt_ids: list[list[int]],
        decode: Callable[[list[int]], str],
        *,
        step: int,
        num_samples: int,
        temperature: float,
        top_p: float,
        max_response_tokens: int,
        top_k: int | None = None,
    ) -> list[Group]:
        """Return P groups of G = num_samples samples in the prompts' order, each exactly once.

        All samples come from the version that the engines hold when the call begins, or from a
        version that is pushed meanwhile. top_k: -1 = off; None = config.top_k.

        If an engine lost or aborted a sample, or sampled it with other weights, it is requested
        again (config.max_retries times). With config.allow_stale, samples of other weights are kept
        and carry their version. `stats` then holds: samples, response_tokens, seconds, restarts,
        and how many samples were requested again or kept: retries (lost), aborted, stale.

        Raises UserError for a prompt that no engine can take. Raises EngineError naming the prompt
        for a refusal (HTTP 4xx, never sent again) and if retries or restarts are used up.
        """
        if len(prompts) != len(prompt_ids):
            raise ValueError(f"{len(prompts)} prompts but {len(prompt_ids)} lists of prompt ids")
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            self.requester.check_prompt(f"prompt {prompt.id}", ids, max_response_tokens)
        asks = [
            SampleRequest(p * num_samples + g, prompt, ids, g)
            for p, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
            for g in range(num_samples)
        ]
        params = self._generate_params(temperature, top_p, top_k, max_response_tokens)
        self._counts = Counter(retries=0, restarts=0, aborted=0, stale=0)
        began = time.monotonic()
        retries, restarts = self.requester.num_retries, self.pool.health.num_restarts
        try:
            outputs = self.pool.run(self._generate(asks, params, self.weights.version))
        finally:
            self._counts["retries"] = self.requester.num_retries - retries
            self._counts["restarts"] = self.pool.health.num_restarts - restarts
            self.stats = dict(self._counts) | {"seconds": time.monotonic() - began}
        samples = [self._to_sample(ask, output, decode) for ask, output in zip(asks, outputs, strict=True)]
        self.stats |= {
            "samples": len(samples),
            "response_tokens": sum(len(sample.response_ids) for sample in samples),
        }
        return [
            Group(prompt, samples[p * num_samples : (p + 1) * num_samples])
            for p, prompt in enumerate(prompts)
        ]

    def _generate_params(
        self, temperature: float, top_p: float, top_k: int | None, max_response_tokens: int
    ) -> Params:
        params = {
            "max_new_tokens": max_response_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": self.config.top_k if top_k is None else top_k,
            "stop_token_ids": self.stop_token_ids,
        }
        return params | {"stop": self.config.stop} if self.config.stop else params

    async def _generate(self, asks: list[SampleRequest], params: Params, oldest: int) -> list[dict[str, Any]]:
        """The raw output of every requested sample, in order."""
        await self.pool.health.attend()
        size = self._batch_size(len(asks), params["max_new_tokens"])
        slots = asyncio.Semaphore(max(1, self.config.max_concurrency // size))
        call = _Call(params, oldest, slots)
        found = await cancel_on_error(
            self._complete(asks[i : i + size], call) for i in range(0, len(asks), size)
        )
        outputs = {position: output for part in found for position, output in part.items()}
        return [outputs[ask.position] for ask in asks]

    def _batch_size(self, num_samples: int, max_response_tokens: int) -> int:
        """The number of samples of one request, small enough that all engines get work.

        A router takes one sample at a time.
        """
        share = 1
        if self.pool.router is None:
            share = math.ceil(min(num_samples, self.config.max_concurrency) / len(self.pool.engines))
        return max(1, min(MAX_BATCH, BATCH_TOKENS // max_response_tokens, share))

    async def _complete(self, batch: list[SampleRequest], call: _Call) -> dict[int, dict[str, Any]]:
        """Send requests until each sample of the batch has an accepted output.

        Returns position -> output.
        """
        accepted: dict[int, dict[str, Any]] = {}
        attempt = 0
        while True:
            more = f" and {len(batch) - 1} more samples" if len(batch) > 1 else ""
            name, ids = f"prompt {batch[0].prompt.id}{more}", [ask.prompt_ids for ask in batch]
            try:
                async with call.slots:
                    outputs = await self.requester.send(name, ids, call.params)
            except Refused as error:
                if len(batch) == 1:
                    raise EngineError(f"{name}: {error}") from error
                # Send the samples one by one, to know which prompt is refused.
                for part in await cancel_on_error(self._complete([ask], call) for ask in batch):
                    accepted |= part
                return accepted
            rejected: list[tuple[SampleRequest, str]] = []
            for ask, output in zip(batch, outputs, strict=True):
                reason = self._why_rejected(output, call.oldest)
                if reason is None:
                    accepted[ask.position] = output
                else:
                    self._counts[reason] += 1
                    rejected.append((ask, reason))
            if not rejected:
                return accepted
            batch = [ask for ask, _ in rejected]
            if attempt == self.config.max_retries:
                raise EngineError(
                    f"prompt {batch[0].prompt.id}: {rejected[0][1]} in each of {attempt + 1} attempts"
                    " (rollout.max_retries)"
                )
            await self.pool.health.correct_versions()
            await self.pool.back_off(attempt)
            attempt += 1

    def _why_rejected(self, output: dict[str, Any], oldest: int) -> str | None:
        """Why a sample must be requested again ("aborted", "stale"); None if it is accepted.

        The reason is the name of a counter in `stats`. A sample is stale if a token comes from a
        version below `oldest` or above the current version.
        """
        if output["meta_info"]["finish_reason"]["type"] == "abort":
            return "aborted"
        versions = versions_of(output)
        if any(not oldest <= version <= self.weights.version for version in versions):
            # A foreign stamp is not an older version.
            if not self.config.allow_stale or FOREIGN in versions:
                return "stale"
            self._counts["stale"] += 1
        return None

    def _to_sample(
        self, ask: SampleRequest, output: dict[str, Any], decode: Callable[[list[int]], str]
    ) -> Sample:
        ids, logps = response_of(f"prompt {ask.prompt.id}", output)
        text = decode(ids)
        # The response ids keep a stop string. The text does not.
        for stop in self.config.stop:
            text = text.split(stop, 1)[0]
        return Sample(
            prompt_id=ask.prompt.id,
            index=ask.index,
            prompt_ids=ask.prompt_ids,
            response_ids=ids,
            response_logps=logps,
            text=text,
            finish_reason=output["meta_info"]["finish_reason"]["type"],
            version=min(versions_of(output)),
        )

    # ---- probes ----------------------------------------------------------------------------------

    def score(self, ids: list[int]) -> list[float]:
        """Log-probs (nats, temperature 1) of ids[1:], each given its prefix: len(ids) - 1 numbers."""
        self.requester.check_prompt("score", ids, 0)
        params = {"max_new_tokens": 0, "temperature": 1.0}
        return scores_of(self._probe("score", ids, params, logprob_start_len=0), ids)

    def greedy(self, ids: list[int], n: int) -> tuple[list[int], list[float]]:
        """The most probable continuation of `ids`, and its log-probs (nats).

        It has at most `n` tokens, and ends with a stop token.
        """
        self.requester.check_prompt("greedy", ids, n)
        params = {"max_new_tokens": n, "temperature": 0.0, "stop_token_ids": self.stop_token_ids}
        return response_of("greedy", self._probe("greedy", ids, params))

    def _probe(self, name: str, ids: list[int], params: Params, **fields: Any) -> dict[str, Any]:
        """The raw output for one prompt; EngineError if it is not of the current weights."""

        async def probe() -> dict[str, Any]:
            await self.pool.health.attend()
            return (await self.requester.send(name, [ids], params, **fields))[0]

        output = self.pool.run(probe())
        if any(version != self.weights.version for version in versions_of(output)):
            raise EngineError(
                f"{name}: the engine answered with weight versions {versions_of(output)}, not"
                f" {self.weights.version}"
            )
        return output

    def top_logprobs(
        self, sequences: list[tuple[list[int], list[int]]], k: int
    ) -> list[list[dict[int, float]]]:
        """For each (prompt, response), at every response token: id -> log-prob.

        Log-probs are in nats at temperature 1. The ids are the engine's k most probable ids and the
        response's own id. k is clipped to the vocabulary, since SGLang dies of a larger k.
        """
        for prompt, response in sequences:
            self.requester.check_prompt("top log-probs", prompt + response, 0)
        return self.pool.run(self._top_logprobs(sequences, min(k, self.requester.vocab_size)))

    async def _top_logprobs(
        self, sequences: list[tuple[list[int], list[int]]], k: int
    ) -> list[list[dict[int, float]]]:
        await self.pool.health.attend()
        slots = asyncio.Semaphore(TOP_LOGPROBS_IN_FLIGHT)
        params = {"max_new_tokens": 0, "temperature": 1.0}

        async def one(prompt: list[int], response: list[int]) -> list[dict[int, float]]:
            fields = {"logprob_start_len": len(prompt) - 1, "top_logprobs_num": k}
            async with slots:
                outputs = await self.requester.send("top log-probs", [prompt + response], params, **fields)
            if self._why_rejected(outputs[0], self.weights.version) is not None:
                raise EngineError(
                    "top log-probs: the server's weights changed while it was analysed; start the analysis"
                    " again"
                )
            return top_of(outputs[0], response)

        return await asyncio.gather(*(one(prompt, response) for prompt, response in sequences))


def make_sampler(
    config: RolloutConfig,
    *,
    model_path: str,
    device: str,
    dtype: str,
    run_dir: Path,
    seed: int,
    stop_token_ids: list[int],
    vocab_size: int,
    make_target: Callable[[str, PushRequests], TargetWeights] = TargetWeights,
    params_of: ParamsOf = same_params,
) -> Sampler:
    """Make a sampler with its pool of engines; `with` or `sampler.pool.launch` starts the engines.

    model_path: Hugging Face directory of the start model. device ("cpu", "cuda"), dtype and seed
    are those of the engines; their logs go to run_dir.
    """
    target = make_target(str(model_path), PushRequests())
    pool = EnginePool(config, target, device=device, dtype=dtype, run_dir=Path(run_dir), seed=seed)
    return Sampler(
        pool,
        PoolWeights(pool),
        stop_token_ids=stop_token_ids,
        vocab_size=vocab_size,
        params_of=params_of,
    )
