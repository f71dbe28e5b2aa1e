"""Ten length distributions of a step's samples, by name: seeded generators, and the recorded
lengths of a step of the quickstart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

# (prompt, response, teacher's prompt; 0 = untaught) of each sample, tokens
Lengths = list[tuple[int, int, int]]
# of a response
LIMIT = 16384


def _samples(draw: Callable[[random.Random], float], *, questions: int = 64, group: int = 8) -> Lengths:
    """Samples of a question share its prompt; a teacher reads a sibling's response too, and a fifth
    of the samples has none.
    """
    rng = random.Random(20260527)
    found: Lengths = []
    for _ in range(questions):
        prompt = rng.randint(60, 400)
        responses = [max(1, min(LIMIT, round(draw(rng)))) for _ in range(group)]
        for response in responses:
            read = prompt + 40 + min(4096, rng.choice(responses))
            found.append((prompt, response, 0 if rng.random() < 0.2 else read))
    return found


def _quickstart() -> Lengths:
    return [tuple(one) for one in json.loads((Path(__file__).parent / "lengths_quickstart.json").read_text())]


DISTRIBUTIONS: dict[str, Callable[[], Lengths]] = {
    "uniform": lambda: _samples(lambda rng: rng.uniform(16, 8192)),
    "lognormal": lambda: _samples(lambda rng: rng.lognormvariate(6.5, 0.6)),
    "lognormal, long tail": lambda: _samples(lambda rng: rng.lognormvariate(7.0, 1.2), questions=128),
    "bimodal": lambda: _samples(
        lambda rng: rng.gauss(600, 150) if rng.random() < 0.8 else rng.gauss(9000, 1500)
    ),
    "zipf": lambda: _samples(lambda rng: 50 * rng.paretovariate(1.1), questions=128),
    "truncated": lambda: _samples(
        lambda rng: LIMIT if rng.random() < 0.15 else rng.lognormvariate(7.5, 0.7), questions=128
    ),
    "equal": lambda: _samples(lambda rng: 2048),
    "short": lambda: _samples(lambda rng: rng.randint(1, 64), questions=32),
    "exponential": lambda: _samples(lambda rng: rng.expovariate(1 / 1500), questions=128),
    "quickstart": _quickstart,
}
