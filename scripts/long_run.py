"""Whether a long run stays as it was: memory, threads, open files, processes and step time of the offline recipe.

    python scripts/long_run.py                                         # 2,000 steps; on 2 CPU cores about 15 minutes
    python scripts/long_run.py --steps 600 --save_steps 20 --eval_strategy steps --eval_steps 100
    python scripts/long_run.py --config recipes/configs/qwen2.5-0.5b.yaml --output_dir outputs/long-run-qwen

Starts `recipes/gsm8k.py` as users do, with `trl-grpo-ext launch`, and looks at its processes from outside while it
trains; options that are not this script's are the recipe's. Compares what they have at the end of training with what
they had from step 200 on, when caches are full: memory may be 5 % more, threads, files and processes none, and a step
may take 5 % longer. Memory is the least of 100 steps: with each checkpoint a run gives back what it has freed, and
what a step works with, which comes on top until then, is shown beside it. Prints a table, writes `long_run.json` and
`long_run.png` into the output folder beside the run's own, and ends with status 1 if something has grown.

The learning rate is next to nothing unless it is given: a policy that learns writes other lengths and leaves other
rows out, and memory and time of a step follow it. Other work on the machine makes step times worthless, and nothing
else: processor time, which is printed beside them, suffers less from it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # comes with accelerate
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from trl_grpo_ext.cli.launch import children, end_as, signals_passed_on
from trl_grpo_ext.exits import stop
from trl_grpo_ext.report.record import RecordError, Run, read_record
from trl_grpo_ext.versions import installed_versions


RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "gsm8k.py"
LEARNING_RATE = "1e-7"
# Steps over which the two figures are taken that are compared.
WINDOW_STEPS = 100
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """What all training processes together have at a moment; without the launcher, which only waits for them.

    Args:
        time (`float`):
            Seconds since 1970.
        resident_bytes (`int`):
            Memory that is in use; what processes share counts for each of them.
        allocated_bytes (`int`):
            The part of it that is no file's: what they have allocated.
        threads (`int`), files (`int`), processes (`int`):
            How many there are; sockets and pipes are files too.
        processor_s (`float`):
            Processor time since they began.
        step (`int`):
            The last optimizer step that was done by then; 0 until that is known.
    """

    time: float
    resident_bytes: int
    allocated_bytes: int
    threads: int
    files: int
    processes: int
    processor_s: float
    step: int = 0


@dataclass(frozen=True)
class Batch:
    """Optimizer steps over one generation batch, which only together take as long as others: the first generates."""

    step: int  # its last one
    seconds: float  # a step


@dataclass(frozen=True)
class Verdict:
    """A quantity when caches are full, and at the end.

    Args:
        quantity (`str`):
            What it is, with its unit.
        before (`float`), after (`float`):
            Over a few steps behind the first ones, and over the last ones: medians, of memory the least.
        allowed (`float`, *optional*):
            By which share it may have grown; `None` if that is nobody's concern.
    """

    quantity: str
    before: float
    after: float
    allowed: float | None

    @property
    def growth(self) -> float:
        return self.after / self.before - 1 if self.before else float(self.after > 0)

    @property
    def holds(self) -> bool:
        return self.allowed is None or self.growth <= self.allowed


def look_at(launcher: psutil.Process) -> Sample | None:
    """The processes below the launcher; `None` while there are none."""
    found = []
    with suppress(psutil.NoSuchProcess):
        found = launcher.children(recursive=True)
    seen = []
    for process in found:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess), process.oneshot():
            memory, times = process.memory_info(), process.cpu_times()
            of_memory = memory.rss, memory.rss - memory.shared
            seen.append((*of_memory, process.num_threads(), process.num_fds(), 1, times.user + times.system))
    return Sample(time.time(), *map(sum, zip(*seen, strict=True))) if seen else None


def watch(command: Sequence[str], every_s: float) -> tuple[int, list[Sample]]:
    """Run a command, and look at its processes until it ends; returns its exit status, and what was seen."""
    samples = []
    others = children()
    with signals_passed_on(others), subprocess.Popen(command) as process:
        launcher = psutil.Process(process.pid)
        while process.poll() is None:
            sample = look_at(launcher)
            if sample is not None:
                samples.append(sample)
            with suppress(subprocess.TimeoutExpired):
                process.wait(every_s)
    return process.returncode, samples


def in_training(samples: Iterable[Sample], run: Run) -> list[Sample]:
    """The samples from training's first to its last step, with the step of each."""
    times = [step.time for step in run.steps]
    placed = ((bisect_left(times, sample.time), sample) for sample in samples)
    return [replace(sample, step=run.steps[place - 1].step) for place, sample in placed if 0 < place < len(times)]


def batches_of(run: Run) -> list[Batch]:
    """How long steps took: what lies between two of them, such as saving and logging, with them."""
    seconds = {step.step: sum(step.seconds.values()) for step in run.steps}
    begins = sorted({generation.step for generation in run.generations})
    batches = []
    for begin, end in zip(begins, [*begins[1:], run.last_step], strict=True):
        within = [seconds[step] for step in range(begin + 1, end + 1) if step in seconds]
        if within:
            batches.append(Batch(end, statistics.fmean(within)))
    return batches


def judge(
    samples: Sequence[Sample], batches: Sequence[Batch], *, first_step: int, memory: float, step_time: float
) -> list[Verdict]:
    """What has grown.

    Args:
        samples (`Sequence[Sample]`), batches (`Sequence[Batch]`):
            What was seen in training, in its order.
        first_step (`int`):
            From which step on nothing is to grow.
        memory (`float`), step_time (`float`):
            By which share they may.

    Raises:
        ValueError: If there are too few steps, or samples, behind the first step.
    """
    seen = [sample for sample in samples if sample.step >= first_step]
    timed = [batch.seconds for batch in batches if batch.step > first_step]
    last_step = batches[-1].step if batches else 0
    window = min(WINDOW_STEPS, (last_step - first_step) // 4)
    early = [sample for sample in seen if sample.step <= first_step + window]
    late = [sample for sample in seen if sample.step >= last_step - window]
    of_seen, of_timed = len(seen) // 4, len(timed) // 4
    if min(window, of_seen, of_timed, len(early), len(late)) < 1:
        raise ValueError(
            f"{len(seen)} looks at {max(last_step - first_step, 0)} steps behind step {first_step} are too few to "
            "compare their beginning with their end: give more --steps, or a smaller --every_s"
        )

    def of(value: Callable[[Sample], float], over: Callable[..., float] = statistics.median) -> tuple[float, float]:
        return over(map(value, early)), over(map(value, late))

    def resident(sample: Sample) -> float:
        return sample.resident_bytes / MIB

    step_seconds = statistics.median(timed[:of_timed]), statistics.median(timed[-of_timed:])
    processor_seconds = _processor_time(seen[: of_seen + 1]), _processor_time(seen[-of_seen - 1 :])
    compared: list[tuple[str, tuple[float, float], float | None]] = [
        ("memory, MiB", of(resident, min), memory),
        ("memory without files, MiB", of(lambda sample: sample.allocated_bytes / MIB, min), memory),
        ("memory with a step's work, MiB", of(resident), None),
        ("threads", of(lambda sample: sample.threads), 0.0),
        ("open files", of(lambda sample: sample.files), 0.0),
        ("processes", of(lambda sample: sample.processes), 0.0),
        ("seconds a step", step_seconds, step_time),
        ("processor time a step, s", processor_seconds, None),
    ]
    return [Verdict(quantity, *before_and_after, allowed) for quantity, before_and_after, allowed in compared]


def _processor_time(samples: Sequence[Sample]) -> float:
    first, last = samples[0], samples[-1]
    return (last.processor_s - first.processor_s) / max(last.step - first.step, 1)


def show(verdicts: Iterable[Verdict], first_step: int) -> None:
    table = Table("of all training processes", f"behind step {first_step}", "at the end", "change", "allowed", "")
    for verdict in verdicts:
        digits = 0 if float(verdict.before).is_integer() and float(verdict.after).is_integer() else 3
        table.add_row(
            verdict.quantity,
            f"{verdict.before:,.{digits}f}",
            f"{verdict.after:,.{digits}f}",
            f"{verdict.growth:+.1%}",
            "" if verdict.allowed is None else f"{verdict.allowed:.0%}",
            "" if verdict.allowed is None else "ok" if verdict.holds else "GROWS",
        )
    Console().print(table)


def draw(samples: Sequence[Sample], batches: Sequence[Batch], first_step: int, file: Path) -> None:
    figure = Figure(figsize=(8, 9), layout="constrained")
    memory, counts, seconds = figure.subplots(3, 1, sharex=True)
    steps = [sample.step for sample in samples]
    memory.plot(steps, [sample.resident_bytes / MIB for sample in samples], label="memory")
    memory.plot(steps, [sample.allocated_bytes / MIB for sample in samples], label="without files")
    memory.set_ylabel("MiB")
    for name in ("threads", "files", "processes"):
        counts.plot(steps, [getattr(sample, name) for sample in samples], label=name)
    counts.set_ylabel("number")
    seconds.plot([batch.step for batch in batches], [batch.seconds for batch in batches], ".", markersize=2)
    seconds.set_ylabel("seconds a step")
    seconds.set_xlabel("optimizer steps")
    for axes in (memory, counts, seconds):
        axes.set_ylim(bottom=0)
        axes.axvline(first_step, color="grey", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.3)
    memory.legend()
    counts.legend()
    figure.savefig(file, dpi=110)


def columns_of(items: Sequence[Sample] | Sequence[Batch]) -> dict[str, list[float]]:
    rows = [asdict(item) for item in items]
    return {item.name: [row[item.name] for row in rows] for item in fields(items[0])}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=2000, help="Optimizer steps.")
    parser.add_argument("--first_step", type=int, default=200, help="From which step on nothing is to grow.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/long-run"))
    parser.add_argument("--every_s", type=float, default=0.25, help="Seconds between two looks at the processes.")
    parser.add_argument("--memory", type=float, default=0.05, help="By which share memory may grow.")
    parser.add_argument("--step_time", type=float, default=0.05, help="By which share the time of a step may grow.")
    args, of_recipe = parser.parse_known_args(argv)
    if args.first_step < 1 or args.steps < args.first_step + 4:
        parser.error(f"--steps must be at least 4 more than --first_step, {args.first_step}, got {args.steps}")
    if not args.every_s > 0:
        parser.error(f"--every_s must be above 0, got {args.every_s}")
    return args, of_recipe


def main(argv: list[str]) -> None:
    args, of_recipe = parse(argv)
    if not any(option.partition("=")[0] == "--learning_rate" for option in of_recipe):
        of_recipe = ["--learning_rate", LEARNING_RATE, *of_recipe]
    of_run = args.output_dir / "run"
    command = [str(Path(sysconfig.get_path("scripts")) / "trl-grpo-ext"), "launch", str(RECIPE)]
    status, samples = watch(
        [*command, "--max_steps", str(args.steps), "--output_dir", str(of_run), *of_recipe], args.every_s
    )
    if status != 0:
        end_as(status, process="the launcher")
    try:
        run = read_record(of_run)
        samples, batches = in_training(samples, run), batches_of(run)
        verdicts = judge(samples, batches, first_step=args.first_step, memory=args.memory, step_time=args.step_time)
    except (RecordError, ValueError) as error:
        stop(1, error)
    show(verdicts, args.first_step)
    found = {
        "options": {"steps": args.steps, "first_step": args.first_step, "every_s": args.every_s, "recipe": of_recipe},
        "versions": installed_versions(),
        "verdicts": [{**asdict(verdict), "holds": verdict.holds} for verdict in verdicts],
        "samples": columns_of(samples),
        "batches": columns_of(batches),
    }
    (args.output_dir / "long_run.json").write_text(json.dumps(found) + "\n")
    draw(samples, batches, args.first_step, args.output_dir / "long_run.png")
    print(f"Figures and picture are in {args.output_dir}")
    sys.exit(not all(verdict.holds for verdict in verdicts))


if __name__ == "__main__":
    main(sys.argv[1:])
