"""Options that training scripts have beyond TRL's. Importing this module imports no torch."""

from dataclasses import dataclass, field

from .rewards.extractors import ANSWER_EXTRACTORS


@dataclass
class RunArguments:
    """What every run needs: how it begins, and how its policy is evaluated."""

    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out problems, like dataset_name. Default: the test split where dataset_name has one."},
    )
    eval_items: int = field(default=200, metadata={"help": "Number of held-out problems that are evaluated."})
    eval_samples: int = field(default=4, metadata={"help": "Samples for each problem (0: greedy decoding only)."})
    eval_batch_size: int = field(
        default=64, metadata={"help": "Completions an evaluation generates at once; vLLM sees to that itself."}
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Train for at most so many minutes; loading and the evaluations at both ends are not counted. "
            "Default: no limit."
        },
    )
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of each process on a CPU. Default: the cores, shared out."}
    )
    overwrite_run: bool = field(
        default=False, metadata={"help": "Start afresh even if output_dir holds a run with other settings."}
    )
    allow_changed_settings: bool = field(
        default=False,
        metadata={"help": "Go on from a checkpoint with other settings than it was made with; run.yaml records them."},
    )

    def __post_init__(self) -> None:
        for name, least in (("eval_items", 1), ("eval_samples", 0), ("eval_batch_size", 1), ("cpu_threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"--max_minutes must be above 0, got {self.max_minutes}")


@dataclass
class ColumnArguments:
    """Where a data set has its questions and references, if not in the columns `prompt` and `answer`."""

    question_column: str | None = field(default=None, metadata={"help": "Column of the question."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of the reference."})
    answer_extractor: str | None = field(
        default=None,
        metadata={
            "help": "What of that column is the answer: what follows '####' (hash) or '</think>' (think), the last "
            "\\boxed{} (boxed), the answer tag's content (tag; xml: also where it is not closed), the last number "
            "(last_number), all of it (none). Default: hash if the first row has '####', else none.",
            "choices": list(ANSWER_EXTRACTORS),
        },
    )

    @property
    def columns(self) -> dict[str, str | None]:
        """As [`load_problems`] takes them."""
        return {
            "question_column": self.question_column,
            "answer_column": self.answer_column,
            "answer_extractor": self.answer_extractor,
        }


@dataclass
class GRPOExtOptions(ColumnArguments, RunArguments):
    """What `trl-grpo-ext grpo` has beside the options of `trl grpo` and those of `GRPOExtConfig`."""

    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System message before each question: a text, or 'none'. Default: where a column is named, the "
            "format that this package's rewards look for; else none."
        },
    )
