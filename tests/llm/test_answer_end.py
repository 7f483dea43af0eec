"""The token that ends an answer, against whole chats as transformers renders them."""

import copy

import pytest
import torch

from ephemera.llm.answer_end import end_of_answer
from ephemera.scoring import encode_examples
from ephemera.tasks.base import Example
from tiny_models import tiny_backbone

OTHER = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def other_template(smol):
    """A turn's end that is not the tokenizer's end token, as Gemma's."""
    made = copy.deepcopy(smol)
    made.add_special_tokens({"additional_special_tokens": ["<turn>", "<end_of_turn>"]})
    made.chat_template = OTHER
    return made


@pytest.mark.parametrize(("make", "token"), [(copy.deepcopy, "<|im_end|>"), (other_template, "<end_of_turn>")])
def test_an_answer_in_a_chat_ends_as_the_template_ends_it(smol, make, token):
    backbone = tiny_backbone()
    backbone.tokenizer, backbone.max_length = make(smol), 512
    backbone.vocabulary_VD = torch.empty(len(backbone.tokenizer), 0)  # nothing is run: ids only need their rows
    assert backbone.tokenizer.convert_ids_to_tokens(end_of_answer(backbone.tokenizer, chat=True)) == token
    rows = [Example("1", "Where is it?", "By the mill, <|im_end|> on the river.")]
    (with_end,), _ = encode_examples(backbone, rows, chat=True, max_tokens=512, end_token=True)
    (without,), _ = encode_examples(backbone, rows, chat=True, max_tokens=512)
    assert with_end.answer == [*without.answer, end_of_answer(backbone.tokenizer, chat=True)]
    turns = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "By the mill"}]
    (row,), _ = encode_examples(
        backbone, [Example("1", "Where is it?", "By the mill")], chat=True, max_tokens=512, end_token=True
    )
    whole = backbone.tokenizer.apply_chat_template(turns, return_dict=False)
    assert whole[: len(row.prompt + row.answer)] == row.prompt + row.answer
    (cut,), _ = encode_examples(backbone, rows, chat=True, max_tokens=512, max_answer_tokens=3, end_token=True)
    assert cut.answer == without.answer[:3], "an answer that is cut does not end there"


def test_a_plain_answer_ends_with_the_tokenizers_end_token(smol):
    made = copy.deepcopy(smol)
    assert end_of_answer(made, chat=False) == made.eos_token_id
    made.eos_token = None
    with pytest.raises(ValueError, match=r"no token that ends a text; leave end_token off"):
        end_of_answer(made, chat=False)


def test_a_template_that_takes_no_answers_is_refused(smol):
    made = copy.deepcopy(smol)
    made.chat_template = "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('questions only') }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match=r"refuses a question and its answer: questions only\. Leave end_token off"):
        end_of_answer(made, chat=True)
