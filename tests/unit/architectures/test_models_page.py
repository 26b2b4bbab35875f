"""docs/models.md has one row for each family, with the modules that adapters go to."""

from __future__ import annotations

import re
from pathlib import Path

from rlsys.architectures.families import FAMILIES, TEXT_PARTS
from rlsys.architectures.support import CPU_HEAD_SIZES, LARGEST_ADAPTED_VOCABULARY

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")


def rows() -> list[dict[str, str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, cells, strict=True)) for cells in body]


def test_each_family_has_a_row_and_each_row_a_family() -> None:
    found = {row["`model_type`"].strip("`"): row["family"] for row in rows()}
    assert found == {family.model_type: family.name for family in FAMILIES.values()}
    assert len(rows()) == len(found)
    assert all(f"`{kind}`" in PAGE for kind in TEXT_PARTS)


def test_a_row_says_where_adapters_go() -> None:
    for row in rows():
        family = FAMILIES[row["`model_type`"].strip("`")]
        wanted = family.attention if family.experts else (*family.attention, *family.mlp)
        assert re.findall(r"`(\w+)`", row["adapters go to"]) == list(wanted), family.name
        assert (row["trains"] == "attention") == family.experts
        assert (row["output layer"] == "no") != family.output_layer


def test_a_row_says_which_layers_have_a_window() -> None:
    words = {"none": "none", "all": "all, if any", "optional": "where asked for"}
    periods = {2: "every other", 4: "three of four", 6: "five of six"}
    for row in rows():
        family = FAMILIES[row["`model_type`"].strip("`")]
        wanted = periods[family.period] if family.windows == "pattern" else words[family.windows]
        assert row["layers with a window"] == wanted, family.name


def test_limits_of_engines_are_those_that_are_checked() -> None:
    sizes = ", ".join(map(str, CPU_HEAD_SIZES[:-1]))
    text = " ".join(PAGE.split())
    assert f"heads of {sizes} and {CPU_HEAD_SIZES[-1]}" in text
    assert f"{LARGEST_ADAPTED_VOCABULARY:,} tokens" in text
