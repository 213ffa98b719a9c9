"""Draw the documentation's pictures, `recipes/pictures/*.svg`, from the figures that lie beside them.

    python scripts/draw_pictures.py                            # all of them: the same bytes each time
    python scripts/draw_pictures.py --run outputs/offline-tiny # first take the learning curve's figures from a run
    python scripts/draw_pictures.py --report outputs/offline-tiny/report.html  # a part of it, as a browser shows it

Each picture is drawn twice, for a light page and a dark one. Letters are paths: a page that shows an SVG as an image
lends it no fonts. The report's needs `pip install playwright` and a Chromium, and is made of bytes that no other
machine repeats.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from trl_grpo_ext.evaluation.history import FIGURES_FILE, FOLDER, read_history
from trl_grpo_ext.shared_prefix.layout import Row, lay_out


PICTURES = Path(__file__).resolve().parent.parent / "recipes" / "pictures"
CURVES = {  # what the learning curve shows: its name in the file, the set of problems, the figure
    "greedy": ("heldout", "strict"),
    "sampled": ("heldout", "strict_mean@4"),
    "unseen": ("heldout_templates", "strict"),
}
TITLE_SIZE, SMALL = 12, 10
Point = tuple[float, float]


@dataclass(frozen=True)
class Colors:
    """Of a page. Blue and orange can be told apart by everybody, and in grey."""

    ink: str
    muted: str
    grid: str
    blue: str
    light_blue: str
    orange: str
    light_orange: str
    waste: str
    bar: str  # what is compared with


THEMES = {
    "": Colors("#1f2328", "#59636e", "#d8dee4", "#0969da", "#a5cdfb", "#bc4c00", "#ffc08a", "#eceff2", "#818b98"),
    "_dark": Colors("#f0f6fc", "#9198a1", "#30363d", "#4493f8", "#1f4a86", "#f0883e", "#8a4a16", "#212830", "#656c76"),
}


def percent(share: float) -> float:
    return 100 * share


def take_run(folder: Path) -> dict[str, Any]:
    """A run's figures: the accuracies of its evaluations, with their intervals."""
    history = read_history(folder / FOLDER / FIGURES_FILE)
    if not history:
        raise SystemExit(f"{folder} has no figures of evaluations: {folder / FOLDER / FIGURES_FILE}")
    figures: dict[str, Any] = {
        "command": "accelerate launch recipes/gsm8k.py --eval_strategy steps --eval_steps 10 --num_generations_eval 2",
        "time": "half a minute of training on two CPU cores",
        "problems": history[0].figures.items,
    }
    # the evaluation after the last step repeats that of the last step
    of_set = {(record.set, record.step): record.figures for record in history}
    figures["step"] = steps = sorted({record.step for record in history})
    for name, (problems, figure) in CURVES.items():
        estimates = [of_set[problems, step].estimates[figure] for step in steps]
        figures[name] = [[round(value, 4) for value in (est.mean, est.low, est.high)] for est in estimates]
    return figures


def new_axes(width: float, height: float, title: str, colors: Colors) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` inches with one pair of axes, its title above, from the left edge on."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    figure.suptitle(title, x=0.01, ha="left", fontsize=TITLE_SIZE, fontweight="bold", color=colors.ink)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colors.muted)
    axes.tick_params(colors=colors.muted, labelcolor=colors.ink, labelsize=SMALL)
    axes.set_axisbelow(True)
    return figure, axes


def write(axes: Axes, text: str, at: Point, color: str, offset: Point = (0, 0), **options: Any) -> None:
    """A text to the right of a point of the axes, `offset` printer's points away from it."""
    options = {"va": "center", "fontsize": SMALL, "color": color, **options}
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **options)


def learning_curve(data: dict[str, Any], colors: Colors) -> Figure:
    first, last = (percent(data["greedy"][place][0]) for place in (0, -1))
    steps = data["step"]
    title = f"Held-out accuracy rises from {first:.1f} to {last:.1f} % in {steps[-1]} steps"
    figure, axes = new_axes(5.6, 3.5, title, colors)
    lines = (  # a curve, its color and marker, and its label: the text, and how far it stands from the last point
        ("greedy", colors.blue, "o", "greedy", (8, 4), "left"),
        ("sampled", colors.orange, "s", "mean of\n4 samples", (8, -5), "left"),
        ("unseen", colors.muted, "D", "greedy, on sentences that were never trained on", (0, 15), "right"),
    )
    for name, color, marker, label, offset, side in lines:
        mean, low, high = (list(map(percent, values)) for values in zip(*data[name], strict=True))
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=color, marker=marker, markersize=4, linewidth=1.8)
        write(axes, label, (steps[-1], mean[-1]), color, offset, ha=side)
    axes.set(ylim=(0, 100), xlim=(-2, steps[-1] + 2), yticks=range(0, 101, 20))
    axes.set_xticks(steps[::2])
    axes.grid(axis="y", color=colors.grid, linewidth=0.8)
    axes.set_xlabel(f"optimizer step ({steps[-1]} of them: {data['time']})", color=colors.ink, fontsize=SMALL)
    label = f"right answers inside their tags (%)\n{data['problems']} problems, 95 % intervals"
    axes.set_ylabel(label, color=colors.ink, fontsize=SMALL)
    return figure


def update_cost(data: dict[str, Any], colors: Colors) -> Figure:
    ratios = [load["ratio"] for load in data["workloads"]]
    title = f"The same gradient, {min(ratios):.0f} to {max(ratios):.0f} times as fast as TRL"
    figure, axes = new_axes(5.6, 4.0, title, colors)
    for place, (load, ratio) in enumerate(zip(data["workloads"], ratios, strict=True)):
        for offset, name, color, ink in (
            (0.0, "trl_s", colors.bar, colors.ink),
            (0.28, "ours_s", colors.blue, colors.blue),
        ):
            seconds = load[name]
            axes.barh(place + offset, seconds, height=0.26, color=color)
            label = f"TRL {seconds:.1f} s" if name == "trl_s" else f"{seconds:.1f} s, {ratio:#.3g} times as fast"
            weight = "normal" if name == "trl_s" else "bold"
            write(axes, label, (seconds, place + offset), ink, (5, 0), fontweight=weight)
        write(axes, load["title"], (0, place - 0.29), colors.ink)
    axes.set(ylim=(len(ratios) - 0.45, -0.55), xlim=(0, 1.18 * max(load["trl_s"] for load in data["workloads"])))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=colors.grid, linewidth=0.8)
    axes.set_xlabel(f"seconds of a generation batch's update ({data['machine']})", fontsize=SMALL, color=colors.ink)
    return figure


def packed_row(data: dict[str, Any], colors: Colors) -> Figure:
    """Padded rows and the packed one at one scale, so that areas are tokens."""
    groups = [(group["prompt_tokens"], group["completion_tokens"]) for group in data["groups"]]
    prompt_width = max(prompt for prompt, _ in groups)
    completion_width = max(max(completions) for _, completions in groups)
    width = prompt_width + completion_width
    group_of = [number for number, (_, lengths) in enumerate(groups) for _ in lengths]
    rows = [Row(number, prompt, length) for number, (prompt, lengths) in enumerate(groups) for length in lengths]
    layout = lay_out(rows, prompt_width, completion_width)
    hues = [(colors.blue, colors.light_blue), (colors.orange, colors.light_orange)]

    padded, packed = len(rows) * width, layout.num_tokens
    title = f"{padded:,} tokens in padded rows, {packed:,} in a packed one"
    figure, axes = new_axes(5.9, 3.0, title, colors)
    axes.set_axis_off()

    def box(x: float, y: float, length: float, color: str, hatch: str = "", stroke: str = "none") -> None:
        axes.add_patch(Rectangle((x, y), length, 0.84, facecolor=color, edgecolor=stroke, hatch=hatch, linewidth=0))

    def padding(x: float, y: float, length: float) -> None:
        box(x, y, length, colors.waste, "////", colors.muted)

    def again(x: float, y: float, length: float, hue: str) -> None:
        box(x, y, length, colors.waste, "xxx", hue)

    for line, (row, group) in enumerate(zip(rows, group_of, strict=True)):
        dark, light = hues[group]
        start = prompt_width - row.prompt_tokens
        padding(0, line, start)
        if group in group_of[:line]:
            again(start, line, row.prompt_tokens, dark)
        else:
            box(start, line, row.prompt_tokens, dark)
        box(prompt_width, line, row.completion_tokens, light)
        padding(prompt_width + row.completion_tokens, line, completion_width - row.completion_tokens)

    below = len(rows) + 1.3
    for (dark, light), place in zip(hues, layout.groups, strict=True):
        box(place.prefix.start, below, len(place.prefix), dark)
        for segment in place.segments:
            box(segment.start + 0.5, below, len(segment) - 1, light)

    above = f"TRL: {len(rows)} rows, each padded to the longest prompt and completion"
    write(axes, above, (0, -0.75), colors.ink)
    write(axes, "here: one row, with each prompt once and then all completions", (0, below - 0.6), colors.ink)

    repeated = sum(prompt * (len(lengths) - 1) for prompt, lengths in groups)
    completions = sum(row.completion_tokens for row in rows)
    once = sum(prompt for prompt, _ in groups)
    legend: Sequence[tuple[str, Sequence[Callable[..., None]]]] = (
        (f"two prompts: {once} tokens", [partial(box, color=dark) for dark, _ in hues]),
        (f"their completions: {completions}", [partial(box, color=light) for _, light in hues]),
        (f"the prompts again: {repeated}", [partial(again, hue=dark) for dark, _ in hues]),
        (f"padding: {padded - repeated - completions - once}", [padding]),
    )
    left, size = width + 0.1 * packed, 0.06 * packed
    for entry, (text, patches) in enumerate(legend):
        y, length = 1.1 + 1.6 * entry, size / len(patches)
        for number, patch in enumerate(patches):
            patch(left + number * length, y, length)
        write(axes, text, (left + 1.25 * size, y + 0.42), colors.ink)
    axes.set(xlim=(0, packed), ylim=(below + 1.0, -1.3))
    return figure


PICTURES_DRAWN: dict[str, Callable[[dict[str, Any], Colors], Figure]] = {
    "learning_curve": learning_curve,
    "update_cost": update_cost,
    "packed_row": packed_row,
}


def draw(folder: Path, data_folder: Path = PICTURES) -> list[Path]:
    """All pictures into a folder: the same bytes whenever and wherever this version of matplotlib draws them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    settings: Any = {
        "svg.fonttype": "path",
        "svg.hashsalt": "trl_grpo_ext",
        "font.family": "DejaVu Sans",  # matplotlib brings it
        "hatch.linewidth": 0.5,
    }
    for name, picture in PICTURES_DRAWN.items():
        data = json.loads((data_folder / f"{name}.json").read_text())
        for suffix, colors in THEMES.items():
            files.append(folder / f"{name}{suffix}.svg")
            with rc_context(settings):
                picture(data, colors).savefig(files[-1], transparent=True, metadata={"Date": None, "Creator": None})
    return files


def photograph(report: Path, folder: Path) -> list[Path]:
    """The beginning of a report and its first chart, light and dark."""
    from PIL import Image  # matplotlib brings it

    sync_playwright = import_module("playwright.sync_api").sync_playwright
    # What lies between the two, and what comes behind
    left_out = "#results, #results ~ *, figure:first-child ~ figure, .figures ~ *, section:has(#pictures) ~ *, .footer"
    files = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": 900, "height": 400}, color_scheme=scheme, device_scale_factor=1.5
            )
            page.goto(report.resolve().as_uri())
            page.add_style_tag(content=f"{left_out} {{ display: none !important; }} main {{ padding-bottom: 1rem; }}")
            files.append(folder / f"report_{scheme}.png")
            page.screenshot(path=files[-1], full_page=True)
            with Image.open(files[-1]) as image:
                image.convert("RGB").quantize(64).save(files[-1], optimize=True)
        browser.close()
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of the demo, for the learning curve's figures")
    parser.add_argument("--report", type=Path, help="a report, of which a part is shown")
    parser.add_argument("--output_dir", type=Path, default=PICTURES, help="where the pictures go")
    options = parser.parse_args()
    if options.run is not None:
        figures = take_run(options.run)
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in figures.items())
        (PICTURES / "learning_curve.json").write_text(f"{{\n{lines}\n}}\n")
    for file in draw(options.output_dir) if options.report is None else photograph(options.report, options.output_dir):
        print(file)


if __name__ == "__main__":
    main()
