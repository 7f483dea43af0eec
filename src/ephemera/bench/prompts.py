"""Prompts that the benchmark makes up: NQ-Open's template around short questions, XSum's around articles."""

from __future__ import annotations

import random

from ephemera.tasks import Example
from ephemera.tasks.nq_open import NQ_OPEN
from ephemera.tasks.xsum import XSUM

LENGTHS = ("short", "long")

# Mixed lengths on purpose: padding is part of the cost.
QUESTIONS = (
    ("who wrote the first history of the northern railway", "Edith Marlowe"),
    ("what is the capital of the oldest republic in the world", "San Marino"),
    ("when was the last lighthouse on the coast of wales turned off for good", "1998"),
    ("who sings the song about the train that never comes home again", "Johnny Cash"),
    ("where does the river tagus meet the sea", "Lisbon"),
    ("how many players are there on a water polo team including the goalkeeper", "seven"),
    ("what does a luthier make", "string instruments"),
    ("which planet in the solar system has the shortest day measured in hours", "Jupiter"),
    ("who was the captain of the ship that first reached the southern ice shelf", "James Clark Ross"),
    ("when did the city council vote to rebuild the old stone bridge", "1931"),
    ("what language do most people speak at home in the canton of ticino", "Italian"),
    ("who invented the safety pin", "Walter Hunt"),
    ("where was the treaty that ended the thirty years war finally signed", "Westphalia"),
    ("how long does it take for light from the sun to reach the earth", "eight minutes"),
    ("what is the name of the strait between spain and morocco", "Gibraltar"),
    ("who played the detective in the first season of the series about the harbour police", "Ruth Calder"),
)

PLACES = ("Aldmoor", "Port Seren", "Kestwick", "Braeholm", "Easter Vale", "Lowmarket", "Tarn Bridge", "Stonehaugh")
PEOPLE = ("Mary Ellison", "Tomas Reid", "Anjali Rao", "Owen Pritchard", "Grace Okafor", "Lukas Brandt")
BODIES = ("the council", "the harbour trust", "the water board", "the county court", "a group of residents")
SENTENCES = (
    "{body} in {place} has approved plans to rebuild the {number}-year-old bridge after a long campaign.",
    "{person}, who has lived in {place} since {year}, said the decision came as a complete surprise.",
    '"We have waited for this for {number} years, and nobody believed it would happen," {person} told reporters.',
    "The work is expected to cost about £{number}m and should be finished before the end of {year}.",
    "Engineers found cracks in {number} of the supports during an inspection in the spring of {year}.",
    "Traffic will be sent through {place} while the road is closed, which could add {number} minutes to a journey.",
    "Shop owners near the site fear that they will lose customers, and {body} has promised a small fund for them.",
    "A similar project in {place} was stopped in {year} when the contractor ran out of money.",
    "{person} of the local history society said the old stones would be numbered and stored until they are needed.",
    "Environmental groups had argued that the river bank is home to otters and to {number} kinds of birds.",
    "In a statement, {body} said every objection had been read and that safety had to come first.",
    "The first public meeting drew more than {number} people, some of whom had to stand outside in the rain.",
    "Police have asked drivers to avoid {place} on weekday mornings until new signs are in place.",
    "Records show that a ferry crossed here until {year}, when the last boatman, {person}'s grandfather, retired.",
)
SUMMARY = "A bridge in {place} that has stood for {number} years is to be rebuilt after a long campaign by residents."


def examples(length: str, batch: int) -> list[Example]:
    """`batch` examples, the same on every machine and in every run."""
    if length == "short":
        rows = [QUESTIONS[i % len(QUESTIONS)] for i in range(batch)]
        return [
            Example(f"short-{i}", NQ_OPEN.prompt({"question": question}), answer)
            for i, (question, answer) in enumerate(rows)
        ]
    return [
        Example(f"long-{i}", XSUM.prompt({"document": article}), summary)
        for i, (article, summary) in enumerate(map(_article, range(batch)))
    ]


def _article(i: int) -> tuple[str, str]:
    """About 260 to 350 words, some 400 to 500 tokens, and one sentence for a summary."""
    rng = random.Random(f"ephemera benchmark article {i}")
    words = 260 + 10 * (i * 3 % 8)
    paragraphs: list[str] = []
    while sum(len(p.split()) for p in paragraphs) < words:
        paragraphs.append(" ".join(_filled(s, rng) for s in rng.sample(SENTENCES, 2)))
    return "\n".join(paragraphs), _filled(SUMMARY, rng)


def _filled(sentence: str, rng: random.Random) -> str:
    filled = sentence.format(
        body=rng.choice(BODIES),
        place=rng.choice(PLACES),
        person=rng.choice(PEOPLE),
        number=rng.randint(12, 480),
        year=rng.randint(1901, 2024),
    )
    return filled[0].upper() + filled[1:]
