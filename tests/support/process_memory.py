"""The largest resident size of a process, counted from a moment that the test chooses."""

from pathlib import Path


def start_peak(process: int) -> None:
    """Let the largest resident size of a process count from now."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_bytes(process: int) -> int:
    """Return the largest resident size of a process; 0 for one that has ended and is not waited for yet."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    peak = next((line for line in lines if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(peak.split()[1]) * 1024
