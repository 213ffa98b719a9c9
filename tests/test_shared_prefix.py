"""The packed forward against a forward of each row by itself, and whole runs against TRL's."""

import sys
from contextlib import nullcontext
from copy import deepcopy
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from accelerate.utils import is_compiled_module
from canned import (
    canned_config,
    canned_prompts,
    canned_reward,
    give_scoring_head,
    relative_difference,
    train_canned,
)
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny import tiny_tokenizer
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils as trl_utils

from trl_grpo_ext import compat
from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.shared_prefix import SharedPrefixMixin, attention, kernels, mixin
from trl_grpo_ext.shared_prefix.attention import Segments
from trl_grpo_ext.shared_prefix.layout import on_device, packed_layout
from trl_grpo_ext.shared_prefix.mixin import find_obstacle
from trl_grpo_ext.trainer import GRPOExtTrainer


class PackingTrainer(SharedPrefixMixin, GRPOTrainer):
    pass


TOKENS = {"vocab_size": 259, "bos_token_id": None, "eos_token_id": 258, "pad_token_id": 256}
SHAPE = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama, a key head for each": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "llama, one key head": LlamaConfig(**{**SHAPE, "num_key_value_heads": 1, "head_dim": 24}),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma": GemmaConfig(**SHAPE, head_dim=8),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=256),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "phi3": Phi3Config(**SHAPE),
}


def make_model(config, seed=0):
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases too: logits that differ
    return model


def make_trainer(model, tmp_path, trainer_class=PackingTrainer, **options):
    config_class = GRPOExtConfig if trainer_class is not GRPOTrainer else GRPOConfig
    return trainer_class(
        model=model,
        reward_funcs=canned_reward,
        args=canned_config(tmp_path, config_class, **options),
        train_dataset=canned_prompts(),
        processing_class=tiny_tokenizer(),
    )


# (prompt's number, its length, the completion's length): prompts apart from each other, empty and short completions
ROWS = [(0, 5, 7), (1, 1, 3), (0, 5, 1), (2, 90, 70), (1, 1, 0), (2, 90, 66), (0, 5, 12), (3, 2, 2)]


def make_rows(rows=ROWS, seed=0):
    """Prompts and completions as TRL lays them out: token ids, mask, columns of the completions."""
    numbers = torch.Generator().manual_seed(seed)
    prompt_width, width = max(row[1] for row in rows) + 1, max(row[2] for row in rows) + 1
    prompts = torch.randint(0, 256, (8, 128), generator=numbers)
    ids = torch.full((len(rows), prompt_width + width), 256)
    mask = torch.zeros_like(ids)
    for index, (prompt, length, completion) in enumerate(rows):
        places = slice(prompt_width - length, prompt_width + completion)
        ids[index, places] = torch.cat(
            [prompts[prompt, :length], torch.randint(0, 256, (completion,), generator=numbers)]
        )
        mask[index, places] = 1
    return ids, mask, width


def by_row(model, ids, mask, width, temperature=1.0):
    """The oracle: each row by itself, without padding, through the plain forward."""
    logps, entropies = torch.zeros(len(ids), width), torch.zeros(len(ids), width)
    for row in range(len(ids)):
        length = int(mask[row, -width:].sum())
        tokens = ids[row][mask[row].bool()]
        logits = model(tokens.unsqueeze(0)).logits[0].float() / temperature
        distribution = torch.log_softmax(logits, dim=-1)[:-1][-length:] if length else logits[:0]
        logps[row, :length] = distribution.gather(1, tokens[len(tokens) - length :].unsqueeze(1)).squeeze(1)
        entropies[row, :length] = -(distribution.exp() * distribution).sum(-1)
    return logps, entropies


def scores(trainer, ids, mask, width, model=None):
    """A trainer's log-probabilities and entropies; TRL's of padding are 0 from 1.15 on, and made so before."""
    forward = trainer._get_per_token_logps_and_entropies
    model = trainer.model if model is None else model  # a compiled one cannot be asked whether it is there
    found = forward(model, ids, mask, width, compute_entropy=True)[:2]
    if compat.HAS_SCORING_HEAD:
        return found
    return [values.masked_fill(mask[:, -width:] == 0, 0.0) for values in found]


def gradients(model, logps, entropies):
    """Of a sum in which each value has a weight of its own; entropies where TRL's have a gradient."""
    numbers = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *logps.shape, generator=numbers)
    model.zero_grad()
    total = weights[0] * logps
    if compat.HAS_SCORING_HEAD:
        total = total + weights[1] * entropies
    total.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, tolerance=1e-5):
    """Each tensor by itself; where one is almost 0, relative to a hundredth of the largest."""
    assert found.keys() == expected.keys()
    norms = {name: value.double().norm() for name, value in expected.items()}
    for name, norm in norms.items():
        difference = (found[name].double() - expected[name].double()).norm()
        assert difference <= tolerance * max(norm, max(norms.values()) / 100), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_logps_entropies_and_gradients(family, temperature, tmp_path):
    ids, mask, width = make_rows()
    oracle = make_model(FAMILIES[family])
    expected = by_row(oracle, ids, mask, width, temperature)
    trainer = make_trainer(make_model(FAMILIES[family]), tmp_path, shared_prefix="on", temperature=temperature)
    logps, entropies = scores(trainer, ids, mask, width)
    assert trainer.packs
    assert_close({"logps": logps, "entropies": entropies}, {"logps": expected[0], "entropies": expected[1]})
    assert_close(gradients(trainer.model, logps, entropies), gradients(oracle, *expected))


@pytest.mark.parametrize("rows", [[(0, 3, 4)], [(0, 1, 1)], [(0, 3, 0), (1, 2, 0)], [(0, 4, 3), (1, 4, 3)]])
def test_few_rows(rows, tmp_path):
    ids, mask, width = make_rows(rows)
    oracle = make_model(FAMILIES["qwen2"])
    expected = by_row(oracle, ids, mask, width)
    trainer = make_trainer(make_model(FAMILIES["qwen2"]), tmp_path, shared_prefix="on")
    logps, entropies = scores(trainer, ids, mask, width)
    assert_close({"logps": logps, "entropies": entropies}, {"logps": expected[0], "entropies": expected[1]})
    found = gradients(trainer.model, logps, entropies)  # a whole micro-batch without a token has a gradient of 0
    if mask[:, -width:].any():
        assert_close(found, gradients(oracle, *expected))
    else:
        assert found
        assert all(not gradient.any() for gradient in found.values())


def test_chunks_of_a_forward_without_gradient(tmp_path):
    """TRL asks for old and reference log-probabilities of many rows, so many at a time."""
    ids, mask, width = make_rows()
    trainer = make_trainer(make_model(FAMILIES["llama"]), tmp_path, shared_prefix="on")
    forward = trainer._get_per_token_logps_and_entropies
    with torch.no_grad():
        whole, chunks = forward(trainer.model, ids, mask, width)[0], forward(trainer.model, ids, mask, width, 3)
    assert chunks[1:] == (None, None)
    torch.testing.assert_close(chunks[0], whole)


def test_bf16_autocast(tmp_path):
    ids, mask, width = make_rows()
    padded, packed = (
        make_trainer(make_model(FAMILIES["qwen2"]), tmp_path, bf16=True, **options)
        for options in ({"trainer_class": GRPOTrainer}, {"shared_prefix": "on"})
    )
    results = {}
    for name, trainer in (("padded", padded), ("packed", packed)):
        logps, entropies = scores(trainer, ids, mask, width)
        found = gradients(trainer.model, logps, entropies)
        results[name] = logps.detach(), torch.cat([gradient.flatten() for gradient in found.values()])
    assert packed.packs
    assert (results["packed"][0] - results["padded"][0]).abs().mean() < 0.01
    assert torch.cosine_similarity(results["packed"][1], results["padded"][1], dim=0) > 0.999


@pytest.mark.parametrize("cast", [False, True])
def test_lm_head_in_fp32(cast, tmp_path):
    ids, mask, width = make_rows()
    logps = {}
    for name, options in (("padded", {"trainer_class": GRPOTrainer}), ("packed", {"shared_prefix": "on"})):
        trainer = make_trainer(
            make_model(FAMILIES["llama"]), tmp_path, cast_lm_head_to_fp32=cast, bf16=True, **options
        )
        logps[name] = scores(trainer, ids, mask, width)[0].detach()
    assert (logps["packed"] - logps["padded"]).abs().mean() < 0.01


# Whole runs. `test_iterations.py` has more of them: `GRPOExtTrainer` packs wherever it can.

RUNS = [
    pytest.param({}, id="plain"),
    pytest.param({"num_iterations": 2, "beta": 0.04}, id="reference model"),
    pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
    pytest.param(
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
            "num_iterations": 2,
        },
        id="checkpointing, reentrant",
    ),
    pytest.param({"peft": True, "num_iterations": 2, "beta": 0.04}, id="LoRA, reference by disabled adapter"),
    pytest.param({"peft": True, "gradient_checkpointing": True}, id="LoRA, checkpointing"),
    pytest.param(
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_iterations": 2, "loss_type": "grpo"},
        id="accumulation",
    ),
    pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, id="one row at a time"),
    pytest.param({"loss_type": "cispo", "num_iterations": 2}, id="a delegated loss"),
    pytest.param({"temperature": 0.7, "mask_truncated_completions": True, "loss_type": "dr_grpo"}, id="truncated"),
]


def run(trainer_class, policy, folder, peft=False, **options):
    config_class = GRPOConfig if trainer_class is GRPOTrainer else GRPOExtConfig
    passed = {"peft_config": LoraConfig(r=2, init_lora_weights=False)} if peft else {}
    set_seed(0)
    return train_canned(trainer_class, canned_config(folder, config_class, **options), policy, **passed)


@pytest.mark.parametrize("trainer_class", [GRPOExtTrainer, pytest.param(PackingTrainer, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [pytest.param(*run.values, id=run.id, marks=[pytest.mark.slow] if n % 2 else []) for n, run in enumerate(RUNS)],
)
def test_runs_equal_trl(options, trainer_class, policy, tmp_path):
    expected = run(GRPOTrainer, policy, tmp_path, **options)
    found = run(trainer_class, policy, tmp_path, shared_prefix="on", **options)
    assert found.trainer.packs
    assert found.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5)
    start = run(GRPOTrainer, policy, tmp_path, learning_rate=0.0, max_steps=1, peft=options.get("peft", False)).weights
    assert relative_difference(found.weights, expected.weights, start) <= 1e-5
    tokens = zip(found.metric("update/tokens"), found.metric("update/tokens_padded"), strict=True)
    assert all(computed < padded for computed, padded in tokens)


@pytest.mark.parametrize("options", [{}, {"skip_zero_advantage": False}, {"loss_type": "bnpo"}])
def test_metrics_of_the_update(options, policy, tmp_path):
    found = run(GRPOExtTrainer, policy, tmp_path, max_steps=3, shared_prefix="on", **options)
    plain = run(GRPOTrainer, policy, tmp_path, max_steps=3)
    # TRL's micro-batches: all rows as wide as the widest prompt and the widest completion together
    padded, computed = (
        [forward.tokens for forward in done.forwards if forward.has_gradient] for done in (plain, found)
    )
    assert found.metric("update/tokens_padded") == padded
    assert found.metric("update/tokens") == computed
    skipped = found.metric("update/rows_skipped")
    assert (sum(skipped) > 0) == (options == {})


# What cannot be packed


UNPACKABLE = [
    pytest.param(
        MistralConfig(**SHAPE, sliding_window=8), "sliding window of 8 tokens is shorter", id="sliding window"
    ),
    pytest.param(
        Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=8), "sliding window of 8", id="some sliding layers"
    ),
    pytest.param(
        Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), "carry a state along the row", id="hybrid"
    ),
    pytest.param(
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "depends on the length of the row",
        id="positions scaled with the row",
    ),
    pytest.param(
        GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "differ by",
        id="absolute positions",
    ),
]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] if n % 2 else [])
        for n, case in enumerate(UNPACKABLE)
    ],
)
def test_falls_back_and_trains_the_same(config, reason, tmp_path, caplog):
    make_model(config).save_pretrained(tmp_path / "policy")
    model = str(tmp_path / "policy")
    expected = run(GRPOTrainer, model, tmp_path)
    with caplog.at_level("WARNING"):
        found = run(GRPOExtTrainer, model, tmp_path, shared_prefix="auto")
    assert [reason in record.message for record in caplog.records if "Rows are padded" in record.message] == [True]
    assert found.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5)
    start = run(GRPOTrainer, model, tmp_path, learning_rate=0.0, max_steps=1).weights
    assert relative_difference(found.weights, expected.weights, start) <= 1e-5
    with pytest.raises(ValueError, match=f"shared_prefix='on'.*{reason}"):
        run(GRPOExtTrainer, model, tmp_path, shared_prefix="on")


@pytest.mark.parametrize(
    ("config", "attn_implementation", "reason"),
    [
        (FAMILIES["llama"], "eager", "attn_implementation is 'eager'"),
        (Gemma2Config(**SHAPE, head_dim=8), "eager", "attn_implementation is 'eager'"),
        (Gemma2Config(**SHAPE, head_dim=8), "sdpa", "attention scores are soft-capped"),
        (GptOssConfig(**SHAPE, head_dim=8, num_local_experts=2), "sdpa", "attention sinks"),
        (MixtralConfig(**SHAPE, num_local_experts=2, output_router_logits=True), "sdpa", "MoE auxiliary loss"),
    ],
)
def test_obstacles(config, attn_implementation, reason):
    model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager")
    model.config._attn_implementation = attn_implementation
    assert reason in find_obstacle(model)


def test_prompt_learning_is_an_obstacle():
    model = make_model(FAMILIES["llama"])
    adapter = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert "PREFIX_TUNING" in find_obstacle(get_peft_model(model, adapter))
    assert find_obstacle(make_model(FAMILIES["llama"])) is None


def test_an_activated_lora_is_an_obstacle():
    """It works from its invocation tokens on, which it looks for once in a row; the rows compared have none."""
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[70, 71])
    model = get_peft_model(make_model(FAMILIES["llama"]), adapter)
    assert "alora_invocation_tokens" in find_obstacle(model)
    model.add_adapter("plain", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.delete_adapter("default")
    assert find_obstacle(model) is None


@pytest.mark.parametrize("shared_prefix", ["auto", "on"])
def test_a_model_that_loses_the_segments_is_found_out(shared_prefix, tmp_path, monkeypatch, caplog):
    plain = LlamaAttention.forward

    def forward(self, *args, segments=None, **kwargs):
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    ids, mask, width = make_rows()
    trainer = make_trainer(make_model(FAMILIES["llama"]), tmp_path, shared_prefix=shared_prefix)
    if shared_prefix == "on":
        with pytest.raises(ValueError, match="no attention layer was given the segments"):
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
        return
    with caplog.at_level("WARNING"):
        logps, _ = scores(trainer, ids, mask, width)
    assert "no attention layer was given the segments" in caplog.text
    assert trainer.model.config._attn_implementation == "sdpa"
    expected, _ = by_row(trainer.model, ids, mask, width)
    torch.testing.assert_close(logps.detach(), expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lost", "names"), [("attention", r".*q_proj.*others"), ("bias", ".*0.*bias, .*1.*bias")])
def test_a_model_that_loses_gradients_is_found_out(lost, names, dtype, tmp_path, monkeypatch):
    """Its packed log-probabilities are those of padded rows."""
    plain = Qwen2Attention.forward

    def forward(self, *args, segments=None, **kwargs):
        bias = self.q_proj.bias
        if segments is not None and lost == "bias":
            self.q_proj._parameters["bias"] = bias.detach()
        output, weights = plain(self, *args, segments=segments, **kwargs)
        self.q_proj._parameters["bias"] = bias
        return output.detach() if segments is not None and lost == "attention" else output, weights

    monkeypatch.setattr(Qwen2Attention, "forward", forward)
    trainer = make_trainer(make_model(FAMILIES["qwen2"]).to(dtype), tmp_path, shared_prefix="on")
    with pytest.raises(ValueError, match=f"shared_prefix='on'.* gradient is not a padded one's for {names}"):
        _ = trainer.packs


def test_a_fresh_doge_is_padded(tmp_path, caplog):
    """Its attention makes a mask from the values, which does nothing at first but to have a gradient."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(DogeConfig(**SHAPE), attn_implementation="sdpa")
    expected = logps_and_gradients(make_trainer(deepcopy(model), tmp_path, GRPOTrainer))
    trainer = make_trainer(model, tmp_path)
    with caplog.at_level("WARNING"):
        found = logps_and_gradients(trainer)
    assert "makes a mask of its own" in caplog.text
    assert found["model.layers.0.self_attn.A"].any()
    assert_close(found, expected)


def test_comparing_forwards_leaves_no_trace(tmp_path):
    model = make_model(FAMILIES["llama"])
    trainer = make_trainer(model, tmp_path, shared_prefix="on")
    model.gradient_checkpointing_enable()
    model.train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: pytest.fail("a backward"))
    assert trainer.packs
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.is_gradient_checkpointing
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not any(hook.__module__.startswith("trl_grpo_ext") for hook in hooks)


def test_off(policy, tmp_path):
    found = run(GRPOExtTrainer, policy, tmp_path, max_steps=1, shared_prefix="off")
    assert not found.trainer.packs


def test_generation_and_saved_models_are_as_they_were(policy, tmp_path):
    """The attention is the stock one for all but packed rows, under its own name."""
    prompt = torch.tensor([[256, 256, 70, 71], [72, 73, 74, 75]])
    options = {"attention_mask": (prompt != 256).long(), "max_new_tokens": 8, "do_sample": False}
    expected = AutoModelForCausalLM.from_pretrained(policy).generate(prompt, **options)
    found = run(GRPOExtTrainer, policy, tmp_path, learning_rate=0.0, max_steps=1, shared_prefix="on")
    model = found.trainer.model
    assert torch.equal(model.eval().generate(prompt, **options), expected)
    assert model.config._attn_implementation == "sdpa"
    found.trainer.save_model(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_continuous_batching_trains_as_with_trl(tmp_path):
    """It asks for the attention by its name, between packed updates; the same tokens and the same steps."""
    options = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 16, "max_batch_tokens": 64},
        "max_steps": 2,
    }
    completions, norms, weights, packed_tokens = {}, {}, {}, {}
    start = make_model(FAMILIES["qwen2"]).state_dict()
    for trainer_class, packing in ((GRPOTrainer, {}), (GRPOExtTrainer, {"shared_prefix": "on"})):
        seen = completions[trainer_class] = []

        def reward(completion_ids, seen=seen, **kwargs):
            seen.append(completion_ids)
            return [float(sum(ids) % 5) for ids in completion_ids]

        set_seed(0)
        trainer = make_trainer(make_model(FAMILIES["qwen2"]), tmp_path, trainer_class, **options, **packing)
        trainer.reward_funcs = [reward]
        trainer.train()
        log = trainer.state.log_history
        norms[trainer_class] = [entry["grad_norm"] for entry in log if "grad_norm" in entry]
        packed_tokens[trainer_class] = [
            (entry["update/tokens"], entry["update/tokens_padded"]) for entry in log if "update/tokens" in entry
        ]
        weights[trainer_class] = trainer.model.state_dict()
    assert trainer.packs
    assert len(packed_tokens[GRPOExtTrainer]) == 2
    assert all(computed < padded for computed, padded in packed_tokens[GRPOExtTrainer])
    assert completions[GRPOExtTrainer] == completions[GRPOTrainer]
    assert len(norms[GRPOTrainer]) == 2
    assert min(norms[GRPOTrainer]) > 0
    assert norms[GRPOExtTrainer] == pytest.approx(norms[GRPOTrainer], rel=1e-5)
    assert relative_difference(weights[GRPOExtTrainer], weights[GRPOTrainer], start) <= 1e-5


# Models that are not this trainer's alone


def logps_and_gradients(trainer, model=None):
    ids, mask, width = make_rows()
    logps, entropies = scores(trainer, ids, mask, width, model)
    return {"logps": logps.detach(), **gradients(trainer.model, logps, entropies)}


def tokens_computed(trainer):
    return trainer._tokens_of_step[-1][0]


def test_trainers_on_one_model_all_pack(tmp_path):
    """One after the other and in turns, and with the stock attention set again in between."""
    model = make_model(FAMILIES["qwen2"])
    ids, mask, width = make_rows()
    oracle = make_model(FAMILIES["qwen2"])
    logps, entropies = by_row(oracle, ids, mask, width)
    expected = {"logps": logps.detach(), **gradients(oracle, logps, entropies)}
    padded_tokens = ids.numel()
    first = make_trainer(model, tmp_path, shared_prefix="on")
    assert_close(logps_and_gradients(first), expected)
    second = make_trainer(model, tmp_path, GRPOExtTrainer, shared_prefix="on")
    for trainer in (second, first, second):
        assert_close(logps_and_gradients(trainer), expected)
        assert tokens_computed(trainer) < padded_tokens
    model.set_attn_implementation("sdpa")
    padded = make_trainer(model, tmp_path, shared_prefix="off")
    for trainer in (first, padded, second):
        assert_close(logps_and_gradients(trainer), expected)
        assert (tokens_computed(trainer) < padded_tokens) == (trainer is not padded)


def test_another_attention_is_seen_at_any_time(tmp_path, caplog):
    trainer = make_trainer(make_model(FAMILIES["qwen2"]), tmp_path)
    expected = logps_and_gradients(trainer)
    assert trainer.packs
    trainer.model.set_attn_implementation("eager")
    with caplog.at_level("WARNING"):
        assert_close(logps_and_gradients(trainer), expected)
    assert "attn_implementation is 'eager'" in caplog.text
    assert tokens_computed(trainer) == make_rows()[0].numel()
    trainer.model.set_attn_implementation("sdpa")
    assert_close(logps_and_gradients(trainer), expected)
    assert tokens_computed(trainer) < make_rows()[0].numel()


@pytest.mark.parametrize("registers", [True, False])
def test_an_attention_that_others_set_is_wrapped_too(registers, tmp_path):
    """Under the same name, when rows are packed already: packed rows go on, and padded ones take the new function."""
    trainer = make_trainer(make_model(FAMILIES["qwen2"]), tmp_path, shared_prefix="on")
    expected = logps_and_gradients(trainer)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls = []

    def theirs(module, *args, **kwargs):
        calls.append(module)
        return before(module, *args, **kwargs)

    if registers:
        AttentionInterface.register("sdpa", theirs)
    else:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    try:
        assert_close(logps_and_gradients(trainer), expected)
        assert not calls
        trainer.model(input_ids=make_rows()[0])
        assert len(calls) == trainer.model.config.num_hidden_layers
    finally:
        AttentionInterface.register("sdpa", before)
        if not registers:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_teacher_is_computed_from_padded_rows(tmp_path):
    """Policy and reference are compared and packed; a model of the user's is neither, whatever it is."""
    trainer = make_trainer(make_model(FAMILIES["llama"]), tmp_path, shared_prefix="on")
    teacher = make_model(GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=2), seed=1).eval()
    give_scoring_head(teacher)
    ids, mask, width = make_rows()
    assert trainer.packs
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(teacher, ids, mask, width)[0]
        expected = GRPOTrainer._get_per_token_logps_and_entropies(trainer, teacher, ids, mask, width)[0]
    assert torch.equal(found, expected)


def test_a_model_is_recognised_in_its_wrapper(policy, tmp_path):
    trainer = make_trainer(make_model(FAMILIES["llama"]), tmp_path, shared_prefix="on")
    expected = logps_and_gradients(trainer)
    assert_close(logps_and_gradients(trainer, torch.nn.DataParallel(trainer.model)), expected)
    assert tokens_computed(trainer) < make_rows()[0].numel()


# Settings that packing cannot be combined with


def test_noise_on_embeddings_is_trls(policy, tmp_path, caplog):
    """NEFTune: padded rows, and a second forward of the old policy, because it is another one than the first."""
    options = {"neftune_noise_alpha": 5.0, "num_iterations": 2}
    expected = run(GRPOTrainer, policy, tmp_path, **options)
    with caplog.at_level("WARNING"):
        found = run(GRPOExtTrainer, policy, tmp_path, skip_zero_advantage=False, **options)
    assert "depends on the length of the row (neftune_noise_alpha)" in caplog.text
    assert found.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5)
    with pytest.raises(ValueError, match=r"shared_prefix='on'.*neftune_noise_alpha"):
        make_trainer(policy, tmp_path, shared_prefix="on", **options)


# Compiled models


needs_dynamo = pytest.mark.skipif(torch._dynamo.config.disable, reason="TORCHDYNAMO_DISABLE is set")


@pytest.fixture
def compiled_by_accelerate(monkeypatch):
    """What `torch_compile` leaves in the environment goes with the test."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch.compiler.reset()
    yield {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    torch.compiler.reset()


class CountedGraphs:
    """A backend that keeps what it compiles, of the graphs with packed attention."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        if any("packed_attention" in str(node.target) for node in graph.graph.nodes):
            self.graphs.append(graph)
        return graph.forward


@pytest.mark.slow
@needs_dynamo
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # without and with a sliding window
def test_a_compiled_model_is_compiled_for_few_of_many_shapes(family, checkpointing, compiled_by_accelerate, tmp_path):
    """Ten packed rows, with other groups and lengths: the same gradient, and a graph without an end in between."""
    counted = CountedGraphs()
    model, oracle = (make_model(FAMILIES[family]) for _ in range(2))
    options = {"shared_prefix": "on", "gradient_checkpointing": checkpointing}
    trainer = make_trainer(model, tmp_path, **options, **compiled_by_accelerate)
    assert trainer.packs
    compiled = torch.compile(trainer.model, backend=counted)
    computed = set()
    for number in range(10):
        rows = [(prompt, length + number % 3, completion + number) for prompt, length, completion in ROWS]
        ids, mask, width = make_rows(rows[: 3 + number % 5], seed=number)
        logps, entropies = scores(trainer, ids, mask, width, compiled)
        expected = by_row(oracle, ids, mask, width)
        assert_close(gradients(trainer.model, logps, entropies), gradients(oracle, *expected))
        computed.add(tokens_computed(trainer))
    assert len(computed) == 10
    assert 1 <= len(counted.graphs) <= 2
    num_layers = trainer.model.config.num_hidden_layers
    calls = [node.target for node in counted.graphs[-1].graph.nodes if "packed_attention" in str(node.target)]
    assert len(calls) == num_layers or checkpointing  # there a layer is a graph in the graph


@pytest.mark.slow
@needs_dynamo
def test_torch_compile_trains_as_trl(compiled_by_accelerate, tmp_path):
    make_model(FAMILIES["qwen2"]).save_pretrained(tmp_path / "policy")
    policy, options = str(tmp_path / "policy"), {"num_iterations": 2, "gradient_checkpointing": True}
    expected = run(GRPOTrainer, policy, tmp_path, **options)
    found = run(GRPOExtTrainer, policy, tmp_path, shared_prefix="on", **options, **compiled_by_accelerate)
    assert is_compiled_module(found.trainer.model_wrapped)
    assert found.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5)
    start = run(GRPOTrainer, policy, tmp_path, learning_rate=0.0, max_steps=1).weights
    assert relative_difference(found.weights, expected.weights, start) <= 1e-5
    tokens = zip(found.metric("update/tokens"), found.metric("update/tokens_padded"), strict=True)
    assert all(computed < padded for computed, padded in tokens)


@pytest.mark.slow
@needs_dynamo
@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_is_compiled_already_is_packed(in_place, tmp_path):
    model, oracle = (make_model(FAMILIES["llama"]) for _ in range(2))
    if in_place:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
    trainer = make_trainer(model, tmp_path, shared_prefix="on")
    ids, mask, width = make_rows()
    logps, entropies = by_row(oracle, ids, mask, width)
    expected = {"logps": logps.detach(), **gradients(oracle, logps, entropies)}
    found = logps_and_gradients(trainer)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)
    assert tokens_computed(trainer) < ids.numel()


# Attention implementations


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """What the package computes, row by row, in the states' own type."""
    outputs = []
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for (first, first_key), (end, end_key) in pairwise(ends):
        query, key, value = q[first:end], k[first_key:end_key], v[first_key:end_key]
        assert len(query) <= max_seqlen_q
        assert len(key) <= max_seqlen_k
        key, value = (states.repeat_interleave(q.size(1) // k.size(1), dim=1) for states in (key, value))
        scores = torch.einsum("nhd,mhd->hnm", query, key) * (softmax_scale or q.size(-1) ** -0.5)
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(key) - len(query))
            scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), value))
    return torch.cat(outputs)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    ends = torch.arange(q.size(0) + 1) * q.size(1)
    by_token = (states.flatten(0, 1) for states in (q, k, v))
    output = flash_attn_varlen_func(*by_token, ends, ends, q.size(1), q.size(1), dropout_p, softmax_scale, causal)
    return output.view(q.shape)


@pytest.fixture
def flash_attention_2(monkeypatch):
    """A package of the name and signatures of FlashAttention 2, which computes on a CPU."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = flash_attn_func
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    return "flash_attention_2"


def with_attention(model, name):
    model.config._attn_implementation = name
    return model


def test_flash_attention_2_trains_as_trl(flash_attention_2, tmp_path):
    """From model to loss: TRL's trainer unpads rows for the package, ours packs them."""
    runs = {}
    for trainer_class, options in ((GRPOTrainer, {}), (GRPOExtTrainer, {"shared_prefix": "on"})):
        model = with_attention(make_model(FAMILIES["qwen2"]), flash_attention_2)
        set_seed(0)
        config_class = GRPOConfig if trainer_class is GRPOTrainer else GRPOExtConfig
        config = canned_config(tmp_path, config_class, num_iterations=2, gradient_checkpointing=True, **options)
        runs[trainer_class] = train_canned(trainer_class, config, model)
    expected, found = runs[GRPOTrainer], runs[GRPOExtTrainer]
    assert found.trainer.model.config._attn_implementation == flash_attention_2
    assert found.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5)
    start = make_model(FAMILIES["qwen2"]).state_dict()
    assert relative_difference(found.weights, expected.weights, start) <= 1e-5
    tokens = zip(found.metric("update/tokens"), found.metric("update/tokens_padded"), strict=True)
    assert all(computed < padded for computed, padded in tokens)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "owner/kernel@revision"])
def test_every_attention_packs(name, tmp_path, monkeypatch):
    """With the gradient of attention as it is written down; what is registered is called without segments alone."""
    registered = ALL_ATTENTION_FUNCTIONS
    if name not in registered:  # as transformers registers a kernel of the hub when it loads it
        monkeypatch.setitem(AttentionInterface._global_mapping, name, registered["flash_attention_2"])
        monkeypatch.setitem(
            AttentionMaskInterface._global_mapping, name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
        )
    oracle = make_model(FAMILIES["qwen3"])
    ids, mask, width = make_rows()
    logps, entropies = by_row(oracle, ids, mask, width)
    expected = {"logps": logps.detach(), **gradients(oracle, logps, entropies)}
    trainer = make_trainer(with_attention(make_model(FAMILIES["qwen3"]), name), tmp_path, shared_prefix="on")
    monkeypatch.setattr(trainer, "_packs", True)  # these cannot compute padded rows here, to be compared with
    trainer._packed_models.add(trainer.model)
    assert_close(logps_and_gradients(trainer), expected)
    assert tokens_computed(trainer) < ids.numel()


def test_flash_attention_goes_back_to_the_models_type(tmp_path, monkeypatch):
    """Norms in fp32, as adapters leave them, make queries and keys that a model in bf16 cannot go on with."""
    trainer = make_trainer(with_attention(make_model(FAMILIES["qwen3"]).bfloat16(), "flash_attention_2"), tmp_path)
    for layer in trainer.model.model.layers:
        layer.self_attn.q_norm.float()
        layer.self_attn.k_norm.float()
    monkeypatch.setattr(trainer, "_packs", True)
    trainer._packed_models.add(trainer.model)
    ids, mask, width = make_rows()
    logps, _ = scores(trainer, ids, mask, width)
    expected, _ = by_row(make_model(FAMILIES["qwen3"]), ids, mask, width)
    assert (logps - expected).abs().mean() < 0.05


def test_an_attention_of_the_users_own_is_padded(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", lambda *args, **kwargs: None)
    assert "attn_implementation is 'mine'" in find_obstacle(with_attention(make_model(FAMILIES["llama"]), "mine"))


# Nothing waits for a GPU


def test_a_packed_forward_reads_nothing_back_from_its_device(tmp_path, monkeypatch):
    """On torch's device without storage every way to look at a value is an error."""
    ids, mask, width = make_rows()
    trainer = make_trainer(make_model(FAMILIES["qwen2"]), tmp_path, shared_prefix="on")
    assert trainer.packs
    monkeypatch.setitem(kernels.KERNELS, "meta", kernels.FlashKernel())
    monkeypatch.setattr(kernels, "why_not", lambda *states: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # which does not know this device
    if hasattr(trl_utils, "_use_triton"):
        monkeypatch.setattr(trl_utils, "_use_triton", lambda device: True)  # as on a GPU, where it takes padding out
    model = trainer.model.to("meta")
    (layout,) = on_device([packed_layout(ids, mask, width)], torch.device("meta"))
    log_probs, entropies = trainer._forward_of_packed_row(model, ids.to("meta"), layout, True)
    logps, entropies = layout.unpack(log_probs[0]), layout.unpack(entropies[0])
    assert (logps.device.type, logps.shape) == ("meta", (len(ids), width))
    (logps.sum() + entropies.sum()).backward()
    assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())
    # the head's rows are those that it has to score
    assert log_probs.shape == (1, int(mask[:, -width:].sum()))
    if hasattr(trl_utils, "_use_triton"):
        monkeypatch.setattr(mixin.compat, "every_row_scored", nullcontext)
        with pytest.raises(NotImplementedError):
            trainer._forward_of_packed_row(model, ids.to("meta"), layout, True)


@pytest.mark.skipif(not hasattr(trl_utils, "_use_triton"), reason="this TRL's head takes no padding out")
def test_forwards_that_overlap_leave_trls_head_as_it_was():
    stock = trl_utils._use_triton
    first, second = compat.every_row_scored(), compat.every_row_scored()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not trl_utils._use_triton(torch.device("cuda"))
    second.__exit__(None, None, None)
    assert trl_utils._use_triton is stock


# The attention by itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_key_heads", "head_size"), [(4, 2, 8), (3, 3, 5), (8, 1, 64)])
@pytest.mark.parametrize("function", ["merged", "by segment"])
def test_attention(function, num_heads, num_key_heads, head_size, dtype):
    """Against softmax over a mask that says what each token sees."""
    ids, mask, width = make_rows()
    layout = packed_layout(ids, mask, width)
    segments = Segments(layout)
    seen = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for group in layout.groups:
        for run in (range(0), *group.segments):
            places = torch.tensor([*group.prefix, *run], dtype=torch.long)
            seen[places[:, None], places[None, :]] |= torch.ones(len(places), len(places), dtype=torch.bool).tril()
    numbers = torch.Generator().manual_seed(0)
    shapes = [(1, heads, layout.num_tokens, head_size) for heads in (num_heads, num_key_heads, num_key_heads)]
    states = [torch.randn(shape, generator=numbers, dtype=dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(1, layout.num_tokens, num_heads, head_size, generator=numbers, dtype=dtype)

    if function == "merged":
        by_token = (state[0].transpose(0, 1) for state in states)
        output = kernels.packed_attention(*by_token, layout, 0.3).unsqueeze(0)
    else:
        output = attention._attention_by_segment(*states, 0.0, 0.3, segments)
    found = [output, *torch.autograd.grad(output, states, upstream)]

    query, key, value = (state.double() for state in states)
    key, value = (state.repeat_interleave(num_heads // num_key_heads, dim=1) for state in (key, value))
    scores = (0.3 * query @ key.transpose(2, 3)).masked_fill(~seen, -torch.inf)
    output = (scores.softmax(-1) @ value).transpose(1, 2)
    expected = [output, *torch.autograd.grad(output, states, upstream.double())]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 2e-2}[dtype]
    for tensor, reference in zip(found, expected, strict=True):
        assert (tensor.double() - reference.double()).norm() <= tolerance * reference.double().norm()


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias"])
def test_attention_refuses_what_it_does_not_do(argument):
    ids, mask, width = make_rows([(0, 2, 2)])
    states = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=argument):
        attention.shared_prefix_attention(
            torch.nn.Module(),
            states,
            states,
            states,
            None,
            segments=Segments(packed_layout(ids, mask, width)),
            **{argument: 1.0},
        )
