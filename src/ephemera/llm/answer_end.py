"""The token that ends an answer."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

TURNS = ({"role": "user", "content": "Where?"}, {"role": "assistant", "content": "The mill"})


def end_of_answer(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> int:
    """The id that ends an answer: in a chat what the template puts behind it, else the tokenizer's end token.

    ValueError where there is none, and where the template takes no answers.
    """
    if chat and tokenizer.chat_template:
        answer = TURNS[-1]["content"]
        try:
            text = str(tokenizer.apply_chat_template(list(TURNS), tokenize=False))
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"this model's chat template refuses a question and its answer: {error}. Leave end_token off."
            ) from error
        after: Any = tokenizer(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
        found = [token for token in after if token in tokenizer.added_tokens_decoder]
        if found:
            return found[0]
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise ValueError("this model's tokenizer has no token that ends a text; leave end_token off.")
    return int(end)
