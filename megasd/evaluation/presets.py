"""Decoding presets for evaluation, from the papers that results are compared with. No torch.

The metrics of one model differ by several points between these rows, so say which preset a number
comes from (`megasd eval --list-presets`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """How one paper samples the answers that it scores."""

    temperature: float
    top_p: float
    # -1 = off
    top_k: int
    # tokens; None = what the model has room for
    max_response_tokens: int | None
    # enable_thinking of the chat template; None = the template decides
    thinking: bool | None
    # n of mean@n in the paper
    num_samples: int
    source: str


PRESETS: dict[str, Preset] = {
    "qwen3-think": Preset(
        0.6, 0.95, 20, 38912, True, 16, "Qwen3's own; Kim et al. 2603.24472, whose script drops top-k"
    ),
    "qwen3-no-think": Preset(0.7, 0.8, 20, 38912, False, 16, "Qwen3's own; Kim et al. 2603.24472"),
    "qwen3-think-t1": Preset(
        1.0,
        1.0,
        -1,
        38912,
        True,
        12,
        "OPSD 2601.18734, DASH, SSOPD 2605.17497, EGRSD 2605.13255 (some top-p .95)",
    ),
    "sdpo": Preset(0.6, 0.95, -1, 8192, False, 16, "SDPO 2601.20802: science and tool use, Qwen3 and OLMo-3"),
    "sc-sdpo": Preset(0.6, 0.95, -1, 2048, False, 16, "SC-SDPO 2605.27765: the same, shorter"),
    "livecodebench": Preset(0.6, 0.95, -1, 8192, False, 4, "SDPO 2601.20802 on LiveCodeBench v6"),
    "r1-distill": Preset(
        0.6, 0.95, 20, 38912, None, 16, "DeepSeek-R1-Distill, OLMo-3 Think: Kim et al. 2603.24472"
    ),
    "dapo-aime": Preset(1.0, 0.7, -1, 20480, None, 32, "DAPO 2503.14476 on AIME24"),
    "antisd": Preset(0.7, 0.95, -1, 32768, True, 32, "AntiSD 2605.11609"),
    "greedy": Preset(
        0.0, 1.0, -1, None, None, 1, "the most probable token: the same answer each time, and no spread"
    ),
}
