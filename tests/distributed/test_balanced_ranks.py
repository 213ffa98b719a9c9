"""Rows dealt out over all ranks: the training of `trl.GRPOTrainer` under DDP on as many processes, and even work."""

from pathlib import Path

import pytest
from canned import NUM_GENERATIONS, relative_difference, schedule_options
from launch import launcher, ran_on, run_canned
from safetensors.torch import load_file


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

CORRECTED = {"use_vllm": True, "vllm_importance_sampling_clip_min": 0.6, "vllm_importance_sampling_clip_max": 2.0}
CUT = {"per_device_train_batch_size": NUM_GENERATIONS + NUM_GENERATIONS // 2}  # a group and a half
# Completions of rank 1 are ten times as long as those of others.
LONG = {"lengths_of_ranks": [[1, 3], [20, 30], [1, 3], [1, 3]], "options": {"max_completion_length": 30}}


def variant(mu=2, accumulation=2, per_generation=2, *, ours=None, options=None, **settings):
    """Settings of both trainers, and options of ours."""
    schedule = schedule_options(mu, accumulation, per_generation)
    both = {**schedule, "bf16": False, "seed": 2, "max_grad_norm": 0.5, **(options or {})}
    return {"options": both, "ours": {"shared_prefix": "on", **(ours or {})}, **settings}


VARIANTS = {
    "mu 1": variant(1, 1, 1),
    "mu 2": variant(),
    "mu 4, several steps a generation": variant(4, 2, 4, options={"max_steps": 8}),
    "several passes a step": variant(2, 4, 2),
    "grpo, KL": variant(options={"beta": 0.04, "loss_type": "grpo"}),
    "dr_grpo": variant(options={"loss_type": "dr_grpo"}),
    "bnpo": variant(options={"loss_type": "bnpo"}),  # a mean over each micro-batch: rows stay
    "cispo": variant(2, 1, 1, options={"loss_type": "cispo"}),
    "corrected": variant(options=CORRECTED, sampler_noise=0.3),
    "corrected by masks, KL": variant(
        options={**CORRECTED, "vllm_importance_sampling_mode": "sequence_mask", "beta": 0.04}, sampler_noise=0.3
    ),
    "masks": variant(options={**CORRECTED, "vllm_importance_sampling_mode": "sequence_mask"}, sampler_noise=0.3),
    "cut": variant(2, 1, 1, options=CUT),
    "cut, KL": variant(4, 1, 1, options={**CUT, "beta": 0.04}),
    "a rank is dead": variant(dead_ranks=[0]),
    "all ranks are dead": variant(dead_ranks=[0, 1, 2, 3]),
    "padded": variant(ours={"shared_prefix": "off"}),
    "fuller": variant(1, 4, 4, ours={"tokens_per_micro_batch": "auto"}),
    "lora": variant(lora=True),
    "long": variant(ours={"tokens_per_micro_batch": "auto"}, **LONG),
}
HARDEST = ("mu 2", "corrected", "cut", "cut, KL", "a rank is dead", "all ranks are dead", "long")
# Processes, launch configuration, wrapper, and what is trained
LAUNCHES = {
    "2": (2, "ddp_cpu.yaml", "DistributedDataParallel", tuple(VARIANTS)),
    "4": (4, "ddp_cpu.yaml", "DistributedDataParallel", HARDEST),
    "2, ZeRO-3": (2, "zero3_cpu.yaml", "DeepSpeedEngine", (*HARDEST, "mu 4, several steps a generation", "lora")),
}


def run_all(folder: Path, policy, names, num_processes, config):
    for trainer in ("trl", "ext"):
        runs = [
            {
                **VARIANTS[name],
                "options": {**VARIANTS[name]["options"], **(VARIANTS[name]["ours"] if trainer == "ext" else {})},
                "policy": policy,
                "trainer": trainer,
                "output_dir": str(folder / trainer / name),
            }
            for name in names
        ]
        command = launcher(config if trainer == "ext" else "ddp_cpu.yaml", num_processes=num_processes)
        result = run_canned(folder, f"settings-{trainer}", command, runs=runs)
        assert result.returncode == 0, result.stderr[-5000:]


def series(folder, name, rank=0):
    return [entry[name] for entry in ran_on(folder, rank)["log"] if name in entry]


@pytest.fixture(scope="module", params=LAUNCHES)
def ran(request, policy, tmp_path_factory):
    num_processes, config, wrapper, names = LAUNCHES[request.param]
    folder = tmp_path_factory.mktemp("on")
    run_all(folder, policy, names, num_processes, config)
    return folder, num_processes, wrapper, names


@pytest.mark.parametrize("name", VARIANTS)
def test_trains_as_trl_does(ran, name):
    folder, num_processes, wrapper, names = ran
    if name not in names:
        pytest.skip("DDP on two processes shows it")
    found, expected = folder / "ext" / name, folder / "trl" / name
    of_ranks = [ran_on(found, rank) for rank in range(num_processes)]
    assert {(ours["processes"], ours["wrapper"]) for ours in of_ranks} == {(num_processes, wrapper)}
    if wrapper == "DeepSpeedEngine":
        assert of_ranks[0]["sharding"]["stage"] == 3
    assert all(ours["packs"] == (name != "padded") for ours in of_ranks)

    for metric in ("loss", "grad_norm"):
        values = series(expected, metric)
        assert len(values) == VARIANTS[name]["options"].get("max_steps", 4)
        assert series(found, metric) == pytest.approx(values, rel=1e-5, abs=1e-6), metric
    weights, of_trl, start = (
        load_file(file)
        for file in (found / "final.safetensors", expected / "final.safetensors", found / "start.safetensors")
    )
    if name == "all ranks are dead":
        assert all(weight.equal(start[key]) for key, weight in weights.items())
    else:
        assert relative_difference(weights, of_trl, start) < 1e-5

    # each rank makes the same calls, whatever rows it has
    assert all(ours["calls"] == of_ranks[0]["calls"] for ours in of_ranks)
    assert all(
        [has_gradient for _, has_gradient in ours["forwards"]]
        == [has_gradient for _, has_gradient in of_ranks[0]["forwards"]]
        for ours in of_ranks
    )
    generations = len(series(found, "update/rows_moved"))
    assert (generations == 0) == (name == "bnpo")
    assert of_ranks[0]["calls"].get("all_to_all_single", 0) == 3 * generations
    if name == "all ranks are dead":
        assert set(series(found, "update/rows_moved")) == {0}


@pytest.mark.parametrize("name", ["a rank is dead", "long"])
def test_ranks_have_even_work(ran, name):
    folder, num_processes, _, _ = ran
    found = folder / "ext" / name
    before, after = series(found, "update/slowest_rank_unbalanced"), series(found, "update/slowest_rank")
    assert sum(series(found, "update/rows_moved")) > 0
    assert sum(after) < sum(before)
    if name == "a rank is dead":  # its rows are those of the others
        assert min(before) > num_processes / (num_processes - 1) - 0.01
        assert max(after) < 1.4
    computed = [
        sum(tokens for tokens, has_gradient in ran_on(found, rank)["forwards"] if has_gradient)
        for rank in range(num_processes)
    ]
    assert max(computed) / (sum(computed) / num_processes) < 1.35
