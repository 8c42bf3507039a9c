"""Does the working tree still compute the bits that another revision computes? For a change that is
not meant to change numbers:

    python -m tests.same_bits REVISION [--keep DIR]

Checks REVISION out into a temporary folder and runs the same commands with both trees, each in its
own processes: the loss on many settings, trainings with fixed seeds on gloo ranks (on-policy and
off-policy, text and sound, TP, EP, PP, recomputation, bfloat16), one of them resumed from what
REVISION saved, conversions in both directions, a merge, an adapter of a lower rank, the small
model, what the training command makes of its flags, and the tools' --help. Compares metrics (times
aside), adapters, optimizer states, converted folders and settings, value by value and file by
file; only settings may be new. Prints a line for each comparison and where a difference begins;
the exit status is 1 on any. Takes about ten minutes on two cores.
"""

import argparse
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
# Of a metrics line: what a clock or the machine says.
MEASURED = ("tokens_per_second", "peak_memory_gib")
STATE = "trainer_state.json"  # of a checkpoint: compared setting by setting
SETTINGS = "settings: "  # what the names of comparisons in which there may be new values begin with
# Of run.json: what no two runs share.
ELSEWHERE = (".started", ".config.run.output_dir", ".config.run.resume_from_checkpoint")
TOOLS = ("hf_to_megatron", "megatron_to_hf", "merge_lora", "lower_rank", "verify")
COMMON = (
    "--device cpu --max_completion_length 6 --logging_steps 1 "
    "--per_device_train_batch_size 2 --per_device_eval_batch_size 2 "
    "--gradient_accumulation_steps 2 --eval_steps 2 --save_steps 2 "
    "--learning_rate 1e-3 --top_k 20 --lmbda 0.5"
)
ON_POLICY = (
    "--torch_dtype float32 --tensor_model_parallel_size 2 --expert_model_parallel_size 2 "
    "--sft_alpha 0.2 --lora_dropout 0.1 --max_steps 4"
)
# name: (ranks, data, flags)
TRAININGS = {
    "on-policy, TP 2 EP 2": (4, "text", ON_POLICY),
    "teacher's text, PP 2": (
        2,
        "text",
        "--torch_dtype float32 --pipeline_model_parallel_size 2 --divergence forward_kl "
        "--seq_kd true --recompute full --max_steps 2",
    ),
    "sound, TP 2": (
        2,
        "sound",
        "--torch_dtype float32 --tensor_model_parallel_size 2 --expert_model_parallel_size 2 "
        "--divergence reverse_kl --lora_towers true --max_steps 2",
    ),
    "bfloat16, LoRA on the lm_head": (
        1,
        "text",
        "--torch_dtype bfloat16 --lora_target_modules q_proj lm_head --divergence_clip 2 "
        "--max_steps 2",
    ),
    "resumed": (4, "text", ON_POLICY),
}
RESUMED = "resumed"  # goes on from what the first training of REVISION saved after half its steps
COMMAND_LINES = (
    "",
    "--beta 0.3 --temperature 2 --divergence skew_kl",
    "--lmbda 0:0.1,100:0.9 --seq_kd true --sft_alpha 0.1 --divergence_clip 4",
    "--tensor_model_parallel_size 4 --expert_model_parallel_size 8 --lora_rank 64",
    "--lora_target_modules q_proj down_proj --recompute full --bf16 true",
    "--max_steps 10 --num_train_epochs 3 --warmup_ratio 0.1 --lr_scheduler_type cosine",
    "--no_tie --lr 1",
    "--learning-rate 1e-5 --logging_steps 0",
    "--beta 2",
    "--temperature nan",
    "--lmbda 5:x",
    "--top_p 0 --top_k -1",
    "--torch_dtype float64",
    "--save_only_model maybe",
    "--deepspeed zero3 --seed 1",
    "stray",
)


def digest(*tensors: Any) -> str:
    """Of the bits of torch tensors; None counts."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(b"none" if tensor is None else tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def loss_cases() -> dict[str, str]:
    """Loss, metrics and gradient of the public functions on every kind, with and without labels."""
    import torch

    from megatron_gkd.loss import linear_jsd, logits_jsd, vocab_parallel_jsd

    found = {}
    for kind, beta, temperature, clip, labelled, dtype in product(
        ("jsd", "forward_kl", "reverse_kl"),
        (0.1, 0.5),
        (1.0, 2.0),
        (None, 0.01),
        (False, True),
        (torch.float32, torch.bfloat16),
    ):
        torch.manual_seed(0)
        student, teacher = (torch.randn(37, 16).to(dtype).requires_grad_() for _ in range(2))
        weight = torch.randn(211, 16).to(dtype)
        logits = [(3 * torch.randn(37, 211)).to(dtype).requires_grad_() for _ in range(2)]
        labels = torch.randint(0, 200, (37,))
        labels[::5] = -100
        settings = dict(divergence=kind, beta=beta, temperature=temperature, clip=clip)
        more: dict[str, Any] = {"labels": labels, "sft_alpha": 0.3} if labelled else {}
        outputs = {
            "linear_jsd": linear_jsd(
                student, teacher.detach(), weight, vocab_size=207, **settings, **more
            ),
            "logits_jsd": logits_jsd(logits[0], logits[1].detach(), **settings, **more),
        }
        case = f"{kind} {beta} {temperature} {clip} {labelled} {dtype}"
        for name, output in outputs.items():
            inputs = student if name == "linear_jsd" else logits[0]
            (gradient,) = torch.autograd.grad(output.loss.sum(), inputs)
            found[f"{name} {case}"] = digest(*output, gradient.view(torch.uint8))
        if not labelled:
            loss = vocab_parallel_jsd(logits[0], logits[1].detach(), **settings)
            (gradient,) = torch.autograd.grad(loss.sum(), logits[0])
            found[f"vocab_parallel_jsd {case}"] = digest(loss, gradient.view(torch.uint8))
    return found


def leaves(config: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting in dataclasses of dataclasses."""
    for one in fields(config):
        value = getattr(config, one.name)
        yield from leaves(value) if is_dataclass(value) else [(one.name, repr(value))]


def command_lines() -> dict[str, Any]:
    """What the training's command line makes of flags: every setting and what is printed, or the
    error's text.
    """
    from megatron_gkd.config import parse_config

    found: dict[str, Any] = {}
    for line in COMMAND_LINES:
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                config = parse_config(["--model", "m", "--dataset", "d", *line.split()])
            found[f"{line}: printed"] = printed.getvalue()
            found |= {f"{line}: {name}": value for name, value in leaves(config)}
        except ValueError as error:
            found[f"{line}: error"] = " ".join(str(error).split())
    return found


PROBES = {"loss": loss_cases, "flags": command_lines}


def probe(name: str, tree: Path) -> None:
    """Print the answers of one of PROBES with the package of `tree`, which comes first in
    PYTHONPATH.
    """
    package = importlib.import_module("megatron_gkd")
    assert Path(package.__path__[0]).parent == tree, f"{package.__path__} is not of {tree}"
    print(json.dumps(PROBES[name]()))


def run(tree: Path, log: Path, *command: str) -> str:
    """Run `python COMMAND` with the code of `tree` and return what it printed; stderr goes to the
    end of `log`. RuntimeError with its errors and its last lines if it fails.
    """
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with open(log, "a", encoding="utf-8") as errors:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8").splitlines()
        said = [line for line in lines if "megatron_gkd: error" in line] + lines[-20:]
        ended = f"{tree}: {' '.join(command)} ended with {done.returncode}:"
        raise RuntimeError("\n".join([ended, *said]))
    return done.stdout


def write_data(folder: Path) -> None:
    """Rows with token ids and another view for the teacher; rows that are heard."""
    draw = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(300, 500) for _ in range(draw.randrange(low, high))]

    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for _ in range(24):
            prompt, answer = tokens(3, 9), tokens(3, 9)
            row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
            file.write(json.dumps(row | {"teacher_input_ids": tokens(12, 13)}) + "\n")
    sound = ["--output", str(folder / "sound"), "--num_train", "24", "--num_heldout", "2"]
    run(REPOSITORY, folder / "log", "-m", "demo.speech_data", *sound)


def help_answers(helps: dict[str, str]) -> dict[str, str]:
    """{what: value} of the tools' --help: what each does, and each of its flags."""
    found = {}
    for tool, text in helps.items():
        _usage, description, *_ = text.split("\n\n")
        found[f"{tool}: {' '.join(description.split())}"] = "said"
        found |= {f"{tool} {flag}": "there" for flag in re.findall(r"--[a-z_]+", text)}
    return found


def work(tree: Path, shared: Path, out: Path) -> None:
    """Everything that `tree` computes, into `out`. shared: the data, and of the first tree the
    model and a checkpoint.
    """
    out.mkdir()
    log = out / "log"
    for name in PROBES:
        answers = run(tree, log, __file__, "--probe", name, str(tree))
        (out / f"{name}.json").write_text(answers, encoding="utf-8")
    helps = {tool: run(tree, log, "-m", f"checkpoint_tools.{tool}", "--help") for tool in TOOLS}
    (out / "help.json").write_text(json.dumps(help_answers(helps)), encoding="utf-8")

    def tool(name: str, output: str, *flags: object) -> None:
        print(f"    {name}", flush=True)
        command = [f"checkpoint_tools.{name}", "--output", str(out / output), *map(str, flags)]
        run(tree, log, "-m", *command)

    lessons = ["--train_steps", 5, "--tower_steps", 2, "--seed", 3]
    tool("make_tiny_model", "model", "--num_hidden_layers", 4, *lessons)
    model, saved = shared / "model", shared / "checkpoint-2"
    if not model.exists():
        model.symlink_to(out / "model")
    for number, (name, (num_ranks, data, flags)) in enumerate(TRAININGS.items()):
        print(f"    training: {name}", flush=True)
        rows = shared / {"text": "text.jsonl", "sound": "sound/train.jsonl"}[data]
        command = ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(num_ranks), "-m", "megatron_gkd.train"]
        command += ["--model", str(model), "--dataset", str(rows), "--split_dataset_ratio", "0.2"]
        command += ["--max_length", {"text": "48", "sound": "96"}[data]]
        command += ["--output_dir", str(out / f"run{number}"), *COMMON.split(), *flags.split()]
        if name == RESUMED:
            command += ["--resume_from_checkpoint", str(saved)]
        run(tree, log, *command)
        if not saved.exists():
            shutil.copytree(out / "run0" / saved.name, saved)
    adapter = out / "run0/checkpoint-4"
    tool("hf_to_megatron", "megatron", "--hf_model", model)
    tool("megatron_to_hf", "back", "--checkpoint", out / "megatron")
    tool("megatron_to_hf", "exported", "--checkpoint", adapter, "--export", "adapter")
    tool("merge_lora", "merged", "--hf_model", model, "--adapter", adapter)
    tool("lower_rank", "lower", "--hf_model", model, "--adapter", adapter, "--lora_rank", 2)


def folder_digests(folder: Path) -> dict[str, str]:
    """{file: digest of its bytes} of a folder; not empty."""
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != STATE
    }
    assert found, f"{folder} is empty"
    return found


def json_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a JSON mapping."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from json_leaves(below, f"{path}.{key}")
    else:
        yield path, value


def run_answers(folder: Path) -> dict[str, Any]:
    """{what: value} of a training: every metric of every line, the bits of its checkpoints."""
    found: dict[str, Any] = {"newest": (folder / "latest_checkpoint").read_text(encoding="utf-8")}
    for name in ("metrics.jsonl", "eval.jsonl"):
        for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
            for key, value in json.loads(line).items():
                if not key.endswith("_time") and key not in MEASURED:
                    found[f"{name}, line {number}: {key}"] = value
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        digests = folder_digests(checkpoint)
        found |= {f"{checkpoint.name}/{file}": value for file, value in digests.items()}
    return found


def run_settings(folder: Path) -> dict[str, Any]:
    """{what: value} of what a training records of itself: run.json, the state in its
    checkpoints.
    """
    found = {}
    for path in [folder / "run.json", *sorted(folder.glob(f"checkpoint-*/{STATE}"))]:
        values = json_leaves(json.loads(path.read_text(encoding="utf-8")))
        name = path.relative_to(folder)
        found |= {f"{name} {key}": value for key, value in values if key not in ELSEWHERE}
    return found


def answers(out: Path) -> dict[str, dict[str, Any]]:
    """{comparison: {what: value}} of one tree."""
    found = {"loss": json.loads((out / "loss.json").read_text())}
    found[f"{SETTINGS}flags"] = json.loads((out / "flags.json").read_text())
    found["--help of the tools"] = json.loads((out / "help.json").read_text())
    for number, name in enumerate(TRAININGS):
        found[f"training: {name}"] = run_answers(out / f"run{number}")
        found[f"{SETTINGS}{name}"] = run_settings(out / f"run{number}")
    for name in ("model", "megatron", "back", "exported", "merged", "lower"):
        found[f"folder: {name}"] = folder_digests(out / name)
    return found


def differences(before: dict[str, Any], after: dict[str, Any], may_be_new: bool) -> list[str]:
    """What has another value, is there no longer, or, unless it may be, is new."""
    names = before if may_be_new else before | after
    return [
        f"{name}: {before.get(name, 'nothing')} before, {after.get(name, 'nothing')} after"
        for name in names
        if name not in before or name not in after or before[name] != after[name]
    ]


def report(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> bool:
    """Print a line for each comparison and the first differences; whether there is none."""
    same = True
    for name, values in before.items():
        found = differences(values, after[name], name.startswith(SETTINGS))
        same &= not found
        print(f"{name:<40} {len(values):>5} values  {'DIFFERS' if found else 'same'}")
        for line in found[:5]:
            print(f"    {line}")
        if len(found) > 5:
            print(f"    and {len(found) - 5} more")
    return same


@contextmanager
def checkout(revision: str, folder: Path) -> Iterator[Path]:
    """A worktree of `revision`, removed at the end."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main(revision: str, keep: str | None) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(keep or scratch).resolve()
        root.mkdir(parents=True, exist_ok=True)
        (root / "shared").mkdir()
        write_data(root / "shared")
        with checkout(revision, root / "tree") as tree:
            for name, code in (("before", tree), ("after", REPOSITORY)):
                print(f"running with {code}", flush=True)
                work(code, root / "shared", root / name)
        same = report(answers(root / "before"), answers(root / "after"))
    print(f"{'the same bits as' if same else 'other bits than'} {revision}")
    return 0 if same else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        probe(sys.argv[2], Path(sys.argv[3]))
        sys.exit()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="a commit, branch or tag")
    parser.add_argument("--keep", help="a new folder that keeps what both trees wrote")
    arguments = parser.parse_args()
    sys.exit(main(arguments.revision, arguments.keep))
