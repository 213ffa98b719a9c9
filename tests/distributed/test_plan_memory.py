"""The plan's model states against what ranks really hold."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ENVIRONMENT, ROOT, launcher
from transformers import LlamaConfig


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

CONFIGS = {
    "deep": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "tied": True},
    "many words": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "tied": False,
    },
    "wide": {"vocab_size": 1000, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "tied": True},
}


def test_model_states(tmp_path):
    spec = importlib.util.spec_from_file_location("plan_memory", ROOT / "scripts" / "plan_memory.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    configs = {
        name: {"num_attention_heads": 4, "tie_word_embeddings": shape["tied"], **shape}
        for name, shape in CONFIGS.items()
    }
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    result = subprocess.run(
        [
            *launcher("ddp_cpu.yaml"),
            str(Path(__file__).with_name("hold_model_states.py")),
            *(str(tmp_path / name) for name in ("configs.json", "held.json")),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env=ENVIRONMENT,
        check=False,
    )
    assert (tmp_path / "held.json").exists(), result.stderr[-3000:]
    held = json.loads((tmp_path / "held.json").read_text())
    for name, config in configs.items():
        size = module.model_size(LlamaConfig(**config))
        for stage in (1, 2, 3):
            found = held[name][str(stage)]
            assert found["parameters"] == size.parameters
            assert module.model_states(size, stage, num_gpus=2) == pytest.approx(found["held"], rel=0.02)
