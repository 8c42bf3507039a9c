"""Imports that every test rank needs, done once in the fork server (tests/ranks.py), without their
usual warnings.
"""

import warnings

for message in (
    ".*Apex (is|are) not installed",
    "full scope is deprecated",
    "`torch.distributed.*deprecated",
    ".*`megatron-core` 0.14",
):
    warnings.filterwarnings("ignore", message=message)

import datasets  # noqa: F401
import megatron.core.distributed
import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer
import megatron.core.pipeline_parallel.schedules  # noqa: F401
import torch.utils._sympy  # noqa: F401
import transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe  # noqa: F401

import megatron_gkd.train  # noqa: F401
