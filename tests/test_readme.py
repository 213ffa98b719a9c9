"""What README, the recipes' page and the guides say can be found: links, commands, names, pictures."""

import json
import re
import tomllib
from pathlib import Path
from urllib.parse import unquote

import matplotlib
import pytest
from launch import load_script

from trl_grpo_ext.cli import SUBCOMMANDS


ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RECIPES = ROOT / "recipes" / "README.md"
GUIDES = ROOT / "recipes" / "guides"
PICTURES = ROOT / "recipes" / "pictures"
PAGES = [README, RECIPES, *sorted(GUIDES.glob("*.md"))]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text):
    """A page's text without its code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def links_of(text):
    text = without_code(text)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"""(?:src|srcset|href)="([^"]+)\"""", text)


def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    anchors = []
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        anchors.append(f"{name}-{count}" if (count := anchors.count(name)) else name)
    return anchors


def broken_links(page):
    broken = []
    for link in links_of(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@each_page
def test_links_lead_somewhere(page):
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `thing`, two\n\n## Two\n\n## Two\n\n[a](#one-thing-two) [b](#two) [c](#two-1) `[d](no.md)`\n"
        '[f](#two-2) [g](none.md) [e](page.md)\n<img src="none.svg"> [h](page.md#three) [i](https://example.com/#x)\n'
        "```python\nx[0](1)\n```\n"
    )
    assert broken_links(page) == ["#two-2", "none.md", "page.md#three", "none.svg"]


def test_the_readme_is_short():
    """Words of code, of addresses and of tables count as well."""
    assert len(re.findall(r"\S*\w\S*", README.read_text())) <= 1200


def test_every_guide_is_in_the_index():
    listed = set(links_of(RECIPES.read_text()))
    assert {f"guides/{page.name}" for page in GUIDES.glob("*.md")} <= listed


# Commands


def commands_in_text(text):
    """Commands that stand in a sentence or a table."""
    for command in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        if re.match(r"(accelerate launch \S|trl-grpo-ext \w+ |trl grpo|sbatch|python scripts|bash scripts)", command):
            yield command


@pytest.mark.parametrize("page", [README, RECIPES], ids=["README", "recipes"])
def test_commands_and_python_can_be_had(page, tmp_path):
    """Options against the programs' own parsers, imports and settings against the packages; nothing is run."""
    guides = pytest.importorskip("guides", reason="comes with the guides' tests")
    (tmp_path / "run.yaml").write_text("max_steps: 1\n")  # what a page calls a reader's own file
    looked_at = 0
    with guides.in_a_folder(tmp_path):
        for block in guides.blocks_of(page):
            if block.language == "python":
                guides.look_at_python(block)
            elif block.language == "bash":
                for words in guides.commands_of(block.text):
                    guides.look_at_command(words)
                    looked_at += 1
        for command in commands_in_text(page.read_text()):
            for words in guides.commands_of(command):
                guides.look_at_command(words)
                looked_at += 1
    assert looked_at > 3


def test_the_readme_names_every_subcommand():
    text = README.read_text()
    table = text[text.index("| `trl-grpo-ext ...` |") :].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(SUBCOMMANDS)


def test_extras_that_are_named_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for named in re.findall(r'"\.\[([\w,]+)\]"', page.read_text()):
            assert set(named.split(",")) <= set(extras), page


# The map


def tree_of(text):
    """The paths of a file tree: a name, two spaces deeper than its folder's, and what it is for."""
    folders = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent > 6 or not line.strip():  # a purpose that goes on
            continue
        names = re.match(r"(?:\S+, )*\S+", line.strip())[0]
        folders = folders[: indent // 2]
        for name in names.split(", "):
            yield "/".join([*folders, name.rstrip("/")])
        if names.endswith("/"):
            folders.append(names.rstrip("/"))


def test_the_map_is_complete():
    """Every module has its line, but a subcommand, and every line its file."""
    page = (GUIDES / "development.md").read_text()
    (tree,) = re.findall(r"^```\n(trl_grpo_ext/.*?)^```$", page, re.MULTILINE | re.DOTALL)
    listed = set(tree_of(tree))
    missing = {path for path in listed if not (ROOT / path).exists()}
    assert not missing
    for folder in (ROOT / "trl_grpo_ext", ROOT / "scripts"):
        for file in folder.rglob("*.py"):
            path = file.relative_to(ROOT).as_posix()
            is_started = path.removesuffix(".py") + ".sh" in listed
            is_part = (
                is_started or file.name.startswith("_") or file.parent.name in ("cli", "embedded_policy", "rules")
            )
            assert path in listed or is_part, path


# Pictures


@pytest.fixture(scope="module")
def script():
    return load_script(ROOT / "scripts" / "draw_pictures.py")


def test_the_pictures_are_those_of_their_figures(script, tmp_path):
    if f"matplotlib=={matplotlib.__version__}" not in (ROOT / "constraints.txt").read_text().splitlines():
        pytest.skip("another version of matplotlib draws other bytes")
    drawn = script.draw(tmp_path)
    assert {file.name for file in drawn} == {file.name for file in PICTURES.glob("*.svg")}
    for file in drawn:
        assert file.read_bytes() == (PICTURES / file.name).read_bytes(), f"draw it again: {file.name}"


def test_the_figures_of_the_learning_curve_are_a_run_s(script, tmp_path):
    """Those of each evaluation by the step; one after training stands at the last step."""

    def line(evaluation, step, problems, strict):
        of = {"mean": strict, "low": strict - 0.1, "high": strict + 0.1}
        figures = {"items": 8, "completions": 8, "samples_per_item": 0, "strict": of, "strict_mean@4": of}
        return json.dumps({"evaluation": evaluation, "step": step, "set": problems, "figures": figures})

    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "figures.jsonl").write_text(
        "\n".join(
            line(evaluation, step, problems, strict)
            for evaluation, step, strict in (("before", 0, 0.2), ("step", 10, 0.5), ("after", 10, 0.5))
            for problems in ("heldout", "heldout_templates")
        )
    )
    figures = script.take_run(tmp_path)
    assert figures["step"] == [0, 10]
    assert figures["greedy"] == figures["sampled"] == [[0.2, 0.1, 0.3], [0.5, 0.4, 0.6]]
    with pytest.raises(SystemExit, match="has no figures"):
        script.take_run(tmp_path / "answers")


def test_the_packed_row_s_tokens_are_counted_by_hand():
    groups = json.loads((PICTURES / "packed_row.json").read_text())["groups"]
    completions = sum(sum(group["completion_tokens"]) for group in groups)
    # each prompt without its last token; each completion with that one in place of its own last
    packed = completions + sum(group["prompt_tokens"] - 1 for group in groups)
    width = max(group["prompt_tokens"] for group in groups) + max(max(group["completion_tokens"]) for group in groups)
    padded = width * sum(len(group["completion_tokens"]) for group in groups)
    assert f"{padded:,} tokens" in README.read_text()
    assert f"row of {packed}" in README.read_text()


def test_the_update_s_cost_is_that_of_the_table():
    row = r"^\| `[\w-]+`, \d passes \| TRL \| ([\d.]+) \| .*\n\| \| ours \| ([\d.]+) \| "
    rows = re.findall(row, (GUIDES / "update.md").read_text(), re.MULTILINE)
    loads = json.loads((PICTURES / "update_cost.json").read_text())["workloads"]
    assert [(float(trl), float(ours)) for trl, ours in rows] == [(load["trl_s"], load["ours_s"]) for load in loads]
    for load in loads:
        assert load["ratio"] == pytest.approx(load["trl_s"] / load["ours_s"], rel=0.01)
        assert f"{load['ratio']:#.3g}" in README.read_text()


def test_the_learning_curve_begins_and_ends_as_the_recipes_say():
    figures = json.loads((PICTURES / "learning_curve.json").read_text())
    table = re.findall(
        r"^\| .+ \| ([\d.]+) % \(([\d.]+) to ([\d.]+)\) \| ([\d.]+) % \(([\d.]+) to ([\d.]+)\) \|$",
        RECIPES.read_text(),
        re.MULTILINE,
    )
    assert len(table) == 3
    for name, row in zip(("greedy", "sampled", "unseen"), table, strict=True):
        ends = [*figures[name][0], *figures[name][-1]]
        assert [float(cell) for cell in row] == pytest.approx([100 * value for value in ends], abs=0.06)
