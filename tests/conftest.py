"""Fixtures that several test files share."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

# Before torch is loaded: a fork of a process whose OpenMP threads have worked waits for ever for
# threads of its own.
os.environ["OMP_NUM_THREADS"] = "1"
# Ranks share few cores: without the preemption of a woken thread, which every message of gloo
# causes, a collective of 8 ranks on 2 cores takes a third of the time. Ranks and programs inherit
# the policy.
if hasattr(os, "SCHED_BATCH"):  # Linux
    with contextlib.suppress(OSError):  # a sandbox may refuse
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from tests.conversions import TIED, WHOLE, to_megatron

# What our scripts read: a test that starts one says what it means. (DEVICE and ANY_VERSION are also
# the tests' own.)
SCRIPTS_READ = (
    "COMMIT EXPERT_PARALLEL EXTRAS MASTER_PORT NPROC_PER_NODE OUT OUTPUT PAGE PAGES PYTHON "
    "SECONDS_LEFT SIZE SLOWER TORCH_ELASTIC_SHUTDOWN_TIMEOUT WHEELS"
).split()
TRACKERS_READ = [name for name in os.environ if name.startswith(("WANDB_", "SWANLAB_"))]
for variable in [*SCRIPTS_READ, *TRACKERS_READ]:
    os.environ.pop(variable, None)

# What a shell starts in the background ignores these, and so would the programs under test.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        is_ctrl_c = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """What runs keep for the next start: not in the user's own folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """`tiny_folder(text_config={...}, **sizes)` -> path of a small model folder, built once per
    session and arguments.

    `sizes` are `build_folder`'s arguments; `text_config` replaces settings in the written
    config.json. Shared: copy before changing.
    """
    folders = {}

    def make(text_config=None, **sizes):
        key = json.dumps([text_config, sizes], sort_keys=True)
        if key not in folders:
            folder = Path(
                build_folder(
                    str(tmp_path_factory.mktemp("tiny") / "model"), TinyModelConfig(**sizes)
                )
            )
            path = folder / "config.json"
            config = json.loads(path.read_text())
            model = config.get("thinker_config", config)
            model.get("text_config", model).update(text_config or {})
            path.write_text(json.dumps(config, indent=2))
            folders[key] = str(folder)
        return folders[key]

    return make


@pytest.fixture(scope="session")
def checkpoints(tiny_folder, tmp_path_factory):
    """The two standard folders as checkpoints: name -> (folder, checkpoint). Shared: copy before
    changing.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for name, sizes, tp in (("whole", WHOLE, 2), ("tied", TIED, 1)):
        folder = tiny_folder(**sizes)
        to_megatron(folder, root / name, tp)
        made[name] = (Path(folder), root / name)
    return made


@pytest.fixture
def world_of_one():
    """This process as the only rank, for what ranks tell each other."""
    import torch

    from megatron_gkd.parallel import join

    join(torch.device("cpu"))
    yield
    torch.distributed.destroy_process_group()
