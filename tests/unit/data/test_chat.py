"""data/chat.py on real tokenizer files: the quickstart's, under several chat templates of the kinds
that instruct models ship.

Proves that prompt + response ids are what the template writes for the whole conversation, which ids
end a turn, and that a directory that does not fit is refused with one line. Does not prove anything
about a particular published tokenizer.
"""

import json

import pytest

from megasd.data.chat import Chat
from megasd.types import UserError
from tools.make_quickstart import CHAT_TEMPLATE, write_tokenizer

USER = [{"role": "user", "content": "7+8="}]
NEWLINE_AFTER_TURN = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# as Qwen3: finished turns hold a thinking block, the generation prompt only when thinking is off
EMPTY_THINKING = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}{{"
    " '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|assistant|>\\n' }}{% if enable_thinking is defined and not"
    " enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
# as DeepSeek-R1: the generation prompt opens a block that finished turns leave out
OPENED_THINKING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role\\nhere') }}{% endif"
    " %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|assistant|><think>' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}{% if add_generation_prompt"
    " %}assistant: {% endif %}"
)


@pytest.fixture
def model_dir(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "vocab_size": 128, "eos_token_id": 2})
    )
    return tmp_path


def make_chat(model_dir, template: str, **options) -> Chat:
    (model_dir / "chat_template.jinja").write_text(template)
    return Chat(model_dir, **options)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NEWLINE_AFTER_TURN, EMPTY_THINKING])
@pytest.mark.parametrize("text", ["15", "a b\n\\frac{1}{2} ", "x<|im_end|>y"])
def test_prompt_and_response_are_the_whole_conversation(model_dir, template, text):
    chat = make_chat(model_dir, template)
    messages = [{"role": "system", "content": "s"}, *USER]
    whole = chat.tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": text}], tokenize=True
    )["input_ids"]
    response = chat.encode_response(text)
    joined = chat.encode_prompt(messages) + response
    assert response[-1] == 2
    assert whole[: len(joined)] == joined
    # only the template's newline is left out
    assert chat.decode(whole[len(joined) :]).strip() == ""
    assert chat.decode(response).replace("<think>\n\n</think>\n\n", "") == text.replace("<|im_end|>", "")


def test_prompt_ids_are_short_and_exact(model_dir):
    chat = make_chat(model_dir, CHAT_TEMPLATE)
    tokens = chat.tokenizer.convert_ids_to_tokens(chat.encode_prompt(USER))
    assert tokens == ["<|user|>", "7", "+", "8", "=", "<|im_end|>", "<|assistant|>"]
    assert all(isinstance(token, int) for token in chat.encode_prompt(USER))


def test_thinking_block_is_in_the_prompt_when_thinking_is_off(model_dir):
    on, off = make_chat(model_dir, EMPTY_THINKING), Chat(model_dir, enable_thinking=False)
    assert chat_text(off, off.encode_prompt(USER)).endswith("</think>\n\n")
    assert off.decode(off.encode_response("15")) == "15"
    assert on.decode(on.encode_response("15")) == "<think>\n\n</think>\n\n15"
    assert on.encode_prompt(USER) + on.encode_response("15") == off.encode_prompt(USER) + off.encode_response(
        "15"
    )


def chat_text(chat: Chat, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids)


def test_a_generation_prompt_that_opens_thinking(model_dir):
    chat = make_chat(model_dir, OPENED_THINKING)
    assert chat_text(chat, chat.encode_response("so</think>15")) == "so</think>15<|im_end|>"
    with pytest.raises(UserError, match="roles system, user: no system role here; change the rows"):
        chat.encode_prompt([{"role": "system", "content": "s"}, *USER])


def test_decode_skips_special_and_padding_ids(model_dir):
    chat = make_chat(model_dir, CHAT_TEMPLATE)
    ids = chat.encode_response("1 5 .")
    assert chat.decode([0, *ids, 102, 127]) == "1 5 ."


def test_eos_ids_come_from_every_place_end_of_turn_first(model_dir):
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    config = {"model_type": "qwen3", "vocab_size": 128, "eos_token_id": 0}
    (model_dir / "config.json").write_text(json.dumps(config))
    chat = make_chat(model_dir, CHAT_TEMPLATE)
    assert chat.eos_token_ids == [2, 3, 0] and chat.vocab_size == 128
    (model_dir / "config.json").write_text(json.dumps(config | {"eos_token_id": 128}))
    with pytest.raises(UserError, match="eos_token_id 128 is no id"):
        Chat(model_dir)


def test_a_directory_that_does_not_fit_is_one_line(model_dir, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert_refused(lambda: Chat(empty), "no such file")
    (empty / "config.json").write_text("{")
    assert_refused(lambda: Chat(empty), "not valid JSON")
    (empty / "config.json").write_text('{"vocab_size": 128}')
    cases = [
        (lambda: Chat(empty), "no tokenizer"),
        (lambda: make_chat(model_dir, NO_END), "no special token"),
        (lambda: make_chat(model_dir, ""), "no chat template"),
        (lambda: make_chat(model_dir, "{{ 1 + }}"), "the chat template refuses"),
    ]
    for call, reason in cases:
        assert_refused(call, reason)
    (model_dir / "config.json").write_text('{"vocab_size": 101, "eos_token_id": 2}')
    assert_refused(lambda: make_chat(model_dir, CHAT_TEMPLATE), "102 ids and the model's vocabulary 101")
    (model_dir / "tokenizer.json").write_text('{"version": "1.0"}')
    assert_refused(lambda: Chat(model_dir), "does not load")


def assert_refused(call, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        call()
    assert "\n" not in str(caught.value), caught.value
