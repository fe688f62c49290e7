"""What this process may use of the machine: memory and CPUs, under limits of containers (cgroup v1, v2) and of ulimit.

Reads text files of /proc and /sys below a root, so that tests can build others. What cannot be read is no limit. Knows
no model and no torch. Next: api/loading/machine.py for devices, api/settings/threads.py for what is made of the CPUs.
"""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

THREAD_LIMIT = 1024  # threads that anybody may ask for: more were a slip, and each takes memory
GetLimit = Callable[[int], tuple[int, int]]  # resource.getrlimit

# Where the kernel's files are if /proc/self/mountinfo does not say.
USUAL = {"": "/sys/fs/cgroup", "memory": "/sys/fs/cgroup/memory", "cpu": "/sys/fs/cgroup/cpu"}


def find_free_memory(root: str | Path = "/", get_limit: GetLimit = resource.getrlimit) -> int:
    """Bytes that this process can still take without swapping: the least of what the system, every memory cgroup around
    the process and its ulimits (-v, -d) leave."""
    root = Path(root)
    groups = map(find_group_memory, list_groups(root, "memory"))
    bounds = [find_system_memory(root), *(left for left in groups if left is not None)]
    status = read_pairs(root / "proc/self/status", scale=1024)
    for limit, used in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        soft = get_limit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            bounds.append(max(0, soft - status.get(used, 0)))
    return min(bounds)


def find_system_memory(root: Path) -> int:
    """What the system says could be had without swapping; not on Linux: half of what is built in."""
    free = read_pairs(root / "proc/meminfo", scale=1024).get("MemAvailable:")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if free is None else free


def find_group_memory(group: Path) -> int | None:
    """Bytes that one cgroup leaves below its limits; None without any.

    Page cache that is not mapped counts as free, as in MemAvailable: the kernel takes it back before it fails.
    """
    stat = read_pairs(group / "memory.stat")
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limits = [limit for name in names if (limit := read_limit(group / name)) >= 0]
    if (above := stat.get("hierarchical_memory_limit")) is not None:  # v1: the least of it and all above
        limits.append(above)
    if not limits:
        return None
    used = max(read_limit(group / "memory.current"), read_limit(group / "memory.usage_in_bytes"), 0)
    prefix = "total_" if "total_inactive_file" in stat else ""  # v1: with the groups below
    cached = stat.get(prefix + "inactive_file", 0) + stat.get(prefix + "active_file", 0)
    mapped = stat.get("total_mapped_file" if prefix else "file_mapped", 0)
    return max(0, min(limits) - max(0, used - max(0, cached - mapped)))


def count_cpus(root: str | Path = "/") -> int:
    """CPUs that this process may really use: those it may run on, and what the quotas of its cgroups come to."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        count = os.cpu_count() or 1
    for group in list_groups(Path(root), "cpu"):
        quota, period = read_limit(group / "cpu.cfs_quota_us"), read_limit(group / "cpu.cfs_period_us")
        words = read_small_file(group / "cpu.max").split()
        if len(words) == 2 and all(word.isdecimal() for word in words):
            quota, period = int(words[0]), int(words[1])
        if quota > 0 and period > 0:
            count = min(count, max(1, quota // period))
    return count


def list_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the cgroups around this process that can be seen, innermost first: v2's, then those of v1's
    `controller`. Limits of all of them count."""
    paths = {"": "/", controller: "/"}
    for line in read_small_file(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        for name in names.split(","):
            if name in paths and path.startswith("/"):
                paths[name] = path
    mounts = [(kind, "/", folder) for kind, folder in USUAL.items()] + list(list_mounts(root))
    seen = set()
    for kind, top, folder in mounts:
        if kind not in paths:
            continue
        # A container may see only its own part of the tree: the mount then begins at `top`.
        inside = Path("/", os.path.relpath(paths[kind], top)) if is_below(paths[kind], top) else Path("/")
        for part in (inside, *inside.parents):
            group = root / folder.lstrip("/") / str(part).lstrip("/")
            if group not in seen:
                seen.add(group)
                yield group


def is_below(path: str, top: str) -> bool:
    """Whether a cgroup's path lies in a mounted part of the tree; "/../x" is outside of this namespace."""
    return ".." not in path.split("/") and (path + "/").startswith(top.rstrip("/") + "/")


def list_mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """(controller, "" for v2; the cgroup that the mount begins at; the folder) of every mounted cgroup tree."""
    for line in read_small_file(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        words, kinds = left.split(), right.split()
        if len(words) < 5 or len(kinds) < 3:
            continue
        top, folder = (unescape_path(word) for word in words[3:5])
        if kinds[0] == "cgroup2":
            yield "", top, folder
        elif kinds[0] == "cgroup":
            for name in kinds[2].split(","):
                yield name, top, folder


def unescape_path(word: str) -> str:
    """A path of mountinfo, in which a space is \\040."""
    return word.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def read_small_file(path: Path) -> str:
    """A small file, "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_limit(path: Path) -> int:
    """The number in a file; -1 for "max", or without the file."""
    text = read_small_file(path).strip()
    return int(text) if text.isdecimal() else -1


def read_pairs(path: Path, scale: int = 1) -> dict[str, int]:
    """Lines of a name and a number, times `scale`."""
    found = {}
    for line in read_small_file(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdecimal():
            found[words[0]] = int(words[1]) * scale
    return found
