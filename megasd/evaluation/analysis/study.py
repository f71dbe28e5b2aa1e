"""Run a guidance analysis on a live engine: choose questions, sample every setting, measure KL.

After Kim et al. (arXiv 2603.24472). Questions whose accuracy over unguided samples lies within
bounds are compared under the settings of guidance.py. A question that is too long under one setting
is left out of all settings, and named.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from megasd.config.schema import DEFAULT_TEMPLATE, Config
from megasd.data.chat import Chat
from megasd.engine.sampler import Sampler
from megasd.evaluation.analysis import guidance
from megasd.evaluation.analysis.divergence import Tally, full_kl, top_k_kl
from megasd.evaluation.analysis.markers import marker_tokens
from megasd.evaluation.analysis.tables import TableRow
from megasd.rewards.reward_pool import RewardPool
from megasd.types import Group, Prompt, UserError

# So many questions are sampled at a time, until enough questions have an accuracy within bounds.
ROUND = 64
DIRECTIONS = ("KL(T||S)", "KL(S||T)")


class Bounds(NamedTuple):
    """Bounds on the questions to compare.

    The accuracy over unguided samples must lie in [low, high]. At most `questions` are compared.
    """

    low: float
    high: float
    questions: int


class Study:
    """The samples of a guidance analysis and what is measured on them.

    study.sample(prompts, bounds)    asks the engine; `samples` then holds setting -> groups, of the
                                     same questions in the same order
    study.engine_kl(...), full_kl()  rows of the KL table; full_kl needs no engine any more

    accuracy   pass rate of every sampled question, by id; None where no sample could be judged
    left_out   questions within the bounds that are not compared, and why
    """

    def __init__(
        self,
        config: Config,
        chat: Chat,
        engine: Sampler,
        rewards: RewardPool,
        *,
        say: Callable[[str], None],
    ) -> None:
        """Prepare an analysis that has not sampled yet.

        `config`: rollout, reward, run.seed and algorithm.teacher.template are read. `say` is
        called with each line about the progress.
        """
        self.config, self.chat, self.engine, self.rewards, self.say = config, chat, engine, rewards, say
        teacher = config.algorithm.teacher
        self.template = teacher.template if teacher is not None else DEFAULT_TEMPLATE
        self.accuracy: dict[str, float | None] = {}
        self.left_out: dict[str, str] = {}
        self.demonstrations: dict[str, guidance.Demonstration] = {}
        # The number of responses whose KL was measured.
        self.kl_responses = 0
        # setting -> question id -> scored samples.
        self._groups: dict[str, dict[str, Group]] = {}
        self._prompt_ids: dict[str, dict[str, list[int]]] = {}

    @property
    def samples(self) -> dict[str, list[Group]]:
        """Setting -> the groups of the questions that are compared."""
        return {
            setting: [group for name, group in groups.items() if name not in self.left_out]
            for setting, groups in self._groups.items()
        }

    def sample(
        self, prompts: list[Prompt], bounds: Bounds, keep: Callable[[dict[str, list[Group]]], None]
    ) -> None:
        """Choose the questions and sample every setting.

        After each setting, `keep` is called with all samples so far. UserError if no question is
        left.
        """
        self._choose(prompts, bounds)
        keep(self.samples)
        for setting in guidance.GUIDED:
            asked = self._guided_prompts(setting)
            if not asked:
                why = next(iter(self.left_out.values()))
                raise UserError(
                    f"{self.config.data.train}: no question is left to compare ({why}); raise"
                    " rollout.engine.max_total_tokens"
                )
            self._keep_groups(setting, self._ask(asked), asked)
            self.say(f"sampled {setting}: {len(asked)} questions")
            keep(self.samples)

    def _choose(self, prompts: list[Prompt], bounds: Bounds) -> None:
        """Sample questions without guidance until enough of them can be compared.

        A question can be compared if it is within the bounds and has a solution to show. The order
        of the questions is drawn from the seed.
        """
        order, chosen = list(prompts), []
        random.Random(f"guidance/{self.config.run.seed}").shuffle(order)
        asked = [(prompt, self._question_ids(prompt)) for prompt in order]
        for start in range(0, len(asked), ROUND):
            groups = self._ask(asked[start : start + ROUND])
            self.accuracy |= {group.prompt.id: group.pass_rate for group in groups}
            chosen += [
                group
                for group in guidance.within(groups, bounds.low, bounds.high)
                if self._find_demonstration(group)
            ]
            self.say(f"asked {len(self.accuracy)} questions, {len(chosen)} within the bounds")
            if len(chosen) >= bounds.questions:
                break
        if not chosen:
            raise UserError(
                f"{self.config.data.train}: none of the {len(self.accuracy)} questions asked has an accuracy"
                f" within [{bounds.low:g}, {bounds.high:g}] and a solution to show; change --min-accuracy or"
                " --max-accuracy, or take other rows"
            )
        self._keep_groups("none", chosen[: bounds.questions], asked)

    def _find_demonstration(self, group: Group) -> bool:
        found = guidance.demonstration(group)
        if found is None:
            self.left_out[group.prompt.id] = "no right sample, and no solution in its row"
            return False
        self.demonstrations[group.prompt.id] = found
        return True

    def _question_ids(self, prompt: Prompt) -> list[int]:
        ids, limit = self.chat.encode_prompt(prompt.messages), self.config.rollout.max_prompt_tokens
        if len(ids) > limit:
            raise UserError(
                f"{self.config.data.train}: row {prompt.id!r} has {len(ids)} prompt tokens, more than"
                f" rollout.max_prompt_tokens={limit}; raise it or drop the row"
            )
        return ids

    def _guided_prompts(self, setting: str) -> list[tuple[Prompt, list[int]]]:
        """(question, ids of its guided prompt) for each question to sample under a setting.

        If a prompt leaves no room for a response, its question is left out of every setting.
        """
        under_solution, longest = self._groups.get("solution", {}), self.engine.max_tokens
        room, found = self.config.rollout.max_response_tokens, []
        for group in self.samples["none"]:
            name = group.prompt.id
            shown = guidance.shown_text(setting, self.demonstrations[name], under_solution.get(name))
            ids = self.chat.encode_prompt(guidance.guided_messages(group, shown, template=self.template))
            if longest is not None and len(ids) + room > longest:
                self.left_out[name] = (
                    f"{setting}: {len(ids)} prompt + {room} response tokens exceed the engine's {longest}"
                )
            else:
                found.append((group.prompt, ids))
        return found

    def _ask(self, asked: list[tuple[Prompt, list[int]]]) -> list[Group]:
        """Sample the given (question, prompt ids) and score the samples."""
        rollout = self.config.rollout
        groups = self.engine.generate(
            [prompt for prompt, _ in asked],
            [ids for _, ids in asked],
            self.chat.decode,
            step=0,
            num_samples=rollout.num_samples,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_response_tokens=rollout.max_response_tokens,
        )
        self.rewards.score(groups)
        return groups

    def _keep_groups(self, setting: str, groups: list[Group], asked: list[tuple[Prompt, list[int]]]) -> None:
        self._groups[setting] = {group.prompt.id: group for group in groups}
        self._prompt_ids[setting] = {prompt.id: ids for prompt, ids in asked}

    # ---- KL ----

    def _responses(self, per_question: int) -> list[tuple[str, list[int], dict[str, list[int]]]]:
        """(question id, response ids, marker positions) of unguided responses.

        The response that is shown to the teacher is left out.
        """
        found = []
        for group in self.samples["none"]:
            shown = self.demonstrations[group.prompt.id].index
            own = [sample for sample in group.samples if sample.index != shown and sample.response_ids][
                :per_question
            ]
            found += [
                (group.prompt.id, sample.response_ids, marker_tokens(sample.response_ids, self.chat.decode))
                for sample in own
            ]
        self.kl_responses = len(found)
        return found

    def engine_kl(self, *, per_question: int, top_k: int) -> list[TableRow]:
        """Rows of KL(T||S) on the engine's top K of either side and a bucket.

        The value is a lower bound of the KL over the whole vocabulary.
        """
        tallies = {setting: Tally() for setting in guidance.GUIDED}
        for name, response, positions in self._responses(per_question):
            asked = [(self._prompt_ids[setting][name], response) for setting in guidance.SETTINGS]
            student, *teachers = self.engine.top_logprobs(asked, top_k)
            for tally, teacher in zip(tallies.values(), teachers, strict=True):
                tally.add([top_k_kl(t, s) for t, s in zip(teacher, student, strict=True)], positions)
        head = {
            "divergence": DIRECTIONS[0],
            "support": f"top {min(top_k, self.chat.vocab_size)} of both sides and a bucket (lower bound)",
        }
        return [row for setting, tally in tallies.items() for row in tally.rows(setting=setting, **head)]

    def full_kl(self, *, per_question: int) -> list[TableRow]:
        """Rows of the KL in both directions over the whole vocabulary.

        transformers computes it in float32, on a GPU if there is one.
        """
        model = load_model(self.config.model.path)
        tallies = {(setting, direction): Tally() for setting in guidance.GUIDED for direction in DIRECTIONS}
        for name, response, positions in self._responses(per_question):
            student, *teachers = (self._prompt_ids[setting][name] for setting in guidance.SETTINGS)
            for setting, both in zip(
                guidance.GUIDED, full_kl(model, student, teachers, response), strict=True
            ):
                for direction, values in zip(DIRECTIONS, both, strict=True):
                    tallies[setting, direction].add(values, positions)
        return [
            row
            for (setting, direction), tally in tallies.items()
            for row in tally.rows(setting=setting, divergence=direction, support="whole vocabulary")
        ]


def load_model(path: str) -> Any:
    """Load a model of transformers in float32, on a GPU if there is one, for evaluation."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.to(device).eval()
