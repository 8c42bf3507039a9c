"""torchrun, but a run that fails ends in one line: the first failing rank's own, on every machine.

    python -m megatron_gkd.launch [torchrun's flags] -m megatron_gkd.train FLAGS

It is torch's own agent, with torchrun's flags, and some more care: machines that have not come are
named; the network card that reaches the first one is chosen; a machine that fails ends the others
within seconds; what was asked to stop, or was refused, is not started again by --max_restarts.
"""

import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_gkd import startup
from megatron_gkd.stop_requests import end_at_once_on_signals

if __name__ == "__main__":  # before the imports below, which take seconds
    end_at_once_on_signals()
    startup.quiet_sockets()

import torch.distributed.elastic.rendezvous.registry as rendezvous_registry
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.api import WorkerState as State
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, parse_args, parse_min_max_nnodes

from megatron_gkd.child_processes import STOP_SIGNALS
from megatron_gkd.flags import exit_with
from megatron_gkd.last_words import LAUNCHER, warn
from megatron_gkd.machines import (
    LAST_SECONDS,
    Failed,
    Failure,
    Machines,
    choose_interface,
    start_timeout,
)

CHECK_PLAN = "--check_plan"
GRACE_SECONDS = 2.0
"""For the other ranks of a machine to end by themselves when one has failed"""
REFUSED = 2  # the exit status of a rank that was refused something: it would be again


class Agent(LocalElasticAgent):
    """torch's, which starts the ranks of this machine again when one has failed, or ends them."""

    def __init__(self, spec: WorkerSpec, config: LaunchConfig, machines: Machines | None):
        logs_specs: Any = config.logs_specs
        super().__init__(
            spec=spec,
            logs_specs=logs_specs,
            start_method=config.start_method,
            log_line_prefix_template=config.log_line_prefix_template,
            **shutdown_timeout(config),
        )
        self._machines = machines
        self._failed_at: float | None = None
        self._ended: dict[int, int] = {}
        """Process numbers in the order in which the ranks ended"""
        self._killed: set[int] = set()
        """Process numbers of ranks that did not fail themselves"""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._machines is not None and self._machines.failure is not None:
            self._remaining_restarts = 0
            self._kill_ranks()
            return RunResult(state=State.FAILED)
        statuses = self._statuses()
        if any(status and not is_stop(status) for status in statuses.values()):
            self._failed_at = self._failed_at or time.monotonic()
            if None in statuses.values():
                if time.monotonic() - self._failed_at < GRACE_SECONDS:
                    return RunResult(state=State.HEALTHY)
                self._kill_ranks()
        result = super()._monitor_workers(worker_group)
        if result.state in (State.FAILED, State.UNHEALTHY):
            self._failed_at = None
            if any(map(is_final, result.failures.values())):
                self._remaining_restarts = 0
            failure = self.first_failure(result)
            if self._remaining_restarts and failure is not None:
                left = f"started again, {self._remaining_restarts} of "
                warn(f"{failure.line}: {left}{worker_group.spec.max_restarts} restarts were left")
        return result

    def first_failure(self, result: RunResult) -> Failure | None:
        """Of the ranks that have failed by themselves."""
        by_time = sorted(
            result.failures.items(), key=lambda item: self._ended.get(item[1].pid, len(self._ended))
        )
        return first_failure({rank: one for rank, one in by_time if one.pid not in self._killed})

    def _statuses(self) -> dict[int, int | None]:
        """By process number; None: it goes on. The processes are left for torch to wait for."""
        found: dict[int, int | None] = {}
        for pid in self._pcontext.pids().values() if self._pcontext else ():
            try:
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # torch has waited for it
                found[pid] = 0
                continue
            exited = ended is not None and ended.si_code == os.CLD_EXITED
            sign = 1 if exited else -1  # as subprocess tells what a signal has ended
            found[pid] = None if ended is None else sign * ended.si_status
            if ended is not None:
                self._ended.setdefault(pid, len(self._ended))
        return found

    def _kill_ranks(self) -> None:
        for pid, status in self._statuses().items():
            if status is None:
                self._killed.add(pid)
                os.kill(pid, signal.SIGKILL)


def shutdown_timeout(config: LaunchConfig) -> dict[str, Any]:
    """Seconds from SIGTERM to SIGKILL; older versions of torch have always 30."""
    seconds = getattr(config, "shutdown_timeout", None)
    return {} if seconds is None else {"shutdown_timeout": seconds}


def is_stop(status: int) -> bool:
    """Whether a rank has ended with this exit status because it was asked to stop."""
    return status - 128 in STOP_SIGNALS


def is_final(failure: ProcessFailure) -> bool:
    """Whether starting the rank again would not help: it was refused something that the file system
    has no part in, or asked to stop.
    """
    said = failure.error_file_data.get("message")
    transient = isinstance(said, dict) and said.get("transient", False)
    return is_stop(failure.exitcode) or (failure.exitcode == REFUSED and not transient)


def main(argv: Sequence[str]) -> int:
    """The exit status: that of the rank that has failed first; 128 and the signal's number where a
    signal has ended it.
    """
    plan_flags = None
    if argv[:1] == [CHECK_PLAN]:
        plan_flags, argv = shlex.split(argv[1]), argv[2:]
    args = parse_args(argv)
    _, num_machines = parse_min_max_nnodes(args.nnodes)
    is_static = args.rdzv_backend == "static" and not args.rdzv_endpoint
    if args.standalone or (is_static and num_machines == 1 and args.master_port is None):
        args.rdzv_backend, args.rdzv_endpoint = "c10d", "localhost:0"
        args.rdzv_id = str(uuid.uuid4())
    elif num_machines > 1 and not is_static and args.rdzv_id == "none":
        exit_with(ValueError(f"--rdzv_backend {args.rdzv_backend}: name the job with --rdzv_id"))
    args.master_port = args.master_port or 29500
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch would, and say it in six lines
    os.environ[LAUNCHER] = str(os.getpid())
    quiet_agent()
    config, command, arguments = config_from_args(args)
    of = f" (machine {args.node_rank}, on {platform.node()})" if num_machines > 1 else ""
    failure = None if plan_flags is None else check_plan(plan_flags, arguments, of)
    machines = None
    try:
        if is_static and num_machines > 1:
            seconds = LAST_SECONDS if failure else start_timeout(arguments)
            place = args.master_addr, args.master_port
            machines = Machines(*place, args.node_rank, num_machines, seconds)
        elif num_machines > 1:
            host, _, port = args.rdzv_endpoint.partition(":")
            choose_interface(host, int(port or 29400))
        if failure is None:
            if machines is not None:
                job = machines.meet()
                config.run_id = job if config.run_id == "none" else config.run_id
            failure = run(config, command, arguments, machines)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except Failed:
        pass
    except OSError as error:
        failure = failure or Failure(REFUSED, str(error), "")
    if machines is not None:
        failure = machines.end(failure)
    if failure is not None and failure.line:
        warn(f"error{failure.of}: {failure.line}")
    if machines is not None:
        machines.linger()
    return failure.status if failure else 0


def run(
    config: LaunchConfig, command: Any, arguments: Sequence[str], machines: Machines | None
) -> Failure | None:
    """Start the ranks of this machine, and again where the flags say so; what has ended them."""
    is_static = config.rdzv_backend == "static"
    address, _, port = config.rdzv_endpoint.rpartition(":")
    options = {
        name: getattr(config, name)
        for name in (
            "event_log_handler",
            "numa_options",
            "duplicate_stdout_filters",
            "duplicate_stderr_filters",
            "virtual_local_rank",
        )
        if hasattr(config, name)
    }
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(arguments),
        rdzv_handler=rendezvous_registry.get_rendezvous_handler(
            RendezvousParameters(
                backend=config.rdzv_backend,
                endpoint=config.rdzv_endpoint,
                run_id=config.run_id,
                min_nodes=config.min_nodes,
                max_nodes=config.max_nodes,
                local_addr=config.local_addr,
                **config.rdzv_configs,
            )
        ),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=address if is_static else None,
        master_port=int(port) if is_static else None,
        local_addr=config.local_addr,
        **options,
    )
    agent = Agent(spec, config, machines)
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in heard)
    result = agent.run()
    spec.rdzv_handler.shutdown()
    return agent.first_failure(result) if result is not None and result.is_failed() else None


def first_failure(failures: dict[int, ProcessFailure]) -> Failure | None:
    """What has ended the run, of ranks that may all have failed for it: a refusal of the lowest
    rank; otherwise the first that has failed for another reason than that it has lost the others.
    None where none of this machine has.
    """
    if not failures:
        return None

    def order(one: tuple[int, ProcessFailure]) -> tuple[int, int]:
        rank, failure = one
        if failure.exitcode == REFUSED:
            return 0, rank
        return (2 if failure.exitcode == os.EX_TEMPFAIL else 1), 0

    rank, failure = min(failures.items(), key=order)
    host = platform.node()
    if is_stop(failure.exitcode):
        return Failure(failure.exitcode, "", "")
    said = failure.error_file_data.get("message")
    if isinstance(said, dict):
        shared = rank == 0 or failure.exitcode == os.EX_TEMPFAIL
        of = "" if shared else f" (rank {rank}, on {host})"
        return Failure(failure.exitcode, str(said["message"]), of)
    go_on = ". All ranks end; a run goes on with --resume_from_checkpoint latest"
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        memory = " (too little memory? the system's log tells)" * (name == "SIGKILL")
        line = f"rank {rank} (on {host}) was ended by {name}{memory}{go_on}"
        return Failure(128 - failure.exitcode, line, "")
    line = f"rank {rank} (on {host}) ended with status {failure.exitcode}, see above{go_on}"
    return Failure(failure.exitcode, line, "")


def check_plan(own_flags: Sequence[str], arguments: Sequence[str], of: str) -> Failure | None:
    """`megatron_gkd.plan --check` with `own_flags` and those of the training command in
    `arguments`; of: whose failure it is, where there are several machines.
    """
    flags = arguments[arguments.index("megatron_gkd.train") + 1 :]
    command = [sys.executable, "-m", "megatron_gkd.plan", "--check", *own_flags, *flags]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "error.json")
        environment = os.environ | {"TORCHELASTIC_ERROR_FILE": str(said)}
        status = subprocess.run(command, env=environment).returncode
        if status == 0:
            return None
        line = "the plan could not be checked, see above"
        if said.exists():
            line = json.loads(said.read_text())["message"]["message"]
    return Failure(status if status > 0 else 128 - status, line, of)


def quiet_agent() -> None:
    """What torch's agent says of a failure in many lines; LOGLEVEL=INFO shows it."""
    if "LOGLEVEL" not in os.environ:
        for name, logger in logging.root.manager.loggerDict.items():
            if name.startswith("torch.distributed") and isinstance(logger, logging.Logger):
                logger.setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
