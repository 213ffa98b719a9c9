"""What every task shares: the system prompt, and the shape of a prompt and of a reference completion."""

# The line breaks are part of the format: `strict_format_reward_func` and `xmlcount_reward_func` look for them.
SYSTEM_PROMPT = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""


def system_prompt_named(name: str | None) -> str | None:
    """The system message that an option asks for: `SYSTEM_PROMPT` if it is left out, no message if it is `none`."""
    return {None: SYSTEM_PROMPT, "none": None}.get(name, name)


def to_prompt(
    question: str | list[dict[str, str]], system_prompt: str | None = SYSTEM_PROMPT, with_example: bool = False
) -> list[dict[str, str]]:
    """A question as the messages of a conversational prompt, after one that is answered as it should be if asked for.

    A small model that never writes the tags by itself is never rewarded and never learns; the example gets it started.
    A question that is messages already keeps them; with a system message of its own it is not given another one.
    """
    asked = [{"role": "user", "content": question}] if isinstance(question, str) else question
    has_own = asked[0]["role"] == "system"
    messages = asked[:1] if has_own else []
    if system_prompt is not None and not has_own:
        messages = [{"role": "system", "content": system_prompt}]
    if with_example:
        messages += [
            {"role": "user", "content": EXAMPLE_QUESTION},
            {"role": "assistant", "content": EXAMPLE_SOLUTION},
        ]
    return [*messages, *asked[has_own:]]


def format_solution(reasoning: str, answer: str) -> str:
    """A completion in exactly the format that `SYSTEM_PROMPT` asks for."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


EXAMPLE_QUESTION = (
    "A baker fills 6 trays with 15 rolls each. 20 of the rolls are sold before noon and 35 after it. "
    "How many rolls are left?"
)
EXAMPLE_SOLUTION = format_solution(
    "The baker makes 6 * 15 = 90 rolls.\n20 + 35 = 55 of them are sold.\n90 - 55 = 35 rolls are left.", "35"
)
