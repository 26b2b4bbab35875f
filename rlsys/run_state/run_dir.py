"""A run's directory: one driver at a time writes it, and the next driver goes on from the newest whole checkpoint.

    config.yaml      what the run computes now; config.001.yaml, ... what it was before each change that was allowed.
                     It holds the day on which the run began (prompt.date): a chat template that writes today's date
                     writes that one for ever, else the prompts would change at midnight
    run.json         facts that outlive a driver, such as the id of the wandb run, and the folder that relative paths of
                     config.yaml are of: the one in which the newest command was given
    lock             held (flock) by the driver that is at work; the system frees it when that process is gone
    checkpoints/step-000007/    what the learner needs, ledger.npz, and resume.json with step and hash of every file
    base/, adapter/             folders that appear whole or not at all
    metrics.jsonl, rollouts.jsonl, environment.json, wandb/, report.html    written by rlsys.tracking.tracker and
                                                                            rlsys.report.page

Names that begin with a dot are of writers at work, or of ones that died: the next driver puts them right.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import ValidationError

from rlsys.config import JobConfig, dump_config, keys, yaml_text
from rlsys.config.relative_paths import same_place
from rlsys.errors import CheckpointError, ConfigError, RunExistsError
from rlsys.run_state.jsonl import CONFIG, last_step
from rlsys.run_state.ledger import Ledger
from rlsys.utils.atomic_files import is_plain, remove, remove_folder, replace_file, replace_folder

LOCK, INFO, CHECKPOINTS, BASE = "lock", "run.json", "checkpoints", "base"
LEDGER, RESUME = "ledger.npz", "resume.json"
FORMAT, FORMAT_VERSION = "rlsys-resume", 1
# What decides what a run computes. The rest (where it runs, how often it is looked at) may change between drivers.
FIXED = (
    *("run.seed", "model.", "task.", "prompt.", "turns.max_turns", "turns.python_tool", "lora.", "rl."),
    *("rewards.function", "rewards.correct", "rewards.format", "rewards.length", "eval.max_tokens"),
)
MAY_CHANGE = ("rl.steps",)
PATHS = ("model.path", "task.train.path", "task.eval.path")  # may be spelled in another way
_STEP = re.compile(r"step-(\d{6,})")
_OLD = re.compile(r"\.(step-\d{6,}|base|adapter)\.old")
_KNOWN = frozenset(keys())
# What rlsys writes into a run's directory. --fresh removes this, and nothing that somebody else put there.
_WRITTEN = re.compile(
    r"lock|run\.json|config(\.\d+)?\.yaml|checkpoints|base|adapter|eval|steps|wandb|tensorboard|report\.html"
    r"|(metrics|rollouts|groups|problems)\.jsonl|environment\.json|errors\.log"
)
_TEMPORARY = re.compile(
    r"\.(step-\d{6,}|base|adapter|config|run|metrics|rollouts|groups|problems|environment|report)\..*"
)

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Resume:
    """A checkpoint, read whole; every byte is what was written."""

    path: Path
    step: int
    ledger: bytes
    files: Mapping[str, bytes]  # what the learner needs


class RunStore:
    """The directory while this process is its driver. A context manager: leaving it lets go of the lock.

    ``config`` is the job as this run computes it: with its date.
    """

    def __init__(
        self, config: JobConfig, lock: int, info: Mapping[str, Any], resume: Resume | None, note: Note
    ) -> None:
        """Use ``RunStore.open``."""
        self.run_dir = config.run_dir
        self.config = config
        self.resume = resume
        self._lock = lock
        self._info = dict(info)
        self._tell = note

    @classmethod
    def open(cls, config: JobConfig, fresh: bool = False, note: Note = print) -> RunStore:
        """Begin a run, or go on with the one in the directory; with `fresh` what rlsys wrote there is removed first.

        Raises:
            RunExistsError: another driver is at work there; the directory holds files but no run, or a run that
                computes something else; or it is a symbolic link, and `fresh` would remove files elsewhere.
            ConfigError: it cannot be made or written, or rl.steps lies below what is done.
            CheckpointError: there are checkpoints and none is whole, or there are none where there should be.
        """
        run_dir = config.run_dir
        try:
            refuse_foreign(run_dir)
            if fresh:
                _refuse_link(run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = _locked(run_dir)
            try:
                refuse_foreign(run_dir)  # nobody else writes from here on
                if fresh:
                    _empty(run_dir, note)
                return _opened(config, lock, note)
            except BaseException:
                os.close(lock)
                raise
        except OSError as error:
            raise ConfigError(
                f"run.dir {config.run.dir!r}: the run directory {run_dir} cannot be made or written: {error.strerror}"
            ) from error

    @property
    def info(self) -> Mapping[str, Any]:
        """run.json: wandb_id, started (Unix, seconds), and what ``note`` has put there."""
        return dict(self._info)

    @property
    def finished(self) -> bool:
        """The checkpoint that was found is that of the last step asked for."""
        return self.resume is not None and self.resume.step >= self.config.rl.steps

    @property
    def base(self) -> Path | None:
        """The folder of the base that this run has made, when it is there and whole."""
        path = self.run_dir / BASE
        return path if path.is_dir() else None  # one that is not whole was removed when the store was opened

    def note(self, **facts: Any) -> None:
        """Keep facts in run.json, on disk before this returns."""
        self._info |= facts
        replace_file(self.run_dir / INFO, _json(self._info))

    def save(self, step: int, files: Mapping[str, bytes], ledger: Ledger | bytes) -> Path:
        """Write the checkpoint of a step, whole or not at all; then remove all but the newest ``checkpoint.keep``.

        A ledger that goes on being used while another thread saves has to come as its bytes.

        Raises:
            CheckpointError: it cannot be written, or the ledger is not that of the step.
        """
        if isinstance(ledger, Ledger):
            if ledger.step != step:
                raise CheckpointError(f"checkpoint of step {step}: found a ledger of step {ledger.step}")
            ledger = ledger.to_bytes()
        assert not {LEDGER, RESUME} & files.keys(), f"{LEDGER} and {RESUME} are written here"
        contents = {**files, LEDGER: ledger}
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": step,
            "time": time.time(),
            "files": {name: _fact(content) for name, content in contents.items()},
        }
        contents[RESUME] = _json({**body, "digest": _digest(body)})
        folder = self.run_dir / CHECKPOINTS
        path = folder / f"step-{step:06d}"
        try:
            replace_folder(path, contents)
            for _, old in _checkpoints(self.run_dir)[self.config.checkpoint.keep :]:
                remove_folder(old)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        return path

    def latest(self) -> Resume | None:
        """The newest whole checkpoint, read now; damaged newer ones are set aside, and the user is told."""
        return _newest(self.run_dir, self._tell, set_aside=True)

    def put(self, name: str, files: Mapping[str, bytes]) -> Path:
        """Make the folder run_dir/name hold exactly these files, whole or not at all; an equal one is left.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = self.run_dir / name
        try:
            if not path.is_dir() or _content(path) != dict(files):
                replace_folder(path, files)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        return path

    def close(self) -> None:
        """Let go of the lock. A second call does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def newest(run_dir: Path, note: Note = print) -> Resume | None:
    """The newest whole checkpoint of a run that another process may be writing, None without any; changes nothing.

    Raises:
        CheckpointError: there are some, and none is whole.
    """
    return _newest(run_dir, note, set_aside=False)


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps after which a checkpoint is there, ascending; none has been read."""
    return sorted(step for step, _ in _checkpoints(run_dir))


def read_checkpoint(run_dir: Path, step: int) -> Resume:
    """The checkpoint after that step; changes nothing.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return _read(run_dir / CHECKPOINTS / f"step-{step:06d}", step)


def read_info(run_dir: Path) -> dict[str, Any]:
    """The facts of a run that outlive its drivers.

    Raises:
        RunExistsError: they are missing or damaged.
    """
    return _info(run_dir)


def day_of(run_dir: Path) -> str | None:
    """The day (ISO 8601) on which the run in the directory began, as its chat template writes it; None: no run."""
    try:
        tree = yaml_text.read((run_dir / CONFIG).read_text("utf-8"), JobConfig, CONFIG)
        day = (tree.get("prompt") or {}).get("date")
        if day is not None:
            return str(day)
        started = json.loads((run_dir / INFO).read_bytes())["started"]  # of an rlsys that kept no date
        return date.fromtimestamp(started).isoformat()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # whether there is a run, and a whole one, is for others to say


def folder_of_command(run_dir: Path) -> Path:
    """The folder in which a run's newest command was given, to which its relative paths belong; of a run that has not
    written it down, the current one."""
    try:
        return Path(json.loads((run_dir / INFO).read_bytes())["folder"])
    except (OSError, ValueError, TypeError, KeyError):
        return Path.cwd()


def refuse_foreign(run_dir: Path) -> None:
    """Raises RunExistsError where the directory holds files that are no run of rlsys."""
    if not run_dir.is_dir() or _is_run(run_dir):
        return
    begun = {LOCK, INFO, "eval"}  # of a driver that died before the configuration was written, or of `rlsys eval`
    found = sorted(path.name for path in run_dir.iterdir() if path.name not in begun and not _is_temporary(path))
    if found:
        raise RunExistsError(
            f"{run_dir} holds files ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}) but no run of rlsys "
            f"({INFO} and a {CONFIG} that is a job's), so it is left alone, with --fresh too. Give the run "
            "another name (run.name=...) or run.dir; a run whose files are damaged has to be removed by hand"
        )


def _is_run(run_dir: Path) -> bool:
    """By what an rlsys wrote: other programs have a config.yaml too."""
    try:
        tree = yaml_text.read((run_dir / CONFIG).read_text("utf-8"), JobConfig, CONFIG)
        whole = {"run", "model"} <= tree.keys() <= JobConfig.model_fields.keys()
        if whole and all(isinstance(tree[name], dict) for name in ("run", "model")) and "name" in tree["run"]:
            return True
    except FileNotFoundError:
        return False  # it is written last, and removed last
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # damaged, or of something else
    try:
        return {"wandb_id", "started"} <= json.loads((run_dir / INFO).read_bytes()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _refuse_link(run_dir: Path) -> None:
    if run_dir.is_symlink():
        raise RunExistsError(
            f"{run_dir} is a symbolic link to {run_dir.resolve()}, where --fresh removes nothing; give its folder "
            "itself (run.dir=... run.name=...), or remove the link"
        )


def refuse_changes(config: JobConfig, run_dir: Path) -> None:
    """Raises RunExistsError where `config` computes something else than the run in the directory."""
    path = run_dir / CONFIG
    ways = "give this run another name (run.name=...), or start over with --fresh, which removes what is there"
    try:
        found = yaml_text.read(path.read_text("utf-8"), JobConfig, str(path))
        # keys that this rlsys no longer has fall away, and new ones had their defaults
        before = JobConfig.model_validate(_known(found))
    except (ConfigError, ValidationError, AttributeError, UnicodeDecodeError) as error:
        why = str(error).splitlines()[0]
        raise RunExistsError(f"{path} is no configuration that this rlsys can read ({why}); {ways}") from error
    day = day_of(run_dir)
    if day is not None:
        before, config = before.dated(day), config.dated(day)
    old, new = _flat(before.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    was, is_now = _flat(before.model_dump()), _flat(config.model_dump())
    for key in PATHS:
        if key in was and key in is_now and same_place(was[key], is_now[key], folder_of_command(run_dir)):
            old[key] = new[key]
    changed = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key.startswith(FIXED) and key not in MAY_CHANGE and old.get(key) != new.get(key)
    ]
    if changed:
        raise RunExistsError(
            f"{run_dir} holds a run that computes something else: {'; '.join(changed)}. Set the old values to go on "
            f"with it, {ways}"
        )


def _opened(config: JobConfig, lock: int, note: Note) -> RunStore:
    """The store of a directory that is locked and holds a run or nothing."""
    run_dir = config.run_dir
    config = config.dated(day_of(run_dir) or date.today().isoformat())
    if not (run_dir / CONFIG).is_file():
        info: dict[str, Any] = {"wandb_id": secrets.token_hex(5), "started": time.time(), "folder": str(Path.cwd())}
        replace_file(run_dir / INFO, _json(info))
        replace_file(run_dir / CONFIG, dump_config(config).encode())  # last: it makes the directory a run
        return RunStore(config, lock, info, None, note)
    refuse_changes(config, run_dir)
    info = _info(run_dir)
    _sweep(run_dir, note)
    resume = _newest(run_dir, note, set_aside=True)
    if resume is None:
        _refuse_lost(run_dir)
    elif resume.step > config.rl.steps:
        raise ConfigError(
            f"rl.steps {config.rl.steps}: {run_dir} has made {resume.step} steps, and what was learned in the last "
            f"{resume.step - config.rl.steps} cannot be taken back. Set rl.steps={resume.step} or more, give this run "
            "another name (run.name=...), or start over with --fresh"
        )
    _check_base(run_dir / BASE, note)
    _keep_config(run_dir, dump_config(config).encode(), note)
    if info.get("folder") != str(Path.cwd()):
        info["folder"] = str(Path.cwd())
        replace_file(run_dir / INFO, _json(info))
    return RunStore(config, lock, info, resume, note)


def _info(run_dir: Path) -> dict[str, Any]:
    path = run_dir / INFO
    try:
        info = json.loads(path.read_bytes())
        return {**info, "wandb_id": str(info["wandb_id"])}
    except FileNotFoundError:
        why = f"it has no {INFO}, so an rlsys wrote it that kept no checkpoints"
    except (ValueError, TypeError, KeyError) as error:
        why = f"{INFO} is damaged ({error})"
    raise RunExistsError(
        f"{run_dir} holds a run that cannot be gone on with: {why}. Give this run another name (run.name=...), or "
        "start over with --fresh, which removes what is there"
    )


def _refuse_lost(run_dir: Path) -> None:
    """Beginning anew where steps were made, because somebody removed the checkpoints, would destroy their figures."""
    done = last_step(run_dir)
    if done > 0:
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS}: found no checkpoint, though figures of {done} steps were written; start over "
            "with --fresh, which removes them too, or give this run another name (run.name=...)"
        )


def _keep_config(run_dir: Path, new: bytes, note: Note) -> None:
    path = run_dir / CONFIG
    old = path.read_bytes()
    if old == new:
        return
    taken = [int(found[1]) for file in run_dir.iterdir() if (found := re.fullmatch(r"config\.(\d+)\.yaml", file.name))]
    kept = run_dir / f"config.{max(taken, default=0) + 1:03d}.yaml"
    replace_file(kept, old)
    replace_file(path, new)
    note(f"{path}: holds the changed configuration from now on; the one before is {kept.name}")


def _check_base(path: Path, note: Note) -> None:
    """A base that is not whole is removed: it will be made again."""
    if not path.is_dir():
        return
    from rlsys.modeling.base_model import MANIFEST, pack_folder  # torch is loaded only where a base will be

    manifest = path / MANIFEST
    if manifest.is_file() and manifest.read_bytes() == pack_folder(path)[MANIFEST]:
        return
    note(f"{path}: does not match its manifest, so it is damaged; it is removed and made again")
    remove_folder(path)


def _known(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The part of a configuration whose keys this rlsys has."""
    kept = {}
    for name, value in tree.items():
        key = prefix + name
        is_section = any(known.startswith(key + ".") for known in _KNOWN)
        if is_section and isinstance(value, dict):
            kept[name] = _known(value, key + ".")
        elif is_section or key in _KNOWN:
            kept[name] = value
    return kept


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and key not in _KNOWN:
            found |= _flat(value, key + ".")
        elif value is not None:  # a section that is left out, as model.make, and a key without value are one
            found[key] = value
    return found


def _locked(run_dir: Path) -> int:
    """The lock file's descriptor, locked. It is not inherited, so nothing that a dead driver started holds it."""
    handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.pread(handle, 1000, 0))
        os.close(handle)
        raise RunExistsError(
            f"{run_dir}: another driver is at work there ({holder}). Wait for it or end it (Ctrl-C ends it after its "
            "step), or give this run another name (run.name=...)"
        ) from None
    except BaseException:
        os.close(handle)
        raise
    os.ftruncate(handle, 0)
    os.pwrite(handle, _json({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}), 0)
    return handle


def _holder(content: bytes) -> str:
    try:
        found = json.loads(content)
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, TypeError, KeyError):
        return "it has not said its process id yet"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z")


def _empty(run_dir: Path, note: Note) -> None:
    """Remove what rlsys wrote, but the lock; config.yaml goes last: a directory half emptied still counts as a run."""
    others = []
    for path in sorted(run_dir.iterdir(), key=lambda path: path.name == CONFIG):
        if path.name == LOCK:
            continue
        if _WRITTEN.fullmatch(path.name) or _is_temporary(path):
            remove(path)
        else:
            others.append(path.name)
    if others:
        note(f"{run_dir}: --fresh leaves what no rlsys wrote: {', '.join(sorted(others))}")


def _sweep(run_dir: Path, note: Note) -> None:
    """Put right what writers left that died: half a folder vanishes, one that stepped aside for it comes back."""
    for path in [*run_dir.iterdir(), *_entries(run_dir / CHECKPOINTS)]:
        old = _OLD.fullmatch(path.name)
        if old and not (path.parent / old[1]).exists():
            os.rename(path, path.parent / old[1])
        elif _is_temporary(path):
            note(f"{path.parent}: {path.name} was left by a driver that died while writing it; removed")
            remove(path)


def _is_temporary(path: Path) -> bool:
    """Of ``rlsys.utils.atomic_files``."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder), newest first."""
    named = ((_STEP.fullmatch(path.name), path) for path in _entries(run_dir / CHECKPOINTS))
    return sorted(((int(found[1]), path) for found, path in named if found), reverse=True)


def _newest(run_dir: Path, note: Note, set_aside: bool) -> Resume | None:
    complaints = []
    for step, path in _checkpoints(run_dir):
        try:
            resume = _read(path, step)
        except (CheckpointError, OSError) as error:
            complaints.append(str(error))
            continue
        for complaint in complaints:
            note(f"{complaint}; going on from step {resume.step} instead")
        if set_aside:
            for later, damaged in _checkpoints(run_dir):
                if later > step:
                    _set_aside(damaged)
        return resume
    if complaints:
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS}: none of {len(complaints)} checkpoints is whole, so the run cannot be gone on "
            f"with: {'; '.join(complaints)}. Start over with --fresh, or give this run another name (run.name=...)"
        )
    return None


def _set_aside(path: Path) -> None:
    """Keep a damaged checkpoint for whoever wants to know why, under a name that nothing reads."""
    target = path.with_name(f"damaged-{path.name}")
    remove(target)
    os.rename(path, target)


def _read(path: Path, step: int) -> Resume:
    try:
        body = json.loads((path / RESUME).read_bytes())
        digest = body.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: {RESUME} is missing or damaged ({type(error).__name__}: {error})") from error
    if digest != _digest(body):
        raise CheckpointError(f"{path}: {RESUME} does not match its own hash: it was changed or is damaged")
    if (body.get("format"), body.get("format_version"), body.get("step")) != (FORMAT, FORMAT_VERSION, step):
        found = {key: body.get(key) for key in ("format", "format_version", "step")}
        raise CheckpointError(f"{path}: {RESUME}: found {found}; wanted {FORMAT} {FORMAT_VERSION} of step {step}")
    contents = {}
    for name, fact in body["files"].items():
        if not is_plain(name):
            raise CheckpointError(f"{path}: {RESUME} names the file {name!r}, which leaves the folder")
        try:
            contents[name] = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error.strerror}") from error
        if _fact(contents[name]) != fact:
            raise CheckpointError(
                f"{path}: {name} does not match its hash (found {len(contents[name])} bytes, wanted {fact['bytes']}): "
                "it was changed or is damaged"
            )
    return Resume(path, step, contents.pop(LEDGER), contents)


def _fact(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "blake2b": hashlib.blake2b(content, digest_size=16).hexdigest()}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _content(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
