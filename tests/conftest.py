import importlib.util
import os
import tempfile

import pytest


# Removed at the end: caches, and what processes that tests start leave behind (torchrun its folder, vLLM its sockets).
_TMPDIR = tempfile.TemporaryDirectory(prefix="trl-grpo-ext-", ignore_cleanup_errors=True)
os.environ["TMPDIR"] = _TMPDIR.name
os.environ["HF_HOME"] = f"{_TMPDIR.name}/hf-home"

# No test needs a network: whatever would ask the hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# One thread each, because there are as many processes as cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples at every run, and none of them kept in a folder; no deadline, because machines are busy at times.
# Tests on a GPU do without.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("default", database=None, deadline=None, derandomize=True)
    settings.load_profile("default")


def pytest_unconfigure() -> None:
    _TMPDIR.cleanup()


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> str:
    """The path of a tiny checkpoint with random weights."""
    from tiny import save_tiny_policy  # the environment above must be set before transformers is loaded

    return save_tiny_policy(tmp_path_factory.mktemp("policy"))
