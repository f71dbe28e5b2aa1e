"""Proves that a config is exactly its dataclasses (merge order, types, names, ranges) and that what
cannot run is refused in one line that names the key and what to do. Does not prove that what is
accepted trains: models here are empty files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from megasd.algo.recipes import RECIPES
from megasd.config.bounds import bound_of
from megasd.config.load import _types, load_config, to_yaml
from megasd.config.schema import Config, ConfigError, DistillTerm, samples_per_step
from megasd.config.validate import validate
from megasd.config.validate_actor import sequence_multiple
from megasd.config.validate_parallel import data_parallel_size, default_world_size
from megasd.config.values import walk
from tests.unit.fake_model import MOE, write_inputs, write_model

ROOT = Path(__file__).resolve().parents[3]
PATHS = ["model.path=m", "data.train=d"]


def load(*overrides: str, files: list[str] | None = None) -> Config:
    return load_config(files or [], [*PATHS, *overrides], RECIPES)


def refusal(*arguments, call=load, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


# --- merging ---


def test_order_is_defaults_recipe_files_overrides(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("algorithm: {recipe: sdpo, distill: {beta: 0.1, top_k: 7}}\nrun: {steps: 3}\n")
    second.write_text("algorithm: {distill: {beta: 0.2}}\nrun: {steps: 4}\n")
    config = load("run.steps=5", files=[str(first), str(second)])
    assert config.algorithm.distill == DistillTerm(beta=0.2, top_k=7)
    # the row of sdpo, not the default sc_sdpo
    assert config.algorithm.question_weight.kind == "none"
    assert (config.run.steps, config.run.seed) == (5, 1)


def test_default_recipe_and_rows_are_not_shared():
    config = load("algorithm.distill.beta=0.25")
    assert config.algorithm.recipe == "sc_sdpo" and config.algorithm.question_weight.kind == "sqrt_pq"
    assert RECIPES["sc_sdpo"].distill.beta == 0.5


def test_null_switches_a_term_off_and_a_key_below_builds_it():
    assert load("algorithm.distill=null").algorithm.distill is None
    assert load("algorithm.distill=null", "algorithm.distill.beta=0.1").algorithm.distill == DistillTerm(
        beta=0.1
    )
    assert load("algorithm.nll.coefficient=0.5").algorithm.nll.coefficient == 0.5
    assert load("algorithm.distill={beta: 0.2}").algorithm.distill.beta == 0.2
    assert load("algorithm.tis_clip=null").algorithm.tis_clip is None


def test_string_overrides_are_taken_as_written():
    config = load(
        "run.dir=no", "model.path=0123", "data.eval=null", "run.resume='auto'", "rollout.stop=['no', b]"
    )
    assert (config.run.dir, config.model.path, config.data.eval, config.run.resume) == (
        "no",
        "0123",
        None,
        "auto",
    )
    assert config.rollout.stop == ["no", "b"]


def test_numbers_and_references(tmp_path):
    config = load("optimizer.lr=1e-6", "optimizer.weight_decay=1", "run.dir=${model.path}/run")
    assert config.optimizer.lr == 1e-6 and config.run.dir == "m/run"
    assert isinstance(config.optimizer.weight_decay, float)


@pytest.mark.parametrize("recipe", RECIPES)
def test_yaml_reads_back_equal(recipe, tmp_path):
    config = load(f"algorithm.recipe={recipe}", "optimizer.lr=1e-6", "data.eval=no")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config([str(path)], [], RECIPES) == config


def test_every_number_has_a_bound():
    def unbounded(cls: type, prefix: str = "") -> Iterator[str]:
        for item in fields(cls):
            kind = _types(cls)[item.name][0]
            if is_dataclass(kind):
                yield from unbounded(kind, f"{prefix}{item.name}.")
            elif kind in (int, float) and bound_of(item) is None:
                yield prefix + item.name

    assert list(unbounded(Config)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_files_load(path):
    assert load(files=[str(path)])


# --- one bad value: the source, the key, the rule ---

BAD_OVERRIDES = {
    "algorithm.distill.betta=0.1": (
        "command line: algorithm.distill.betta: unknown key; did you mean algorithm.distill.beta?"
    ),
    "algorthm.recipe=sdpo": "command line: algorthm: unknown key; did you mean algorithm?",
    "lr=1": "command line: lr: unknown key; did you mean optimizer.lr?",
    "zzz.yyy=1": "the keys of the top level are model, data, algorithm",
    "rollout=": "rollout: is empty; its keys are num_prompts",
    "rollout=8": "rollout: must be a section of keys, not 8",
    "run.steps.x=1": "run.steps={'x': 1}: must be an integer",
    "steps": "command line: 'steps' is not an override; write section.key=value",
    ".steps=1": "is not an override",
    "run.steps=many": "run.steps='many': must be an integer",
    "run.steps=2.5": "run.steps=2.5: must be an integer",
    "run.steps=true": "run.steps=True: must be an integer",
    "run.steps=null": "run.steps=None: must be an integer",
    "run.steps=[1": "run.steps: '[1' is not a YAML value",
    "run.steps=0": "run.steps=0: must be greater than 0",
    "run.tensorboard=1": "run.tensorboard=1: must be true or false",
    "run.dir=": "run.dir='': must not be empty",
    "run.seed=-1": "run.seed=-1: must lie in [0, 2**31)",
    "run.seed=${rollout.num_prompt}": (
        "command line: run.seed: Interpolation key 'rollout.num_prompt' not found"
    ),
    "optimizer.lr=0": "optimizer.lr=0.0: must be greater than 0",
    "optimizer.lr=.nan": "optimizer.lr=nan: must be a finite number",
    "optimizer.lr=fast": "optimizer.lr='fast': must be a number",
    "optimizer.lr_decay_style=cosin": "must be one of constant, linear, cosine; did you mean cosine?",
    "algorithm.recipe=sc_sdp": "command line: algorithm.recipe: no recipe 'sc_sdp'; did you mean sc_sdpo?",
    "algorithm.recipe=zzz": "choose one of sft, ssd, grpo",
    "algorithm.distill.beta=1.5": "algorithm.distill.beta=1.5: must lie in [0, 1]",
    "algorithm.distill.is_clip=0": "algorithm.distill.is_clip=0.0: must be greater than 0",
    "algorithm.distill.is_clip=x": "must be a number (or null)",
    "algorithm.distill.top_k=0": "algorithm.distill.top_k=0: must be greater than 0",
    "algorithm.distill.support=sampled": "must be one of student, teacher, union, full",
    "algorithm.teacher.ema_rate=0": "algorithm.teacher.ema_rate=0.0: must lie in (0, 1]",
    "algorithm.teacher.template={prompt}": "must hold {prompt} and {solution} once each",
    "rollout.temperature=0": "rollout.temperature=0.0: must be greater than 0",
    "rollout.top_p=1.1": "rollout.top_p=1.1: must lie in (0, 1]",
    "rollout.top_k=0": "rollout.top_k=0: must be -1 (off) or greater than 0",
    "rollout.num_samples=-8": "rollout.num_samples=-8: must be greater than 0",
    "rollout.stop=end": "rollout.stop='end': must be a list, as in [a, b]",
    "rollout.stop=[a, no]": "the entry False must be a string; quote it",
    "rollout.engine.port=70000": "rollout.engine.port=70000: must be 0 (a free port) or lie in [1024, 65535]",
    "rollout.engine.host=0.0.0.0": "rollout.engine.host='0.0.0.0': must be a loopback address",
    "rollout.engine.urls=[localhost]": "each must be http://HOST:PORT",
    "actor.dtype=float16": "actor.dtype='float16': must be one of float32, bfloat16; did you mean bfloat16?",
    "actor.recompute_granularity=half": "must be one of full, selective (or null)",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_override(override):
    message = refusal(override)
    assert message.startswith("command line: ") and BAD_OVERRIDES[override] in message


BAD_FILES = {
    "run: {steps: 1}\nrun: {steps: 2}\n": "bad.yaml:2: not valid YAML: found duplicate key run",
    "run: {steps: 1, steps: 2}\n": "bad.yaml:1: not valid YAML: found duplicate key steps",
    "run: [1\n": "bad.yaml:2: not valid YAML",
    "run:\n\tsteps: 1\n": "bad.yaml:2: not valid YAML: found character that cannot start any token",
    "5\n": "bad.yaml: cannot be read as a YAML mapping",
    "- run\n": "bad.yaml: must hold a mapping of sections (model, data",
    "run:\n": "bad.yaml: run: is empty; its keys are dir",
    "run: {dir: no}\n": "bad.yaml: run.dir=False: must be a string, and YAML reads it as bool; quote it",
    "run: {dir: 2024}\n": "bad.yaml: run.dir=2024: must be a string, and YAML reads it as int; quote it",
    "run: {stepps: 3}\n": "bad.yaml: run.stepps: unknown key; did you mean run.steps?",
    "run.steps: 3\n": "nest it under its section",
    "run: {on: 3}\n": "bad.yaml: run.True: unknown key; YAML reads it as bool, and keys are strings",
    "algorithm: {recipe: nope}\n": "bad.yaml: algorithm.recipe: no recipe 'nope'",
    "algorithm: {distill: {beta: 2}}\n": "bad.yaml: algorithm.distill.beta=2.0: must lie in [0, 1]",
    "actor: {dtype: on}\n": "bad.yaml: actor.dtype=True: must be one of float32, bfloat16",
    "model: {path: '${nothing.here}'}\n": "bad.yaml: model.path: Interpolation key 'nothing.here' not found",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_file(text, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refusal([str(path)], [] if "path" in text else PATHS, RECIPES, call=load_config)
    assert message.startswith(f"{tmp_path}/") and BAD_FILES[text] in message


def test_missing_file_and_directory(tmp_path):
    assert "absent.yaml: no such file; give the path of a YAML file" in refusal(files=["absent.yaml"])
    assert "cannot be read as a YAML mapping" in refusal(files=[str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: \xe9\xff}\n")
    assert "latin.yaml" in refusal(files=[str(tmp_path / "latin.yaml")])


def test_mandatory_values(tmp_path):
    template = tmp_path / "template.yaml"
    template.write_text('model: {path: "???"}\n')
    assert "template.yaml: model.path: is mandatory; set it" in refusal(
        [str(template)], ["data.train=d"], RECIPES, call=load_config
    )
    assert load(files=[str(template)]).model.path == "m"
    assert "command line: data.train: is mandatory" in refusal(
        [], ["model.path=m"], RECIPES, call=load_config
    )


# --- values that do not go together ---


def check(tmp_path, *overrides: str, world_size: int | None = None, rank: int = 0, **model: object) -> Config:
    overrides = [text.replace("{model}", str(tmp_path / "model")) for text in overrides]
    config = load_config([], [*write_inputs(tmp_path, **model), *overrides], RECIPES)
    validate(config, world_size, rank=rank)
    return config


TP, PP, CP, EP = (f"actor.{n}_model_parallel_size" for n in ("tensor", "pipeline", "context", "expert"))
CP = "actor.context_parallel_size"
BAD_TOGETHER = [
    (["algorithm.teacher=null"], "algorithm.teacher: algorithm.distill reads a teacher; give one"),
    (
        ["algorithm.distill=null", "algorithm.policy_gradient.coefficient=1"],
        "algorithm.teacher: no term reads the teacher",
    ),
    (["algorithm.distill=null", "algorithm.teacher=null"], "algorithm: no term to train on"),
    (
        ["algorithm.source=dataset"],
        "algorithm.question_weight.kind=sqrt_pq: algorithm.source=dataset has rows without pass rates",
    ),
    (
        ["algorithm.recipe=sdpo", "algorithm.source=dataset"],
        "algorithm.tis_clip: algorithm.source=dataset has rows that no engine sampled",
    ),
    (
        ["algorithm.recipe=rlsd", "algorithm.teacher=null"],
        "algorithm.teacher: algorithm.policy_gradient.credit reads a teacher",
    ),
    (
        ["algorithm.recipe=gkd"],
        "algorithm.teacher.model_path=None: goes with algorithm.teacher.weights=separate",
    ),
    (
        ["algorithm.distill.divergence=adaptive", "algorithm.distill.support=full"],
        "algorithm.distill.divergence=adaptive: weighs buckets",
    ),
    (
        ["algorithm.recipe=grpo", "algorithm.policy_gradient.advantage=none"],
        "advantage=none: nothing is left to learn from",
    ),
    (
        ["algorithm.recipe=grpo", "algorithm.policy_gradient.samples=undistilled"],
        "there is no algorithm.distill to leave samples",
    ),
    (
        ["algorithm.recipe=rlcsd", "algorithm.teacher.contrast=none"],
        "algorithm.teacher.contrast: credit rlcsd contrasts two teachers",
    ),
    (
        ["algorithm.teacher.context=prompt", "algorithm.teacher.weights=live"],
        "a live teacher that reads the student's own prompt",
    ),
    (
        ["algorithm.teacher.adaptive_prefix=true"],
        "algorithm.teacher.adaptive_prefix: moves the share shown by context=prefix",
    ),
    (
        ["algorithm.question_weight.normaliser=dataset"],
        "asks for the rates of all rows; set pass_rate=frozen",
    ),
    (["algorithm.tis_mode=mask", "algorithm.tis_clip=null"], "algorithm.tis_mode=mask: needs an upper bound"),
    (["algorithm.minibatches=33"], "algorithm.minibatches=33: exceeds the rollout.num_prompts=32"),
    (
        ["algorithm.distill.skip_tokens=9", "algorithm.distill.max_tokens=9"],
        "leaves nothing of the first max_tokens=9",
    ),
    (
        ["algorithm.overlong_buffer=1024"],
        "algorithm.overlong_buffer=1024: must be smaller than rollout.max_response_tokens",
    ),
    (
        ["rollout.frozen_policy=true", "evaluation.every=5"],
        "the engine keeps the start model until the end; set evaluation.every=0",
    ),
    (
        ["algorithm.recipe=grpo", "algorithm.source=dataset"],
        "algorithm.policy_gradient: learns from sampled responses",
    ),
    (
        ["algorithm.recipe=sft", "algorithm.question_weight.kind=pq"],
        "algorithm.question_weight.kind=pq: algorithm.source=dataset has rows",
    ),
    (
        ["algorithm.teacher.transport=record"],
        "algorithm.teacher.transport=record: holds the teacher's own top tokens",
    ),
    (["algorithm.nll.context_fraction=0.5"], "algorithm.nll.context_fraction: needs the rows' solutions"),
    (
        ["algorithm.recipe=rlcsd", "algorithm.policy_gradient.advantage=none"],
        "advantage=none: nothing is left to learn from",
    ),
    (
        ["algorithm.recipe=rlcsd", "algorithm.teacher.context=prompt"],
        "algorithm.teacher.context=prompt: shows nothing for credit rlcsd",
    ),
    (
        ["algorithm.recipe=rlsd", "algorithm.teacher.contrast=failures"],
        "algorithm.teacher.contrast=failures: only the credits rlcsd and cepo",
    ),
    (
        ["algorithm.teacher.contrast=wrong_answer"],
        "algorithm.teacher.contrast=wrong_answer: only the credits rlcsd and cepo read it",
    ),
    (
        ["algorithm.distill.samples=positive"],
        "algorithm.distill.samples=positive: there is no algorithm.policy_gradient to give advantages",
    ),
    (
        [
            "algorithm.recipe=grpo",
            "algorithm.question_weight.kind=pq",
            "algorithm.question_weight.terms=distill",
        ],
        "terms=distill: there is no",
    ),
    (
        ["rollout.num_samples=1"],
        (
            "algorithm.teacher.context=first_success: reads other samples of a question, and with"
            " rollout.num_samples=1"
        ),
    ),
    (
        ["algorithm.recipe=sdpo", "algorithm.source=dataset", "algorithm.tis_clip=null"],
        (
            "algorithm.teacher.context=first_success: reads other samples of a question, and with"
            " algorithm.source=dataset there are none"
        ),
    ),
    (
        ["algorithm.recipe=rlcsd", "algorithm.teacher.context=answer", "rollout.num_samples=1"],
        "algorithm.teacher.contrast=failures: reads other samples of a question",
    ),
    (
        ["algorithm.recipe=grpo", "algorithm.question_weight.kind=sqrt_pq", "rollout.num_samples=1"],
        (
            "algorithm.question_weight.kind=sqrt_pq: is 0 for the pass rates 0 and 1, and with"
            " rollout.num_samples=1"
        ),
    ),
    (
        ["algorithm.recipe=grpo", "algorithm.question_weight.kind=band", "rollout.num_samples=1"],
        "algorithm.question_weight.kind=band: is 0 for the pass rates 0 and 1",
    ),
    (
        ["algorithm.recipe=grpo", "rollout.dynamic_sampling=true", "rollout.num_samples=1"],
        "rollout.dynamic_sampling: looks for questions",
    ),
    (
        ["algorithm.recipe=sft", "rollout.dynamic_sampling=true"],
        "rollout.dynamic_sampling: asks for samples of every question",
    ),
    (
        ["algorithm.recipe=gkd", "algorithm.teacher.model_path={model}", "rollout.dynamic_sampling=true"],
        (
            "rollout.dynamic_sampling: asks for samples of every question, and algorithm.source=mixed brings"
            " rows"
        ),
    ),
    (
        ["algorithm.recipe=cispo", "algorithm.policy_gradient.dual_clip=3"],
        "algorithm.policy_gradient.dual_clip: is of ppo and gspo, and the surrogate is cispo",
    ),
    (
        [
            "algorithm.recipe=gkd",
            "algorithm.teacher.model_path={model}",
            "algorithm.policy_gradient.coefficient=1",
        ],
        (
            "algorithm.policy_gradient: learns from sampled responses, and algorithm.source=mixed has rows"
            " among them"
        ),
    ),
    (
        [
            "algorithm.teacher.transport=record",
            "algorithm.distill.support=teacher",
            "algorithm.teacher.weights=trust_region",
        ],
        "algorithm.teacher.transport=record: is of one model's logits",
    ),
    (
        [
            "algorithm.recipe=sft",
            "algorithm.minibatches=16",
            "run.num_processes=4",
            "actor.micro_batch_size=1",
        ],
        "algorithm.minibatches=16: leaves 2 samples in the smallest, fewer than the 4 data-parallel ranks",
    ),
    (["optimizer.min_lr=1"], "optimizer.min_lr=1.0: exceeds optimizer.lr=1e-05"),
    (
        ["optimizer.lr_decay_style=cosine", "run.steps=10"],
        "optimizer.lr_warmup_steps=10: cosine decay over run.steps=10 never begins",
    ),
    (["evaluation.every=5"], "data.eval: evaluation.every asks for held-out rows"),
    (
        ["rollout.engine.max_total_tokens=2047"],
        "rollout.engine.max_total_tokens=2047: holds not even one sample",
    ),
    ([f"{TP}=3"], f"{TP}=3: does not divide num_attention_heads=8"),
    ([f"{PP}=3"], f"{PP}=3: does not divide num_hidden_layers=4"),
    ([f"{EP}=2"], "actor.expert_model_parallel_size: "),
    (["actor.sequence_parallel=true"], "actor.sequence_parallel: needs actor.tensor_model_parallel_size > 1"),
    (
        ["run.num_processes=3", f"{TP}=2"],
        "run.num_processes: 3 ranks cannot be split into TP 2 x PP 1 x CP 1; start a multiple of 2",
    ),
    (["run.num_processes=3"], "= 256 samples a step cannot be shared by 3 data-parallel ranks"),
    (
        ["actor.micro_batch_size=7"],
        (
            "actor.micro_batch_size=7: does not divide the 256 samples of a data-parallel rank; the nearest"
            " that does is 4"
        ),
    ),
    (["rollout.num_prompts=1", "actor.micro_batch_size=16"], "the nearest that does is 8"),
    (
        [f"{CP}=2", "rollout.max_response_tokens=1001", "actor.max_tokens_per_microbatch=2027"],
        (
            "actor.max_tokens_per_microbatch=2027: holds not even one sample of rollout.max_prompt_tokens +"
            " rollout.max_response_tokens = 2028 (padded to 4); raise it"
        ),
    ),
    (
        ["rollout.max_response_tokens=3073"],
        "a sequence takes 4097 tokens (padded to 1), above max_position_embeddings=4096",
    ),
    ([f"{CP}=2", "rollout.max_response_tokens=3073"], "a sequence takes 4100 tokens (padded to 4)"),
    (
        ["evaluation.max_response_tokens=4000"],
        "evaluation.max_response_tokens=4000: with rollout.max_prompt_tokens=1024 it exceeds",
    ),
    (["model.path=/nowhere"], "model.path=/nowhere: no such directory"),
    (["data.train=/nowhere.jsonl"], "data.train=/nowhere.jsonl: no such file"),
    (["data.eval=/nowhere.jsonl"], "data.eval=/nowhere.jsonl: no such file"),
    (["rollout.replay_dir=/nowhere"], "rollout.replay_dir=/nowhere: holds no rollouts/"),
    (
        ["run.resume=/nowhere"],
        "run.resume=/nowhere: no such checkpoint directory; give one, or none, or auto",
    ),
    (["run.resume=auto", "run.overwrite=true"], "run.overwrite: a run cannot be resumed"),
    (["sync.delta=true"], "sync.delta: a file holds the whole model; take sync.transport=group or colocated"),
    (
        ["sync.transport=colocated", "rollout.engine.urls=[http://10.0.0.7:30000]"],
        "sync.transport=colocated: http://10.0.0.7:30000 is not on this machine",
    ),
    (["rollout.engine.model_path=/nowhere"], "rollout.engine.model_path: /nowhere holds no config.json"),
    (
        ["rollout.engine.served=2", "rollout.engine.urls=[http://a:1]"],
        "rollout.engine.urls names engines already; keep one of the two",
    ),
    (
        ["rollout.engine.served=2", "rollout.engine.num_engines=2"],
        "with rollout.engine.served the run starts none; set it to 1",
    ),
    (
        ["rollout.engine.num_engines=2", "rollout.engine.port=65535"],
        "rollout.engine.port=65535: leaves no ports for 2 engines",
    ),
    (["rollout.engine.urls=[http://a:1,http://a:1/]"], "names one engine twice"),
    (["evaluation.max_response_tokens=99999"], "evaluation.max_response_tokens = "),
    (
        ["rollout.engine.release_memory=true", "rollout.engine.urls=[http://a:1]"],
        "are not the run's to empty; set it to false",
    ),
    (
        ["rollout.engine.served=2", "sync.transport=colocated"],
        "the engines of rollout.engine.served are on other machines",
    ),
    (
        ["rollout.frozen_policy=true", "rollout.engine.release_memory=true"],
        "nothing gives the engine its weights back",
    ),
    (
        ["rollout.overlap=1", "rollout.engine.release_memory=true"],
        "the engine samples while the actor trains under rollout.engine.release",
    ),
    (["rollout.overlap=1", "algorithm.tis_clip=null"], "set algorithm.tis_clip (2.0), or rollout.overlap=0"),
    (
        ["rollout.overlap=1", "algorithm.recipe=sft"],
        "rollout.overlap=1: algorithm.source=dataset learns rows; set it to 0",
    ),
    (
        ["rollout.overlap=1", "rollout.frozen_policy=true"],
        "samples of the start model are of no step under rollout.frozen_policy",
    ),
    (["run.dir=/dev/null/run"], "run.dir=/dev/null/run: /dev/null is not a directory that can be written to"),
]


@pytest.mark.parametrize("overrides, expected", BAD_TOGETHER, ids=[" ".join(o) for o, _ in BAD_TOGETHER])
def test_bad_together(overrides, expected, tmp_path):
    assert expected in refusal(tmp_path, *overrides, call=check)


def test_torchrun_world_size_against_config(tmp_path):
    assert "run.num_processes=4: torchrun started 2 ranks" in refusal(
        tmp_path, "run.num_processes=4", world_size=2, call=check
    )
    assert "1 ranks cannot be split into TP 2" in refusal(tmp_path, f"{TP}=2", world_size=1, call=check)


BAD_MODELS = [
    ({"model_type": "gpt2"}, [], "says model_type='gpt2'; supported are qwen2, qwen3, qwen3_moe, llama"),
    ({"model_type": "olmo2"}, [f"{TP}=8"], "normalises all key heads together"),
    ({"model_type": "mistral", "sliding_window": 64}, [], "sliding_window=64, which SGLang does not apply"),
    (
        {"model_type": "olmo3", "rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
        [],
        "rope_parameters by layer type",
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.3}},
        [],
        "attention_factor=1.3, of which SGLang knows only",
    ),
    ({"num_attention_heads": None}, [], "num_attention_heads must be a positive integer, not None"),
    ({"num_key_value_heads": 3}, [f"{TP}=2"], "is neither a divisor nor a multiple of num_key_value_heads=3"),
    ({"intermediate_size": 63}, [f"{TP}=2"], f"{TP}=2: does not divide intermediate_size=63"),
    ({**MOE}, [f"{EP}=4"], f"{EP}=4: does not divide num_experts=6"),
    (
        {**MOE},
        [f"{EP}=2", f"{TP}=2"],
        "actor.sequence_parallel: Megatron trains a mixture of experts under TP only with it",
    ),
]


@pytest.mark.parametrize("model, overrides, expected", BAD_MODELS, ids=[str(m) for m, _, _ in BAD_MODELS])
def test_bad_model(model, overrides, expected, tmp_path):
    assert expected in refusal(tmp_path, *overrides, call=check, **model)


BAD_TEACHERS = [
    (
        None,
        [],
        "algorithm.teacher.model_path={teacher}: no such directory; give a Hugging Face model directory",
    ),
    (
        {"model_type": "gpt2"},
        [],
        "algorithm.teacher.model_path: {teacher}/config.json says model_type='gpt2'",
    ),
    (
        {"num_attention_heads": 9},
        [f"{TP}=2"],
        f"algorithm.teacher.model_path: {TP}=2: does not divide num_attention_heads=9",
    ),
    (
        {"num_hidden_layers": 5},
        [f"{PP}=2"],
        f"algorithm.teacher.model_path: {PP}=2: does not divide num_hidden_layers=5",
    ),
    (
        {**MOE, "num_experts": 5},
        [f"{EP}=2"],
        f"algorithm.teacher.model_path: {EP}=2: does not divide num_experts=5",
    ),
    ({}, [f"{EP}=2"], "algorithm.teacher.model_path: actor.expert_model_parallel_size: "),
    (
        {"max_position_embeddings": 2047},
        [],
        "takes sequences of max_position_embeddings=2047, and rollout.max_prompt_tokens + ",
    ),
]


@pytest.mark.parametrize(
    "teacher, overrides, expected", BAD_TEACHERS, ids=[str(t) for t, _, _ in BAD_TEACHERS]
)
def test_bad_separate_teacher(teacher, overrides, expected, tmp_path):
    """A dense or a sparse student that the ranks can hold; the teacher is what they cannot."""
    path = tmp_path / "teacher"
    if teacher is not None:
        write_model(path, **teacher)
    given = ["algorithm.recipe=tml_opd", f"algorithm.teacher.model_path={path}", *overrides]
    student = MOE if f"{EP}=2" in overrides else {}
    assert expected.replace("{teacher}", str(path)) in refusal(tmp_path, *given, call=check, **student)
    write_model(path, **student)
    check(tmp_path, *given, **student)


def test_what_engines_read_passes(tmp_path):
    published = {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836}
    for number, changes in enumerate(
        (
            {"model_type": "mistral", "sliding_window": 4096},
            {"model_type": "olmo3", "rope_scaling": published},
        )
    ):
        check(tmp_path / str(number), **changes)


def test_model_files(tmp_path):
    config = check(tmp_path)
    model = Path(config.model.path)

    def after(change) -> str:
        change()
        return refusal(config, call=validate)

    index = model / "model.safetensors.index.json"
    shards = {"a": "model-1.safetensors", "b": "model.safetensors"}
    assert "names model-1.safetensors, which is missing" in after(
        lambda: index.write_text(json.dumps({"weight_map": shards}))
    )
    assert "holds no weight_map" in after(lambda: index.write_text("{}"))
    index.unlink()
    assert "holds no *.safetensors" in after((model / "model.safetensors").unlink)
    (model / "model.safetensors").touch()
    assert "holds no tokenizer" in after((model / "tokenizer.json").unlink)
    assert "config.json cannot be read as JSON" in after(lambda: (model / "config.json").write_text("{"))
    assert "config.json is missing" in after((model / "config.json").unlink)


def test_run_dir_that_holds_a_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    # an empty directory is free
    check(tmp_path)
    (run / "metrics.jsonl").touch()
    assert (
        "already holds a run (metrics.jsonl); set run.resume=auto, run.overwrite=true or another"
        in refusal(tmp_path, call=check)
    )
    for escape in ("run.resume=auto", "run.overwrite=true"):
        check(tmp_path, escape)
    # rank 0 may have begun to write
    check(tmp_path, rank=1)


# --- what goes ---

GOOD = [
    ([], {}, 1),
    ([f"{TP}=2", f"{PP}=2", "actor.sequence_parallel=true"], {}, 4),
    # more ranks than key-value heads, as a multiple
    ([f"{TP}=8"], {}, 8),
    ([f"{CP}=2", "run.num_processes=4"], {}, 4),
    ([f"{EP}=3", "rollout.num_prompts=6"], MOE, 3),
    ([f"{EP}=2", f"{TP}=2", "actor.sequence_parallel=true"], MOE, 2),
    (["algorithm.recipe=sft", "algorithm.nll.context_fraction=0.5"], {}, 1),
    (["algorithm.recipe=grpo"], {}, 1),
    # a question at a time
    (
        ["rollout.num_samples=1", "algorithm.teacher.feedback=always", "algorithm.question_weight.kind=none"],
        {},
        1,
    ),
    (
        [
            "algorithm.recipe=grpo",
            "rollout.num_samples=1",
            "algorithm.question_weight={kind: pq, pass_rate: ema}",
        ],
        {},
        1,
    ),
    (["algorithm.distill.support=full", "algorithm.tis_clip=null"], {}, 1),
    (["rollout.max_prompt_tokens=1024", "rollout.max_response_tokens=3072"], {}, 1),
    (["actor.micro_batch_size=7", "actor.max_tokens_per_microbatch=8192", "actor.packing=true"], {}, 1),
]


@pytest.mark.parametrize("overrides, model, ranks", GOOD, ids=[" ".join(o) or "defaults" for o, _, _ in GOOD])
def test_good(overrides, model, ranks, tmp_path):
    config = check(tmp_path, *overrides, **model)
    assert default_world_size(config) == ranks
    assert ranks % data_parallel_size(config, ranks) == 0


def test_sizes(tmp_path):
    config = load(f"{TP}=2", f"{CP}=2", "actor.sequence_parallel=true")
    assert (sequence_multiple(config), samples_per_step(config), data_parallel_size(config, 8)) == (8, 256, 2)
    assert samples_per_step(load("algorithm.recipe=sft")) == 32
    assert {key: value for key, value, _ in walk(config)}["rollout.engine.port"] == 0
