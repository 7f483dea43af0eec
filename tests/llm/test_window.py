"""A prompt longer than the model's window: its own text is cut, never BOS or the chat template's words."""

from __future__ import annotations

import pytest
from tokenizers import processors

from ephemera.model import AdaptiveLM
from tiny_models import tiny_backbone

LONG = " ".join(f"{n} rivers" for n in range(200))


def cut(lm: AdaptiveLM, room: int, text: str = LONG) -> str:
    """What the model reads, as text."""
    ids = lm.encode(text, reserve=lm.backbone.max_length - room)
    assert len(ids) == room
    return lm.backbone.tokenizer.decode(ids)


@pytest.mark.parametrize("room", [96, 90, 30])
def test_bos_and_template_stay(room):
    backbone = tiny_backbone()
    plain = cut(AdaptiveLM(backbone, truncate="left"), room)
    assert plain.startswith("<s>")
    assert LONG.endswith(plain.removeprefix("<s>"))
    chat = cut(AdaptiveLM(backbone, truncate="left", chat=True), room)
    head, tail = "<s><|user|>\n", "\n<|assistant|>\n"
    assert chat.startswith(head)
    assert chat.endswith(tail)
    own = chat.removeprefix(head).removesuffix(tail)
    assert own
    assert LONG.endswith(own)


def test_a_system_message_of_the_template_stays():
    backbone = tiny_backbone()
    backbone.tokenizer.chat_template = (
        "{{ bos_token }}The mill:\n{% for m in messages %}{{ m['content'] }}</s>\n{% endfor %}Answer:"
    )
    text = cut(AdaptiveLM(backbone, truncate="left", chat=True), 60)
    head, tail = "<s>The mill:\n", "</s>\nAnswer:"
    assert text.startswith(head)
    assert text.endswith(tail)
    assert LONG.endswith(text.removeprefix(head).removesuffix(tail))
    # Text that spells the template's words is text, and is cut like any other
    text = cut(AdaptiveLM(backbone, truncate="left", chat=True), 60, f"The mill:\n{LONG}")
    assert text.startswith(head)
    assert LONG.endswith(text.removeprefix(head).removesuffix(tail))


def test_a_token_that_ends_every_prompt_stays():
    backbone = tiny_backbone()
    backbone.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    text = cut(AdaptiveLM(backbone, truncate="left"), 40)
    assert text.startswith("<s>")
    assert text.endswith("</s>")
    assert LONG.endswith(text.removeprefix("<s>").removesuffix("</s>"))


def test_no_room_for_the_prompts_own_words():
    lm = AdaptiveLM(tiny_backbone(), truncate="left", chat=True)
    own = len(lm.encode("x")) - 1
    assert len(lm.encode(LONG, reserve=96 - own - 1)) == own + 1
    with pytest.raises(
        ValueError, match=rf"{own} tokens of every prompt are the chat template's own, and tiny-llama takes"
    ):
        lm.encode(LONG, reserve=96 - own)


def test_short_prompts_are_left_whole():
    backbone = tiny_backbone()
    for chat in (False, True):
        whole, cutting = (AdaptiveLM(backbone, chat=chat, truncate=side) for side in (None, "left"))
        assert cutting.encode("The mill") == whole.encode("The mill")
