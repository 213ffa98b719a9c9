"""Training on what a real vLLM samples, here and from a server, against `trl.GRPOTrainer` on the same samples.

With fp32 on both sides the sampler's log-probabilities are the policy's to about 1e-5, which is what tells that new
weights have arrived. It is also what the trainers differ by: samples, rewards and advantages are the same, and packed
rows are summed in another order.
"""

import pytest
from canned import assert_same_weights, relative_difference
from training import OURS, THEIRS, note_generations, train
from transformers import GenerationMixin
from trl.generation.vllm_generation import VLLMGeneration

from trl_grpo_ext.evaluation import evaluate, read_answers
from trl_grpo_ext.tasks import load_arithmetic


NEAR = 1e-4


@pytest.fixture(params=["colocate", "server"])
def sampler(request):
    """A trainer's options for either place where vLLM runs. A server gets a seed: its generator goes on by itself."""
    if request.param == "colocate":
        return request.getfixturevalue("engine")
    return {**request.getfixturevalue("server"), "generation_kwargs": {"seed": 0}}


@pytest.fixture
def sampler_is_behind(monkeypatch):
    """No weights are sent but a trainer's first ones, so that policy and sampler grow apart."""
    send = VLLMGeneration.sync_weights

    def send_first(self):
        if not hasattr(self, "has_sent"):
            self.has_sent = True
            send(self)

    monkeypatch.setattr(VLLMGeneration, "sync_weights", send_first)


def check(ours, theirs, tolerance=NEAR):
    for name in ("completions/mean_length", "reward", "reward_std"):
        assert ours.metric(name) == theirs.metric(name), name
    assert ours.exact_grad_norms == pytest.approx(theirs.exact_grad_norms, rel=tolerance, abs=1e-9)
    assert max(ours.exact_grad_norms) > 0.1
    assert relative_difference(ours.weights, theirs.weights, ours.start) < tolerance


@pytest.mark.parametrize("num_iterations", [1, 4])
@pytest.mark.parametrize("corrects", [True, False])
def test_same_as_trl(policy, sampler, tmp_path, num_iterations, corrects):
    options = {**sampler, "num_iterations": num_iterations, "vllm_importance_sampling_correction": corrects}
    theirs = train(THEIRS, policy, tmp_path, **options)
    ours = train(OURS, policy, tmp_path, shared_prefix="on", **options)
    check(ours, theirs)
    if corrects:
        differences = ours.metric("sampling/sampling_logp_difference/max")
        assert len(differences) > 4 / num_iterations  # none where no completion carries a gradient
        assert max(differences) < NEAR


def test_weights_that_do_not_arrive_show(policy, engine, sampler_is_behind, tmp_path):
    differences = train(OURS, policy, tmp_path, **engine).metric("sampling/sampling_logp_difference/max")
    assert differences[0] < NEAR
    assert max(differences[1:]) > 100 * NEAR


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("token_truncate", {"loss_type": "dapo"}),
        ("token_truncate", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("token_mask", {"loss_type": "grpo", "beta": 0.04}),
        ("token_mask", {"loss_type": "vespo"}),
        ("sequence_truncate", {"loss_type": "dr_grpo"}),
        ("sequence_truncate", {"loss_type": "sapo"}),
        ("sequence_mask", {"loss_type": "bnpo", "off_policy_mask_threshold": 0.05}),
        ("sequence_mask", {"loss_type": "luspo", "importance_sampling_level": "sequence", "learning_rate": 0.002}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["loss_type"],
)
def test_corrections_that_bite(policy, engine, sampler_is_behind, tmp_path, mode, options):
    options = {"learning_rate": 0.01, **options, **engine, "vllm_importance_sampling_mode": mode, "num_iterations": 2}
    options |= {"vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.1}
    theirs = train(THEIRS, policy, tmp_path, **options)
    ours = train(OURS, policy, tmp_path, shared_prefix="on", **options)
    check(ours, theirs)
    lowest, means, highest = (
        theirs.metric(f"sampling/importance_sampling_ratio/{name}")[1:] for name in ("min", "mean", "max")
    )
    if mode.endswith("mask"):
        assert max(lowest) == 0 < max(means) < 1
    else:
        assert (min(lowest), max(highest)) == pytest.approx((0.8, 1.1))


def test_a_correction_costs_no_tokens(policy, engine, tmp_path):
    """Half of the groups carry no gradient, and the first pass tells the log-probabilities under the old policy."""

    def tokens(classes, **options):
        run = train(classes, policy, tmp_path, num_iterations=4, **engine, **options)
        return sum(forward.tokens for forward in run.forwards)

    corrected = tokens(OURS, shared_prefix="on")
    assert corrected == tokens(OURS, shared_prefix="on", vllm_importance_sampling_correction=False)
    assert 2 * corrected < tokens(THEIRS)


def test_kl_stop(policy, sampler, tmp_path, monkeypatch):
    """The passes left are made with completions that the policy of that moment has sampled, for the same prompts."""
    generations = note_generations(monkeypatch)
    options = {**sampler, "num_iterations": 4}
    whole = train(OURS, policy, tmp_path, **options)
    assert whole.metric("rollouts/iterations_used") == [4.0, 4.0]
    first, second = generations
    generations.clear()
    stopped = train(OURS, policy, tmp_path, target_kl=1e-6, **options)
    assert stopped.metric("rollouts/iterations_used") == [2.0, 2.0, 2.0, 2.0]
    assert generations[0] == first
    assert [prompts for prompts, _ in generations] == [first[0], first[0], second[0], second[0]]
    assert len({str(completions) for _, completions in generations}) == 4
    assert max(stopped.metric("sampling/sampling_logp_difference/max")) < NEAR


@pytest.mark.parametrize("cut", [3, 6])
def test_resume_inside_the_passes(policy, sampler, tmp_path, cut):
    options = {**sampler, "num_iterations": 4, "optim": "adamw_torch", "learning_rate": 1e-3, "save_steps": cut}
    whole = train(OURS, policy, tmp_path / "whole", save_strategy="steps", **options)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{cut}")
    rest = train(OURS, policy, tmp_path / "rest", resume=checkpoint, **options)
    assert rest.metric("completions/mean_length") == whole.metric("completions/mean_length")
    if sampler["vllm_mode"] == "colocate":
        assert_same_weights(rest.weights, whole.weights)
    else:  # which requests a server computes together depends on when they come: the last bits differ now and then
        assert relative_difference(rest.weights, whole.weights, whole.start) < NEAR


def test_evaluations(policy, sampler, tmp_path, monkeypatch):
    """The engine answers, with the weights of that step, and trains on as if it had not been asked."""
    options = {**sampler, "num_iterations": 4, "learning_rate": 0.5}  # steps that show in what is answered
    without = train(OURS, policy, tmp_path / "without", **options)
    problems = load_arithmetic("heldout", 6)
    generations = note_generations(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", lambda *args, **kwargs: pytest.fail("the policy has generated"))
        run = train(OURS, policy, tmp_path / "with", problems=problems, **options)
    assert [len(prompts) for prompts, _ in generations].count(6) == 9  # greedy: before, and after each of eight steps
    assert [len(prompts) for prompts, _ in generations].count(12) == 9
    evaluation, trainer = run.trainer.evaluation, run.trainer
    assert evaluation.after == evaluation.history[8]

    def completions(answers):
        return [answer.completion for answer in answers if answer.temperature == 0]

    folder = tmp_path / "with" / "answers"
    before, after = (read_answers(folder / f"{when}.jsonl") for when in ("before", "after"))
    assert completions(before) != completions(after)
    expected = evaluate(trainer.model, trainer.processing_class, problems, max_new_tokens=24, samples_per_item=0)
    assert completions(after) == completions(expected.answers)
    if sampler["vllm_mode"] == "colocate":
        assert_same_weights(run.weights, without.weights)
    else:
        assert relative_difference(run.weights, without.weights, without.start) < NEAR
