"""Between two optimizer steps the host never waits for the device.

Tried on a CPU, where nothing is waited for: what would wait on a GPU raises instead.
"""

from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from canned import canned_config, train_canned
from torch.utils._python_dispatch import TorchDispatchMode

from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.iterations import MultiIterationMixin
from trl_grpo_ext.objective import ClippedObjective
from trl_grpo_ext.rollouts import RolloutBuffer
from trl_grpo_ext.shared_prefix import kernels
from trl_grpo_ext.trainer import GRPOExtTrainer


METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
aten = torch.ops.aten
OPERATORS = (
    *(aten._local_scalar_dense, aten.nonzero, aten.nonzero_static, aten.masked_select, aten.equal, aten.is_nonzero),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten.bincount),
)


class WaitsForTheDevice(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """Within it, what would copy from a GPU, or make a tensor whose shape depends on values, raises."""

    def __init__(self):
        super().__init__()
        self.is_on, self.num_operators = False, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.is_on:
            self.num_operators += 1
            takes_mask = function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            )
            makes_shape = function in (aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor)
            if takes_mask or makes_shape or function.overloadpacket in OPERATORS:
                raise WaitsForTheDevice(str(function))
        return function(*args, **(kwargs or {}))

    @contextmanager
    def switched(self, is_on):
        before, self.is_on = self.is_on, is_on
        try:
            yield
        finally:
            self.is_on = before


@pytest.fixture
def no_waiting(monkeypatch):
    mode = NoWaiting()

    def refusing(name):
        method = getattr(torch.Tensor, name)

        def refuse(self, *args, **kwargs):
            if mode.is_on:
                raise WaitsForTheDevice(name)
            return method(self, *args, **kwargs)

        return refuse

    for name in METHODS:
        monkeypatch.setattr(torch.Tensor, name, refusing(name))
    to = torch.Tensor.to

    def stay(self, *args, **kwargs):
        if mode.is_on and "cpu" in (*args, *kwargs.values()):
            raise WaitsForTheDevice("to")
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", stay)
    with mode:
        yield mode


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: bool(x[0] > 0),
        lambda x: int(x[0]),
        lambda x: float(x[0]),
        lambda x: [1, 2, 3][x.long()[0]],
        lambda x: torch.equal(x, x),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), x[0]),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_what_waits_is_seen(no_waiting, wait):
    values = torch.tensor([1.0, 0.0])
    wait(values)
    with no_waiting.switched(True), pytest.raises(WaitsForTheDevice):
        wait(values)
    with no_waiting.switched(True):
        assert (values.masked_fill(values > 0, 0.0)[:1] + values.index_select(0, torch.tensor([1]))).shape == (1,)


class ReadsLengths:
    """The kernel for CPUs, which reads lengths; that for GPUs takes them as they are."""

    def __init__(self, no_waiting):
        self.no_waiting, self.kernel = no_waiting, kernels.CpuKernel()

    def forward(self, *args):
        with self.no_waiting.switched(False):
            return self.kernel.forward(*args)

    def backward(self, *args):
        with self.no_waiting.switched(False):
            return self.kernel.backward(*args)


def guarded(no_waiting, function):
    def call(*args, **kwargs):
        with no_waiting.switched(True):
            return function(*args, **kwargs)

    return call


def train(policy, output_dir, no_waiting, monkeypatch, **options):
    """Train so that from the second micro-batch on neither loss nor backward may wait; what they have computed."""
    monkeypatch.setitem(kernels.KERNELS, "cpu", ReadsLengths(no_waiting))
    for owner, name in ((MultiIterationMixin, "_keep_old_logps"), (Accelerator, "backward")):
        monkeypatch.setattr(owner, name, guarded(no_waiting, getattr(owner, name)))

    class Trainer(GRPOExtTrainer):
        num_guarded = -1

        @contextmanager
        def compute_loss_context_manager(self):
            self.num_guarded += 1
            is_first = self.num_guarded == 0
            with super().compute_loss_context_manager(), no_waiting.switched(not is_first):
                yield

    noise = options.pop("sampler_noise", None)
    args = canned_config(output_dir, GRPOExtConfig, shared_prefix="on", **options)
    return train_canned(Trainer, args, policy, sampler_noise=noise).trainer


SCHEDULE = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.04, "loss_type": "dapo"},
        {"loss_type": "sapo", "mask_truncated_completions": True},
        {"loss_type": "cispo", "reshuffle_iterations": True},
        {"tokens_per_micro_batch": "auto", "importance_sampling_level": "sequence"},
        {
            "use_vllm": True,
            "sampler_noise": 0.3,
            "loss_type": "vespo",
            "vllm_importance_sampling_mode": "token_mask",
        },
        {"use_vllm": True, "sampler_noise": 0.3, "off_policy_mask_threshold": 0.1},
        {"loss_type": "bnpo"},  # rows stay where they are
    ],
    ids=str,
)
def test_a_loss_waits_for_nothing(policy, tmp_path, monkeypatch, no_waiting, options):
    trainer = train(policy, tmp_path, no_waiting, monkeypatch, **{**SCHEDULE, **options})
    assert trainer.packs
    assert trainer.num_guarded == 7
    assert no_waiting.num_operators > 1000


@pytest.mark.parametrize(
    ("owner", "name"), [(ClippedObjective, "__call__"), (RolloutBuffer, "trimmed"), (RolloutBuffer, "set_old_logps")]
)
def test_one_number_that_is_read_is_seen(policy, tmp_path, monkeypatch, no_waiting, owner, name):
    function = getattr(owner, name)

    def read(*args, **kwargs):
        next(tensor for tensor in (*args, torch.zeros(())) if isinstance(tensor, torch.Tensor)).sum().item()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, read)
    with pytest.raises(WaitsForTheDevice, match="item"):
        train(policy, tmp_path, no_waiting, monkeypatch, **SCHEDULE)
