"""Available memory of this machine, within the limits of control groups."""

from pathlib import Path


def available_host_memory() -> int | None:
    """Return the bytes of memory still available to processes; None if unknown.

    The kernel's estimate (MemAvailable in /proc/meminfo) within the limits of the control groups.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return min(int(available[0]) * 1024, left_in_control_groups()) if available else None


def left_in_control_groups(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes left under the limits of this process's control groups (v2, or v1)."""
    left = 2**63
    try:
        named = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return left
    for line in named:
        _, controllers, name = line.split(":", 2)
        folder = root / ("memory" if controllers else "") / name.strip("/")
        if controllers and "memory" not in controllers.split(","):
            continue
        for group in (folder, *folder.parents):
            for most, used in (
                ("memory.max", "memory.current"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            ):
                limit, taken = _number(group / most), _number(group / used)
                if limit is not None and taken is not None:
                    left = min(left, max(0, limit - taken + _reclaimable(group / "memory.stat")))
            if group == root:
                break
    return left


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is no file or it holds "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _reclaimable(file: Path) -> int:
    """Return the bytes of cached files that a control group counts and the kernel can reclaim."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
