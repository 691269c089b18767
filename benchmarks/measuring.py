"""Seconds and peak extra memory of calls that are compared, taken in turns so that a noisy machine is fair to all."""

import ctypes
import gc
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch


class Meter:
    """On a CPU the process's own seconds, which waiting for other programs does not change; CUDA events on a GPU."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        self.libc = None if self.cuda else ctypes.CDLL("libc.so.6")

    def measure(self, call):
        """(seconds, MiB above what was there before)"""
        gc.collect()
        if self.cuda:
            return self._on_gpu(call)
        self.libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = _status("VmRSS")
        start = time.process_time()
        call()
        seconds = time.process_time() - start
        return seconds, (_status("VmHWM") - before) / 1024

    def _on_gpu(self, call):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, (torch.cuda.max_memory_allocated() - before) / 2**20

    def in_turns(self, calls, rounds, warm_up):
        """{name: (median seconds, largest MiB)}: every call once, then every call again, `rounds` times."""
        results = {name: [] for name in calls}
        for turn in range(rounds + warm_up):
            for name, call in calls.items():
                result = self.measure(call)
                if turn >= warm_up:
                    results[name].append(result)
        return {name: (median(s for s, _ in got), max(m for _, m in got)) for name, got in results.items()}

    def free_bytes(self):
        if self.cuda:
            torch.cuda.empty_cache()  # here and not before each call, which would then be timed asking for its memory
            return torch.cuda.mem_get_info()[0]
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def machine(device, *packages):
    """One line: what ran this, and when."""
    found = []
    for name in ("torch", *packages):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{where}; {', '.join(found)}; {time.strftime('%Y-%m-%d')}"


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
