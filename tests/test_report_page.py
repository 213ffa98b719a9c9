"""The report's page: what it says, and that nothing a model writes gets out of its place."""

import json
import random
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from records import made_up_events, made_up_run, write_record

from trl_grpo_ext.evaluation.answers import Answer, write_answers, write_lines
from trl_grpo_ext.evaluation.comparison import compare_answers
from trl_grpo_ext.evaluation.figures import figures_of
from trl_grpo_ext.evaluation.history import EvaluationRecord
from trl_grpo_ext.report import page
from trl_grpo_ext.report.completions import heldout_problems, segments_of
from trl_grpo_ext.report.doctor import RULES
from trl_grpo_ext.report.page import render, write_report
from trl_grpo_ext.report.pictures import charts_of
from trl_grpo_ext.report.record import RECORD_FILE, Generation, read_record
from trl_grpo_ext.report.summary import summarize


HOSTILE = {
    "script": '</pre></script><script>document.title = "taken over"</script><img src=x onerror=alert(1)>',
    "template": "{{ 7 * 7 }}{% for x in y %}",
    "controls": "a\x00b\x1b[31mc\u202ed\u2066e\ufefff\ud800g",
    "long": "<answer>" * 25_000,
    "comment": "<!-- <![CDATA[ ]]> --!> &lt;b&gt; \" ' `",
    "empty": "",
}


class Page(HTMLParser):
    """The elements of a page, and its text without that of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.inside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag, **attributes):
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


def answers(rights, completion="<answer>{}</answer>", **options):
    return [
        Answer(
            id=number,
            completion=completion.format(number if right else "none"),
            answer=str(number),
            temperature=0.0,
            prompt=f"What is {number}?",
            finish_reason="stop",
            tokens=5,
            **options,
        ).graded()
        for number, right in enumerate(rights)
    ]


def evaluated_run(folder, stages, **options):
    """A run with answers on disk, `{step: answers}`."""
    write_record(folder, **options)
    (folder / "answers").mkdir()
    records = []
    for step, of_step in stages.items():
        kind = "before" if step == 0 else "step"
        records.append(EvaluationRecord(kind, step, "heldout", figures_of(of_step)))
        name = "before.jsonl" if step == 0 else f"step-{step:06d}.jsonl"
        write_answers(folder / "answers" / name, of_step)
    write_lines(folder / "answers" / "figures.jsonl", (record.to_dict() for record in records))
    return read_record(folder)


@pytest.fixture
def undrawn(monkeypatch):
    """Without drawings, which take time and are tested elsewhere."""
    monkeypatch.setattr(page, "draw", lambda chart, width=0: "<svg></svg>")


BEFORE, AFTER = [True] * 10 + [False] * 30, [True] * 35 + [False] * 5


def test_the_report_of_a_run(tmp_path):
    run = evaluated_run(tmp_path / "run", {0: answers(BEFORE), 20: answers(BEFORE), 40: answers(AFTER)})
    file = write_report([run], tmp_path / "report.html")
    found = Page(file.read_text(encoding="utf-8"))
    assert file.stat().st_size < 1_000_000
    # What happened
    assert "Held-out accuracy rose from 25.0 % to 87.5 % (95 % interval 73.9 to 94.5) in 40 steps" in found.text
    estimate = run.evaluations[-1].figures.estimates["strict"]
    assert f"{100 * estimate.mean:.1f} {100 * estimate.low:.1f} to {100 * estimate.high:.1f}" in found.text
    difference = compare_answers(answers(BEFORE), answers(AFTER)).differences["strict"]
    assert f"+{100 * difference.difference:.1f} +{100 * difference.low:.1f} to" in found.text
    # The diagnosis
    assert f"none of the {len(RULES)} rules" in found.text
    # Pictures
    figures = found.all("figure")
    assert len(figures) >= 10
    wide = found.all("svg", role="img", width="832")  # once more, for a row of its own
    assert len(figures) == len(found.all("figcaption")) == len(found.all("svg", role="img")) - len(wide)
    assert len(wide) == len(found.all("figure", **{"class": "wide"})) > 0
    assert all("optimizer step" in svg["aria-label"] for svg in found.all("svg", role="img"))
    # Completions, of three stages
    assert {"before", "step 20", "step 40"} <= {text.strip() for text in found.texts}
    assert "turned right" in found.text
    assert len(found.all("div", **{"class": "completion", "data-kinds": "right"})) > 3
    # Settings
    assert "learning_rate 1e-05" in found.text
    # It needs nothing else
    assert not [element for tag, element in found.elements if tag in ("link", "img") and "data:" not in str(element)]
    assert len(found.all("script")) == 1
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", file.read_text(encoding="utf-8").replace("xlink:href", ""))


def test_findings_stand_with_evidence_threshold_and_remedy(undrawn):
    run = made_up_run(steps=12)
    for step in run.steps:
        step.metrics["completions/clipped_ratio"] = 1.0
    text = Page(render([run])).text
    assert "Problem" in text
    assert "max_completion_length=96" in text
    assert "What to do." in text
    assert "Reported when:" in text
    assert "truncated-completions" in text


@pytest.mark.parametrize("kind", HOSTILE)
def test_texts_of_models_stay_texts(tmp_path, undrawn, kind):
    text = HOSTILE[kind]
    events = made_up_events(4)
    for event in events:
        for sample in event.get("samples", ()):
            sample |= {"completion": text, "prompt": text, "reference": text, "extracted": text, "chars": len(text)}
    events[0]["about"] |= {"model": text, "dataset": {"name": text, "rows": 3}}
    events[0]["about"]["settings"] = {**events[0]["about"]["settings"], "x": text}
    texts = answers(BEFORE)
    for answer in texts:
        answer.completion = text
    run = evaluated_run(tmp_path / "run", {0: texts, 4: texts}, events=events)
    began = time.perf_counter()
    written = write_report([run], tmp_path / "report.html").read_bytes()
    assert time.perf_counter() - began < 20
    assert len(written) < 3_000_000
    found = Page(written.decode("utf-8"))
    assert len(found.all("script")) == 1
    assert not found.all("img")
    assert not [attributes for _, attributes in found.elements if any(name.startswith("on") for name in attributes)]
    assert b"\x00" not in written
    assert "\u202e" not in written.decode()
    if kind == "template":
        assert "{{ 7 * 7 }}" in found.text
    if kind == "controls":
        assert "[U+0000]" in found.text
        assert "[U+202E]" in found.text
    if kind == "long":
        assert "200,000 characters" in found.text


def test_names_of_runs_and_rewards_are_texts_too(tmp_path, undrawn):
    events = made_up_events(4)
    text = json.dumps(events).replace("soft_format_reward_func", "<b>$x_1$</b>")
    run = read_record(write_record(tmp_path / "<i>run", json.loads(text)))
    found = Page(render([run, made_up_run(steps=4)]))
    assert not found.all("i")
    assert "<i>run" in found.text
    assert "<b>$x_1$</b>" in found.text


def test_tags_and_the_last_answer_are_marked():
    segments = segments_of("<answer>5 or\n15</answer> x < 5", "15")
    assert [(segment.kind, segment.text) for segment in segments] == [
        ("tag", "<answer>"),
        ("plain", "5 or\n"),
        ("answer", "15"),
        ("tag", "</answer>"),
        ("plain", " x < 5"),
    ]
    text = "<a>\x00 b </a>" * 3
    assert "".join(segment.text for segment in segments_of(text, "b")) == text.replace("\x00", "[U+0000]")


def test_marking_takes_linear_time():
    began = time.perf_counter()
    segments_of("<" * 200_000 + "<a" * 200_000, "<a")
    assert time.perf_counter() - began < 5


def test_problems_of_all_kinds_are_chosen():
    first, last = answers([True, True, False, False] * 10), answers([True, False, True, False] * 10)
    last[7].finish_reason = "length"
    problems = heldout_problems([("before", first), ("after", last)], "strict")
    kinds = [problem.kind for problem in problems]
    assert len(problems) == 8
    assert set(kinds) == {"turned right", "stayed wrong", "turned wrong", "truncated", "stayed right"}
    verdicts = {
        "turned right": ["wrong", "right"],
        "turned wrong": ["right", "wrong"],
        "stayed right": ["right"] * 2,
        "stayed wrong": ["wrong"] * 2,
    }
    assert {problem.share for problem in problems if problem.kind == "turned right"} == {"as 10 of 40 problems"}
    for problem in problems:
        if problem.kind in verdicts:
            assert [shown.verdict for shown in problem.completions] == verdicts[problem.kind]


def test_problems_of_several_runs_are_those_that_differ_first():
    one, other = answers([True, True, False, False] * 10), answers([True, False, True, False] * 10)
    problems = heldout_problems([("one", one), ("other", other)], "strict", are_runs=True)
    kinds = [problem.kind for problem in problems]
    assert kinds[0] == "right in one alone"
    assert set(kinds) == {"right in one alone", "right in other alone", "wrong in all runs", "right in all runs"}


def test_what_is_missing_is_said(tmp_path, undrawn):
    events = [event for event in made_up_events(6) if event["event"] != "end"]
    for event in events:
        event.pop("samples", None)
    folder = write_record(tmp_path / "run", events)
    with (folder / RECORD_FILE).open("a") as file:
        file.write('{"event": "step", "step": 7, "ti')  # killed in the middle of a line
    text = Page(render([read_record(folder)])).text
    assert "is still going on, or it was killed" in text
    assert "1 line of the record could not be read" in text
    assert "No held-out problems were evaluated" in text
    assert "No completions were kept" in text


def test_a_run_that_has_only_begun(tmp_path):
    run = read_record(write_record(tmp_path / "run", made_up_events(0)[:1]))
    text = Page(write_report([run], tmp_path / "report.html").read_text()).text
    assert "No step has been recorded yet" in text
    assert "nothing to draw yet" in text
    assert Page(render([run, run])).text.startswith("2 runs compared")


def test_answers_that_are_broken_do_not_break_the_page(tmp_path, undrawn):
    run = evaluated_run(tmp_path / "run", {0: answers(BEFORE), 40: answers(AFTER)})
    (tmp_path / "run" / "answers" / "step-000040.jsonl").write_text('{"id": 1\n')
    (tmp_path / "run" / "answers" / "before.jsonl").unlink()
    text = Page(render([run])).text
    assert "Held-out accuracy rose from 25.0 % to 87.5 %" in text  # intervals that do not overlap
    assert "difference, paired" not in text


def test_prompts_and_figures_that_are_none_do_not_break_the_page(tmp_path, undrawn):
    odd = [replace(answer, prompt=[["no", "message"]]) for answer in answers(AFTER)]
    evaluated_run(tmp_path / "run", {0: odd, 40: odd})
    file = tmp_path / "run" / "answers" / "figures.jsonl"
    first, last = map(json.loads, file.read_text().splitlines())
    for value in (None, {}, "x", [1]):
        broken = {**last, "figures": {**last["figures"], "answer": {"mean": value, "low": 0, "high": 1}}}
        file.write_text(f"{json.dumps(first)}\n{json.dumps(broken)}\n")
        assert len(read_record(tmp_path / "run").evaluations) == 1
    last["figures"].pop("strict")
    file.write_text(f"{json.dumps(first)}\n{json.dumps(last)}\n")
    assert "Held-out accuracy" in Page(render([read_record(tmp_path / "run")])).text


def test_answers_with_verdicts_alone_are_graded_again(tmp_path, undrawn):
    alone = [replace(answer, extracted=None) for answer in answers(AFTER)]
    run = evaluated_run(tmp_path / "run", {0: answers(BEFORE), 40: answers(AFTER)})
    twice = [replace(answer, sample=sample, temperature=1.0) for answer in alone for sample in (0, 1)]
    write_answers(tmp_path / "run" / "answers" / "before.jsonl", twice)
    write_answers(tmp_path / "run" / "answers" / "step-000040.jsonl", twice)
    assert "Held-out accuracy" in Page(render([run])).text


def test_a_long_runs_page_is_small_and_quick(tmp_path):
    run = made_up_run(steps=100)
    run.steps = [replace(run.steps[number % 100], step=number + 1) for number in range(10_000)]
    run.logs = [replace(run.logs[number % 100], step=number + 1) for number in range(10_000)]
    run.generations = [replace(run.generations[number % 50], step=2 * number) for number in range(5_000)]
    began = time.perf_counter()
    file = write_report([run], tmp_path / "report.html")
    assert file.stat().st_size < 3_000_000
    assert time.perf_counter() - began < 20  # 2 s on an idle machine


def test_several_runs(tmp_path):
    one = evaluated_run(tmp_path / "one", {0: answers(BEFORE), 40: answers(AFTER)})
    other = evaluated_run(tmp_path / "other", {0: answers(BEFORE), 40: answers(BEFORE)}, seed=1, learning_rate=1e-7)
    found = Page(write_report([one, other], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "one. Held-out accuracy rose from 25.0 %" in found.text
    assert "other. Held-out accuracy did not change measurably" in found.text
    # What differs, and that alone
    assert "learning_rate 1e-05 1e-07" in found.text
    assert "num_generations" not in found.text
    # Results side by side, and the paired difference
    difference = compare_answers(answers(AFTER), answers(BEFORE)).differences["strict"]
    assert "strict right, and in the answer tag 87.5 73.9 to 94.5 25.0" in found.text
    assert f"−{-100 * difference.difference:.1f} −{-100 * difference.low:.1f} to" in found.text
    # Curves of both in each picture
    legends = [item for item in found.texts if item.strip().startswith(("one", "other"))]
    assert len(legends) > 20


def test_too_many_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 to 12 runs"):
        write_report([made_up_run(steps=1)] * 13, tmp_path / "report.html")
    with pytest.raises(ValueError, match="got 0"):
        write_report([], tmp_path / "report.html")


# The first sentence


def sentence(tmp_path, before, after, completion="<answer>{}</answer>", **options):
    stages = {0: before, 40: after} if before else {40: after}
    run = evaluated_run(tmp_path / "run", stages, **options)
    return summarize(run, compare_answers(before, after).differences if before else None).sentence


def test_a_rise_of_method(tmp_path):
    assert sentence(tmp_path, answers(BEFORE), answers(AFTER)).endswith("it was method, not format.")


def test_a_rise_of_format(tmp_path):
    found = sentence(tmp_path, answers(AFTER, "The answer is {}"), answers(AFTER))
    assert "rose from 0.0 % to 87.5 %" in found
    assert "as far as can be told it was format" in found


def test_a_rise_of_both(tmp_path):
    before = [*answers([True] * 20 + [False] * 20, "The answer is {}")]
    found = sentence(tmp_path, before, answers([True] * 40))
    assert "about half of it was method" in found


def test_no_measurable_change(tmp_path):
    found = sentence(tmp_path, answers(BEFORE), answers([True] * 12 + [False] * 28))
    assert "did not change measurably: 25.0 % before and 30.0 % after" in found


def test_a_fall_is_no_method(tmp_path):
    found = sentence(tmp_path, answers(AFTER), answers(BEFORE))
    assert "fell from 87.5 % to 25.0 %" in found
    assert "method" not in found
    assert "format" not in found


def test_a_format_that_was_lost_is_named(tmp_path):
    found = sentence(tmp_path, answers(AFTER), answers(AFTER, "The answer is {}"))
    assert "fell from 87.5 % to 0.0 %" in found
    assert "format was lost" in found
    assert "as often as before" in found


def test_what_could_not_be_told_has_the_interval_of_the_difference(tmp_path):
    found = sentence(tmp_path, answers(BEFORE), answers([True] * 12 + [False] * 28))
    assert "a difference of +5.0 points, 95 % interval" in found


def test_five_problems_tell_nothing(tmp_path):
    found = sentence(tmp_path / "5", answers([False] * 5), answers([True] * 5))
    assert "did not change measurably" in found
    assert "(5 problems, too few to tell)" in found  # and no interval that leaves out 0
    assert "rose" in sentence(tmp_path / "6", answers([False] * 6), answers([True] * 6))


def test_one_answer_by_chance_under_strict_is_not_what_a_run_is_judged_by(tmp_path):
    before, after = answers([True] * 10 + [False] * 30, "I say {}"), answers([True] * 35 + [False] * 5, "I say {}")
    after[0] = answers([True])[0]
    found = sentence(tmp_path, before, after)
    assert found.startswith("Held-out accuracy, whatever the format, rose from 25.0 % to 87.5 %")


def test_a_run_that_went_on_has_no_before(tmp_path):
    run = evaluated_run(tmp_path / "run", {20: answers(BEFORE), 40: answers(BEFORE)})
    found = summarize(run)
    assert "25.0 % at step 20 and 25.0 % after" in found.sentence
    assert "before" not in " ".join(fact.note for fact in found.facts)


def with_best(tmp_path, best, last, **settings):
    """A run whose last evaluation in training is `last`, and then that of the best checkpoint is `best`."""
    run = evaluated_run(tmp_path / "run", {0: answers(BEFORE), 20: answers(AFTER), 40: last}, **settings)
    run.evaluations.append(EvaluationRecord("after", 40, "heldout", figures_of(best)))
    return run


def test_the_best_checkpoint_is_not_the_last_step(tmp_path, undrawn):
    run = with_best(tmp_path, answers(AFTER), answers([False] * 40), load_best_model_at_end=True)
    found = summarize(run)
    assert "to 87.5 %" in found.sentence
    assert "best checkpoint" in found.further[0]
    assert "at step 40 it was 0.0 %" in found.further[0]
    accuracy = next(chart for chart in charts_of([run]) if chart.name == "accuracy:heldout")
    assert accuracy.curves[0].y[-1] == 0  # what training came to is not hidden
    assert "best checkpoint" in Page(render([run])).text


def test_the_last_step_that_is_the_best_needs_no_word(tmp_path):
    assert not summarize(
        with_best(tmp_path / "a", answers(AFTER), answers(AFTER), load_best_model_at_end=True)
    ).further
    assert not summarize(with_best(tmp_path / "b", answers(AFTER), answers(BEFORE))).further


def test_runs_on_different_problems_are_said_to_be(tmp_path, undrawn):
    others = [replace(answer, id=f"other {answer.id}") for answer in answers(AFTER)]
    runs = [evaluated_run(tmp_path / "one", {40: answers(AFTER)}), evaluated_run(tmp_path / "two", {40: others})]
    assert "because the problems are others" in Page(render(runs)).text
    runs[1] = evaluated_run(tmp_path / "three", {40: answers(BEFORE)})
    assert "because the problems are others" not in Page(render(runs)).text


def test_noise_is_seldom_taken_for_learning():
    """Two means of two generations each differ by much now and then; at 5 % hardly ever in more than one of ten."""
    told = 0
    for seed in range(200):
        numbers = random.Random(seed)
        run = made_up_run(made_up_events(0))
        statistics = made_up_run(steps=1).generations[0].statistics
        for step in range(10):
            right = numbers.gauss(0.5, 0.1)
            run.generations.append(Generation(step, replace(statistics, right=right)))
        told += "did not change" not in summarize(run).sentence
    assert told < 20


def test_without_evaluations_it_is_the_training_completions():
    found = summarize(made_up_run()).sentence
    assert found.startswith("The share of right training completions rose from")
    assert "Nothing was held out" in found


def test_a_run_that_stands_still_is_not_said_to_learn():
    events = made_up_events(40)
    halves = [event for event in events if event["event"] == "generation"]
    for number, event in enumerate(halves):
        event["statistics"]["right"] = 0.5 + (0.05 if number % 2 else -0.05)
    assert "did not change measurably" in summarize(made_up_run(events)).sentence


def test_how_far_a_run_has_come():
    events = made_up_events(10, max_steps=100)
    assert "first 10 of 100 steps" in summarize(made_up_run(events[:-1])).sentence
    stopped = [*events[:-1], {"event": "end", "step": 10, "time": 1010.0, "status": "stopped"}]
    assert "in 10 of 100 steps" in summarize(made_up_run(stopped)).sentence
    assert "stopped before its end" in summarize(made_up_run(stopped)).sentence


def test_what_several_runs_have_in_common_is_said_once(tmp_path, undrawn):
    runs = [read_record(write_record(tmp_path / name, steps=12)) for name in ("one", "two", "three")]
    for step in runs[2].steps:
        step.metrics["completions/clipped_ratio"] = 1.0
    text = Page(render(runs)).text
    assert text.count("No held-out problems were evaluated") == 1
    assert text.count("Nothing found in one, two:") == 1
    runs[1].about["rewards"][0]["weight"] = 9.0
    assert "reward correctness_reward_func weight 4, correctness, full marks 2" in Page(render(runs)).text


def test_names_cannot_turn_the_pages_own_words_around(tmp_path, undrawn):
    events = json.loads(json.dumps(made_up_events(8)).replace("soft_format_reward_func", "turned\\u202earound"))
    write_record(tmp_path / "run", events)
    text = render([read_record(tmp_path / "run")])
    assert "turned[U+202E]around" in text
    assert "\u202e" not in text
