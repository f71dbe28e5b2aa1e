"""Process 1 of a sandbox: `python -I -S sandbox_init.py SPEC`, in its own pid namespace.

sandbox.py drives it over pipes, one JSON object a line:

    <- {"ready": true}                                                                   first
    -> {"input": "/in/3", "seconds": 2.0}                                                a test
    <- {"status": 0, "stdout": "15\\n", "stderr": "", "seconds": 0.02, "limit": null}    its end

Each test is a fresh Python process of the program in /in/program.py, with its own rlimits. When the
process has ended, everything that it left running is killed. Expected outputs are never in here: the
caller of sandbox.py compares. If SPEC["unshare"] is true, then this file makes the namespaces and
the file system first; bubblewrap has made both already.

The file imports the standard library alone, and nothing of megasd: it is mounted alone.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

# Type checkers take this for True. The sandbox starts faster without typing.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

NOBODY = 65534
# exit status of a program that never began
CANNOT_START = 126
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
# system call numbers; mount_setattr has the same one everywhere
MOUNT_SETATTR, PIVOT_ROOT = 442, {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CAP_SYS_ADMIN = 21
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: "Any") -> None:
    """Call a function of libc; OSError when it fails."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(
    source: str | None, target: str, kind: str | None = None, flags: int = 0, data: str | None = None
) -> None:
    """mount(2); OSError when it fails."""

    def encode(text: str | None) -> bytes | None:
        return None if text is None else os.fsencode(text)

    call("mount", encode(source), os.fsencode(target), encode(kind), ctypes.c_ulong(flags), encode(data))


# ---- namespaces and the file system, where bubblewrap did not make them ----


def make_namespaces() -> None:
    """Return in a child that is process 1 of fresh namespaces.

    The outer process waits for the child. When the outer process dies, the child dies, too.
    """
    flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    if not has_capability(CAP_SYS_ADMIN):
        # root of a container: RLIMIT_NPROC does not bind the user id of root
        if uid == 0:
            become_nobody()
            uid = gid = NOBODY
        flags |= NEWUSER
    call("unshare", flags)
    if flags & NEWUSER:
        map_ids(0, uid, gid)
    child = os.fork()
    if child:
        # only the child holds the pipes
        os.closerange(0, 2)
        status = os.waitpid(child, 0)[1]
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    die_with_parent()


def has_capability(number: int) -> bool:
    """Whether this process has the capability in effect."""
    with open("/proc/self/status") as file:
        effective = next(line for line in file if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> number & 1)


def map_ids(inside: int, uid: int, gid: int) -> None:
    """Give the new user namespace one user and one group: `inside`, which is (uid, gid) outside."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside} {uid} 1"),
        ("gid_map", f"{inside} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def build_root(spec: "dict[str, Any]") -> None:
    """Enter a new root: the directories to read, a /tmp of limited size to write, and nothing else."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    # this tmpfs becomes the root
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/.old")
    if libc.syscall(PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp/.old") < 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/")
    os.mkdir("/tmp")
    mount(
        "tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={spec['tmp_bytes']},mode=1777,nr_inodes=4096"
    )
    # after /tmp: Python itself may live below it
    for source, target in spec["binds"]:
        bind(f"/.old{source}", target)
    for link, target in spec["links"]:
        os.symlink(target, link)
    for name in ("null", "zero", "full", "random", "urandom"):
        bind(f"/.old/dev/{name}", f"/dev/{name}", read_only=False)
    os.mkdir("/proc")
    try:
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:
        # A container that hides parts of its /proc allows no new one. Programs then have no /proc.
        pass
    call("umount2", b"/.old", MNT_DETACH)
    os.rmdir("/.old")
    read_only_mount("/", recursive=False)


def bind(source: str, target: str, read_only: bool = True) -> None:
    """Mount a file or directory at another place; makes the place."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    mount(source, target, None, MS_BIND | MS_REC)
    if read_only:
        read_only_mount(target, recursive=True)


def read_only_mount(path: str, recursive: bool) -> None:
    """Make a mount read-only, with mount_setattr (Linux 5.12).

    mount_setattr adds flags and keeps the flags that a user namespace may not drop.
    """
    # set: read-only, nosuid, nodev
    attributes = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)
    if (
        libc.syscall(
            MOUNT_SETATTR, -100, os.fsencode(path), 0x8000 if recursive else 0, ctypes.byref(attributes), 32
        )
        < 0
    ):
        raise OSError(ctypes.get_errno(), f"mount_setattr {path}")


# ---- privileges ----


def become_nobody() -> None:
    """Become the user and group nobody; needs root."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    # After a change of user the process could not write its maps in /proc/self.
    call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)


def drop_privileges() -> None:
    """Give up root, and all capabilities after the next exec.

    A user namespace of this sandbox alone then counts the processes.
    """
    # System V memory outlives its process and escapes RLIMIT_AS
    try_write("/proc/sys/kernel/shmall", "0")
    if os.geteuid() == 0 and open("/proc/self/uid_map").read().split()[1:2] == ["0"]:
        # the machine's root, whom RLIMIT_NPROC does not bind
        become_nobody()
    uid, gid = os.geteuid(), os.getegid()
    try:
        call("unshare", NEWUSER)
        map_ids(NOBODY, uid, gid)
        try_write("/proc/sys/user/max_user_namespaces", "0")
    except OSError:
        # No further user namespace is allowed: the limit counts all processes of this user.
        pass
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # programs may not trace this process nor open its files
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    die_with_parent()


def try_write(path: str, text: str) -> None:
    """Write a file of /proc, if this machine allows it."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        pass


# ---- tests ----


def serve_tests(spec: "dict[str, Any]") -> None:
    """Run one test for each line of stdin."""
    # otherwise kill(-1) below would reach the machine
    assert os.getpid() == 1, "not process 1 of a pid namespace"
    for line in sys.stdin:
        request = json.loads(line)
        reply = run_test(spec, request["input"], request["seconds"])
        print(json.dumps(reply), flush=True)


def run_test(spec: "dict[str, Any]", path: str, seconds: float) -> "dict[str, Any]":
    """Run the program on one input. Returns its exit status, its output and the limit that it met."""
    begun = time.monotonic()
    out_read, out_write = os.pipe()
    error_read, error_write = os.pipe()
    child = os.fork()
    if child == 0:
        become_program(spec, path, seconds, out_write, error_write)
    os.close(out_write)
    os.close(error_write)
    out, error, limit = collect(out_read, error_read, begun + seconds, spec["output_bytes"])
    status = None
    # Both pipes are closed: the program has ended, or is about to end.
    while limit is None and status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() > begun + seconds:
            limit = "time"
        else:
            time.sleep(0.001)
    os.close(out_read)
    os.close(error_read)
    status = end_all(child, status)
    if status in (-signal.SIGXCPU, -signal.SIGKILL) and limit is None:
        limit = "time" if time.monotonic() - begun > seconds * 0.9 else "killed"
    try:
        clear_tmp()
    except (OSError, RecursionError):
        limit = limit or "files"
    seconds = time.monotonic() - begun
    return {
        "status": status,
        "stdout": out.decode("utf-8", "replace"),
        "stderr": error[-4000:].decode("utf-8", "replace"),
        "seconds": round(seconds, 3),
        "limit": limit,
    }


def collect(out_fd: int, error_fd: int, deadline: float, most: int) -> "tuple[bytes, bytes, str | None]":
    """(stdout, stderr, limit): read both until both are closed, or a limit is met.

    The limit is None, "time" or "output" (more than `most` bytes).
    """
    found = {out_fd: bytearray(), error_fd: bytearray()}
    still = [out_fd, error_fd]
    while still:
        left = deadline - time.monotonic()
        if left <= 0:
            return bytes(found[out_fd]), bytes(found[error_fd]), "time"
        for fd in select.select([*still, 0], [], [], left)[0]:
            # No request comes before the reply, so the other side is gone. The kernel ends this
            # namespace with its process 1.
            if fd == 0:
                os._exit(1)
            data = os.read(fd, 65536)
            found[fd] += data
            if not data:
                still.remove(fd)
            elif len(found[fd]) > most:
                return bytes(found[out_fd][:most]), bytes(found[error_fd][:most]), "output"
    return bytes(found[out_fd]), bytes(found[error_fd]), None


def end_all(child: int, status: int | None) -> int | None:
    """Kill every other process of this namespace. Returns the exit status of `child`."""
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            done, code = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if done == child and status is None:
            status = os.waitstatus_to_exitcode(code)


def clear_tmp() -> None:
    """Empty /tmp, so that no test finds the files of an earlier test.

    Mounts below /tmp stay: Python itself may live there.
    """
    device = os.stat("/tmp").st_dev
    folders: list[str] = ["/tmp"]
    found: list[str] = []
    mounted: list[str] = []
    while folders:
        for entry in list(os.scandir(folders.pop())):
            if entry.stat(follow_symlinks=False).st_dev != device:
                mounted.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
                found.append(entry.path)
            else:
                os.unlink(entry.path)
    for path in reversed(found):
        if not any(kept.startswith(path + "/") for kept in mounted):
            os.rmdir(path)


def become_program(
    spec: "dict[str, Any]", path: str, seconds: float, out_fd: int, error_fd: int
) -> "NoReturn":
    """In the child: set limits and descriptors, then exec. Never returns."""
    try:
        os.setsid()
        os.dup2(os.open(path, os.O_RDONLY), 0)
        os.dup2(out_fd, 1)
        os.dup2(error_fd, 2)
        os.closerange(3, 256)
        os.chdir("/tmp")
        cpu = int(seconds) + 1
        for name, value in (
            ("AS", spec["memory_bytes"]),
            ("CPU", cpu),
            ("FSIZE", spec["file_bytes"]),
            ("NOFILE", 64),
            ("CORE", 0),
            ("MEMLOCK", 0),
            ("MSGQUEUE", 0),
            ("NPROC", spec["processes"] + 1),
        ):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        command = [
            sys.executable,
            "-I",
            "-S",
            "-B",
            "-X",
            "utf8",
            "/sandbox_program.py",
            json.dumps(spec["site_packages"]),
        ]
        command += [] if spec["fn_name"] is None else [spec["fn_name"]]
        os.execve(sys.executable, command, ENVIRONMENT)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(CANNOT_START)


def main(argv: "list[str]") -> None:
    """Make the sandbox of SPEC (argv[0], JSON), then serve tests."""
    spec = json.loads(argv[0])
    # Process 1 of a namespace ignores signals that it has no handler for.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        die_with_parent()
        if spec["unshare"]:
            make_namespaces()
            build_root(spec)
        os.chdir("/")
        drop_privileges()
    except OSError as error:
        print(json.dumps({"ready": False, "reason": str(error)}), flush=True)
        return
    print(json.dumps({"ready": True}), flush=True)
    serve_tests(spec)


if __name__ == "__main__":
    main(sys.argv[1:])
