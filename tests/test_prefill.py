"""Generation without vLLM that computes each prompt once: the same tokens as without it, or left as it was."""

import pytest
import torch
import transformers.generation.utils as generation
from canned import canned_config, canned_prompts, canned_reward
from test_shared_prefix import FAMILIES, make_model, make_rows, make_trainer
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, set_seed
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.shared_prefix.prefill import shared_prefill
from trl_grpo_ext.trainer import GRPOExtTrainer


def note_forwards(model):
    """The shape of the token ids of each forward to come."""
    shapes = []
    model.register_forward_pre_hook(
        lambda module, positional, named: shapes.append(tuple((positional or (named["input_ids"],))[0].shape)),
        with_kwargs=True,
    )
    return shapes


def generated(model, rows, **options):
    """Sampled tokens, and the shape of each forward's."""
    ids, mask = rows
    forwards = note_forwards(model)
    torch.manual_seed(0)
    config = GenerationConfig(max_new_tokens=6, do_sample=True, top_k=0, pad_token_id=256, eos_token_id=258, **options)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return output, forwards[:]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_a_prompt_is_prefilled_once(family):
    model = make_model(FAMILIES[family]).eval()
    ids, mask, width = make_rows([(0, 5, 1), (0, 5, 1), (1, 9, 1), (0, 5, 1), (1, 9, 1)])
    rows = ids[:, :-width], mask[:, :-width]
    expected, forwards = generated(model, rows)
    assert forwards[0] == (5, 10)
    with shared_prefill(model):
        found, forwards = generated(model, rows)
    assert torch.equal(found, expected)
    assert forwards[:2] == [(2, 9), (5, 1)]
    assert torch.equal(generated(model, rows)[0], expected)
    assert "generate" not in vars(model)


def outcome(model, rows, **options):
    """What `generated` returns, or what it raises."""
    try:
        tokens, forwards = generated(model, rows, **options)
    except (ValueError, ImportError) as error:
        return type(error), str(error)
    return tokens.tolist(), forwards


SHARED = [(0, 5, 1), (0, 5, 1), (1, 9, 1)]
OTHER_GENERATION = [
    pytest.param({"cache_implementation": "dynamic"}, id="the usual cache, by its name"),
    pytest.param({"cache_implementation": "static"}, id="static"),
    pytest.param({"cache_implementation": "static", "max_cache_len": 64}, id="static, long"),
    pytest.param({"cache_implementation": "sliding_window"}, id="sliding"),
    pytest.param({"cache_implementation": "quantized"}, id="quantized"),
    pytest.param({"use_cache": False}, id="no cache"),
    pytest.param({"num_beams": 2}, id="beams"),
    pytest.param({"num_return_sequences": 2}, id="several sequences for a row"),
    pytest.param({"prompt_lookup_num_tokens": 2}, id="speculation, which takes single rows"),
    pytest.param({"prefill_chunk_size": 3}, id="prefill in chunks"),
]


@pytest.mark.parametrize("of_model", [False, True])
@pytest.mark.parametrize("options", OTHER_GENERATION)
def test_generation_otherwise_as_it_was(options, of_model):
    """Asked for in the call or by the model: forward by forward what transformers does by itself, or its error."""
    model = make_model(FAMILIES["llama"]).eval()
    ids, mask, width = make_rows(SHARED)
    rows = ids[:, :-width], mask[:, :-width]
    if of_model:
        for name, value in options.items():
            setattr(model.generation_config, name, value)
        options = {}
    expected = outcome(model, rows, **options)
    with shared_prefill(model):
        assert outcome(model, rows, **options) == expected


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        pytest.param([(0, 5, 1), (1, 9, 1)], {}, id="nothing shared"),
        pytest.param([(0, 1, 1), (0, 1, 1)], {}, id="prompts of one token and a pad"),
        pytest.param([(0, 5, 1)], {"prompt_lookup_num_tokens": 2}, id="speculation"),
    ],
)
def test_generation_of_rows_that_share_nothing(rows, options):
    model = make_model(FAMILIES["llama"]).eval()
    ids, mask, width = make_rows(rows)
    rows = ids[:, :-width], mask[:, :-width]
    expected, _ = generated(model, rows, **options)
    with shared_prefill(model):
        assert torch.equal(generated(model, rows, **options)[0], expected)


@pytest.mark.parametrize(("name", "made_by"), [("quantized", "QuantizedCache"), ("offloaded", "DynamicCache")])
def test_caches_that_need_another_machine(name, made_by, monkeypatch):
    """A package or a GPU is missing here: a stand-in shows that transformers makes the cache, and which one."""
    made = []

    def make(config, **options):
        made.append(options)
        return DynamicCache(config=config)

    monkeypatch.setattr(generation, made_by, make)
    model = make_model(FAMILIES["llama"]).eval()
    ids, mask, width = make_rows(SHARED)
    rows = ids[:, :-width], mask[:, :-width]
    expected = outcome(model, rows, cache_implementation=name)
    with shared_prefill(model):
        assert outcome(model, rows, cache_implementation=name) == expected
    assert made == [{"backend": "quanto"} if name == "quantized" else {"offloading": True}] * 2


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"cache_implementation": "hybrid"}, id="an old name for the usual cache"),
        pytest.param({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3}, id="processors"),
        pytest.param({"guidance_scale": 1.5}, id="guidance"),
    ],
)
def test_a_prompt_is_prefilled_once_with(options):
    model = make_model(FAMILIES["llama"]).eval()
    ids, mask, width = make_rows(SHARED)
    rows = ids[:, :-width], mask[:, :-width]
    expected, _ = generated(model, rows, **options)
    with shared_prefill(model):
        found, forwards = generated(model, rows, **options)
    assert torch.equal(found, expected)
    assert forwards[:2] == [(2, 9), (3, 1)]


def train(trainer_class, model, folder, of_model=None, **options):
    """A run on completions that the model makes: they, gradient norms, and the shape of each forward's tokens."""
    config_class = GRPOConfig if trainer_class is GRPOTrainer else GRPOExtConfig
    completions = []

    def reward(completion_ids, **kwargs):
        completions.append(completion_ids)
        return canned_reward(completion_ids=completion_ids, **kwargs)

    set_seed(0)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=reward,
        args=canned_config(folder, config_class, **options),
        train_dataset=canned_prompts(),
        processing_class=tiny_tokenizer(),
    )
    trainer.model.generation_config.update(**(of_model or {}))
    shapes = note_forwards(trainer.model)
    trainer.train()
    return completions, [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry], shapes


@pytest.mark.parametrize(
    ("options", "num_prefills"),
    [
        pytest.param({"max_steps": 3}, 3, id="as it comes"),
        pytest.param({"cache_implementation": "dynamic"}, 0, id="dynamic"),
        pytest.param({"cache_implementation": "static"}, 0, id="static"),
        pytest.param({"of_model": {"cache_implementation": "static"}}, 0, id="static, by the model"),
        pytest.param({"of_model": {"cache_implementation": "hybrid"}}, 1, id="hybrid, by the model"),
        pytest.param({"generation_kwargs": {"use_cache": False}}, 0, id="no cache"),
        pytest.param({"generation_kwargs": {"num_beams": 2}}, 0, id="beams"),
    ],
)
def test_training_generates_what_trl_generates(options, num_prefills, policy, tmp_path):
    """The same completions and steps; from fewer prompt tokens where the cache is the usual one."""
    options = {"max_steps": 1, **options}
    expected_completions, expected_norms, _ = train(GRPOTrainer, policy, tmp_path, **options)
    completions, norms, shapes = train(GRPOExtTrainer, policy, tmp_path, shared_prefix="on", **options)
    assert completions == expected_completions
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    prompts_of_8_rows = [shape for shape in shapes if shape[0] == 2 and shape[1] > 1]
    assert len(prompts_of_8_rows) == num_prefills


def test_what_trl_cannot_generate_raises_its_error(policy, tmp_path):
    """Speculation takes single rows, and a group has several."""
    options = {"generation_kwargs": {"prompt_lookup_num_tokens": 2}}
    for trainer_class in (GRPOTrainer, GRPOExtTrainer):
        with pytest.raises(ValueError, match="only supported for batch_size = 1"):
            train(trainer_class, policy, tmp_path, **options)


def test_a_generate_of_the_users_stays(tmp_path):
    """It may take other arguments than transformers'."""
    model = make_model(FAMILIES["llama"])
    trainer = make_trainer(model, tmp_path, shared_prefix="on", max_steps=2)
    calls = []

    def generate(input_ids, attention_mask, generation_config, disable_compile=None):
        calls.append(len(input_ids))
        return type(model).generate(
            model, input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config
        )

    model.generate = generate
    trainer.train()
    assert trainer.packs
    assert calls == [8, 8]
    assert model.generate is generate
