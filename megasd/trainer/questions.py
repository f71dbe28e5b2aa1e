"""The questions of a run: training and held-out rows as token ids, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from megasd.algo.stages import reads_solutions, variants
from megasd.algo.teacher_context import with_solution
from megasd.config.schema import Config
from megasd.data.chat import Chat
from megasd.data.prompts import DataError, PromptIterator, load_prompts
from megasd.types import Prompt, UserError
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import check_hf


class Questions:
    """The rows of data.train and data.eval with the chat template that turns them into token ids.

    prompts: iterator over the training rows, P rows a step. prompt_ids, eval_ids: row id -> token ids.
    eval_rows: held-out rows, empty without data.eval.
    """

    def __init__(self, config: Config) -> None:
        """Read and check everything. UserError, or DataError for a row, says what cannot be used."""
        check_hf(config.model.path)
        self.chat = Chat(config.model.path, enable_thinking=config.model.enable_thinking)
        self.rows = load_prompts(
            config.data.train,
            max_row_bytes=config.data.max_row_bytes,
            require_solution=reads_solutions(config.algorithm),
            mapping=config.data.mapping,
        )
        self.prompts = PromptIterator(
            self.rows, config.rollout.num_prompts, seed=config.run.seed, shuffle=config.data.shuffle
        )
        limit = config.rollout.max_prompt_tokens
        self.prompt_ids = encode_prompts(self.chat, self.rows, config.data.train, limit=limit)
        if any(one.source != "rollout" for one in variants(config.algorithm)):
            check_solutions(config, self.chat, self.rows)
        teacher = config.algorithm.teacher
        if teacher is not None and teacher.weights == "separate" and teacher.model_path is not None:
            check_tokenizer(self.chat, teacher.model_path, config.model.path)
        self.eval_rows: list[Prompt] = []
        self.eval_ids: dict[str, list[int]] = {}
        if config.data.eval is not None:
            rows = load_prompts(
                config.data.eval,
                max_row_bytes=config.data.max_row_bytes,
                mapping=config.data.eval_mapping or config.data.mapping,
            )
            self.eval_rows = rows[: config.evaluation.num_prompts or None]
            thinking = config.evaluation.enable_thinking
            self.eval_ids = encode_prompts(
                self.chat, self.eval_rows, config.data.eval, limit=limit, enable_thinking=thinking
            )


def encode_prompts(
    chat: Chat, rows: Sequence[Prompt], path: str, *, limit: int, enable_thinking: bool | None = None
) -> dict[str, list[int]]:
    """Row id -> token ids of the row's prompt.

    path: the rows' file, for messages. DataError for a prompt of more than `limit` tokens.
    """
    encoded = {}
    for row in rows:
        ids = chat.encode_prompt(row.messages, enable_thinking=enable_thinking)
        if len(ids) > limit:
            raise DataError(
                f"{path}: row {row.id!r} has {len(ids)} prompt tokens, more than"
                f" rollout.max_prompt_tokens={limit}; raise it or drop the row"
            )
        encoded[row.id] = ids
    return encoded


def check_solutions(config: Config, chat: Chat, rows: Sequence[Prompt]) -> None:
    """DataError for a solution that cannot be learned as a response.

    A solution must fit rollout.max_response_tokens and, where it is also shown in the prompt
    (algorithm.nll.context_fraction), the model's longest sequence.
    """
    limit, longest = config.rollout.max_response_tokens, model_length(config)
    nll = config.algorithm.nll
    for row in rows:
        where, solution = f"{config.data.train}: row {row.id!r}", row.solution or ""
        size = len(chat.encode_response(solution))
        if size > limit:
            raise DataError(
                f"{where} has {size} solution tokens, more than rollout.max_response_tokens={limit};"
                " raise it or drop the row"
            )
        if nll is not None and nll.context_fraction:
            messages = with_solution(row.messages, solution, template=nll.template)
            total = len(chat.encode_prompt(messages)) + size
            if total > longest:
                raise DataError(
                    f"{where}: with its solution in context (algorithm.nll.context_fraction) it takes"
                    f" {total} tokens, more than the model's max_position_embeddings={longest}; drop"
                    " the row"
                )


def check_tokenizer(chat: Chat, teacher_path: str, student_path: str) -> None:
    """UserError when a separate teacher has another vocabulary: it scores the student's token ids."""
    if Chat(teacher_path).tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise UserError(
            f"algorithm.teacher.model_path: {teacher_path} has another tokenizer than"
            f" model.path={student_path}; the two models must share one, since the teacher"
            " scores the student's token ids"
        )


def model_length(config: Config) -> int:
    """Tokens of the longest sequence that the model takes, and that a separate teacher takes too."""
    paths = [config.model.path]
    teacher = config.algorithm.teacher
    if teacher is not None and teacher.weights == "separate" and teacher.model_path is not None:
        paths.append(teacher.model_path)
    return min(int(read_hf_config(path)["max_position_embeddings"]) for path in paths)
