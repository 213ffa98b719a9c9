"""What a trainer on a tiny copy of a model says, against what is known of each family."""

import pytest
from tiny import tiny_tokenizer
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)
from trl import ModelConfig

from trl_grpo_ext import GRPOExtConfig
from trl_grpo_ext.rehearsal import rehearse, tiny_config


SMALL = {
    **{"num_hidden_layers": 4, "vocab_size": 600, "hidden_size": 64, "intermediate_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}


def ask(tmp_path, config, longest_row=100, use_peft=False, **settings):
    args = {"use_cpu": True, "bf16": False, "report_to": "none", "num_iterations": 2, **settings}
    args = GRPOExtConfig(str(tmp_path), per_device_train_batch_size=8, **args)
    model_args = ModelConfig(use_peft=use_peft, lora_dropout=0.1)
    return rehearse(config, tiny_tokenizer(), args, model_args, longest_row)


def test_a_copy_is_small_and_of_the_same_kind():
    config = Qwen2Config(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=28)
    small = tiny_config(config)
    assert type(small) is Qwen2Config
    assert (small.num_attention_heads, small.num_key_value_heads, small.hidden_size) == (7, 1, 7 * 128)
    assert (small.num_hidden_layers, config.num_hidden_layers) == (2, 28)
    both = tiny_config(Gemma3TextConfig())
    assert {"sliding_attention", "full_attention"} == set(both.layer_types)


def test_what_can_be_packed(tmp_path):
    paths = ask(tmp_path, LlamaConfig(**SMALL), beta=0.1)
    assert (paths.why_padded, paths.why_rows_stay, paths.why_no_reuse) == (None, None, None)
    assert paths.takes_old_policy_forward
    assert paths.attention == "sdpa"


@pytest.mark.parametrize(
    ("config", "settings", "why"),
    [
        (Gemma2Config(**SMALL), {}, "eager"),
        (GPT2Config(n_layer=2, vocab_size=600, n_embd=64, n_head=4), {}, "differ by"),
        (Gemma3TextConfig(**SMALL), {"longest_row": 5000}, "sliding window"),
        (LlamaConfig(**SMALL), {"shared_prefix": "off"}, "shared_prefix"),
        (LlamaConfig(**SMALL), {"neftune_noise_alpha": 1.0}, "NEFTune"),
    ],
    ids=["eager", "found by the comparison", "window", "off", "noise"],
)
def test_what_cannot_be_packed(tmp_path, config, settings, why):
    assert why in ask(tmp_path, config, **settings).why_padded


@pytest.mark.parametrize(
    ("config", "settings", "why"),
    [
        (LlamaConfig(**SMALL), {"loss_type": "bnpo"}, "bnpo"),
        (LlamaConfig(**SMALL), {"entropy_coef": 0.01}, "an entropy bonus"),
        (LlamaConfig(**SMALL), {"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        (Qwen3MoeConfig(**SMALL, output_router_logits=True), {}, "MoE"),
    ],
)
def test_where_rows_stay(tmp_path, config, settings, why):
    assert why in ask(tmp_path, config, **settings).why_rows_stay


def test_where_the_old_policy_takes_a_forward(tmp_path):
    assert "dropout" in ask(tmp_path, LlamaConfig(**SMALL), use_peft=True).why_no_reuse
    assert "reuse_first_pass_logps" in ask(tmp_path, LlamaConfig(**SMALL), reuse_first_pass_logps=False).why_no_reuse
    with_vllm = ask(tmp_path, LlamaConfig(**SMALL), use_vllm=True, entropy_coef=0.01)
    assert "vLLM" in with_vllm.why_no_reuse
    single = ask(tmp_path, LlamaConfig(**SMALL), num_iterations=1)
    assert not single.takes_old_policy_forward
