"""`trl-grpo-ext evaluate`, and the policies that it takes."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dist_cp
from canned import canned_config, train_canned
from launch import ROOT, launcher, run_canned, run_to_the_end, warm_python
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer
from trl_grpo_ext.cli.evaluate import default_output_dir, main
from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.evaluation import PolicyError, driver, load_policy, read_answers
from trl_grpo_ext.evaluation.policies import fingerprint, save_whole


QUESTIONS = ["What is 1 + 2?", "Tom has 5 apples and buys 4 more. How many apples?", "One more: 7 - 3?"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """A CSV with column names of its own."""
    file = tmp_path_factory.mktemp("data") / "problems.csv"
    rows = zip(QUESTIONS, (3, 9, 4), strict=True)
    file.write_text("".join(["q,solution\n", *(f'"{question}",{answer}\n' for question, answer in rows)]))
    return str(file)


@pytest.fixture
def evaluate(dataset, tmp_path):
    """Runs the command in this process; returns the output folder."""

    def run(*arguments, model="embedded", output="out"):
        folder = tmp_path / output
        columns = ["--dataset_name", dataset, "--question_column", "q", "--answer_column", "solution"]
        options = ["--max_new_tokens", "24", "--output_dir", str(folder), *map(str, arguments)]
        main(["--model_name_or_path", str(model), *columns, *options])
        return folder

    return run


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def completions(folder) -> list[str]:
    return [answer.completion for answer in read_answers(folder / "answers.jsonl")]


def test_a_run_and_a_second_one(evaluate, capsys, monkeypatch):
    folder = evaluate("--samples_per_item", 2)
    output = capsys.readouterr().out
    assert "9 answers generated" in output
    assert "pass@2" in output
    assert " to " in output  # the intervals
    figures = json.loads((folder / "figures.json").read_text())
    assert (figures["items"], figures["completions"], figures["samples_per_item"]) == (3, 9, 2)
    assert {"strict", "answer", "lm_eval_strict", "lm_eval_flexible", "pass@2", "tokens"} <= figures.keys()
    answers = read_answers(folder / "answers.jsonl")
    assert [str(answer.answer) for answer in answers[::3]] == ["3", "9", "4"]
    assert [answer.prompt[-1]["content"] for answer in answers[::3]] == QUESTIONS
    assert answers[0].prompt[0]["role"] == "system"

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(driver, "generate", lambda *args, **options: pytest.fail("it has generated"))
    assert evaluate("--samples_per_item", 2) == folder
    assert "0 answers generated, 9 were on disk already" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--max_new_tokens", "25"], "max_new_tokens 24, and now it is 25"),
        (["--dtype", "bfloat16"], "dtype 'float32', and now it is 'bfloat16'"),
        (["--system_prompt", "none"], "with another 'prompt'"),
        (["--items", "2"], "which is not asked for"),
    ],
)
def test_answers_under_other_settings_are_refused(evaluate, capsys, changed, said):
    evaluate()
    with pytest.raises(SystemExit, match="1"):
        evaluate(*changed)
    assert said in one_line(capsys)


def test_prompts(evaluate):
    first = read_answers(evaluate("--items", 1, "--prompt_example", "true", output="a") / "answers.jsonl")[0]
    assert [message["role"] for message in first.prompt] == ["system", "user", "assistant", "user"]
    first = read_answers(evaluate("--items", 1, "--system_prompt", "Be brief.", output="b") / "answers.jsonl")[0]
    assert first.prompt[0] == {"role": "system", "content": "Be brief."}
    text = read_answers(
        evaluate("--items", 1, "--prompt_format", "text", "--system_prompt", "none", output="c") / "answers.jsonl"
    )[0]
    assert text.prompt == QUESTIONS[0]


def test_a_model_without_a_chat_template(evaluate, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit, match="1"):
        evaluate(model=tmp_path / "base")
    assert "no chat template" in one_line(capsys)
    evaluate("--prompt_format", "text", model=tmp_path / "base")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--model_name_or_path", "/nowhere"], 1, "there is no folder /nowhere"),
        (["--model_name_or_path", "nobody/has-this"], 1, "cannot be loaded"),
        (["--dataset_name", "/nowhere.jsonl"], 1, "data set '/nowhere.jsonl' cannot be loaded"),
        (["--items", "0"], 2, "--items must be at least 1, got 0"),
        (["--temperature", "0"], 2, "--temperature must be a number above 0, got 0.0"),
        (["--samples_per_item", "-1"], 2, "--samples_per_item must not be negative, got -1"),
        (["--seed", "-1", "--samples_per_item", "1"], 2, "--seed must not be negative, got -1"),
        (["--output_dir", __file__], 2, "is no folder"),
        (["--backend", "llama"], 2, "llama"),
        (["--dtype", "float3"], 2, "float3"),
        (["--max_new_token", "3"], 2, "did you mean --max_new_tokens?"),
    ],
)
def test_what_cannot_be_had_is_one_line(evaluate, capsys, arguments, status, said):
    with pytest.raises(SystemExit) as raised:
        evaluate(*arguments)
    assert raised.value.code == status
    assert said in one_line(capsys)


def test_vllm_that_is_not_there(evaluate, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit, match="1"):
        evaluate("--backend", "vllm")
    assert "vLLM is not installed" in one_line(capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        evaluate("--backend", "vllm")
    assert "start one process" in one_line(capsys)


class StandInForVLLM:
    """Takes what `vllm.LLM` takes, and answers with the token that ends a completion."""

    made: ClassVar[list[dict]] = []

    def __init__(self, **arguments):
        if "max_num_seqz" in arguments:
            raise TypeError("EngineArgs.__init__() got an unexpected keyword argument 'max_num_seqz'")
        if arguments.get("quantization") == "awq":
            raise RuntimeError("Engine core initialization failed.\nSee root cause above.")
        self.made.append(arguments)

    def generate(self, prompts, sampling_params, use_tqdm):
        ends = [params.stop_token_ids[:1] for params in sampling_params]
        with use_tqdm(total=len(ends), desc="of vLLM") as bar:  # it may take a bar's maker
            bar.update(len(ends))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=end)]) for end in ends]


@pytest.fixture
def stand_in(monkeypatch):
    made: list[dict] = []
    monkeypatch.setattr(StandInForVLLM, "made", made)
    module = SimpleNamespace(LLM=StandInForVLLM, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # the command sets it: taken back afterwards
    return made


def test_further_arguments_of_vllm(evaluate, stand_in, capsys, tmp_path):
    evaluate("--backend", "vllm", output="plain")
    folder = evaluate("--backend", "vllm", "--vllm_kwargs", '{"enforce_eager": true, "quantization": "fp8"}')
    plain, given = stand_in
    assert given == {**plain, "enforce_eager": True, "quantization": "fp8"}
    assert completions(folder) == [""] * 3
    assert "of vLLM:   0%" in capsys.readouterr().err
    # in a file they are a mapping; how fast it goes may change
    config = tmp_path / "evaluate.yaml"
    config.write_text("backend: vllm\nvllm_kwargs:\n  quantization: fp8\n  max_num_seqs: 8\n  max_model_len: 4096\n")
    evaluate("--config", config, "--samples_per_item", 1)
    assert stand_in[2] == {**plain, "quantization": "fp8", "max_num_seqs": 8, "max_model_len": 4096}
    assert "3 answers generated, 3 were on disk already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):  # what answers depend on may not
        evaluate("--backend", "vllm", "--vllm_kwargs", '{"quantization": "int8"}')
    assert "vllm_kwargs {'quantization': 'fp8'}, and now it is {'quantization': 'int8'}" in one_line(capsys)


@pytest.mark.parametrize(
    ("kwargs", "found"),
    [
        ('{"max_num_seqz": 3}', "EngineArgs.__init__() got an unexpected keyword argument 'max_num_seqz'"),
        ('{"quantization": "awq"}', "Engine core initialization failed. See root cause above."),
    ],
)
def test_vllm_that_does_not_start(evaluate, stand_in, capsys, kwargs, found):
    with pytest.raises(SystemExit, match="1"):
        evaluate("--backend", "vllm", "--vllm_kwargs", kwargs)
    assert f"vLLM cannot start: {found}" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--vllm_kwargs", '{"enforce_eager": true}'], "--vllm_kwargs is for vLLM"),
        (["--tensor_parallel_size", "2"], "--tensor_parallel_size is for vLLM"),
        (["--gpu_memory_utilization", "0.5"], "--gpu_memory_utilization is for vLLM"),
        (["--backend", "vllm", "--vllm_kwargs", "{enforce_eager"], "must be a JSON object"),
        (["--backend", "vllm", "--vllm_kwargs", "[1]"], "no mapping"),
        (["--backend", "vllm", "--vllm_kwargs", '{"dtype": "half"}'], "'dtype' has an option of its own, --dtype"),
        (
            ["--backend", "vllm", "--attn_implementation", "sdpa"],
            "--attn_implementation is for --backend transformers",
        ),
    ],
)
def test_options_of_the_other_backend(evaluate, stand_in, capsys, options, found):
    with pytest.raises(SystemExit, match="2"):
        evaluate(*options)
    assert found in one_line(capsys)
    assert stand_in == []


@pytest.mark.parametrize(
    ("model", "dataset", "folder"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "openai/gsm8k", "evaluations/Qwen2.5-0.5B-Instruct-gsm8k"),
        ("out/run/checkpoint-100/", "data/test.jsonl", "evaluations/run-checkpoint-100-test.jsonl"),
        ("..", "gsm8k", "evaluations/model-gsm8k"),
        ("a b?", "c:d", "evaluations/a-b--c-d"),
    ],
)
def test_the_default_folder(model, dataset, folder):
    assert default_output_dir(model, dataset) == folder


def test_help_is_quick_and_has_an_example():
    code = (
        "import sys; sys.argv = ['trl-grpo-ext', 'evaluate', '--help']\n"
        "from trl_grpo_ext.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'accelerate', 'datasets') if name in sys.modules])\n"
    )
    result = run_to_the_end([*warm_python()[:1], "-c", code])
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("[]")
    assert "trl-grpo-ext evaluate --model_name_or_path Qwen" in result.stdout


# Policies


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A LoRA adapter of the embedded policy that changes its answers."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    base = load_policy("embedded", dtype=torch.float32).model
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    model.peft_config["default"].base_model_name_or_path = embedded_policy_path()
    model.save_pretrained(folder)
    return folder


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25).unsqueeze(0)).logits


def test_a_lora_adapter(adapter, evaluate, tmp_path, capsys):
    base, policy = load_policy("embedded", dtype=torch.float32), load_policy(str(adapter), dtype=torch.float32)
    assert not torch.allclose(logits_of(base.model), logits_of(policy.model), atol=0.1)
    assert policy.tokenizer.chat_template == base.tokenizer.chat_template  # of the base, where it has none itself
    merged = load_policy(save_whole(load_policy(str(adapter), dtype=torch.float32), tmp_path / "merged"))
    torch.testing.assert_close(logits_of(merged.model), logits_of(policy.model), atol=1e-4, rtol=1e-4)
    with_adapter = completions(evaluate(model=adapter))
    assert with_adapter == completions(evaluate(model=tmp_path / "merged", output="merged-out"))
    assert with_adapter != completions(evaluate(output="base-out"))

    shutil.copytree(adapter, tmp_path / "lost")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "lost" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/gone/base"})
    )
    with pytest.raises(SystemExit, match="1"):
        evaluate(model=tmp_path / "lost", output="lost-out")
    assert "/gone/base" in one_line(capsys)


@pytest.mark.parametrize("base", ["", None, "itself"])
def test_an_adapter_of_nothing(adapter, tmp_path, base):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder) if base == "itself" else base
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PolicyError, match="made of"):
        load_policy(str(folder))


@pytest.mark.parametrize("is_lora", [False, True])
def test_checkpoints_and_output_folders_of_a_run(policy, tmp_path, evaluate, capsys, is_lora):
    options = {"peft_config": LoraConfig(r=2, init_lora_weights=False)} if is_lora else {}
    args = canned_config(tmp_path / "run", GRPOExtConfig, save_strategy="steps", save_steps=2)
    run = train_canned(GRPOExtTrainer, args, policy, **options)
    expected = logits_of(run.trainer.model.eval())
    newest = load_policy(str(tmp_path / "run" / "checkpoint-4"), dtype=torch.float32)
    torch.testing.assert_close(logits_of(newest.model), expected, atol=0, rtol=0)
    torch.testing.assert_close(logits_of(load_policy(str(tmp_path / "run")).model), expected, atol=0, rtol=0)
    earlier = logits_of(load_policy(str(tmp_path / "run" / "checkpoint-2")).model)
    assert not torch.equal(earlier, expected)
    evaluate("--items", 1, model=tmp_path / "run")
    assert "taking checkpoint-4" in capsys.readouterr().err

    weights = tmp_path / "run" / "checkpoint-4" / ("adapter_model" if is_lora else "model")
    weights.with_suffix(".safetensors").unlink()
    torch.testing.assert_close(logits_of(load_policy(str(tmp_path / "run")).model), earlier, atol=0, rtol=0)
    run.trainer.save_model(str(tmp_path / "run"))  # as at the end: it goes before checkpoints
    torch.testing.assert_close(logits_of(load_policy(str(tmp_path / "run")).model), expected, atol=0, rtol=0)


def test_weights_that_changed_under_the_same_name(policy, tmp_path, evaluate, capsys):
    folder = shutil.copytree(policy, tmp_path / "model")
    evaluate("--items", 1, model=folder)
    evaluate("--items", 1, model=folder)
    model = tiny_model(seed=1)
    model.save_pretrained(folder)
    with pytest.raises(SystemExit, match="1"):
        evaluate("--items", 1, model=folder)
    assert "weights" in one_line(capsys)


def test_a_fingerprint_sees_one_changed_layer(policy, tmp_path):
    first, second = (shutil.copytree(policy, tmp_path / name) for name in ("a", "b"))
    assert fingerprint(first) == fingerprint(second) is not None
    (tmp_path / "b" / "README.md").write_text("not of the weights")
    assert fingerprint(first) == fingerprint(second)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    model.save_pretrained(second)
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint("a-name/on-the-hub") is None


def test_weights_that_are_missing_are_not_made_up(policy, tmp_path):
    folder = Path(shutil.copytree(policy, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    tiny_model().save_pretrained(folder, state_dict=state)
    with pytest.raises(PolicyError, match=r"lacks weights of its model: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_policy(str(folder))
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(PolicyError, match="cannot be loaded"):
        load_policy(str(folder))


# Shards


def fsdp_checkpoint(folder, policy, content=None) -> Path:
    """As FSDP writes one: shards alone, and what the run was started with."""
    model = tiny_model(seed=5)
    content = {"model": model.state_dict()} if content is None else content
    dist_cp.save(content, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "run.yaml").write_text(f"model_name_or_path: {policy}\n")
    return folder


def test_shards_of_fsdp(policy, tmp_path):
    """They come without configuration and tokenizer, which are those of the model that was trained."""
    folder = fsdp_checkpoint(tmp_path, policy)
    loaded = load_policy(str(folder))
    torch.testing.assert_close(logits_of(loaded.model), logits_of(tiny_model(seed=5).eval()), atol=0, rtol=0)
    assert loaded.tokenizer.chat_template == tiny_tokenizer().chat_template
    (folder / "run.yaml").unlink()
    with pytest.raises(PolicyError, match="does not say what model it was made of"):
        load_policy(str(folder))


class Hostile:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('hostile').touch()",)


@pytest.mark.parametrize("where", ["contents", "weights", "metadata"])
def test_a_program_in_place_of_weights_is_not_run(policy, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint"
    if where == "weights":
        folder.mkdir()
        torch.save({"x": Hostile()}, folder / "pytorch_model_fsdp.bin")
    else:
        fsdp_checkpoint(folder, policy, {"model": {"x": Hostile()}} if where == "contents" else None)
    if where == "metadata":
        (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(PolicyError):
        load_policy(str(folder))
    assert not (tmp_path / "hostile").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("is_lora", [False, True])
def test_shards_of_zero3(policy, tmp_path, is_lora, monkeypatch):
    """Where DeepSpeed is not told to gather the weights for a checkpoint, they are in each process's file alone.

    An adapter's are gathered all the same, by transformers; a file of empty tensors stands for releases that do not.
    """
    settings = json.loads((ROOT / "recipes" / "accelerate" / "zero3_cpu.json").read_text())
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    config = (ROOT / "recipes" / "accelerate" / "zero3_cpu.yaml").read_text()
    config = config.replace("recipes/accelerate/zero3_cpu.json", str(tmp_path / "zero3.json"))
    (tmp_path / "zero3.yaml").write_text(config)
    command = launcher("zero3_cpu.yaml")
    command[command.index("--config_file") + 1] = str(tmp_path / "zero3.yaml")
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "bf16": False}
    result = run_canned(tmp_path, "run", command, policy=policy, lora=is_lora, options=options)
    assert result.returncode == 0, result.stderr
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    if is_lora:
        tensors = load_file(checkpoint / "adapter_model.safetensors")
        save_file(
            {name: tensor.new_empty(0) for name, tensor in tensors.items()}, checkpoint / "adapter_model.safetensors"
        )
        (checkpoint / "manifest.json").unlink()
    trained = load_file(tmp_path / "run" / "final.safetensors")
    found = load_policy(str(tmp_path / "run")).model.state_dict()
    assert trained.keys() == found.keys()
    assert all(torch.equal(weight, found[name]) for name, weight in trained.items())
    start = load_file(tmp_path / "run" / "start.safetensors")
    assert any(not torch.equal(weight, start[name]) for name, weight in trained.items())

    # other objects than numbers
    monkeypatch.chdir(tmp_path)
    file = next(checkpoint.glob("global_step2/*rank_1*optim_states.pt"))
    content = torch.load(file, weights_only=False)
    torch.save({**content, "x": Hostile()}, file)
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(PolicyError, match="zero_to_fp32"):
        load_policy(str(tmp_path / "run"))
    assert not (tmp_path / "hostile").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_share_the_problems(evaluate, dataset, tmp_path):
    """Whatever they were launched for: each holds a whole model."""
    alone = evaluate("--samples_per_item", 1, "--batch_size", 1, output="alone")
    arguments = ["--model_name_or_path", "embedded", "--dataset_name", dataset, "--output_dir", str(tmp_path / "both")]
    columns = ["--question_column", "q", "--answer_column", "solution", "--max_new_tokens", "24"]
    command = [*launcher("zero3_cpu.yaml", "-m", is_warm=False), "trl_grpo_ext", "evaluate", *arguments, *columns]
    result = run_to_the_end([*command, "--samples_per_item", "1", "--batch_size", "1"])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "both" / "answers.jsonl").read_bytes() == (alone / "answers.jsonl").read_bytes()
    assert result.stdout.count("6 answers generated") == 1
