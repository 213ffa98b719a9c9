"""Starts Python programs without their imports: a server has made them, and forks a process for each program.

A run of a tiny model takes a second, and importing what it needs ten. So a test that starts many processes starts this
script in each program's place, `python warm.py PROGRAM ARGUMENTS...`. It asks the server for a process with its own
arguments, environment, working folder, output and namespaces, passes signals on to it, and ends as that process does.
All else is as users have it: the launcher's arguments, what it puts into the environment of its processes, and what it
makes of their end. But the process's parent is the server, whatever `os.getppid` says there.

The server, `python warm.py --serve DESCRIPTOR`, is given the socket on which it listens, and ends when its standard
input does. What it imports must not look at a program's environment yet.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from pathlib import Path


SOCKET = "WARM_SOCKET"  # the environment variable that says where the server listens
NAMESPACES = ("user", "net")
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_UNTIL_STACKS = 240  # a program that runs for so long says where it is, before its test gives it up
# What the programs import that are started here.
MODULES = (
    "accelerate.commands.accelerate_cli",
    "torch.distributed.run",
    "canned",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "rich.console",
    "rich.table",
    "safetensors.torch",
    "trl_grpo_ext.evaluation",
    "trl_grpo_ext.rewards",
    "trl_grpo_ext.script",
    "trl_grpo_ext.tasks",
    "trl_grpo_ext.trainer",
)


def receive(connection, size):
    content = b""
    while len(content) < size:
        more = connection.recv(size - len(content))
        if not more:
            raise EOFError
        content += more
    return content


# The client


def ask_for(program):
    """Have the server start a program, and end as it ends."""
    parent = os.getppid()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[SOCKET])
    request = {"program": program, "environment": dict(os.environ), "folder": os.getcwd(), "parent": parent}
    request = json.dumps(request).encode()
    namespaces = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
    socket.send_fds(connection, [struct.pack("!I", len(request))], [0, 1, 2, *namespaces])
    connection.sendall(request)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: connection.send(bytes([number])))
    connection.settimeout(SECONDS_BETWEEN_LOOKS)
    while True:
        try:
            status = os.waitstatus_to_exitcode(struct.unpack("!i", receive(connection, 4))[0])
        except TimeoutError:
            if os.getppid() != parent:  # whoever started this is gone; the server ends the process
                os._exit(1)
        else:
            break
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# The server


def serve(listener):
    """Fork a process for each request that comes to the socket with this descriptor.

    Returns:
        `tuple[dict, list[int]]`:
            In a process that was forked: what it is to be, and the file descriptors that came with the request.
    """
    listener = socket.socket(fileno=listener)
    clients = {}  # by connection: process id and pidfd
    while True:
        pidfds = {pidfd: connection for connection, (_, pidfd) in clients.items()}
        ready, _, _ = select.select([sys.stdin, listener, *clients, *pidfds], [], [])
        if sys.stdin in ready:
            for pid, _ in clients.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        for found in ready:
            if found is listener:
                connection, _ = listener.accept()
                size, descriptors, _, _ = socket.recv_fds(connection, 4, 3 + len(NAMESPACES))
                request = json.loads(receive(connection, struct.unpack("!I", size)[0]))
                pid = os.fork()
                if pid == 0:
                    for other in (listener, connection, *clients):
                        other.close()
                    for pidfd in pidfds:
                        os.close(pidfd)
                    return request, descriptors
                for descriptor in descriptors:
                    os.close(descriptor)
                clients[connection] = pid, os.pidfd_open(pid)
            elif found in pidfds:
                connection = pidfds[found]
                pid, _ = clients.pop(connection)
                os.close(found)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):  # the client has been killed
                    connection.sendall(struct.pack("!i", status))
                connection.close()
            elif found in clients:
                pid, _ = clients[found]
                try:
                    signals = found.recv(64)
                except OSError:
                    signals = b""
                for number in signals or [signal.SIGKILL]:  # no byte: the client has been killed
                    os.kill(pid, number)


def become(request, descriptors):
    """Turn a process that was forked into the one that was asked for, and run its program."""
    for target, descriptor in zip((0, 1, 2), descriptors, strict=False):
        os.dup2(descriptor, target)
    for name, descriptor in zip(NAMESPACES, descriptors[3:], strict=True):
        is_same = os.path.samestat(os.fstat(descriptor), os.stat(f"/proc/self/ns/{name}"))
        if not is_same and ctypes.CDLL(None, use_errno=True).setns(descriptor, 0) != 0:
            raise OSError(ctypes.get_errno(), f"this process cannot enter the {name} namespace of its client")
    for descriptor in descriptors:
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    faulthandler.dump_traceback_later(SECONDS_UNTIL_STACKS)
    os.getppid = lambda: request["parent"]  # a rank asks for its launcher
    sys.stdout.reconfigure(line_buffering=True)
    program = request["program"]
    sys.argv = program
    if Path(program[0]).name == "accelerate":
        from accelerate.commands.accelerate_cli import main

        main()
    else:
        sys.path[0] = str(Path(program[0]).parent)
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        for module in MODULES:
            importlib.import_module(module)
        become(*serve(int(sys.argv[2])))
    else:
        ask_for(sys.argv[1:])
