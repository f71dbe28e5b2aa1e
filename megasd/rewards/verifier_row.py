"""The row of a verifier: what the rest of the package needs to know about one value of reward.verifier.

rewards/verifiers.py holds the table of all rows; rewards/reward_pool.py carries the checks out. A
verifier is a module with one row:

    EXACT_MATCH = Verifier(
        read_answer=str.strip,
        read_gold=lambda prompt, settings: prompt.answer.strip(),
        compare=partial(compare_text, feedback="The answer is not the expected text."),
        no_answer=Judgement(Verdict.WRONG, feedback="No answer was found after the thinking."),
    )

This file imports no check and nothing outside the standard library: the config reads the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from megasd.types import Prompt, Verdict

# a gold answer in the form that the verifier compares with
GoldT = TypeVar("GoldT")


class RewardSettings(Protocol):
    """The settings that verifiers read: section `reward` of the config (RewardConfig)."""

    @property
    def verifier(self) -> str:
        """Name of the row in the table."""
        ...

    @property
    def workers(self) -> int:
        """Worker processes, or sandboxes, at once."""
        ...

    @property
    def timeout(self) -> float:
        """Seconds that one check may take."""
        ...

    @property
    def code_seconds(self) -> float:
        """Seconds that all tests of one program may take together."""
        ...

    @property
    def code_memory_mib(self) -> int:
        """Memory of a program with all its processes, in MiB."""
        ...

    @property
    def rubric_threshold(self) -> float:
        """Score from which on a sample is right."""
        ...


@dataclass(frozen=True)
class Judgement:
    """What a verifier says about one sample; the fields of `Sample` with the same names."""

    verdict: Verdict
    # why there is no verdict, for ERROR and TIMEOUT
    detail: str = ""
    # what is wrong, in words for the model; never what was expected
    feedback: str = ""
    # in [0, 1] if the verifier shapes the reward, otherwise None
    score: float | None = None


@dataclass(frozen=True)
class PendingCheck(Generic[GoldT]):
    """An answer that a comparison could not judge, and that waits for its check."""

    prompt: Prompt
    answer: str
    gold: GoldT


@dataclass(frozen=True)
class WorkerRequest:
    """The two texts that a worker process compares."""

    answer: str
    gold: str


@dataclass(frozen=True)
class WorkerReply:
    """What came of a request.

    A check that returned a bool gives RIGHT or WRONG. A check that returned another value gives RIGHT
    and this value as `result`. A check that failed gives ERROR or TIMEOUT and a `detail`.
    """

    verdict: Verdict
    detail: str = ""
    # a JSON value
    result: Any = None


@dataclass(frozen=True)
class WorkerCheck(Generic[GoldT]):
    """A check that may hang, in sympy or in a regular expression.

    It runs in a worker process that is killed at a deadline.
    """

    # (answer, gold text) -> whether they agree, or a JSON value that `conclude` reads. The worker
    # imports this function by its name, so it must be a function of a module.
    check: Callable[[str, str], object]
    # The gold answer as text. Equal pairs of answer and gold text are checked once.
    gold_text: Callable[[GoldT], str]
    conclude: Callable[[WorkerRequest, WorkerReply, RewardSettings], Judgement]
    # A new worker calls this function once, outside every deadline: for slow imports.
    prepare: Callable[[], None] | None = None
    # whether a Judge given to RewardPool may take the place of `check`
    accepts_judge: bool = False

    def key(self, check: PendingCheck[GoldT]) -> tuple[str, str]:
        """Checks with equal keys have the same outcome."""
        return check.answer, self.gold_text(check.gold)


@dataclass(frozen=True)
class SandboxCheck(Generic[GoldT]):
    """A check that runs the answer as a program, in a sandbox. An exception of `check` is an ERROR."""

    check: Callable[[str, GoldT, RewardSettings], Judgement]

    def key(self, check: PendingCheck[GoldT]) -> tuple[str, str]:
        """Checks with equal keys have the same outcome."""
        return check.prompt.id, check.answer


@dataclass(frozen=True)
class Verifier(Generic[GoldT]):
    """One value of reward.verifier."""

    # The text after the last </think> -> the final answer, which is also the vote of maj@k; None
    # when the text has no answer. Must be linear in the text: it cannot be stopped.
    read_answer: Callable[[str], str | None]
    # The row's gold answer. UserError, naming the row, for a row that the verifier cannot use.
    read_gold: Callable[[Prompt, RewardSettings], GoldT]
    # (answer, gold) -> the judgement, or None when `check` must decide. Must be linear, too.
    compare: Callable[[str, GoldT], Judgement | None]
    # the judgement of a response without an answer
    no_answer: Judgement
    check: WorkerCheck[GoldT] | SandboxCheck[GoldT] | None = None
    # False when no two answers are alike, so that maj@k means nothing
    can_vote: bool = True


def needs_check(answer: str, gold: object) -> Judgement | None:
    """The `compare` of verifiers whose every answer goes to their check."""
    return None
