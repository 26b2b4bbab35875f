"""Started by rlsys.sandbox.run_python as a program of its own: confines a child process, has it run the code, and ends
with it.

The child sees no network, no process but its own, no environment variable, and of the file system only what Python
needs, read-only, and a folder of its own in memory that nothing is left of. It has no privilege, and limits. Where the
kernel does not give all of this, the code does not run. Only the standard library is here: this is no part of the
package while it runs.
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

REFUSED = 97  # exit code: nothing was run; stdout says why
NEWNS, NEWUSER, NEWIPC, NEWPID, NEWNET = 0x20000, 0x10000000, 0x8000000, 0x20000000, 0x40000000  # sched.h
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE, DETACH = 1, 2, 4, 32, 4096, 16384, 1 << 18, 2  # sys/mount.h
SET_PDEATHSIG, SET_NO_NEW_PRIVS = 1, 38  # sys/prctl.h
HOME, CODE = "/sandbox", "main.py"
SYSTEM = ("/usr", "/lib", "/lib64")
FIRST_USER = 1_000_000_000  # far from every real one, so that nobody else's processes count for the limit

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    if getattr(libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main() -> int:
    """argv: limits and paths as JSON; stdin: the code; stdout: what it writes, both streams."""
    wanted = json.loads(sys.argv[1])
    call("prctl", SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != wanted["owner"]:
        return refuse("the owner has gone")
    code = sys.stdin.buffer.read()
    why, told = os.pipe2(os.O_CLOEXEC)
    try:
        user = unshare()
    except OSError as error:
        return refuse(str(error))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # no end between the child's birth and knowing it
    child = os.fork()
    if child == 0:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            confine(wanted, code, user)
            os.execve(wanted["python"], [wanted["python"], "-I", "-B", CODE], {})
        except BaseException as error:
            os.write(told, f"{type(error).__name__}: {error}".encode())
        os._exit(REFUSED)
    # All that the child starts dies with it, whatever group or session it has gone into: it is the first of its
    # namespace. We are told to end, or that our owner has ended, by SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.close(told)
    with open(why, "rb") as pipe:
        error_text = pipe.read().decode()  # empty once the code runs
    os.waitpid(child, 0)
    with contextlib.suppress(OSError):  # it may not have got as far as mounting
        call("umount2", wanted["root"].encode(), DETACH)
    os.rmdir(wanted["root"])
    return refuse(error_text) if error_text else 0


def refuse(why: str) -> int:
    print(why, flush=True)
    return REFUSED


def unshare() -> int | None:
    """New namespaces; returns whom to become in them where we are root, else None."""
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
    """Everything that the code must not be able to do is out of reach when this returns."""
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
