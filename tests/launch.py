"""Starting a script on several processes."""

import sys
from pathlib import Path


def two_process_launcher(folder: Path) -> list[str | Path]:
    """The command before a script for DDP on two CPU processes; its configuration is written to `folder`.

    The type is MULTI_GPU with `use_cpu`: where it is MULTI_CPU, accelerate runs one process and says nothing.
    """
    config = folder / "ddp.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 1\n"
        "num_processes: 2\nmachine_rank: 0\nmixed_precision: 'no'\nmain_training_function: main\n"
    )
    accelerate = Path(sys.executable).with_name("accelerate")
    return [accelerate, "launch", "--main_process_port", "0", "--config_file", config]
