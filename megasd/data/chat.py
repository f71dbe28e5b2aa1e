"""Messages to token ids and back, with the tokenizer and the chat template of the model.

Reads local files only, and runs no remote code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megasd.types import Message, UserError

# text of an assistant turn, rendered to see how the template ends a turn
PROBE = "probe"


class Chat:
    """The tokenizer of a Hugging Face directory.

    tokenizer       the transformers tokenizer itself
    eos_token_ids   ids that end a response: the end of turn of the template first, then the ids of
                    generation_config, config and tokenizer
    vocab_size      rows of the embedding of the model; at least the number of tokenizer ids

        chat = Chat("out/model")
        chat.decode(chat.encode_response("15")) == "15"

    If `enable_thinking` is not None, then the template gets it (Qwen3: False writes an empty thinking
    block into the prompt). UserError: no tokenizer, no chat template, a tokenizer that does not fit
    the model, a template without an end of turn.
    """

    def __init__(self, model_path: str | Path, *, enable_thinking: bool | None = None) -> None:
        self.path = Path(model_path)
        self._template_options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        config = self._read_json("config.json", required=True)
        self.tokenizer = self._load_tokenizer()
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.path}: the tokenizer has no chat template; use an instruct model or add"
                " chat_template.jinja"
            )
        self.vocab_size = self._model_vocab_size(config)
        if len(self.tokenizer) > self.vocab_size:
            raise UserError(
                f"{self.path}: the tokenizer has {len(self.tokenizer)} ids and the model's vocabulary"
                f" {self.vocab_size}; put the model's own tokenizer there"
            )
        self._end_of_turn = self._find_end_of_turn()
        self.eos_token_ids = self._collect_eos(config)

    def encode_prompt(self, messages: list[Message], *, enable_thinking: bool | None = None) -> list[int]:
        """Token ids of the conversation and the generation prompt, which the engine continues.

        `enable_thinking` replaces the setting of this object (for a teacher that thinks, with a student
        that does not). None: the setting of this object. UserError: the template refuses the messages.
        """
        return self._encode(
            self._render(messages, add_generation_prompt=True, enable_thinking=enable_thinking)
        )

    def encode_response(self, text: str) -> list[int]:
        """Token ids of an assistant turn after encode_prompt; the last id is the end of turn.

        Text that the template writes after the end of turn (Qwen: a newline) is no part of the
        response, because no model samples it. Text that the template writes before `text`, and that is
        not in the generation prompt (Qwen3: an empty thinking block), is a part of the response.
        """
        continuation = self._continuation(text)
        # The generation prompt has more text than a finished turn (an opened <think>).
        if continuation is None:
            return self._encode(text) + [self._end_of_turn]
        ids = self._encode(continuation)
        last = max(
            (position for position, token in enumerate(ids) if token == self._end_of_turn), default=None
        )
        if last is None:
            raise UserError(
                f"{self.path}: the chat template wrote no end of turn after {_short(text)}; check"
                " chat_template.jinja"
            )
        return ids[: last + 1]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, without special tokens; ids of vocabulary padding have no text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _encode(self, text: str) -> list[int]:
        # the template has written the special tokens already
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(
        self, messages: list[Message], *, add_generation_prompt: bool, enable_thinking: bool | None = None
    ) -> str:
        import jinja2

        options = self._template_options if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except jinja2.TemplateError as error:
            # the template calls raise_exception, or is broken
            roles = ", ".join(message["role"] for message in messages)
            reason = str(error).replace("\n", " ")
            raise UserError(
                f"{self.path}: the chat template refuses messages with roles {roles}: {reason}; change the"
                " rows"
            ) from error

    def _continuation(self, text: str) -> str | None:
        """What the template writes for an assistant turn after the generation prompt.

        None: a rendered turn does not begin with the generation prompt.
        """
        question: list[Message] = [{"role": "user", "content": PROBE}]
        prefix = self._render(question, add_generation_prompt=True)
        whole = self._render([*question, {"role": "assistant", "content": text}], add_generation_prompt=False)
        return whole[len(prefix) :] if whole.startswith(prefix) else None

    def _find_end_of_turn(self) -> int:
        """The first special token after the text of an assistant turn."""
        whole = self._render(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": PROBE}],
            add_generation_prompt=False,
        )
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        for token in self._encode(whole.rpartition(PROBE)[2]):
            if token in special:
                return token
        raise UserError(
            f"{self.path}: the chat template ends an assistant turn with no special token; responses could"
            " never stop"
        )

    def _collect_eos(self, config: dict[str, Any]) -> list[int]:
        candidates: list[Any] = [self._end_of_turn]
        for value in (
            self._read_json("generation_config.json", required=False).get("eos_token_id"),
            config.get("eos_token_id"),
            self.tokenizer.eos_token_id,
        ):
            candidates += value if isinstance(value, list) else [value]
        ids = list(dict.fromkeys(token for token in candidates if token is not None))
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise UserError(
                    f"{self.path}: eos_token_id {token!r} is no id of the model's vocabulary"
                    f" ({self.vocab_size}); correct it"
                )
        return ids

    def _model_vocab_size(self, config: dict[str, Any]) -> int:
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        if not isinstance(size, int):
            raise UserError(
                f"{self.path}/config.json: no vocab_size; take the config.json of the checkpoint's own"
                " repository"
            )
        return size

    def _load_tokenizer(self) -> Any:
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        if not any((self.path / name).exists() for name in names):
            raise UserError(
                f"{self.path}: no tokenizer ({', '.join(names)}); copy the model's tokenizer files there"
            )
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                str(self.path), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            # transformers raises many kinds of errors for damaged files
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.path}: the tokenizer does not load ({type(error).__name__}: {reason}); copy its files"
                " again"
            ) from error

    def _read_json(self, name: str, *, required: bool) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            if not required:
                return {}
            raise UserError(f"{path}: no such file; model.path must be a Hugging Face directory")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: not a JSON object; copy the file again")
        return content


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
