"""Two nodes train, the second one is lost, and both go on: `bash two_nodes.sh python two_nodes.py SETTINGS.json`."""

import json
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import ENVIRONMENT, ROOT, launcher, write_settings


NODES = (0, 1)


def in_node(node, *command):
    return ["nsenter", f"--net=/run/netns/node{node}", *command]


def start(settings, folder, name, **more):
    """Start a launcher on each node; they print to `<name>.<node>`."""
    # gloo looks for an address by the host's name, which is not one of these
    env = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "cable"}
    script = write_settings(folder, name, **{**settings["run"], "output_dir": settings["output_dir"], **more})
    processes = []
    for node in NODES:
        command = launcher(
            *(settings["config"], "--mixed_precision", "no", "--num_machines", "2", "--machine_rank", node),
            *("--main_process_ip", "10.77.0.1"),
            num_processes=4,
            port=29500,
        )
        with (folder / f"{name}.{node}").open("w") as output:
            processes.append(
                subprocess.Popen(in_node(node, *command, *script), stdout=output, stderr=output, cwd=ROOT, env=env)
            )
    return processes


def main(settings):
    folder = Path(settings["output_dir"]).parent
    first = start(settings, folder, "first", stay_at=5, stay_ranks=[2, 3])
    waiting = [Path(settings["output_dir"], f"rank-{rank}.pid") for rank in (2, 3)]
    while not all(file.exists() for file in waiting):
        assert all(process.poll() is None for process in first), "a launcher has ended"
        time.sleep(0.05)
    if settings["cuts_cable"]:  # as when the power is gone: nothing says that the others are
        subprocess.run(["ip", "-n", "node1", "link", "set", "cable", "down"], check=True)
    pids = subprocess.run(["ip", "netns", "pids", "node1"], check=True, capture_output=True, text=True).stdout.split()
    begin = time.monotonic()
    subprocess.run(["kill", "-KILL", *pids], check=True)
    status = first[0].wait()
    seconds = time.monotonic() - begin
    first[1].wait()
    if settings["cuts_cable"]:
        subprocess.run(["ip", "-n", "node1", "link", "set", "cable", "up"], check=True)
    statuses = [process.wait() for process in start(settings, folder, "second", resume=True)]
    results = {"killed": len(pids), "status": status, "seconds": seconds, "resumed": statuses}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
