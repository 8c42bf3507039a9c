"""What comes before the slow imports: their warnings are silenced, and Transformer Engine is
checked.

megatron-core imports it wherever it is installed, without a GPU too, and fails when that fails:
nothing here imports megatron-core, so that the reason can be told before.
"""

import importlib.util
import logging
import os
import warnings
from typing import TYPE_CHECKING

from megatron_gkd.errors import first_line
from megatron_gkd.flags import exit_with

if TYPE_CHECKING:
    import torch

# Every rank would repeat these while megatron-core is imported; megatron_gkd.doctor says what is
# installed.
QUIET = (
    ".*Apex (is|are) not installed",
    "Transformer Engine and Apex are not",
    "full scope is deprecated",
    "`torch.distributed.*deprecated",
)


def quiet_imports() -> None:
    """For a program, before it imports megatron-core or transformers: silences what the imports
    would say about absent packages, on every rank.
    """
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    # does not know the talker's rotary keys
    logging.getLogger("transformers.modeling_rope_utils").setLevel(logging.ERROR)


def quiet_sockets() -> None:
    """Before torch is imported: what its sockets would say, with a backtrace, of each other machine
    that has no name in the network or has ended. Errors, as NCCL's of a collective, still come.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def keep_compiled_kernels() -> None:
    """Triton's compiled kernels go where Triton puts them by default, ~/.triton/cache, and last
    from one run to the next. Without a TRITON_CACHE_DIR of the user's, torch's compiler would move
    those that are compiled after its own first one to a temporary folder.
    """
    home = os.environ.get("TRITON_HOME", os.path.expanduser("~"))
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(home, ".triton", "cache"))


def prepare_imports() -> None:
    """As the three above, and ends the process with one line where
    Transformer Engine would make the import of megatron-core fail.
    """
    quiet_imports()
    quiet_sockets()
    keep_compiled_kernels()
    if problem := import_problem():
        exit_with(ValueError(problem))


def import_problem() -> str:
    """What is wrong with an installed Transformer Engine and what to do; empty where it imports, or
    is not installed.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return ""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a build for another torch or CUDA: ImportError, OSError, ...
        import torch

        return (
            f"Transformer Engine is installed and cannot be imported ({first_line(error)}): "
            f"install the build for torch {torch.__version__} "
            "(EXTRAS=test,gpu bash launch/setup_env.sh), or "
            "pip uninstall transformer-engine transformer-engine-torch to run without it"
        )
    return ""


def transformer_engine_usable(device: "torch.device") -> bool:
    """Whether Transformer Engine is installed and there is a GPU to run it on. It is used where it
    is, never required.

    Raises ValueError for an installation that cannot be imported.
    """
    if device.type != "cuda" or importlib.util.find_spec("transformer_engine") is None:
        return False
    if problem := import_problem():
        raise ValueError(problem)
    return True
