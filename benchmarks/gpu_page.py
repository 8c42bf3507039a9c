"""docs/gpu.md: what the stages of launch/gpu_checks.sh saw, a section for each, in their order.

    python -m benchmarks.gpu_page PAGE --stages doctor,kernels,... --stage NAME --title TITLE
                                  --status 0 --seconds 12.3 --log FILE --command TEXT

Puts the section of one stage into the page, in the place of an earlier one of that name; the others
stay as they are. The page is replaced at once, so that a killed run leaves a whole one. Every
section has its own date, commit, versions and hardware, since a stage may be run again elsewhere.
Imports no torch: it takes a fraction of a second.
"""

import argparse
import datetime
import os
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

HEAD = """# On a GPU: what `bash launch/gpu_checks.sh` saw

Written by that script: a stage that is run again replaces its section.
"""
VERSIONS = ("torch", "triton", "megatron-core", "transformers", "peft", "trl", "numpy")
LINES = 60  # of a log, its last ones
COLUMNS = 400  # of a line
# Lines of a log that say nothing about us.
NOISE = re.compile(r"warn|deprecat|^\s*$", re.IGNORECASE)
MEANINGS = {0: "passed", 124: "stopped at its time limit", 137: "killed at its time limit"}
NOT_RUN = 75  # the status of a stage for which no time was left, or whose tool is not there
MEANINGS[NOT_RUN] = "not run"


def hardware() -> str:
    """The GPUs as nvidia-smi names them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "no GPU"
    lines = done.stdout.strip().splitlines()
    return "; ".join(lines) if done.returncode == 0 and lines else "no GPU"


def versions() -> str:
    """Of what the numbers depend on, those that are installed."""
    found = []
    for name in VERSIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def commit(folder: Path) -> str:
    """$COMMIT, for a copy without .git; else that of the checkout."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    git = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=20)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def section(arguments: argparse.Namespace) -> str:
    """The stage's section."""
    meaning = MEANINGS.get(arguments.status, f"failed with status {arguments.status}")
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    text = arguments.log.read_text(encoding="utf-8", errors="replace")
    lines = [line[:COLUMNS].rstrip() for line in text.splitlines() if not NOISE.search(line)]
    # no line of a log may look like the end of a section or the head of another
    lines = [re.sub("^#", " #", line.replace("```", "'''")) for line in lines[-LINES:]]
    where = f"commit {commit(Path.cwd())} · {hardware()} · {versions()}"
    return "\n".join(
        [
            f"## {arguments.stage}: {arguments.title}",
            "",
            f"**{meaning}** in {arguments.seconds:.0f} s · {now} · {where}",
            "",
            f"`{arguments.command}`",
            "",
            "```",
            *lines,
            "```",
        ]
    )


def sections(page: str) -> dict[str, str]:
    """Name of a stage -> its section, of a page that `write` wrote."""
    parts = re.split(r"^(?=## \w+: )", page, flags=re.MULTILINE)[1:]
    return {part[3 : part.index(":")]: part.rstrip() for part in parts}


def write(path: Path, stages: Sequence[str], name: str, text: str) -> None:
    """Replace the page by one with this section in the place of stage `name`."""
    found = sections(path.read_text(encoding="utf-8")) if path.exists() else {}
    found[name] = text
    ordered = [found.pop(stage) for stage in stages if stage in found] + list(found.values())
    summary = []
    for part in ordered:
        title, _, said, *_ = part.splitlines()
        result, when, *where = said.split(" · ")
        summary.append(f"| {title[3:]} | {result} | {when} | {where[0]} |")
    table = ["| stage | result | when | of |", "|---|---|---|---|", *summary]
    page = "\n".join([HEAD, *table, "", "\n\n".join(ordered), ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("page", type=Path)
    add("--stages", required=True, help="all of them in their order, with commas between")
    add("--stage", required=True)
    add("--title", required=True)
    add("--status", type=int, required=True)
    add("--seconds", type=float, required=True)
    add("--log", type=Path, required=True)
    add("--command", required=True)
    arguments = parser.parse_args()
    text = section(arguments)
    write(arguments.page, arguments.stages.split(","), arguments.stage, text)


if __name__ == "__main__":
    main()
