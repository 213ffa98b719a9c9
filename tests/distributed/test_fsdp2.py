"""torch's `fully_shard` over two CPU processes, with accelerate's own FSDP2, against `trl.GRPOTrainer` under DDP.

accelerate makes DDP of FSDP's configuration on CPUs; `run_canned.shard_on_cpus` goes round that, and nothing else.
"""

import pytest
from canned import assert_same_weights, relative_difference
from launch import launcher, ran_on, run_canned
from safetensors.torch import load_file

from trl_grpo_ext.checkpoints import whole_checkpoints


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

COMMON = {
    "num_iterations": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
    "bf16": False,
    "seed": 2,
    "max_grad_norm": 0.5,
}
VARIANTS = {
    "plain": {},
    "KL": {"beta": 0.04},
    "fuller": {"tokens_per_micro_batch": "auto"},
    "own rows": {"balance_ranks": False},
}
OURS = ("tokens_per_micro_batch", "balance_ranks")
FILES = (("ext", "final"), ("trl", "final"), ("trl", "start"))
LAUNCHER = ("fsdp2.yaml", "--mixed_precision", "no")


def test_trains_as_trl_does(policy, tmp_path):
    for trainer in ("trl", "ext"):
        runs = [
            {
                "policy": policy,
                "trainer": trainer,
                "kinds": ["dead", "dead", "live, and with a longer prompt"],
                "options": {
                    **COMMON,
                    **{key: value for key, value in options.items() if trainer == "ext" or key not in OURS},
                    **({"shared_prefix": "on"} if trainer == "ext" else {}),
                },
                "output_dir": str(tmp_path / trainer / name),
            }
            for name, options in VARIANTS.items()
        ]
        command = launcher("ddp_cpu.yaml") if trainer == "trl" else launcher(*LAUNCHER)
        result = run_canned(tmp_path, f"of-{trainer}", command, runs=runs, shards_on_cpus=trainer == "ext")
        assert result.returncode == 0, result.stderr[-5000:]
    for name in VARIANTS:
        found, expected = tmp_path / "ext" / name, tmp_path / "trl" / name
        ours = ran_on(found)
        assert (ours["processes"], ours["packs"]) == (2, True)
        assert ours["wrapper"].startswith("FSDP")
        sharding = ours["sharding"]
        assert sharding["kind"] == "fully_shard"
        assert sharding["sharded"] == sharding["parameters"] > 0
        assert sharding["weights"] == pytest.approx(sharding["all_weights"] / 2, rel=0.05)
        assert ran_on(found, 1)["calls"] == ours["calls"]
        moved = [entry["update/rows_moved"] for entry in ours["log"] if "update/rows_moved" in entry]
        assert (sum(moved) > 0) == (name != "own rows")
        for metric in ("loss", "grad_norm"):
            of_both = [
                [entry[metric] for entry in ran_on(each)["log"] if metric in entry] for each in (found, expected)
            ]
            assert len(of_both[1]) == 4
            assert of_both[0] == pytest.approx(of_both[1], rel=1e-5, abs=1e-6), (name, metric)
        files = found / "final.safetensors", expected / "final.safetensors", expected / "start.safetensors"
        assert relative_difference(*map(load_file, files)) < 1e-5, name


def test_hybrid(policy, tmp_path):
    """Two pairs of processes, each with a whole copy of the weights, against DDP on four."""
    hybrid = launcher("fsdp2_hybrid.yaml", *LAUNCHER[1:], "--parallelism_config_dp_shard_size", 2, num_processes=4)
    for trainer, command in (("trl", launcher("ddp_cpu.yaml", num_processes=4)), ("ext", hybrid)):
        packing = {"shared_prefix": "on"} if trainer == "ext" else {}
        settings = {"policy": policy, "trainer": trainer, "options": {**COMMON, **packing}}
        result = run_canned(tmp_path, trainer, command, shards_on_cpus=trainer == "ext", **settings)
        assert result.returncode == 0, result.stderr[-5000:]
    ours = ran_on(tmp_path / "ext")
    assert (ours["processes"], ours["packs"]) == (4, True)
    assert ours["wrapper"].startswith("FSDP")
    # halves: within a pair each has one
    assert ours["sharding"]["weights"] == pytest.approx(ours["sharding"]["all_weights"] / 2, rel=0.05)
    assert sum(entry.get("update/rows_moved", 0) for entry in ours["log"]) > 0
    files = [tmp_path / trainer / f"{name}.safetensors" for trainer, name in FILES]
    assert relative_difference(*map(load_file, files)) < 1e-5


def test_killed_and_resumed_is_exact(policy, tmp_path):
    # torch cannot load an optimizer without a state (SGD)
    options = {**COMMON, "num_iterations": 3, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    options |= {"optim": "adamw_torch", "adam_epsilon": 1.0, "learning_rate": 2.0}
    settings = {"policy": policy, "options": {**options, "shared_prefix": "on"}}
    straight, killed = (
        {**settings, "output_dir": str(tmp_path / name), **more}
        for name, more in (("straight", {}), ("killed", {"kill_at": 4, "kill_ranks": [1]}))
    )
    result = run_canned(tmp_path, "settings", launcher(*LAUNCHER), shards_on_cpus=True, runs=[straight, killed])
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr, result.stderr[-5000:]
    assert max(whole_checkpoints(tmp_path / "killed")[0]) == 4
    resumed = run_canned(tmp_path, "killed", launcher(*LAUNCHER), shards_on_cpus=True, resume=True, **settings)
    assert resumed.returncode == 0, resumed.stderr[-5000:]
    assert ran_on(tmp_path / "killed")["sharding"]["kind"] == "fully_shard"
    assert_same_weights(*(load_file(tmp_path / name / "final.safetensors") for name in ("killed", "straight")))
