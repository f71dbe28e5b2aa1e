"""Write a tiny model and an addition data set for which a whole run fits two CPU cores.

    python tools/make_quickstart.py OUT [--seed 1]

OUT/model        Hugging Face directory: a random Qwen3 (3 layers, hidden 128, 0.5 M parameters,
                 float32) and a character tokenizer (printable ASCII and newline, 102 tokens; the
                 model's vocabulary is padded to 128, so padding is real)
OUT/warmup.jsonl, train.jsonl, eval.jsonl
                 rows {"id", "prompt", "answer", "solution"}: "47+86=" -> "133"; one or two digits a
                 number; no sum is in two files. Four in ten solutions of warmup.jsonl have a wrong
                 digit.

The same seed writes the same bytes. A turn takes two tokens in addition to its text:
<|user|>47+86=<|im_end|><|assistant|>133<|im_end|>.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SPECIAL_TOKENS = ["<|pad|>", "<|unk|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
PADDED_VOCAB_SIZE = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|im_end|>' }}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPLITS = ("warmup", "train", "eval")
# Part of the warm-up rows whose solution has one wrong digit. The warmed model then knows more than
# it says, as pretrained models do.
NOISE = 0.4
# (digits of one number, of the other) -> rows of each split, in graded difficulty. With 1+1 digits
# there are only 55 sums, with 1+2 digits 900.
NUM_ROWS = {
    (1, 1): (22, 22, 11),
    (1, 2): (420, 400, 75),
    (2, 2): (1900, 1900, 170),
}


def make_rows(seed: int) -> dict[str, list[dict[str, str]]]:
    """Rows of each split, shuffled; a sum a+b is in one of them at most, b+a included: what is
    learned must carry over.
    """
    rng = random.Random(seed)
    pairs: dict[str, list[tuple[int, int]]] = {name: [] for name in SPLITS}
    for digits, counts in NUM_ROWS.items():
        sums: dict[tuple[int, int], tuple[int, int]] = {}
        while len(sums) < sum(counts):
            a, b = (rng.randint(0 if n == 1 else 10 ** (n - 1), 10**n - 1) for n in digits)
            if rng.random() < 0.5:
                a, b = b, a
            sums.setdefault((min(a, b), max(a, b)), (a, b))
        chosen = list(sums.values())
        rng.shuffle(chosen)
        for name, count in zip(SPLITS, counts, strict=True):
            pairs[name] += [chosen.pop() for _ in range(count)]
    rows = {}
    for name in SPLITS:
        rng.shuffle(pairs[name])
        rows[name] = []
        for i, (a, b) in enumerate(pairs[name]):
            answer = str(a + b)
            noisy = name == "warmup" and rng.random() < NOISE
            solution = with_a_wrong_digit(answer, rng) if noisy else answer
            rows[name].append(
                {"id": f"{name}-{i}", "prompt": f"{a}+{b}=", "answer": answer, "solution": solution}
            )
    return rows


def with_a_wrong_digit(answer: str, rng: random.Random) -> str:
    """One digit replaced by another; the first does not become 0."""
    place = rng.randrange(len(answer))
    digits = [d for d in "0123456789" if d != answer[place] and (d != "0" or place)]
    return answer[:place] + rng.choice(digits) + answer[place + 1 :]


def write_tokenizer(directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json: one token a character, and a chat template of
    single-token headers.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(directory)


def write_model(directory: Path, seed: int) -> None:
    """A random Qwen3ForCausalLM; every size divides by two, for tensor_model_parallel_size=2."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    pad, end = SPECIAL_TOKENS.index("<|pad|>"), SPECIAL_TOKENS.index("<|im_end|>")
    config = Qwen3Config(
        vocab_size=PADDED_VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        # 0.02 suits wide models; a model of width 128 trains faster from larger weights.
        initializer_range=0.05,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=end,
        dtype=torch.float32,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).float()
    # transformers zeroes the pad row. If the pad token were sampled, the RMSNorm of that zero
    # vector would have a gradient of 1/sqrt(eps).
    with torch.no_grad():
        model.model.embed_tokens.weight[pad].normal_(std=config.initializer_range)
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=pad, do_sample=True, temperature=1.0
    )
    logging.disable_progress_bar()
    model.save_pretrained(directory, safe_serialization=True)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory to write; created when missing")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and of the rows (default 1)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.out / "model")
    write_model(args.out / "model", args.seed)
    for name, rows in make_rows(args.seed).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"wrote {args.out}/model and {', '.join(f'{name}.jsonl' for name in SPLITS)}")


if __name__ == "__main__":
    main()
