from contextlib import nullcontext
from copy import deepcopy
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import trl.generation.vllm_generation as generation
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.evaluation import check_problems, evaluate, generate_texts, is_flexibly_correct, is_strictly_correct
from trl_grpo_ext.evaluation import generate as evaluation
from trl_grpo_ext.tasks import load_arithmetic


@pytest.mark.parametrize(
    ("text", "answer", "strict", "flexible"),
    [
        ("<answer>\n72\n</answer>", "72", True, True),
        ("<answer>72.0</answer>", "72", True, True),
        ("<answer>1080</answer>", "1,080", True, True),
        ("so it is 72.", "72", False, True),
        ("<answer>72", "72", False, True),
        ("72 <answer>x</answer>", "72", False, True),
        ("<answer>72</answer> of 100", "72", True, False),
        ("<answer>73</answer>", "72", False, False),
        ("", "72", False, False),
        ("<answer>72</answer>", 72, True, True),
        ("<answer>72.0</answer>", 72, True, True),
        ("<answer>73</answer>", 72, False, False),
        ("<answer>0.1</answer>", np.float32(0.1), True, True),
        ("<answer>72</answer>", Decimal("72.00"), True, True),
        ("<answer>72</answer>", "So.\n#### 72", True, True),
        ("<answer>13</answer>", r"\sqrt{13}", False, False),
        (r"<answer>\sqrt{13}</answer>", r"\sqrt{13}", True, False),
        ("<answer>72</answer>", None, False, False),
        ("<answer><NA></answer>", pd.NA, False, False),
    ],
)
def test_strict_and_flexible(text, answer, strict, flexible):
    assert is_strictly_correct(text, answer) is strict
    assert is_flexibly_correct(text, answer) is flexible


@pytest.fixture(scope="module")
def policy():
    folder = embedded_policy_path()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_greedy_texts_do_not_depend_on_the_batch(policy):
    """Left padding, the order of the batches and the order of the prompts must not show."""
    model, tokenizer = policy
    prompts = load_arithmetic("heldout", 12)["prompt"][:]
    together = generate_texts(model, tokenizer, prompts, max_new_tokens=60, batch_size=12)
    alone = generate_texts(model, tokenizer, prompts, max_new_tokens=60, batch_size=1)
    backwards = generate_texts(model, tokenizer, prompts[::-1], max_new_tokens=60, batch_size=5)
    assert together == alone == backwards[::-1]
    assert len({text for (text,) in together}) > 6
    assert generate_texts(model, tokenizer, [], max_new_tokens=60) == []


def test_samples_are_grouped_by_prompt(policy):
    model, tokenizer = policy
    prompts = load_arithmetic("heldout", 3)["prompt"][:]
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens=60, temperature=1e-4, num_samples=3, batch_size=6)
    greedy = generate_texts(model, tokenizer, prompts, max_new_tokens=60)
    assert texts == [[text] * 3 for (text,) in greedy]  # at almost no temperature, samples are the greedy text


def test_the_models_own_generation_defaults_are_not_used():
    """An instruct model's defaults (top-k 1, say, or a repetition penalty) would turn samples into something else."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [[{"role": "user", "content": "hello"}]]

    def sample():
        torch.manual_seed(0)
        return generate_texts(model, tokenizer, prompts, max_new_tokens=16, temperature=1.0, num_samples=4)

    plain = sample()
    for option, value in (("top_k", 1), ("top_p", 0.01), ("repetition_penalty", 5.0), ("temperature", 0.01)):
        setattr(model.generation_config, option, value)
    assert sample() == plain
    assert len(set(plain[0])) == 4


def test_evaluation_counts_what_the_policy_writes(policy):
    model, tokenizer = policy
    problems = load_arithmetic("heldout", 24)
    accuracy = evaluate(model, tokenizer, problems, max_new_tokens=60, samples_per_item=2)
    texts = generate_texts(model, tokenizer, problems["prompt"][:], max_new_tokens=60)
    right = [
        f"<answer>\n{answer}\n</answer>" in text for (text,), answer in zip(texts, problems["answer"], strict=True)
    ]
    assert accuracy.items == 24
    assert accuracy.samples_per_item == 2
    assert accuracy.strict >= sum(right) / 24 > 0  # the policy's other formats can be right too
    assert 0 < accuracy.sampled < 1
    assert evaluate(model, tokenizer, problems, max_new_tokens=60, samples_per_item=2) == accuracy
    assert evaluate(model, tokenizer, problems, max_new_tokens=60, samples_per_item=2, seed=1) != accuracy
    assert evaluate(model, tokenizer, problems, max_new_tokens=60, samples_per_item=0).sampled is None


def test_training_goes_on_as_if_there_had_been_no_evaluation():
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    problems = load_arithmetic("heldout", 2)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    evaluate(model, tokenizer, problems, max_new_tokens=4)
    assert torch.equal(torch.rand(3), expected)
    assert model.training


def test_each_problem_counts_once_however_many_processes_there_are(monkeypatch):
    """All processes generate equally often, so that the last problems are done twice; their answers count once."""
    right = {"a", "d", "e"}
    problems = Dataset.from_dict({"prompt": list("abcde"), "answer": [1] * 5})
    generated, counted = [], []

    class Process:
        num_processes = 2
        device = torch.device("cpu")

        def __init__(self, index):
            self.process_index = index

    def generate(policy, tokenizer, prompts, *, num_samples, **kwargs):
        generated.append(prompts)
        return [[f"<answer>{1 if prompt in right else 2}</answer>"] * num_samples for prompt in prompts]

    monkeypatch.setattr(evaluation, "generate_texts", generate)
    monkeypatch.setattr(evaluation, "unwrap_model_for_generation", lambda model, accelerator: nullcontext(model))
    monkeypatch.setattr(evaluation, "gather_object", lambda values: counted.append(values) or values)
    for index in (0, 1):
        evaluate(
            tiny_model(), tiny_tokenizer(), problems, max_new_tokens=4, samples_per_item=2, accelerator=Process(index)
        )
    assert generated == [["a", "c", "e"]] * 2 + [["b", "d", "e"]] * 2
    strict, flexible, sampled = [first + second for first, second in zip(counted[:3], counted[3:], strict=True)]
    assert strict == flexible == [True, False, True, False, True]
    assert sampled == [True, True, False, False, True, True, False, False, True, True]


def test_answers_that_are_numbers_and_prompts_that_are_texts(policy):
    """The same problems, as messages with answers as texts and as texts with answers as integers."""
    model, tokenizer = policy
    problems = load_arithmetic("heldout", 16)
    texts = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in problems["prompt"]
    ]
    accuracy = evaluate(model, tokenizer, problems, max_new_tokens=60, samples_per_item=0)
    assert accuracy.strict > 0
    plain = Dataset.from_dict({"prompt": texts, "answer": [int(answer) for answer in problems["answer"]]})
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert evaluate(model, tokenizer, plain, max_new_tokens=60, samples_per_item=0) == accuracy
        assert (
            evaluate(model, tokenizer, plain.with_format("numpy"), max_new_tokens=60, samples_per_item=0) == accuracy
        )
    finally:
        tokenizer.chat_template = template


def test_a_tokenizer_may_lack_a_pad_token():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = ["a", "three words here"]
    expected = generate_texts(model, tokenizer, prompts, max_new_tokens=4)
    tokenizer.pad_token = None
    assert generate_texts(model, tokenizer, prompts, max_new_tokens=4) == expected


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        (Dataset.from_dict({"question": ["q"], "answer": ["1"]}), "these have question, answer: rename .* the prompt"),
        (Dataset.from_dict({"prompt": ["q"], "target": ["1"]}), "these have prompt, target: rename .* the answer"),
        (Dataset.from_dict({"prompt": ["q", "q"], "answer": ["1", None]}), "problem 1 has no answer"),
        (Dataset.from_dict({"prompt": ["q"], "answer": [["1", "2"]]}), "problem 0 has no answer to compare with"),
        (IterableDataset.from_generator(lambda: iter([{"prompt": "q", "answer": "1"}])), "whose length is known"),
        ([{"prompt": "q", "answer": "1"}], "must be a datasets.Dataset"),
        (load_arithmetic("heldout", 2), "the tokenizer has no chat template"),
        (load_arithmetic("heldout", 0), "no problems to evaluate on"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_anything_is_generated(monkeypatch, problems, message):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = None
    monkeypatch.setattr(model, "generate", lambda **kwargs: pytest.fail("it has generated"))
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, problems, max_new_tokens=4)


@pytest.mark.parametrize("prompt", [5, "", []])
def test_a_problem_without_a_prompt(prompt):
    with pytest.raises(ValueError, match="problem 0 has no prompt"):
        check_problems(Dataset.from_dict({"prompt": [prompt], "answer": ["1"]}))


# With vLLM


class Engine:
    """A colocated vLLM's interface, as TRL uses it, on a model of transformers with weights of its own."""

    def __init__(self, model, tokenizer):
        self.model = deepcopy(model)
        self.tokenizer = tokenizer
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        self.calls = []

    def load_weights(self, weights):
        self.model.load_state_dict(dict(weights), strict=False)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls.append((len(prompts), sampling_params))
        texts = []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            sampled = {"do_sample": True, "top_k": 0} if sampling_params["temperature"] > 0 else {"do_sample": False}
            completion = self.model.generate(ids, max_new_tokens=sampling_params["max_tokens"], **sampled)[0]
            texts.append(completion[ids.size(1) :].tolist())
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[
                    SimpleNamespace(token_ids=ids, logprobs=[{i: SimpleNamespace(rank=1, logprob=-1.0)} for i in ids])
                ],
            )
            for prompt, ids in zip(prompts, texts, strict=True)
        ]


@pytest.fixture
def vllm(policy, monkeypatch):
    """TRL's own `VLLMGeneration`, with the settings of a training run, on that engine."""
    model, tokenizer = policy
    monkeypatch.setattr(generation.VLLMGeneration, "_init_vllm", lambda self: None)
    monkeypatch.setattr(generation, "SamplingParams", dict, raising=False)
    found = generation.VLLMGeneration(
        model,
        Accelerator(cpu=True),
        tokenizer,
        temperature=0.7,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.5,
        max_completion_length=8,
        generation_kwargs={"seed": 1},
    )
    found.llm = Engine(model, tokenizer)
    return found


def test_vllm_generates_with_the_policys_weights(policy, vllm):
    model, tokenizer = policy
    problems = load_arithmetic("heldout", 6)
    expected = evaluate(model, tokenizer, problems, max_new_tokens=60, samples_per_item=0)
    assert expected.flexible > 0
    options = {"max_new_tokens": 60, "accelerator": vllm.accelerator, "vllm": vllm}
    settings = {name: value for name, value in vars(vllm).items() if name != "llm"}
    assert evaluate(model, tokenizer, problems, samples_per_item=0, **options) == expected
    torch.manual_seed(3)
    np.random.seed(3)
    numbers = torch.rand(3), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    accuracy = evaluate(model, tokenizer, problems, samples_per_item=2, **options)
    assert torch.equal(torch.rand(3), numbers[0])
    assert np.random.rand() == numbers[1]
    assert accuracy.strict == expected.strict
    assert accuracy.samples_per_item == 2
    plain = {
        "n": 1,
        "repetition_penalty": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 60,
        "logprobs": 0,
    }
    greedy, sampled = {**plain, "temperature": 0.0}, {**plain, "temperature": 1.0}
    assert vllm.llm.calls == [(6, greedy), (6, greedy), (12, sampled)]
    assert {name: value for name, value in vars(vllm).items() if name != "llm"} == settings


def test_processes_that_share_a_vllm_sample_the_same(policy, vllm, monkeypatch):
    """Each of them samples for all, so their random numbers must be the same; those of others must not."""
    model, tokenizer = policy
    vllm.tensor_parallel_size = 2
    numbers = []

    def generate(prompts, images, num_generations):
        numbers.append((torch.rand(()).item(), np.random.rand()))
        return None, [[5]] * len(prompts), None, None

    monkeypatch.setattr(vllm, "generate", generate)
    monkeypatch.setattr(evaluation, "gather_object", lambda values: values)
    problems = load_arithmetic("heldout", 4)
    for index in range(4):
        process = SimpleNamespace(process_index=index, num_processes=4, device=torch.device("cpu"))
        evaluate(model, tokenizer, problems, max_new_tokens=4, samples_per_item=0, accelerator=process, vllm=vllm)
    assert numbers[0] == numbers[1]
    assert numbers[2] == numbers[3]
    assert len({number for pair in numbers[1:3] for number in pair}) == 4


def test_a_model_that_waits_for_training_elsewhere_is_brought_to_the_device(monkeypatch):
    """DeepSpeed leaves it on the CPU until training begins; a meta device stands for the GPU here."""
    devices = []

    def generate(policy, tokenizer, prompts, **options):
        devices.append(policy.device.type)
        return [[""]] * len(prompts)

    monkeypatch.setattr(evaluation, "generate_texts", generate)
    monkeypatch.setattr(evaluation, "unwrap_model_for_generation", lambda model, accelerator: nullcontext(model))
    monkeypatch.setattr(evaluation.compat, "generators_restored", lambda device: nullcontext())
    process = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("meta"))
    problems = load_arithmetic("heldout", 2)
    evaluate(tiny_model(), tiny_tokenizer(), problems, max_new_tokens=4, samples_per_item=0, accelerator=process)
    assert devices == ["meta"]
