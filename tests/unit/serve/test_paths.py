"""Paths of checkpoints: the one spelling that is meant, and a hundred that lead elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsys.errors import CheckpointError
from rlsys.serve.checkpoints import CheckpointStore, Record
from rlsys.serve.errors import Refusal
from rlsys.serve.paths import checked_name, folder_name, parse_path, run_of_folder
from rlsys.serve.state import now

RUN = "0123456789abcdef0123456789abcdef:train:0"
GOOD = f"tinker://{RUN}/weights/a"
WRONG_RUNS = [
    *["", ".", "..", "...", "-", ":", "a", "a:b", "a.b", "../x", "..%2fx", "%2e%2e", "a\\b", "0:train:0", "C:"],
    *[RUN.upper(), RUN.replace(":", "."), RUN.replace(":", "%3a"), RUN + ":0", RUN + "0/../x"],
    *[RUN[:-1], *(RUN[:-1] + number for number in ("00", "01", "-1", "+1", "1e3", "\u0663"))],
    *[RUN.replace("train", "Train"), RUN.replace("train", "sample"), RUN + "\n", "\u202e" + RUN, RUN + "\0"],
    *["\u00e9" * 32 + ":train:0", "\uff41" * 32 + ":train:0", "x" * 65 + ":train:0", "tmp" * 4 + ":train:99999999999"],
]
WRONG_KINDS = [
    *["", ".", "..", "Weights", "WEIGHTS", "weights ", " weights", "weights.", "weight", "sampler", "optimizer"],
    *["external", ".records", "weights%2f..", "sampler_weights\n", "weights\\..", "\uff57eights", "wei\u0301ghts"],
]
WRONG_NAMES = [
    *[".", "..", "...", ".a", ".records", ".a.json", "a/..", "..%2f", "%2e%2e", "%2e", "a b", "a\tb", "a\nb", "a\0"],
    *["a\\b", "a:b", "a*", "a?", "a|b", "a'b", 'a"b', "a;b", "a&b", "a$b", "$(id)", "`id`", "~", "~root", "a~", "a%"],
    *["\u00e9", "\uff41", "a\u200b", "\u202ea", "CON ", "a" * 129, "a\u2215b", "a\u2044b", "a\uff0fb"],
    *["a@b", "a+b", "a=b", "a,b"],
]
SPELLINGS = [
    *["", "/", "a", "weights/a", "/etc/passwd", "file:///etc/passwd", "../../etc/passwd", "~/x", "$HOME/x", "//a/b/c"],
    *[f"{scheme}://{RUN}/weights/a" for scheme in ("http", "file", "s3", "TINKER", "Tinker", "tinker ", " tinker", "")],
    *[f"tinker:/{RUN}/weights/a", f"tinker:{RUN}/weights/a", f"tinker//{RUN}/weights/a", f"tinker:///{RUN}/weights/a"],
    *[f"tinker://{RUN}{rest}" for rest in ("", "/", "/weights", "/weights/", "//a")],
    *[
        f"{GOOD}{tail}"
        for tail in ("/", "/b", "//b", "\n", "\0", " ", "?x=1", "#x", ";x", "%00", "%2fb", "\\b", ":b", "\r")
    ],
    *[f"{head}{GOOD}" for head in ("/", "\n", " ")],
    *[f"tinker://user@{RUN}/weights/a", f"tinker://{RUN}:80/weights/a", f"tinker://[{RUN}]/weights/a"],
    *[f"tinker://{run}/weights/a" for run in WRONG_RUNS],
    *[f"tinker://{RUN}/{kind}/a" for kind in WRONG_KINDS],
    *[f"tinker://{RUN}/weights/{name}" for name in WRONG_NAMES],
]


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
@pytest.mark.parametrize("scheme", ["tinker", "mint", "rlsys"])
@pytest.mark.parametrize("name", ["a", "A-1_b.c", "0", "_x", "-x", "a..b", "a" * 128])
def test_the_spelling_that_is_meant_is_read(scheme: str, kind: str, name: str) -> None:
    found = parse_path(f"{scheme}://{RUN}/{kind}/{name}")
    assert (found.run_id, found.kind, found.name, found.text) == (RUN, kind, name, f"tinker://{RUN}/{kind}/{name}")


def test_there_are_more_than_a_hundred_spellings() -> None:
    assert len(set(SPELLINGS)) > 130


@pytest.mark.parametrize("text", SPELLINGS, ids=ascii)
def test_every_other_spelling_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="path: ") as refused:
        parse_path(text)
    assert refused.value.status == 400


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".a", "a" * 129, "a\n"])
def test_a_name_of_a_save_is_checked_alike(name: str) -> None:
    with pytest.raises(Refusal):
        checked_name(name)


def test_runs_and_their_folders_are_one_to_one() -> None:
    assert run_of_folder(folder_name(RUN)) == RUN
    for name in (RUN, "a.train.0", ".records", "tmp", RUN.replace(":", ".") + ".x", RUN.replace(":", ".").upper()):
        assert run_of_folder(name) is None


def test_a_link_in_a_tenants_folder_leads_nowhere(tmp_path: Path) -> None:
    store, path, secret = CheckpointStore(tmp_path / "root"), parse_path(GOOD), tmp_path / "secret"
    secret.mkdir()
    (secret / "adapter_config.json").write_text("{}")
    at = store.root / "one" / folder_name(RUN) / "weights"
    at.mkdir(parents=True)
    (at / "a").symlink_to(secret)
    store.put_record("one", path, Record(time=now()))
    with pytest.raises(CheckpointError, match="is a link"):
        store.find("one", path)
    assert store.checkpoints("one") == []
    (at / "a").unlink()
    at.rmdir()
    at.symlink_to(secret.parent)
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="is a link"):
        store.find("one", path)
