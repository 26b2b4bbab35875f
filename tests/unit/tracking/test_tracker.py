"""Claims about what a run writes down, on disk and in wandb. wandb is the real one; nothing here reaches a network."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlsys.config import TrackingSection
from rlsys.errors import CheckpointError, RlsysError
from rlsys.report.charts import SECTIONS
from rlsys.run_state.jsonl import (
    METRICS,
    TOKEN_FIELDS,
    UNKNOWN,
    GroupsRow,
    ProblemRow,
    read_groups,
    read_metrics,
    read_problems,
    read_rollouts,
    write_problems,
)
from rlsys.tracking.tracker import Tracker
from tests import waiting
from tests.unit.rollout_rows import in_tokens, rollout
from tests.waiting import FAR_S, times

ROOT = Path(__file__).parents[3]
DISABLED = TrackingSection(wandb="disabled")
OFFLINE = TrackingSection(wandb="offline", tags=["tested"], log_adapter=True)
CONFIG = {"run": {"name": "tracked"}, "rl": {"steps": 2}}
ROW = rollout(0, "before", "1 + 1 =", " 3 <|end|> \ud83d é", "2", 0.0, None, 4, "length")
FAKE_KEY = "0123456789" * 4
CONNECT_TIMEOUT_S = 5.0  # on a machine that does nothing else
HELD_UP = 0.5  # of the connect timeout: a call as slow as this waited for wandb, not for a busy machine


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_a_line_is_on_the_disk_when_log_returns(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, DISABLED, "r", CONFIG)
    tracker.log(3, {"reward/mean": 0.5, "sync/bytes": 2**40})
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    record = json.loads(line)
    assert abs(record.pop("time") - time.time()) < 60
    assert record == {"step": 3, "stage": "rl", "row": 0, "reward/mean": 0.5, "sync/bytes": 2**40}
    tracker.close()


def test_floats_that_are_not_finite_stay_valid_json_and_come_back(tmp_path: Path) -> None:
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker:
        tracker.log(1, {"a/nan": math.nan, "a/up": math.inf, "a/down": -math.inf, "a/np": np.float32("nan")})  # type: ignore[dict-item]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert [record[key] for key in ("a/nan", "a/up", "a/down", "a/np")] == ["NaN", "Infinity", "-Infinity", "NaN"]
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["a/nan"])
    assert math.isnan(read["a/np"])
    assert (read["a/up"], read["a/down"]) == (math.inf, -math.inf)


def test_a_torn_last_line_is_left_out_and_a_broken_one_before_it_is_named(tmp_path: Path) -> None:
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker:
        tracker.log(1, {"reward/mean": 0.1})
        tracker.log(2, {"reward/mean": 0.2})
        tracker.rollouts(0, [ROW, ROW])
    for name in (METRICS, "rollouts.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-7])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    assert read_rollouts(tmp_path) == [ROW]
    (tmp_path / METRICS).write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(RlsysError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)


def test_a_run_that_wrote_nothing_reads_as_nothing(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert read_rollouts(tmp_path) == []
    assert read_groups(tmp_path) == []
    assert read_problems(tmp_path) == {}


def test_tokens_of_a_rollout_come_back_as_they_were(tmp_path: Path) -> None:
    row = in_tokens([" 3", "\n", "\ud83d", ""], 0.5, [math.inf, 1.0, 0.25, None], reply=(1,))
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker:
        tracker.rollouts(1, [row])
    assert read_rollouts(tmp_path) == [row]


def test_rollouts_of_a_run_from_before_tokens_were_shown_are_read_and_gone_on_with(tmp_path: Path) -> None:
    old = {name: value for name, value in asdict(ROW).items() if name not in (*TOKEN_FIELDS, "problem")}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(old) + "\n")
    with Tracker(tmp_path, DISABLED, "r", CONFIG, resume_from=0) as tracker:
        tracker.rollouts(1, [replace(ROW, step=1)])
    assert read_rollouts(tmp_path) == [replace(ROW, problem=UNKNOWN), replace(ROW, step=1)]


def test_groups_are_on_the_disk_when_the_call_returns_and_are_cut_back_as_figures_are(tmp_path: Path) -> None:
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker:
        for step in (1, 2, 3):
            tracker.groups(step, np.array([step, 9]), np.array([0.25, 1.0], np.float32))  # type: ignore[arg-type]
        assert [row.step for row in read_groups(tmp_path)] == [1, 2, 3]
        tracker.roll_back(2)
        tracker.groups(3, [5], [0.5])
    with Tracker(tmp_path, DISABLED, "r", CONFIG, resume_from=1) as tracker:
        tracker.groups(2, [6], [0.0])
    assert read_groups(tmp_path) == [GroupsRow(1, [1, 9], [0.25, 1.0]), GroupsRow(2, [6], [0.0])]


def test_problems_are_written_once_and_found_by_their_place(tmp_path: Path) -> None:
    write_problems(tmp_path, ["1 + 1 =", "\ud83d?"], ["2", "3"])
    assert read_problems(tmp_path) == {0: ProblemRow(0, "1 + 1 =", "2"), 1: ProblemRow(1, "\ud83d?", "3")}


def test_supervised_figures_count_steps_of_their_own_and_never_share_a_call_with_others(tmp_path: Path) -> None:
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker:
        tracker.log(700, {"sft/loss": 1.0})
        tracker.log(0, {"eval/accuracy": 0.5})
        with pytest.raises(AssertionError, match="one stage"):
            tracker.log(1, {"sft/loss": 1.0, "eval/accuracy": 0.5})
    assert [(record["stage"], record["step"]) for record in read_metrics(tmp_path)] == [("sft", 700), ("rl", 0)]


def test_config_and_environment_are_written_beside_the_figures(tmp_path: Path) -> None:
    Tracker(tmp_path, DISABLED, "r", CONFIG).close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["numpy"] == np.__version__
    assert {"python", "processor", "cores", "memory", "gpus"} <= set(environment)


def test_disabled_wandb_is_said_and_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from rlsys.config import TrackingSection; from rlsys.tracking.tracker import Tracker\n"
        f"t = Tracker(pathlib.Path({str(tmp_path)!r}), TrackingSection(wandb='disabled'), 'r', {{}})\n"
        "t.log(1, {'reward/mean': 1.0}); t.close(); assert 'wandb' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "wandb: off" in done.stdout


class Watch:
    """The first to be asked for a module that is not imported yet."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        self.names.append(name)


def test_an_offline_run_read_back_holds_config_metrics_table_and_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb  # noqa: F401  which looks whether there is a pandas

    found_by_import = Watch()
    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    monkeypatch.setattr(sys, "meta_path", [found_by_import, *sys.meta_path])
    notes: list[str] = []
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    after = rollout(2, "after", "1 + 1 =", " 2", "2", 1.0, None, 2, "stop")
    with Tracker(tmp_path, OFFLINE, "tracked", CONFIG, note=notes.append) as tracker:
        tracker.log(500, {"sft/loss": 2.5})
        tracker.log(510, {"sft/loss": 2.25})
        tracker.log(0, {"eval/accuracy": 0.25})
        tracker.rollouts(0, [rollout(0, "before", "1 + 1 =", " 3", "2", 0.0, None, 4, "length")])
        for step in (1, 2):
            tracker.log(step, {"reward/mean": step / 4})
            tracker.log(step, {"time/step_s": 1.5})
        tracker.rollouts(2, [after])
        tracker.adapter(adapter)
        tracker.finish()  # as a job does before it stops its actors; closing afterwards adds nothing
    assert tracker.wandb_dir is not None
    assert tracker.wandb_dir.is_relative_to(tmp_path)
    assert tracker.wandb_url is None
    assert any(f"wandb sync {tracker.wandb_dir}" in note for note in notes)
    assert "pandas" not in found_by_import.names, "a table needs none"

    found = list(wandb_records(tracker.wandb_dir))
    rows = [history_row(record) for kind, record in found if kind == "history"]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps)), "wandb merged or dropped rows"
    assert [row["sft/step"] for row in rows if "sft/loss" in row] == [500, 510]
    assert [row["sft/loss"] for row in rows if "sft/loss" in row] == [2.5, 2.25]
    both = [(row["step"], row["reward/mean"], row["time/step_s"]) for row in rows if "reward/mean" in row]
    assert both == [(1, 0.25, 1.5), (2, 0.5, 1.5)], "figures of one step share a row"
    axes = {record.metric.name: record.metric.step_metric for kind, record in found if kind == "metric"}
    assert (axes["sft/loss"], axes["reward/mean"]) == ("sft/step", "step")

    (run,) = (record.run for kind, record in found if kind == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["rl"] == {"steps": 2}
    assert config["environment"]["numpy"] == np.__version__
    assert (run.display_name, list(run.tags)) == ("tracked", ["tested"])

    last = [row for row in rows if "rollouts/path" in row][-1]
    table = json.loads((tracker.wandb_dir / "files" / last["rollouts/path"]).read_text())
    assert [dict(zip(table["columns"], line, strict=True))["completion"] for line in table["data"]] == [" 3", " 2"]
    columns = set(table["columns"])
    assert {"problem", "prompt"} <= columns and not {*TOKEN_FIELDS} & columns, "for people: no token lists"
    artifacts = [record.artifact for kind, record in found if kind == "artifact"]
    assert any((a.name, a.type) == ("tracked-adapter", "model") for a in artifacts)
    (end,) = (record.exit for kind, record in found if kind == "exit")
    assert end.exit_code == 0


def test_a_run_that_fails_is_closed_with_a_failing_exit_code(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker(tmp_path, OFFLINE, "r", CONFIG, note=lambda text: None) as tracker:
        raise KeyboardInterrupt
    assert tracker.wandb_dir is not None
    (end,) = (record.exit for kind, record in wandb_records(tracker.wandb_dir) if kind == "exit")
    assert end.exit_code == 130


@pytest.mark.parametrize("section", [TrackingSection(), TrackingSection(wandb="online")], ids=["auto", "online"])
def test_without_an_account_a_run_is_offline_and_says_so(tmp_path: Path, section: TrackingSection) -> None:
    notes: list[str] = []
    Tracker(tmp_path, section, "r", CONFIG, note=notes.append).close()
    assert any("offline" in note and "not logged in" in note and "wandb login" in note for note in notes), notes


def test_a_key_in_a_netrc_file_counts_as_logged_in(troubled: dict[str, Troubled]) -> None:
    assert "offline (Timed out" in troubled["nobody listens"].output, "it asked the server, so it counted as logged in"


@pytest.mark.parametrize("trouble", ["nobody listens", "never answers", "no network", "stops answering"])
def test_training_never_waits_for_wandb(troubled: dict[str, Troubled], trouble: str) -> None:
    run = troubled[trouble]
    assert run.slowest_call_s < HELD_UP * run.limit_s
    assert [record["reward/mean"] for record in read_metrics(run.run_dir)] == list(range(50))


@pytest.mark.parametrize("trouble", ["nobody listens", "never answers", "no network"])
def test_without_a_server_the_run_becomes_an_offline_one_and_says_so(
    troubled: dict[str, Troubled], trouble: str
) -> None:
    run = troubled[trouble]
    assert "wandb: offline (" in run.output
    (found,) = (run.run_dir / "wandb").glob("offline-run-*")
    assert f"wandb sync {found}" in run.output
    rows = [history_row(record) for kind, record in wandb_records(found) if kind == "history"]
    assert [row["reward/mean"] for row in rows] == list(range(50))


def test_a_server_that_stops_answering_is_told_and_does_not_hold_up_the_end(troubled: dict[str, Troubled]) -> None:
    run = troubled["stops answering"]
    assert "wandb: online at http://127.0.0.1" in run.output
    assert "wandb: gave up (" in run.output
    assert "wandb sync" in run.output
    assert run.close_s < 6 * run.limit_s, "wandb alone would try for days"


def test_a_failure_within_wandb_is_told_and_costs_the_copy_only(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "run").mkdir()
    section = TrackingSection(wandb="offline")  # wandb refuses an id with a slash
    with Tracker(tmp_path / "run", section, "r", CONFIG, note=notes.append, wandb_id="a/b") as tracker:
        tracker.log(1, {"reward/mean": 1.0})
    assert any("wandb: gave up" in note for note in notes), notes
    assert len(read_metrics(tmp_path / "run")) == 1


def test_an_adapter_folder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker, pytest.raises(CheckpointError, match="nowhere"):
        tracker.adapter(tmp_path / "nowhere")


ID = "tested0001"


def steps_of(tracker: Tracker, steps: range, offset: float = 0.0) -> None:
    """A step's figures, its rollouts and, every second step, an evaluation, as a job logs them."""
    for step in steps:
        tracker.log(step, {"reward/mean": step + offset})
        tracker.rollouts(step, [rollout(step, "train", "p", f"{step + offset}", "a", 1.0, 0.5, 1, "stop")])
        if step % 2 == 0:
            tracker.log(step, {"eval/accuracy": step + offset})


def test_going_on_cuts_the_files_back_to_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker:
        tracker.log(9, {"sft/loss": 1.0})
        steps_of(tracker, range(5))
    before = (tmp_path / METRICS).read_text().splitlines()
    with Tracker(tmp_path, DISABLED, "r", CONFIG, resume_from=2, keep_supervised=True) as tracker:
        assert (tmp_path / METRICS).read_text().splitlines() == before[:6], "what is kept is kept to the byte"
        steps_of(tracker, range(3, 5))
    found = [(line["stage"], line["step"], line["row"]) for line in read_metrics(tmp_path)]
    rl = [
        ("rl", 0, 1),
        ("rl", 0, 1),
        ("rl", 1, 2),
        ("rl", 2, 3),
        ("rl", 2, 3),
        ("rl", 3, 4),
        ("rl", 4, 5),
        ("rl", 4, 5),
    ]
    assert found == [("sft", 9, 0), *rl]
    assert [row.step for row in read_rollouts(tmp_path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keep", [True, False])
def test_figures_of_the_supervised_stage_stay_or_go_with_their_base(tmp_path: Path, keep: bool) -> None:
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker:
        tracker.log(9, {"sft/loss": 1.0})
        steps_of(tracker, range(2))
    Tracker(tmp_path, DISABLED, "r", CONFIG, keep_supervised=keep).close()
    assert [line["stage"] for line in read_metrics(tmp_path)] == ["sft"] * keep


def test_a_running_job_that_goes_back_writes_the_steps_anew(tmp_path: Path) -> None:
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker:
        tracker.log(9, {"sft/loss": 1.0})
        steps_of(tracker, range(4))
        tracker.roll_back(1)
        steps_of(tracker, range(2, 6), offset=0.5)
        tracker.roll_back(-1)
        steps_of(tracker, range(3), offset=0.25)
    lines = read_metrics(tmp_path)
    assert [(line["stage"], line["step"], line["row"]) for line in lines if "eval/accuracy" not in line] == [
        ("sft", 9, 0),
        ("rl", 0, 1),
        ("rl", 1, 2),
        ("rl", 2, 3),
    ]
    assert [row.completion for row in read_rollouts(tmp_path)] == ["0.25", "1.25", "2.25"]


@pytest.mark.parametrize("torn", [b'{"step": 3, "ti', b"{", b"\x00\x00"], ids=["half", "brace", "zeros"])
def test_a_line_torn_by_a_kill_is_removed_and_told_when_the_run_goes_on(tmp_path: Path, torn: bytes) -> None:
    notes: list[str] = []
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker:
        steps_of(tracker, range(3))
    with (tmp_path / METRICS).open("ab") as file:
        file.write(torn)
    with Tracker(tmp_path, DISABLED, "r", CONFIG, note=notes.append, resume_from=2) as tracker:
        steps_of(tracker, range(3, 4))
    assert [line["step"] for line in read_metrics(tmp_path) if "reward/mean" in line] == [0, 1, 2, 3]
    assert [note for note in notes if "torn" in note]


def test_a_whole_last_line_that_lost_only_its_newline_is_kept(tmp_path: Path) -> None:
    with Tracker(tmp_path, DISABLED, "r", CONFIG) as tracker:
        steps_of(tracker, range(2))
    (tmp_path / METRICS).write_bytes((tmp_path / METRICS).read_bytes()[:-1])
    with Tracker(tmp_path, DISABLED, "r", CONFIG, resume_from=1) as tracker:
        steps_of(tracker, range(2, 3))
    assert [line["step"] for line in read_metrics(tmp_path) if "reward/mean" in line] == [0, 1, 2]


KILLED = """
import os, pathlib, signal, sys, time
from tests.unit.tracking.test_tracker import CONFIG, ID, OFFLINE, Tracker, steps_of
tracker = Tracker(pathlib.Path(sys.argv[1]), OFFLINE, "r", CONFIG, note=lambda text: None, wandb_id=ID)
tracker.log(500, {"sft/loss": 2.5})
steps_of(tracker, range(0, 6), offset=0.5)
while tracker.wandb_dir is None or tracker._wandb._calls.qsize(): time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_that_goes_on_is_one_wandb_run_with_every_step_once(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}  # a wandb of its own
    assert waiting.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env, cwd=ROOT).returncode == -9
    (before,) = (tmp_path / "wandb").glob("offline-run-*")
    notes: list[str] = []
    more = {"note": notes.append, "wandb_id": ID, "keep_supervised": True}
    with Tracker(tmp_path, OFFLINE, "r", CONFIG, resume_from=3, **more) as tracker:  # type: ignore[arg-type]
        steps_of(tracker, range(4, 7))
        tracker.roll_back(5)
        steps_of(tracker, range(6, 9))
    assert not any("gave up" in note for note in notes), notes
    assert tracker.wandb_dir is not None
    assert list((tmp_path / "wandb").glob("offline-run-*")) == [tracker.wandb_dir], (
        "wandb sync would find one run twice"
    )
    assert (tmp_path / "wandb" / "superseded" / before.name).is_dir()

    found = list(wandb_records(tracker.wandb_dir))
    (run,) = (record.run for kind, record in found if kind == "run")
    assert run.run_id == ID
    rows = [history_row(record) for kind, record in found if kind == "history"]
    assert [row["_step"] for row in rows] == list(range(10))
    assert [row.get("sft/loss") for row in rows[:2]] == [2.5, None]
    figures = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    assert figures == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8)]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4, 6, 8]
    assert figures == [(line["step"], line["reward/mean"]) for line in read_metrics(tmp_path) if "reward/mean" in line]
    assert all("rollouts/path" in row for row in rows[1:]), "every step has its table"
    last = json.loads((tracker.wandb_dir / "files" / rows[-1]["rollouts/path"]).read_text())
    steps = [dict(zip(last["columns"], line, strict=True))["step"] for line in last["data"]]
    assert steps == list(range(9)), "the table at the end shows the whole run"


def test_every_metric_that_the_report_draws_is_documented_once() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    documented = re.findall(r"^\| `([a-z]+/[a-zA-Z_0-9]+)` \|", page, re.MULTILINE)
    assert len(documented) == len(set(documented)) > 60
    specs = [spec for some in SECTIONS.values() for spec in some]
    assert {metric for spec in specs for metric in spec.lines} <= set(documented)
    for pattern in (spec.pattern for spec in specs if spec.pattern):
        assert [name for name in documented if re.fullmatch(pattern, name.replace("_K", "_8").replace("gpuN", "gpu0"))]


TRACKED = """
import pathlib, sys, time
from rlsys.tracking import tracker as tracking
from rlsys.config import TrackingSection
from rlsys.tracking.tracker import Tracker
sys.path.insert(0, sys.argv[3])
from tests import waiting
from tests.unit.rollout_rows import rollout

tracking.FINISH_TIMEOUT_S = 3.0
def note(text): print(text, flush=True)
folder, timeout_s = pathlib.Path(sys.argv[1]), float(sys.argv[2])
tracker = Tracker(folder, TrackingSection(), "r", {}, note=note, connect_timeout_s=timeout_s)
slowest = 0.0
for step in range(50):
    start = time.monotonic()
    tracker.log(step, {"reward/mean": step})
    if step % 10 == 0:
        tracker.rollouts(step, [rollout(step, "train", "p", "c", "a", 1.0, 0.5, 1, "stop")])
    slowest = max(slowest, time.monotonic() - start)
    time.sleep(0.06)
start = time.monotonic()
tracker.close()
print("slowest", slowest, "close", time.monotonic() - start)
"""


@dataclass(frozen=True)
class Troubled:
    """A run of 50 steps that believes to be logged in, and whose server has some trouble."""

    run_dir: Path
    output: str
    limit_s: float  # connect_timeout_s of its tracker

    @property
    def slowest_call_s(self) -> float:
        return float(self.output.split()[-3])

    @property
    def close_s(self) -> float:
        return float(self.output.split()[-1])


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Troubled]]:
    """Every trouble at once, each in a process of its own, since wandb remembers its server for a process's life."""
    folder = tmp_path_factory.mktemp("troubled")
    isolate = ["unshare", "--user", "--map-root-user", "--net"]
    can_isolate = shutil.which("unshare") and not subprocess.run([*isolate, "true"], capture_output=True).returncode
    fading = ThreadingHTTPServer(("127.0.0.1", 0), FadingWandb)
    fading.daemon_threads = True
    threading.Thread(target=fading.serve_forever, daemon=True).start()
    with socket.socket() as bound, socket.create_server(("127.0.0.1", 0)) as silent:
        bound.bind(("127.0.0.1", 0))  # nobody else gets this port, and nobody listens at it
        refusing, mute, netrc = bound.getsockname()[1], silent.getsockname()[1], folder / "netrc"
        netrc.write_text(f"machine 127.0.0.1:{refusing}\n  login user\n  password {FAKE_KEY}\n")
        netrc.chmod(0o600)
        key = {"WANDB_API_KEY": FAKE_KEY}
        limit_s = CONNECT_TIMEOUT_S * times()
        children = {
            "nobody listens": tracked(folder / "0", refusing, limit_s, {"NETRC": str(netrc)}),
            "never answers": tracked(folder / "1", mute, limit_s, key),
            # without unshare the address is one that leads nowhere, which is nearly as good
            "no network": tracked(folder / "2", 9, limit_s, key, isolate if can_isolate else []),
        }
        before_s = 2 * limit_s  # within which that one has to get online first
        children["stops answering"] = tracked(folder / "3", fading.server_port, before_s, key)
        outputs = {name: child.communicate()[0] for name, child in children.items()}
    assert all(child.returncode == 0 for child in children.values()), outputs
    found = {
        name: Troubled(folder / str(i), text, before_s if name == "stops answering" else limit_s)
        for i, (name, text) in enumerate(outputs.items())
    }
    for longer_s in (4 * limit_s, 16 * limit_s):
        if "wandb: online" in found["stops answering"].output:
            break
        run_dir = folder / f"fading-{longer_s:.0f}"
        child = tracked(run_dir, fading.server_port, longer_s, key)
        found["stops answering"] = Troubled(run_dir, child.communicate()[0], longer_s)
        assert child.returncode == 0, found["stops answering"]
    yield found
    fading.shutdown()


def tracked(
    run_dir: Path, port: int, limit_s: float, extra: dict[str, str], isolate: Sequence[str] = ()
) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "NETRC": str(run_dir / "none"), **extra}
    command = [*isolate, sys.executable, "-c", TRACKED, str(run_dir), str(limit_s), str(ROOT)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


class FadingWandb(BaseHTTPRequestHandler):
    """As much of wandb's server as a run needs to start; it stops answering once figures arrive."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if "file_stream" in self.path:
            time.sleep(FAR_S)
            return
        project = {"id": "p", "name": "rlsys", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "x", "name": "r", "displayName": "r", "config": "{}", "historyLineCount": 0, "project": project}
        viewer = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}, "serverInfo": {"features": []}, "viewer": viewer}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


def wandb_records(folder: Path) -> Iterator[tuple[str, Any]]:
    """(kind, record) of an offline run's file, which is LevelDB's log: blocks of 32 KiB, records in fragments."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, fragment = struct.unpack("<IHB", data[at : at + 7])
        at += 7
        if fragment == 0:
            break
        whole += data[at : at + size]
        at += size
        if fragment in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record.WhichOneof("record_type"), record
            whole = b""


def history_row(record: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
