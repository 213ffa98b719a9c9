"""What a report's charts show, and how they are drawn."""

import re
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from records import made_up_events, made_up_run

from trl_grpo_ext.evaluation.figures import Estimate, Figures
from trl_grpo_ext.evaluation.history import EvaluationRecord
from trl_grpo_ext.report.pictures import MAX_POINTS, Chart, Curve, charts_of, draw, running_mean, window_of


def charts(run, *names):
    found = {chart.name: chart for chart in charts_of([run])}
    return [found[name] for name in names] if names else found


def figures(strict, answer=None, items=200):
    shares = {"strict": strict, "answer": strict if answer is None else answer, "format": 0.9}
    estimates = {name: Estimate(mean, max(0, mean - 0.05), min(1, mean + 0.05)) for name, mean in shares.items()}
    return Figures(items, items, 0, estimates)


def evaluated(*points, **options):
    """A run with evaluations `(step, strict, answer)`."""
    run = made_up_run(**options)
    run.evaluations = [EvaluationRecord("step", step, "heldout", figures(*shares)) for step, *shares in points]
    return run


def test_every_chart_has_a_title_axes_with_units_and_curves():
    run = evaluated((0, 0.3), (20, 0.8), (40, 0.8))
    run.steps[0].metrics.update({"update/tokens": 400.0, "update/tokens_padded": 1000.0, "kl": 0.1})
    found = charts(run)
    assert {
        "accuracy:heldout",
        "format",
        "reward:correctness_reward_func",
        "groups",
        "length",
        "truncated",
        "kl",
        "clipped",
        "reference",
        "entropy",
        "gradient",
        "rate",
        "seconds",
        "tokens",
    } <= set(found)
    for chart in found.values():
        assert len(chart.title.split()) >= 3, chart.name
        assert chart.x_label == "optimizer step"
        assert chart.y_label
        assert chart.curves
        texts = [text.text for text in ElementTree.fromstring(draw(chart)).iter() if text.tag.endswith("text")]
        assert {chart.x_label, chart.y_label} <= set(texts), chart.name


def test_titles_say_what_to_see():
    rising, flat = evaluated((0, 0.3), (20, 0.8), (40, 0.8)), evaluated((0, 0.30), (40, 0.32))
    assert charts(rising, "accuracy:heldout")[0].title.endswith("30.0 % to 80.0 %, not measurably after step 20")
    assert "intervals overlap" in charts(flat, "accuracy:heldout")[0].title
    assert "fell" in charts(evaluated((0, 0.8), (40, 0.3)), "accuracy:heldout")[0].title
    assert charts(made_up_run(), "entropy")[0].title == "Entropy fell from 0.58 to 0.31 nats"
    assert charts(made_up_run(), "seconds")[0].title == "The update took 62 % of the steps' time"
    assert charts(made_up_run(), "length")[0].title.startswith("Completions were about 3")  # it is noise alone


def test_a_rise_that_was_lost_again_is_in_the_title():
    for shares in ((0.3, 0.7, 0.95, 0.7), (0.3, 0.6, 0.95, 0.3)):
        run = evaluated(*zip((0, 10, 20, 40), shares, strict=True))
        title = charts(run, "accuracy:heldout")[0].title
        assert "highest at step 20, 95.0 %" in title
        assert f"{100 * shares[-1]:.1f} % at last" in title


@pytest.mark.parametrize(
    ("right", "formatted", "wanted"),
    [
        ((0.1, 0.9), (0.1, 0.9), "Format and correctness rose together"),
        ((1.0, 1.0), (0.1, 0.9), "Format rose, correctness stayed at about 100 %"),
        ((0.9, 0.1), (1.0, 1.0), "Correctness fell, format stayed at about 100 %"),
        ((0.1, 0.9), (0.9, 0.1), "Correctness rose, format fell"),
        ((0.9, 0.1), (0.9, 0.1), "Correctness fell, format fell"),
        ((0.1, 0.9), (0.990, 0.999), "Correctness rose, format stayed at about 99 %"),  # a point is not seen
    ],
)
def test_the_title_of_format_and_correctness_is_true(right, formatted, wanted):
    run = made_up_run(steps=80)
    count = len(run.generations) - 1
    for number, found in enumerate(run.generations):
        for name, (first, last) in (("right", right), ("formatted", formatted)):
            object.__setattr__(found.statistics, name, first + (last - first) * number / count)
    assert charts(run, "format")[0].title == wanted


def test_a_chart_without_anything_to_see_is_a_sentence():
    run = made_up_run()
    for step in run.steps:
        step.metrics.update({"completions/clipped_ratio": 0.0, "rollouts/iterations_used": 2.0})
    plain = {chart.name: chart.title for chart in charts(run).values() if chart.is_plain}
    assert plain == {
        "truncated": "No completion was cut off",
        "passes": "All 2 passes over each batch were used",
        "rate": "The learning rate stayed at 1e-5",
    }
    run.steps[0].metrics["rollouts/iterations_used"] = 1.0
    assert "passes" not in [chart.name for chart in charts(run).values() if chart.is_plain]
    (together,) = [chart for chart in charts_of([run, made_up_run(learning_rate=1e-5)]) if chart.name == "rate"]
    assert together.is_plain
    assert together.title.startswith("In all runs")
    (apart,) = [chart for chart in charts_of([run, made_up_run(learning_rate=2e-5)]) if chart.name == "rate"]
    assert not apart.is_plain


def with_metrics(**of_step):
    """A run whose steps have the metrics that functions of their number give, `None` for none."""
    run = made_up_run()
    for number, step in enumerate(run.steps):
        for name, value_of in of_step.items():
            step.metrics.pop(name, None)
            if (value := value_of(number)) is not None:
                step.metrics[name] = value
    return run


def test_what_was_true_early_is_not_left_out():
    run = with_metrics(**{"completions/clipped_ratio": lambda number: 0.9 if number < 20 else 0.0})
    assert charts(run, "truncated")[0].title == "The share that is cut off fell from 90 % to 0 %"


def test_a_pass_that_seldom_took_place_is_said_to_have():
    run = with_metrics(
        **{
            "iteration/1/clip_ratio": lambda number: 0.0,
            "iteration/2/clip_ratio": lambda number: 0.9 if number % 10 == 0 else None,
        }
    )
    assert "Of 40 batches, 4 had a pass 2." in charts(run, "clipped")[0].note


def test_a_first_pass_alone_has_no_kl_to_show():
    run = with_metrics(**{"iteration/1/approx_kl": lambda number: 0.0, "iteration/2/approx_kl": lambda number: None})
    assert "kl" not in charts(run)


def test_numbers_that_passes_repeat_are_no_trend():
    """Each batch's length stands at four steps: the noise is that of ten batches, and not of forty steps."""
    told = 0
    for seed in range(50):
        lengths = np.random.default_rng(seed).normal(30, 3, 10)
        run = with_metrics(**{"completions/mean_length": lambda number, lengths=lengths: float(lengths[number // 4])})
        told += "were about" not in charts(run, "length")[0].title
    assert told < 10


def test_few_percent_have_an_axis_of_their_own_and_small_numbers_are_short():
    run = evaluated((0, 0.01), (40, 0.02))
    run.generations.clear()  # of which more are right
    low = draw(charts(run, "accuracy:heldout")[0])
    assert ">100<" not in low
    assert ">100<" in draw(charts(evaluated((0, 0.3), (40, 0.8)), "accuracy:heldout")[0])
    assert ">1e-5<" in draw(charts(made_up_run(), "rate")[0])


def test_intervals_are_drawn_at_each_evaluation():
    (chart,) = charts(evaluated((0, 0.3), (20, 0.8), (40, 0.8)), "accuracy:heldout")
    without = replace(chart, curves=[replace(curve, low=None, high=None) for curve in chart.curves])
    bars = (
        draw(chart).count("<path")
        + draw(chart).count("<use")
        - draw(without).count("<path")
        - draw(without).count("<use")
    )
    assert bars >= 3 * 3 + 1  # a bar with two caps at each of three, and a band


def test_a_chart_has_the_records_numbers():
    run = made_up_run()
    (entropy, kl, groups) = charts(run, "entropy", "kl", "groups")
    assert entropy.curves[0].y.tolist() == [step.metrics["entropy"] for step in run.steps]
    assert [curve.label for curve in kl.curves] == ["pass 2"]
    silent = sum(curve.y for curve in groups.curves)
    expected = [100 * found.statistics.silent / found.statistics.groups for found in run.generations]
    assert silent == pytest.approx(expected)


def test_figures_that_are_the_same_are_one_curve():
    same, apart = evaluated((0, 0.3), (40, 0.8)), evaluated((0, 0.1, 0.3), (40, 0.8, 0.9))
    labels = [[curve.label for curve in charts(run, "accuracy:heldout")[0].curves] for run in (same, apart)]
    assert labels == [["strict, answer", "right in training"], ["strict", "answer", "right in training"]]


def test_a_run_without_anything_has_no_charts():
    assert charts(made_up_run(made_up_events(0))) == {}
    assert charts_of([made_up_run(made_up_events(0)), made_up_run(made_up_events(0))]) == []


def test_one_step_is_drawn():
    for chart in charts(made_up_run(steps=1)).values():
        assert "NaN" not in draw(chart)


def test_several_runs_share_their_charts():
    runs = [made_up_run(seed=0), made_up_run(seed=1, steps=20)]
    found = {chart.name: chart for chart in charts_of(runs, ["one", "other"])}
    assert [(curve.label, curve.colour) for curve in found["entropy"].curves] == [("one", 0), ("other", 1)]
    assert len(found["entropy"].curves[1].x) == 20
    runs = [evaluated((0, 0.3), (40, 0.8)), evaluated((0, 0.3), (40, 0.4))]
    (accuracy, *_) = charts_of(runs, ["one", "other"])
    assert accuracy.title == "Held-out accuracy, heldout, under strict"
    assert [curve.y[-1] for curve in accuracy.curves] == [80, 40]
    labels = [curve.label for curve in found["format"].curves]
    assert labels == ["one, correctness", "one, format", "other, correctness", "other, format"]
    assert found["seconds"].curves[0].y == pytest.approx(0.81)


def test_drawings_have_the_pages_colours_and_text_that_is_text():
    (chart,) = charts(made_up_run(), "reward:correctness_reward_func")
    svg = draw(chart)
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
    assert all(colour == "none" or colour.startswith("var(--") for colour in colours)
    assert "font-family" not in svg
    assert "<style" not in svg
    assert "score (full marks 2)" in svg


def test_labels_of_small_numbers_are_whole():
    (chart,) = charts(made_up_run(), "kl")
    assert {"0", "0.001", "0.002"} <= set(re.findall(r">([\d.]+)</text>", draw(chart)))


def test_drawings_are_the_same_each_time_and_share_no_ids():
    first, second = charts(made_up_run(), "entropy", "gradient")
    assert draw(first) == draw(first)
    ids = [re.findall(r'\bid="([^"]+)"', draw(chart)) for chart in (first, second)]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])


def test_long_runs_are_drawn_with_few_points():
    x = np.arange(10_000.0)
    noise = np.random.default_rng(0).normal(size=len(x))
    began = time.perf_counter()
    svg = draw(Chart("long", "It is long", "unit", [Curve("noise", x, noise)]))
    assert len(svg) < 60_000
    assert time.perf_counter() - began < 10
    assert 2 * MAX_POINTS < svg.count(" L ") < 6 * MAX_POINTS


@pytest.mark.parametrize("count", [1, 2, 5, 40, 41, 1000])
def test_running_means_are_means_of_what_is_around(count):
    values = np.random.default_rng(count).normal(size=count)
    window = window_of(np.arange(count), 0.05 * count)
    assert window % 2 == 1
    smooth = running_mean(values, window)
    for index in {0, count // 2, count - 1}:
        reach = min(window // 2, index, count - 1 - index)
        assert smooth[index] == pytest.approx(values[index - reach : index + reach + 1].mean())
