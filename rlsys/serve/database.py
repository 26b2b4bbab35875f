"""SQLite file of a server: what must outlast its processes. One process writes it; it is kept beside the checkpoints.

Rows of sessions, models and samplers are read at the start of a controller (`rlsys.serve.recovery`); rows of runs and
checkpoints are read by every listing.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlsys.errors import StorageError

NAME = "serve.sqlite3"
VERSION = 1  # of the tables; a file of another version is refused
BUSY_S = 10.0  # another process, such as a backup, may hold the file for this long
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


class Database:
    """One connection, which threads share. A write is on disk when the machine keeps power; see `synchronous` below.

    Raises:
        StorageError: the file cannot be opened or written, is damaged, or has tables of another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        with self._reported():
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)  # before SQLite makes it with the umask's mode
            os.close(descriptor)
            self._connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(
                "PRAGMA synchronous = NORMAL"
            )  # kill -9 loses nothing; a power cut the last writes
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._check_version()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def read(self, query: str, values: Sequence[Value] = ()) -> list[Row]:
        with self._lock, self._reported():
            return self._connection.execute(query, values).fetchall()

    def write(self, statement: str, values: Sequence[Value] = ()) -> int:
        """Returns the number of changed rows."""
        with self._lock, self._reported():
            return self._connection.execute(statement, values).rowcount

    @contextmanager
    def together(self) -> Iterator[None]:
        """Writes of the block take effect together or not at all, and other threads' writes wait."""
        with self._lock, self._reported():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

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
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"{self._path}: {error}") from error
