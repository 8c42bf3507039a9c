"""What README and docs say is there: the tour names every file, paths and flags exist, data
examples are valid rows.
"""

import json
import re
from pathlib import Path

import pytest

from megatron_gkd.config import parse_config
from megatron_gkd.data.rows import check_row

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
# Flags that the documents name because they belong to other programs or to our own small ones.
FOREIGN_FLAGS = {
    "rlhf_type",
    "gradient_checkpointing",
    "use_vllm",
    "adapters",
    "help",
    "nproc_per_node",
}
# Of checkpoint_tools, each tested with its tool.
FOREIGN_FLAGS |= {
    "hf_model",
    "checkpoint",
    "output",
    "weight",
    "export",
    "merged",
    "quick",
    "tensor_tolerance",
}


def test_the_tour_names_every_file():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    patterns = (
        "megatron_gkd/**/*.py",
        "checkpoint_tools/*.py",
        "launch/*.py",
        "launch/*.sh",
        "benchmarks/*.py",
    )
    files = [
        str(path.relative_to(REPOSITORY))
        for pattern in patterns
        for path in REPOSITORY.glob(pattern)
    ]
    named = [file for file in files if not file.endswith("__init__.py")]
    assert len(named) > 40
    assert [file for file in named if f"`{file}`" not in readme] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document):
    text = document.read_text(encoding="utf-8")
    paths = re.findall(
        r"\b(?:megatron_gkd|checkpoint_tools|launch|tests|docs|benchmarks)/[\w./]*\w", text
    )
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_exist(document):
    for flag in sorted(
        set(re.findall(r"--([a-z]\w+)", document.read_text(encoding="utf-8"))) - FOREIGN_FLAGS
    ):
        try:
            parse_config(["--model", "m", "--dataset", "d", f"--{flag}"])
        except ValueError as error:
            assert "not a setting" not in str(error), f"{document.name}: {error}"


def examples(document):
    blocks = re.findall(
        r"```json\n(.*?)```", (REPOSITORY / document).read_text(encoding="utf-8"), re.DOTALL
    )
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
    speech, thumbnail, reference = examples("docs/data.md")
    assert speech.media["audio"] and not any(speech.teacher_media.values())
    assert (
        thumbnail.media["image"] != thumbnail.teacher_media["image"]
        and thumbnail.teacher_messages is None
    )
    assert reference.teacher_messages and not reference.has_media
