"""Check and read the answers of SGLang's /generate: versions, tokens, log-probs (nats)."""

from __future__ import annotations

import math
from typing import Any

from megasd.engine.errors import EngineError
from megasd.engine.target_weights import stamped_version


def versions_of(output: dict[str, Any]) -> list[int]:
    """The weight versions that an output's tokens were sampled with.

    FOREIGN stands for a stamp that is no number. During a push an engine has a stamp under which
    it samples nothing, so spans without a token are ignored.
    """
    meta = output["meta_info"]
    spans = [span for span in meta.get("weight_versions") or [] if span["end"] > span["start"]]
    stamps = [span["version"] for span in spans] or [meta["weight_version"]]
    return [stamped_version(str(stamp)) for stamp in stamps]


def response_of(name: str, output: dict[str, Any]) -> tuple[list[int], list[float]]:
    """(token ids, log-probs) of the response; EngineError unless each token has a log-prob."""
    ids = output["output_ids"]
    logprobs = output["meta_info"]["output_token_logprobs"]
    if [token for _, token, *_ in logprobs] != ids:
        raise EngineError(
            f"{name}: {len(ids)} response tokens but log-probs of {len(logprobs)}, or of others"
        )
    logps = [logp for logp, *_ in logprobs]
    if not all(math.isfinite(logp) for logp in logps):
        raise EngineError(f"{name}: a response log-prob is not finite")
    return ids, logps


def scores_of(output: dict[str, Any], ids: list[int]) -> list[float]:
    """Log-probs of ids[1:], each given its prefix.

    EngineError if the answer is about other tokens.
    """
    logprobs = output["meta_info"]["input_token_logprobs"]
    if len(logprobs) != len(ids) or not _names_tokens(logprobs, ids):
        raise EngineError(f"score: sent {len(ids)} tokens, got log-probs of {len(logprobs)} or of others")
    return [logp for logp, *_ in logprobs[1:]]


def top_of(output: dict[str, Any], response: list[int]) -> list[dict[int, float]]:
    """At every response token: log-probs of the most probable ids and of the response's own.

    Infinite log-probs are left out. EngineError when the answer is about other tokens.
    """
    meta = output["meta_info"]
    # SGLang answers the first requested position with null.
    sampled, top = meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:]
    if len(top) != len(response) or not _names_tokens(sampled, response):
        raise EngineError(
            f"top log-probs: asked for {len(response)} tokens, got those of {len(top)} or of others"
        )
    found = []
    for own, (logp, *_), best in zip(response, sampled, top, strict=True):
        at_token = {int(token): float(value) for value, token, *_ in best} | {own: float(logp)}
        found.append({token: value for token, value in at_token.items() if math.isfinite(value)})
    return found


def _names_tokens(logprobs: list[list[Any]], ids: list[int]) -> bool:
    """Whether log-probs are those of `ids`.

    SGLang 0.5.23 labels the last id of the vocabulary 0 here; the log-prob next to it is right.
    """
    return all(token in (own, 0) for (_, token, *_), own in zip(logprobs, ids, strict=True))
