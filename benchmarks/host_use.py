"""Resident memory and processor time of a process and everything below it, from /proc."""

import os
from pathlib import Path


def process_tree(root=None):
    """Return the ids of a process (this one by default) and all below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    tree = [os.getpid() if root is None else root]
    for process in tree:
        tree += [child for child, parent in parents.items() if parent == process]
    return tree


def host_use(root=None):
    """Return resident MiB and processor seconds of the tree below `root` (this process by default)."""
    pages, ticks = 0, 0
    for process in process_tree(root):
        try:
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, ticks / os.sysconf("SC_CLK_TCK")
