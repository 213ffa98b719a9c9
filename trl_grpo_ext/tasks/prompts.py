"""What every task shares: the system prompt, and the shape of a prompt and of a reference completion."""

# The line breaks are part of the format: `strict_format_reward_func` and `xmlcount_reward_func` look for them.
SYSTEM_PROMPT = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""


def to_prompt(question: str, system_prompt: str | None = SYSTEM_PROMPT) -> list[dict[str, str]]:
    """A question as the messages of a conversational prompt."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": question}]


def format_solution(reasoning: str, answer: str) -> str:
    """A completion in exactly the format that `SYSTEM_PROMPT` asks for."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"
