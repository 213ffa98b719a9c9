"""Grade-school word problems made from a seed: an endless offline stand-in for GSM8K.

Each problem comes from one of eight kinds (one to three arithmetic steps). A kind owns the numbers it draws, the steps
that solve it, and five wordings. Which split a problem belongs to is a property of the problem, not of the draw:

- the numbers are assigned to `"train"` or to the held-out splits by a hash of (kind, numbers), so no held-out problem
  can turn up in training, whatever the seeds and sizes;
- the last wording of every kind is kept for `"heldout_templates"`, so that split has new numbers *and* new sentences,
  where `"heldout"` has new numbers in known sentences.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..extras import require
from .prompts import SYSTEM_PROMPT, format_solution, to_prompt


if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "heldout", "heldout_templates"]

# One in this many number combinations is held out.
HELDOUT_ONE_IN = 5

NAMES = (
    "Ava", "Ben", "Chloe", "Dan", "Ella", "Finn", "Grace", "Hugo", "Ivy", "Jack",
    "Kira", "Liam", "Mia", "Noah", "Olga", "Pablo", "Quinn", "Rosa", "Sam", "Tara",
)  # fmt: skip
ITEMS = (
    "apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "marbles",
    "pencils", "shells", "stamps", "stickers",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One line of a worked solution: `left operator right = value`."""

    left: int
    operator: Literal["+", "-", "*", "/"]
    right: int

    @property
    def value(self) -> int:
        if self.operator == "+":
            return self.left + self.right
        if self.operator == "-":
            return self.left - self.right
        if self.operator == "*":
            return self.left * self.right
        return self.left // self.right

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.value}"


@dataclass(frozen=True)
class Kind:
    """A family of problems that are solved in the same way.

    Args:
        name (`str`):
            What the kind is called in the dataset's `kind` column.
        draw (`Callable[[random.Random], tuple[int, ...]]`):
            Draws the numbers `a`, `b`, ... of a problem.
        solve (`Callable[..., list[Step]]`):
            The steps from those numbers to the answer, which is the last step's value.
        templates (`tuple[str, ...]`):
            Wordings with the fields `{name}`, `{item}`, `{a}`, `{b}`, ... The last one is held out of training.
    """

    name: str
    draw: Callable[[random.Random], tuple[int, ...]]
    solve: Callable[..., list[Step]]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """A word problem with its worked solution."""

    kind: str
    template: int
    numbers: tuple[int, ...]
    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> str:
        return str(self.steps[-1].value)

    @property
    def reasoning(self) -> str:
        return "\n".join(str(step) for step in self.steps)


def _draw_add(rng: random.Random) -> tuple[int, ...]:
    return rng.randint(6, 40), rng.randint(3, 20)


def _draw_subtract(rng: random.Random) -> tuple[int, ...]:
    a = rng.randint(12, 60)
    return a, rng.randint(3, min(a - 3, 20))


def _draw_multiply(rng: random.Random) -> tuple[int, ...]:
    return rng.randint(2, 12), rng.randint(2, 9)


def _draw_divide(rng: random.Random) -> tuple[int, ...]:
    quotient, divisor = _draw_multiply(rng)
    return quotient * divisor, divisor


def _draw_add_subtract(rng: random.Random) -> tuple[int, ...]:
    a, b = _draw_add(rng)
    return a, b, rng.randint(2, min(a + b - 2, 20))


def _draw_multiply_add(rng: random.Random) -> tuple[int, ...]:
    return rng.randint(2, 9), rng.randint(2, 9), rng.randint(3, 20)


def _draw_multiply_subtract(rng: random.Random) -> tuple[int, ...]:
    a, b = rng.randint(2, 9), rng.randint(3, 9)
    return a, b, rng.randint(2, min(a * b - 2, 20))


def _draw_three_steps(rng: random.Random) -> tuple[int, ...]:
    return *_draw_multiply_subtract(rng), rng.randint(2, 20)


def _two_steps(first: Step, operator: Literal["+", "-", "*", "/"], right: int) -> list[Step]:
    return [first, Step(first.value, operator, right)]


KINDS = (
    Kind(
        "add",
        _draw_add,
        lambda a, b: [Step(a, "+", b)],
        (
            "{name} has {a} {item} and finds {b} more. How many {item} does {name} have now?",
            "{name} buys {a} {item} on Monday and {b} {item} on Tuesday. How many {item} is that in all?",
            "A shelf holds {a} {item}. {name} puts {b} more on it. How many {item} are on the shelf?",
            "There are {a} {item} in a red bag and {b} {item} in a blue bag. How many {item} are in both bags?",
            "After collecting {a} {item}, {name} is given another {b}. What is the new number of {item}?",
        ),
    ),
    Kind(
        "subtract",
        _draw_subtract,
        lambda a, b: [Step(a, "-", b)],
        (
            "{name} has {a} {item} and gives {b} away. How many {item} are left?",
            "There are {a} {item} on a table. {name} takes {b} of them. How many {item} stay on the table?",
            "{name} made {a} {item} and sold {b}. How many {item} were not sold?",
            "Of {a} {item}, {b} are broken. How many {item} are not broken?",
            "{name} needs {a} {item} and already has {b}. How many {item} are still missing?",
        ),
    ),
    Kind(
        "multiply",
        _draw_multiply,
        lambda a, b: [Step(a, "*", b)],
        (
            "{name} fills {a} boxes with {b} {item} each. How many {item} are in the boxes?",
            "Each of {a} children brings {b} {item}. How many {item} do they bring?",
            "{name} buys {a} packs of {item}. A pack has {b}. How many {item} does {name} buy?",
            "A garden has {a} rows with {b} {item} in every row. How many {item} are in the garden?",
            "{name} collects {b} {item} a day. How many {item} is that after {a} days?",
        ),
    ),
    Kind(
        "divide",
        _draw_divide,
        lambda a, b: [Step(a, "/", b)],
        (
            "{name} shares {a} {item} equally among {b} friends. How many {item} does each friend get?",
            "{a} {item} are packed into {b} boxes, the same number in each. How many {item} are in a box?",
            "{b} children split {a} {item} evenly. How many {item} does one child get?",
            "{name} puts {a} {item} in {b} equal rows. How many {item} are in a row?",
            "A bag of {a} {item} lasts {b} days when {name} uses the same number daily. How many {item} is that a day?",
        ),
    ),
    Kind(
        "add_subtract",
        _draw_add_subtract,
        lambda a, b, c: _two_steps(Step(a, "+", b), "-", c),
        (
            "{name} has {a} {item}, gets {b} more and then loses {c}. How many {item} does {name} have?",
            "A shop has {a} {item}. It receives {b} {item} and sells {c}. How many {item} does it have at the end?",
            "{name} picks {a} {item} and a friend picks {b}. They give {c} to a neighbor. How many {item} remain?",
            "There were {a} {item} in a jar. {name} added {b} and then took out {c}. How many {item} are in the jar?",
            "With {a} old and {b} new {item}, {name} throws {c} away. What number of {item} does {name} keep?",
        ),
    ),
    Kind(
        "multiply_add",
        _draw_multiply_add,
        lambda a, b, c: _two_steps(Step(a, "*", b), "+", c),
        (
            "{name} has {a} bags of {b} {item} and {c} loose {item}. How many {item} does {name} have?",
            "{name} buys {a} packs of {b} {item} and finds {c} more at home. How many {item} is that in total?",
            "A school orders {a} boxes with {b} {item} each and {c} single {item}. How many {item} does it order?",
            "{name} makes {b} {item} on each of {a} days and {c} on Sunday. How many {item} does {name} make?",
            "Besides {c} {item} of {name}, there are {a} crates that hold {b} {item} apiece. What is the total?",
        ),
    ),
    Kind(
        "multiply_subtract",
        _draw_multiply_subtract,
        lambda a, b, c: _two_steps(Step(a, "*", b), "-", c),
        (
            "{name} has {a} bags of {b} {item} and eats or loses {c}. How many {item} are left?",
            "A baker fills {a} trays with {b} {item} each and sells {c}. How many {item} are not sold?",
            "{name} buys {a} packs of {b} {item} and gives {c} to a sister. How many {item} does {name} keep?",
            "There are {a} rows of {b} {item}. {name} removes {c} of them. How many {item} stay in the rows?",
            "Out of {a} crates that hold {b} {item} apiece, {c} {item} are damaged. How many are still good?",
        ),
    ),
    Kind(
        "three_steps",
        _draw_three_steps,
        lambda a, b, c, d: [
            Step(a, "*", b),
            Step(a * b, "-", c),
            Step(a * b - c, "+", d),
        ],
        (
            "{name} has {a} boxes of {b} {item}, sells {c} {item} and then buys {d}. How many {item} does {name} own?",
            "A farm packs {a} crates of {b} {item}. It ships {c} {item} and packs {d} more. How many {item} are there?",
            "{name} fills {a} bags with {b} {item} each, gives away {c} and gets {d} back. How many {item} is that now?",
            "There are {a} shelves of {b} {item}. {c} {item} are taken and {d} are returned. How many {item} are there?",
            "From {a} sets of {b} {item}, {name} uses {c} and later adds {d} new ones. What is the final number?",
        ),
    ),
)


def is_heldout(kind: str, numbers: tuple[int, ...]) -> bool:
    """Whether problems of this kind with these numbers are kept out of training, for every seed."""
    digest = hashlib.sha256(f"{kind}:{','.join(map(str, numbers))}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0


def make_problem(kind: Kind, split: Split, rng: random.Random) -> Problem:
    """Draw one problem of `kind` that belongs to `split`."""
    while True:
        numbers = kind.draw(rng)
        if is_heldout(kind.name, numbers) == (split != "train"):
            break
    known = len(kind.templates) - 1
    template = known if split == "heldout_templates" else rng.randrange(known)
    question = kind.templates[template].format(
        name=rng.choice(NAMES), item=rng.choice(ITEMS), **dict(zip("abcd", numbers, strict=False))
    )
    return Problem(kind.name, template, numbers, question, tuple(kind.solve(*numbers)))


def make_problems(split: Split, size: int, seed: int = 0) -> list[Problem]:
    """Make `size` different problems, the kinds in turn.

    Args:
        split (`str`):
            `"train"`, `"heldout"` (new numbers, known wordings) or `"heldout_templates"` (new numbers, new wordings).
        size (`int`):
            Number of problems.
        seed (`int`, *optional*, defaults to `0`):
            The same split, size and seed always make the same problems.

    Returns:
        `list[Problem]`:
            Problems with pairwise different questions.

    Raises:
        ValueError: If `split` is unknown, or if there are fewer than `size` different problems.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, not {split!r}")
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    rng = random.Random(f"{seed}-{split}")
    problems: list[Problem] = []
    questions: set[str] = set()
    for index in range(size):
        for _ in range(1000):
            problem = make_problem(KINDS[index % len(KINDS)], split, rng)
            if problem.question not in questions:
                break
        else:
            raise ValueError(f"there are not {size} different problems in split {split!r}; ask for a smaller size")
        questions.add(problem.question)
        problems.append(problem)
    return problems


def load_arithmetic(split: Split, size: int, seed: int = 0, system_prompt: str | None = SYSTEM_PROMPT) -> "Dataset":
    """The problems of [`make_problems`] as a dataset for `GRPOTrainer`.

    Args:
        split (`str`):
            `"train"`, `"heldout"` or `"heldout_templates"`, see [`make_problems`].
        size (`int`):
            Number of rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        system_prompt (`str`, *optional*):
            System message before each question; `None` leaves it out.

    Returns:
        `datasets.Dataset`:
            Columns `prompt` (messages), `answer`, `solution` (the reference completion, tags included) and `kind`.

    Example:
    ```python
    >>> row = load_arithmetic("train", 1, seed=0)[0]
    >>> row["prompt"][-1]["content"], row["answer"]
    ('Pablo buys 14 cards on Monday and 16 cards on Tuesday. How many cards is that in all?', '30')
    ```
    """
    require("load_arithmetic", ("datasets",), "pip install datasets")
    from datasets import Dataset

    problems = make_problems(split, size, seed)
    return Dataset.from_dict(
        {
            "prompt": [to_prompt(problem.question, system_prompt) for problem in problems],
            "answer": [problem.answer for problem in problems],
            "solution": [format_solution(problem.reasoning, problem.answer) for problem in problems],
            "kind": [problem.kind for problem in problems],
        }
    )
