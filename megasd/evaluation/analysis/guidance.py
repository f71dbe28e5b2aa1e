"""The four guidance settings of Kim et al. (arXiv 2603.24472), section 3. Plain Python.

A setting says which privileged text the model is shown before it writes a response:

    none                        the question alone
    solution                    the question and a correct rollout with its thinking (if no sample
                                is correct, the row's own solution)
    solution_without_thinking   as `solution`, with the thinking taken out
    regenerated                 the question and a response that the model wrote under `solution`

The correct rollout is the first right sample of the question. The response shown under
`regenerated` is the first sample under `solution`, whatever its verdict (UNSURE: the paper does not
say which). All settings are compared on the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megasd.algo.teacher_context import with_solution, without_thinking
from megasd.evaluation.analysis.markers import MARKERS
from megasd.evaluation.analysis.rollouts import (
    MeasuredResponse,
    marker_rows,
    measure_response,
    response_metrics,
)
from megasd.evaluation.analysis.tables import TableRow
from megasd.types import Group, Message, UserError, Verdict

SETTINGS = ("none", "solution", "solution_without_thinking", "regenerated")
GUIDED = SETTINGS[1:]


@dataclass(frozen=True)
class Demonstration:
    """The text that a question's guided prompt shows under `solution`.

    `index`: the sample that the text came from; None for the row's own solution.
    """

    text: str
    index: int | None

    @property
    def without_thinking(self) -> str:
        """The text without <think>...</think>."""
        return without_thinking(self.text)


def within(groups: Sequence[Group], low: float, high: float) -> list[Group]:
    """The groups whose pass rate lies in [low, high]; groups without a verdict are left out."""
    return [group for group in groups if group.pass_rate is not None and low <= group.pass_rate <= high]


def demonstration(group: Group) -> Demonstration | None:
    """The first right sample, else the row's solution, else None.

    UserError if the solution is nothing but thinking.
    """
    right = next((sample for sample in group.samples if sample.verdict is Verdict.RIGHT), None)
    if right is not None:
        found = Demonstration(right.text, right.index)
    elif group.prompt.solution:
        found = Demonstration(group.prompt.solution, None)
    else:
        return None
    if not found.without_thinking:
        raise UserError(
            f"row {group.prompt.id!r}: nothing is left of its solution without the thinking; write one that"
            " ends in an answer"
        )
    return found


def guided_messages(group: Group, shown: str, *, template: str) -> list[Message]:
    """The question's messages with `shown` put into the teacher's template."""
    return with_solution(group.prompt.messages, shown, template=template)


def shown_text(setting: str, demonstrated: Demonstration, under_solution: Group | None) -> str:
    """The privileged text of a guided setting.

    `under_solution`: the question's samples under `solution`, which `regenerated` reads.
    """
    if setting == "solution":
        return demonstrated.text
    if setting == "solution_without_thinking":
        return demonstrated.without_thinking
    if setting == "regenerated" and under_solution is not None:
        return under_solution.samples[0].text
    raise ValueError(f"no privileged text for setting {setting!r}")


def measured(samples: dict[str, list[Group]]) -> dict[str, list[MeasuredResponse]]:
    """Setting -> the measured responses of the setting."""
    return {
        setting: [measure_response(s, source=setting) for group in groups for s in group.samples]
        for setting, groups in samples.items()
    }


def guidance_table(samples: dict[str, list[Group]]) -> list[TableRow]:
    """The paper's table, with a row for each setting.

    The columns are the score, the mean tokens, E(y), and each marker (substrings a response).
    """
    rows = []
    for setting, responses in measured(samples).items():
        per_marker = {line["marker"]: line["substrings_per_response"] for line in marker_rows(responses)}
        rows.append(
            {
                "setting": setting,
                "questions": len(samples[setting]),
                **response_metrics(responses),
                **{m: per_marker[m] for m in MARKERS},
            }
        )
    return rows


def guidance_by_marker(samples: dict[str, list[Group]]) -> list[TableRow]:
    """Substring and whole-word counts in long form: a row for each setting and marker."""
    return [
        {"setting": setting, **line}
        for setting, responses in measured(samples).items()
        for line in marker_rows(responses)
    ]
