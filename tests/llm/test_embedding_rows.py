"""A tokenizer with more tokens than the embedding has rows: one line that names the token, everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ephemera.llm.load import load_backbone
from ephemera.llm.tokenize import encode_prompt
from ephemera.model import AdaptiveLM
from ephemera.rates import FixedRate
from ephemera.scoring import encode_examples
from ephemera.serving.engine.methods import build
from ephemera.serving.http.errors import ApiError
from ephemera.serving.http.requests import Limits, Reader
from ephemera.serving.http.schema import Message
from ephemera.tasks import Example
from reference import close
from tiny_models import VOCABULARY, tiny_tokenizer


@pytest.fixture
def folder(llama_folder, tmp_path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def more_tokens(folder: Path) -> None:
    """A tokenizer with two tokens more than the embedding has rows, as after `add_tokens` without resizing."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["xyzzy"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


def test_a_token_without_a_row_is_named(folder):
    more_tokens(folder)
    lm = AdaptiveLM.from_pretrained(str(folder), rate=0.05, device="cpu")
    words = rf"token 'xyzzy' has id {VOCABULARY}, and the embedding of .* has {VOCABULARY} rows"
    for call in (
        lambda: lm.adapt("say xyzzy"),
        lambda: lm.generate(["The mill", "say xyzzy"]),
        lambda: lm.answer_nll("The mill", "xyzzy"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert lm.adapt("The mill").prompt_nll_BK.isfinite().all()


def test_a_token_without_a_row_in_evaluation_and_on_a_server(folder):
    more_tokens(folder)
    backbone = load_backbone(str(folder), device="cpu")
    for prompt, answer in (("say xyzzy", "no"), ("say no", "xyzzy")):
        with pytest.raises(ValueError, match="token 'xyzzy' has id"):
            encode_examples(backbone, [Example("1", prompt, answer)], chat=False, max_tokens=90)
    reader = Reader(backbone, build(backbone, "zero", [FixedRate(0.1)]), limits=Limits())
    for call in (lambda: reader.plain("say xyzzy"), lambda: reader.chat([Message(role="user", content="say xyzzy")])):
        with pytest.raises(ApiError, match="token 'xyzzy' has id") as error:
            call()
        assert error.value.status_code == 422


def test_padding_needs_a_row_too(folder):
    """Prompts of two lengths, in passes that compute padding."""
    plain = load_backbone(str(folder), device="cpu", attn_implementation="eager")
    more_tokens(folder)
    padded = load_backbone(str(folder), device="cpu", attn_implementation="eager")
    assert padded.tokenizer.pad_token_id > VOCABULARY
    prompts = ["The mill", "The river runs past the old mill"]
    assert [encode_prompt(padded.tokenizer, p) for p in prompts] == [encode_prompt(plain.tokenizer, p) for p in prompts]
    have, want = (AdaptiveLM(b, rate=0.05).adapt(prompts, steps=1) for b in (padded, plain))
    close(have.prompt_nll_BK, want.prompt_nll_BK, 1e-6)
