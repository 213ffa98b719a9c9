"""Evaluate the embedded policy as one of several processes: `python run_evaluation.py SETTINGS.json`.

Each process names a file of answers in a folder of its own, as if the others could not see it, and leaves what it was
told in `found-N.json`.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.evaluation import evaluate
from trl_grpo_ext.ranks import run_as_rank


def main(settings) -> None:
    folder, accelerator = Path(settings["folder"]), Accelerator(cpu=True)
    model = AutoModelForCausalLM.from_pretrained(embedded_policy_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_policy_path())
    problems = Dataset.from_list(json.loads((folder / "problems.json").read_text()))
    file = folder / f"rank-{accelerator.process_index}" / "answers.jsonl"
    options = {**settings["options"], "accelerator": accelerator, "answers_file": file}
    found = evaluate(model, tokenizer, problems, **options)
    error = ""
    try:
        evaluate(model, tokenizer, problems, **{**options, "max_new_tokens": 1})
    except ValueError as refusal:
        error = str(refusal)
    content = {
        "answers": [answer.to_dict() for answer in found.answers],
        "figures": found.figures.to_dict(),
        "generated": found.generated,
        "error": error,
    }
    (folder / f"found-{accelerator.process_index}.json").write_text(json.dumps(content))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_as_rank(main, json.loads(Path(sys.argv[1]).read_text()))
