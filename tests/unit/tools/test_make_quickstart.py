"""tools/make_quickstart.py: what it writes is deterministic, disjoint, right, and read by the same
code that reads real data and models.

Does not prove that the model can learn the task; the quickstart run does.
"""

import filecmp
import json

import pytest

from megasd.algo.teacher_context import teacher_contexts
from megasd.config.schema import TeacherConfig
from megasd.data.chat import Chat
from megasd.data.prompts import load_prompts
from megasd.types import Group, Sample
from tools.make_quickstart import main, make_rows


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "new"
    main([str(out), "--seed", "1"])
    return out


def test_the_same_seed_writes_the_same_bytes(out, tmp_path):
    main([str(tmp_path), "--seed", "1"])
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert {
        "eval.jsonl",
        "train.jsonl",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
    } <= set(names)
    assert filecmp.cmpfiles(out, tmp_path, names, shallow=False) == (names, [], [])
    assert make_rows(1) != make_rows(2)


def test_rows_are_right_and_the_splits_share_no_sum(out):
    splits = [
        load_prompts(out / name, require_solution=True)
        for name in ("warmup.jsonl", "train.jsonl", "eval.jsonl")
    ]
    assert [len(split) for split in splits] == [2342, 2322, 256]
    sums = []
    for split in splits:
        terms = [
            tuple(sorted(map(int, prompt.messages[0]["content"].rstrip("=").split("+")))) for prompt in split
        ]
        assert all(prompt.answer == str(a + b) for prompt, (a, b) in zip(split, terms, strict=True))
        assert len(set(terms)) == len(terms)
        sums.append(set(terms))
    assert len(set.union(*sums)) == sum(map(len, sums))
    assert {tuple(len(str(n)) for n in pair) for pair in sums[2]} == {(1, 1), (1, 2), (2, 2)}


@pytest.mark.parametrize("template, longest", [("{prompt} ({solution})", 18), (None, 110)])
def test_teacher_prompts_fit_the_vocabulary_and_the_context(out, template, longest):
    chat = Chat(out / "model")
    options = {"template": template} if template else {}
    for prompt in load_prompts(out / "eval.jsonl"):
        group = Group(prompt, [Sample(prompt.id, 0, [], [], [], "", "stop", 0)])
        ((context,),) = teacher_contexts(group, TeacherConfig(context="solution", **options), seed="")
        ids = chat.encode_prompt(context.messages)
        assert chat.tokenizer.unk_token_id not in ids
        assert len(ids) <= longest
        assert chat.decode(chat.encode_response(prompt.answer)) == prompt.answer


def test_every_printable_character_has_a_token(out):
    chat = Chat(out / "model")
    text = "".join(chr(code) for code in range(32, 127)) + "\n"
    assert chat.decode(chat.encode_response(text)) == text
    # padding is real
    assert len(chat.tokenizer) < chat.vocab_size == 128
    assert chat.eos_token_ids == [2]


def test_the_model_loads_and_its_sizes_divide_by_two(out):
    import torch
    from transformers import AutoModelForCausalLM

    config = json.loads((out / "model" / "config.json").read_text())
    sizes = ("vocab_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size")
    assert all(config[size] % 2 == 0 for size in sizes) and config["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(out / "model", local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(torch.tensor([[4, 25, 5]])).logits.shape == (1, 3, 128)
