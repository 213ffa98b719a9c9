"""Training on what vLLM samples: a run takes a second or two."""

import os
import socket
from pathlib import Path

import torch
import trl.generation.vllm_generation as generation
import vllm_on_cpu  # noqa: F401 - before a model is loaded
from canned import ExactGradNorms, Forward, Run, canned_config, note_forwards, whole_weights
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from vllm import LLM

from trl_grpo_ext import EvaluationCallback, GRPOExtConfig, GRPOExtTrainer
from trl_grpo_ext.embedded_policy import embedded_policy_path


OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OURS, THEIRS = (GRPOExtTrainer, GRPOExtConfig), (GRPOTrainer, GRPOConfig)


def save_embedded_policy(folder: Path) -> str:
    AutoModelForCausalLM.from_pretrained(embedded_policy_path(), dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_policy_path()).save_pretrained(folder)
    return str(folder)


def share_one_engine() -> None:
    """Let all trainers of this process have one colocated vLLM, in fp32, which TRL has no option for."""
    engines = []
    is_launched = "RANK" in os.environ

    def make(**options):
        if not engines:
            engines.append(LLM(**options | {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 64}))
        if not is_launched:  # TRL sets these for vLLM, and the next trainer would take itself for a rank
            for name in OF_A_RANK:
                os.environ.pop(name, None)
        return engines[0]

    generation.LLM = make


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def reward(prompts, completion_ids, **kwargs):
    """Alike for every completion of every other prompt: half of the groups carry no gradient."""
    numbers = [int(prompt[0]["content"].split()[2]) for prompt in prompts]
    return [1.0 if number % 2 else float(sum(ids) % 5) for number, ids in zip(numbers, completion_ids, strict=True)]


def config_of(config_class, output_dir, **options):
    """As in the other tests, with longer completions and steps that change what is sampled."""
    return canned_config(
        output_dir,
        config_class,
        **{
            "use_vllm": True,
            "max_steps": 8,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 24,
            "learning_rate": 0.05,
            **options,
        },
    )


def train(classes, policy, output_dir, *, resume=None, problems=None, **options) -> Run:
    """Train with TRL's trainer or ours, on the same prompts, and evaluate on problems after each step."""
    trainer_class, config_class = classes
    if options["vllm_mode"] == "server":
        options["vllm_group_port"] = free_port()  # for this trainer's weights
    norms = ExactGradNorms()
    prompts = [
        [{"role": "user", "content": f"Tom has {n} apples and buys 4 more. How many apples?"}] for n in range(32)
    ]
    trainer = trainer_class(
        model=policy,
        reward_funcs=reward,
        args=config_of(config_class, output_dir, **options),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:2]}),
        callbacks=[norms],
    )
    if problems is not None:
        trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 1
        trainer.evaluation = EvaluationCallback(trainer, problems, samples_per_item=2)
        trainer.add_callback(trainer.evaluation)
    forwards: list[Forward] = []
    note_forwards(trainer, forwards)
    start = whole_weights(trainer.model)
    torch.manual_seed(0)  # colocated, vLLM samples from torch's generator
    trainer.train(resume_from_checkpoint=resume)
    if options["vllm_mode"] == "server" and trainer.accelerator.is_main_process:
        trainer.vllm_generation.vllm_client.close_communicator()
    return Run(trainer, start, whole_weights(trainer.model), trainer.state.log_history, forwards, norms.values)


def note_generations(monkeypatch) -> list[tuple[list[list[int]], list[list[int]]]]:
    """The tokens of prompts and completions of each call of vLLM from now on."""
    generations = []
    generate = generation.VLLMGeneration.generate

    def note(self, prompts, *arguments, **options):
        output = generate(self, prompts, *arguments, **options)
        generations.append((list(prompts), output[1]))
        return output

    monkeypatch.setattr(generation.VLLMGeneration, "generate", note)
    return generations
