"""Imports that every test rank needs, done once in the fork server (tests/ranks.py) and without
their usual warnings.
"""

import gc
import importlib
import importlib.util
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
    "megatron_gkd.families.qwen3_moe",
    "megatron_gkd.families.qwen3_omni",
    "megatron_gkd.loss.torch_kernels",
    "megatron_gkd.model.expert_torch",
    "megatron_gkd.rollout.torch_kernels",
    "transformers.models.qwen2.tokenization_qwen2",
    "pandas",  # pyarrow loads it with the first array
):
    if module != "pandas" or importlib.util.find_spec(module):
        importlib.import_module(module)
gc.collect()
gc.freeze()  # what every rank shares stays shared: the collector writes into no page of it
