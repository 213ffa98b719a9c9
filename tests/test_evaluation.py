import collections
import json
import math
import shutil
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl.generation.vllm_generation as generation
import yaml
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from launch import launcher, run_to_the_end
from threads import World
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.evaluation import check_problems, driver, evaluate
from trl_grpo_ext.evaluation.generate import Request, generate, stream_of, to_ids
from trl_grpo_ext.tasks import load_arithmetic


@pytest.fixture(scope="module")
def policy():
    folder = embedded_policy_path()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model().eval(), tiny_tokenizer()


# Completions


def complete(policy, prompts, *, batch_size=64, max_new_tokens=60, temperature=0.0, streams=None):
    """Texts of prompts, a batch at a time."""
    model, tokenizer = policy
    streams = range(len(prompts)) if streams is None else streams
    requests = [
        Request(to_ids(tokenizer, prompt), temperature, stream)
        for prompt, stream in zip(prompts, streams, strict=True)
    ]
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    return [
        completion.text
        for batch in batches
        for completion in generate(model, tokenizer, batch, max_new_tokens=max_new_tokens)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_do_not_depend_on_the_batch(policy, temperature):
    """Left padding and the order must not show, nor what else is sampled."""
    prompts = load_arithmetic("heldout", 12)["prompt"][:]
    options = {"temperature": temperature}
    together = complete(policy, prompts, **options)
    assert together == complete(policy, prompts, batch_size=1, **options)
    backwards = complete(policy, prompts[::-1], batch_size=5, streams=range(11, -1, -1), **options)
    assert together == backwards[::-1]
    assert len(set(together)) > 6
    assert complete(policy, []) == []


def test_samples_are_distributed_as_softmax_says(tiny):
    """The first token of many samples, against the distribution that the model's logits give, by chi-square."""
    model, tokenizer = tiny
    number, temperature = 6000, 0.1
    ids = to_ids(tokenizer, "two")
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    expected = number * torch.softmax(logits / temperature, -1)
    assert expected.max() > 3 * expected.min()  # another temperature would show
    requests = [Request(ids, temperature, stream_of(0, "problem", sample)) for sample in range(number)]
    drawn = []
    for start in range(0, number, 1000):
        # the tokens themselves: bytes make no text one by one
        output = []
        decode, tokenizer.decode = tokenizer.decode, lambda ids, output=output, **options: output.append(ids) or ""
        generate(model, tokenizer, requests[start : start + 1000], max_new_tokens=1, end_ids=[])
        tokenizer.decode = decode
        drawn += [ids[0] for ids in output]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(logits)).double()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(logits) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)  # standard deviations
    wrong = number * torch.softmax(logits / (1.3 * temperature), -1)
    assert ((counts - wrong) ** 2 / wrong).sum().item() - freedom > 6 * math.sqrt(2 * freedom)


def test_the_tokens_of_a_sample_are_drawn_independently(tiny):
    """Noise that is drawn once for a sample, and not for each of its tokens, would favour the same tokens in all."""
    (text,) = complete(tiny, ["a"], max_new_tokens=200, temperature=50.0, streams=[1])  # all but uniform
    most_frequent = collections.Counter(text.encode()).most_common(1)[0][1]
    assert most_frequent < 40  # of which many are parts of the replacement character


def test_streams_differ_by_seed_problem_and_sample():
    triples = [(seed, problem, sample) for seed in (0, 1) for problem in (0, 1, "0", "1", "01") for sample in range(3)]
    assert len({stream_of(*triple) for triple in triples}) == len(triples)
    assert len({stream_of(*triple) % 2**32 for triple in triples}) == len(
        triples
    )  # what a CPU's generator makes of it
    assert all(0 <= stream_of(*triple) < 2**63 for triple in triples)


def test_at_almost_no_temperature_samples_are_the_greedy_text(policy):
    prompts = load_arithmetic("heldout", 3)["prompt"][:]
    assert complete(policy, prompts, temperature=1e-4) == complete(policy, prompts)


def test_the_models_own_generation_settings_are_not_used():
    """An instruct model's settings (top-k 1, say, or a repetition penalty) would turn samples into something else."""
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    prompts = ["hello"] * 4

    def texts():
        return [complete((model, tokenizer), prompts, max_new_tokens=16, temperature=value) for value in (0.0, 1.0)]

    plain = texts()
    assert [len(set(found)) for found in plain] == [1, 4]
    settings = {
        **{"do_sample": True, "top_k": 1, "top_p": 0.01, "repetition_penalty": 5.0, "temperature": 0.01},
        **{"no_repeat_ngram_size": 1, "suppress_tokens": list(range(100)), "num_beams": 3, "min_length": 40},
        **{"num_return_sequences": 2, "use_cache": False, "max_length": 3},
    }
    for option, value in settings.items():
        setattr(model.generation_config, option, value)
    before = model.generation_config.to_dict()
    assert texts() == plain
    assert model.generation_config.to_dict() == before


def test_tokens_and_reason_of_the_end(tiny, monkeypatch):
    """Counted with the token that ends it; what other rows' lengths have padded behind it is no part of it."""
    model, tokenizer = tiny
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    a, b, c = tokenizer("abc")["input_ids"]
    rows = [[a, b, end, pad], [a, b, c, a], [end, pad, pad, pad], [a, b, c, end], [b, end, end, end], [7, 7, 9, a]]
    model.generation_config.eos_token_id = [end, 9]
    monkeypatch.setattr(model, "generate", lambda input_ids, **options: torch.cat([input_ids, torch.tensor(rows)], 1))
    found = generate(model, tokenizer, [Request([a])] * len(rows), max_new_tokens=4)
    model.generation_config.eos_token_id = end
    assert [completion.tokens for completion in found] == [3, 4, 1, 4, 2, 3]
    reasons = ["stop", "length", "stop", "stop", "stop", "stop"]
    assert [completion.finish_reason for completion in found] == reasons
    assert [completion.text for completion in found][:5] == ["ab", "abca", "", "abc", "b"]


def test_a_tokenizer_may_lack_a_pad_token(tiny):
    model, tokenizer = tiny[0], tiny_tokenizer()
    prompts = ["a", "three words here"]
    expected = complete((model, tokenizer), prompts, max_new_tokens=4)
    tokenizer.pad_token = None
    assert complete((model, tokenizer), prompts, max_new_tokens=4) == expected
    tokenizer.eos_token = None
    assert complete((model, tokenizer), prompts, max_new_tokens=4) == expected


# Evaluations

OPTIONS = {"max_new_tokens": 40, "samples_per_item": 2, "description": None}


@pytest.fixture(scope="module")
def problems():
    """Problems with ids, some of them long; one with a character of several bytes in it."""
    rows = load_arithmetic("heldout", 9)
    questions = [prompt[-1]["content"] for prompt in rows["prompt"]]
    questions[2] = questions[2].replace("How", "Für jetzt — how")
    prompts = [[{"role": "user", "content": question}] for question in questions]
    ids = ["a", 5, *[f"problem-{number}" for number in range(7)]]
    rows = [
        {"id": str(name), "prompt": prompt, "answer": answer}
        for name, prompt, answer in zip(ids, prompts, rows["answer"], strict=True)
    ]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def whole(policy, problems, tmp_path_factory):
    """An evaluation that was not interrupted: what it returned, and its file."""
    file = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    return evaluate(*policy, problems, answers_file=file, **OPTIONS), file


def count_generated(monkeypatch, fail_in_call=None):
    """The batches that are generated from now on, by their number of answers; one may fail."""
    batches = []

    def generate_or_fail(model, tokenizer, requests, **options):
        if len(batches) + 1 == fail_in_call:
            raise KeyboardInterrupt
        batches.append(len(requests))
        return generate(model, tokenizer, requests, **options)

    monkeypatch.setattr(driver, "generate", generate_or_fail)
    return batches


def test_an_evaluation_keeps_and_counts_every_answer(policy, problems, whole):
    evaluation, file = whole
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["id"], line["temperature"], line["sample"]) for line in lines] == [
        (problem["id"], temperature, sample)
        for problem in problems
        for temperature, sample in ((0.0, 0), (1.0, 0), (1.0, 1))
    ]
    for line, answer in zip(lines, evaluation.answers, strict=True):
        problem = next(problem for problem in problems if problem["id"] == line["id"])
        assert line["prompt"] == problem["prompt"] == answer.prompt
        assert line["answer"] == problem["answer"]
        assert line["finish_reason"] == "stop"
        assert line["tokens"] == len(policy[1](line["completion"])["input_ids"]) + 1
        tag = f"<answer>\n{problem['answer']}\n</answer>"
        assert line["correct"]["strict"] == answer.correct["strict"]
        assert line["correct"]["strict"] or tag not in line["completion"]
    greedy = [line["completion"] for line in lines if line["temperature"] == 0]
    assert greedy == complete(policy, problems["prompt"][:])
    assert len({line["completion"] for line in lines}) > 9
    assert (evaluation.figures.items, evaluation.figures.samples_per_item, evaluation.generated) == (9, 2, 27)
    right = sum(line["correct"]["answer"] for line in lines if line["temperature"] == 0)
    assert evaluation.figures.estimates["answer"].mean == pytest.approx(right / 9)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_file_is_the_same_whatever_the_batch_size(policy, problems, whole, tmp_path, batch_size):
    evaluate(*policy, problems, answers_file=tmp_path / "found.jsonl", batch_size=batch_size, **OPTIONS)
    assert (tmp_path / "found.jsonl").read_bytes() == whole[1].read_bytes()


@pytest.mark.parametrize("call", [1, 2, 4, 7])
def test_the_file_is_the_same_after_an_interruption(policy, problems, whole, tmp_path, monkeypatch, call):
    model, tokenizer = policy
    file = tmp_path / "new folder" / "answers.jsonl"
    model.train()
    batches = count_generated(monkeypatch, fail_in_call=call)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, problems, answers_file=file, batch_size=4, **OPTIONS)
    assert model.training
    model.eval()
    done = sum(batches)
    assert (len(file.read_text().splitlines()) if call > 1 else 0) == done
    batches = count_generated(monkeypatch)
    evaluation = evaluate(model, tokenizer, problems, answers_file=file, batch_size=4, **OPTIONS)
    assert sum(batches) == evaluation.generated == 27 - done
    assert evaluation.answers == whole[0].answers
    assert evaluation.figures == whole[0].figures
    assert file.read_bytes() == whole[1].read_bytes()


def files_of(whole, folder):
    """A copy of an evaluation's files."""
    for file in whole[1].parent.iterdir():
        shutil.copy(file, folder)
    return folder / "answers.jsonl"


@pytest.mark.parametrize(
    "end", ["a line", "a line without its end", "half a line", "half a character", "the first half"]
)
def test_the_file_is_the_same_after_a_kill(policy, problems, whole, tmp_path, monkeypatch, end):
    """Of a process that was killed while it wrote; the batches that had been written were in another order."""
    file = files_of(whole, tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    lines = lines[12:] + lines[:12]
    cut = next(number for number, line in enumerate(lines) if "ü" in line.decode())
    last = {
        "a line": lines[cut],
        "a line without its end": lines[cut][:-1],
        "half a line": lines[cut][:70],
        "half a character": lines[cut][: lines[cut].index("ü".encode()) + 1],
        "the first half": lines[0][:50],
    }[end]
    kept = 0 if end == "the first half" else cut
    file.write_bytes(b"".join(lines[:kept]) + last)
    batches = count_generated(monkeypatch)
    evaluate(*policy, problems, answers_file=file, **OPTIONS)
    assert sum(batches) == 27 - kept - end.startswith("a line")
    assert file.read_bytes() == whole[1].read_bytes()


def test_what_is_there_is_not_generated_again(policy, problems, whole, tmp_path, monkeypatch):
    file = files_of(whole, tmp_path)
    monkeypatch.setattr(driver, "generate", lambda *args, **options: pytest.fail("it has generated"))
    evaluation = evaluate(*policy, problems, answers_file=file, **OPTIONS)
    assert (evaluation.answers, evaluation.figures, evaluation.generated) == (whole[0].answers, whole[0].figures, 0)
    assert file.read_bytes() == whole[1].read_bytes()


def test_an_evaluation_can_be_extended(policy, problems, whole, tmp_path, monkeypatch):
    """First the greedy answers of some problems, then of all, then samples: the file is that of one evaluation."""
    file = tmp_path / "answers.jsonl"
    batches = count_generated(monkeypatch)
    for items, samples in ((4, 0), (9, 0), (9, 1), (9, 2)):
        evaluate(*policy, problems.select(range(items)), answers_file=file, **{**OPTIONS, "samples_per_item": samples})
    assert batches == [4, 5, 9, 9]
    assert file.read_bytes() == whole[1].read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 41}, "max_new_tokens 40, and now it is 41"),
        ({"seed": 1}, "seed 0, and now it is 1"),
        ({"temperature": 0.5}, "temperature 1.0, and now it is 0.5"),
        ({"settings": {"model": "other"}}, "model None, and now it is 'other'"),
        ({"samples_per_item": 1}, "sample 1 at temperature 1.0 of problem 'a', which is not asked for"),
    ],
)
def test_answers_under_other_settings_are_refused(policy, problems, whole, tmp_path, monkeypatch, change, message):
    file = files_of(whole, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(driver, "generate", lambda *args, **options: pytest.fail("it has generated"))
    with pytest.raises(ValueError, match=message) as raised:
        evaluate(*policy, problems, answers_file=file, **{**OPTIONS, **change})
    assert "name another file" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_answers_in_another_precision_are_refused(policy, problems, whole, tmp_path):
    file = files_of(whole, tmp_path)
    with pytest.raises(ValueError, match="dtype 'float32', and now it is 'bfloat16'"):
        evaluate(deepcopy(policy[0]).bfloat16(), policy[1], problems, answers_file=file, **OPTIONS)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("prompt", [{"role": "user", "content": "Another?"}], "with another 'prompt'"),
        ("answer", "another", "with another 'answer'"),
        ("id", "another", "of problem 'problem-0', which is not asked for"),
    ],
)
def test_answers_to_other_problems_are_refused(policy, problems, whole, tmp_path, column, value, message):
    file = files_of(whole, tmp_path)
    rows = problems.to_list()
    rows[2][column] = value
    with pytest.raises(ValueError, match=message):
        evaluate(*policy, Dataset.from_list(rows), answers_file=file, **OPTIONS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not beside it"),
        ("- a list", "is no mapping"),
        ("a: [", "is no mapping"),
        ("!!python/object/apply:os.getcwd []", "is no mapping"),
    ],
)
def test_answers_without_their_settings_are_refused(policy, problems, whole, tmp_path, content, message):
    file = files_of(whole, tmp_path)
    settings = file.with_name("answers.jsonl.settings.yaml")
    assert yaml.safe_load(settings.read_text())["max_new_tokens"] == 40
    settings.unlink() if content is None else settings.write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate(*policy, problems, answers_file=file, **OPTIONS)


def test_a_file_that_is_none_of_answers_is_refused_and_left_alone(policy, problems, whole, tmp_path):
    file = files_of(whole, tmp_path)
    file.write_text("my notes\nof today")
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 1"):
        evaluate(*policy, problems, answers_file=file, **OPTIONS)
    assert file.read_text() == "my notes\nof today"


def test_samples_follow_the_seed(policy, problems):
    def samples(seed):
        evaluation = evaluate(*policy, problems, **{**OPTIONS, "seed": seed})
        return [answer.completion for answer in evaluation.answers if answer.temperature > 0]

    assert samples(0) == samples(0) != samples(1)


def test_training_goes_on_as_if_there_had_been_no_evaluation():
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    problems = load_arithmetic("heldout", 2)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    evaluate(model, tokenizer, problems, max_new_tokens=4)
    assert torch.equal(torch.rand(3), expected)
    assert model.training


class Process(SimpleNamespace):
    """One of several processes, as far as an evaluation asks."""

    def __init__(self, process_index, num_processes, device="cpu"):
        super().__init__(
            process_index=process_index,
            num_processes=num_processes,
            device=torch.device(device),
            is_main_process=process_index == 0,
        )


def evaluate_in_threads(tiny, problems, answer, *, num_processes=2, **options):
    """An evaluation on each process, and by process and temperature what it has generated at once.

    `answer(text, temperature, stream)` is the completion of a prompt.
    """
    world = World(num_processes)
    generated = [collections.defaultdict(list) for _ in range(num_processes)]

    def generate(model, tokenizer, requests, **_):
        drawn = [answer(tokenizer.decode(row.prompt_ids), row.temperature, row.stream) for row in requests]
        generated[world.rank][requests[0].temperature].append(drawn)
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "generate", generate)
        patch.setattr(driver, "gather_object", world.gather_object)
        patch.setattr(driver, "broadcast_object_list", world.broadcast_object_list)
        patch.setattr(driver, "_unwrapped", lambda model, accelerator, options: nullcontext(model))
        options = {"max_new_tokens": 99, "description": None, **options}
        found = world.run(lambda accelerator: evaluate(*tiny, problems, accelerator=accelerator, **options))
    return found, generated


@pytest.mark.parametrize("items", [5, 4, 1])
def test_each_problem_counts_once_however_many_processes_there_are(tiny, items):
    """All processes generate equally often, so that the last problem is done twice; its answer counts once."""
    problems = Dataset.from_dict({"prompt": list("abcde"[:items]), "answer": [f"{number}" for number in range(items)]})

    def answer(text, *_):
        return driver.Completion(f"<answer>{'abcde'.index(text)}</answer>", 1, "stop")

    (evaluation, other), generated = evaluate_in_threads(tiny, problems, answer, samples_per_item=3, batch_size=2)
    assert evaluation == other
    calls = [[len(drawn) for drawn in of_rank[0.0] + of_rank[1.0]] for of_rank in generated]
    assert calls[0] == calls[1]
    assert max(calls[0]) <= 2
    assert [(answer.id, answer.temperature, answer.sample) for answer in evaluation.answers] == [
        (number, temperature, sample)
        for number in range(items)
        for temperature, sample in ((0.0, 0), (1.0, 0), (1.0, 1), (1.0, 2))
    ]
    assert evaluation.figures.estimates["strict"].mean == 1.0  # each answer is of its own problem


@pytest.mark.parametrize("num_processes", [1, 3])
def test_answers_of_one_length_are_generated_together(tiny, num_processes):
    """Samples by their problem's greedy answer; all of them by their own lengths where another policy's are there."""
    letters = "abcdefghijkl"
    problems = Dataset.from_dict({"prompt": list(letters), "answer": ["1"] * len(letters)})
    greedy = dict(zip(letters, [7, 30, 2, 9, 30, 4, 1, 12, 8, 3, 25, 6], strict=True))
    sample_of = {stream_of(0, row, sample): sample for row in range(len(letters)) for sample in range(2)}

    def answer(text, temperature, stream):
        return driver.Completion(text, greedy[text] + (30 * sample_of[stream] if temperature else 0), "stop")

    def steps(generated, temperature):
        """For how many steps all processes generate, who wait for each other after each batch."""
        batches = zip(*(of_rank[temperature] for of_rank in generated), strict=True)
        return sum(max(row.tokens for drawn in batch for row in drawn) for batch in batches)

    options = {"num_processes": num_processes, "samples_per_item": 2, "batch_size": 6 // num_processes}
    found, generated = evaluate_in_threads(tiny, problems, answer, **options)
    assert all(evaluation == found[0] for evaluation in found)
    lengths = [greedy[letter] for letter in letters]
    at_once = [
        sorted(letter for of_rank in generated for row in of_rank[0.0][turn] for letter in row.text) for turn in (0, 1)
    ]
    assert at_once == [list(letters[:6]), list(letters[6:])]  # nothing is known
    assert steps(generated, 0.0) == max(lengths[:6]) + max(lengths[6:])
    longest_first = sorted(lengths, reverse=True)
    assert steps(generated, 1.0) == sum(30 + longest_first[turn] for turn in (0, 3, 6, 9))

    again, generated = evaluate_in_threads(tiny, problems, answer, **options, earlier=found[0].answers)
    assert again[0] == found[0]
    assert steps(generated, 0.0) == longest_first[0] + longest_first[6]
    of_samples = sorted([*lengths, *(30 + length for length in lengths)], reverse=True)
    assert steps(generated, 1.0) == sum(of_samples[turn] for turn in (0, 6, 12, 18))
    for batch in zip(*(of_rank[1.0] for of_rank in generated), strict=True):  # long and short ones on each process
        tokens = [[row.tokens for row in drawn] for drawn in batch]
        means = [np.mean(of_rank) for of_rank in tokens]
        assert max(means) - min(means) <= np.ptp(tokens) / len(tokens[0])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_write_the_file_of_one(problems, whole, tmp_path):
    """And go on from its beginning, which one of them alone can see."""
    (tmp_path / "problems.json").write_text(json.dumps(problems.to_list()))
    lines = whole[1].read_text().splitlines(keepends=True)
    (tmp_path / "rank-0").mkdir()
    started = files_of(whole, tmp_path / "rank-0")
    started.write_text("".join(lines[:5]) + lines[5][:30])
    settings = {"folder": str(tmp_path), "options": {**OPTIONS, "batch_size": 3}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script = [str(Path(__file__).with_name("run_evaluation.py")), str(tmp_path / "settings.json")]
    result = run_to_the_end([*launcher("ddp_cpu.yaml"), *script])
    assert result.returncode == 0, result.stderr
    assert started.read_bytes() == whole[1].read_bytes()
    assert not (tmp_path / "rank-1").exists()
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["figures"] == whole[0].figures.to_dict()
    assert found[0]["generated"] == 27 - 5
    assert found[0]["error"] == found[1]["error"] != ""


def test_answers_that_are_numbers_and_prompts_that_are_texts(policy):
    """The same problems, as messages with answers as texts and as texts with answers as integers."""
    model, tokenizer = policy
    problems = load_arithmetic("heldout", 16)
    texts = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in problems["prompt"]
    ]
    options = {"max_new_tokens": 60, "samples_per_item": 0, "description": None}
    figures = evaluate(model, tokenizer, problems, **options).figures
    assert figures.estimates["strict"].mean > 0
    plain = Dataset.from_dict({"prompt": texts, "answer": [int(answer) for answer in problems["answer"]]})
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert evaluate(model, tokenizer, plain, **options).figures == figures
        assert evaluate(model, tokenizer, plain.with_format("numpy"), **options).figures == figures
    finally:
        tokenizer.chat_template = template


def test_further_arguments_of_the_chat_template(policy):
    """They make other prompts, so that answers on disk would be of something else."""
    model, tokenizer = policy[0], deepcopy(policy[1])
    tokenizer.chat_template = "{{ messages[-1]['content'] }}{% if loud %} Shout!{% endif %}"
    seen = []
    generate_ids = model.generate
    model.generate = lambda input_ids, **options: (
        seen.append(tokenizer.decode(input_ids[0])) or generate_ids(input_ids=input_ids, **options)
    )
    try:
        evaluate(
            model,
            tokenizer,
            load_arithmetic("heldout", 1),
            max_new_tokens=2,
            samples_per_item=0,
            chat_template_kwargs={"loud": True},
        )
    finally:
        del model.generate
    assert [text.endswith("Shout!") for text in seen] == [True]


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
        (
            Dataset.from_dict({"prompt": list("pqr"), "answer": list("123"), "id": list("aba")}),
            "problems 0 and 2 have",
        ),
        (Dataset.from_dict({"prompt": ["p", "q"], "answer": ["1", "2"], "id": ["a", None]}), "problem 1 has no id"),
        (Dataset.from_dict({"prompt": ["p"], "answer": ["1"], "id": [1.5]}), "problem 0 has no id"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_anything_is_generated(monkeypatch, problems, message):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = None
    monkeypatch.setattr(model, "generate", lambda **kwargs: pytest.fail("it has generated"))
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, problems, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"samples_per_item": -1}, "samples_per_item must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0, got nan"),
        ({"model": None}, "model is None"),
    ],
)
def test_arguments_that_cannot_be(tiny, options, message):
    given = {"model": tiny[0], "max_new_tokens": 4, **options}
    with pytest.raises(ValueError, match=message):
        evaluate(tokenizer=tiny[1], dataset=load_arithmetic("heldout", 1), **given)


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
    assert expected.figures.estimates["answer"].mean > 0
    options = {"max_new_tokens": 60, "accelerator": vllm.accelerator, "vllm": vllm}
    settings = {name: value for name, value in vars(vllm).items() if name != "llm"}
    assert evaluate(model, tokenizer, problems, samples_per_item=0, **options) == expected
    torch.manual_seed(3)
    np.random.seed(3)
    numbers = torch.rand(3), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    evaluation = evaluate(model, tokenizer, problems, samples_per_item=2, **options)
    assert torch.equal(torch.rand(3), numbers[0])
    assert np.random.rand() == numbers[1]
    assert [answer for answer in evaluation.answers if answer.temperature == 0] == expected.answers
    samples = [answer.completion for answer in evaluation.answers if answer.temperature > 0]
    assert len(set(samples)) > 6
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
    monkeypatch.setattr(driver, "gather_object", lambda values: values * 4)
    monkeypatch.setattr(driver, "broadcast_object_list", lambda outcome: [[], None])
    problems = load_arithmetic("heldout", 4)
    for index in range(4):
        options = {"samples_per_item": 0, "accelerator": Process(index, 4), "vllm": vllm}
        evaluate(model, tokenizer, problems, max_new_tokens=4, **options)
    assert numbers[0] == numbers[1]
    assert numbers[2] == numbers[3]
    assert len({number for pair in numbers[1:3] for number in pair}) == 4


def test_a_model_that_waits_for_training_elsewhere_is_brought_to_the_device(monkeypatch):
    """DeepSpeed leaves it on the CPU until training begins; a meta device stands for the GPU here."""
    devices = []

    def generate(policy, tokenizer, requests, **options):
        devices.append(policy.device.type)
        return [driver.Completion("", 1, "stop")] * len(requests)

    monkeypatch.setattr(driver, "generate", generate)
    monkeypatch.setattr(driver, "_unwrapped", lambda model, accelerator, options: nullcontext(model))
    monkeypatch.setattr(driver.compat, "generators_restored", lambda device: nullcontext())
    process = Process(0, 1, device="meta")
    problems = load_arithmetic("heldout", 2)
    evaluate(tiny_model(), tiny_tokenizer(), problems, max_new_tokens=4, samples_per_item=0, accelerator=process)
    assert devices == ["meta"]
