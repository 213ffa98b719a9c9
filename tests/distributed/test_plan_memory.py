"""The plan's model states against what ranks really hold."""

import json
from pathlib import Path

import pytest
from launch import ROOT, launcher, load_script, run_to_the_end
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
    module = load_script(ROOT / "scripts" / "plan_memory.py")
    configs = {
        name: {"num_attention_heads": 4, "tie_word_embeddings": shape["tied"], **shape}
        for name, shape in CONFIGS.items()
    }
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    script = str(Path(__file__).with_name("hold_model_states.py"))
    files = [str(tmp_path / name) for name in ("configs.json", "held.json")]
    result = run_to_the_end([*launcher("ddp_cpu.yaml"), script, *files], timeout=200)
    assert (tmp_path / "held.json").exists(), result.stderr[-3000:]
    held = json.loads((tmp_path / "held.json").read_text())
    for name, config in configs.items():
        size = module.model_size(LlamaConfig(**config))
        for stage in (1, 2, 3):
            found = held[name][str(stage)]
            assert found["parameters"] == size.parameters
            assert module.model_states(size, stage, num_gpus=2) == pytest.approx(found["held"], rel=0.02)
