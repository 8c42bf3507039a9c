"""The documents are true: paths and flags exist, the tours are complete, data examples are valid
rows, and the checks before a commit are those of CI.
"""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from megatron_gkd.config import parse_config
from megatron_gkd.data.rows import check_row
from megatron_gkd.plan.settings import PlanSettings

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
FOLDERS = ("megatron_gkd", "checkpoint_tools", "demo", "launch", "benchmarks")  # of docs/tour.md
SOURCES = {".py", ".sh", ".txt", ".jinja", ".json", ".css", ".js"}
MOST_TOUR_LINES = 40
# Flags that the documents name and that are not settings of a run.
FOREIGN_FLAGS = {
    # other programs
    "rlhf_type",
    "gradient_checkpointing",
    "gkd_logits_topk",
    "use_vllm",
    "adapters",
    "help",
    # torchrun
    "nproc_per_node",
    "nnodes",
    "max_restarts",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_id",
    "requeue",  # Slurm
    # vLLM
    "omni",
    "port",
    # checkpoint_tools, each tested with its tool
    "hf_model",
    "checkpoint",
    "output",
    *(one.name for one in fields(PlanSettings)),
    "weight",
    "export",
    "merged",
    "quick",
    "tensor_tolerance",
    "family",
    # benchmarks
    "folder",
    "layers",
    "num_workers",
    # launch/: wheels, stages of the GPU checks
    "python",
    "torch",
    "present",
    "format",
    "extras",
    "only",
    "from",
    # of earlier versions
    "tensorboard",
}


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def own_words(document: Path) -> str:
    """Its text without indented commands of benchmarks, whose flags are not those of a run; of
    pages that programs write, without what was printed and all commands.
    """
    text = document.read_text(encoding="utf-8")
    text = re.sub(r"^    python -m benchmarks(.*\\\n)*.*$", "", text, flags=re.MULTILINE)
    if document.name == "gpu.md" or document.parent.name == "benchmarks":
        text = re.sub(r"^```\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"`python -m benchmarks[^`]*`", "", text)
    return text


def source_files() -> list[str]:
    """Every source file of FOLDERS but __init__.py, as a path from the root."""
    return sorted(
        str(path.relative_to(REPOSITORY))
        for folder in FOLDERS
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in SOURCES and path.name != "__init__.py"
    )


def section(document: str, title: str) -> list[str]:
    """The lines of a document from the heading `title` to the next heading of that level."""
    text = read(document).partition(f"## {title}\n")[2]
    assert text, f"{document} has no section {title!r}"
    return text.partition("\n## ")[0].strip().splitlines()


def test_the_readme_tour_is_short():
    assert 10 < len(section("README.md", "A tour")) <= MOST_TOUR_LINES


def test_the_readme_tour_names_every_folder():
    tour = "\n".join(section("README.md", "A tour"))
    folders = {str(Path(file).parent) for file in source_files()} - {"megatron_gkd"} | {"tests"}
    assert len(folders) > 12
    assert [folder for folder in sorted(folders) if f"`{folder}/`" not in tour] == []


def test_the_tour_page_describes_every_file_once():
    rows = [line for line in read("docs/tour.md").splitlines() if line.startswith("| `")]
    named = [row.split("|")[1].strip().strip("`") for row in rows]
    assert len(named) > 80
    assert sorted(named) == source_files()
    assert [row for row in rows if len(row.split("|")[2].strip()) < 10] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_paths_exist(document):
    text = own_words(document)
    folders = "|".join((*FOLDERS, "tests", "docs", r"\.ci", r"\.github"))
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)  # relative to the document
    text = re.sub(r"\]\([^)]*\)", "]", text)
    paths = re.findall(rf"(?<![\w./-])(?:{folders})/[\w./]*\w", text)
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    assert [path for path in linked if not (document.parent / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_modules_exist(document):
    """Modules and packages that are run by name; CHANGELOG.md also has the names of earlier
    versions.
    """
    modules = re.findall(r"python -m ([\w.]+)", document.read_text(encoding="utf-8"))
    ours = {module for module in modules if module.split(".")[0] in FOLDERS}
    endings = (".py", "/__main__.py")
    missing = [
        name
        for name in ours
        if not any((REPOSITORY / f"{name.replace('.', '/')}{end}").exists() for end in endings)
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_flags_exist(document):
    # not those of other programs with dashes inside
    flags = set(re.findall(r"--([a-z]\w+)(?![\w-])", own_words(document)))
    for flag in sorted(flags - FOREIGN_FLAGS):
        try:
            parse_config(["--model", "m", "--dataset", "d", f"--{flag}"])
        except ValueError as error:
            assert "not a setting" not in str(error), f"{document.name}: {error}"


def examples(document):
    blocks = re.findall(r"```json\n(.*?)```", read(document), re.DOTALL)
    return [
        check_row(json.loads(line), vocab_size=151_936)
        for block in blocks
        for line in block.splitlines()
    ]


def test_data_examples_are_valid_rows():
    rows = examples("README.md")
    assert (
        sum(row.teacher_messages is not None or row.teacher_input_ids is not None for row in rows)
        >= 3
    )
    assert sum(row.input_ids is not None for row in rows) >= 2
    alone, speech, thumbnail, reference, _ = examples("docs/data.md")
    assert alone.teacher_messages and not alone.has_response
    assert speech.media["audio"] and not any(speech.teacher_media.values())
    assert (
        thumbnail.media["image"] != thumbnail.teacher_media["image"]
        and thumbnail.teacher_messages is None
    )
    assert reference.teacher_messages and not reference.has_media


def test_commits_and_ci_are_checked_alike():
    """The hooks run what tests/run.sh runs, with the environment's tools; the workflow runs .ci/run
    on every Python that setup.py allows.
    """
    script = read("tests/run.sh")
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    names = {hook["name"] for hook in hooks[0]["hooks"]}
    checks = set(re.findall(r'"\$python" -m (ruff \w+|mypy)', script))
    assert names == checks == {"ruff format", "ruff check", "mypy"}
    assert {hook["language"] for hook in hooks[0]["hooks"]} == {"system"}

    job = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    assert "bash tests/run.sh" in read(".ci/run")
    first, end = re.findall(
        r"3\.(\d+)", re.findall(r'python_requires="(.*?)"', read("setup.py"))[0]
    )
    allowed = [f"3.{minor}" for minor in range(int(first), int(end))]
    assert job["strategy"]["matrix"]["python"] == allowed


def test_the_changelog_names_modules_that_exist():
    """The second column of the table of moved modules; `.name` is a neighbour of the one before."""
    rows = [line.split("|")[2] for line in section("CHANGELOG.md", "[Unreleased]") if "|" in line]
    package, missing = "", []
    for name in re.findall(r"`(\.?[a-z][\w.]+)`", "".join(rows)):
        module = f"{package}{name}" if name.startswith(".") else name
        package = module.rpartition(".")[0]
        path = REPOSITORY / module.replace(".", "/")
        if not (path.is_dir() or path.with_suffix(".py").is_file()):
            missing.append(module)
    assert missing == []
