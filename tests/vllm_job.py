"""What vLLM makes of a model folder and of an adapter: `python vllm_job.py JOB.json OUTPUT`, run by
the interpreter that has vLLM (launch/setup_vllm_env.sh), which does not have this package.

JOB: `model`, `prompts` (lists of ids) and `max_tokens`, to be answered greedily; or `model`,
`adapter` and `lora_flags`, to be loaded and bound without a forward pass: experts with LoRA run as
Triton kernels only.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is reached below
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def load(model, **settings):
    return LLM(
        model=model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        **settings,
    )


def answer(llm, prompts, max_tokens):
    """Ids of each response and their log-probabilities in nats."""
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    return [
        {
            "token_ids": list(output.outputs[0].token_ids),
            "log_probabilities": [
                entry[token].logprob
                for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs)
            ],
        }
        for output in outputs
    ]


def bound_weights(llm, adapter):
    """Every matrix that vLLM's LoRA layers hold once the adapter is loaded, by layer, attribute and
    index; lora_b is scaled by alpha / r.
    """
    if not llm.llm_engine.add_lora(LoRARequest("adapter", 1, adapter)):
        raise ValueError("vLLM did not add the adapter")
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layers = worker.model_runner.lora_manager._adapter_manager.modules
    return {
        f"{name}.{attribute}.{index}": tensor[0].clone()
        for name, layer in layers.items()
        for attribute, tensors in vars(layer).items()
        if attribute.endswith("_stacked") and isinstance(tensors, tuple)
        for index, tensor in enumerate(tensors)
        if attribute.startswith("w") or not any(key.startswith("w13") for key in vars(layer))
    }


def main(job_file, output):
    job = json.loads(Path(job_file).read_text())
    if "prompts" in job:
        result = answer(load(job["model"]), job["prompts"], job["max_tokens"])
        Path(output).write_text(json.dumps(result))
    else:
        llm = load(job["model"], enable_lora=True, max_lora_rank=8, **job["lora_flags"])
        torch.set_grad_enabled(False)
        save_file(bound_weights(llm, job["adapter"]), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
