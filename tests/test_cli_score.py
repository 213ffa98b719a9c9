"""`trl-grpo-ext score`, called as the command calls it."""

import json
import math
import subprocess
import sys

import pytest

from trl_grpo_ext.cli.score import main
from trl_grpo_ext.rewards import RewardBundle, correctness_reward_func, tag_bundle
from trl_grpo_ext.rewards.score import score, summarize


RIGHT = "<reasoning>\nr\n</reasoning>\n<answer>\n5\n</answer>\n"
LINES = [
    {"id": "a", "prompt": "q", "completion": RIGHT, "answer": 5},
    {"id": "b", "prompt": [{"role": "user", "content": "q"}], "completion": "<answer>6</answer>", "answer": "5"},
    {"id": "c", "completion": "7", "answer": None, "other": {"kept": [1]}},
]


def write(path, lines=LINES):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_file_is_scored(tmp_path, capsys):
    output = tmp_path / "scores.jsonl"
    main([write(tmp_path / "c.jsonl"), "--bundle", "tag", "--output", str(output)])
    shown = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    # mean, spread, least, most, share with full marks, share that was not scored
    assert ["correctness_reward_func", "1.000", "1.000", "0.000", "2.000", "33.3%", "33.3%"] in shown
    assert ["format_reward_func", "0.400", "0.327", "0.000", "0.800", "33.3%", "0.0%"] in shown
    assert ["total", "1.067", "1.236", "0.000", "2.800", "33.3%", "0.0%"] in shown
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{name: line[name] for name in line if name not in ("scores", "reward")} for line in written] == LINES
    assert [line["scores"]["correctness_reward_func"] for line in written] == [2.0, 0.0, None]
    assert [line["reward"] for line in written] == pytest.approx([2.8, 0.4, 0.0])


def test_columns_of_other_names(tmp_path, capsys):
    lines = [{"text": RIGHT, "target": 5, "answer": "something else"}]
    output = tmp_path / "scores.jsonl"
    columns = ["--completion_column", "text", "--answer_column", "target"]
    main([write(tmp_path / "c.jsonl", lines), "--bundle", "gsm8k", *columns, "--output", str(output)])
    assert json.loads(output.read_text())["scores"]["correctness_reward_func"] == 2.0
    assert "100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "status", "message"),
    [
        ('{"completion": "x"}\n{"completion": \n', [], 1, "c.jsonl, line 2: "),
        ('\n{"text": "x"}\n', [], 1, "c.jsonl, line 2: no completion in 'completion'; its keys are text"),
        ("[1]\n", [], 1, "c.jsonl, line 1: not a JSON object but a list"),
        ("\n", [], 1, "c.jsonl has no completions in it"),
        ('{"completion": "x"}\n', ["--bundle", "gms8k"], 2, "--bundle: gms8k: there is no reward"),
        ('{"completion": "x"}\n', ["--bundle", "math.sqrt"], 1, "sqrt fails on these completions (TypeError"),
        ('{"completion": "x"}\n', ["--bundle", "builtins.str"], 2, "str is a class and no reward"),
        ('{"completion": "x"}\n', ["--output", "{file}"], 2, "names the same file"),
        ('{"completion": "x"}\n', ["--output", "nowhere/out.jsonl"], 1, "there is no folder 'nowhere'"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, content, arguments, status, message):
    file = tmp_path / "c.jsonl"
    file.write_text(content)
    arguments = [argument.format(file=file) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        main([str(file), *([] if "--bundle" in arguments else ["--bundle", "tag"]), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == status
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_rewards_are_called_as_training_calls_them():
    seen = {}

    async def later(prompts, completions, answer, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("column", answer)
        log_metric("metric", 1.0)
        seen.update(prompts=prompts, completions=completions, kwargs=kwargs)
        return [1.0, None, math.nan]

    scores = score(RewardBundle([later, correctness_reward_func], [2.0, 0.5]), LINES)
    assert scores.by_reward["later"] == [1.0, None, None]
    assert scores.by_reward["correctness_reward_func"] == [2.0, 0.0, None]
    assert scores.total == [3.0, 0.0, None]  # nothing scored the last one
    assert seen["completions"] == [RIGHT, [{"role": "assistant", "content": LINES[1]["completion"]}], "7"]
    assert seen["prompts"] == [line.get("prompt") for line in LINES]
    assert seen["kwargs"] == {"id": ["a", "b", "c"], "other": [None, None, {"kept": [1]}]}


@pytest.mark.parametrize(
    ("returned", "message"), [([1.0], "returned 1 scores for 3"), (["x"] * 3, "'x', which is neither a number")]
)
def test_rewards_that_return_something_else(returned, message):
    def wrong(completions, **kwargs):
        return returned

    with pytest.raises(ValueError, match=message):
        score([wrong], LINES)
    with pytest.raises(ValueError, match="model is a reward model"):
        score(["some/model"], LINES)


def test_summaries():
    summary = summarize([2.0, None, 0.0, 2.0], full_marks=2.0)
    assert (summary.mean, summary.minimum, summary.maximum) == (4 / 3, 0.0, 2.0)
    assert summary.spread == pytest.approx(math.sqrt(8) / 3)
    assert (summary.full_marks, summary.not_scored) == (0.5, 0.25)
    nothing = summarize([None, None])
    assert (nothing.mean, nothing.spread, nothing.full_marks, nothing.not_scored) == (None, None, None, 1.0)


def test_scoring_and_auditing_import_no_torch(tmp_path):
    file = write(tmp_path / "c.jsonl")
    (tmp_path / "p.csv").write_text("question,answer\nq,5\n")
    code = (
        "import contextlib, sys\n"
        "from trl_grpo_ext.cli import main\n"
        f"main(['score', {file!r}, '--bundle', 'gsm8k'])\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    main(['audit', {str(tmp_path / 'p.csv')!r}])\n"
        "print('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "1 of 1 references" in result.stdout
    assert result.stdout.splitlines()[-1] == "False"


def test_tag_bundles_totals():
    assert score(tag_bundle(), LINES).total == pytest.approx([2.8, 0.4, 0.0])
