"""What a run depends on is compared: between the ranks at the start, and with the checkpoint that
is resumed.
"""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.content_digest import weights_digest
from megatron_gkd.identity import OF_A_MACHINE
from tests.ranks import run_ranks
from tests.test_train import flags_of_run, write_data
from tests.train_runs import SMALL, _train, arguments, make_rows, run_training, write_rows

ROWS = make_rows(8)


def train_each(rank, world_size, argument_lists, change=None):
    """A run in which each rank is on a machine of its own with flags of its own, the last one
    perhaps with other software. What ends it; "" where it comes to its end.
    """
    from megatron_gkd import identity
    from megatron_gkd.data import shared_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_gkd.last_words.SECONDS_FOR_RANK_0", 0)
        patch.setattr(shared_folder, "_machine", lambda: f"machine-{rank}")
        if change == "code" and rank == world_size - 1:
            patch.setattr(identity, "code_digest", lambda: "0123")
        if change == "torch" and rank == world_size - 1:
            own = identity.package_versions()
            patch.setattr(identity, "package_versions", lambda: own | {"torch": "1.0"})
        try:
            _train(rank, world_size, [argument_lists[rank]])
        except SystemExit as error:
            assert error.code == 2
            return str(error.__cause__)
    return ""


@pytest.fixture(scope="module")
def flags(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity")
    return dict(
        model=tiny_folder(**SMALL),
        dataset=write_rows(folder / "rows.jsonl", ROWS),
        max_steps=1,
    )


def refused(flags, tmp_path, *, change=None, **of_last):
    """The one line that ends 3 ranks where the last has these flags."""
    own = flags | dict(output_dir=tmp_path / "out")
    argument_lists = [arguments(**own)] * 2 + [arguments(**own | of_last)]
    (said, *others) = run_ranks(train_each, 3, argument_lists, change)
    assert all(other == said for other in others)
    return said


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(learning_rate=0.5), "--learning_rate 0.5, rank 0 has 1e-05"),
        (dict(seed=7), "--seed 7, rank 0 has 42"),
        (dict(temperature=1), "--temperature 1.0, rank 0 has 2.0"),
        (dict(save_steps=7), "--save_steps 7, rank 0 has 50"),
        (dict(lora_rank=4), "--lora_rank 4, rank 0 has None"),
        (dict(tensor_model_parallel_size=3), "--tensor_model_parallel_size 3, rank 0 has 1"),
        (dict(resume_from_checkpoint="latest"), "--resume_from_checkpoint 'latest', rank 0 has No"),
        (dict(seed=7, lora_rank=4), "and 1 more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ranks_with_other_flags(flags, tmp_path, changes, text):
    """Before any group of the layout is made, which could not be."""
    said = refused(flags, tmp_path, **changes)
    assert said.startswith("rank 2 (on ") and text in said
    assert said.endswith("start all machines with the same flags, packages and code")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, text",
    [
        ("code", "code of megatron_gkd '0123', rank 0 has"),
        ("torch", "version of torch '1.0', rank"),
    ],
)
def test_ranks_with_other_software(flags, tmp_path, change, text):
    assert text in refused(flags, tmp_path, change=change)


def other_weights(folder: str, copy: Path) -> str:
    """The same model with one weight of its largest tensor changed."""
    copy.mkdir()
    for path in Path(folder).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return str(copy)


def test_ranks_with_other_content(flags, tmp_path):
    """Rows of another number or content, weights of the same sizes, a model that is not there."""
    other = write_rows(tmp_path / "other.jsonl", make_rows(8, seed=1))
    said = refused(flags, tmp_path, dataset=other)
    assert "has rows of --dataset '8 rows " in said and "rank 0 has '8 rows " in said
    said = refused(flags, tmp_path, model=other_weights(flags["model"], tmp_path / "model"))
    assert "rank 2 (on " in said and "has weights of --model '" in said
    said = refused(flags, tmp_path, model=tmp_path / "nowhere")
    assert "rank 2 (on " in said and f"--model {tmp_path / 'nowhere'}: no config.json there" in said


def test_ranks_with_other_settings_beside_the_same_weights(flags, tmp_path):
    """What config.json and adapter_config.json say changes what the same weights compute."""
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(flags["model"], model)
    path = model / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": ', '"rope_theta": 1'))
    assert path.read_bytes() != Path(flags["model"], "config.json").read_bytes()
    assert "has weights of --model '" in refused(flags, tmp_path, model=model)
    run_training(1, arguments(**flags, output_dir=tmp_path / "run"))
    shutil.copytree(tmp_path / "run" / "checkpoint-1", adapter)
    (adapter / "checkpoint_manifest.json").unlink()
    shutil.copytree(adapter, tmp_path / "other")
    path = tmp_path / "other" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 77}))
    said = refused(flags | dict(adapter=adapter), tmp_path, adapter=tmp_path / "other")
    assert "has weights of --adapter '" in said


def test_places_may_differ(flags, tmp_path):
    """The same content elsewhere, and what each machine does as it likes, is no difference."""
    here, copy = flags | dict(output_dir=tmp_path / "out"), tmp_path / "rows.jsonl"
    copy.write_bytes(Path(flags["dataset"]).read_bytes())
    there = here | dict(dataset=copy, dataset_num_proc=2, prepared_rows="none")
    argument_lists = [arguments(**here), arguments(**here | there)]
    assert run_ranks(train_each, 2, argument_lists) == ["", ""]
    assert {"dataset", "dataset_num_proc", "prepared_rows"} <= OF_A_MACHINE


def test_resumed_on_other_weights(flags, tmp_path):
    """Refused, unless it is meant; other versions and other code are a note."""
    own = flags | dict(output_dir=tmp_path / "out")
    run_training(1, arguments(**own))
    state_path = tmp_path / "out" / "checkpoint-1" / "trainer_state.json"
    other = dict(model=other_weights(flags["model"], tmp_path / "model"), max_steps=2)
    again = own | other | dict(resume_from_checkpoint="latest")
    (said,) = run_ranks(train_each, 1, [arguments(**again)])
    assert f"the weights of --model {other['model']} are not those of the checkpoint" in said
    assert "--allow_changed_inputs true" in said
    state = json.loads(state_path.read_text())
    assert state["identity"]["weights"] == weights_digest(flags["model"])
    state["identity"]["software"] |= {"version of torch": "1.0", "code of megatron_gkd": "0"}
    state_path.write_text(json.dumps(state))
    (state_path.parent / "checkpoint_manifest.json").unlink()
    said = run_training(1, arguments(**again, allow_changed_inputs="true"))
    assert "Note: the weights of --model" in said and "Resumed" in said
    assert "Note: version of torch was 1.0 and is" in said
    assert "Note: code of megatron_gkd was 0 and is" in said


def test_resumed_from_an_earlier_version(flags, tmp_path):
    own = flags | dict(output_dir=tmp_path / "out")
    run_training(1, arguments(**own))
    path = tmp_path / "out" / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["identity"]
    path.write_text(json.dumps(state))
    (path.parent / "checkpoint_manifest.json").unlink()
    said = run_training(1, arguments(**own | dict(max_steps=2, resume_from_checkpoint="latest")))
    assert "earlier version: its base weights are not compared" in said and "Resumed" in said


def test_a_digest_of_weights(tmp_path):
    """Another byte of a small file, another name, another size; what cannot be read is a value."""
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(100.0)}, path)
    seen = {weights_digest(str(tmp_path))}
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    seen.add(weights_digest(str(tmp_path)))
    path.write_bytes(content + b"\0")
    seen.add(weights_digest(str(tmp_path)))
    path.rename(tmp_path / "b.safetensors")
    seen.add(weights_digest(str(tmp_path)))
    (tmp_path / "b.safetensors").unlink()
    seen.add(weights_digest(str(tmp_path)))
    (tmp_path / "c.safetensors").mkdir()
    assert len(seen) == 5 and "Is a directory" in weights_digest(str(tmp_path))


def test_a_header_that_claims_the_whole_file_is_not_read_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little"))
    os.truncate(path, 2**30)  # holes take no disk
    tracemalloc.start()
    weights_digest(str(tmp_path))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20 + 100_000_000


def test_rows_are_compared_and_not_their_paths(tiny_folder, tmp_path):
    """The same rows in another place are no change. Another row is one, in the evaluation too; in
    training it is refused unless it is meant.
    """
    data = write_data(tiny_folder, tmp_path)
    run_training(1, flags_of_run(data, tmp_path / "run", max_steps=1, lmbda=0))
    rows = Path(data["dataset"]).read_text().splitlines(keepends=True)
    cases = {"moved": rows, "other": [*rows[:7], rows[0], *rows[8:]], "fewer": rows[1:]}
    for name, lines in cases.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    moved, other, fewer = (str(tmp_path / f"{name}.jsonl") for name in cases)
    for changes, expected in (
        (dict(dataset=moved), []),
        (
            dict(dataset=other),
            [
                "Note: dataset has 8 rows as before, but not the same, the first other one is "
                f"{other}:8"
            ],
        ),
        (
            dict(dataset=fewer, val_dataset=fewer),
            [
                f"Note: dataset had 8 rows and has 7, the first other one is {fewer}:1",
                f"Note: val_dataset had 0 rows and has 7, the first other one is {fewer}:1",
            ],
        ),
    ):
        changes |= dict(max_steps=1, lmbda=0)
        changes |= dict(resume_from_checkpoint=tmp_path / "run" / "checkpoint-1")
        if expected:
            with pytest.raises(RuntimeError, match="SystemExit: 2"):
                run_training(1, flags_of_run(data, tmp_path / "run", **changes))
        changes |= dict(allow_changed_inputs="true")
        said = run_training(1, flags_of_run(data, tmp_path / "run", **changes))
        notes = [line for line in said.splitlines() if "will differ" in line]
        assert [note.split(": the resumed")[0] for note in notes] == expected
