"""What costs time. Imports no torch."""

from ..findings import HINT, Found, rule
from ..record import Run
from ..windows import latest, median


# What costs time.
WAITING_RATIO = 1.3
WAITING_VALUES = 8
GPU_UTILIZATION = 0.5
GPU_VALUES = 20
TIME_STEPS = 20
REWARDS_SHARE = 0.3
GENERATION_SHARE = 0.7


@rule(
    "waiting-ranks",
    "Processes wait for the slowest one",
    when=f"the median of {WAITING_VALUES} values of update/slowest_rank is above {WAITING_RATIO:g}",
    remedy="Leave balance_ranks on, give each process more groups, or shorten the longest completions.",
)
def waiting_ranks(run: Run) -> Found | None:
    values = latest(run, "update/slowest_rank", WAITING_VALUES)
    if not values or median(values) <= WAITING_RATIO:
        return None
    return Found(
        f"The process with most tokens computes {median(values):.2f} times as many as the mean (median of "
        f"{WAITING_VALUES} generations), and the others wait for it.",
        values[0][0],
    )


@rule(
    "gpu-waits",
    "The GPU waits for the host",
    when=f"the median of gpu/utilization over {GPU_VALUES} steps is below {GPU_UTILIZATION:.0%}",
    remedy="Larger batches, tokens_per_micro_batch='auto' and vLLM for sampling keep it busy; slow rewards "
    "leave it idle.",
    severity=HINT,
    explained_by=("slow-rewards",),
)
def gpu_waits(run: Run) -> Found | None:
    values = latest(run, "gpu/utilization", GPU_VALUES)
    if not values or median(values) >= GPU_UTILIZATION:
        return None
    return Found(
        f"It was busy {median(values):.0%} of the time in the median of the last {GPU_VALUES} steps.", values[0][0]
    )


def _shares_of_time(run: Run) -> tuple[dict[str, float], int] | None:
    steps = run.steps[-TIME_STEPS:]
    seconds = {
        name: sum(step.seconds.get(name, 0.0) for step in steps) for name in ("generation", "rewards", "update")
    }
    total = sum(seconds.values())
    if len(steps) < TIME_STEPS or total <= 0:
        return None
    return {name: value / total for name, value in seconds.items()}, steps[0].step


@rule(
    "slow-rewards",
    "Rewards take much of the time",
    when=f"more than {REWARDS_SHARE:.0%} of the last {TIME_STEPS} steps",
    remedy="Make the slow function asynchronous (`async def`), call what it waits for in batches or in processes, or "
    "keep its results.",
)
def slow_rewards(run: Run) -> Found | None:
    found = _shares_of_time(run)
    if found is None or found[0]["rewards"] <= REWARDS_SHARE:
        return None
    return Found(f"They took {found[0]['rewards']:.0%} of the last {TIME_STEPS} steps.", found[1])


@rule(
    "slow-generation",
    "Sampling takes most of the time",
    when=f"more than {GENERATION_SHARE:.0%} of the last {TIME_STEPS} steps on an accelerator without vLLM",
    remedy="Set use_vllm=True, or make more of the same completions with more passes (num_iterations).",
    severity=HINT,
)
def slow_generation(run: Run) -> Found | None:
    found = _shares_of_time(run)
    has_faster = str(run.about.get("device", "cpu")) != "cpu" and not run.settings.get("use_vllm")
    if found is None or not has_faster or found[0]["generation"] <= GENERATION_SHARE:
        return None
    return Found(f"It took {found[0]['generation']:.0%} of the last {TIME_STEPS} steps.", found[1])
