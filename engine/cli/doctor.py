"""`tiltscope doctor`: what this machine can run, what is missing, and which extra installs it. Changes nothing."""

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from tiltscope.engine.cli.common import Common
from tiltscope.engine.cli.screen import printable, put_json, say, stage
from tiltscope.engine.config import DTYPES
from tiltscope.engine.errors import TiltscopeError
from tiltscope.engine.runtime.cpu import has_bfloat16
from tiltscope.engine.runtime.runners import REFERENCE, cannot_run, runner_names

# What an import is called where it is not called as its distribution.
MODULES = {"tensorrt-rtx-cu13": "tensorrt_rtx"}
# Every runner there is a name for, and the extra that brings what it needs.
RUNNERS = {
    "torch": None,
    "compile": None,
    "onnx": "onnx",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What this machine can run, what is missing, and which extra installs it."""

    bundle: str = "emoji64"
    """the bundle to verify: every file against its hash"""
    common: Common


def run(arguments: Arguments) -> int:
    """Exit code 0 where `tiltscope explain` can run here, else 2 with what is in the way."""
    with stage("looking at this machine; verifying the bundle", quiet=arguments.common.quiet):
        report: dict[str, Any] = {
            "ok": True,
            "problems": [],
            "versions": _versions(),
            "machine": _machine(),
            "bundle": _bundle(arguments.bundle),
            "runners": [_runner(name) for name in dict.fromkeys((*RUNNERS, *runner_names()))],
            "dtypes": [dtype for dtype in DTYPES if dtype != "bfloat16" or has_bfloat16()],
        }
    if report["bundle"]["problem"]:
        report["problems"].append(report["bundle"]["problem"])
    report["ok"] = not report["problems"]
    if arguments.common.json:
        put_json(report)
    else:
        _print(report)
    for problem in report["problems"]:
        say(f"tiltscope doctor: {printable(problem)}")
    return 0 if report["ok"] else 2


def _versions() -> dict[str, str | None]:
    names = ("tiltscope", "torch", "numpy", "diffusers", "transformers", "safetensors", "pyarrow")
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    import torch

    return {
        "system": platform.platform(terse=True),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_mib": _memory_mib(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _memory_mib() -> int | None:
    """Physical memory; None where the system does not tell."""
    names: Any = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def _bundle(name: str) -> dict[str, Any]:
    """Every file of the bundle against its hash in bundle.json."""
    from tiltscope.engine.bundle import load

    try:
        bundle = load(name)
        num = bundle.verify()
    except TiltscopeError as error:
        return {"name": name, "path": None, "verified": False, "num_files": None, "problem": str(error)}
    return {"name": name, "path": str(Path(bundle.path)), "verified": True, "num_files": num, "problem": None}


def _runner(name: str) -> dict[str, Any]:
    """Whether a runner can be asked for here; if not, what is missing and the command that installs it."""
    extra = RUNNERS.get(name)
    built = name in runner_names()
    missing = [] if extra is None else _missing(extra)
    lacking = cannot_run(name) if built and not missing and name != REFERENCE else None
    return {
        "runner": name,
        "in_this_version": built,
        "available": built and not missing and not lacking,
        "missing": missing if built else [],
        "lacking": lacking,
        "install": f"pip install 'tiltscope[{extra}]'" if built and missing else None,
    }


def _missing(extra: str) -> list[str]:
    """Distributions of an extra that cannot be imported here."""
    needs = [line for line in metadata.requires("tiltscope") or [] if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needs]
    return [name for name in names if util.find_spec(MODULES.get(name, name.replace("-", "_"))) is None]


def _print(report: dict[str, Any]) -> None:
    machine, bundle = report["machine"], report["bundle"]
    print("versions   " + ", ".join(f"{name} {version or 'missing'}" for name, version in report["versions"].items()))
    memory = "unknown" if machine["memory_mib"] is None else f"{machine['memory_mib'] / 1024:.1f} GiB"
    print(f"machine    {machine['system']}, {machine['processors']} processors ({machine['instructions']}), {memory}")
    print(f"threads    {machine['threads']} used by torch (OMP_NUM_THREADS changes that)")
    print(f"gpu        {machine['cuda'] or 'none seen: everything runs on the CPU'}")
    state = f"{bundle['num_files']} files verified, {bundle['path']}" if bundle["verified"] else "not usable"
    print(f"bundle     {printable(bundle['name'])}: {state}")
    for each in report["runners"]:
        if each["available"]:
            state = "available"
        elif each["lacking"]:
            state = each["lacking"]
        elif each["in_this_version"]:
            state = f"missing {', '.join(each['missing'])}: {each['install']}"
        else:
            state = "not part of this version"
        print(f"runner     {each['runner']}: {state}")
