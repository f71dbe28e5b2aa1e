"""What a user can get wrong, one row each, through the real command line.

Proves for every row: exit code 2; exactly one line on stderr, which starts with "megasd: " and says
where (file, key or row) and what to do; nothing written, moved or removed anywhere, also where an
older run lies. Rows marked `real` are started as a user starts them, one of them on two ranks; the
others run in forks of a process that has imported everything, for speed. A good run prints nothing
but its own lines. Does not prove that a config refusal is quick and needs no torch
(tests/unit/test_cli.py), nor refusals in mid-run.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT
from tools import make_quickstart

BASE = """\
model: {path: model}
data: {train: train.jsonl}
algorithm: {recipe: sft}
rollout: {num_prompts: 2, max_prompt_tokens: 32, max_response_tokens: 8}
actor: {dtype: float32, micro_batch_size: 2}
optimizer: {lr_warmup_steps: 0}
run: {dir: run, steps: 3, tensorboard: false}
"""
GOOD = [
    {"id": f"sum-{a}", "prompt": f"{a}+1=", "answer": str(a + 1), "solution": str(a + 1)} for a in range(4)
]
# a recipe that samples
ROLLOUT = ("algorithm.recipe=sc_sdpo", "actor.micro_batch_size=8")


def jsonl(*rows: object) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    """Set keys of a JSON file of the model; None drops one."""

    def change(model: Path) -> None:
        content = json.loads((model / name).read_text()) | changes
        (model / name).write_text(
            json.dumps({key: value for key, value in content.items() if value is not None})
        )

    return change


def remove(*names: str) -> Callable[[Path], None]:
    return lambda model: [(model / name).unlink() for name in names] and None


def write(name: str, content: str = "") -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)

    return change


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without(*names: str) -> Callable[[Path], None]:
    """The weights without some tensors."""

    def change(model: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        save_file({name: t for name, t in tensors.items() if name not in names}, model / "model.safetensors")

    return change


def many_ids(model: Path) -> None:
    """A tokenizer with more ids than the model's 128 embeddings."""
    content = json.loads((model / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab |= {f"extra{n}": len(vocab) + n for n in range(40)}
    (model / "tokenizer.json").write_text(json.dumps(content))


def no_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit("tokenizer_config.json", chat_template=None)(model)


def checkpoint_without_teacher(directory: Path) -> None:
    for name in (".metadata", "metadata.json", "common.pt"):
        write(f"old/{name}")(directory)
    write("old/megasd.json", '{"teacher": false, "step": 1, "prompts": {}}')(directory)


def replay_of_other_prompts(directory: Path) -> None:
    prompt = {"id": "other", "messages": [{"role": "user", "content": "?"}], "answer": "1", "solution": None}
    sample = {
        "prompt_id": "other",
        "index": 0,
        "prompt_ids": [5],
        "response_ids": [2],
        "response_logps": [0.0],
        "text": "1",
    }
    row = {
        "prompt": prompt,
        **sample,
        "finish_reason": "stop",
        "version": 0,
        "verdict": "right",
        "detail": "",
        "reward": 1.0,
    }
    for step in range(3):
        write(f"old/rollouts/step-{step:06d}.jsonl", json.dumps(row) + "\n")(directory)


def earlier_run(directory: Path) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "rollouts/step-000000.jsonl",
        "hf/config.json",
    ):
        write(f"run/{name}", f"{name} of an earlier run\n")(directory)


@dataclass
class Bad:
    """One mistake. `says` is how the line begins after "megasd: ", where " ... " stands for anything.

    In `args`, {port} is a port in use, and {server} one where something else than SGLang answers HTTP.
    """

    what: str
    says: str
    # after the YAML files
    args: tuple[str, ...] | str = ()
    # base.yaml is given
    base: bool = True
    # bad.yaml, after base.yaml
    yaml: str | bytes | None = None
    # train.jsonl
    data: bytes | None = None
    # done to the model directory
    model: Callable[[Path], None] | None = None
    # done to the working directory
    place: Callable[[Path], None] | None = None
    real: bool = False


Q = GOOD[0]
TABLE = [
    # ---- keys and values -------------------------------------------------------------------------
    Bad("nothing", "command line: data.train: is mandatory; set it in a file or add data.train=", base=False),
    Bad(
        "misspelt key",
        "command line: optimizer.learning_rate: unknown key; the keys of optimizer are lr, min_lr",
        "optimizer.learning_rate=1",
        real=True,
    ),
    Bad(
        "misspelt section", "command line: optimiser: unknown key; did you mean optimizer?", "optimiser.lr=1"
    ),
    Bad(
        "not an override", "run.steps: no such file; give the path of a YAML file, or key=value", "run.steps"
    ),
    Bad("unknown option", "unrecognized argument --steps=3; see megasd --help", "--steps=3"),
    Bad("word for a number", "command line: run.steps='many': must be an integer", "run.steps=many"),
    Bad("fraction for a count", "command line: run.steps=2.5: must be an integer", "run.steps=2.5"),
    Bad(
        "negative count",
        "command line: rollout.num_prompts=-1: must be greater than 0",
        "rollout.num_prompts=-1",
    ),
    Bad("learning rate 0", "command line: optimizer.lr=0.0: must be greater than 0", "optimizer.lr=0"),
    Bad("not a number", "command line: optimizer.lr='nan': must be a number", "optimizer.lr=nan"),
    Bad(
        "unknown choice",
        "command line: actor.dtype='fp32': must be one of float32, bfloat16",
        "actor.dtype=fp32",
    ),
    Bad(
        "unknown recipe",
        "command line: algorithm.recipe: no recipe 'scsdpo'; did you mean sc_sdpo?",
        "algorithm.recipe=scsdpo",
    ),
    Bad(
        "open host",
        "command line: rollout.engine.host='0.0.0.0': must be a loopback address",
        (*ROLLOUT, "rollout.engine.host=0.0.0.0"),
    ),
    Bad(
        "template without {solution}",
        "command line: algorithm.teacher.template='{prompt}': must hold {prompt} and {solution} once each",
        (*ROLLOUT, "algorithm.teacher.template={prompt}"),
    ),
    # ---- values together -------------------------------------------------------------------------
    Bad(
        "TP does not divide the heads",
        "actor.tensor_model_parallel_size=3: does not divide num_attention_heads=4 of model/config.json;"
        " choose a divisor",
        "actor.tensor_model_parallel_size=3",
        real=True,
    ),
    Bad(
        "PP does not divide the layers",
        "actor.pipeline_model_parallel_size=2: does not divide num_hidden_layers=3 of model/config.json;"
        " choose a divisor",
        "actor.pipeline_model_parallel_size=2",
    ),
    Bad(
        "EP of a dense model",
        "actor.expert_model_parallel_size: model is no mixture of experts (qwen3); set it to 1",
        ("rollout.num_prompts=4", "actor.expert_model_parallel_size=2"),
    ),
    Bad(
        "ranks that TP does not divide",
        "run.num_processes: 3 ranks cannot be split into TP 2 ... start a multiple of 2",
        ("run.num_processes=3", "actor.tensor_model_parallel_size=2"),
    ),
    Bad(
        "batch that the ranks do not share",
        "rollout.num_prompts: ... 3 samples a step cannot be shared by 2 ... make it a multiple of 2",
        ("rollout.num_prompts=3", "run.num_processes=2"),
    ),
    Bad(
        "microbatch that does not fit",
        "actor.micro_batch_size=3: does not divide the 2 samples ... the nearest that does is 2",
        "actor.micro_batch_size=3",
    ),
    Bad(
        "distillation without a teacher",
        "algorithm.teacher: algorithm.distill reads a teacher; give one",
        (*ROLLOUT, "algorithm.teacher=null"),
    ),
    Bad(
        "context longer than the model",
        "rollout.max_response_tokens=250: ... takes 282 tokens ... above max_position_embeddings=256 of the"
        " model; lower one",
        "rollout.max_response_tokens=250",
    ),
    Bad(
        "context longer than the engine's cache",
        "rollout.engine.max_total_tokens=16: holds not even one sample ... raise it",
        (*ROLLOUT, "rollout.engine.max_total_tokens=16"),
    ),
    Bad(
        "evaluation without rows",
        "data.eval: evaluation.every asks for held-out rows; give a JSONL file or set evaluation.every=0",
        "evaluation.every=1",
    ),
    Bad(
        "more prompts a step than rows",
        "rollout.num_prompts=8 is more than the 4 rows of data.train; lower it or add rows",
        ("rollout.num_prompts=8",),
    ),
    # ---- YAML files ------------------------------------------------------------------------------
    Bad(
        "missing YAML",
        "absent.yaml: no such file; give the path of a YAML file, or key=value",
        "absent.yaml",
        real=True,
    ),
    Bad(
        "broken YAML",
        "bad.yaml:2: not valid YAML: did not find expected ',' or '}'",
        yaml="run: {steps: 3\nmodel:\n",
    ),
    Bad(
        "tab in YAML",
        "bad.yaml:2: not valid YAML: found character that cannot start any token",
        yaml="run:\n\tsteps: 3\n",
    ),
    Bad(
        "duplicate key",
        "bad.yaml:4: not valid YAML: found duplicate key steps",
        yaml="run:\n  steps: 3\n  seed: 1\n  steps: 4\n",
    ),
    Bad(
        "YAML that is a list",
        "bad.yaml: must hold a mapping of sections (model, data, ... not a list",
        yaml="- run\n",
    ),
    Bad(
        "YAML in Latin-1",
        "bad.yaml: cannot be read as a YAML mapping: 'utf-8' codec can't decode byte",
        yaml="run: {dir: é}\n".encode("latin-1"),
    ),
    Bad(
        "number for a string",
        "bad.yaml: run.dir=2024: must be a string, and YAML reads it as int; quote it",
        yaml="run: {dir: 2024}\n",
    ),
    Bad("directory for a YAML file", "model: cannot be read as a YAML mapping: ... Is a directory", "model"),
    # ---- rows ------------------------------------------------------------------------------------
    Bad(
        "no data file", "data.train=absent.jsonl: no such file; give a JSONL file", "data.train=absent.jsonl"
    ),
    Bad(
        "directory for a data file",
        "data.train=model: not a regular file; give a JSONL file",
        "data.train=model",
        real=True,
    ),
    Bad("empty file", "train.jsonl: no rows; write one JSON object per line", data=b""),
    Bad(
        "bad JSON",
        "train.jsonl:2: not valid JSON (Expecting value); write one JSON object per line",
        data=jsonl(Q, b'{"prompt": "1+1=", "answer": \n'),
    ),
    Bad(
        "JSON array",
        "train.jsonl:1: not valid JSON (Expecting value); write one JSON object per line",
        data=b"[\n",
    ),
    Bad(
        "Latin-1",
        "train.jsonl:2: not UTF-8 (byte 12); convert the file to UTF-8",
        data=jsonl(Q, '{"prompt": "é", "answer": "1"}\n'.encode("latin-1")),
    ),
    Bad(
        "UTF-16",
        "train.jsonl:1: not UTF-8 (byte 0); convert the file to UTF-8",
        data=json.dumps(Q).encode("utf-16"),
    ),
    Bad("blank line", "train.jsonl:2: blank line; remove it", data=jsonl(Q, b"\n", GOOD[1])),
    Bad(
        "no prompt",
        'train.jsonl:2: no "prompt"; add a string or a list of messages',
        data=jsonl(Q, {"answer": "1"}),
    ),
    Bad(
        "empty answer",
        'train.jsonl:2: "answer" is empty; fill it in or drop the row',
        data=jsonl(Q, {"prompt": "1+1=", "answer": " "}),
    ),
    Bad(
        "answer that is a number",
        'train.jsonl:2: "answer" is a JSON number, not a string; quote it',
        data=jsonl(Q, {"prompt": "1+1=", "answer": 2}),
    ),
    Bad(
        "misspelt solution",
        "train.jsonl:2: unknown key 'soluton'; did you mean 'solution'? Rename it",
        data=jsonl(Q, {"prompt": "1+1=", "answer": "2", "soluton": "2"}),
    ),
    Bad(
        "no solution for sft",
        'train.jsonl:2: no "solution", which this algorithm reads; add one or drop the row',
        data=jsonl(Q, {"prompt": "1+1=", "answer": "2"}),
    ),
    Bad(
        "conversation that ends with the assistant",
        "train.jsonl:1: the last message of \"prompt\" has role 'assistant'; end with a user message",
        data=jsonl(Q | {"prompt": [{"role": "assistant", "content": "hm"}]}),
    ),
    Bad(
        "id used twice",
        "train.jsonl:3: id 'sum-0' was used on line 1; make every \"id\" unique",
        data=jsonl(Q, GOOD[1], Q),
    ),
    Bad(
        "prompt of 1 MB",
        "train.jsonl:2: row is longer than data.max_row_bytes=262144; shorten it or raise the limit",
        data=jsonl(Q, GOOD[1] | {"prompt": "1" * 1_000_000}),
    ),
    Bad(
        "prompt longer than max_prompt_tokens",
        "train.jsonl: row 'sum-1' has 43 prompt tokens, more than rollout.max_prompt_tokens=32; raise it or"
        " drop the row",
        data=jsonl(Q, GOOD[1] | {"prompt": "1" * 40}),
    ),
    Bad(
        "solution longer than max_response_tokens",
        "train.jsonl: row 'sum-1' has 41 solution tokens, more than rollout.max_response_tokens=8; raise"
        " it or",
        data=jsonl(Q, GOOD[1] | {"solution": "1" * 40}),
    ),
    Bad(
        "bad held-out row",
        'eval.jsonl:1: no "answer"; add a string',
        (*ROLLOUT, "data.eval=eval.jsonl"),
        place=write("eval.jsonl", '{"prompt": "1+1="}\n'),
    ),
    # ---- the model directory ---------------------------------------------------------------------
    Bad(
        "no model directory",
        "model.path=Qwen/Qwen3-8B: no such directory; give a Hugging Face model directory on this machine",
        "model.path=Qwen/Qwen3-8B",
    ),
    Bad(
        "no config.json",
        "model.path: model/config.json is missing; give a whole Hugging Face model directory",
        model=remove("config.json"),
    ),
    Bad(
        "config.json is not JSON",
        "model.path: model/config.json cannot be read as JSON: ... line 1 column 2",
        model=write("config.json", "{"),
    ),
    Bad(
        "no safetensors",
        "model.path=model: holds no *.safetensors; convert the weights or give another directory",
        model=remove("model.safetensors"),
    ),
    Bad(
        "missing shard",
        "model.path: model/model.safetensors.index.json names model-2.safetensors, which is missing (1 in"
        " all); download the model again",
        model=write("model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}'),
    ),
    Bad(
        "truncated safetensors",
        "model/model.safetensors: not a whole safetensors file ... fetch it again",
        model=cut,
    ),
    Bad(
        "not safetensors",
        "model/model.safetensors: not a whole safetensors file ... fetch it again",
        model=write("model.safetensors", "PK"),
    ),
    Bad(
        "missing tensor",
        "model: tensor model.layers.1.mlp.up_proj.weight is missing, which config.json asks for; fetch the"
        " directory again",
        model=without("model.layers.1.mlp.up_proj.weight"),
    ),
    Bad(
        "tensors of another shape",
        "model/model.safetensors: model.embed_tokens.weight has shape (128, 128), config.json asks for (160,"
        " 128); is config.json its own?",
        model=edit("config.json", vocab_size=160),
    ),
    Bad(
        "fewer layers in config.json",
        "model: tensor model.layers.2.input_layernorm.weight (and 10 more) belongs to no part ... is"
        " config.json its own?",
        model=edit("config.json", num_hidden_layers=2),
    ),
    Bad(
        "no tokenizer",
        "model.path=model: holds no tokenizer (none of tokenizer.json, tokenizer.model, ... copy the"
        " model's own",
        model=remove("tokenizer.json"),
    ),
    Bad(
        "damaged tokenizer",
        "model: the tokenizer does not load ... copy its files again",
        model=write("tokenizer.json", "{}"),
    ),
    Bad(
        "tokenizer of another model",
        "model: the tokenizer has 142 ids and the model's vocabulary 128; put the model's own tokenizer"
        " there",
        model=many_ids,
    ),
    Bad(
        "no chat template",
        "model: the tokenizer has no chat template; use an instruct model or add chat_template.jinja",
        model=no_template,
    ),
    Bad(
        "unsupported model",
        "model.path: model/config.json says model_type='gemma3'; supported are qwen2, qwen3, qwen3_moe,"
        " llama, mistral, olmo2, olmo3",
        model=edit("config.json", model_type="gemma3"),
    ),
    Bad(
        "rope scaling",
        "model/config.json: rope_parameters={'rope_type': 'dynamic', ... is not supported: rope_type one of",
        model=edit("config.json", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
    ),
    Bad(
        "rope scaling, old key",
        "model/config.json: rope_scaling={'rope_type': 'yarn', ... is not supported: rope_parameters says it"
        " too; remove one of the two",
        model=edit("config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    ),
    Bad(
        "quantised model",
        "model/config.json: quantization_config={'bits': 4} is not supported: take the float checkpoint",
        model=edit("config.json", quantization_config={"bits": 4}),
    ),
    Bad(
        "missing tensor, two ranks",
        "model: tensor model.norm.weight is missing, which config.json asks for; fetch the directory again",
        "actor.tensor_model_parallel_size=2",
        model=without("model.norm.weight"),
        real=True,
    ),
    # ---- run directories, checkpoints, replays ---------------------------------------------------
    Bad(
        "run.dir of an earlier run",
        "run.dir=run: already holds a run (config.yaml); set run.resume=auto, run.overwrite=true or another"
        " run.dir",
        place=earlier_run,
        real=True,
    ),
    Bad(
        "bad row before an earlier run is overwritten",
        "train.jsonl:2: not valid JSON",
        "run.overwrite=true",
        data=jsonl(Q, b"{\n"),
        place=earlier_run,
    ),
    Bad(
        "bad model before an earlier run is overwritten",
        "model/model.safetensors: not a whole safetensors file",
        "run.overwrite=true",
        model=cut,
        place=earlier_run,
    ),
    Bad(
        "file for a run.dir",
        "run.dir=run: run is not a directory that can be written to; choose another",
        place=write("run", "a file\n"),
    ),
    Bad(
        "file above run.dir",
        "run.dir=train.jsonl/run: ... train.jsonl is not a directory that can be written to; choose another",
        "run.dir=train.jsonl/run",
    ),
    Bad(
        "resume and overwrite",
        "run.overwrite: a run cannot be resumed (run.resume=auto) and overwritten at once; drop one of"
        " the two",
        ("run.resume=auto", "run.overwrite=true"),
    ),
    Bad(
        "resume from nowhere",
        "run.resume=absent: no such checkpoint directory; give one, or none, or auto",
        "run.resume=absent",
    ),
    Bad(
        "resume from another directory",
        "run.resume: model is not a whole checkpoint (no megasd.json); give a directory like",
        "run.resume=model",
    ),
    Bad(
        "resume without the teacher",
        "run.resume: old holds no teacher, and algorithm.teacher.weights=ema needs one; set it to live, or",
        (*ROLLOUT, "run.resume=old"),
        place=checkpoint_without_teacher,
    ),
    Bad(
        "no replay_dir",
        "rollout.replay_dir=absent: holds no rollouts/; give the run.dir of a finished run",
        (*ROLLOUT, "rollout.replay_dir=absent"),
    ),
    Bad(
        "replay of a shorter run",
        "rollout.replay_dir: old/rollouts/step-000001.jsonl is missing; lower run.steps=3",
        (*ROLLOUT, "rollout.replay_dir=old"),
        place=write("old/rollouts/step-000000.jsonl"),
    ),
    Bad(
        "replay of other prompts",
        "rollout.replay_dir: old/rollouts/step-000000.jsonl holds other prompts ... replay with the same"
        " data.train and run.seed",
        (*ROLLOUT, "rollout.replay_dir=old"),
        place=replay_of_other_prompts,
    ),
    # ---- engines ---------------------------------------------------------------------------------
    Bad(
        "port in use",
        "rollout.engine.port: 127.0.0.1: ... cannot be bound (Address already in use); give another port, or"
        " 0 for a free one",
        (*ROLLOUT, "rollout.engine.port={port}"),
    ),
    Bad(
        "secret in the engine's arguments",
        "rollout.engine.extra_args: --api-key would show in process lists and logs; a started engine needs"
        " none",
        (*ROLLOUT, "rollout.engine.extra_args=[--api-key, hush]"),
    ),
    Bad(
        "URL without http",
        "command line: rollout.engine.urls=['localhost:30000']: each must be http://HOST:PORT",
        (*ROLLOUT, "rollout.engine.urls=['localhost:30000']"),
    ),
    Bad(
        "nobody at the URL",
        "rollout.engine.urls: no SGLang server answers there (http://127.0.0.1:9/model_info: ... start it"
        " first, or leave the list empty",
        (*ROLLOUT, "rollout.engine.urls=['http://127.0.0.1:9']"),
    ),
    Bad(
        "another server at the URL",
        "rollout.engine.urls: no SGLang server answers there ... which is no JSON ... start it first, or"
        " leave the list empty",
        (*ROLLOUT, "rollout.engine.urls=['http://127.0.0.1:{server}']"),
    ),
]


class Website(http.server.BaseHTTPRequestHandler):
    """Answers everything, with HTML."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, str]]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Website) as server, socket.socket() as taken:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield {"{port}": str(taken.getsockname()[1]), "{server}": str(server.server_port)}
        server.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, forks: multiprocessing.context.BaseContext) -> Path:
    directory = tmp_path_factory.mktemp("start") / "model"
    for function, arguments in (
        (make_quickstart.write_tokenizer, (directory,)),
        (make_quickstart.write_model, (directory, 1)),
    ):
        process = forks.Process(target=function, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode == 0
    return directory


@pytest.fixture
def here(tmp_path: Path, model: Path) -> Path:
    """A working directory in which `megasd train base.yaml` trains."""
    directory = tmp_path / "here"
    shutil.copytree(model, directory / "model")
    (directory / "base.yaml").write_text(BASE)
    (directory / "train.jsonl").write_bytes(jsonl(*GOOD))
    return directory


@pytest.fixture(scope="module")
def forks() -> Iterator[multiprocessing.context.BaseContext]:
    """Processes that begin with everything imported: a row then costs what the product does, not
    what torch's import does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["megasd.train", "megasd.cli", "transformers.models.auto.tokenization_auto"]
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        yield context


def environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONWARNINGS")
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def in_fork(directory: str, argv: list[str]) -> None:
    """The body of a fork: `megasd` with its output in files."""
    from megasd import cli

    os.chdir(directory)
    for descriptor, name in ((1, "../out"), (2, "../err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.exit(cli.main(argv))


def run_fork(forks: multiprocessing.context.BaseContext) -> Callable[[Path, list[str]], tuple[int, str, str]]:
    def run(here: Path, argv: list[str]) -> tuple[int, str, str]:
        process = forks.Process(target=in_fork, args=(str(here), argv))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
        return process.exitcode, (here.parent / "out").read_text(), (here.parent / "err").read_text()

    return run


def run_real(here: Path, argv: list[str]) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "megasd.cli", *argv]
    done = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True, timeout=1500)
    return done.returncode, done.stdout, done.stderr


def contents(directory: Path) -> dict[str, str]:
    """Every path below a directory, and a hash of every file."""
    found = sorted(directory.rglob("*"))
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
        for p in found
    }


@pytest.mark.parametrize("bad", TABLE, ids=[bad.what for bad in TABLE])
def test_bad_input(
    bad: Bad, here: Path, ports: dict[str, str], forks: multiprocessing.context.BaseContext
) -> None:
    if bad.data is not None:
        (here / "train.jsonl").write_bytes(bad.data)
    if bad.yaml is not None:
        (here / "bad.yaml").write_bytes(bad.yaml if isinstance(bad.yaml, bytes) else bad.yaml.encode())
    for change, where in ((bad.model, here / "model"), (bad.place, here)):
        if change is not None:
            change(where)
    before = contents(here)

    args = [bad.args] if isinstance(bad.args, str) else list(bad.args)
    argv = ["train", *["base.yaml"] * bad.base, *["bad.yaml"] * (bad.yaml is not None), *args]
    for name, port in ports.items():
        argv = [item.replace(name, port) for item in argv]
    code, out, err = (run_real if bad.real else run_fork(forks))(here, argv)

    lines = err.splitlines()
    assert len(lines) == 1, err
    assert re.search(
        r"^megasd: " + ".*".join(re.escape(part) for part in bad.says.split(" ... ")), lines[0]
    ), lines[0]
    assert (code, out) == (2, "")
    assert contents(here) == before


def test_a_good_run_prints_only_its_own_lines(here: Path) -> None:
    """What libraries say of themselves is filtered (cli.py); two ranks, a checkpoint, an export and
    TensorBoard.
    """
    argv = ["train", "base.yaml", "actor.tensor_model_parallel_size=2", "run.tensorboard=true"]
    code, out, err = run_real(here, argv)
    assert (code, err) == (0, ""), err
    *steps, last = out.splitlines()
    assert [re.match(r"step (\d)/3 .*loss", line)[1] for line in steps] == ["1", "2", "3"], out
    assert re.fullmatch(r"3 steps, \d+ s; everything is in run", last)
