"""Claims about code that a model wrote: what it can reach, what it can take, and what is left of it."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from rlsys.config import parse_config
from rlsys.environments.multi_turn import Conversations
from rlsys.errors import ConfigError
from rlsys.sandbox import launcher
from rlsys.sandbox.run_python import Sandbox
from rlsys.tasks.python_tool import PythonTool
from tests.waiting import times, until

SANDBOX = Sandbox(seconds=10.0, cpu_s=2)


def why_not() -> str:
    """Why code cannot be confined here; "" where it can."""
    try:
        SANDBOX.check()
    except ConfigError as error:
        return str(error)
    return ""


WHY_NOT = why_not()
confined = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def sandboxed_processes() -> list[int]:
    """Of this machine, whoever started them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[-2:-1] == [b"main.py"] or launcher.__file__.encode() in words:
                found.append(int(folder.name))
    return found


@confined
def test_what_is_written_comes_back_from_both_streams() -> None:
    assert SANDBOX.run("import sys\nprint(6 * 7, flush=True)\nprint('ouch', file=sys.stderr)") == "42\nouch\n"
    assert "ZeroDivisionError" in SANDBOX.run("1 / 0")
    assert "SyntaxError" in SANDBOX.run("1 +")
    assert SANDBOX.run("") == ""
    assert SANDBOX.run("print('ü', end='')") == "ü"


@confined
def test_there_is_no_network_not_even_this_machines_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()  # from outside it is there
        tries = "\n".join(
            f"try: socket.create_connection({address!r}, timeout=2); print('connected')\n"
            "except OSError as error: print(type(error).__name__, error.errno)"
            for address in (("127.0.0.1", port), ("8.8.8.8", 53))
        )
        assert SANDBOX.run(f"import socket\n{tries}") == "OSError 101\nOSError 101\n"


@confined
def test_neither_files_nor_secrets_of_this_machine_are_in_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("swordfish")
    secret.chmod(0o644)
    monkeypatch.setenv("RLSYS_TEST_TOKEN", "swordfish")
    tried = SANDBOX.run(
        "import os\n"
        "print(sorted(set(os.environ) - {'LC_CTYPE'}), os.path.exists('/proc'), os.path.exists('/etc'), os.getpid())\n"
        f"print(os.path.exists({str(secret)!r}), os.path.exists({__file__!r}))\n"
    )
    assert tried == "[] False False 1\nFalse False\n"


@confined
def test_files_are_gone_afterwards_and_the_system_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other processes of the tests have sandboxes in /tmp
    assert SANDBOX.run("open('a', 'w').write('x'); print(open('a').read())") == "x\n"
    assert "FileNotFoundError" in SANDBOX.run("open('a')")
    for path in ("/usr/x", "/x", f"{sys.prefix}/x", f"{sys.base_prefix}/x"):
        assert "Error" in SANDBOX.run(f"open({path!r}, 'w')")
        assert not Path(path).exists()
    assert not list(tmp_path.iterdir())


@confined
def test_privileges_cannot_be_had_back() -> None:
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.unshare(0x10000000), libc.mount(b'none', b'/sandbox', b'tmpfs', 0, None), libc.chroot(b'/usr'))\n"
        "for limit in ('RLIMIT_NPROC', 'RLIMIT_DATA'):\n"
        "    import resource\n"
        "    try: resource.setrlimit(getattr(resource, limit), (2**40, 2**40)); print('raised')\n"
        "    except (ValueError, PermissionError) as error: print(type(error).__name__)\n"
    )
    assert SANDBOX.run(code) == "-1 -1 -1\nValueError\nValueError\n"


@confined
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = bytearray(2**30)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(2**20))", "MemoryError"),
        ("open('a', 'wb').write(bytes(2**25))", "OSError"),
        ("for i in range(10**5): open(str(i), 'w').write('x')", "OSError"),
        ("files = [open('main.py') for _ in range(1000)]", "Too many open files"),
        ("import os\nwhile True: os.fork()", "BlockingIOError"),
        (
            "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(2,)).start()",
            "can't start new thread",
        ),
        ("while True: print('x' * 1000)", "[cut]"),
    ],
)
def test_what_it_takes_is_bounded(code: str, said: str) -> None:
    written = Sandbox(seconds=600.0).run(code)
    assert said in written and "stopped after" not in written
    assert len(written) <= Sandbox().output_characters + 50


@confined
def test_the_wall_clock_ends_it_with_all_that_it_started() -> None:
    code = (
        "import ctypes, os, time\n"
        "ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"  # whoever started it may die without it noticing
        "for _ in range(2):\n"
        "    if os.fork() == 0: os.setsid()\n"  # out of the process group
        "print('here', flush=True)\n"
        "time.sleep(1e5)\n"
    )
    before, seconds = sandboxed_processes(), 2.0 * times()
    written = Sandbox(seconds=seconds).run(code)
    assert written.startswith("here") and written.endswith(f"[stopped after {seconds:g} s]")
    assert set(sandboxed_processes()) <= set(before)


@confined
def test_busy_processes_end_by_their_own_limit_of_cpu_time() -> None:
    assert Sandbox(seconds=600.0, cpu_s=1).run("while True: pass") == ""


@confined
def test_what_is_left_running_in_the_background_ends_with_the_first_process() -> None:
    before = sandboxed_processes()
    code = "import os, time\nif os.fork() == 0: time.sleep(1e5)\nelse: print('done')"
    assert Sandbox(seconds=600.0).run(code) == "done\n"
    assert set(sandboxed_processes()) <= set(before)


def sandbox_folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("rlsys-sandbox-*"))


@confined
def test_nothing_outlives_an_owner_that_is_killed() -> None:
    code = "import ctypes, time; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); print(1); time.sleep(1e5)"
    program = f"from rlsys.sandbox.run_python import Sandbox; Sandbox(seconds=50000.0).run({code!r})"
    before, folders = set(sandboxed_processes()), set(sandbox_folders())
    owner = subprocess.Popen([sys.executable, "-c", program])
    until(lambda: len(set(sandboxed_processes()) - before) == 2, "two processes", process=owner)
    owner.kill()
    owner.wait()
    until(lambda: not set(sandboxed_processes()) - before, "both to end", state=sandboxed_processes)
    until(
        lambda: set(sandbox_folders()) <= folders, "the folder to go", state=sandbox_folders
    )  # the launcher's last act


@confined
def test_several_at_once_do_not_share_a_limit() -> None:
    code = "import threading\nthreads = [threading.Thread(target=lambda: None) for _ in range(4)]\n" + (
        "for t in threads: t.start()\nfor t in threads: t.join()\nprint('all')"
    )
    found: list[str] = []
    runs = [threading.Thread(target=lambda: found.append(SANDBOX.run(code))) for _ in range(4)]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert found == ["all\n"] * 4


def test_where_the_kernel_refuses_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A launcher in which unshare fails, as it does in a container that forbids it."""
    source = Path(launcher.__file__).read_text()
    forbidden = source.replace('call("unshare", apart', 'call("unshare", -1')
    assert forbidden != source
    other = tmp_path / "launch.py"
    other.write_text(forbidden)
    monkeypatch.setattr(launcher, "__file__", str(other))
    with pytest.raises(
        ConfigError, match=r"turns\.python_tool: this machine cannot confine a process .*unshare: .*no code was run"
    ):
        SANDBOX.check()


@confined
def test_a_block_at_the_end_of_a_turn_is_run_and_its_output_is_the_reply() -> None:
    block = "Let me see.\n```python\nprint(34 * 87)\n```"
    assert PythonTool.reply([f"{block}\n```output"], "") == "\n2958\n```\n"
    assert PythonTool.reply([block], "") == "```output\n2958\n```\n"
    assert PythonTool.reply(["```python\n```"], "") == "```output\n\n```\n"
    two = "```python\nprint(1)\n```\n```output\n1\n```\n```python\nprint(2)\n```\n```output"
    assert PythonTool.reply([two], "") == "\n2\n```\n"
    for last in ("\\boxed{3}", f"{block}\nSo it is \\boxed{{2958}}", "```python\nprint(1)", "```\nprint(1)\n```", ""):
        assert PythonTool.reply([block, last], "") is None


def test_the_tool_is_off_until_the_job_says_so(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{i}+1?", "answer": "{i + 1}"}}\n' for i in range(40)))
    job = "run: {name: x}\nmodel: {path: x}\n"
    task = f"task: {{name: NAME, train: {{path: {rows}}}, columns: {{}}, eval_share: 0.3}}"
    with pytest.raises(ConfigError, match=r"set turns\.python_tool: true to allow that"):
        parse_config(job + task.replace("NAME", "python"))
    parse_config(job + task.replace("NAME", "python"), ["turns.python_tool=true"])
    own = parse_config(job + task.replace("NAME", "rlsys.tasks.python_tool:PythonTool"))  # as a task of one's own
    with pytest.raises(ConfigError, match=r"turns\.python_tool: found false; task 'rlsys\.tasks\..*' runs code"):
        Conversations.start(own, tmp_path, None)  # type: ignore[arg-type]  # refused before it looks at the sampler
