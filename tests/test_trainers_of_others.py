"""The mixins under and over trainers that others write: what they change is seen, and trained as TRL would have."""

import functools
import gc
import inspect
from types import SimpleNamespace

import pytest
import torch
from canned import (
    CannedRollouts,
    SetAttributes,
    assert_same_training,
    canned_config,
    canned_prompts,
    canned_reward,
    give_scoring_head,
    train_canned,
)
from test_iterations import PaddedTrainer, run, start  # noqa: F401 (a fixture)
from tiny import tiny_model, tiny_tokenizer
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_grpo_ext import compat
from trl_grpo_ext.checkpoints import WholeCheckpointsMixin
from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.iterations import MultiIterationMixin
from trl_grpo_ext.metrics import FIELDS
from trl_grpo_ext.shared_prefix import SharedPrefixMixin
from trl_grpo_ext.trainer import GRPOExtTrainer


# Several passes of two optimizer steps: rows can be dealt out, and the old policy's log-probabilities matter.
SCHEDULE = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4}


def half_squared(self, model, inputs):
    """A loss that is no mean over rows: it depends on which rows are in a micro-batch, and on the old policy."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logps = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))[0]
    ratio = torch.exp(logps - inputs["old_per_token_logps"])  # TRL has set it
    row_loss = ((0.1 - ratio * inputs["advantages"].unsqueeze(1)) * inputs["completion_mask"]).sum(1)
    return 0.02 * (row_loss.mean() ** 2 + row_loss.mean()) / self.current_gradient_accumulation_steps


class OwnLoss(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        return half_squared(self, model, inputs)


class OwnLossOutside(GRPOExtTrainer):
    def _compute_loss(self, model, inputs):
        return half_squared(self, model, inputs)


class OwnEntryOutside(GRPOExtTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return half_squared(self, model, inputs)


class OwnLossInside(MultiIterationMixin, SharedPrefixMixin, OwnLoss):
    pass


class WrappedOutside(GRPOExtTrainer):
    def _compute_loss(self, model, inputs):
        return 3 * super()._compute_loss(model, inputs) ** 2


class Wrapped(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        return 3 * super()._compute_loss(model, inputs) ** 2


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (OwnLoss, OwnLossOutside),
        pytest.param(OwnLoss, OwnEntryOutside, marks=pytest.mark.slow),
        pytest.param(OwnLoss, OwnLossInside, marks=pytest.mark.slow),
        (Wrapped, WrappedOutside),
    ],
)
def test_the_method_that_computes_the_loss_decides(policy, start, tmp_path, theirs, ours):  # noqa: F811
    """Wherever a loss of one's own is overridden, rows stay in their micro-batches and old policies are old."""
    expected = run(theirs, policy, tmp_path / "theirs", **SCHEDULE)
    actual = run(ours, policy, tmp_path / "ours", **SCHEDULE)
    assert_same_training(actual, expected, start)
    assert actual.metric("iteration/2/approx_kl")[0] > 0
    assert not actual.metric("update/rows_skipped")


def test_target_kl_holds_for_a_loss_of_ones_own(policy, tmp_path):
    options = {"num_iterations": 4, "max_steps": 8}
    free = run(OwnLossOutside, policy, tmp_path / "free", GRPOExtConfig, **options)
    stopped = run(OwnLossOutside, policy, tmp_path / "stopped", GRPOExtConfig, target_kl=1e-9, **options)
    assert free.metric("rollouts/iterations_used") == [4.0, 4.0]
    assert min(stopped.metric("rollouts/iterations_used")) < 4


def test_a_loss_put_in_trls_place_is_called(policy, start, tmp_path, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", half_squared)
    expected = run(GRPOTrainer, policy, tmp_path / "theirs", **SCHEDULE)
    actual = run(GRPOExtTrainer, policy, tmp_path / "ours", **SCHEDULE)
    assert_same_training(actual, expected, start)
    assert caplog.text.count("in place of GRPOTrainer._compute_loss") == 1


def test_an_option_of_a_later_release_is_not_ignored(policy, tmp_path, monkeypatch, caplog):
    """As if TRL's loss had just learned `delta`: where it is set, TRL computes the loss."""
    options = {"delta": 1.5, "num_iterations": 2}
    monkeypatch.setattr(compat, "KNOWN_TO_THE_LOSS", compat.KNOWN_TO_THE_LOSS - {"delta"})
    calls = []
    of_trl = compat.unknown_loss_options
    monkeypatch.setattr(compat, "unknown_loss_options", lambda trainer: calls.append(of_trl(trainer)) or calls[-1])
    delegated = run(GRPOExtTrainer, policy, tmp_path, **options)
    assert calls[0] == ["delta"]
    assert caplog.text.count("TRL's, with delta") == 1
    assert "update/rows_skipped" not in delegated.log[0]
    assert run(GRPOExtTrainer, policy, tmp_path, num_iterations=2).metric("update/rows_skipped")
    assert calls[-1] == []


def test_what_trls_loss_reads_is_known():
    """When this fails, a release has given the loss something to read: see whether it changes a gradient."""
    names = compat._names_in(inspect.unwrap(GRPOTrainer._compute_loss).__code__)
    assert {"delta", "epsilon_low", "off_policy_mask_threshold", "use_bias_correction_kl"} <= names
    trainer = SimpleNamespace(
        args=GRPOExtConfig(use_cpu=True, bf16=False), accelerator=object(), _entropy_bonus_enabled=True
    )
    assert compat.unknown_loss_options(trainer) == []


# Log-probabilities


class Sharpened(GRPOTrainer):
    """Log-probabilities that are changed behind the forward."""

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        logps, *others = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        return (1.7 * logps, *others)


class SharpenedOutside(GRPOExtTrainer):
    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        logps, *others = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        return (1.7 * logps, *others)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])  # ours, and TRL's
def test_log_probabilities_that_a_subclass_changes(policy, start, tmp_path, loss_type):  # noqa: F811
    expected = run(Sharpened, policy, tmp_path / "theirs", loss_type=loss_type, **SCHEDULE)
    actual = run(SharpenedOutside, policy, tmp_path / "ours", loss_type=loss_type, **SCHEDULE)
    assert_same_training(actual, expected, start)


def rounded_without_gradient(self, *args, **kwargs):
    logps, *others = super(type(self), self)._get_per_token_logps_and_entropies(*args, **kwargs)
    return (logps if torch.is_grad_enabled() else logps.mul(2).round() / 2, *others)


def test_log_probabilities_that_differ_without_a_gradient(policy, start, tmp_path):  # noqa: F811
    """The first pass does not have what the forward at generation would have given."""
    name, options = "_get_per_token_logps_and_entropies", {"num_iterations": 2, "max_steps": 4}
    classes = [type("Rounded", (base,), {name: rounded_without_gradient}) for base in (GRPOTrainer, GRPOExtTrainer)]
    expected, actual = (run(cls, policy, tmp_path / str(n), **options) for n, cls in enumerate(classes))
    assert_same_training(actual, expected, start)


@pytest.mark.parametrize("loss_type", ["bnpo", "cispo"])
def test_forwards_at_generation_are_not_the_old_policy(policy, start, tmp_path, loss_type):  # noqa: F811
    class Asking(GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            for ids in completion_ids_list:
                ids = torch.tensor([[65, 66, *ids]])
                self._get_per_token_logps_and_entropies(self.model, ids, torch.ones_like(ids), ids.size(1) - 2)
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    class Ours(MultiIterationMixin, Asking):
        pass

    options = {"num_iterations": 2, "max_steps": 4, "loss_type": loss_type}
    expected = run(Asking, policy, tmp_path / "theirs", **options)
    assert_same_training(run(Ours, policy, tmp_path / "ours", **options), expected, start)


def test_a_teacher_asked_behind_the_policy_is_not_the_old_policy(policy, start, tmp_path):  # noqa: F811
    class Distilled(GRPOTrainer):
        teacher = None

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            self.teacher = self.teacher or prepared_teacher()
            self._get_per_token_logps_and_entropies(self.teacher, ids, mask, inputs["completion_ids"].size(1))
            return loss

    class Ours(MultiIterationMixin, Distilled):
        pass

    options = {"num_iterations": 2, "max_steps": 4}
    expected = run(Distilled, policy, tmp_path / "theirs", **options)
    assert_same_training(run(Ours, policy, tmp_path / "ours", **options), expected, start)


def prepared_teacher():
    teacher = tiny_model(seed=7)
    give_scoring_head(teacher)
    return teacher


def log_probabilities_of(trainer, prompts, completion_ids):
    ids = torch.tensor([[65, 66, 67, 68]])
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 2)[0]


def test_forwards_of_a_rollout_function_are_made(policy, tmp_path):
    """It asks for log-probabilities while TRL's forward for the old policy is awaited."""
    seen = []

    class Asking(CannedRollouts):
        def __call__(self, prompts, trainer):
            seen.append(log_probabilities_of(trainer, prompts, None))
            return super().__call__(prompts, trainer)

    trainer = GRPOExtTrainer(
        policy,
        canned_reward,
        args=canned_config(tmp_path, GRPOExtConfig, num_iterations=2, max_steps=2, learning_rate=0.0),
        train_dataset=canned_prompts(),
        processing_class=tiny_tokenizer(),
        rollout_func=Asking(),
    )
    trainer.train()
    torch.testing.assert_close(seen[0], log_probabilities_of(trainer, None, None))
    assert "_get_per_token_logps_and_entropies" not in vars(trainer)


def test_what_trl_sets_at_generation_can_be_read_there(policy, tmp_path):
    class Reading(GRPOExtTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            seen.append(output["old_per_token_logps"].shape == output["completion_ids"].shape)
            return output

    seen = []
    run(Reading, policy, tmp_path, num_iterations=2, max_steps=2)
    assert seen == [True]


# Rows


class Filtered(GRPOTrainer):
    """Half of the completions are dropped when they have been scored."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {key: value[::2] if value.ndim else value for key, value in output.items()}


class FilteredOurs(MultiIterationMixin, SharedPrefixMixin, Filtered):
    pass


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_rows_that_a_subclass_drops_are_not_counted(policy, start, tmp_path, loss_type):  # noqa: F811
    expected = run(Filtered, policy, tmp_path / "theirs", loss_type=loss_type, max_steps=2)
    actual = run(FilteredOurs, policy, tmp_path / "ours", loss_type=loss_type, max_steps=2)
    assert_same_training(actual, expected, start)


class Decayed(GRPOTrainer):
    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        return {**inputs, "advantages": 0.5 * inputs["advantages"]}


class DecayedOurs(MultiIterationMixin, SharedPrefixMixin, Decayed):
    pass


class DecayedOutside(GRPOExtTrainer):
    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        return {**inputs, "advantages": 0.5 * inputs["advantages"]}


@pytest.mark.parametrize("ours", [DecayedOurs, DecayedOutside])
@pytest.mark.parametrize("schedule", [pytest.param({"max_steps": 3}, marks=pytest.mark.slow), SCHEDULE])
def test_rows_that_a_subclass_prepares_are_trained_on(policy, start, tmp_path, ours, schedule):  # noqa: F811
    expected = run(Decayed, policy, tmp_path / "theirs", **schedule)
    assert_same_training(run(ours, policy, tmp_path / "ours", **schedule), expected, start)


def step_of_their_own(self, model, inputs, num_items_in_batch=None):
    """As transformers does it, without its modes; and TRL counts."""
    model.train()
    with self.compute_loss_context_manager():
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
    self.accelerator.backward(loss)
    self._step += 1
    return loss.detach()


def clamped_step(self, model, inputs, num_items_in_batch=None):
    """What it does with the gradients depends on which rows are in a micro-batch."""
    loss = super(type(self), self).training_step(model, inputs, num_items_in_batch)
    for parameter in model.parameters():
        parameter.grad.clamp_(-0.01, 0.01)
    return loss


@pytest.mark.parametrize("step", [step_of_their_own, clamped_step])
@pytest.mark.parametrize(
    "schedule", [pytest.param({"num_iterations": 2, "max_steps": 4}, marks=pytest.mark.slow), SCHEDULE]
)
def test_a_training_step_of_ones_own(policy, start, tmp_path, step, schedule):  # noqa: F811
    classes = [type("Stepping", (base,), {"training_step": step}) for base in (GRPOTrainer, GRPOExtTrainer)]
    expected, actual = (run(cls, policy, tmp_path / str(n), **schedule) for n, cls in enumerate(classes))
    assert_same_training(actual, expected, start)


def test_target_kl_with_a_training_step_that_does_not_come_back(policy, tmp_path):
    cls = type("Stepping", (GRPOExtTrainer,), {"training_step": step_of_their_own})
    with pytest.raises(ValueError, match=r"target_kl needs Stepping.training_step to call super"):
        run(cls, policy, tmp_path, GRPOExtConfig, num_iterations=4, target_kl=0.1)


def decorated(function):
    @functools.wraps(function)
    def cubed(self, model, inputs):
        loss = function(self, model, inputs)
        return 3 * loss**2 + loss

    return cubed


def test_a_decorator_around_our_own_method_is_not_ours(policy, start, tmp_path):  # noqa: F811
    """`functools.wraps` gives it our module and our name."""
    classes = [
        type("Decorated", (base,), {"_compute_loss": decorated(base._compute_loss)})
        for base in (GRPOTrainer, GRPOExtTrainer)
    ]
    options = {**SCHEDULE, "loss_type": "grpo"}
    expected, actual = (run(cls, policy, tmp_path / str(n), **options) for n, cls in enumerate(classes))
    assert_same_training(actual, expected, start)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("get_off_policy_mask", {"off_policy_mask_threshold": 1e-4, "loss_type": "grpo"}),
        ("get_gamma_weights", {"loss_type": "vespo"}),
    ],
)
def test_a_part_of_the_loss_of_ones_own(policy, start, tmp_path, name, options):  # noqa: F811
    """Static methods that TRL's loss calls."""

    def ones(advantages, **kwargs):
        return torch.ones_like(advantages)

    classes = [type("Own", (base,), {name: staticmethod(ones)}) for base in (GRPOTrainer, GRPOExtTrainer)]
    options = {**SCHEDULE, **options}
    expected, actual = (run(cls, policy, tmp_path / str(n), **options) for n, cls in enumerate(classes))
    assert_same_training(actual, expected, start)
    plain = run(GRPOTrainer, policy, tmp_path / "plain", **options)
    assert plain.exact_grad_norms != pytest.approx(expected.exact_grad_norms, rel=1e-3)


@pytest.mark.parametrize("values", [{"loss_type": "bnpo"}, {"top_entropy_quantile": 0.5}], ids=str)
def test_a_loss_that_changes_between_passes_gets_fresh_rows(policy, tmp_path, caplog, values):
    """Rows that were left out for the old loss are missing for the new one."""
    change = SetAttributes(2, **values)
    options = {"num_iterations": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 4}
    changed = run(change.of(PaddedTrainer), policy, tmp_path, callbacks=[change], loss_type="grpo", **options)
    assert caplog.text.count("going on with fresh ones") == 1
    assert changed.trainer.rollout_func.num_calls == 2
    assert [forward.rows for forward in changed.forwards if forward.has_gradient][4:] == [8] * 4


def test_rows_are_not_dealt_out_across_optimizer_steps_after_a_break(policy, tmp_path):
    """An exception in an optimizer step leaves TRL's counter there; trained again, steps begin elsewhere."""
    breaks = iter([False, True])

    class Break(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if next(breaks, False):
                raise KeyboardInterrupt

    options = {"num_iterations": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 4, "max_steps": 3}
    args = canned_config(tmp_path, GRPOExtConfig, **options)
    trainer = GRPOExtTrainer(
        policy,
        canned_reward,
        args=args,
        train_dataset=canned_prompts(),
        processing_class=tiny_tokenizer(),
        rollout_func=CannedRollouts(),
        callbacks=[Break()],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._rollouts.is_arranged
    trainer.train()
    assert trainer._rollouts is None or not trainer._rollouts.is_arranged
    assert "_get_per_token_logps_and_entropies" not in vars(trainer)


# The order of classes


@pytest.mark.parametrize(
    "bases",
    [
        (GRPOTrainer, MultiIterationMixin),
        (SharedPrefixMixin, MultiIterationMixin, GRPOTrainer),
        (MultiIterationMixin, WholeCheckpointsMixin, GRPOTrainer),
        (SharedPrefixMixin, WholeCheckpointsMixin, GRPOTrainer),
        (OwnLoss, WholeCheckpointsMixin, MultiIterationMixin),
    ],
    ids=lambda bases: ", ".join(base.__name__ for base in bases),
)
def test_an_order_that_loses_something_is_refused(bases):
    with pytest.raises(TypeError, match=r"write `class Mine\(.*YourTrainer\)`") as error:
        type("Mine", bases, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bases",
    [
        (WholeCheckpointsMixin, MultiIterationMixin, SharedPrefixMixin, GRPOTrainer),
        (MultiIterationMixin, OwnLoss),
        (WholeCheckpointsMixin, SharedPrefixMixin, OwnLoss),
        (GRPOExtTrainer,),
        (MultiIterationMixin, SharedPrefixMixin),
    ],
)
def test_an_order_that_works_is_not(bases):
    assert type("Mine", bases, {})


# Calls on one process alone, and statistics


def test_logging_makes_no_collective_call(policy, tmp_path, monkeypatch):
    """`log` is everybody's to call, on the main process alone for example."""

    class Logging(GRPOExtTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            with pytest.MonkeyPatch.context() as patch:
                for name in ("gather", "reduce", "gather_for_metrics"):
                    patch.setattr(type(self.accelerator), name, lambda *_, **__: pytest.fail("a collective call"))
                self.log({"mine": 1.0})
            return loss

    found = run(Logging, policy, tmp_path, gradient_accumulation_steps=2, max_steps=2)
    assert found.metric("mine") == [1.0] * 4


def test_all_processes_compute_the_same_loss(policy, tmp_path, monkeypatch):
    """Where another process has images, TRL computes the loss here too: it makes collective calls."""
    trainer = run(GRPOExtTrainer, policy, tmp_path, max_steps=1).trainer
    trainer.args.balance_ranks = False  # there is nobody to send rows to
    rows = torch.ones(2, 3, dtype=torch.long)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    micro_batches = [{**dict.fromkeys(names, rows), "advantages": torch.tensor([1.0, 0.0])}]
    assert trainer._computes_own_loss(trainer._new_rollouts(micro_batches, 0))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    for others_fail, is_own in ((0.0, True), (1.0, False)):
        monkeypatch.setattr(trainer.accelerator, "reduce", lambda tensor, reduction, n=others_fail: tensor + n)
        rollouts = trainer._new_rollouts(micro_batches, 0)
        assert trainer._computes_own_loss(rollouts) == rollouts.is_arranged == is_own


def test_nothing_is_kept_where_nothing_is_logged(policy, tmp_path):
    kept = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gc.collect()
            tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
            kept.append(sum(tensor.is_floating_point() and tensor.shape == (len(FIELDS),) for tensor in tensors))

    run(GRPOExtTrainer, policy, tmp_path, logging_strategy="no", max_steps=3, callbacks=[Count()])
    assert kept == [0, 0, 0]


def test_batches_without_signal_log_no_none(policy, tmp_path):
    ours = train_canned(
        GRPOExtTrainer, canned_config(tmp_path, GRPOExtConfig, num_iterations=2), policy, kinds=("dead",)
    )
    assert not [name for entry in ours.log for name, value in entry.items() if value is None]
    assert ours.metric("clip_ratio/region_mean") == [0.0] * 4


def test_the_kl_of_a_pass_is_that_of_rows_with_a_gradient(policy, tmp_path):
    """Whether the others are computed or not: `target_kl` stops at the same passes."""
    options = {"num_iterations": 4, "max_steps": 8, "gradient_accumulation_steps": 2, "target_kl": 4e-4}
    runs = [
        run(PaddedTrainer, policy, tmp_path, GRPOExtConfig, skip_zero_advantage=value, **options)
        for value in (True, False)
    ]
    for name in ("iteration/2/approx_kl", "iteration/3/approx_kl", "rollouts/iterations_used"):
        assert runs[0].metric(name) == pytest.approx(runs[1].metric(name), rel=1e-4), name
    used = runs[0].metric("rollouts/iterations_used")
    assert 1 < min(used) < 4


def test_target_kl_that_can_never_stop_is_refused(tmp_path):
    options = {"num_iterations": 2, "steps_per_generation": 2, "target_kl": 0.01}
    with pytest.raises(ValueError, match=r"target_kl=0\.01 can never stop a pass: gradient_accumulation_steps=8"):
        canned_config(tmp_path, GRPOExtConfig, gradient_accumulation_steps=8, **options)
    canned_config(tmp_path, GRPOExtConfig, gradient_accumulation_steps=2, **options)


def test_target_kl_that_has_nothing_to_end_is_told(policy, tmp_path, caplog):
    run(GRPOExtTrainer, policy, tmp_path, GRPOExtConfig, num_iterations=2, target_kl=0.01, max_steps=1)
    assert caplog.text.count("target_kl=0.01 has nothing to end") == 1
    run(GRPOExtTrainer, policy, tmp_path, GRPOExtConfig, num_iterations=3, target_kl=0.01, max_steps=1)
    assert caplog.text.count("has nothing to end") == 1


def test_the_kl_of_a_foreign_loss_is_that_of_its_rows(policy, tmp_path):
    """Not of other completions that it scores first; and padded columns may be left out."""

    class Scoring(GRPOExtTrainer):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            width = inputs["completion_ids"].size(1)
            others = ids.flip(0)
            self._get_per_token_logps_and_entropies(model, others, mask, width)
            used = int(inputs["completion_mask"].sum(1).max())
            ids, mask = ids[:, : ids.size(1) - width + used], mask[:, : mask.size(1) - width + used]
            return self._get_per_token_logps_and_entropies(model, ids, mask, used)[0].mean()

    options = {"num_iterations": 4, "max_steps": 4, "learning_rate": 0.0, "target_kl": 0.005}
    found = run(Scoring, policy, tmp_path, GRPOExtConfig, **options)
    assert found.metric("iteration/4/approx_kl") == [pytest.approx(0.0, abs=1e-6)]


def test_target_kl_with_a_loss_that_asks_for_no_log_probabilities(policy, tmp_path):
    class Bypassing(GRPOExtTrainer):
        def _compute_loss(self, model, inputs):
            return model(input_ids=inputs["completion_ids"]).logits.float().mean()

    with pytest.raises(ValueError, match=r"target_kl needs the policy's log-probabilities.*set target_kl=None"):
        run(Bypassing, policy, tmp_path, GRPOExtConfig, num_iterations=2, target_kl=0.1)
    assert run(Bypassing, policy, tmp_path, num_iterations=2).metric("rollouts/iterations_used") == [2.0, 2.0]
