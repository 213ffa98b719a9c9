"""Training on a GPU: packed against TRL's trainer, compiled, without waiting, under ZeRO-1 and with vLLM."""

import importlib.util
import sys
from contextlib import contextmanager

import pytest
import torch
from canned import relative_difference, train_canned
from launch import ROOT, ran_on, run_canned
from on_gpu import (
    DEVICE,
    NEEDS_COMPILER,
    ON_GPU,
    OURS,
    TRL,
    config_of,
    make_model,
    make_rows,
    make_trainer,
    of_trainer,
    save_policy,
)

from trl_grpo_ext import GRPOExtTrainer


pytestmark = ON_GPU

# Two passes over the rollouts of two micro-batches, each pass a step
SCHEDULE = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def train(classes, policy, folder, trainer_class=None, **options):
    own_class, config_class, settings = classes
    config = config_of(folder, config_class, **settings, **{**SCHEDULE, **options})
    return train_canned(trainer_class or own_class, config, policy)


@pytest.mark.parametrize("options", [{}, {"beta": 0.04, "gradient_checkpointing": True}], ids=["plain", "kl"])
def test_float32(options, policy, tmp_path):
    expected, found = (train(classes, policy, tmp_path, **options) for classes in (TRL, OURS))
    assert found.trainer.packs
    assert found.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-4, abs=1e-6)
    assert relative_difference(found.weights, expected.weights, expected.start) < 1e-4
    assert max(expected.exact_grad_norms) > 1e-3


def test_bfloat16(policy, tmp_path):
    """Against TRL in fp32: at most twice TRL's own error in bf16."""
    exact = train(TRL, policy, tmp_path)
    padded, packed = (train(classes, policy, tmp_path, bf16=True) for classes in (TRL, OURS))
    assert packed.trainer.packs
    of_padded, of_packed = (relative_difference(run.weights, exact.weights, exact.start) for run in (padded, packed))
    assert 0 < of_padded < 0.1
    assert of_packed <= 2 * of_padded


@contextmanager
def no_waiting(is_on):
    """Within it whatever waits for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    if is_on:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Unwaiting(GRPOExtTrainer):
    """Waits for nothing in forward, loss and backward of the second pass; in the first one rows are laid out."""

    num_checked = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        backward = self.accelerator.backward

        def checked(*args, **kwargs):
            with no_waiting(self.state.global_step > 0):
                return backward(*args, **kwargs)

        self.accelerator.backward = checked

    def _clipped_loss(self, *args, **kwargs):  # another _compute_loss would be one that the package does not know
        self.num_checked += self.state.global_step > 0
        with no_waiting(self.state.global_step > 0):
            return super()._clipped_loss(*args, **kwargs)


def test_nothing_waits_for_the_gpu(policy, tmp_path):
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting(True):
        torch.ones(2, device=DEVICE).sum().item()
    run = train(OURS, policy, tmp_path, trainer_class=Unwaiting, bf16=True, max_steps=2)
    assert run.trainer.packs
    assert run.trainer.num_checked == 2


@pytest.fixture
def compiled(monkeypatch):
    """What `torch_compile` leaves in the environment goes with the test."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch.compiler.reset()
    return {"torch_compile": True, "bf16": True}


@NEEDS_COMPILER
def test_a_compiled_model_trains_as_one_that_is_not(compiled, policy, tmp_path):
    expected = train(OURS, policy, tmp_path, bf16=True, max_steps=2)
    found = train(OURS, policy, tmp_path, **compiled, max_steps=2)
    assert found.trainer.packs
    assert found.trainer.accelerator.state.dynamo_plugin.backend.value == "INDUCTOR"
    start, weights = (
        {name.removeprefix("_orig_mod."): weight for name, weight in state.items()}
        for state in (found.start, found.weights)
    )
    assert relative_difference(weights, expected.weights, start) < 0.05


@NEEDS_COMPILER
def test_new_shapes_are_not_compiled_again(compiled, tmp_path):
    """Ten micro-batches of other numbers of prompts, completions and tokens: compiled for the first few, at most."""
    from torch._dynamo.utils import counters

    plain = make_trainer(OURS, make_model(), tmp_path, bf16=True)
    trainer = make_trainer(OURS, make_model(), tmp_path, **compiled)
    trainer.model.compile()
    assert trainer.packs
    counters.clear()
    graphs = []
    for number in range(10):
        rows = make_rows(
            [
                (row % (1 + number % 3), 20 + 7 * number + row % (1 + number % 3), 1 + 11 * row)
                for row in range(3 + number)
            ]
        )
        logps, gradient = of_trainer(trainer, *rows)
        expected_logps, expected_gradient = of_trainer(plain, *rows)
        assert (logps - expected_logps).norm() < 0.05 * expected_logps.norm()
        assert (gradient - expected_gradient).norm() < 0.1 * expected_gradient.norm()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] <= 3 * graphs[0]
    assert len(set(graphs[2:])) == 1, graphs


def test_zero_1(policy, tmp_path):
    """DeepSpeed on one GPU, both trainers under it."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    options = {**SCHEDULE, "use_cpu": False, "bf16": False, "max_grad_norm": 0.5}
    runs = [
        {"options": {**options, **more}, "policy": policy, "trainer": name, "output_dir": str(tmp_path / name)}
        for name, more in (("trl", {}), ("ext", {"shared_prefix": "on"}))
    ]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "recipes" / "accelerate" / "zero1.yaml"), "--mixed_precision", "no"]
    launcher += ["--num_processes", "1", "--main_process_port", "0"]
    result = run_canned(tmp_path, "settings", launcher, runs=runs)
    assert result.returncode == 0, result.stderr[-5000:]
    theirs, ours = (ran_on(tmp_path / name) for name in ("trl", "ext"))
    assert ours["wrapper"] == theirs["wrapper"] == "DeepSpeedEngine"
    assert ours["sharding"]["stage"] == 1
    assert ours["packs"]
    for name in ("loss", "grad_norm"):
        expected, found = ([entry[name] for entry in run["log"] if name in entry] for run in (theirs, ours))
        assert len(expected) == 4
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_vllm_beside_the_training(policy, tmp_path):
    """Completions of a colocated vLLM, whose log-probabilities are close to the policy's."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    trainer = make_trainer(
        OURS,
        policy,
        tmp_path,
        **SCHEDULE,
        bf16=True,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.2,
        vllm_max_model_length=256,
    )
    trainer.train()
    assert trainer.packs
    differences = [
        entry["sampling/sampling_logp_difference/mean"]
        for entry in trainer.state.log_history
        if "sampling/sampling_logp_difference/mean" in entry
    ]
    assert differences
    assert max(differences) < 0.1
