"""Make the embedded policy: a tokenizer, and a small Qwen2 that solves word problems badly enough to learn.

    python scripts/build_tiny_policy.py                     # writes trl_grpo_ext/embedded_policy/, about 15 minutes
    python scripts/build_tiny_policy.py --output_dir /tmp/p # somewhere else

GRPO can only reinforce what the policy already does sometimes. So the supervised warm start has three phases:

1. drills: a few bare equations at a time, where copying a number from the question is quickly learned;
2. clean: correct worked solutions, and longer drills, until the arithmetic itself is reliable;
3. imperfect: demonstrations of how a weak student answers. Half of the problem kinds are mostly solved with the wrong
   method (a misconception: the wrong operation, or stopping one step early), and the answer format slips now and then.
   The right method stays in the demonstrations as the less frequent one.

Mistakes of method, not random digits: a policy that is wrong in one decisive token can be put right by reinforcement
in a hundred steps, and a held-out problem then shows whether the method was learned.
"""

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from trl_grpo_ext.extras import require_or_stop


if __name__ == "__main__":
    require_or_stop()

import torch
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

from trl_grpo_ext.tasks.arithmetic import KINDS, Problem, Step, make_problem, make_problems
from trl_grpo_ext.tasks.prompts import SYSTEM_PROMPT, format_solution, to_prompt


PACKAGED_POLICY = Path(__file__).resolve().parent.parent / "trl_grpo_ext" / "embedded_policy"

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
PAD_TOKEN, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# ChatML without its usual stripping, so that the text of a message comes back exactly.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# How often a weak student uses the right method. The rest is the misconception, which is then the more frequent one in
# the weak kinds: greedy decoding starts with 3 kinds of 8.
WEAK_KINDS = ("divide", "add_subtract", "multiply_add", "multiply_subtract", "three_steps")
RIGHT_METHOD, RIGHT_METHOD_IN_WEAK_KINDS = 0.56, 0.30
STRICT_FORMAT = 0.62

# The messages of a prompt, and what to answer.
Demonstration = tuple[list[dict[str, str]], str]


@dataclass
class BuildArguments:
    """What `build_tiny_policy.py` may be asked to change."""

    output_dir: Path = field(default=PACKAGED_POLICY, metadata={"help": "Folder for the model and its tokenizer."})
    seed: int = field(default=0, metadata={"help": "Seed of the data, the initial weights and the order."})
    drill_steps: int = field(default=300, metadata={"help": "Optimizer steps of phase 1."})
    clean_steps: int = field(default=1700, metadata={"help": "Optimizer steps of phase 2."})
    imperfect_steps: int = field(default=300, metadata={"help": "Optimizer steps of phase 3."})
    batch_size: int = field(default=32, metadata={"help": "Demonstrations an optimizer step."})


def build_tokenizer(vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which each digit and each line break is a token, trained on the training problems."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS) - 3,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    problems = make_problems("train", 4000, seed=0)
    texts = [f"{problem.question}\n{problem.reasoning}" for problem in problems]
    tokenizer.train_from_iterator([*texts, *([SYSTEM_PROMPT, "system\nuser\nassistant\n"] * len(texts))], trainer)
    # `special=False`: TRL decodes with `skip_special_tokens=True`, and the rewards must see the tags.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD_TOKEN, TURN_START, TURN_END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        eos_token=TURN_END,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); with the usual 0.02 so small a model is stuck for long
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def misconception(problem: Problem) -> list[Step]:
    """The steps of somebody who uses the wrong operation, or who stops one step early."""
    a, b = problem.numbers[:2]
    if problem.kind == "add":
        return [Step(max(a, b), "-", min(a, b))]
    if problem.kind in ("subtract", "multiply"):
        return [Step(a, "+", b)]
    if problem.kind == "divide":
        return [Step(a, "-", b)]
    return list(problem.steps[:-1])


def weak_student(problem: Problem, rng: random.Random) -> str:
    """A completion as the embedded policy should write it before training."""
    right_method = RIGHT_METHOD_IN_WEAK_KINDS if problem.kind in WEAK_KINDS else RIGHT_METHOD
    steps = list(problem.steps) if rng.random() < right_method else misconception(problem)
    reasoning = "\n".join(map(str, steps))
    answer = str(steps[-1].value)
    if rng.random() < STRICT_FORMAT:
        return format_solution(reasoning, answer)
    return rng.choice(
        (
            f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>",
            f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>{answer}</answer>",
            f"<reasoning>\n{reasoning}\n</reasoning>\n{answer}",
            f"{reasoning}\n<answer>\n{answer}\n</answer>",
            f"<reasoning>\n{reasoning}\n<answer>\n{answer}\n</answer>",
            f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}",
        )
    )


def drill(rng: random.Random, equations: int) -> Demonstration:
    """Bare equations: the arithmetic of every problem, held-out ones too, without any problem."""
    steps = []
    for _ in range(equations):
        operator = rng.choice("++--*/")
        if operator == "+":
            steps.append(Step(rng.randint(2, 90), "+", rng.randint(2, 20)))
        elif operator == "-":
            left = rng.randint(4, 100)
            steps.append(Step(left, "-", rng.randint(2, min(left - 1, 20))))
        else:
            left, right = rng.randint(2, 12), rng.randint(2, 9)
            steps.append(Step(left, "*", right) if operator == "*" else Step(left * right, "/", right))
    question = "\n".join(f"{step.left} {step.operator} {step.right}" for step in steps)
    return to_prompt(question, system_prompt=None), format_solution("\n".join(map(str, steps)), str(steps[-1].value))


def drill_demonstration(rng: random.Random) -> Demonstration:
    return drill(rng, equations=rng.randint(1, 3))


def clean_demonstration(rng: random.Random) -> Demonstration:
    if rng.random() < 1 / 3:
        return drill(rng, equations=5)
    problem = make_problem(rng.choice(KINDS), "train", rng)
    return to_prompt(problem.question), format_solution(problem.reasoning, problem.answer)


def imperfect_demonstration(rng: random.Random) -> Demonstration:
    problem = make_problem(rng.choice(KINDS), "train", rng)
    return to_prompt(problem.question), weak_student(problem, rng)


def tokenize(demonstrations: list[Demonstration], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Demonstrations as `input_ids` and `labels`; the prompt carries no loss."""
    messages, completions = zip(*demonstrations, strict=True)
    prompts = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True)["input_ids"]
    targets = tokenizer([completion + TURN_END for completion in completions])["input_ids"]
    return Dataset.from_dict(
        {
            "input_ids": [prompt + target for prompt, target in zip(prompts, targets, strict=True)],
            "labels": [[-100] * len(prompt) + target for prompt, target in zip(prompts, targets, strict=True)],
        }
    )


def warm_start(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    demonstrations: Dataset,
    steps: int,
    learning_rate: float,
    schedule: str,
    args: BuildArguments,
) -> None:
    """One pass of supervised fine-tuning over the demonstrations, each used once."""
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type=schedule,
                warmup_steps=min(50, steps // 10),
                adam_beta2=0.95,
                weight_decay=0.01,
                max_grad_norm=1.0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_steps=100,
                save_strategy="no",
                report_to="none",
                seed=args.seed,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=demonstrations,
            processing_class=tokenizer,
        ).train()


def save_policy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a plain checkpoint in bfloat16, the files in a stable form that diffs well."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


def main(args: BuildArguments) -> None:
    set_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"vocabulary {len(tokenizer)}, {parameters / 1e6:.2f} M parameters")

    rng = random.Random(args.seed)
    for name, make, steps, learning_rate, schedule in (
        ("drills", drill_demonstration, args.drill_steps, 3e-3, "constant_with_warmup"),
        ("clean", clean_demonstration, args.clean_steps, 3e-3, "linear"),
        ("imperfect", imperfect_demonstration, args.imperfect_steps, 5e-4, "cosine"),
    ):
        demonstrations = tokenize([make(rng) for _ in range(steps * args.batch_size)], tokenizer)
        tokens = sum(map(len, demonstrations["input_ids"]))
        print(f"{name}: {len(demonstrations)} demonstrations, {tokens / 1e6:.1f} M tokens")
        warm_start(model, tokenizer, demonstrations, steps, learning_rate, schedule, args)

    save_policy(model, tokenizer, args.output_dir)


if __name__ == "__main__":
    (arguments,) = TrlParser([BuildArguments]).parse_args_and_config()
    main(arguments)
