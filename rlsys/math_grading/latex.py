"""Normalizes LaTeX: puts arguments of commands in braces and removes style commands. Section 2 of docs/grading.md.

    \\frac\\pi2         ->  \\frac{\\pi}{2}
    x^\\frac12         ->  x^{\\frac{1}{2}}
    {\\rm cm}          ->  \\text{cm}
    {n \\over 2}       ->  \\frac{n}{2}
    \\color{red}{5}    ->  {5}

One pass from the last token to the first: the arguments of a command are processed before the command. There is no
recursion, and the time is linear in the length of the text. The pass records edits, and the text is assembled once at
the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(r"\\(?:operatorname|hspace|vspace|tag)\*|\\[A-Za-z]+|\\.|.", re.DOTALL)
_ANY = re.compile(r"[\\^_]")

# Commands for letters, accents, roots and fractions -> number of arguments.
_ARGUMENTS = {
    **dict.fromkeys((r"\frac", r"\binom"), 2),
    **dict.fromkeys((r"\sqrt", r"\overline", r"\bar", r"\vec", r"\hat", r"\tilde", r"\widehat", r"\widetilde"), 1),
    **dict.fromkeys((r"\dot", r"\ddot", r"\overrightarrow", r"\mathbb", r"\mathcal", r"\mathfrak", r"\mathscr"), 1),
}
# Fonts that do not change the meaning of a letter, and upright fonts, whose argument may be a word or a unit.
SLANTED = (r"\mathbf", r"\mathit", r"\boldsymbol", r"\bm", r"\pmb", r"\mathnormal")
UPRIGHT = r"\text"
_DECLARED = {
    **dict.fromkeys((r"\bf", r"\bfseries", r"\it", r"\itshape", r"\em", r"\sl", r"\slshape"), r"\mathbf"),
    **dict.fromkeys((r"\rm", r"\rmfamily", r"\upshape", r"\normalfont", r"\sf", r"\sffamily", r"\tt"), UPRIGHT),
    **dict.fromkeys((r"\ttfamily", r"\sc", r"\scshape", r"\mdseries"), UPRIGHT),
}
# Commands that are removed with this many arguments; the last argument of \textcolor is kept.
_DROPPED = {
    **dict.fromkeys(
        (r"\phantom", r"\hphantom", r"\vphantom", r"\tag", r"\tag*", r"\label", r"\color", r"\textcolor"), 1
    ),
    r"\rule": 2,
}
# Commands that are replaced by a space, with their argument.
_SPACED = dict.fromkeys((r"\hspace", r"\hspace*", r"\vspace", r"\vspace*", r"\mspace"), 1)
_CLASSES = (
    r"\mathop",
    r"\mathopen",
    r"\mathclose",
    r"\mathbin",
    r"\mathrel",
    r"\mathord",
    r"\mathpunct",
    r"\mathinner",
)
_AROUND = (r"\ensuremath", r"\smash")  # removed; the argument and its braces are kept
_INFIX = {r"\over": r"\frac{", r"\choose": r"\binom{"}
# Commands that may occur between words.
_IN_WORDS = frozenset(
    (UPRIGHT, *SLANTED, *_DECLARED, r"\%", r"\&", r"\#", r"\$", r"\ ", r"\cdot", r"\circ", r"\mu", r"\Omega", r"\ell")
)
_NO_ARGUMENT = frozenset(")],;=&|+-*/<>!'^_}")
_LETTERS_OR_DIGITS = re.compile(r"[A-Za-z]|\\[A-Za-z]+|[0-9]+")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def tidy(text: str) -> str:
    """Return `text` with arguments in braces and without style; the caller has already removed sizes and spaces."""
    return _Pass(text).text() if _ANY.search(text) else text


@dataclass(slots=True)
class _Level:
    """Open group, as far as it has been processed: spans (first token, last token), leftmost last."""

    end: int  # index of the token that closes the group
    spans: list[tuple[int, int]] = field(default_factory=list)
    infix: int | None = None  # index of an infix command of the group, such as \over


class _Pass:
    def __init__(self, text: str) -> None:
        self._tokens = _TOKEN.findall(text)
        self._out = list(self._tokens)
        n = len(self._tokens)
        self._before, self._after = [""] * n, [""] * n
        self._hidden = [0] * (n + 1)  # +1 at the first token of a removed range, -1 after its last
        self._close = _pairs(self._tokens)
        self._open = {end: start for start, end in self._close.items()}
        self._rewritten: set[int] = set()  # opening braces that were replaced by a command
        self._fonts: dict[int, int] = {}  # index of a font command -> last token of its argument
        self._math = [0] * (n + 1)  # number of math commands before each token
        for i, token in enumerate(self._tokens):
            command = len(token) > 1 and token not in _IN_WORDS
            self._math[i + 1] = self._math[i] + command
        self._levels = [_Level(n)]

    def text(self) -> str:
        for i in range(len(self._tokens) - 1, -1, -1):
            self._read(i)
        self._infix(-1, self._levels[0])
        pieces, hidden = list[str](), 0
        for i, out in enumerate(self._out):
            hidden += self._hidden[i]
            if not hidden:
                pieces += (self._before[i], out, self._after[i])
        return "".join(pieces)

    @property
    def _spans(self) -> list[tuple[int, int]]:
        return self._levels[-1].spans

    def _read(self, i: int) -> None:
        token = self._tokens[i]
        if token.isspace():
            return
        if token == "}" and i in self._open:
            self._levels.append(_Level(i))
        elif token == "{" and i in self._close and len(self._levels) > 1:
            self._group(i)
        elif token in "{}":  # unmatched brace: no argument extends across it
            self._spans.clear()
        elif token in "^_":
            self._script(i)
        elif token in _ARGUMENTS:
            self._command(i, _ARGUMENTS[token])
        elif token == UPRIGHT or token in SLANTED:
            self._font(i)
        elif token in _DECLARED:
            self._declaration(i)
        elif token in _DROPPED or token in _SPACED:
            self._drop(i, _DROPPED.get(token, 1))
        elif token in _CLASSES or token in _AROUND:
            self._unwrap(i, keep_braces=token in _AROUND)
        else:
            if token in _INFIX and self._levels[-1].infix is None:
                self._levels[-1].infix = i
            self._spans.append((i, i))

    def _group(self, i: int) -> None:
        level = self._levels.pop()
        self._infix(i, level)
        inner = level.spans[-1][0] if level.spans else None
        if inner is not None and self._tokens[inner] in _DECLARED and i not in self._rewritten:
            self._out[inner] = ""
            self._strip(inner + 1, level.end)
            self._rewritten.add(i)
            self._out[i] = UPRIGHT + "{"
            level.spans.pop()
            self._styled(i, (i, level.end), _DECLARED[self._tokens[inner]])
        self._spans.append((i, level.end))

    def _infix(self, start: int, level: _Level) -> None:
        """Rewrite {a \\over b} as \\frac{a}{b}; without a group, the fraction is the complete text."""
        if level.infix is None or (start < 0 and not {"=", ",", ";"}.isdisjoint(self._tokens)):
            return
        command = _INFIX[self._tokens[level.infix]]
        self._out[level.infix] = "}{"
        if start >= 0:
            self._out[start] = command
            self._rewritten.add(start)
        else:
            self._before[0] = command + self._before[0]
            self._after[-1] += "}"

    def _take(self) -> tuple[int, int] | None:
        """Pop the next argument: a group, a command with its arguments, or one character with an optional minus."""
        spans = self._spans
        if not spans:
            return None
        start = spans[-1][0]
        token = self._tokens[start]
        if token == "-" and len(spans) > 1 and _LETTERS_OR_DIGITS.match(self._tokens[spans[-2][0]]):
            spans.pop()
            return start, spans.pop()[1]
        if token in _NO_ARGUMENT or (token[0] == "\\" and not token[1:].isalpha()):
            return None
        return spans.pop()

    def _brace(self, span: tuple[int, int]) -> None:
        start, end = span
        if self._tokens[start] != "{" or self._close.get(start) != end or start in self._rewritten:
            self._before[start] = "{" + self._before[start]
            self._after[end] += "}"

    def _strip(self, start: int, end: int) -> None:
        """Remove the spaces from token `start` on."""
        while start < end and self._tokens[start].isspace():
            self._out[start] = ""
            start += 1

    def _command(self, i: int, arguments: int) -> None:
        end = i
        if self._tokens[i] == r"\sqrt":
            end = self._index(i)
            if self._parenthesis(end, "{", "}"):
                arguments = 0
                end = self._spans.pop()[1]
        for _ in range(arguments):
            span = self._take()
            if span is None:
                break
            self._strip(end + 1, span[0])
            self._brace(span)
            end = span[1]
        self._spans.append((i, end))

    def _index(self, i: int) -> int:
        """Return the last token of a root's index in square brackets; without an index, that of the command."""
        spans = self._spans
        if not spans or self._tokens[spans[-1][0]] != "[":
            return i
        start = spans[-1][0]
        end = self._close.get(start)
        if end is None or self._tokens[end] != "]":
            return i
        while spans and spans[-1][0] <= end:
            spans.pop()
        self._strip(i + 1, start)
        return end

    def _parenthesis(self, i: int, opening: str, closing: str) -> bool:
        """Turn a parenthesis after the command into its argument: \\sqrt(2), x^(n+1). False if there is none."""
        spans = self._spans
        if not spans or self._tokens[spans[-1][0]] != "(":
            return False
        start = spans[-1][0]
        end = self._close.get(start)
        if end is None or self._tokens[end] != ")" or end > self._levels[-1].end:
            return False
        while spans and spans[-1][0] <= end:
            spans.pop()
        self._strip(i + 1, start)
        self._out[start], self._out[end] = opening, closing
        self._rewritten.add(start)
        spans.append((start, end))
        return True

    def _script(self, i: int) -> None:
        """Process ^ or _: as in plain text, its argument includes all following digits, and a minus before them."""
        spans = self._spans
        if not spans:
            return
        if self._parenthesis(i, "{", "}"):
            spans.pop()
            return
        start, end = spans[-1]
        token = self._tokens[start]
        if token == "{":
            self._strip(i + 1, start)
            self._single(start, end)
        elif token == r"\prime" and self._tokens[i] == "^":
            spans.pop()
            self._out[i], self._out[start] = "", "'"
        elif token.isdigit() or (token in "+-" and len(spans) > 1 and self._signs(i, start, spans[-2][0])):
            signed = not token.isdigit()
            if signed:
                spans.pop()
            end = self._digits(i, spans[-1][0]) if self._tokens[spans[-1][0]].isdigit() else spans[-1][1]
            while spans and spans[-1][0] <= end:
                spans.pop()
            self._scripted(i, start, end)
        else:
            self._scripted(i, start, end)

    def _scripted(self, i: int, start: int, end: int) -> None:
        self._strip(i + 1, start)
        if end > start:
            self._brace((start, end))
        else:
            self._single(start, end)

    def _signs(self, i: int, sign: int, following: int) -> bool:
        """Return whether a sign in an exponent belongs to the next token: x^-1, e^-x, but not R^+ x."""
        if self._tokens[i] != "^" or following != sign + 1:
            return False
        token = self._tokens[following]
        return token.isdigit() or (self._tokens[sign] == "-" and (token.isalpha() or token in (r"\frac", r"\pi")))

    def _digits(self, i: int, start: int) -> int:
        """Return the index of the last digit of the number at `start`.

        After \\log_ it is one digit, or 10: \\log_23 is \\log_{2}3, and \\log_10 3 is \\log_{10}3.
        """
        end = start
        tokens = self._tokens
        while end + 1 < len(tokens) and tokens[end + 1].isdigit():
            end += 1
        if tokens[i] == "^" and tokens[end + 1 : end + 2] == ["."] and "".join(tokens[end + 2 : end + 3]).isdigit():
            end += 2
            while end + 1 < len(tokens) and tokens[end + 1].isdigit():
                end += 1
        if i and tokens[i - 1] == r"\log":
            ten = tokens[start : start + 2] == ["1", "0"] and end == start + 1 and end + 1 < len(tokens)
            if not ten:
                self._after[start] += " "
                return start
        return end

    def _single(self, start: int, end: int) -> None:
        """Write x^{2} as x^2; braces are kept or added only if the next character would join the exponent."""
        braced = self._tokens[start] == "{"
        if end - start != 2 * braced or not self._tokens[start + braced].isalnum() or start in self._rewritten:
            return
        following = "".join(self._tokens[end + 1 : end + 3]).lstrip()[:1].isalnum()
        if braced and not following:
            self._out[start] = self._out[end] = ""
        elif following and not braced:
            self._brace((start, end))

    def _font(self, i: int) -> None:
        span = self._take()
        if span is None:
            self._spans.append((i, i))
            return
        start, end = span
        self._strip(i + 1, start)
        self._out[i] = ""
        if self._tokens[start] == "{" and start not in self._rewritten:
            self._out[start] = UPRIGHT + "{"
            self._rewritten.add(start)
            self._styled(start, span, self._tokens[i])
        elif start == end and len(self._tokens[start]) == 1:
            self._before[start] = UPRIGHT + "{" + self._before[start] if self._tokens[i] == UPRIGHT else " "
            self._after[start] += "}" if self._tokens[i] == UPRIGHT else " "
        else:
            self._before[start] = " " + self._before[start]
        self._fonts[i] = end
        self._spans.append((i, end))

    def _styled(self, start: int, span: tuple[int, int], font: str) -> None:
        """Undo \\text{...} for a group of math, of another font command, or of a single letter in a slanted font."""
        inside = [self._tokens[i] for i in range(start + 1, min(start + 4, span[1])) if not self._tokens[i].isspace()]
        first = start + 1
        while first < span[1] and (self._tokens[first].isspace() or self._out[first] == ""):
            if first in self._fonts:
                break
            first += 1
        nested = self._fonts.get(first) == span[1] - 1
        single = len(inside) == 1 and span[1] - start <= 4 and (inside[0].isalpha() or inside[0][0] == "\\")
        if self._math[span[1]] > self._math[start + 1] and not single:
            self._out[start] = "{"
        elif nested or (single and (font != UPRIGHT or inside[0][0] == "\\")):
            self._out[start] = self._out[span[1]] = " "

    def _declaration(self, i: int) -> None:
        """Process a font declaration.

        `_group` handles {\\rm x}. \\rm{x} is treated as a font with an argument. Otherwise the font extends to the end
        of the group.
        """
        before = i - 1
        while before >= 0 and self._tokens[before].isspace():
            before -= 1
        spans = self._spans
        if before >= 0 and self._tokens[before] == "{" and before in self._close:
            spans.append((i, i))
            return
        self._out[i] = ""
        if not spans:
            return
        if self._tokens[spans[-1][0]] == "{":
            start, end = spans[-1]
            if start not in self._rewritten:
                self._strip(i + 1, start)
                self._out[start] = UPRIGHT + "{"
                self._rewritten.add(start)
                self._styled(start, (start, end), _DECLARED[self._tokens[i]])
            return
        end = self._levels[-1].end - 1
        if _DECLARED[self._tokens[i]] == UPRIGHT and self._math[end + 1] == self._math[i + 1]:
            self._out[i] = UPRIGHT + "{"
            self._after[end] += "}"
            spans.clear()
            spans.append((i, end))

    def _drop(self, i: int, arguments: int) -> None:
        end = i
        for _ in range(arguments):
            span = self._take()
            end = end if span is None else span[1]
        if self._tokens[i] in _SPACED and i:
            self._after[i - 1] += " "
        self._hidden[i] += 1
        self._hidden[end + 1] -= 1

    def _unwrap(self, i: int, keep_braces: bool) -> None:
        self._out[i] = ""
        if self._spans and not keep_braces:
            start, end = self._spans[-1]
            if self._tokens[start] == "{" and start not in self._rewritten:
                self._out[start] = self._out[end] = ""


def _pairs(tokens: list[str]) -> dict[int, int]:
    """Return {index of an opening bracket: index of its closing bracket}; ( and [ may pair, as in intervals."""
    pairs, stack = {}, list[int]()
    for i, token in enumerate(tokens):
        if token in ("{", "(", "["):
            stack.append(i)
        elif token in (")", "]") and stack and tokens[stack[-1]] != "{":
            pairs[stack.pop()] = i
        elif token == "}":
            while stack and tokens[stack[-1]] != "{":
                stack.pop()
            if stack:
                pairs[stack.pop()] = i
    return pairs
