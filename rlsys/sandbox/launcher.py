"""Program that rlsys.sandbox.run_python starts: confines a child process, runs the code in it, and ends with it.

The child sees no network, no processes outside its namespace and no environment variables. Of the file system it sees
what Python needs, read-only, and a temporary folder in memory. It has no privileges, and limited resources. Where the
kernel refuses any of this, the code does not run. This program imports only the standard library, not the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys

REFUSED = 97  # exit code: no code was run; stdout has the reason
NEWNS, NEWUSER, NEWIPC, NEWPID, NEWNET = 0x20000, 0x10000000, 0x8000000, 0x20000000, 0x40000000  # sched.h
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE, DETACH = 1, 2, 4, 32, 4096, 16384, 1 << 18, 2  # sys/mount.h
SET_PDEATHSIG, SET_NO_NEW_PRIVS = 1, 38  # sys/prctl.h
HOME, CODE = "/sandbox", "main.py"
SYSTEM = ("/usr", "/lib", "/lib64")
FIRST_USER = 1_000_000_000  # above every real user id, so that no other process counts toward the limit

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    if getattr(libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main() -> int:
    """argv: limits and paths as JSON; stdin: the code; stdout: stdout and stderr of the code."""
    wanted = json.loads(sys.argv[1])
    call("prctl", SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != wanted["owner"]:
        return refuse("the owner has gone")
    code = sys.stdin.buffer.read()
    error_read, error_write = os.pipe2(os.O_CLOEXEC)
    try:
        user = unshare()
    except OSError as error:
        return refuse(str(error))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # no SIGTERM between fork() and the handler below
    child = os.fork()
    if child == 0:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            confine(wanted, code, user)
            os.execve(wanted["python"], [wanted["python"], "-I", "-B", CODE], {})
        except BaseException as error:
            os.write(error_write, f"{type(error).__name__}: {error}".encode())
        os._exit(REFUSED)
    # The child is process 1 of its namespace, so all that it starts dies with it, in any group or session. SIGTERM asks
    # this process to end, or reports that its owner has ended.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.close(error_write)
    with open(error_read, "rb") as pipe:
        error_text = pipe.read().decode()  # empty once the code runs
    os.waitpid(child, 0)
    with contextlib.suppress(OSError):  # nothing is mounted if confine() failed early
        call("umount2", wanted["root"].encode(), DETACH)
    os.rmdir(wanted["root"])
    return refuse(error_text) if error_text else 0


def refuse(why: str) -> int:
    print(why, flush=True)
    return REFUSED


def unshare() -> int | None:
    """Enter new namespaces; returns the user id to switch to if this process is root, else None."""
    apart = NEWNS | NEWPID | NEWNET | NEWIPC
    if os.getuid() == 0:
        call("unshare", apart)
        return FIRST_USER + os.getpid()
    user, group = os.getuid(), os.getgid()
    call("unshare", apart | NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return None


def confine(wanted: dict[str, object], code: bytes, user: int | None) -> None:
    """Apply all restrictions on the code before it is executed."""
    beyond = [name for _, name in socket.if_nameindex() if name != "lo"]
    if beyond:
        raise OSError(f"the network namespace has {beyond}")
    enter_file_system(wanted, code, user)
    limits = wanted["limits"]
    assert isinstance(limits, dict)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    call("prctl", SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.dup2(1, 2)


def enter_file_system(wanted: dict[str, object], code: bytes, user: int | None) -> None:
    call("mount", b"none", b"/", None, REC | PRIVATE, None)
    root, paths = str(wanted["root"]), wanted["paths"]
    assert isinstance(paths, list)
    size = f"size={wanted['files_mb']}m,nr_inodes=4096,mode=755"
    call("mount", b"tmpfs", root.encode(), b"tmpfs", NOSUID | NODEV, size.encode())
    shown: list[str] = []
    for path in [*SYSTEM, *paths]:
        inside = root + path
        if not os.path.exists(path) or any(path == other or path.startswith(other + "/") for other in shown):
            continue
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        os.makedirs(inside, exist_ok=True)
        call("mount", path.encode(), inside.encode(), None, BIND | REC, None)
        call("mount", None, inside.encode(), None, REMOUNT | BIND | RDONLY | NOSUID | NODEV, None)
        shown.append(path)
    home = root + HOME
    os.makedirs(home)
    with open(f"{home}/{CODE}", "wb") as file:
        file.write(code)
    if user is not None:
        os.chown(home, user, user)
    os.chroot(root)
    os.chdir(HOME)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
