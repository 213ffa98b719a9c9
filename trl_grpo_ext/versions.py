"""What a run was made with. Imports none of it."""

import sys
from importlib.metadata import PackageNotFoundError, version

from . import __version__


PACKAGES = ("torch", "trl", "transformers", "accelerate", "datasets", "peft")


def installed_versions() -> dict[str, str]:
    """Python's version, this package's, and those of the packages that a run depends on, as far as they are there."""
    # there is no other record of this package's where a checkout is used as it is
    versions = {"python": sys.version.split()[0], "trl_grpo_ext": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
