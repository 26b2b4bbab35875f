"""SQLite file of a server: what must outlast its processes. One process writes it; it is kept beside the checkpoints.

Rows of sessions, models and samplers are read at the start of a controller (`rlsys.serve.recovery`); rows of runs and
checkpoints are read by every listing.

A full disk: `reserve` keeps room inside the file, with which calls and sessions go on. When that is used up, a write
that a client waits for raises StorageError, and a write that follows from a client's leaving (`eventually`) is kept in
memory and repeated.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlsys.errors import StorageError
from rlsys.serve.errors import BusyError

NAME = "serve.sqlite3"
VERSION = 1  # of the tables; a file of another version is refused
# Another process may hold the file for this long. Then writes fail at once until one succeeds: they are made on the
# event loop, which must answer meanwhile.
BUSY_S = 2.0
RESERVE_BYTES = 4 * 2**20  # about 8,000 sessions or models; a call's rows replace those of earlier calls
TABLES = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE sessions (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created_at TEXT NOT NULL, seen_at REAL NOT NULL,
    tags TEXT NOT NULL, user_metadata TEXT NOT NULL, display_name TEXT, sdk_version TEXT NOT NULL,
    ended TEXT, finish_reason TEXT
) STRICT;
CREATE TABLE models (
    id TEXT PRIMARY KEY, session_id TEXT NOT NULL REFERENCES sessions ON DELETE CASCADE, number INTEGER NOT NULL,
    base TEXT NOT NULL, base_model TEXT NOT NULL, lora TEXT,
    next INTEGER NOT NULL, failed_passes INTEGER NOT NULL, unstepped INTEGER NOT NULL
) STRICT;
CREATE TABLE calls (
    id TEXT PRIMARY KEY, model_id TEXT NOT NULL REFERENCES models ON DELETE CASCADE, seq INTEGER NOT NULL,
    number INTEGER, is_pass INTEGER NOT NULL, outcome TEXT
) STRICT;
CREATE UNIQUE INDEX calls_of_model ON calls (model_id, seq);
CREATE TABLE samplers (
    id TEXT PRIMARY KEY, session_id TEXT NOT NULL REFERENCES sessions ON DELETE CASCADE, number INTEGER NOT NULL,
    base TEXT NOT NULL, base_model TEXT NOT NULL, path TEXT, is_ephemeral INTEGER NOT NULL,
    snapshot TEXT, released TEXT
) STRICT;
CREATE TABLE runs (id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created_at TEXT NOT NULL, record TEXT NOT NULL) STRICT;
CREATE INDEX runs_of_tenant ON runs (tenant, created_at);
CREATE TABLE checkpoints (
    tenant TEXT NOT NULL, run_id TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
    time TEXT NOT NULL, expires_at TEXT, public INTEGER NOT NULL, record TEXT NOT NULL,
    PRIMARY KEY (tenant, run_id, kind, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX checkpoints_of_run ON checkpoints (run_id, kind, name);
CREATE INDEX checkpoints_that_expire ON checkpoints (expires_at) WHERE expires_at IS NOT NULL;
"""
Value = str | int | float | None
Row = Mapping[str, Value]
DAMAGED = (
    "stop what uses it and put a copy of it back, or move it and its -wal and -shm files away: the next start finds "
    "the checkpoints in their folders, and loses sessions, metadata and expiry"
)
log = logging.getLogger("rlsys.serve")


_FREE = ("freelist_count", "page_size")


class Database:
    """One connection, which threads share. A write is on disk when the machine keeps power; see `synchronous` below.

    Raises:
        StorageError: the file cannot be opened or written, is damaged, or has tables of another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._pending: dict[str, Callable[[], object]] = {}
        self._refusal: StorageError | None = None  # why `_pending` waits
        self._is_held = False  # by another process, at the last write
        with self._reported():
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)  # before SQLite makes it with the umask's mode
            os.close(descriptor)
            self._connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._connection.close()
                raise

    def _open(self) -> None:
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")  # kill -9 loses nothing; a power cut the last writes
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._check_version()
        (found,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise StorageError(f"{self._path}: is damaged ({' '.join(found.split())[:200]}); {DAMAGED}")
        with self.together():  # one process holds the right to write
            pass

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def read(self, query: str, values: Sequence[Value] = ()) -> list[Row]:
        with self._lock, self._reported():
            return self._connection.execute(query, values).fetchall()

    def write(self, statement: str, values: Sequence[Value] = ()) -> int:
        """Returns the number of changed rows."""
        with self._lock, self._reported():
            changed = self._connection.execute(statement, values).rowcount
            self._note_free()
            return changed

    @contextmanager
    def together(self) -> Iterator[None]:
        """Writes of the block take effect together or not at all, and other threads' writes wait."""
        with self._lock, self._reported():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
                self._note_free()
            except BaseException:
                if self._connection.in_transaction:  # on some errors, such as a full disk, SQLite has ended it
                    self._connection.execute("ROLLBACK")
                raise

    def eventually(self, key: str, write: Callable[[], object]) -> None:
        """Make a write that no client waits for: UPDATE or DELETE. While the disk refuses, it is kept in memory, where
        it replaces an earlier one of its key, and is repeated by `flush` in order."""
        with self._lock:
            self._pending.pop(key, None)
            self._pending[key] = write
            self.flush()

    def flush(self) -> None:
        """Repeat writes that the disk refused."""
        with self._lock:
            for key, write in list(self._pending.items()):
                try:
                    write()
                except StorageError as error:
                    if self._refusal is None:
                        log.error("%s; what follows from calls is kept in memory until the disk takes it", error)
                    self._refusal = error
                    return
                del self._pending[key]
            if self._refusal is not None:
                log.warning("%s: is written again", self._path)
                self._refusal = None

    def catch_up(self) -> None:
        """
        Raises:
            StorageError: the disk still refuses earlier writes.
        """
        with self._lock:
            self.flush()
            if self._refusal is not None:
                raise self._refusal

    @property
    def pending(self) -> int:
        """Writes that the disk has not taken yet."""
        return len(self._pending)

    def reserve(self) -> None:
        """Keep RESERVE_BYTES of free pages in the file and in its log: a full disk takes writes into them."""
        with self._lock, self._reported():
            (pages,), (page,) = (self._connection.execute(f"PRAGMA {each}").fetchone() for each in _FREE)
            if pages * page >= RESERVE_BYTES / 2 and self._log_bytes() >= RESERVE_BYTES / 2:
                return
            with self.together():
                self._connection.execute("CREATE TABLE IF NOT EXISTS reserve (content BLOB) STRICT")
                self._connection.execute("INSERT INTO reserve VALUES (zeroblob(?))", (RESERVE_BYTES,))
            # The log keeps its size, and the file these pages. A table that is dropped in the same transaction would
            # not have been written.
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._connection.execute("DROP TABLE reserve")

    def _log_bytes(self) -> int:
        try:
            return os.stat(f"{self._path}-wal").st_size
        except FileNotFoundError:
            return 0

    def put(self, table: str, row: Row) -> None:
        """Insert a row, or replace the columns of the one with its key."""
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        key = {"checkpoints": "tenant, run_id, kind, name", "settings": "name"}.get(table, "id")
        updates = ", ".join(f"{name} = excluded.{name}" for name in row)
        self.write(
            f"INSERT INTO {table} ({names}) VALUES ({marks}) ON CONFLICT ({key}) DO UPDATE SET {updates}",
            tuple(row.values()),
        )

    def setting(self, name: str, default: str) -> str:
        """The value of a setting, which is `default` from now on if there was none."""
        with self.together():
            self.write("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, default))
            (row,) = self.read("SELECT value FROM settings WHERE name = ?", (name,))
        return str(row["value"])

    def _check_version(self) -> None:
        (found,) = self._connection.execute("PRAGMA user_version").fetchone()
        if found == 0:
            self._connection.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        elif found != VERSION:
            raise StorageError(
                f"{self._path}: has tables of version {found}; this rlsys reads version {VERSION}: start the rlsys "
                "that wrote it, or choose another folder (checkpoints)"
            )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            failure = self._failure(error)
            if isinstance(failure, BusyError) and not self._is_held:
                self._is_held = True
                self._connection.execute("PRAGMA busy_timeout = 0")
            raise failure from error
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written: {error.strerror}") from error

    def _note_free(self) -> None:
        """A write succeeded."""
        if self._is_held:
            self._is_held = False
            self._connection.execute(f"PRAGMA busy_timeout = {round(BUSY_S * 1000)}")

    def _failure(self, error: sqlite3.Error) -> StorageError:
        match getattr(error, "sqlite_errorcode", 0) & 0xFF:  # without the extended part
            case sqlite3.SQLITE_FULL:
                return StorageError(f"{self._path}: cannot be written: the disk is full; make room")
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return BusyError(
                    f"{self._path}: another process has locked it for more than {BUSY_S:g} s; end that process "
                    "(`fuser -v` with this file names it)"
                )
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                return StorageError(f"{self._path}: cannot be written: {error}; make file and folder writable")
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return StorageError(f"{self._path}: is damaged ({error}); {DAMAGED}")
        return StorageError(f"{self._path}: {error}")
