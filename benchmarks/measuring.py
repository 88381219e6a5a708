"""What every benchmark shares: fresh processes, peak memory as the operating system sees it, and the record."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def in_fresh_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script with arguments in a new Python and read the JSON on its last line."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def in_turns(script: str, sides: tuple[str, ...], repeats: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Every side in a fresh process, one after the other, so many times: a machine that slows down slows all of them.

    Times of all rounds are put together, and the largest peak counts.
    """
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for side in sides:
            new = in_fresh_process(script, "--side", side, "--repeats", str(repeats))
            known = found.setdefault(side, new)
            if known is not new:
                for key in {"seconds", "further"} & set(new):
                    known[key] += new[key]
                known["peak"] = max(known["peak"], new["peak"])
    return found


def reset_peak(device: str = "cpu") -> int:
    """Start a new high-water mark of memory; returns what is held now, in bytes: resident (Linux), or of tensors on a GPU.

    What has been freed so far goes back to the system first (with glibc): a run that fills it would seem to need less.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes(device: str = "cpu") -> int:
    """The high-water mark since `reset_peak`, in bytes."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {key} in /proc/self/status; these memory figures need Linux")


def seconds(run: Callable[[], object], repeats: int, device: str = "cpu") -> list[float]:
    """Wall-clock seconds of several runs, each to the end of what it has started on the device."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return times


def median(times: list[float]) -> float:
    """The median."""
    return statistics.median(times)


def write_record(name: str, figures: dict[str, Any], packages: list[str]) -> Path:
    """Keep figures, versions, machine and command as JSON."""
    record = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            "system": platform.system(),
        },
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
