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
# Made-up log-probabilities of a sampler, and bounds of the weights that bite.
CORRECTED = {"use_vllm": True, "vllm_importance_sampling_clip_min": 0.6, "vllm_importance_sampling_clip_max": 2.0}
SETTINGS = {
    "sgd": {"options": {**COMMON, **SGD}},
    "sgd-kl": {"options": {**COMMON, **SGD, "beta": 0.04}},
    "sgd-vllm": {"options": {**COMMON, **SGD, **CORRECTED}, "sampler_noise": 0.3},
    "lora": {"options": {**COMMON, **SGD}, "lora": True},
    "lora-kl": {"options": {**COMMON, **SGD, "beta": 0.04}, "lora": True},
    "adam": {"options": {**COMMON, **ADAM}},
    "adam-kl": {"options": {**COMMON, **ADAM, "beta": 0.04}},
}
FULL, LORA, OFFLOADED = ("sgd", "sgd-kl", "sgd-vllm"), ("lora", "lora-kl"), ("adam", "adam-kl")


OWN_ROWS = ("sgd-vllm",)  # where each process computes its own
KINDS_WITH_FEW_LIVE = ["dead", "dead", "live, and with a longer prompt"]


def settings_of_runs(folder, policy, names, trainer, **options):
    ours = {} if trainer == "trl" else {"shared_prefix": "on"}
    return [
        {
            **SETTINGS[name],
            "options": {
                **SETTINGS[name]["options"],
                **ours,
                **({"balance_ranks": False} if ours and name in OWN_ROWS else {}),
                **options,
            },
            # so few live groups that a process is without one now and then
            "kinds": KINDS_WITH_FEW_LIVE,
            "policy": policy,
            "trainer": trainer,
            "output_dir": str(folder / trainer / name),
        }
        for name in names
    ]


def runs_of_both(folder, policy, options, *, ours=None, **settings):
    """A run by TRL's trainer, and by ours, which may have options of its own."""
    return [
        {
            **settings,
            "options": {**COMMON, **SGD, **options, **more},
            "policy": policy,
            "trainer": trainer,
            "output_dir": str(folder / trainer),
        }
        for trainer, more in (("trl", {}), ("ext", ours or {}))
    ]


def run_all(folder, launcher, runs):
    result = run_canned(folder, "settings", launcher, runs=runs)
    assert result.returncode == 0, result.stderr[-5000:]


@pytest.fixture(scope="module")
def of_trl(policy, tmp_path_factory):
    """The same runs by TRL's trainer under DDP."""
    folder = tmp_path_factory.mktemp("of_trl")
    run_all(folder, launcher("ddp_cpu.yaml"), settings_of_runs(folder, policy, SETTINGS, "trl"))
    assert ran_on(folder / "trl" / "sgd")["wrapper"] == "DistributedDataParallel"
    assert ran_on(folder / "trl" / "sgd")["processes"] == 2
    return folder / "trl"


def series(folder, name):
    return [entry[name] for entry in ran_on(folder)["log"] if name in entry]


def check(found, expected, tolerance):
    """Losses, gradient norms and the way that the weights have gone."""
    for name in ("loss", "grad_norm"):
        values = series(expected, name)
        assert len(values) == 4
        assert series(found, name) == pytest.approx(values, rel=tolerance, abs=tolerance / 10), name
    weights, of_other = load_file(found / "final.safetensors"), load_file(expected / "final.safetensors")
    assert weights.keys() == of_other.keys()
    assert relative_difference(weights, of_other, load_file(expected / "start.safetensors")) < tolerance


def check_ranks(folder, moves_rows):
    """Each process makes the same calls, whatever rows it has; if it has its own, one is without any now and then."""
    forwards = [ran_on(folder, rank)["forwards"] for rank in (0, 1)]
    assert [has_gradient for _, has_gradient in forwards[0]] == [has_gradient for _, has_gradient in forwards[1]]
    if moves_rows:
        assert sum(series(folder, "update/rows_moved")) > 0
    else:
        assert any((mine == 1) != (others == 1) for (mine, _), (others, _) in zip(*forwards, strict=True))


@pytest.mark.parametrize(
    ("config", "names", "wrapper", "sharding"),
    [
        ("ddp.yaml", FULL, "DistributedDataParallel", None),
        ("fsdp2.yaml", FULL[:1], "DistributedDataParallel", None),  # on CPUs accelerate makes it DDP
        ("zero1.yaml", FULL, "DeepSpeedEngine", {"stage": 1, "optimizer_device": "none"}),
        ("zero2.yaml", FULL + LORA, "DeepSpeedEngine", {"stage": 2}),
        ("zero3.yaml", FULL[:1], "DeepSpeedEngine", {"stage": 3}),
        ("zero3_cpu.yaml", FULL + LORA, "DeepSpeedEngine", {"stage": 3}),
        ("zero2_offload.yaml", OFFLOADED, "DeepSpeedEngine", {"stage": 2, "optimizer_device": "cpu"}),
        (
            "zero3_offload.yaml",
            OFFLOADED,
            "DeepSpeedEngine",
            {"stage": 3, "optimizer_device": "cpu", "weights_device": "cpu"},
        ),
    ],
)
def test_trains_as_trl_does(of_trl, policy, tmp_path, config, names, wrapper, sharding):
    options = [] if config.endswith("_cpu.yaml") else ["--mixed_precision", "no"]
    run_all(tmp_path, launcher(config, *options), settings_of_runs(tmp_path, policy, names, "ext"))
    for name in names:
        found = tmp_path / "ext" / name
        check(found, of_trl / name, 1e-5)
        ours = ran_on(found)
        assert (ours["processes"], ours["wrapper"]) == (2, wrapper)
        assert ours["packs"]
        if not name.endswith("kl"):  # there each row has a gradient
            check_ranks(found, name not in OWN_ROWS)
        if sharding is not None:
            assert ours["sharding"] == {**ours["sharding"], **sharding}
            # DeepSpeed pads a partition to a multiple of a few numbers
            assert ours["sharding"]["trained"] == pytest.approx(ours["sharding"]["all_trained"] / 2, rel=0.05)
            if config == "zero3_cpu.yaml":  # no parameter is too small to be shared out
                assert ours["sharding"]["weights"] == pytest.approx(ours["sharding"]["all_weights"] / 2, rel=0.05)
        if names == OFFLOADED:
            assert ours["sharding"]["optimizer"] == "DeepSpeedCPUAdam"


@pytest.mark.parametrize(
    ("config", "options", "stage"),
    [("zero2.yaml", [], 2), ("zero3_cpu.yaml", ["--mixed_precision", "bf16"], 3)],
)
def test_bf16(policy, tmp_path, config, options, stage):
    """Against TRL's trainer under the same configuration, within what half precision leaves of a packed forward."""
    runs = [
        run
        for trainer in ("trl", "ext")
        for run in settings_of_runs(tmp_path, policy, ("sgd-kl", *LORA[:1]), trainer, bf16=True)
    ]
    run_all(tmp_path, launcher(config, *options), runs)
    for name in ("sgd-kl", *LORA[:1]):
        check(tmp_path / "ext" / name, tmp_path / "trl" / name, 5e-2)
        ours = ran_on(tmp_path / "ext" / name)
        assert (ours["processes"], ours["wrapper"], ours["packs"]) == (2, "DeepSpeedEngine", True)
        assert (ours["sharding"]["stage"], ours["sharding"]["dtype"]) == (stage, "torch.bfloat16")


@pytest.mark.parametrize(
    ("config", "options", "wrapper"),
    [
        ("ddp_cpu.yaml", {}, "DistributedDataParallel"),
        ("ddp_cpu.yaml", {**CORRECTED, "beta": 0.04}, "DistributedDataParallel"),
        ("zero3_cpu.yaml", {}, "DeepSpeedEngine"),
        ("zero3_cpu.yaml", {"loss_type": "cispo"}, "DeepSpeedEngine"),
    ],
    ids=str,
)
def test_fuller_micro_batches(policy, tmp_path, config, options, wrapper):
    """Processes fill as many micro-batches as their own rows need, and make the same calls."""
    options = {"gradient_accumulation_steps": 4, "steps_per_generation": 4, **options}
    ours = {"tokens_per_micro_batch": "auto", "shared_prefix": "on", "balance_ranks": False}
    noise = {"sampler_noise": 0.3} if "use_vllm" in options else {}
    runs = runs_of_both(tmp_path, policy, options, ours=ours, kinds=KINDS_WITH_FEW_LIVE, **noise)
    run_all(tmp_path, launcher("ddp_cpu.yaml"), runs[:1])
    run_all(tmp_path, launcher(config), runs[1:])
    check(tmp_path / "ext", tmp_path / "trl", 1e-5)
    assert (ran_on(tmp_path / "ext")["processes"], ran_on(tmp_path / "ext")["wrapper"]) == (2, wrapper)
    if wrapper == "DeepSpeedEngine":
        assert ran_on(tmp_path / "ext")["sharding"]["stage"] == 3
    calls = [[has_gradient for _, has_gradient in ran_on(tmp_path / "ext", rank)["forwards"]] for rank in (0, 1)]
    assert calls[0] == calls[1]
    full = [
        [tokens > 1 for tokens, has_gradient in ran_on(tmp_path / "ext", rank)["forwards"] if has_gradient]
        for rank in (0, 1)
    ]
    assert len(full[0]) == len(full[1]) == 4 * 4
    used = [[sum(of_rank[start : start + 4]) for start in range(0, 16, 4)] for of_rank in full]
    assert series(tmp_path / "ext", "update/micro_batches_used") == used[0]
    assert 0 < max(used[0] + used[1]) < 4
    if not options.get("beta"):  # there each row has a gradient
        assert used[0] != used[1]


@pytest.mark.parametrize("sampler", [{}, {"sampler_noise": 0.3}], ids=["policy", "vllm"])
def test_processes_with_and_without_images(policy, tmp_path, sampler):
    """Whether TRL's loss is computed, with its collective calls, or ours is decided by all of them together."""
    runs = runs_of_both(tmp_path, policy, CORRECTED if sampler else {}, images_on=1, **sampler)
    run_all(tmp_path, launcher("ddp_cpu.yaml"), runs)
    check(tmp_path / "ext", tmp_path / "trl", 1e-5)
    assert "update/rows_skipped" not in ran_on(tmp_path / "ext")["log"][0]


def test_metrics_of_the_sampler(policy, tmp_path):
    """TRL's over two processes where no row is left out, or moved: means of the processes' means."""
    runs = runs_of_both(
        tmp_path, policy, CORRECTED, ours={"skip_zero_advantage": False, "balance_ranks": False}, sampler_noise=0.3
    )
    run_all(tmp_path, launcher("ddp_cpu.yaml"), runs)
    assert ran_on(tmp_path / "ext")["processes"] == 2
    expected = {name for entry in ran_on(tmp_path / "trl")["log"] for name in entry if name.startswith("sampling/")}
    assert len(expected) == 5
    for name in expected:
        values = series(tmp_path / "trl", name)
        assert len(values) == 2
        assert series(tmp_path / "ext", name) == pytest.approx(values, rel=1e-5, abs=1e-6), name
