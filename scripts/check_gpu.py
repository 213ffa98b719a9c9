"""Check this package on an NVIDIA GPU, or train a model on it. `check_gpu.sh` starts it.

    bash scripts/check_gpu.sh                                         # tests, benchmark, demo: 20 minutes at most
    bash scripts/check_gpu.sh --parts tests demo                      # some of it
    bash scripts/check_gpu.sh --train path/to/model path/to/gsm8k     # 15 minutes of training on GSM8K
    bash scripts/check_gpu.sh --train SmolLM2.gguf path/to/gsm8k --minutes 5 -- --learning_rate 1e-5

Without `--train`, one after the other:

- `pytest -m gpu tests/gpu`: packed against padded attention and training, and what else only a GPU can show;
- `bench_update.py` in bfloat16, for the shapes of Qwen2.5-0.5B and 1.5B, over all workloads, with micro-batches that
  fill a GPU;
- the demo, `recipes/gsm8k.py`.

With it, `recipes/gsm8k.py` trains for a time, and the whole test file is answered before and after. MODEL is a folder,
or a GGUF file, of which `export_smollm2.py` makes one; DATA a folder with GSM8K's `train.jsonl` and a `test*.jsonl`.
Options behind `--` are the recipe's. Model, `summary.json` and the curve of the rewards go to `--output_dir`.

Each part is a process with a time limit, and what fails does not keep the others from running. A table and a JSON file
(`--output_file`) say how it went. Exit status: 0 all has passed, 1 something has not, 2 wrong arguments, no GPU, or no
place for the file.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trl_grpo_ext.exits import one_line


ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "gsm8k.py"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "flash_attn", "vllm")

# The recipe's settings for a GPU: 16 problems x 8 completions a step, as many as are generated at once. The clock
# decides how many steps there are, so nothing may depend on their number.
TRAINING_CONFIG = ROOT / "recipes" / "configs" / "smollm2-135m.yaml"
TRAINING = {
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 4,
    "max_steps": 1_000_000,
    "eval_samples": 1,
    "eval_batch_size": 256,
    "save_strategy": "no",
}

# Settings of a machine that change what is computed, or whether it is compiled
LEFT_OUT = ("TORCHDYNAMO_DISABLE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")

# The demo gains 60 points on a CPU, with other random numbers.
DEMO_GAIN = 0.3

LIMITS_S = {"tests": 300, "update, qwen2.5-0.5b": 330, "update, qwen2.5-1.5b": 420, "demo": 120}
SECONDS_FOR_EVALUATIONS = 1800  # at both ends of a training, and for loading
SECONDS_FOR_THE_REST = 10  # of what a part has said, once it has ended
LONGEST_REASON_CHARS = 300
CURVE_COLUMNS = ("step", "reward", "rewards/correctness_reward_func/mean", "completions/mean_length")


@dataclass
class Outcome:
    """What came out of a part.

    Args:
        problem (`str`, *optional*):
            What is wrong, in one line; `None` if it has passed.
        lines (`list[str]`):
            What is worth a look, for the table.
        figures (`dict[str, Any]`):
            All of it, for the file.
        seconds (`float`):
            How long it took.
    """

    problem: str | None = None
    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Part:
    """A process, and where its figures are.

    Args:
        name (`str`):
            What it is called.
        command (`Sequence[str]`):
            The process.
        limit_s (`float`):
            Seconds after which it is ended.
        read (`Callable[[], Outcome]`):
            Reads what it has left behind; may raise `OSError`, `ValueError` or `KeyError`.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    read: Callable[[], Outcome]


# What a part has left behind


def read_tests(file: Path) -> Outcome:
    """Counts of a JUnit file of pytest, and which tests have failed, or were left out, each with why."""
    (suite,) = ElementTree.parse(file).getroot().iter("testsuite")  # noqa: S314  # pytest has just written it
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts.pop("tests") - sum(counts.values())
    failed: dict[str, str] = {}
    reasons: dict[str, int] = {}
    for case in suite.iter("testcase"):
        for wrong in (*case.findall("failure"), *case.findall("error")):
            failed[str(case.get("name"))] = one_line(wrong.get("message"))[:LONGEST_REASON_CHARS]
        if (skipped := case.find("skipped")) is not None:
            reason = str(skipped.get("message"))
            reasons[reason] = reasons.get(reason, 0) + 1
    return Outcome(
        problem=None if passed or failed else "no test has run",
        lines=[
            ", ".join(f"{count} {name}" for name, count in {"passed": passed, **counts}.items() if count),
            *(f"failed: {name}: {reason}" for name, reason in failed.items()),
            *(f"skipped, {count}: {reason}" for reason, count in reasons.items()),
        ],
        figures={"passed": passed, **counts, "failed_tests": failed, "reasons_of_skips": reasons},
    )


def read_bench(file: Path) -> Outcome:
    """The workloads that `bench_update.py` has come through, and each one's headline."""
    workloads = json.loads(file.read_text(encoding="utf-8"))["workloads"]
    lines, figures = [], {}
    for name, result in workloads.items():
        first, trainers = result["headline"], result["trainers"]
        memory = trainers["ours"]["peak_memory_gb"] / trainers[first["against"]]["peak_memory_gb"]
        share = "unknown" if result["attention_share"] is None else f"{result['attention_share']:.0%}"
        ratio = "gradients differ" if first["ratio"] is None else f"{first['ratio']:.2f} times as fast"
        lines.append(
            f"{name}: against {first['against']} {ratio}; {first['over_the_limit']:.2f} of the limit; "
            f"attention {share}; memory {memory:.2f}"
        )
        figures[name] = {**first, "attention_share": result["attention_share"], "memory": memory, "trainers": trainers}
    return Outcome(lines=lines, figures=figures)


def read_summary(file: Path, least_gain: float | None = None) -> Outcome:
    """Figures before and after of a recipe's `summary.json`, which must have gained something if that is asked for."""
    summary = json.loads(file.read_text(encoding="utf-8"))
    lines = []
    for name in ("strict", "answer"):
        before, after = (summary["accuracy"][when][name] for when in ("before", "after"))
        lines.append(f"{name}, greedy, %: {in_percent(before)} before, {in_percent(after)} after")
    gain = summary["accuracy"]["after"]["strict"]["mean"] - summary["accuracy"]["before"]["strict"]["mean"]
    lines.append(f"{summary['optimizer_steps']} optimizer steps, {summary['seconds']:.0f} s with evaluations")
    problem = None
    if least_gain is not None and not gain >= least_gain:
        problem = f"strict accuracy has gained {100 * gain:.0f} points, and not {100 * least_gain:.0f}"
    return Outcome(problem, lines, summary)


def in_percent(estimate: dict[str, float]) -> str:
    mean, low, high = (100 * estimate[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def write_curve(folder: Path) -> Path:
    """Rewards of a training, as its trainer has logged them: `curve.png` with matplotlib, `curve.csv` without."""
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    points = [[entry.get(name) for name in CURVE_COLUMNS] for entry in log if "reward" in entry]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        file = folder / "curve.csv"
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([CURVE_COLUMNS, *points])
        return file
    figure = Figure(figsize=(6.4, 3 * (len(CURVE_COLUMNS) - 1)), layout="constrained")
    steps, *curves = zip(*points, strict=True) if points else [()] * len(CURVE_COLUMNS)
    all_axes = figure.subplots(len(curves), 1, sharex=True)
    for axes, name, values in zip(all_axes, CURVE_COLUMNS[1:], curves, strict=True):
        axes.plot(steps, [float("nan") if value is None else value for value in values], linewidth=1)
        axes.set_title(name, fontsize=10)
    all_axes[-1].set_xlabel("optimizer step")
    file = folder / "curve.png"
    figure.savefig(file, dpi=120)
    return file


# The parts


def parts_of_check(python: str, scratch: Path) -> list[Part]:
    """Tests, benchmark and demo, with what they leave behind in a folder of their own."""
    report = scratch / "tests.xml"
    # Options of pyproject.toml are for another set of packages: pytest may be there without its plug-ins.
    options = ["-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short", "-rs", f"--junitxml={report}"]
    command = [python, "-m", "pytest", str(ROOT / "tests" / "gpu"), *options]
    parts = [Part("tests", command, LIMITS_S["tests"], partial(read_tests, report))]
    for model in ("qwen2.5-0.5b", "qwen2.5-1.5b"):
        file = scratch / f"{model}.json"
        command = [python, str(ROOT / "scripts" / "bench_update.py"), "--device", "cuda", "--dtype", "bfloat16"]
        command += ["--model", model, "--prompts_per_micro_batch", "4", "--repeats", "1", "--output_file", str(file)]
        name = f"update, {model}"
        parts.append(Part(name, command, LIMITS_S[name], partial(read_bench, file)))
    demo = scratch / "demo"
    command = [python, str(RECIPE), "--use_cpu", "false", "--output_dir", str(demo)]
    parts.append(Part("demo", command, LIMITS_S["demo"], partial(read_summary, demo / "summary.json", DEMO_GAIN)))
    return parts


def parts_of_training(
    python: str, model: Path, data: Path, minutes: float, output_dir: Path, options: Sequence[str] = ()
) -> list[Part]:
    """The training of a model, and before it what makes a folder of a GGUF file.

    Raises:
        ValueError: If there is no such model, or not the data that are needed.
    """
    train, test = find_data(data)
    parts = []
    if model.suffix == ".gguf" and model.is_file():
        exported = output_dir / "start"
        command = [python, str(ROOT / "scripts" / "export_smollm2.py"), "--gguf_file", str(model)]
        parts.append(Part("export", [*command, "--output_dir", str(exported)], 600, Outcome))
        model = exported
    elif not (model / "config.json").is_file():
        raise ValueError(f"--train: {str(model)!r} is no model: name a folder with config.json, or a .gguf file")
    items = sum(bool(line.strip()) for line in test.read_text(encoding="utf-8").splitlines())
    settings = {
        **TRAINING,
        "model_name_or_path": model,
        "dataset_name": train,
        "eval_dataset_name": test,
        "eval_items": items,
        "max_minutes": minutes,
        "output_dir": output_dir,
    }
    command = [python, str(RECIPE), "--config", str(TRAINING_CONFIG)]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    def read() -> Outcome:
        outcome = read_summary(output_dir / "summary.json")
        outcome.lines.append(f"{output_dir}: model, summary.json, {write_curve(output_dir).name}")
        return outcome

    limit_s = 60 * minutes + SECONDS_FOR_EVALUATIONS
    return [*parts, Part("training", [*command, *options], limit_s, read)]


def find_data(folder: Path) -> tuple[Path, Path]:
    """The files to train and to test on.

    Raises:
        ValueError: If they are not there, or there are several to test on.
    """
    train, tests = folder / "train.jsonl", sorted(folder.glob("test*.jsonl"))
    if not train.is_file():
        raise ValueError(f"--train: there is no train.jsonl in {str(folder)!r}")
    if len(tests) != 1:
        found = ", ".join(file.name for file in tests) or "none"
        raise ValueError(f"--train: there must be one test*.jsonl in {str(folder)!r}, found {found}")
    return train, tests[0]


# Running them


def run(part: Part) -> Outcome:
    """Run a part to its end, or to its limit. What it says is shown as it comes, and its last line kept."""
    print(f"\n{part.name}: at most {part.limit_s:.0f} s", flush=True)
    began = time.perf_counter()
    process = subprocess.Popen(
        part.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment(),
    )
    assert process.stdout is not None
    last: deque[bytes] = deque(maxlen=1)
    reader = threading.Thread(target=show_all, args=(process.stdout.fileno(), last), daemon=True)
    reader.start()
    problem = None
    try:
        status = process.wait(part.limit_s)
        if status != 0:
            problem = f"exit status {status}"
    except subprocess.TimeoutExpired:
        problem = f"not done in {part.limit_s:.0f} s"
    finally:  # also of what it has started
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # What has gone to a session of its own, as torch's compilers do, may keep the output open for a while.
        reader.join(SECONDS_FOR_THE_REST)
        if not reader.is_alive():
            process.stdout.close()
    try:
        outcome = part.read()
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
        outcome = Outcome(f"no figures ({type(error).__name__}: {error})")
    if problem is not None:
        said = last[0].decode(errors="replace").strip() if last else ""
        outcome.problem = f"{problem}: {said}" if said and problem.startswith("exit") else problem
    outcome.seconds = time.perf_counter() - began
    return outcome


def show_all(stream: int, last: "deque[bytes]") -> None:
    """Copy a stream to the screen, as it comes, because progress bars end no lines; keep the last line."""
    rest = b""
    while chunk := os.read(stream, 65536):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        last.extend(line for line in lines if line.strip())
    if rest.strip():
        last.append(rest)


def environment() -> dict[str, str]:
    """Of the processes: this package, one GPU, and no network."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    inherited = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    return {
        **inherited,
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": first_gpu(),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever a machine has; the tests here need none
    }


def as_installed(path: str, folder: Path) -> str:
    """`PYTHONPATH` with a link in `folder` in place of each entry whose name does not say that it has packages.

    dill, by which datasets tells data sets apart, takes the modules of another folder for a user's own code, and fails
    at writing them out.
    """
    entries = []
    for number, entry in enumerate(filter(None, path.split(os.pathsep))):
        if "site-packages" not in entry and Path(entry).is_dir() and Path(entry).resolve() != ROOT:
            link = folder / f"site-packages-{number}"
            link.symlink_to(Path(entry).resolve())
            entry = str(link)
        entries.append(entry)
    return os.pathsep.join(entries)


def first_gpu() -> str:
    """The first of those that may be used: with several, a process without a launcher would train on all of them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


# The machine


def why_no_gpu() -> str | None:
    """Why nothing can be checked here; `None` if it can."""
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    remedy = "run this on a machine with one, with a torch that is built for CUDA"
    try:
        import torch
    except (ImportError, OSError, ValueError) as error:  # its libraries may be missing, too
        if has_driver:
            return f"{sys.executable} has no torch ({one_line(error)}): name a Python that has one with PYTHON=..."
        return f"there is no NVIDIA GPU here: {remedy}"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")  # of drivers that do not answer, or are too old
        if torch.cuda.is_available():
            return None
    if has_driver and torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA: name a Python with another one with PYTHON=..."
    said = f" ({one_line(warned[0].message)})" if warned else ""
    return f"torch {torch.__version__} sees no NVIDIA GPU here{said}: {remedy}"


def machine() -> dict[str, Any]:
    """Card, driver and versions."""
    import torch

    from trl_grpo_ext import __version__

    properties = torch.cuda.get_device_properties(0)
    versions = {"python": platform.python_version(), "trl_grpo_ext": __version__, "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "gpu": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver(),
        "versions": versions,
    }


def driver() -> str | None:
    """The driver's version, if its program is there to tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] if said else None


# What is said


def report_of(machine: dict[str, Any], outcomes: dict[str, Outcome], seconds: float) -> dict[str, Any]:
    """What the file has."""
    return {
        "passed": all(outcome.problem is None for outcome in outcomes.values()),
        "seconds": round(seconds, 1),
        **machine,
        "parts": {
            name: {
                "passed": outcome.problem is None,
                "problem": outcome.problem,
                "seconds": round(outcome.seconds, 1),
                "figures": outcome.figures,
            }
            for name, outcome in outcomes.items()
        },
    }


def print_table(title: str, outcomes: dict[str, Outcome]) -> None:
    rows = [
        (
            name,
            "passed" if outcome.problem is None else "FAILED",
            f"{outcome.seconds:.0f}",
            "\n".join([*filter(None, [outcome.problem]), *outcome.lines]),
        )
        for name, outcome in outcomes.items()
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"\n{title}")
        for name, result, seconds, figures in rows:
            print(f"{name}: {result}, {seconds} s")
            print("".join(f"  {line}\n" for line in figures.splitlines()), end="")
        return
    table = Table("part", "result", "seconds", "figures", title=title)
    for row in rows:
        table.add_row(*row, end_section=True)
    Console(markup=False, width=None if sys.stdout.isatty() else 120).print(table)


def check(parts: Sequence[Part], machine: dict[str, Any], output_file: Path) -> bool:
    """Run the parts, write the file after each of them and the table behind the last; whether all have passed.

    Raises:
        OSError: If the file cannot be written, before any part is run.
    """
    began = time.perf_counter()
    outcomes: dict[str, Outcome] = {}
    output_file.parent.mkdir(parents=True, exist_ok=True)
    output_file.open("a").close()  # or raise before it takes 20 minutes
    for part in parts:
        outcomes[part.name] = run(part)
        report = report_of(machine, outcomes, time.perf_counter() - began)
        output_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_table(f"{machine['gpu']}, torch {machine['versions']['torch']}", outcomes)
    print(f"All figures are in {output_file}")
    return bool(report["passed"])


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the recipe's."""
    parser = argparse.ArgumentParser(
        prog="check_gpu.sh",
        description="Check this package on an NVIDIA GPU, or train a model on it.",
        epilog="Options behind -- are the recipe's.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--train",
        nargs=2,
        type=Path,
        metavar=("MODEL", "DATA"),
        help="train a model, a folder or a GGUF file, on a folder with GSM8K's train.jsonl and a test*.jsonl",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(LIMITS_S),
        metavar="PART",
        help=f"check these alone, of: {', '.join(map(repr, LIMITS_S))} (default: all)",
    )
    parser.add_argument("--minutes", type=float, help="how long to train (default: 15)")
    parser.add_argument("--output_dir", type=Path, help="of the training (default: outputs/gpu)")
    parser.add_argument(
        "--output_file", type=Path, default=Path("check_gpu.json"), help="all figures (default: %(default)s)"
    )
    own, separator, options = list(argv), "--" in argv, []
    if separator:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if args.train is None:
        for name, value in (("--minutes", args.minutes), ("--output_dir", args.output_dir), ("--", options)):
            if value:
                parser.error(f"{name} is for --train MODEL DATA, which is not given")
    elif args.parts:
        parser.error("--parts is for a check, and --train is given: leave one of them out")
    args.minutes = 15.0 if args.minutes is None else args.minutes
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    args.output_dir = args.output_dir or Path("outputs/gpu")
    return args, options


def main(argv: Sequence[str]) -> int:
    args, options = parse_arguments(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = first_gpu()  # before torch looks
    if (reason := why_no_gpu()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # parts are ended too
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as scratch:
        os.environ["TMPDIR"] = scratch  # what is ended at its limit does not clean up
        os.environ["PYTHONPATH"] = as_installed(os.environ.get("PYTHONPATH", ""), Path(scratch))
        if args.train is None:
            parts = parts_of_check(sys.executable, Path(scratch))
            parts = [part for part in parts if not args.parts or part.name in args.parts]
        else:
            model, data = args.train
            try:
                parts = parts_of_training(sys.executable, model, data, args.minutes, args.output_dir, options)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
        try:
            return 0 if check(parts, machine(), args.output_file) else 1
        except OSError as error:
            print(f"error: --output_file: {error}; name a file that can be written", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
