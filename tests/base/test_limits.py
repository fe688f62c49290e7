"""Memory and CPUs under limits of containers and of ulimit, read from folders that look like the kernel's."""

import resource

import pytest

from saccade.base.limits import count_cpus, find_free_memory, list_groups

GB = 10**9
FREE = 500 * 2**30
NO_LIMIT = 9223372036854771712  # what v1 writes for none
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1 = "31 23 0:27 {top} /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory\n"
CPU1 = "32 23 0:28 {top} /sys/fs/cgroup/cpu,cpuacct rw shared:6 - cgroup cgroup rw,cpu,cpuacct\n"


def unlimited(_):
    return resource.RLIM_INFINITY, resource.RLIM_INFINITY


def build(root, mounts, cgroup, files):
    """`files` by path below /sys/fs/cgroup."""
    texts = {f"sys/fs/cgroup/{name}": str(text) for name, text in files.items()}
    texts["proc/meminfo"] = f"MemTotal:  {2 * FREE // 1024} kB\nMemAvailable:  {FREE // 1024} kB\n"
    texts["proc/self/mountinfo"] = "22 1 0:20 / / rw - ext4 /dev/vda rw\nbroken\n" + mounts
    texts["proc/self/cgroup"] = cgroup
    texts["proc/self/status"] = f"VmSize:\t{5 * GB // 1024} kB\nVmData:\t{GB // 1024} kB\nbroken\n"
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CASES = {
    "no container": ("", "0::/\n", {}, FREE),
    "v2": (V2, "0::/\n", {"memory.max": 3 * GB, "memory.current": GB}, 2 * GB),
    "v2, max": (V2, "0::/\n", {"memory.max": "max", "memory.current": GB}, FREE),
    "v2, high": (V2, "0::/\n", {"memory.max": "max", "memory.high": 2 * GB, "memory.current": GB}, GB),
    "v2, nothing left": (V2, "0::/\n", {"memory.max": GB, "memory.current": 2 * GB}, 0),
    "v2, page cache": (
        V2, "0::/\n",
        {"memory.max": 3 * GB, "memory.current": 2 * GB, "memory.stat": f"anon 7\ninactive_file {GB}\nactive_file {GB // 2}\nfile_mapped {GB // 4}\n"},
        3 * GB - (2 * GB - GB - GB // 2 + GB // 4),
    ),
    "v2, own group": (V2, "0::/a/b\n", {"a/b/memory.max": 3 * GB, "a/b/memory.current": GB, "memory.max": "max"}, 2 * GB),
    "v2, group above": (V2, "0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": 4 * GB, "a/memory.current": GB}, 3 * GB),
    "v2, both": (V2, "0::/a/b\n", {"a/b/memory.max": 9 * GB, "a/memory.max": 4 * GB, "a/memory.current": 2 * GB}, 2 * GB),
    "v2, part of the tree": (V2.replace("{top}", "/docker/x"), "0::/docker/x/y\n", {"y/memory.max": GB, "y/memory.current": 0}, GB),
    "v2, outside of the part": (V2.replace("{top}", "/docker/x"), "0::/../other\n", {"memory.max": GB}, GB),
    "v2, name that begins alike": (V2.replace("{top}", "/docker/x"), "0::/docker/xy\n", {"memory.max": GB, "y/memory.max": 0}, GB),
    "v2 without mountinfo": ("", "0::/a\n", {"a/memory.max": GB}, GB),
    "v2, another place": ("30 23 0:26 / /sys/fs/cgroup/my\\040place rw - cgroup2 x rw\n", "0::/a\n", {"my place/a/memory.max": GB}, GB),
    "v1": (V1, "4:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": 3 * GB, "memory/memory.usage_in_bytes": GB}, 2 * GB),
    "v1, none": (V1, "4:memory:/\n", {"memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": GB}, FREE),
    "v1, group above": (V1, "4:memory:/a/b\n", {"memory/a/b/memory.limit_in_bytes": NO_LIMIT, "memory/a/memory.limit_in_bytes": 3 * GB, "memory/a/memory.usage_in_bytes": GB}, 2 * GB),
    "v1, above what is seen": (V1, "4:memory:/\n", {"memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": GB, "memory/memory.stat": f"cache 1\nhierarchical_memory_limit {4 * GB}\n"}, 3 * GB),
    "v1, page cache": (
        V1, "4:memory:/\n",
        {"memory/memory.limit_in_bytes": 3 * GB, "memory/memory.usage_in_bytes": 2 * GB, "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GB}\ntotal_active_file 0\n"},
        2 * GB,
    ),
    "v1, docker without a namespace": (V1.replace("{top}", "/docker/x"), "4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": GB}, GB),
    "v1 without mountinfo": ("", "4:memory:/a\n", {"memory/a/memory.limit_in_bytes": GB}, GB),
    "v1, joined controllers": (V1.replace("rw,memory", "rw,hugetlb,memory"), "4:hugetlb,memory:/a\n", {"memory/a/memory.limit_in_bytes": GB}, GB),
    "v1 beside v2": (V1 + V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "), "4:memory:/a\n0::/b\n", {"memory/a/memory.limit_in_bytes": 2 * GB, "unified/b/memory.max": GB}, GB),
    "a colon in the name": (V2, "0::/a:b\n", {"a:b/memory.max": GB}, GB),
    "no number": (V2, "0::/\n", {"memory.max": "3G?"}, FREE),
    "broken cgroup file": (V2, "nonsense\n\n", {"memory.max": GB}, GB),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_free_memory_is_what_every_limit_leaves(tmp_path, name):
    mounts, cgroup, files, expected = CASES[name]
    root = build(tmp_path, mounts.replace("{top}", "/"), cgroup, files)
    assert find_free_memory(root, unlimited) == expected


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({resource.RLIMIT_AS: 7 * GB}, 2 * GB),
        ({resource.RLIMIT_DATA: 2 * GB}, GB),
        ({resource.RLIMIT_AS: 7 * GB, resource.RLIMIT_DATA: 2 * GB}, GB),
        ({resource.RLIMIT_AS: GB}, 0),
        ({resource.RLIMIT_AS: 9 * FREE}, FREE),
    ],
)
def test_ulimits_leave_what_is_not_used_of_them(tmp_path, limits, expected):
    root = build(tmp_path, "", "", {})
    found = find_free_memory(root, lambda which: (limits.get(which, resource.RLIM_INFINITY), resource.RLIM_INFINITY))
    assert abs(found - expected) < 2048


def test_without_proc_half_of_the_memory_counts(tmp_path):
    assert 0 < find_free_memory(tmp_path, unlimited) < 2**50


def test_this_machine_has_some_memory_and_cpus():
    assert find_free_memory() > 0
    assert count_cpus() >= 1


@pytest.mark.parametrize(
    ("mounts", "cgroup", "files", "expected"),
    [
        (V2, "0::/a\n", {"cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        (V2, "0::/a\n", {"cpu.max": "100000 100000", "a/cpu.max": "200000 100000"}, 1),
        (V2, "0::/\n", {"cpu.max": "50000 100000"}, 1),
        (V2, "0::/\n", {"cpu.max": "350000 100000"}, 3),
        (V2, "0::/\n", {"cpu.max": "max 100000"}, 8),
        (V2, "0::/\n", {"cpu.max": "many 0"}, 8),
        (CPU1, "5:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": 300000, "cpu,cpuacct/a/cpu.cfs_period_us": 100000}, 3),
        (CPU1, "5:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": -1, "cpu,cpuacct/cpu.cfs_period_us": 100000}, 8),
    ],
)  # fmt: skip
def test_cpus_are_those_that_quotas_leave(tmp_path, monkeypatch, mounts, cgroup, files, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert count_cpus(build(tmp_path, mounts.replace("{top}", "/"), cgroup, files)) == expected


def test_groups_are_listed_innermost_first_and_once(tmp_path):
    root = build(tmp_path, V2.replace("{top}", "/"), "0::/a/b\n", {})
    found = [str(group.relative_to(root)) for group in list_groups(root, "memory")]
    assert found == [
        "sys/fs/cgroup/a/b", "sys/fs/cgroup/a", "sys/fs/cgroup", "sys/fs/cgroup/memory",
    ]  # fmt: skip


@pytest.mark.parametrize("cgroup", ["0::/../other\n", "0::/docker/xy\n", "0::/docker\n"])
def test_a_group_outside_of_what_is_mounted_is_not_looked_for_there(tmp_path, cgroup):
    root = build(tmp_path, V2.replace("{top}", "/docker/x"), cgroup, {})
    assert not any(".." in group.parts for group in list_groups(root, "memory"))
