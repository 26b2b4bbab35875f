"""Normalizes the spelling of an answer: Unicode, and LaTeX spacing, size and style. Section 2 of docs/grading.md.

`spell` runs on answers of any length, so each step takes time linear in the length.
"""

# ruff: noqa: RUF001, because this module maps look-alike characters

from __future__ import annotations

import re
import unicodedata

from rlsys.math_grading import latex

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣʸᵏᵐᵗ", "0123456789+-()nixykmt", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑᵢⱼₖₘₙₚₓ", "0123456789+-()aeijkmnpx", strict=True))
_SIGNS = {
    **dict.fromkeys("−‒–—﹣", "-"),
    **dict.fromkeys("·⋅∙•", r" \cdot "),
    **dict.fromkeys("∅⌀", r" \emptyset "),
    **{"×": r" \times ", "÷": r" \div ", "√": r" \sqrt ", "∞": r" \infty ", "∪": r" \cup ", "∩": r" \cap "},
    **{"≤": r" \le ", "≥": r" \ge ", "≠": r" \ne ", "⩽": r" \le ", "⩾": r" \ge ", "∈": r" \in ", "≈": r" \approx "},
    **{
        "ℤ": r"\mathbb{Z}",
        "ℕ": r"\mathbb{N}",
        "ℚ": r"\mathbb{Q}",
        "ℂ": r"\mathbb{C}",
        "∠": r"\angle ",
        "△": r"\triangle ",
    },
    **{"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "′": "'", "⁄": "/", "∕": "/", "∣": "|"},
    **{"∛": r" \sqrt[3]", "∜": r" \sqrt[4]"},
    **{"±": r" \pm ", "∓": r" \mp ", "°": r"^\circ ", "⟨": r" \langle ", "⟩": r" \rangle ", "ℝ": r"\mathbb{R}"},
    **{"٫": ".", "٬": ",", "٪": "%", "،": ",", "；": ";", "、": ","},
}
_HIGH = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOW = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_ROOT_OF_NUMBER = re.compile(r"([√∛∜]) ?([0-9]+(?:\.[0-9]+)?)")

_SIZES = "tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge"
_DROPPED = (
    "left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|scriptscriptstyle|limits|nolimits|strut|mathstrut"
    f"|allowbreak|nobreak|nonumber|notag|noindent|centering|boldmath|unboldmath|{_SIZES}"
)
_TEXT = "text(?:bf|it|rm|sf|tt|sc|sl|up|md|normal)?|math(?:rm|sf|tt)|mbox|hbox|underline|emph|operatorname\\*?"
# Command name -> its replacement.
_RENAMED = {
    **dict.fromkeys(("sfrac", "nicefrac", "xfrac", "flatfrac"), r"\frac"),
    **dict.fromkeys(("thinspace", "medspace", "thickspace", "enspace", "space", "negthinspace"), " "),
    **{"lg": r"\log_{10}", "tg": r"\tan", "ctg": r"\cot", "arctg": r"\arctan", "arcctg": r"\arccot", "cosec": r"\csc"},
    **{"lparen": "(", "rparen": ")", "uppi": r"\pi", "leqq": r"\le", "geqq": r"\ge"},
    **{"dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom", "tbinom": r"\binom"},
    **{"leq": r"\le", "leqslant": r"\le", "geq": r"\ge", "geqslant": r"\ge", "neq": r"\ne", "lt": "<", "gt": ">"},
    **{"varnothing": r"\emptyset", "lbrace": r"\{", "rbrace": r"\}", "R": r"\mathbb{R}", "degree": r"^\circ"},
    **{"quad": " ", "qquad": " ", "lor": " or ", "vee": " or ", "colon": ":", "lvert": "|", "rvert": "|", "vert": "|"},
    **{"lbrack": "[", "rbrack": "]", "ldots": r"\dots", "cdots": r"\dots"},
}
_COMMAND = re.compile(
    rf"\\(?:(?:{_DROPPED})(?![A-Za-z])(?:(?<=left)\.|(?<=right)\.)?|({_TEXT})(?![A-Za-z])\s*|([A-Za-z]+)|(.))",
    re.DOTALL,
)
_SPACES = ",;:>! \n"

# Groups of three digits with one separator throughout. rlsys.math_grading.shapes handles plain commas, whose meaning
# depends on the brackets around them.
_GROUPS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?P<mark>\{,\}|\\,|,\\!\s?|~| )[0-9]{3}(?:(?P=mark)[0-9]{3})*(?![0-9/])")
_PLAIN = (
    (re.compile(r"\\text\{\s*\}"), " "),
    (re.compile(r"[ \t\r\n]+"), " "),
    (re.compile(r"(?:\\text)?\{ ?([,:]) ?\}"), r"\1"),
    (re.compile(r"\\not ?="), r"\\ne "),
    (re.compile(r"\\not ?\\in(?![A-Za-z])"), r"\\notin "),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\^ ?(?:\{ ?\\circ ?\}|\\circ) ?"), r"^\\circ "),
    (re.compile(r"\\text\{ ?,? ?(and|or) ?\}"), r" \1 "),
    (re.compile(r"\\frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}\}"), r"\\text{\1/\2}"),
)
# Function names, which may occur in \\text or without a backslash.
_FUNCTIONS = (
    *("arcsin", "arccos", "arctan", "arccot", "arcsec", "arccsc", "sinh", "cosh", "tanh", "coth"),
    *("sin", "cos", "tan", "cot", "csc", "log", "exp", "ln"),
)
_UNITS_TOO = ("sec", "min", "max", "gcd", "lcm", "det")
_OTHER_NAMES = {"tg": "tan", "ctg": "cot", "arctg": "arctan", "arcctg": "arccot", "cosec": "csc", "lg": "log_{10}"}
_WORD = re.compile(r"\\text\{ ?([A-Za-z]+) ?\}")
_UNIT_LETTERS = "mgshlLCFKNJWVA"
_BARE = re.compile(
    r"\\text\{[^{}]*\}|\\[A-Za-z]+"
    rf"|(?<![A-Za-z])(?:({'|'.join(_FUNCTIONS)})(?= ?[({{^_0-9\\]| [A-Za-z](?![A-Za-z]))"
    rf"|(exp|{'|'.join(_UNITS_TOO)})(?= ?\()|(sqrt)(?=[({{\[0-9])|(pi)(?![A-Za-z]))"
)
_TIGHT = re.compile(r" ?([^\w ]) ?")
_LISTED = re.compile(r"(?<=[0-9]), (?=[0-9])")
_MAX_LAYERS = 8  # of braces around an answer that are removed


def spell(text: str) -> str:
    """Return `text` in the normalized spelling that the other modules of this package expect."""
    if not text.isascii():
        text = _ascii(text)
    text = _GROUPS.sub(lambda match: match[0].replace(match["mark"], ""), text)
    text = _COMMAND.sub(_command, text).replace("$", "").replace("~", " ")
    text = _WORD.sub(_upright, latex.tidy(_BARE.sub(_bare, text)))
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    for _ in range(_MAX_LAYERS):
        text = text.strip(" *_`").rstrip(" .,;:")
        if not (text.startswith("{") and _closes_at_the_end(text)):
            break
        text = text[1:-1]
    return text


def key(text: str) -> str:
    """Return a comparison key of spelled text: spaces are kept only between words and between numbers.

    A space after a comma distinguishes a list from a number: 1, 234 is not 1,234.
    """
    text = _LISTED.sub(";", text)
    return _TIGHT.sub(r"\1", _TIGHT.sub(r"\1", text)).strip().removeprefix("+")


def _ascii(text: str) -> str:
    text = _ROOT_OF_NUMBER.sub(r"\1{\2}", text)
    text = _HIGH.sub(lambda match: "^{" + "".join(_SUPERSCRIPTS[c] for c in match[0]) + "}", text)
    text = _LOW.sub(lambda match: "_{" + "".join(_SUBSCRIPTS[c] for c in match[0]) + "}", text)
    text = "".join(_vulgar(c) for c in text)
    return "".join(_plain_character(c) for c in unicodedata.normalize("NFKC", text))


def _vulgar(character: str) -> str:
    parts = unicodedata.decomposition(character).split() if character > "\x7f" else []
    if parts[:1] != ["<fraction>"]:
        return _SIGNS.get(character, character)
    over, _, under = "".join(chr(int(part, 16)) for part in parts[1:]).partition("\u2044")
    return rf"\frac{{{over}}}{{{under}}}"


def _plain_character(character: str) -> str:
    if character <= "\x7f":
        return character
    if character in _SIGNS:
        return _SIGNS[character]
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Zs":
        return " "
    if "\u0370" <= character <= "\u03ff":
        return _greek(character)
    return character


def _greek(character: str) -> str:
    words = unicodedata.name(character, "").split()
    if words[:1] != ["GREEK"] or words[2:3] != ["LETTER"] or len(words) != 4:
        return character
    name = {"LAMDA": "lambda"}.get(words[3], words[3].lower())
    return f"\\{name.capitalize() if words[1] == 'CAPITAL' else name} "


def _command(match: re.Match[str]) -> str:
    text, name, sign = match.groups()
    if text:
        return r"\text "  # with a space, because its argument may be a letter without braces
    if name:
        return _RENAMED.get(name, match[0])
    if sign is None or sign == "!":
        return ""
    if sign in _SPACES:
        return " "
    if sign in "$()[]":
        return ""
    return "%" if sign == "%" else match[0]


def _bare(match: re.Match[str]) -> str:
    """Add the missing backslash to a function, sqrt or pi."""
    name = match[1] or match[2] or match[3] or match[4]
    if not name or (match[2] and _after_number(match)):  # a unit: 5 min (about)
        return match[0]
    return f"\\{name} "


def _after_number(match: re.Match[str]) -> bool:
    before = match.string[max(match.start() - 2, 0) : match.start()].rstrip()
    return before[-1:].isdigit() or before[-1:] == "}"


def _upright(match: re.Match[str]) -> str:
    """Take constants and functions out of \\text, and a single letter where it cannot be a unit."""
    name, start, end = match[1], match.start(), match.end()
    before, after = match.string[max(start - 1, 0) : start], match.string[end : end + 1]
    name = _OTHER_NAMES.get(name, name)
    if name in ("e", "i"):
        return f" {name} "
    if (
        name in _FUNCTIONS
        or (name in _UNITS_TOO and (after == "(" or match.string.startswith(r"\{", end)))
        or name == "log_{10}"
    ):
        return f"\\{name} "
    if len(name) > 1 or after in ("", " "):
        return match[0]
    return f" {name} " if name not in _UNIT_LETTERS or (after == "(" and before in ("", " ", "(", "=")) else match[0]


def _closes_at_the_end(text: str) -> bool:
    """Return whether the last character closes the brace that opens the text."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return token.end() == len(text)
    return False
