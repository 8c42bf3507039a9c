"""Transformer Engine: is it installed, does it import, can it run here?

megatron-core imports it wherever it is installed, without a GPU too, and fails when that fails:
nothing here imports megatron-core, so that the reason can be told before.
"""

import importlib.util

import torch


def import_problem() -> str:
    """What is wrong with an installed Transformer Engine and what to do; empty where it imports, or
    is not installed.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return ""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (
        Exception
    ) as error:  # a build for another torch or CUDA: ImportError, OSError, RuntimeError
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (
            f"Transformer Engine is installed and cannot be imported ({first_line}): install the build for torch "
            f"{torch.__version__} (EXTRAS=test,gpu bash launch/setup_env.sh), or pip uninstall transformer-engine "
            "transformer-engine-torch to run without it"
        )
    return ""


def transformer_engine_usable(device: torch.device) -> bool:
    """Whether Transformer Engine is installed and there is a GPU to run it on. It is used where it
    is, never required.

    Raises ValueError for an installation that cannot be imported.
    """
    if device.type != "cuda" or importlib.util.find_spec("transformer_engine") is None:
        return False
    problem = import_problem()
    if problem:
        raise ValueError(problem)
    return True
