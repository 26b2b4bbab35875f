"""The table of docs/tokenizers.md, from the tokenizers themselves: `python -m tests.real.rows`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlsys.config import PromptSection
from rlsys.tokenization.renderer import Renderer
from rlsys.tokenization.stop_conditions import stop_conditions_of
from tests.real.known import KNOWN, load, model_folder

PAGE = Path(__file__).parents[2] / "docs" / "tokenizers.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
DAY = "2026-02-03"


def table() -> str:
    """One column per tokenizer."""
    columns = {name: _column(name) for name in KNOWN}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | " + " | ".join(columns[name][row] for name in columns) + " |")
    return "\n".join(lines) + "\n"


def _column(name: str) -> dict[str, str]:
    tokenizer, known = load(name), KNOWN[name]

    def written(**section: object) -> str:
        return Renderer(tokenizer, PromptSection(date=DAY, **section)).render("Q")

    plain, off = written(), written(template_options=known.thinking_off)
    with tempfile.TemporaryDirectory() as scratch:
        ends = stop_conditions_of(model_folder(name, Path(scratch) / "model"))
    named = {place: " ".join(_code(tokenizer.decode([id_])) for id_ in ids) for place, ids in ends.by_place.items()}
    between = tokenizer.decode(Renderer(tokenizer, PromptSection(date=DAY)).reply_ids("R", None, False))
    return {
        "model": known.model,
        "tokens, rows of the embedding": f"{len(tokenizer):,}, {known.rows:,}",
        "begins with": _code(tokenizer.decode(Renderer(tokenizer, PromptSection(date=DAY)).ids("Q")[:1])),
        **{place: named.get(place, "none") for place in named},
        "the prompt of `Q`": _code(plain),
        "with `system: S`": _code(written(system="S")),
        "thinking off": _off(known.thinking_off, plain, off),
        "from a turn to the next, reply `R`": _code(between),
    }


def _off(options: dict[str, object], plain: str, off: str) -> str:
    if not options:
        return "no such thing"
    told = ", ".join(f"{key}: {str(value).lower()}" for key, value in options.items())
    if off.startswith(plain):
        return f"`{{{told}}}` adds {_code(off.removeprefix(plain))}"
    return f"`{{{told}}}` changes the system message"


def _code(text: str) -> str:
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`" if text else "nothing"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
