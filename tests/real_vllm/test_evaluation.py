"""`trl-grpo-ext evaluate --backend vllm`, with a vLLM of its own, against the transformers backend in fp32."""

import json

import pytest
import torch
import vllm
from peft import LoraConfig, get_peft_model

from trl_grpo_ext.cli.evaluate import main
from trl_grpo_ext.evaluation import load_policy, read_answers


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    make = vllm.LLM
    monkeypatch.setattr(vllm, "LLM", lambda **options: make(**options, enforce_eager=True, max_num_seqs=64))

    def run(model, name, backend, *options):
        folder = tmp_path / name
        dataset = ["--dataset_name", "arithmetic", "--items", "20", "--max_new_tokens", "40"]
        where = ["--output_dir", str(folder), "--backend", backend, "--dtype", "float32"]
        main(["--model_name_or_path", str(model), *dataset, *where, "--samples_per_item", "2", *options])
        return [answer.to_dict() for answer in read_answers(folder / "answers.jsonl")]

    return run


def greedy(answers):
    return [answer for answer in answers if answer["temperature"] == 0]


def samples(answers):
    return [answer["completion"] for answer in answers if answer["temperature"] > 0]


def test_greedy_answers_are_those_of_transformers(policy, evaluate, tmp_path, capsys):
    with_vllm, expected = evaluate(policy, "vllm", "vllm"), evaluate(policy, "transformers", "transformers")
    assert greedy(with_vllm) == greedy(expected)
    assert {answer["finish_reason"] for answer in with_vllm} == {"stop", "length"}
    # samples: seeded one by one, so that they do not depend on what is generated beside them
    assert len(set(samples(with_vllm))) > 20
    lines = (tmp_path / "vllm" / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "vllm" / "answers.jsonl").write_text("".join(lines[::4]))
    assert evaluate(policy, "vllm", "vllm") == with_vllm
    assert "45 answers generated, 15 were on disk already" in capsys.readouterr().out
    assert samples(evaluate(policy, "other", "vllm", "--seed", "1")) != samples(with_vllm)
    with pytest.raises(SystemExit, match="1"):
        evaluate(policy, "vllm", "transformers")
    assert "backend" in capsys.readouterr().err
    cut = evaluate(policy, "cut", "vllm", "--max_new_tokens", "5")
    assert {(answer["tokens"], answer["finish_reason"]) for answer in cut} == {(5, "length")}


def test_an_adapter_is_merged(policy, evaluate, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(load_policy(policy, dtype=torch.float32).model, LoraConfig(r=4, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    found, expected = (evaluate(tmp_path / "adapter", backend, backend) for backend in ("vllm", "transformers"))
    assert greedy(found) == greedy(expected)
    assert greedy(found) != greedy(evaluate(policy, "base", "transformers"))
    assert json.loads((tmp_path / "vllm" / "figures.json").read_text())["items"] == 20
