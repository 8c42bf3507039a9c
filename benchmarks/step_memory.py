"""Peak memory of whole training steps at the real vocabulary: the loss on all logits at once, and
`linear_jsd`.

    python -m benchmarks.step_memory [--device cpu|cuda] [--vocab_size 151936] [--output FILE]

The small model with that vocabulary, 8 rows of 128 response tokens in one micro-batch, fp32, two
steps of `megatron_gkd.train`, each way in its own process. Before: fp32 logits [N, V] of both sides
and TRL's generalized_jsd_loss under autograd, which this file puts in place of our loss. Memory
is the resident size (CUDA: allocated bytes): at the start of step 1, when model and optimizer are
built, and the highest from then to the end of step 2. Writes docs/benchmarks/step_memory.md
(step_memory_gpu.md on CUDA); nothing for a vocabulary of another size.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss_tables import REAL
from benchmarks.meter import available_bytes, resident_bytes
from benchmarks.report import MIB, REPOSITORY, commit, machine, table
from megatron_gkd.loss import Divergence, LinearJsdOutput

DOCS = {"cpu": "docs/benchmarks/step_memory.md", "cuda": "docs/benchmarks/step_memory_gpu.md"}
NUM_ROWS, RESPONSE, PROMPT = 8, 128, 16
WAYS = {"before": "all logits, TRL's function", "after": "linear_jsd"}
UNITS_BEFORE = 14  # [N, V] float32 tensors that "before" needs at once, with some to spare


def all_logits(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    divergence: Divergence,
    *,
    vocab_size: int,
    **others: Any,
) -> LinearJsdOutput:
    """In place of `linear_divergence`: TRL's loss on the logits of all rows, without metrics."""
    from trl.experimental.gkd import GKDTrainer

    weight = weight[:vocab_size]  # the rest is padding
    student = student_hidden.float() @ weight.float().t()
    with torch.no_grad():
        teacher = teacher_hidden.float() @ weight.float().t()
    entries = GKDTrainer.generalized_jsd_loss(
        student.unsqueeze(0),
        teacher.unsqueeze(0),
        beta=1.0 - divergence.beta,
        temperature=divergence.temperature,
        reduction="none",
    )
    loss = entries.sum(-1).squeeze(0)
    zeros = torch.zeros_like(loss)
    return LinearJsdOutput(loss, loss.detach(), *[zeros] * (len(LinearJsdOutput._fields) - 2))


def run(way: str, argv: list[str], answer: str) -> None:
    """Train, in its own process, and record the memory when step 1 begins and when step 2 has
    ended.
    """
    from megatron_gkd import forward, train

    if way == "before":
        assert hasattr(forward, "linear_divergence")  # what forward.py calls
        setattr(forward, "linear_divergence", all_logits)  # noqa: B010 (of another type)
    cuda = "cuda" in argv
    seen: dict[str, float] = {}

    def start(*arguments: Any, _original: Callable = train.teacher_forward, **keywords: Any) -> Any:
        if not seen:
            seen["start"] = torch.cuda.memory_allocated() if cuda else resident_bytes("VmRSS")
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")
        return _original(*arguments, **keywords)

    def end(*arguments: Any, _original: Callable = train.save_if_due, **keywords: Any) -> Any:
        seen["peak"] = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
        Path(answer).write_text(json.dumps(seen))
        return _original(*arguments, **keywords)

    train.teacher_forward, train.save_if_due = start, end
    train.main(argv)


def write_rows(path: Path, vocab_size: int) -> None:
    """NUM_ROWS rows of random ids whose teacher reads a hint."""
    draw = random.Random(0)
    rows = []
    for _ in range(NUM_ROWS):
        prompt, hint, response = (
            [draw.randrange(vocab_size) for _ in range(n)] for n in (PROMPT, PROMPT, RESPONSE)
        )
        row = {
            "input_ids": prompt + response,
            "labels": [-100] * PROMPT + response,
            "teacher_input_ids": hint + prompt,
        }
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))


def measure(way: str, device: str, folder: str, root: Path) -> dict[str, Any] | str:
    """{"start", "peak": bytes, "jsd", "step_time": of step 2}, or a string that says why not."""
    answer, output = root / f"{way}.json", root / way
    flags = [
        "--model",
        folder,
        "--dataset",
        str(root / "rows.jsonl"),
        "--output_dir",
        str(output),
        "--device",
        device,
    ]
    flags += [
        "--torch_dtype",
        "float32",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--lmbda",
        "0",
    ]
    flags += [
        "--per_device_train_batch_size",
        str(NUM_ROWS),
        "--report_to",
        "none",
        "--learning_rate",
        "1e-3",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "1",
        "-m",
    ]
    command += ["benchmarks.step_memory", "--way", way, "--answer", str(answer), *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if not answer.is_file():
        return f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:100]}"
    line = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    return json.loads(answer.read_text()) | {
        name: line[name] for name in ("jsd", "step_time", "num_tokens")
    }


def main(arguments: argparse.Namespace) -> None:
    """Measure both ways, print and write the page."""
    from demo.tiny.config import TinyModelConfig
    from demo.tiny.folder import build_folder

    device, vocab_size = arguments.device, arguments.vocab_size
    found: dict[str, dict | str] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = build_folder(
            f"{root}/model", TinyModelConfig(vocab_size=vocab_size, thinker_only=True)
        )
        write_rows(Path(root, "rows.jsonl"), vocab_size)
        for way in WAYS:
            needed = UNITS_BEFORE * 4 * NUM_ROWS * RESPONSE * vocab_size if way == "before" else 0
            if needed > available_bytes(device):
                found[way] = f"does not fit in memory: about {needed / 2**30:.0f} GiB"
            else:
                found[way] = measure(way, device, folder, Path(root))
    rows = []
    for way, name in WAYS.items():
        values = found[way]
        if isinstance(values, str):
            rows.append([way, name, values, "-", "-", "-", "-"])
            continue
        sizes = (values["start"], values["peak"], values["peak"] - values["start"])
        times = (f"{values['step_time']:.2f}", f"{values['jsd']:.6f}")
        rows.append([way, name, *(f"{size / MIB:.0f}" for size in sizes), *times])
    one = 4 * NUM_ROWS * RESPONSE * vocab_size / MIB
    header = [
        "",
        "loss",
        "MiB at the start of step 1",
        "peak MiB",
        "above the start",
        "s, step 2",
        "jsd, step 2",
    ]
    command = "python -m benchmarks.step_memory " + " ".join(sys.argv[1:])
    text = (
        f"# Memory of a whole training step\n\nCommit {commit()}; {machine(device)}; "
        f"torch {torch.__version__}; `{command.strip()}`. "
        "How: the head of `benchmarks/step_memory.py`.\n"
        f"{NUM_ROWS * RESPONSE} response tokens x {vocab_size} columns: "
        f"one float32 [N, V] tensor is {one:.0f} MiB.\n\n" + table(header, rows)
    )
    print(text)
    output = arguments.output or (REPOSITORY / DOCS[device] if vocab_size == REAL else None)
    if output:
        Path(output).write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--vocab_size", type=int, default=REAL)
    parser.add_argument(
        "--output", help="a file for the Markdown, instead of the page in docs/benchmarks"
    )
    if "--way" in sys.argv:
        own = sys.argv[1:5]  # --way WAY --answer FILE, then flags of megatron_gkd.train
        run(own[1], sys.argv[5:], own[3])
    else:
        main(parser.parse_args())
