"""What the mixins rely on in TRL and transformers. When a release moves one of these, the test with its name fails."""

import functools
import inspect
import math
import random
import tomllib
from collections import deque
from inspect import unwrap
from pathlib import Path

import numpy
import pytest
import torch
from canned import canned_config, give_scoring_head, train_canned
from packaging.requirements import Requirement
from tiny import save_tiny_policy, tiny_model
from transformers import AttentionInterface, MambaConfig, MambaForCausalLM, Qwen2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from trl_grpo_ext import compat
from trl_grpo_ext.trainer import GRPOExtTrainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that has trained, and what passed through the members that the mixins override."""
    folder = tmp_path_factory.mktemp("contract")
    seen = {"logps": [], "micro_batches": [], "order": []}

    class Spy(GRPOTrainer):
        def _prepare_inputs(self, generation_batch):
            inputs = super()._prepare_inputs(generation_batch)
            seen["order"].append("prepare")
            seen["micro_batches"].append((compat.step(self), inputs, compat.buffered_micro_batches(self)))
            return inputs

        def _generate_and_score_completions(self, inputs):
            seen["order"].append("generate")
            return super()._generate_and_score_completions(inputs)

        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            output = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            seen["order"].append("old policy" if not torch.is_grad_enabled() else "policy")
            seen["logps"].append((args, kwargs, output, torch.is_grad_enabled()))
            return output

        def _compute_loss(self, model, inputs):
            seen["order"].append("loss")
            return super()._compute_loss(model, inputs)

        def _save_checkpoint(self, model, trial):
            seen["order"].append("save")
            super()._save_checkpoint(model, trial)

        def _load_optimizer_and_scheduler(self, checkpoint):
            seen["order"].append("load")
            super()._load_optimizer_and_scheduler(checkpoint)

        def log(self, logs, start_time=None):
            seen["order"].append("log")
            super().log(logs, start_time)

    args = canned_config(folder / "out", num_iterations=2, max_steps=2, save_strategy="steps", save_steps=2)
    policy = save_tiny_policy(folder / "policy")
    run = train_canned(Spy, args, policy)
    after_training = seen["order"].copy()
    train_canned(Spy, args, policy, resume=str(folder / "out" / "checkpoint-2"))
    seen["order"], seen["resumed"] = after_training, seen["order"][len(after_training) :]
    return run.trainer, seen


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("_generate", ["self", "prompts"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("_get_output_dir", ["self", "trial"]),
        ("_get_train_sampler", ["self", "dataset"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
        (
            "_init_training_state",
            [
                "self",
                "max_steps",
                "num_update_steps_per_epoch",
                "num_train_epochs",
                "resume_from_checkpoint",
                "trial",
            ],
        ),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("train", ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        ("log", ["self", "logs", "start_time"]),
        ("evaluate", ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"]),
    ],
)
def test_signatures(name, parameters):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters


def test_prompts_are_drawn_when_an_epoch_begins(trained):
    """Resuming in a later epoch draws the orders of those before by beginning them."""
    sampler = trained[0]._get_train_sampler()
    epochs = [list(sampler) for _ in range(2)]
    assert epochs[0] != epochs[1]
    again = trained[0]._get_train_sampler()
    next(iter(again))
    assert list(again) == epochs[1]


def test_columns_of_logged_completions(trained):
    """Each a deque, or some of them by name: what an evaluation adds is taken back with a copy of that depth."""
    columns = trained[0]._logs
    assert {"prompt", "completion", "rewards", "advantages"} <= columns.keys()
    for values in columns.values():
        found = values.values() if isinstance(values, dict) else [values]
        assert all(isinstance(column, deque) for column in found)
    assert len(columns["prompt"]) == trained[0].args.generation_batch_size
    assert list(columns["rewards"]) == ["canned_reward"]


def test_signature_of_the_forward():
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    if "args" in parameters:  # TRL 1.14 hands on what it is given
        parameters = list(inspect.signature(GRPOTrainer._full_logits_logps).parameters)
    assert parameters[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    assert {"compute_entropy", "compute_aux_loss", "pixel_values", "num_images", "token_type_ids"} <= set(parameters)


def test_order_of_calls(trained):
    """Generation, in it the old policy's forward first, then a loss with one forward for each micro-batch."""
    _, seen = trained
    one_step = ["prepare", "loss", "policy"]  # what a member does is noted when it returns, but for the loss
    first = ["generate", "old policy", *one_step, "log"]
    assert seen["order"][: len(first)] == first
    assert seen["order"][len(first) :][:5] == [*one_step, "log", "save"]
    assert seen["resumed"][0] == "load"


def test_micro_batches(trained):
    _, seen = trained
    (step, inputs, buffered), (next_step, next_inputs, next_buffered) = seen["micro_batches"][:2]
    assert (step, next_step) == (0, 1)
    assert isinstance(buffered, list)
    assert inputs is buffered[0]
    assert next_inputs is inputs  # the second pass gets the dictionary of the first
    assert next_buffered is buffered
    keys = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}
    assert set(inputs) == keys | {"old_per_token_logps"}
    rows, columns = inputs["completion_ids"].shape
    assert inputs["completion_mask"].shape == inputs["old_per_token_logps"].shape == (rows, columns)
    assert inputs["prompt_ids"].shape == inputs["prompt_mask"].shape
    assert inputs["advantages"].shape == (rows,)
    assert inputs["num_items_in_batch"].ndim == 0


def test_forward_returns_three_values(trained):
    _, seen = trained
    for args, kwargs, (logps, entropies, aux_loss), is_for_gradient in seen["logps"]:
        assert logps.shape == (len(args[0]), args[2])
        assert logps.requires_grad == is_for_gradient
        assert (entropies is not None) == bool(kwargs.get("compute_entropy"))
        assert aux_loss is None


def test_state(trained):
    trainer, _ = trained
    assert compat.step(trainer) == 2
    compat.set_step(trainer, 7)
    assert compat.step(trainer) == 7
    compat.append_metric(trainer, "mine", 1.5)
    assert trainer._metrics["train"]["mine"] == [1.5]
    assert compat.takes_old_policy_forward(trainer)
    trainer.num_iterations = 1
    assert not compat.takes_old_policy_forward(trainer)
    assert not compat.corrects_sampling(trainer)
    assert compat.is_clipped_objective(trainer)
    trainer.top_entropy_quantile = 0.5
    assert not compat.is_clipped_objective(trainer)
    for name in ("epsilon_low", "epsilon_high", "beta", "importance_sampling_level", "max_completion_length"):
        assert hasattr(trainer, name)
    assert trainer.current_gradient_accumulation_steps == 1


def test_metrics_and_columns(trained):
    trainer, _ = trained
    compat.append_metric(trainer, "kept", 2.0)
    compat.append_metric(trainer, "lost", math.nan)
    assert compat.metrics_of_training(trainer)["kept"] == [2.0]
    compat.drop_metrics_without_value(trainer)
    assert "lost" not in compat.metrics_of_training(trainer)
    assert compat.metrics_of_training(trainer)["kept"] == [2.0]
    compat.log_column(trainer, "mine", [1, 2])
    assert compat.columns_logged_by_rewards(trainer)["mine"] == [1, 2]


def test_observed_generations():
    """Who looks at a method is not taken for its owner, and leaves it as it was, whatever was put before it since."""

    class Trainer(GRPOTrainer):
        def __init__(self):
            pass

        def _generate(self, prompts):
            return ["whole", *prompts]

    def observe(trainer, called):
        def see(method, *args):
            called.append(args)
            return method(*args)

        return compat.ObservedGenerations(trainer, batch=see, completions=see, rewards=see)

    trainer, called = Trainer(), []
    observed = observe(trainer, called)
    assert trainer._generate(["a"]) == ["whole", "a"]
    assert called == [(["a"],)]
    assert compat.foreign_override(trainer, "_generate_and_score_completions") is None
    assert compat.foreign_override(trainer, "_generate") == "Trainer._generate"
    observed.end()
    assert not vars(trainer)

    observed = observe(trainer, called)
    behind = trainer._generate
    trainer._generate = lambda prompts: [*behind(prompts), "last"]
    observed.end()
    assert trainer._generate(["b"]) == ["whole", "b", "last"]
    assert called == [(["a"],)]


def test_completions_are_shown_by_trls_function():
    shown = []
    with compat.completions_shown_by(lambda show, *args, **kwargs: shown.append((show, args, kwargs))):
        grpo_trainer.print_prompt_completions_sample(["p"], ["c"], {}, [0.0], 1, None, extra={})
    assert shown == [(grpo_trainer.print_prompt_completions_sample, (["p"], ["c"], {}, [0.0], 1, None), {"extra": {}})]
    # that TRL calls it by this name, and with these arguments
    assert "print_prompt_completions_sample" in unwrap(GRPOTrainer.log).__code__.co_names


@pytest.mark.parametrize(
    "name", ["compute_loss", "_compute_loss", "_prepare_inputs", "_generate_and_score_completions"]
)
def test_whose_method_it_is(name, monkeypatch):
    """TRL's own methods are known as such, whatever decorators TRL puts around them; no other is taken for one."""

    class Other(GRPOTrainer):
        pass

    setattr(Other, name, lambda self, *args, **kwargs: getattr(super(Other, self), name)(*args, **kwargs))
    trainers = {cls: object.__new__(cls) for cls in (GRPOTrainer, GRPOExtTrainer, Other)}
    assert compat.foreign_override(trainers[GRPOTrainer], name) is None
    assert compat.foreign_override(trainers[GRPOExtTrainer], name) is None
    assert compat.foreign_override(trainers[Other], name) == f"Other.{name}"
    setattr(trainers[GRPOTrainer], name, print)
    assert "set on this GRPOTrainer" in compat.foreign_override(trainers[GRPOTrainer], name)

    @functools.wraps(getattr(GRPOTrainer, name))
    def replacement(self, *args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(GRPOTrainer, name, replacement)
    assert f"in place of GRPOTrainer.{name}" in compat.foreign_override(trainers[GRPOExtTrainer], name)


def test_parts_of_the_loss(monkeypatch):
    """Functions that TRL's loss calls are TRL's, or the loss is not known here."""
    called = set(unwrap(GRPOTrainer._compute_loss).__code__.co_names) & vars(GRPOTrainer).keys()
    # the one for `top_entropy_quantile` is not called where the loss is computed here
    assert called == {*compat.PARTS_OF_THE_LOSS, "get_high_entropy_mask", compat.FORWARD}
    trainer = object.__new__(GRPOExtTrainer)
    assert compat.foreign_part_of_the_loss(trainer) is None
    for name in compat.PARTS_OF_THE_LOSS:
        other = staticmethod(functools.wraps(getattr(GRPOTrainer, name))(lambda **kwargs: kwargs["advantages"]))
        assert compat.foreign_part_of_the_loss(object.__new__(type("Other", (GRPOExtTrainer,), {name: other}))) == name
        setattr(trainer, name, print_nothing)
        assert compat.foreign_part_of_the_loss(trainer) == name
        delattr(trainer, name)
        with monkeypatch.context() as patched:
            patched.setattr(GRPOTrainer, name, other)
            assert compat.foreign_part_of_the_loss(trainer) == name
    assert compat.foreign_part_of_the_loss(trainer) is None


def print_nothing(**kwargs):
    pass


def set_in_nested_config(model):
    model.config.text_config = Qwen2Config(attention_dropout=0.1)


@pytest.mark.parametrize(
    "make_random",
    [
        pytest.param(lambda model: setattr(model.config, "attention_dropout", 0.1), id="dropout"),
        pytest.param(lambda model: setattr(model.config, "resid_pdrop", 0.1), id="pdrop"),
        pytest.param(lambda model: setattr(model.config, "layerdrop", 0.1), id="layerdrop"),
        pytest.param(lambda model: setattr(model.config, "router_jitter_noise", 0.01), id="a router's noise"),
        pytest.param(set_in_nested_config, id="a configuration in the configuration"),
        pytest.param(lambda model: setattr(model.config, "text", {"dropout": 0.1}), id="a dictionary in it"),
        pytest.param(lambda model: setattr(model.model.layers[1].self_attn, "attention_dropout", 0.1), id="a module"),
        pytest.param(lambda model: setattr(model.model.embed_tokens, "neftune_noise_alpha", 5), id="NEFTune"),
        pytest.param(lambda model: model.model.add_module("dropped", torch.nn.Dropout(0.1)), id="a layer"),
    ],
)
def test_randomness_is_seen(make_random):
    model = tiny_model()
    assert not compat.has_active_randomness(model)
    make_random(model)
    assert compat.has_active_randomness(model)


def test_a_dropout_that_does_nothing_is_no_randomness():
    model = tiny_model()
    model.model.dropout = torch.nn.Dropout(0.0)
    model.config.use_dropout = True
    model.config.classifier_dropout = 0.1  # of another head
    assert not compat.has_active_randomness(model)
    model.model.dropout.p = 0.1
    assert compat.has_active_randomness(model)


@pytest.fixture(scope="module")
def trainer(trained):
    trained[0].model.train()
    return trained[0]


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda states: torch.nn.functional.dropout(states, 0.1), id="torch"),
        pytest.param(lambda states: states * (random.random() < 0.9), id="Python"),
        pytest.param(lambda states: states + numpy.random.normal(), id="numpy"),
    ],
)
def test_randomness_without_a_name_is_seen_in_a_forward(draw, trainer, monkeypatch):
    """A generator has moved on; behind it, it goes on as if it had not."""
    monkeypatch.delattr(trainer, "_draws_random_numbers", raising=False)
    assert not compat.forwards_are_random(trainer)
    monkeypatch.delattr(trainer, "_draws_random_numbers")
    plain = Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda self, states: draw(plain(self, states)))
    assert not compat.has_active_randomness(trainer.model)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert compat.forwards_are_random(trainer)
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


def test_a_forward_is_asked_once(trainer, monkeypatch):
    monkeypatch.delattr(trainer, "_draws_random_numbers", raising=False)
    calls = []
    handle = trainer.model.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    assert not compat.forwards_are_random(trainer)
    assert not compat.forwards_are_random(trainer)
    handle.remove()
    assert len(calls) == 1
    trainer.neftune_noise_alpha = 5.0
    try:
        assert compat.forwards_are_random(trainer)
    finally:
        trainer.neftune_noise_alpha = None


# What the packed forward relies on


@pytest.mark.parametrize(
    "trainer_class",
    [
        pytest.param(
            GRPOTrainer, marks=pytest.mark.skipif(not compat.HAS_SCORING_HEAD, reason="TRL refuses it from 1.15 on")
        ),
        GRPOExtTrainer,
    ],
)
def test_one_process_has_one_gpu(trainer_class, policy, tmp_path):
    """TRL refuses `nn.DataParallel`; else losses that are divided by the rows of a device would be wrong here."""
    args = canned_config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn\.DataParallel.*accelerate launch"):
        train_canned(trainer_class, args, policy)


@pytest.mark.skipif(not hasattr(GRPOTrainer, "compute_liger_loss"), reason="Liger does not compute this TRL's loss")
def test_a_loss_that_liger_computes_is_refused(trained, monkeypatch):
    trainer, _ = trained
    monkeypatch.setattr(trainer.args, "use_liger_kernel", True)
    with pytest.raises(ValueError, match="use_liger_kernel=True"):
        compat.check_arguments(trainer)


@pytest.mark.skipif(not compat.HAS_SCORING_HEAD, reason="this TRL's models return logits")
def test_lm_head_takes_the_labels_of_each_place():
    model = tiny_model()
    give_scoring_head(model)
    ids, labels = torch.tensor([[65, 66, 67]]), torch.tensor([[66, -100, 68]])
    output = model(input_ids=ids, shift_labels=labels, fused_lm_head=True)
    assert output.log_probs.shape == output.entropy.shape == (1, 3)
    expected = tiny_model()(input_ids=ids).logits.log_softmax(-1)
    assert output.log_probs[0].tolist() == pytest.approx([expected[0, 0, 66].item(), 0, expected[0, 2, 68].item()])


def test_masks_of_four_dimensions_and_arguments_reach_the_attention(monkeypatch):
    """Or a mask of N x N would be made for a packed row, and the segments lost. The attention is found by its name."""
    seen = []

    def attention(module, query, key, value, attention_mask, segments=None, **kwargs):
        seen.append((attention_mask, segments))
        return query.transpose(1, 2), None

    model = tiny_model()
    assert compat.attention_name(model) == "sdpa"
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", attention)
    try:
        mask, segments = torch.ones(1, 1, 1, 1, dtype=torch.bool), object()
        model(input_ids=torch.tensor([[65, 66]]), attention_mask=mask, segments=segments)
    finally:
        AttentionInterface.register("sdpa", stock)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock
    assert len(seen) == model.config.num_hidden_layers
    assert all(found[0] is mask and found[1] is segments for found in seen)


def test_kernels_of_cpus_return_the_log_sum_exp():
    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
    output, log_sum_exp = compat.flash_attention_on_cpu(query, key, value, 0.0, False, scale=0.5)
    scores = 0.5 * query @ key.transpose(2, 3)
    torch.testing.assert_close(output, scores.softmax(-1) @ value)
    torch.testing.assert_close(log_sum_exp, scores.logsumexp(-1))


def test_what_is_known_of_recurrent_models_and_parameters_in_parts():
    assert not compat.carries_state_along_rows(tiny_model())
    config = MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=4)
    assert compat.carries_state_along_rows(MambaForCausalLM(config))
    model = tiny_model()
    assert not compat.holds_parts_of_parameters(model)
    model.lm_head.weight.ds_id = 0  # as DeepSpeed numbers them under ZeRO-3
    assert compat.holds_parts_of_parameters(model)


# What is said of another release


class Minimal(GRPOExtTrainer):
    """Made with nothing: what is looked at before is what these tests are about."""


@pytest.mark.parametrize("seam", compat.SEAMS)
def test_a_seam_that_has_moved_is_named_before_anything_is_made(seam, monkeypatch, tmp_path):
    for owner in [cls for cls in GRPOTrainer.__mro__ if seam in vars(cls)]:
        monkeypatch.delattr(owner, seam)
    with pytest.raises(compat.IncompatibleReleaseError, match=rf"GRPOTrainer\.{seam} .*pip install 'trl==") as caught:
        Minimal("no/model", [print_nothing], canned_config(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seam", compat.PLACES)
def test_a_seam_with_other_arguments_is_named(seam, monkeypatch, tmp_path):
    monkeypatch.setattr(GRPOTrainer, seam, lambda self, something_else: None)
    with pytest.raises(compat.IncompatibleReleaseError, match=rf"GRPOTrainer\.{seam} takes something_else"):
        Minimal("no/model", [print_nothing], canned_config(tmp_path))


def test_state_that_is_not_there_is_named(trained):
    for name in compat.STATE:
        assert hasattr(trained[0], name)
    with pytest.raises(compat.IncompatibleReleaseError, match=compat.STATE[0]):
        compat.check_state(object.__new__(GRPOTrainer))


@pytest.mark.parametrize(
    ("version", "is_said"),
    [("1.16.9", False), ("1.17.0", True), ("2.0.0.dev0", True), ("1.9.2", False), ("1.15.0", True)],
)
def test_a_release_that_was_not_tested_is_said_once(version, is_said, monkeypatch, caplog):
    monkeypatch.setattr(compat, "RELEASE", version)
    compat._say_if_untested.cache_clear()
    with caplog.at_level("WARNING", logger=compat.__name__):
        for _ in range(2):
            compat.check_release()
    compat._say_if_untested.cache_clear()
    assert len(caplog.records) == is_said
    assert all(version in record.getMessage() for record in caplog.records)


def test_a_release_before_the_oldest_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(compat, "RELEASE", "1.8.0")
    with pytest.raises(compat.IncompatibleReleaseError, match=r"TRL 1\.8\.0, .*1\.9 to 1\.16"):
        Minimal("no/model", [print_nothing], canned_config(tmp_path))


def test_the_tested_release_is_the_one_that_is_pinned():
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text()
    assert f"trl=={compat.TESTED_TRL[-1]}." in constraints
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    (range_of_trl,) = [
        Requirement(found).specifier for found in project["optional-dependencies"]["train"] if found.startswith("trl")
    ]
    minors = [f"1.{minor}" for minor in range(20)]
    newer = minors[minors.index(compat.TESTED_TRL[-1]) + 1 :]
    assert [minor for minor in minors if f"{minor}.0" in range_of_trl] == [*compat.TESTED_TRL, *newer]
