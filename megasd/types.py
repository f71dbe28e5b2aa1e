"""The nouns of sampling and reward: prompts, samples, groups. Plain Python, no torch.

prompt = Prompt(id="train-0", messages=[{"role": "user", "content": "2+3="}], answer="5")
sample = Sample(prompt_id="train-0", index=0, prompt_ids=[7, 8], response_ids=[5, 1],
                response_logps=[-0.1, -0.2], text="5", finish_reason="stop", version=0)
group  = Group(prompt, [sample]);  sample.verdict = Verdict.RIGHT;  group.pass_rate == 1.0
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class UserError(ValueError):
    """Bad input from the user: one line that names the file, key or row and what to do.

    The command line prints it without a traceback.
    """


# {"role": "user" | "system" | "assistant", "content": text}
Message = dict[str, str]


class Verdict(str, Enum):
    """What a verifier said. ERROR and TIMEOUT are no wrong answers: pass rates ignore them."""

    RIGHT = "right"
    WRONG = "wrong"
    ERROR = "error"
    TIMEOUT = "timeout"

    @property
    def counts(self) -> bool:
        """True when the sample takes part in pass rates."""
        return self in (Verdict.RIGHT, Verdict.WRONG)


@dataclass
class Prompt:
    """One question.

    Prompt("train-3", [{"role": "user", "content": "7+8="}], "15", "7+8=15")
    """

    # unique in its file
    id: str
    messages: list[Message]
    # gold answer, read by the verifier
    answer: str
    # reference solution, if the row has one (teacher contexts, NLL)
    solution: str | None = None
    # pass rate of the start model, if the row has one (PACED's frozen rate)
    pass_rate: float | None = None
    # criteria of rewards/rubric.py, if the row has any
    rubric: list[dict[str, str | float]] | None = None


@dataclass
class Sample:
    """One response to one prompt.

    Sample("train-3", 0, [11, 12], [4, 5, 2], [-.1, -.3, -.01], "15", "stop", 7)
    """

    prompt_id: str
    # position in its group, 0..G-1
    index: int
    prompt_ids: list[int]
    # sampled token ids, the stop token included when it was sampled
    response_ids: list[int]
    # log-probs of response_ids by the engine (nats, at the sampling temperature); [] for the
    # solution of a row
    response_logps: list[float]
    # decoded response without special tokens
    text: str
    # "stop" | "length"
    finish_reason: str
    # weight version that every token was sampled with
    version: int
    # None until scored
    verdict: Verdict | None = None
    # why the verifier failed, for ERROR and TIMEOUT
    detail: str = ""
    # shaped reward in [0, 1], if the verifier gives one (a rubric); pass rates use the verdict
    score: float | None = None
    # what the verifier tells the model about a wrong answer; never the expected answer
    feedback: str = ""

    @property
    def reward(self) -> float:
        """1.0 for a right answer, else 0.0. Unscored samples raise ValueError."""
        if self.verdict is None:
            raise ValueError(f"sample {self.prompt_id}/{self.index} has not been scored")
        return 1.0 if self.verdict is Verdict.RIGHT else 0.0


@dataclass
class Group:
    """A prompt and its G samples; Group(p, [right, wrong, wrong, timeout]).pass_rate == 1/3."""

    prompt: Prompt
    samples: list[Sample] = field(default_factory=list)

    @property
    def pass_rate(self) -> float | None:
        """Right samples / scored samples, in [0, 1]; None when no sample could be scored."""
        counted = [s for s in self.samples if s.verdict is not None and s.verdict.counts]
        return sum(s.reward for s in counted) / len(counted) if counted else None


@dataclass(frozen=True)
class TeacherContext:
    """What the self-teacher of one sample reads in place of the prompt.

    `messages` ends with a user turn.

    TeacherContext([{"role": "user", "content": "7+8=\\n\\nA correct solution: 15 ..."}], source="sibling 2")
    """

    messages: list[Message]
    # where the privileged text came from, for the rollout log
    source: str


def is_url(source: str) -> bool:
    """Whether a SOURCE of the command line is the URL of a running server, not a directory."""
    return source.startswith(("http://", "https://"))
