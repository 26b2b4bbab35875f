"""One spelling for what is written in many ways: Unicode, LaTeX's space, size and style. Section 2 of docs/grading.md.

`spell` runs on answers of any length, so each step is linear in the text.
"""

# ruff: noqa: RUF001, because look-alikes are what this is about

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SIGNS = {
    **dict.fromkeys("−‒–—﹣", "-"),
    **dict.fromkeys("·⋅∙•", r" \cdot "),
    **dict.fromkeys("∅⌀", r" \emptyset "),
    **{"×": r" \times ", "÷": r" \div ", "√": r" \sqrt ", "∞": r" \infty ", "∪": r" \cup ", "∩": r" \cap "},
    **{"≤": r" \le ", "≥": r" \ge ", "≠": r" \ne ", "⩽": r" \le ", "⩾": r" \ge ", "∈": r" \in ", "≈": r" \approx "},
    **{"±": r" \pm ", "∓": r" \mp ", "°": r"^\circ ", "⟨": r" \langle ", "⟩": r" \rangle ", "ℝ": r"\mathbb{R}"},
    **{"٫": ".", "٬": ",", "٪": "%", "،": ",", "；": ";", "、": ","},
}
_FEW = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")

_DROPPED = "left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits"
_TEXT = "text(?:bf|it|rm|sf|tt|sc|up|md|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|boldsymbol|bm|underline|emph"
# Names of commands and what stands for them here.
_RENAMED = {
    **{"dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom", "tbinom": r"\binom"},
    **{"leq": r"\le", "leqslant": r"\le", "geq": r"\ge", "geqslant": r"\ge", "neq": r"\ne", "lt": "<", "gt": ">"},
    **{"varnothing": r"\emptyset", "lbrace": r"\{", "rbrace": r"\}", "R": r"\mathbb{R}", "degree": r"^\circ"},
    **{"quad": " ", "qquad": " ", "lor": " or ", "vee": " or ", "colon": ":", "lvert": "|", "rvert": "|", "vert": "|"},
    **{"lbrack": "[", "rbrack": "]", "ldots": r"\dots", "cdots": r"\dots"},
}
_COMMAND = re.compile(
    rf"\\(?:(?:{_DROPPED})(?![A-Za-z])(?:(?<=left)\.|(?<=right)\.)?|({_TEXT})\s*(?=\{{)|([A-Za-z]+)|(.))", re.DOTALL
)
_SPACES = ",;:>! \n"

# All groups of three behind one separator. Bare commas are read with the brackets round them, by rlsys.rewards.shapes.
_GROUPS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?P<mark>\{,\}|\\,|,\\!\s?|~| )[0-9]{3}(?:(?P=mark)[0-9]{3})*(?![0-9/])")
_PLAIN = (
    (re.compile(r"[ \t\r\n]+"), " "),
    (re.compile(r"(?:\\text)?\{ ?([,:]) ?\}"), r"\1"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\^ ?(?:\{ ?\\circ ?\}|\\circ) ?"), r"^\\circ "),
    (re.compile(r"\\frac ?([0-9A-Za-z]) ?(?=[0-9A-Za-z{\\])"), r"\\frac{\1}"),
    (re.compile(r"(\\frac ?\{[^{}]*\}) ?([0-9A-Za-z])"), r"\1{\2}"),
    (re.compile(r"\\(frac|sqrt|binom) ?(?=[{\[])"), r"\\\1"),
    (re.compile(r"\\sqrt ?([0-9A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"(\\sqrt\[[0-9]+\]) ?([0-9A-Za-z])"), r"\1{\2}"),
    (re.compile(r"\\text\{ ?,? ?(and|or) ?\}"), r" \1 "),
    (re.compile(r"\\frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}\}"), r"\\text{\1/\2}"),
)
_TIGHT = re.compile(r" ?([^\w ]) ?")
_LISTED = re.compile(r"(?<=[0-9]), (?=[0-9])")
_MAX_LAYERS = 8  # of braces round an answer that are taken off


def spell(text: str) -> str:
    """`text` in the one spelling that the other modules read."""
    if not text.isascii():
        text = _ascii(text)
    text = _GROUPS.sub(lambda match: match[0].replace(match["mark"], ""), text)
    text = _COMMAND.sub(_command, text).replace("$", "").replace("~", " ")
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    for _ in range(_MAX_LAYERS):
        text = text.strip(" *_`").rstrip(" .,;:")
        if not (text.startswith("{") and _closes_at_the_end(text)):
            break
        text = text[1:-1]
    return text


def key(text: str) -> str:
    """What two equal texts have in common: spaces are left between words and between numbers only.

    A space after a comma tells a list from a number: 1, 234 is not 1,234.
    """
    text = _LISTED.sub(";", text)
    return _TIGHT.sub(r"\1", _TIGHT.sub(r"\1", text)).strip().removeprefix("+")


def _ascii(text: str) -> str:
    text = _FEW.sub(lambda match: "^{" + "".join(_SUPERSCRIPTS[c] for c in match[0]) + "}", text)
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
        return r"\text"
    if name:
        return _RENAMED.get(name, match[0])
    if sign is None or sign == "!":
        return ""
    if sign in _SPACES:
        return " "
    if sign in "$()[]":
        return ""
    return "%" if sign == "%" else match[0]


def _closes_at_the_end(text: str) -> bool:
    """Whether the brace that opens the text is closed by its last character."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return token.end() == len(text)
    return False
