"""Take from a process what judging a text does not need: files it could write, programs, the network, other processes.

A seccomp filter lists the system calls that stay. The kernel answers every other with EPERM, which Python raises as
PermissionError. The filter cannot be taken off again. Limits of memory and file size come on top.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from pathlib import Path

# By `platform.machine()`: the kernel's AUDIT_ARCH, and the position of a call's number in the tables below.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# System calls that stay, with their numbers on x86-64 and on arm64 (None where it has no such call).
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    # files that are open, which none is for writing, and the names of others
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "lseek": (8, 62),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "fadvise64": (221, 223),
    # signals and timers of this process
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    # time
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    # locks, randomness, facts
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "getrandom": (318, 278),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# Calls that stay if none of these bits is set in an argument: numbers, position of the argument, bits.
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000  # the last: O_TMPFILE's own
OPENING: dict[str, tuple[tuple[int | None, int | None], int, int]] = {
    "open": ((2, None), 1, WRITING),
    "openat": ((257, 56), 2, WRITING),
}
# Calls that stay for some commands: numbers, position of the command, commands.
COMMANDS: dict[str, tuple[tuple[int | None, int | None], int, tuple[int, ...]]] = {
    "ioctl": ((16, 29), 1, (0x5401, 0x5450, 0x5451)),  # is it a terminal; close on exec
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 1030)),  # duplicate, flags
}

PR_SET_PDEATHSIG, PR_GET_SECCOMP, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 21, 22, 38
SECCOMP_MODE_FILTER = 2
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of the filter
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000  # what it may answer


def is_supported() -> bool:
    """Whether this machine can take system calls from a process: Linux on x86-64 or arm64, with seccomp filters."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        return False
    return ctypes.CDLL(None).prctl(PR_GET_SECCOMP, 0, 0, 0, 0) >= 0


def filter_program(machine: str) -> bytes:
    """The filter for a machine, as the kernel's array of `sock_filter`.

    machine: a key of `MACHINES`.
    """
    arch, column = MACHINES[machine]
    # struct seccomp_data: the number of the call at 0, the architecture at 4, arguments of 8 bytes from 16 on.
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if machine == "x86_64":  # numbers of the x32 variant, which are not in the table
        code += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, DENY)]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for numbers, position, bits in OPENING.values():
        if (number := numbers[column]) is not None:
            code += [(EQUAL, 0, 4, number), (LOAD, 0, 0, 16 + 8 * position), (ANY_BIT, 0, 1, bits)]
            code += [(RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]
    for numbers, position, commands in COMMANDS.values():
        if (number := numbers[column]) is not None:
            code += [(EQUAL, 0, 2 + 2 * len(commands), number), (LOAD, 0, 0, 16 + 8 * position)]
            for command in commands:
                code += [(EQUAL, 0, 1, command), (RETURN, 0, 0, ALLOW)]
            code += [(RETURN, 0, 0, DENY)]
    code += [(RETURN, 0, 0, DENY)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def limit_resources(memory: int) -> None:
    """Limit the memory of this process and its children to `memory` bytes more than it has; allow no core file, and no
    file to grow."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


class Sandbox:
    """Closes itself behind a process. Prepared once, so that a forked process loses no time."""

    def __init__(self) -> None:
        self.program = filter_program(platform.machine())
        self.instructions = ctypes.create_string_buffer(self.program, len(self.program))
        self.header = ctypes.create_string_buffer(  # struct sock_fprog: the number of instructions, and where they are
            struct.pack("@HP", len(self.program) // 8, ctypes.addressof(self.instructions))
        )
        self.prctl = ctypes.CDLL(None, use_errno=True).prctl
        self.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

    def try_out(self) -> None:
        """See in a process of its own whether the kernel lets one in.

        Raises:
            OSError: it does not.
        """
        process = os.fork()
        if process == 0:
            try:
                self.enter()
                os._exit(0)
            except OSError as error:
                os._exit(error.errno or 1)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code:
            raise OSError(code, f"no seccomp filter can be set: {os.strerror(code)}")

    def enter(self) -> None:
        """Take the system calls from this process, for good.

        Raises:
            OSError: the kernel refuses.
        """
        self._call(PR_SET_PDEATHSIG, signal.SIGKILL)
        self._call(PR_SET_NO_NEW_PRIVS, 1)
        self._call(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(self.header))

    def _call(self, *arguments: int) -> None:
        if self.prctl(*arguments, *[0] * (5 - len(arguments))) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
