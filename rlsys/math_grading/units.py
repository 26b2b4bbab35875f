"""Parses quantities: value, unit, percent sign and number words (million). Sections 3, 5 and 6 of docs/grading.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rlsys.math_grading.values import Value, read_value, same_value

# Synonyms, short name first. A unit of one letter is recognized only in \text{} or after a space.
_SAME = (
    "cm centimeter centimetre",
    "mm millimeter millimetre",
    "m meter metre",
    "km kilometer kilometre",
    "in inch inches",
    "ft foot feet",
    "yd yard",
    "mi mile",
    "mg milligram",
    "g gram",
    "kg kilogram",
    "oz ounce",
    "lb pound lbs",
    "ml milliliter millilitre",
    "l liter litre",
    "s sec second",
    "min minute",
    "h hr hour",
    "degree deg",
    "rad radian",
    "dollar usd buck",
    "cent ¢",
    "euro € eur",
    "£ gbp",
    "yen ¥",
    "rupee ₹",
)
_NAMES = {word: names.split()[0] for names in _SAME for word in names.split()}
_LETTERS = "mgshlL"
_FUNCTIONS = frozenset(
    (
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "ln",
        "lim",
        "max",
        "min",
        "gcd",
        "lcm",
        "det",
        "mod",
        "arg",
    )
)
_SIZES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_PERCENT = frozenset(("percent", "per cent", "pct"))

# Atomic groups and possessive quantifiers: with backtracking, words could match in exponentially many ways.
_WORD = r"(?<![A-Za-z.¢€£¥₹\\])[A-Za-z.¢€£¥₹]+"
_PIECE = rf"(?>\\text\{{[^{{}}]*\}}|\^\\circ(?: ?[CFK](?![A-Za-z]))?|{_WORD})(?:\^(?:\{{[23]\}}|[23]))?"
_QUANTITY = re.compile(
    rf"(?P<core>.*?(?:[0-9)}}.]|\\[A-Za-z]+))(?P<space> ?)(?P<unit>(?>{_PIECE}(?:(?: ?/ ?| ?\\cdot ?| )?{_PIECE})*+))",
    re.DOTALL,
)
_LETTERED = re.compile(
    r"(?P<core>.*[A-Za-z]) ?(?P<unit>\\text\{(?P<words>[^{}]*)\}(?:\^(?:[23]|\{[23]\}))?)", re.DOTALL
)
_BARE = re.compile(r"\\text\{[^{}]*\}|\^\\circ(?: ?[CFK](?![A-Za-z]))?|\^(?:\{[23]\}|[23])|(?P<word>[A-Za-z.¢€£¥₹]+)")
_CURRENCY = re.compile(r"([+-]?) ?([€£¥₹]) ?")


@dataclass(frozen=True, slots=True)
class Quantity:
    """Parsed quantity."""

    core: str  # the text without unit and percent sign
    value: Value | None  # None if `core` is not a value
    unit: str  # "" if there is none
    percent: bool


def read_quantity(text: str) -> Quantity:
    """Parse spelled text as a quantity."""
    currency = _CURRENCY.match(text)
    unit = ""
    if currency:
        text, unit = currency[1] + text[currency.end() :], currency[2]
    core, words, size = text, "", 1
    match = _QUANTITY.fullmatch(text)
    if match and _is_unit(match["unit"], match["space"] != ""):
        core, words = match["core"].rstrip(), match["unit"]
    elif (match := _LETTERED.fullmatch(text)) and _is_known_unit(match["words"]):  # 2x \text{ cm}
        core, words = match["core"], match["unit"]
    names = _normal(words)
    while names and names[0] in _SIZES:
        size *= _SIZES[names.pop(0)]
    name = " ".join(names)
    percent = name in _PERCENT or core.endswith("%")
    core = core.removesuffix("%").rstrip()
    value = read_value(_bare(core))
    if size != 1:
        value = None if value is None else value.times(Fraction(size))
    unit = _NAMES.get(unit, unit) if unit else ("" if name in _PERCENT else name)
    return Quantity(core, value, unit, percent)


def same_units(a: Quantity, b: Quantity) -> bool:
    """Return whether the units are equal; a missing unit equals every unit."""
    return not (a.unit and b.unit) or a.unit == b.unit


def same_quantity(a: Quantity, b: Quantity) -> bool:
    """Compare two quantities with values. A percent sign on only one side may count as 1/100 or be ignored."""
    assert a.value is not None and b.value is not None
    if not same_units(a, b):
        return False
    if a.percent == b.percent:
        return same_value(a.value, b.value)
    hundredth = Fraction(1, 100)
    one, other = (a.value, b.value) if a.percent else (b.value, a.value)
    return same_value(one, other) or same_value(one.times(hundredth), other)


def _bare(core: str) -> str:
    """Remove \\text or parentheses around a value."""
    match = re.fullmatch(r"\\text\{([^{}]*)\}|\(([^()]*)\)", core)
    return core if match is None else (match[1] or match[2] or "").strip()


def _is_unit(text: str, spaced: bool) -> bool:
    """Return whether a text is a unit: \\text{...} and degrees always, other text if it is an abbreviation or a word.

    A known abbreviation of one letter, and an unknown word, must follow a space or a slash.
    """
    for index, match in enumerate(_BARE.finditer(text)):
        word = match["word"]
        if word is None:
            continue
        apart = spaced if index == 0 else text[match.start() - 1] in " /"
        name = _short(word.strip(".").lower())
        letters = len(word.strip("."))  # of the text, not of the short name: "hours" has the short name h
        known = name in _NAMES and (letters > 1 or word in _LETTERS)
        if known and (apart or letters > 1) and name not in _FUNCTIONS - set(_NAMES):
            continue
        if not (apart and len(name) >= 3 and re.search("[aeiouy]|mph", name)) or name in _FUNCTIONS:
            return False
    return True


def _is_known_unit(words: str) -> bool:
    """Return whether every word is a known unit."""
    names = [name.partition("^")[0] for name in _normal(words)]
    return bool(names) and all(name in _NAMES or name in ("unit", "/") for name in names)


def _normal(text: str) -> list[str]:
    """Normalize a unit: words in the singular and by short name, and one notation for powers and divisions."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    text = text.replace(r"\cdot", " ").replace(r"^\circ", " degree ").lower().replace("mph", " mi/h ")
    text = re.sub(r"\^\{?([23])\}?", r"^\1 ", text).replace(" ^", "^")
    text = re.sub(r"\b(per) (?!cent)|/", " / ", text)
    words: list[str] = []
    power = ""
    for word in text.replace(".", " ").split():
        if word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word.startswith("sq") else "^3"
            continue
        base, _, exponent = word.partition("^")
        words.append(_short(base) + (f"^{exponent}" if exponent else power))
        power = ""
    return words


def _short(word: str) -> str:
    if word in _NAMES or word in _SIZES:
        return _NAMES.get(word, word)
    is_plural = word.endswith("s") and (len(word) > 3 or (len(word) == 3 and word[:-1] in _NAMES))
    single = word[:-1] if is_plural else word
    if single in _SIZES:
        return single
    return _NAMES.get(single, single)
