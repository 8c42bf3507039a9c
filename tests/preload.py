"""Imports that every test rank needs, done once in the fork server (tests/ranks.py) and without
their usual warnings.
"""

import importlib
import warnings

for message in (
    ".*Apex (is|are) not installed",
    "full scope is deprecated",
    "`torch.distributed.*deprecated",
    ".*`megatron-core` 0.14",
):
    warnings.filterwarnings("ignore", message=message)

for module in (
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "torch.utils._sympy",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe",
    "megatron_gkd.train",
):
    importlib.import_module(module)
