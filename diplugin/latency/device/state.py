"""What the device says of itself: which it is, how fast its cores run, whether it is throttled or an emulator.

Idea: every source is asked and none is needed; what a device does not tell is left out.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time

CACHES = "/sys/devices/system/cpu/cpu0/cache"
#: Characters of one thing that a device says: tables hold no more than 500, and a server has hundreds of cores.
MOST = 400


def read_text(path):
    try:
        with open(path, "rb") as file:
            return file.read(4096).decode("utf-8", "replace").replace("\0", "").strip()
    except OSError:
        return ""


def tool(*command):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20, check=False)
        return done.stdout.decode("utf-8", "replace").strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def device_model():
    """The device in words."""
    model = read_text("/proc/device-tree/model")
    cpu = [
        line.split(":", 1)[1].strip()
        for line in read_text("/proc/cpuinfo").splitlines()
        if line.lower().startswith(("model name", "hardware"))
    ]
    return model or (cpu[0] if cpu else platform.processor() or platform.machine())


def frequencies():
    found = (read_text(f"/sys/devices/system/cpu/cpu{i}/cpufreq/scaling_cur_freq") for i in range(os.cpu_count() or 1))
    return " ".join(filter(None, found))


def l2_kb():
    """Size of a core's L2 cache in KiB; 0 where the system does not tell."""
    for name in names_in(CACHES):
        level, kind, size = (read_text(f"{CACHES}/{name}/{what}") for what in ("level", "type", "size"))
        if level == "2" and kind in ("Unified", "Data"):
            return kibibytes(size)
    return 0


def kibibytes(text):
    """A size as the kernel writes it, "2048K" or "1M"; 0 for any other text."""
    found = re.fullmatch("([0-9]{1,7})([KM])", text)
    return int(found.group(1)) * {"K": 1, "M": 1024}[found.group(2)] if found else 0


def names_in(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def emulated():
    """Whether an emulator stands in for the device: its times mean nothing."""
    if os.environ.get("DIPLUGIN_EMULATED"):
        return True
    # qemu-user's own name is what the kernel runs; older versions show the host's processor, newer ones make one up.
    names = [read_text("/proc/self/comm"), os.path.basename(link("/proc/thread-self/exe"))]
    host = read_text("/proc/cpuinfo").lower()
    foreign = platform.machine() in ("aarch64", "armv7l") and ("genuineintel" in host or "authenticamd" in host)
    return foreign or any(name.startswith("qemu-") for name in names)


def link(path):
    try:
        return os.readlink(path)
    except OSError:
        return ""


def provenance(setting):
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0, 0.0, 0.0)
    found = {
        "device": device_model(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "cpus": os.cpu_count() or 0,
        "python": platform.python_version(),
        "affinity": " ".join(map(str, affinity)),
        "governor": read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "frequencies_khz": frequencies(),
        "l2_kb": l2_kb(),
        "load": f"{load[0]:.2f}",
        "emulated": emulated(),
        "runtime_version": setting.get("version", ""),
        "throttled": tool("vcgencmd", "get_throttled"),
        "nvpmodel": tool("nvpmodel", "-q"),
        "jetson_clocks": tool("jetson_clocks", "--show"),
        "jetpack": read_text("/etc/nv_tegra_release"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    clean = {
        k: "".join(c if c.isprintable() else " " for c in v[:MOST]) if isinstance(v, str) else v
        for k, v in found.items()
    }
    return {k: v for k, v in clean.items() if v not in ("", None)}


def peak_memory_mb():
    """Most memory that this process has held, in MB (10^6 bytes); 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 3)


def throttle_bits():
    """What a Raspberry Pi says of low voltage, caps and throttling: now (bits 0 to 3) and since it was started (16 to
    19); 0 on other devices."""
    text = tool("vcgencmd", "get_throttled")
    try:
        return int(text.split("=", 1)[1], 16)
    except (IndexError, ValueError):
        return 0


def throttled(before, after):
    """Whether a device was limited between two readings of its bits: at the end, or for the first time ever."""
    return bool(after & 0xF or (after & ~before) >> 16)
