import random
import string

import pytest
from rouge_score.rouge_scorer import RougeScorer

from ephemera.evaluation.shared.rouge import WordTokenizer, rouge_lsum

ENGLISH = [
    ("The mill burned\u2014again.", "\u201cThe mill\u201d burned!\nAgain?"),
    ("It doesn\u2019t cost $5.50 (or \u00a35).", "it doesn't cost 5.50 \u20ac\u2026"),
    ("A heart \u2764\ufe0f, a keycap 1\ufe0f\u20e3 and 10\u00b2 m\u00b2.", "a heart, 1 keycap and 10 m"),
    ("snake_case and 3\u00bd e-mails\u2122", "snake case\n\n3 emails"),
    ("Tom\tand\r\nTom\x0bagain", "tom AND jerry"),
]


def published(reference: str, text: str) -> float:
    return RougeScorer(["rougeLsum"]).score(reference, text)["rougeLsum"].fmeasure


@pytest.mark.parametrize(("reference", "text"), ENGLISH)
def test_english_scores_are_those_of_the_package(reference, text):
    assert rouge_lsum(reference, text) == published(reference, text)
    assert rouge_lsum(text, reference) == published(text, reference)


def test_any_ascii_text_has_the_packages_score_to_the_last_digit():
    draw = random.Random(0)
    for _ in range(300):
        reference, text = ("".join(draw.choices("ab c1\n" + string.printable, k=40)) for _ in range(2))
        assert rouge_lsum(reference, text) == (published(reference, text) if any(map(str.isalnum, reference)) else None)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "\u5927\u5c71",
            "\u0433\u043e\u0440\u043e\u0434",
            "\u0e20\u0e39\u0e40\u0e02\u0e32",
            "\u6771\u4eac\u30bf\u30ef\u30fc",
        ),
        *(
            "\ubc14\ub2e4",
            "\u0645\u062f\u064a\u0646\u0629",
            "\u05e2\u05d9\u05e8",
            "\u0939\u093f\u0902\u0926\u0940",
            "\u0664\u0665",
        ),
        *(
            "\u03c0\u03cc\u03bb\u03b7",
            "\u10e5\u10d0\u10da\u10d0\u10e5\u10d8",
            "\u1019\u103c\u102d\u102f\u1037",
            "\u00e9t\u00e9",
        ),
    ],
)
def test_an_answer_that_repeats_the_gold_scores_one_and_another_none(text):
    assert rouge_lsum(text, text) == 1
    assert rouge_lsum(f"{text}.", f"\u00ab{text.upper()}\u00bb") == 1
    assert rouge_lsum(text, "mill") == 0
    assert rouge_lsum("mill", text) == 0


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Caf\u00e9 na\u00efve", ["caf\u00e9", "na\u00efve"]),  # rouge_score: caf na ve
        ("Cafe\u0301", ["caf\u00e9"]),  # an accent of its own
        ("iPhone\u624b\u673a2\u53f0", ["iphone", "\u624b", "\u673a", "2", "\u53f0"]),
        (
            "\u0939\u093f\u0902\u0926\u0940 \u092d\u093e\u0937\u093e",
            ["\u0939\u093f\u0902\u0926\u0940", "\u092d\u093e\u0937\u093e"],
        ),
        (
            "\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48",
            ["\u0e17\u0e35\u0e48", "\u0e19\u0e35\u0e48"],
        ),  # marks stay with their letter
        ("\U0001f99c \u2764\ufe0f !", []),
    ],
)
def test_tokens(text, want):
    assert WordTokenizer().tokenize(text) == want


def test_a_part_of_a_chinese_answer_scores_its_share():
    # 2 of 4 letters found, nothing beside them: precision 1, recall 1/2
    assert rouge_lsum("\u98ce\u529b\u53d1\u7535", "\u98ce\u529b") == pytest.approx(2 / 3)


def test_a_gold_answer_without_words_has_no_score():
    assert rouge_lsum("\U0001f99c", "\U0001f99c") is None
    assert rouge_lsum("mill", "\U0001f99c") == 0
