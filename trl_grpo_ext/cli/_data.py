"""What the subcommands that read problems have in common: which columns they are in."""

from dataclasses import dataclass, field
from typing import Any

from ..exits import stop


@dataclass
class ColumnArguments:
    """Where the questions and the references stand."""

    question_column: str | None = field(
        default=None,
        metadata={"help": "Column of the question. Default: as GSM8K, MATH, SVAMP or ASDiv call it, else 'question'."},
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of the reference. Default: likewise, else 'answer'."}
    )
    answer_extractor: str | None = field(
        default=None,
        metadata={
            "help": "What of that column is the answer: what follows '####' (hash), the last \\boxed{} (boxed), the "
            "answer tag's content (tag), all of it (none). Default: hash if the first row has '####', else none.",
            "choices": ["hash", "boxed", "tag", "none"],
        },
    )

    def columns(self) -> dict[str, Any]:
        """As [`load_problems`] takes them."""
        return {
            "question_column": self.question_column,
            "answer_column": self.answer_column,
            "answer_extractor": self.answer_extractor,
        }


def rewards_of(option: str, names: Any) -> Any:
    """The rewards that an option names; ends with one line if there are none of that name."""
    from ..rewards.names import find_rewards

    try:
        return find_rewards(names)
    except ValueError as error:
        stop(2, f"--{option}: {error}")
