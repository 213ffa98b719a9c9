"""`GRPOExtTrainer` under each launch configuration of the recipes, against `trl.GRPOTrainer` under plain DDP.

Two CPU processes. What each run really ran on is asserted: a distributed configuration easily tests nothing.
"""

import pytest
from canned import relative_difference
from launch import launcher, ran_on, run_canned
from safetensors.torch import load_file


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# Plain SGD, and a clip that binds: both show a wrong scale of the gradient, which Adam would hide. DeepSpeed offloads
# only optimizers that it has on the CPU: Adam, with an epsilon so large that a wrong scale shows as well.
SGD = {"max_grad_norm": 0.5}
ADAM = {"max_grad_norm": 0.5, "optim": "adamw_torch", "adam_epsilon": 1.0, "learning_rate": 2.0}
COMMON = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2, "bf16": False, "seed": 2}
SETTINGS = {
    "sgd": {"options": {**COMMON, **SGD}},
    "sgd-kl": {"options": {**COMMON, **SGD, "beta": 0.04}},
    "lora": {"options": {**COMMON, **SGD}, "lora": True},
    "lora-kl": {"options": {**COMMON, **SGD, "beta": 0.04}, "lora": True},
    "adam": {"options": {**COMMON, **ADAM}},
    "adam-kl": {"options": {**COMMON, **ADAM, "beta": 0.04}},
}
FULL, LORA, OFFLOADED = ("sgd", "sgd-kl"), ("lora", "lora-kl"), ("adam", "adam-kl")


def run_all(folder, policy, names, launcher, trainer, prefix="", **options):
    runs = [
        {
            **SETTINGS[name],
            "options": {
                **SETTINGS[name]["options"],
                **({} if trainer == "trl" else {"shared_prefix": "on"}),
                **options,
            },
            # so few live groups that a process is without one now and then
            "kinds": ["dead", "dead", "live, and with a longer prompt"],
            "policy": policy,
            "trainer": trainer,
            "output_dir": str(folder / f"{prefix}{name}"),
        }
        for name in names
    ]
    result = run_canned(folder, "settings", launcher, runs=runs)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def of_trl(policy, tmp_path_factory):
    """The same runs by TRL's trainer under DDP."""
    folder = run_all(tmp_path_factory.mktemp("trl"), policy, SETTINGS, launcher("ddp_cpu.yaml"), "trl")
    assert ran_on(folder / "sgd")["wrapper"] == "DistributedDataParallel"
    assert ran_on(folder / "sgd")["processes"] == 2
    return folder


def series(folder, name):
    return [entry[name] for entry in ran_on(folder)["log"] if name in entry]


def check(found, expected, tolerance):
    """Losses, gradient norms and the way that the weights have gone."""
    for name in ("loss", "grad_norm"):
        values = series(expected, name)
        assert len(values) == 4
        assert series(found, name) == pytest.approx(values, rel=10 * tolerance, abs=tolerance), name
    weights, of_other = load_file(found / "final.safetensors"), load_file(expected / "final.safetensors")
    assert weights.keys() == of_other.keys()
    assert relative_difference(weights, of_other, load_file(expected / "start.safetensors")) < tolerance


def check_ranks(folder):
    """Each process makes the same calls, whatever rows it has; one has micro-batches without a row, the other not."""
    forwards = [ran_on(folder, rank)["forwards"] for rank in (0, 1)]
    assert [has_gradient for _, has_gradient in forwards[0]] == [has_gradient for _, has_gradient in forwards[1]]
    assert any((mine == 1) != (others == 1) for (mine, _), (others, _) in zip(*forwards, strict=True))


@pytest.mark.parametrize(
    ("config", "names", "wrapper", "sharding"),
    [
        ("ddp_cpu.yaml", FULL, "DistributedDataParallel", None),
        ("ddp.yaml", FULL[:1], "DistributedDataParallel", None),
        ("zero1.yaml", FULL, "DeepSpeedEngine", {"stage": 1}),
        ("zero2.yaml", FULL + LORA, "DeepSpeedEngine", {"stage": 2}),
        ("zero3.yaml", FULL[:1], "DeepSpeedEngine", {"stage": 3}),
        ("zero3_cpu.yaml", FULL + LORA, "DeepSpeedEngine", {"stage": 3}),
        ("zero2_offload.yaml", OFFLOADED, "DeepSpeedEngine", {"stage": 2, "offloads_optimizer": True}),
        (
            "zero3_offload.yaml",
            OFFLOADED,
            "DeepSpeedEngine",
            {"stage": 3, "offloads_optimizer": True, "offloads_weights": True},
        ),
    ],
)
def test_trains_as_trl_does(of_trl, policy, tmp_path, config, names, wrapper, sharding):
    options = [] if config.endswith("_cpu.yaml") else ["--mixed_precision", "no"]
    run_all(tmp_path, policy, names, launcher(config, *options), "ext")
    for name in names:
        check(tmp_path / name, of_trl / name, 2e-5)
        ours = ran_on(tmp_path / name)
        assert (ours["processes"], ours["wrapper"]) == (2, wrapper)
        assert ours["packs"]
        if not name.endswith("kl"):  # there each row has a gradient
            check_ranks(tmp_path / name)
        if sharding is not None:
            assert ours["sharding"] == {**ours["sharding"], **sharding}
            # DeepSpeed pads a partition to a multiple of a few numbers
            assert ours["sharding"]["trained"] == pytest.approx(ours["sharding"]["all_trained"] / 2, rel=0.05)
            if config == "zero3_cpu.yaml":  # no parameter is too small to be shared out
                assert ours["sharding"]["weights"] == pytest.approx(ours["sharding"]["all_weights"] / 2, rel=0.05)
        if names == OFFLOADED:
            assert ours["sharding"]["optimizer"] == "DeepSpeedCPUAdam"
