"""Numbers as people write them in answers: LaTeX, currencies, separators, fractions, powers, units.

A number is read rightly or not at all: `1{,}000` is 1000; `2 hours 30 minutes`, `3:30` and `\\sqrt{2}` have no value here.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator

CURRENCY = "$\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd\u0e3f\u20ab\u20aa\u20b4\u20a6\u20b1\u00a2"
CODES = "USD|EUR|GBP|INR|CAD|AUD|JPY|CNY|CHF"
UNREADABLE = "\ufffc"  # stands for what has a value that is not read, e.g. a root
MINUS = "-\u2212\u2013"
MAGNITUDES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
LETTERED = {"k": 1e3, "K": 1e3, "m": 1e6, "M": 1e6, "B": 1e9, "bn": 1e9}  # after a currency only: 5m is a length
SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
TYPOGRAPHY = str.maketrans({"\u2044": "/", "\u2215": "/", "\u066c": ",", "\u066b": ".", "\u2019": "'", "\u2032": "'"})

_GROUP = r"(?:[^{}]|\{[^{}]*\})*"
_FRAC = r"\\[dtc]?frac\s*"
# What LaTeX writes, as plain text; in this order.
_LATEX = [
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}", r"\1"),
    (r"\{,\}", ","),
    (r"\\!", ""),
    (r"(?<=\d)\\[,;: ](?=\d)", "\u202f"),
    (rf"(?<=\d)\s*(?={_FRAC})", " "),
    (rf"{_FRAC}\{{\s*(\d+(?:\.\d+)?)\s*\}}\s*\{{\s*(\d+(?:\.\d+)?)\s*\}}", r"\1/\2"),
    (rf"{_FRAC}(\d)\s*(\d)", r"\1/\2"),
    (rf"{_FRAC}\{{{_GROUP}\}}\s*\{{{_GROUP}\}}|{_FRAC}", UNREADABLE),
    (rf"(?:\\sqrt\s*(?:\[[^\]]*\])?\s*(?:\{{{_GROUP}\}}|\d)|\u221a\s*[\d.]*)", UNREADABLE),
    (r"\\pi(?![A-Za-z])|\u03c0", UNREADABLE),
    (r"\^\s*\{?\s*\\circ\s*\}?", "\u00b0"),
    (r"\\(?:times|cdot)(?![A-Za-z])", "\u00d7"),
    (r"\\([$%])", r"\1"),
    (r"\\fbox\b", r"\\boxed"),
    (r"\\(?!boxed\b)(?:[A-Za-z]+\*?|[()\[\],;: ])", " "),
    # The power of a unit is no number; that of a bracket is no readable one.
    (rf"(?<=[A-Za-z])\s?\^\s*\{{?\s*[{MINUS}]?\d+\s*\}}?", ""),
    (rf"(?<=[)\]}}])\s?\^\s*\{{?\s*[{MINUS}]?\d+\s*\}}?", UNREADABLE),
]
LATEX = [(re.compile(pattern), instead) for pattern, instead in _LATEX]
VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e\u2189])")
SUPERSCRIPT = re.compile("(\\d?)([\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+)")
# `loose` may be one number or two, `version` is none.
NUMERAL = rf"""
    (?P<english>\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d)(?:\.\d+)?)
    |(?P<parted>\d{{1,3}}(?:['_\u00a0\u202f\u2009]\d{{3}})+(?!\d)(?:[.,]\d+)?
        |\d{{1,3}}(?:[ ~]\d{{3}})*[ ~]000(?!\d)(?:\.\d+)?)
    |(?P<loose>\d{{1,3}}(?:[ ]\d{{3}})+(?!\d))
    |(?P<dotted>\d{{1,3}}(?:\.\d{{3}}){{2,}}(?:,\d+)?(?!\.?\d)|\d{{1,3}}\.\d{{3}},\d{{1,2}}(?!\d))
    |(?P<version>\d+(?:\.\d+){{2,}})
    |(?P<comma>(?<=[{CURRENCY}])\d+,\d{{1,2}}(?![\d,])|\d+,\d{{1,2}}(?=\s?[{CURRENCY}%]))
    |(?P<simple>\d+(?:\.\d+)?(?:[eE][+-]?\d+(?!\w))?)
"""
# The sign of 10-5 is no minus, and neither is that of 5-10. A digit of H2O or v1.5 is no number.
NUMBER = re.compile(
    rf"""(?P<sign>(?:(?<!\w)|(?<=[\u3040-\u30ff\u3400-\u9fff]))[{MINUS}])?
    (?P<currency>[{CURRENCY}]\s?)?
    (?:(?:(?<![A-Za-z])|(?<=\dx)|(?<=Rs|RM)|(?<={CODES}))(?<!\d)(?<!\d\.)(?:{NUMERAL})|(?P<point>(?<![\w.])\.\d+))
    |(?P<none>{UNREADABLE})""",
    re.VERBOSE,
)
UNITS = (
    r"years?|yrs?|months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s",
    r"miles?|yards?|yds?|feet|foot|ft|inch(?:es)?|in",
    r"kilomet(?:er|re)s?|km|met(?:er|re)s?|m|centimet(?:er|re)s?|cm|millimet(?:er|re)s?|mm",
    r"pounds?|lbs?|ounces?|oz",
    r"kilograms?|kgs?|grams?|g|milligrams?|mg",
    r"gallons?|quarts?|pints?|cups?",
    r"lit(?:er|re)s?|l|millilit(?:er|re)s?|ml",
    r"dollars?|bucks?|euros?|pounds?|cents?|pence|pennies",
    "|".join(f"{word}s?" for word in MAGNITUDES),
)
_AND = r"(?:\s*,?\s*(?:and|&)\s+|\s*,\s*|\s*)"
RUNS = [
    re.compile(
        rf"[\s-]{{0,3}}(?P<first>{unit})(?![A-Za-z])\.?(?:{_AND}[{CURRENCY}]?\d+(?:\.\d+)?[\s-]{{0,3}}(?P<then>{unit})(?![A-Za-z]))+",
        re.IGNORECASE,
    )
    for unit in UNITS
]
# What may follow a numeral and belongs to it.
TAIL = re.compile(
    rf"""(?P<unreadable>\s?{UNREADABLE}|(?:\s?/\s?\d+){{2,}}|(?::\d+)+|-\d+/\d+|'\d{{1,2}}(?!\d)
        |\s+and\s+\d+\s?(?:cents?|pence|\u00a2))
    |\s?/\s?(?P<under>\d+(?:,\d{{3}})*(?:\.\d+)?)(?!\d)
    |\s+(?:and\s+)?(?P<upper>\d+)/(?P<lower>\d+)(?![\d/])
    |\s*[\u00d7x*]\s*10\s*\^\s*\{{?\s*(?P<ten>[{MINUS}]?\d{{1,3}})(?!\d)\s*\}}?
    |\s*\^\s*[{{(]?\s*(?P<power>[{MINUS}]?\d{{1,3}})(?!\d)\s*[)}}]?
    |[\s-]?(?P<magnitude>{"|".join(MAGNITUDES)})s?(?![A-Za-z])
    |(?P<lettered>bn|[kKmMB])(?![A-Za-z0-9])""",
    re.VERBOSE | re.IGNORECASE,
)
# Where a text says which number is its answer: GSM8K's own mark, a LaTeX box, or words. Markup, units of money, and the
# terms of a sum ("the answer is 2 + 3 = **$5**") or a letter ("x = 5") may stand between.
SAID = re.compile(
    rf"(?:\#\#\#\#|answer\ is:?|\\boxed\s*\{{)"
    rf"(?:(?:[\d ,%+*/x\u00d7\u00f7^(){{}}{CURRENCY}-]|\.\d)+=)?"
    rf"[\s*_{CURRENCY}\\(\[{{]*(?:\\?boxed\s*\{{)?[\s*_{CURRENCY}(\[{{]*(?:[A-Za-z]\s*=[\s{CURRENCY}]*)?"
    rf"(?=[{MINUS}]?[{CURRENCY}]?\s?(?:\.?\d|{UNREADABLE}))",
    re.IGNORECASE,
)


def number_in(text: str) -> float | None:
    """The first number after "the answer is", "####" or a LaTeX box, else the last of all; None if it is not readable."""
    return next(iter(readings_in(text)), None)


def readings_in(text: str) -> tuple[float, ...]:
    """The number of `number_in`; of "26 billion" also 26, which is right where a question asks for billions."""
    text = _plain(text)
    said = SAID.search(text)
    found = list(_numbers(text, said.end() if said else 0))
    return found[0 if said else -1][1] if found else ()


def number_of(text: str) -> float | None:
    """The value of a text that is one number and nothing else."""
    text = _plain(text).strip()
    found = list(_numbers(text, 0))
    return found[0][1][0] if len(found) == 1 and found[0][0] == text and found[0][1] else None


def _plain(text: str) -> str:
    """The text without LaTeX, with 1/2 for a fraction sign and ^2 for a raised digit."""
    text = text.translate(TYPOGRAPHY)
    for pattern, instead in LATEX:
        text = pattern.sub(instead, text)
    text = SUPERSCRIPT.sub(lambda m: f"{m[1]}^{m[2].translate(SUPERSCRIPTS)}" if m[1] else "", text)
    return VULGAR.sub(
        lambda m: f"{m[1] and m[1] + ' '}{unicodedata.normalize('NFKC', m[2])}".replace("\u2044", "/"), text
    )


def _numbers(text: str, start: int) -> Iterator[tuple[str, tuple[float, ...]]]:
    """(as written, its readings) of each number, from a place in the text on; one that is not readable has none."""
    while found := NUMBER.search(text, start):
        values, start = _values(text, found)
        yield text[found.start() : start], values


def _values(text: str, found: re.Match[str]) -> tuple[tuple[float, ...], int]:
    """The readings of a numeral with all that belongs to it, and where that ends."""
    value, end = _numeral(found), found.end()
    counted = value  # without "billion"
    money = found["currency"] is not None or text[: found.start()].rstrip()[-1:] in tuple(CURRENCY)
    while True:
        run = _mixed_units(text, end)
        if run is not None:
            value, end = None, run.end()  # 2 hours 30 minutes: a number of what?
            continue
        tail = TAIL.match(text, end)
        if tail is None or (tail["lettered"] and not money):
            break
        if tail["upper"] and (value is None or value % 1 or int(tail["upper"]) >= int(tail["lower"])):
            break
        value, end = _with(value, tail), tail.end()
        counted = counted if tail["magnitude"] else value
    sign = -1 if found["sign"] else 1
    if value is None or counted is None or not math.isfinite(value):
        return (), end
    return tuple(dict.fromkeys((sign * value, sign * counted))), end


def _mixed_units(text: str, start: int) -> re.Match[str] | None:
    runs = (pattern.match(text, start) for pattern in RUNS)
    return next((run for run in runs if run and not _alike(run["first"], run["then"])), None)


def _numeral(found: re.Match[str]) -> float | None:
    written = found[found.lastgroup or 0]
    dollars = "$" in (found["currency"] or "") or found.string[: found.start(found.lastgroup or 0)][-1:] == "$"
    if found["none"] or found["loose"] or found["version"]:
        return None
    if found["dotted"]:
        return float(written.replace(".", "").replace(",", "."))
    if found["comma"]:  # 5,50 euros; in dollars, and before a per cent sign, it may be two numbers
        return None if dollars or found.string[found.end() :].lstrip()[:1] in ("%", "$") else _decimal(written)
    if found["parted"]:
        return _decimal(re.sub("['_\u00a0\u202f\u2009 ~]", "", written))
    if found["simple"] and found["currency"] and not dollars and re.fullmatch(r"\d{1,3}\.\d{3}", written):
        return None  # 1.000 euros are a thousand in some places
    return float(written.replace(",", ""))


def _decimal(written: str) -> float:
    return float(written.replace(",", "."))


def _with(value: float | None, tail: re.Match[str]) -> float | None:
    """The value of a numeral before such a tail."""
    if value is None or tail["unreadable"]:
        return None
    try:
        if tail["under"]:
            value /= float(tail["under"].replace(",", ""))
        elif tail["upper"]:
            value += int(tail["upper"]) / int(tail["lower"])
        elif tail["ten"]:
            value *= 10.0 ** _whole(tail["ten"])
        elif tail["power"]:
            value **= _whole(tail["power"])
        elif tail["magnitude"]:
            value *= MAGNITUDES[tail["magnitude"].lower()]
        else:
            value *= LETTERED.get(tail["lettered"], math.nan)
    except (ZeroDivisionError, OverflowError):
        return None
    return value


def _whole(written: str) -> int:
    return int(re.sub(f"[{MINUS}]", "-", written))


def _alike(first: str, then: str) -> bool:
    """One unit, or its plural: two numbers of one unit are no mixed units."""
    return first.lower().rstrip("s") == then.lower().rstrip("s")
