"""A choice as a launch script: complete, executable, checked before it starts."""

import os
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import megatron_gkd
from megatron_gkd.config import Config, default_settings
from megatron_gkd.plan.layouts import SIZE_FLAGS, Choice, Job, config_of
from megatron_gkd.plan.memory import GIB
from megatron_gkd.plan.settings import NO_DATA

CHOSEN = (  # flags that every script names, whatever their values
    *SIZE_FLAGS,
    "recompute",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_tokens_per_micro_batch",
)
PATHS = ("dataset", "val_dataset", "adapter", "teacher_adapter")
OF_SHELL = ("model", "teacher_model", "dataset", "output_dir", "recipe")  # written otherwise
TEMPLATE = Path(__file__).with_name("launch_script.sh")
NODE = r""": "${MASTER_ADDR:?the address of the node with NODE_RANK=0}"
: "${NODE_RANK:?the number of this node, from 0}"
"""
RENDEZVOUS = r"""--node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
    """
WEIGHTS = r""": "${MODEL:?the folder with the weights; the plan is of a config.json alone}"
"""
DATA = """[ -z "$check" ] || DATASET=${DATASET:-none}
flags+=(--dataset "${DATASET:?a .jsonl or .parquet file, or another --dataset}")
"""


def script_of(job: Job, choice: Choice, name: str) -> str:
    """The text of a launch script that is to be called `name`."""
    config, per_node = config_of(job, choice), min(job.gpus, job.rates.gpus_per_node)
    nodes, has_data = job.gpus // per_node, config.data.dataset != [NO_DATA]
    assert choice.time is not None  # a choice that does not fit becomes no script
    has_weights = holds_weights(Path(config.model.model))
    variables = [] if has_weights else ["MODEL=/models/NAME"]
    variables += [] if has_data else ["DATASET=train.jsonl"]
    of_plan = " ".join([str(job.gpus), *job.media])
    launch = f'exec "$python" -m megatron_gkd.launch --check_plan "--gpus {of_plan}"'
    start, on = f"{launch} --standalone --nproc_per_node {per_node}", ""
    if nodes > 1:
        variables += ["MASTER_ADDR=node0", "NODE_RANK=0"]
        on = f" on {nodes} nodes, started on each"
        start = f"{NODE}{launch} --nnodes {nodes} {RENDEZVOUS}--nproc_per_node {per_node}"
    parts = {
        "TITLE": f"Written by python -m megatron_gkd.plan: {job.gpus} GPUs ({job.rates.name})"
        f"{on}, {job.samples} samples a step.",
        "MODELLED": f"Modelled, not measured: {choice.seconds:.2f} s a step, "
        f"{choice.time.tokens_per_second_per_gpu:,.0f} tokens/s a GPU, "
        f"{choice.memory.total / GIB:.1f} GiB a GPU.",
        "VARIABLES": "".join(f"{variable} " for variable in variables),
        "NAME": shlex.quote(Path(name).name if name.isprintable() else "FILE"),  # in a comment
        "REPOSITORY": shlex.quote(str(Path(megatron_gkd.__file__).resolve().parents[1])),
        "MODEL": shlex.quote(os.path.abspath(config.model.model)),
        "OUTPUT": shlex.quote(config.run.output_dir),
        "THREADS": "4" if job.gpus == 1 else "1",
        "FLAGS": "\n".join(flag_lines(config)),
        "DATA": "" if has_data else DATA,
        "OF_PLAN": of_plan,
        "START": start if has_weights else WEIGHTS + start,
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub("@([A-Z_]+)@", lambda found: parts[found[1]], template)


def holds_weights(model: Path) -> bool:
    """Whether a folder has some: of Hugging Face, or a Megatron checkpoint."""
    return any(any(model.glob(files)) for files in ("*.safetensors", "*/*.distcp"))


def flag_lines(config: Config) -> list[str]:
    """Of the script: each setting that is not as a run has it without flags, a line; a comment for
    each group. Of a recipe or a file the values stand here.
    """
    defaults = default_settings()
    lines = []
    if config.data.dataset != [NO_DATA]:
        lines.append(f"    {flag('dataset', config.data.dataset)}")
    for group in fields(config):
        values = getattr(config, group.name)
        found = [
            flag(name, value)
            for name, value in vars(values).items()
            if name not in OF_SHELL and (name in CHOSEN or value != defaults[name])
        ]
        if found:
            lines.append(f"    # {values._argument_group_name}")
            lines += [f"    {one}" for one in found]
    return lines


def found_file(name: str) -> str:
    """The absolute path of a file that is here, with the `#N` behind it, so that the script starts
    anywhere; anything else as it is.
    """
    file = name if os.path.exists(name) else name.partition("#")[0]
    return os.path.abspath(file) + name[len(file) :] if os.path.exists(file) else name


def flag(name: str, value: Any) -> str:
    """`--name value` for a shell."""
    words = [text_of(one) for one in (value if isinstance(value, list) else [value])]
    words = list(map(found_file, words)) if name in PATHS else words
    if words[0].startswith("-"):  # argparse would take it for a flag
        return shlex.quote(f"--{name}={words[0]}")
    return f"--{name} {' '.join(shlex.quote(word) for word in words)}"


def text_of(value: Any) -> str:
    """As a flag has it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_new(path: str | None, *, overwrite: bool) -> None:
    """Raises ValueError where the file is there and is not to be replaced, or where its folder is
    not.
    """
    if path is None:
        return
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if target.exists() and not overwrite:
        raise ValueError(f"{path} is there already; name another file, or add --overwrite")
    if not target.parent.is_dir():
        raise ValueError(f"{path}: {target.parent} is no folder; make it first")


def write_new(path: str, text: str, *, overwrite: bool, executable: bool = False) -> None:
    """Write the file whole or not at all. Raises as `check_new`, or OSError."""
    check_new(path, overwrite=overwrite)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        if executable:
            mode = temporary.stat().st_mode
            temporary.chmod(mode | (mode & 0o444) >> 2)  # by those who may read it
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
