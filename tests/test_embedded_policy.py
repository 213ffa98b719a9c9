"""The policy that ships with the package is small, exact in its text, and starts where the demo says it starts."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.evaluation import evaluate
from trl_grpo_ext.rewards import strict_format_reward_func
from trl_grpo_ext.tasks import SYSTEM_PROMPT, load_arithmetic, to_prompt


TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
FOLDER = Path(embedded_policy_path())
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def test_it_is_small(model):
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 4e6
    assert model.num_parameters() < 2e6
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert {path.suffix for path in FOLDER.iterdir() if path.is_file()} <= {".json", ".jinja", ".py", ".safetensors"}


@given(st.text() | st.text(alphabet="0123456789 \n<>/answerig.,'s"))
def test_text_comes_back_exactly(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    if not any(token in text for token in TOKENIZER.all_special_tokens):
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text  # as TRL decodes


def test_tokens():
    assert TOKENIZER.tokenize("1234") == list("1234")
    assert len(TOKENIZER("\n\n\n")["input_ids"]) == 3
    for tag in TAGS:
        (token_id,) = TOKENIZER(tag)["input_ids"]
        assert TOKENIZER.decode([token_id], skip_special_tokens=True) == tag
    assert TOKENIZER.pad_token != TOKENIZER.eos_token


@given(st.text(max_size=50), st.text(max_size=50))
def test_chat_template_keeps_every_character(system, question):
    text = TOKENIZER.apply_chat_template(to_prompt(question, system), tokenize=False, add_generation_prompt=True)
    expected = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text == expected


def test_prompts_are_short():
    ids = TOKENIZER.apply_chat_template(to_prompt("", SYSTEM_PROMPT), tokenize=True)["input_ids"]
    assert len(ids) < 32


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_it_starts_where_it_should(model, seed):
    """Wrong often enough to learn, right often enough to be rewarded. Greedily at most 45 %, sampled at most 40 %."""
    problems = load_arithmetic("heldout", 200, seed)
    evaluation = evaluate(model, TOKENIZER, problems, max_new_tokens=96, batch_size=200, seed=seed)
    assert 0.25 <= evaluation.figures.estimates["strict"].mean <= 0.45
    assert 0.20 <= evaluation.figures.estimates["strict_mean@4"].mean <= 0.40
    samples = [answer.completion for answer in evaluation.answers if answer.temperature == 1.0]
    assert len(samples) == 800
    scores = strict_format_reward_func(completions=samples)
    assert 0.45 <= sum(score > 0 for score in scores) / len(scores) <= 0.65
