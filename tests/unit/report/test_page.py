"""Claims about the report: it stands alone, shows what was logged, and runs nothing that a model wrote."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlsys.config import TrackingSection
from rlsys.errors import ConfigError
from rlsys.report.page import headline, report_of, write_report
from rlsys.run_state.jsonl import write_problems
from rlsys.tracking.tracker import Tracker
from tests.unit.rollout_rows import in_tokens, rollout

VOID = {"meta", "br", "line", "path", "rect", "circle", "input"}
ATTACK = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"


class Page(HTMLParser):
    """Counts elements, keeps attributes and visible text, and fails on elements that are closed wrongly."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def run_of(folder: Path, text: str = " 2", name: str = "seen") -> Tracker:
    config = {"run": {"name": name}}
    with Tracker(folder, TrackingSection(wandb="disabled"), name, config, note=lambda text: None) as tracker:
        tracker.log(10, {"sft/loss": 2.0})
        tracker.log(0, {"eval/accuracy": 0.455, "time/eval_s": 2.0})
        tracker.rollouts(0, [rollout(0, "before", "1 + 1 =", text, "2", 0.0, None, 4, "length")])
        for step in (1, 2, 3):
            tracker.log(step, {"reward/mean": step / 4, "time/sample_s": 2.0, "time/learn_s": 1.0, "time/step_s": 3.0})
            tracker.rollouts(step, [rollout(step, "train", "2 + 2 =", text, "4", 0.0, -0.25, 4, "stop")])
        tracker.log(3, {"eval/accuracy": 0.93})
        tracker.rollouts(3, [rollout(3, "after", "1 + 1 =", " after", "2", 1.0, None, 4, "stop")])
    return tracker


def test_the_headline_is_the_accuracy_before_and_after(tmp_path: Path) -> None:
    run_of(tmp_path)
    page = Page(write_report(tmp_path))
    assert re.search(r"45\.5 %\s*→\s*93\.0 %\s*\+47\.5 points", page.text)
    assert "seen" in page.text


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    run_of(tmp_path)
    page = Page(write_report(tmp_path))
    assert page.count("link") == page.count("img") == page.count("iframe") == 0
    assert not [attrs for _, attrs in page.elements if {"src", "action", "data"} & set(attrs)]
    assert all(str(attrs["href"]).startswith("#") for _, attrs in page.elements if "href" in attrs)
    assert "url(" not in page.source and "@import" not in page.source and "http" not in page.text
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


@pytest.mark.parametrize("where", ["completion", "name"])
def test_what_a_model_or_a_user_wrote_is_text_and_never_markup(tmp_path: Path, where: str) -> None:
    run_of(tmp_path, **({"text": ATTACK} if where == "completion" else {"name": ATTACK}))
    page = Page(write_report(tmp_path))
    assert page.count("script") == 1 and page.count("img") == 0
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert page.text.count(ATTACK) >= 1, "it is readable as it was written"


def test_tokens_problems_and_errors_are_text_too(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingSection(wandb="disabled"), "r", {}, note=lambda text: None) as tracker:
        tracker.rollouts(1, [in_tokens([ATTACK, "'>"], 0.5, [1.0, 1.1])])
        tracker.groups(1, [0], [0.0])
    write_problems(tmp_path, [ATTACK], [ATTACK])
    (tmp_path / "errors.log").write_text(ATTACK)
    page = Page(write_report(tmp_path))
    assert page.count("script") == 1 and page.count("img") == 0
    assert page.text.count(ATTACK) == 4, "in the token, prompt and answer of the problem, and the log"


def test_the_policy_lets_exactly_our_script_run_and_our_style_count(tmp_path: Path) -> None:
    run_of(tmp_path)
    page = write_report(tmp_path).read_text("utf-8")
    for tag in ("script", "style"):
        (ours,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(ours.encode()).digest()).decode()}'" in page
    assert "unsafe" not in page


def test_rollouts_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    run_of(tmp_path, text=" wrong")
    page = Page(write_report(tmp_path))
    assert page.count("article") == 1
    article = page.source[page.source.index("<article") : page.source.index("</article>")]
    assert re.search(r"1 \+ 1 =.*before.*reward 0.* wrong.*after.*reward 1.* after", article, re.DOTALL)


def test_a_run_that_wrote_nothing_has_a_report(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert "not evaluated yet" in page.text
    assert page.count("figure") == 0


def test_one_point_and_no_finite_point_have_a_report(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingSection(wandb="disabled"), "r", {}, note=lambda text: None) as tracker:
        tracker.log(0, {"eval/accuracy": 0.5})
        tracker.log(1, {"policy/ratio_max": math.inf, "policy/grad_norm": math.nan, "time/learn_s": 0.0})
    page = Page(write_report(tmp_path))
    assert page.count("figure") == 4
    assert "max: not finite at step 1" in page.text
    assert "nan" not in "".join(str(attrs) for _, attrs in page.elements).lower()


def test_half_a_surrogate_pair_does_not_cost_the_report(tmp_path: Path) -> None:
    run_of(tmp_path, text=" \ud83d")
    assert write_report(tmp_path).is_file()


def test_a_running_and_a_killed_run_have_a_report_of_what_there_is(tmp_path: Path) -> None:
    run_of(tmp_path)
    for name in ("metrics.jsonl", "rollouts.jsonl", "groups.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"step": 4, "ti')
    page = Page(report_of(tmp_path))
    assert "93.0 %" in page.text
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "environment.json").unlink()
    assert "93.0 %" in Page(report_of(tmp_path)).text


def test_a_report_can_be_written_while_the_run_writes(tmp_path: Path) -> None:
    done = threading.Event()

    def work() -> None:
        with Tracker(tmp_path, TrackingSection(wandb="disabled"), "r", {}, note=lambda text: None) as tracker:
            for step in range(60):
                tracker.log(step, {"reward/mean": step / 60})
                tracker.rollouts(step, [in_tokens(["a"] * 50, 0.5, [1.0] * 50, step=step)])
                tracker.groups(step, [step], [0.5])
                if step % 20 == 19:
                    tracker.roll_back(step - 10)
        done.set()

    writer = threading.Thread(target=work)
    run_of(tmp_path)
    writer.start()
    written = 0
    while not done.is_set():
        Page(report_of(tmp_path))
        written += 1
    writer.join()
    assert written > 1


def test_a_folder_that_holds_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        report_of(tmp_path)


def test_problems_that_never_or_always_succeed_are_listed_with_their_words(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingSection(wandb="disabled"), "r", {}, note=lambda text: None) as tracker:
        tracker.groups(1, [0, 1, 2], [0.0, 1.0, 0.5])
        tracker.groups(2, [0, 1, 2], [0.0, 1.0, 1.0])
    write_problems(tmp_path, ["the hard one", "the easy one", "the right one", "the unseen one"], ["1", "2", "3", "4"])
    text = re.sub(r"\s+", " ", Page(write_report(tmp_path)).text)
    assert "3 of 4 training problems were sampled, in 6 groups" in text
    assert "never solved 1" in text and "sometimes 1" in text and "always 1" in text
    assert re.search(r"Never solved 1 problem problem 0: 2 groups, 0.0 % solved, last at step 2 the hard one", text)
    assert "the easy one" in text and "the right one" not in text and "the unseen one" not in text


def test_each_token_says_its_numbers_and_replies_are_marked(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingSection(wandb="disabled"), "r", {}, note=lambda text: None) as tracker:
        tracker.rollouts(1, [in_tokens(["2+2", "=4", ".", "!"], -0.5, [0.5, 1.0, None, None], reply=(1,))])
    page = Page(write_report(tmp_path))
    tokens = [attrs for tag, attrs in page.elements if tag == "span" and "data-n" in attrs]
    assert [attrs["data-n"] for attrs in tokens] == [
        "token 1 of 4, advantage -0.5, p/q 0.5",
        "token 2 of 4, written by the environment",
        "token 3 of 4, advantage -0.5, not trained on",
        "token 4 of 4, advantage -0.5, not trained on",
    ]
    assert [attrs["class"] for attrs in tokens] == ["t am3 qm3", "t reply begins", "t am3", "t am3"]


def test_rewards_of_any_size_have_a_report_in_their_own_numbers(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingSection(wandb="disabled"), "r", {}, note=lambda text: None) as tracker:
        for step, mean in enumerate((-120.0, -75.0, 30.0)):
            ends = {"eval/accuracy_low": mean - 8, "eval/accuracy_high": mean + 8}
            tracker.log(step, {"eval/accuracy": mean, **ends, "reward/mean": mean / 10, "reward/std": 4.0})
        rewards = (-90.0, -20.0, 60.0)
        tracker.rollouts(1, [rollout(1, "train", "2 + 2 =", " 5", "4", reward, 0.0, 4, "stop") for reward in rewards])
        tracker.groups(1, [0, 1, 2], [0.0, 0.5, 1.0], [-90.0, 1e6, -3.0])
    page = Page(write_report(tmp_path))
    assert "Held-out reward" in page.text and "Held-out accuracy" not in page.text
    for part in ("-120", "+150", "interval 22 to 38"):
        assert part in page.text, part
    assert "-12000" not in page.text and "points" not in page.text, "a reward is no share"
    badges = re.findall(r'class="badge (\w+)">reward ([^<]+)<', page.source)
    assert {("bad", "-90"), ("part", "-20"), ("good", "60")} == set(badges)


def test_one_evaluation_is_no_improvement() -> None:
    found = headline([{"step": 0, "time": 0.0, "stage": "rl", "eval/accuracy": 0.5}])
    assert found is not None
    assert (found["before"], found["after"]) == ("50.0 %", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"run: [\n"),
        ("config.yaml", b"- 1\n"),
        ("config.yaml", b"run: \x00\n"),
        ("environment.json", b'{"a":'),
        ("environment.json", b"\xff"),
    ],
)
def test_a_damaged_file_of_a_run_is_refused_by_name_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    run_of(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}: is damaged: ") as raised:
        report_of(tmp_path)
    assert "\n" not in str(raised.value)
