import pytest

from trl_grpo_ext.rewards import completion_to_text


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        (None, ""),
        ([], ""),
        ([{"role": "assistant", "content": "one"}], "one"),
        ([{"content": "no role"}], "no role"),
        ({"role": "assistant", "content": "a message"}, "a message"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant"}], ""),
        ([{"role": "assistant", "content": []}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": [{"type": "image", "image": "..."}, {"type": "text", "text": "b"}]}], "b"),
        ([{"role": "assistant", "content": ["a", {"text": "b"}, None, 3]}], "ab"),
        # several turns: the last assistant message counts, also before a tool's answer
        (
            [
                {"role": "assistant", "content": "first"},
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": "last"},
            ],
            "last",
        ),
        ([{"role": "assistant", "content": "said"}, {"role": "tool", "content": "result"}], "said"),
        ([{"role": "user", "content": "question"}], ""),
        (({"role": "assistant", "content": "tuple"},), "tuple"),
        (7, ""),
        ([3, None], ""),
        (b"bytes", ""),
    ],
)
def test_completion_to_text(completion, text):
    assert completion_to_text(completion) == text


def test_only_parts_of_text_are_the_text():
    """What a model thought, or a tool said, is not what it answered, though it stands under `text` as well."""
    parts = [{"type": "reasoning", "text": "hidden"}, {"type": "text", "text": "shown"}, {"text": ", without a type"}]
    assert completion_to_text([{"role": "assistant", "content": parts}]) == "shown, without a type"
