"""`trl-grpo-ext doctor`, called as the command calls it; and its checks, on made-up machines and settings."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from launch import ROOT, load_script
from tiny import tiny_model, tiny_tokenizer
from transformers import Gemma3Config

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, preflight
from trl_grpo_ext.cli.doctor import main
from trl_grpo_ext.memory import Workload, load_config, model_size
from trl_grpo_ext.preflight import FastPaths, Gpu, Launch, Machine
from trl_grpo_ext.rewards import tag_bundle
from trl_grpo_ext.runs import RunRecord


TINY = ROOT / "recipes" / "configs" / "offline-tiny.yaml"
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
MACHINE = Machine(cores=8, memory_gb=64, available_gb=60, gpus=(Gpu("GPU", 80, 79),))


@pytest.fixture
def doctor(tmp_path, capsys):
    """Runs the command; returns its exit status and the rows by name."""

    def run(*arguments):
        file = tmp_path / "rows.json"
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments), "--json", str(file)])
        rows = {}
        for section in (json.loads(file.read_text()) if file.exists() else {}).values():
            for row in section:
                rows.setdefault(row["name"], []).append(row)
        return stopped.value.code, rows

    return run


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def problems(rows):
    return [row for same in rows.values() for row in same if row["status"] == "problem"]


def test_without_arguments_packages_and_machine_are_looked_at(doctor, capsys):
    status, rows = doctor()
    assert status == 0
    assert {"python", "packages", "CPU", "GPU"} <= rows.keys()
    assert not {"model", "data", "memory"} & rows.keys()
    assert "0 problems" in capsys.readouterr().out


def test_help_imports_no_torch():
    code = (
        "import sys; from trl_grpo_ext.cli import main; main(['doctor', '--help']); assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "trl-grpo-ext doctor --config" in result.stdout


def test_the_default_recipe_has_nothing_to_be_said_about(doctor, tmp_path):
    status, rows = doctor("--config", TINY, "--output_dir", tmp_path / "run")
    assert status == 0
    assert {row["status"] for same in rows.values() for row in same} == {"ok"}
    assert "4,096 of 4,096 references" in rows["correctness_reward_func"][0]["found"]
    assert rows["packed rows"][0]["found"].startswith("yes")
    assert "60 generations" in rows["run"][0]["found"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_recipe_configurations(doctor, monkeypatch, tmp_path, config):
    """Models and data are not on this machine, which is no mistake where there is a network."""
    paths = FastPaths(None, None, None, True, "sdpa", "made up")
    monkeypatch.setattr("trl_grpo_ext.rehearsal.rehearse", lambda *args: paths)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    arguments = "--config", config, "--gpu_gb", "24", "--train_items", "64", "--output_dir", tmp_path / "run"
    status, rows = doctor(*arguments)
    assert status == 0, problems(rows)
    if config != TINY:
        assert "not on this machine" in rows["model"][0]["found"]
        assert "not on this machine" in rows["data"][0]["found"]
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        status, rows = doctor(*arguments)
        assert status == 1
        assert {row["name"] for row in problems(rows)} == {"model", "data"}


def test_what_is_wrong_is_said_row_by_row(doctor, tmp_path, policy):
    data = write(tmp_path / "data.jsonl", *({"question": f"{n}?", "answer": f"#### {n}"} for n in range(20)))
    status, rows = doctor(
        *("--model_name_or_path", policy, "--dataset_name", data, "--question_column", "question"),
        *("--reward_funcs", "gsm8k", "--output_dir", tmp_path / "run", "--use_cpu", "true", "--bf16", "false"),
        *("--attn_implementation", "eager", "--loss_type", "bnpo", "--beta", "0.04", "--learning_rate", "1e-9"),
        *("--num_generations", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "2000"),
    )
    assert status == 0  # it can be had, and is noted
    assert rows["prompts"][0]["status"] == "note"  # the model has 512 positions
    assert "eager" in rows["packed rows"][0]["found"]
    assert rows["packed rows"][0]["remedy"] == "--attn_implementation sdpa"
    assert "beta 0.04" in rows["rows without gradient"][0]["found"]
    assert rows["dealt out by prompt"][0]["status"] == "note"
    assert rows["learning rate"][0]["status"] == "note"
    assert "20 of 20 references" in rows["correctness_reward_func"][0]["found"]


def test_references_that_score_no_full_marks(doctor, tmp_path, policy):
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(20)]
    rows[12]["answer"] = "<answer>12</answer>"
    data = write(tmp_path / "data.jsonl", *rows, {"question": "0?", "answer": "0"})
    options = ("--model_name_or_path", policy, "--reward_funcs", "tag", "--shared_prefix", "off", "--use_cpu", "true")
    options += ("--bf16", "false", "--output_dir", tmp_path / "run", "--question_column", "question")
    status, found = doctor(*options, "--dataset_name", data)
    assert status == 1
    (row,) = problems(found)
    assert "row 12" in row["found"]
    assert "1 of 21" in row["found"]
    assert "1 of 21 prompts" in found["duplicates"][0]["found"]
    assert "shared_prefix" in found["packed rows"][0]["found"]


def test_what_cannot_be_had_is_a_row_and_stops_no_other(doctor, tmp_path):
    status, rows = doctor(
        *("--model_name_or_path", tmp_path / "nothing", "--dataset_name", tmp_path / "nothing.csv"),
        *("--reward_funcs", "no_such_reward", "--output_dir", tmp_path / "run", "--use_cpu", "true"),
        *("--bf16", "false", "--num_generations", "8", "--per_device_train_batch_size", "8"),
    )
    assert status == 1
    found = " ".join(row["found"] for row in problems(rows))
    assert "there is no folder" in found
    assert "nothing.csv" in found
    assert "no_such_reward" in found
    assert rows["generation"][0]["status"] == "ok"


def test_a_model_that_takes_more_than_text(doctor, tmp_path):
    Gemma3Config().save_pretrained(tmp_path / "model")
    status, rows = doctor("--model_name_or_path", tmp_path / "model", "--use_cpu", "true", "--bf16", "false")
    assert status == 1
    assert "no weights" in rows["model"][0]["found"]
    assert "more than text" in rows["packed rows"][0]["found"]
    assert rows["memory"][0]["status"] == "note"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--num_generations", "3"], "must be divisible"),
        (["--gpu_gb", "-1"], "--gpu_gb must be above 0"),
        (["word"], "'word' belongs to no option"),
    ],
)
def test_wrong_arguments(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_processes_of_the_launch_count(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr("trl_grpo_ext.rehearsal.rehearse", lambda *args: FastPaths(None, None, None, True, "", ""))
    zero2 = ROOT / "recipes" / "accelerate" / "zero2_offload.yaml"
    options = ("--config", TINY, "--output_dir", tmp_path / "run", "--num_processes", "8", "--config_file", zero2)
    options += ("--train_items", "64")
    rows = doctor(*options, "--per_device_train_batch_size", "1", "--gpu_gb", "80")[1]
    assert rows["generation"][0]["found"].startswith("1 prompt x 8 completions = 8")
    assert "8 processes, zero2_offload" in rows["launch"][0]["found"]


def test_a_run_is_known_again_by_its_own_file(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr("trl_grpo_ext.rehearsal.rehearse", lambda *args: FastPaths(None, None, None, True, "", ""))
    folder = tmp_path / "run"
    folder.mkdir()
    arguments = ["--output_dir", str(folder), "--train_items", "64"]
    settings = load_script(ROOT / "recipes" / "gsm8k.py").parse_arguments(arguments)[3]
    RunRecord(settings).write(folder)
    (folder / "summary.json").write_text("{}")
    status, rows = doctor("--config", folder / "run.yaml")
    assert status == 0
    assert "the same run" in rows["start"][1]["found"]
    status, rows = doctor("--config", folder / "run.yaml", "--learning_rate", "1e-6")
    assert status == 1
    assert "learning_rate" in problems(rows)[0]["found"]


# Checks


def statuses(rows):
    return {row.name: row.status for row in rows}


def test_versions():
    requirements = ['trl>=1.16,<2; extra == "train"', "torch>=2.6", 'rich>=13.8; extra == "report"']
    installed = {"trl": "1.16.0", "torch": "2.5.1+cu124", "rich": None, "vllm": None}
    rows = preflight.check_versions(requirements, installed, {"trl": "1.16.0", "torch": "2.13.0"})
    assert statuses(rows) == {"packages": "ok", "torch": "problem", "not installed": "ok", "tested set": "note"}
    missing = preflight.check_versions(requirements, {**installed, "trl": None}, wanted=["vllm"])
    assert {"trl": "problem", "vllm": "problem"}.items() <= statuses(missing).items()


@pytest.mark.parametrize(
    ("vllm", "transformers", "torch", "status"),
    [
        ("0.31.0", "5.17.2", "2.13.0", "ok"),
        ("0.31.0", "5.23.0", "2.13.0", "problem"),
        ("0.29.1", "5.23.0", "2.13.0+cu130", "ok"),
        ("0.24.0", "5.9.0", "2.11.0", "ok"),
        ("0.24.0", "5.9.0", "2.13.0", "problem"),
        ("0.32.0", "5.17.0", "2.13.0", "problem"),
    ],
)
def test_vllm_and_its_companions(vllm, transformers, torch, status):
    (row,) = preflight.check_vllm_companions({"vllm": vllm, "transformers": transformers, "torch": torch})
    assert row.status == status


def test_memory_that_is_too_small_names_what_would_fit():
    size, workload = model_size(load_config("7B")), Workload()
    (row,) = preflight.check_memory(size, Launch(8, "ddp"), workload, MACHINE)
    assert row.status == "problem"
    assert "zero2 fits" in row.remedy or "zero1 fits" in row.remedy
    (row,) = preflight.check_memory(size, Launch(8, "zero2"), workload, MACHINE)
    assert row.status == "ok"
    (row,) = preflight.check_memory(size, Launch(8, "zero2"), workload, MACHINE, vllm_share=0.6)
    assert row.status == "problem"
    (row,) = preflight.check_memory(size, Launch(1, "ddp"), workload, replace(MACHINE, gpus=()))
    assert (row.status, "a CPU" in row.found) == ("problem", True)
    rows = preflight.check_memory(size, Launch(1, "zero2_offload"), workload, MACHINE)
    assert statuses(rows) == {"memory": "ok", "CPU memory": "problem"}  # 122 GB, of 64
    with_reference = preflight.check_memory(size, Launch(8, "zero2"), replace(workload, keeps_reference=True), MACHINE)
    assert with_reference[0].found != preflight.check_memory(size, Launch(8, "zero2"), workload, MACHINE)[0].found


def test_machines():
    args = GRPOExtConfig("output", use_cpu=True, bf16=False, report_to="none")
    args.wants_gpu, args.wants_bf16 = True, True
    old = replace(MACHINE, gpus=(Gpu("an old one", 16, 2, has_bf16=False),) * 2)
    rows = preflight.check_machine(old, args)
    assert "2 x an old one" in rows[1].found
    assert statuses(rows) == {"CPU": "ok", "GPU": "note", "bf16": "problem"}
    assert preflight.check_machine(MACHINE)[1].found.startswith("1 x GPU, 80 GB")
    assert statuses(preflight.check_machine(replace(MACHINE, gpus=()), args))["GPU"] == "problem"
    assert statuses(preflight.check_machine(replace(MACHINE, gpus=(), hidden_gpus=True), None))["GPU"] == "note"
    rows = preflight.check_launch(Launch(8, "zero2", "zero2", uses_deepspeed=True), MACHINE, True, has_ninja=False)
    assert statuses(rows) == {"launch": "note", "DeepSpeed": "problem"}


@pytest.mark.parametrize(("steps", "accumulation", "passes"), [(2, 1, 3), (4, 2, 1), (1, 2, 2), (2, 4, 1)])
def test_steps_of_a_run_are_those_that_the_trainer_makes(tmp_path, steps, accumulation, passes):
    args = GRPOExtConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        steps_per_generation=steps,
        gradient_accumulation_steps=accumulation,
        num_iterations=passes,
        num_train_epochs=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    data = Dataset.from_list([{"prompt": str(number)} for number in range(21)])
    trainer = GRPOExtTrainer(
        model=tiny_model(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    num_steps = len(trainer.get_train_dataloader()) // accumulation
    found = {row.name: row.found for row in preflight.check_batches(args, 1, len(data))}["run"]
    assert found.startswith(f"{num_steps} optimizer steps")
    rows = preflight.check_batches(args, 1, num_prompts=1)
    assert rows[-1].status == "problem"


def test_fast_paths():
    args = GRPOExtConfig("output", use_cpu=True, bf16=False, report_to="none", tokens_per_micro_batch=None)
    free = FastPaths(None, None, None, True, "sdpa", "made up")
    assert set(statuses(preflight.check_fast_paths(free, args)).values()) == {"ok"}
    bound = replace(free, why_padded="there are images", why_rows_stay="loss_type 'bnpo' is", why_no_reuse="dropout")
    found = statuses(preflight.check_fast_paths(bound, args))
    assert {name for name, status in found.items() if status == "note"} == {
        *("packed rows", "old policy", "rows without gradient", "dealt out by prompt"),
    }
    args.shared_prefix, args.tokens_per_micro_batch = "on", 100
    found = statuses(preflight.check_fast_paths(bound, args))
    assert (found["packed rows"], found["fuller micro-batches"]) == ("problem", "note")


def test_lengths():
    facts = preflight.DataFacts([10, 20], [90, 95], has_solutions=True)
    assert statuses(preflight.check_lengths(facts, 100)) == {"prompts": "ok", "completion length": "note"}
    assert statuses(preflight.check_lengths(facts, 200, 210)) == {"prompts": "note", "completion length": "ok"}


def test_references():
    bundle = tag_bundle()
    good = [{"answer": str(number)} for number in range(20)]
    assert statuses(preflight.check_references_of(bundle, good)) == {"correctness_reward_func": "ok"}
    (row,) = preflight.check_references_of(bundle, good, num_rows=50)
    assert "first of 50 rows" in row.found
    (row,) = preflight.check_references_of(bundle, [{"solution": "1"}])
    assert row.status == "problem"
    assert "'answer'" in row.found
    (row,) = preflight.check_references_of(bundle, [{"answer": ["1"]}] * 3)
    assert row.status == "problem"
    bad = preflight.check_references_of(bundle, [{"answer": "<answer>1</answer>"}, {"answer": None}, *good])
    assert [row.status for row in bad] == ["problem", "note", "note"]
    assert "1 of 21" in bad[0].found
    assert preflight.check_references_of([print], good)[0].status == "ok"


def test_held_out_prompts_that_are_trained_on():
    train = [[{"role": "system", "content": "s"}, {"role": "user", "content": f"{n} + 1?"}] for n in range(5)]
    heldout = [[{"role": "user", "content": " 3 + 1? "}], [{"role": "user", "content": "9 + 1?"}]]
    (row,) = preflight.check_prompts(train, heldout)
    assert row.status == "note"
    assert row.found.startswith("1 of 2")


def test_a_check_that_raises_is_a_row():
    def check():
        raise RuntimeError("two\nlines")

    (row,) = preflight.guarded("name", check)
    assert (row.name, row.status) == ("name", "problem")
    assert "two lines" in row.found


@pytest.mark.parametrize("config", [path for path in CONFIGS if path != TINY], ids=lambda path: path.stem)
@pytest.mark.slow
def test_recipe_configurations_in_full(doctor, tmp_path, config):
    rows = doctor("--config", config, "--gpu_gb", "24", "--output_dir", tmp_path / "run")[1]
    if "Qwen" in Path(config).read_text():
        assert rows["packed rows"][0]["status"] == "ok"


@pytest.mark.parametrize(
    ("rate", "num_parameters", "uses_lora", "status"),
    [
        (1e-6, 500_000_000, False, "ok"),
        (2e-4, 500_000_000, False, "note"),
        (2e-4, 700_000, False, "ok"),
        (1e-2, 700_000, False, "note"),
        (1e-5, 500_000_000, True, "ok"),
        (1e-9, None, True, "note"),
    ],
)
def test_learning_rates(rate, num_parameters, uses_lora, status):
    args = GRPOExtConfig("output", use_cpu=True, bf16=False, report_to="none", learning_rate=rate)
    found = statuses(preflight.check_settings_of_learning(args, num_parameters, uses_lora))
    assert found["learning rate"] == status


def test_a_target_that_can_end_nothing_is_noted():
    args = GRPOExtConfig("output", use_cpu=True, bf16=False, report_to="none", num_iterations=2, target_kl=0.1)
    assert statuses(preflight.check_settings_of_learning(args, None, False))["target_kl"] == "note"
    args.num_iterations = 4
    assert statuses(preflight.check_settings_of_learning(args, None, False))["target_kl"] == "ok"
