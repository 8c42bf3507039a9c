"""Checkpoints whose files are not what was written: which one a run goes on from, what it says."""

import json
import re
import shutil
import sys
from collections import Counter
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd import checkpoint, checkpoint_values, health, parallel
from megatron_gkd.checkpoint import check_whole, find_checkpoint, latest_of_rank_0
from megatron_gkd.checkpoint_files import OPTIMIZER, STATE, TEACHER_FOLDER
from megatron_gkd.checkpoint_manifest import MANIFEST, write_manifest
from megatron_gkd.checkpoint_state import read_state
from megatron_gkd.lora.peft_config import CONFIG, TENSORS, read_config
from megatron_gkd.run import Progress
from tests.ranks import run_ranks
from tests.test_checkpoint import flags_of_run, write_data
from tests.train_runs import layout_flags, run_training


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    return write_data(tiny_folder, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Checkpoints of steps 1 to 3, written by two ranks of TP 2 EP 2."""
    output = tmp_path_factory.mktemp("run") / "whole"
    flags = dict(max_steps=3, save_steps=1, lmbda=0, **layout_flags(tp=2, ep=2))
    run_training(2, flags_of_run(data, output, **flags))
    return output


NOT_FINITE = r"tensor \S+ holds NaN or Inf: an update had ruined it before it was saved"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 16
    path.write_bytes(bytes(content))


def zero(path: Path) -> None:
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:header] + bytes(len(content) - header))


def from_step_1(path: Path) -> None:
    shutil.copyfile(path.parents[1] / "checkpoint-1" / path.name, path)


def other_step(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 10**9 - 1}))


def other_alpha(path: Path) -> None:
    path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))


def torn(path: Path) -> None:
    path.write_text(path.read_text()[:-9])


def lose_both(path: Path) -> None:
    path.unlink()
    (path.parent / MANIFEST).unlink()


DAMAGES = {
    "flipped adapter": (TENSORS, flip, "its content has digest"),
    "flipped optimizer": (OPTIMIZER, flip, "its content has digest"),
    "optimizer all zero": (OPTIMIZER, zero, "its content has digest"),
    "optimizer of another step": (OPTIMIZER, from_step_1, "its content has digest"),
    "adapter of another step": (TENSORS, from_step_1, "its content has digest"),
    "state of another step": (STATE, from_step_1, "the folder's name says 3"),
    "step 1e9": (STATE, other_step, "step is 999,999,999, and the folder's name says 3"),
    "no optimizer": (OPTIMIZER, Path.unlink, "is missing, which checkpoint_manifest.json lists"),
    "no state": (STATE, Path.unlink, "is missing, which checkpoint_manifest.json lists"),
    "no adapter": (TENSORS, lose_both, "is missing"),
    "other alpha": ("adapter_config.json", other_alpha, "bytes, and checkpoint_manifest.json says"),
    "torn manifest": (MANIFEST, torn, "damaged, not a step and the bytes and digest"),
}


def look_in(rank, world_size, folders):
    """Of each folder: its latest whole checkpoint, why checkpoint-3, named by path, is refused
    (None: it is not), and what is printed.
    """
    place, found = parallel.initialize(torch.device("cpu")), []
    for folder in folders:
        named = Path(folder, "checkpoint-3")
        refusal = None
        with redirect_stdout(StringIO()) as said:
            latest = latest_of_rank_0(folder, place)
        try:
            check_whole(named, None, place, "--resume_from_checkpoint")
        except ValueError as error:
            refusal = str(error)
        found.append((latest, refusal, said.getvalue()))
    return found


def test_each_damage_is_named_and_the_newest_whole_checkpoint_taken(whole, tmp_path):
    folders = []
    for number, (name, damage, _) in enumerate(DAMAGES.values()):
        folders.append(shutil.copytree(whole, tmp_path / str(number)))
        damage(folders[-1] / "checkpoint-3" / name)
    untouched = shutil.copytree(whole, tmp_path / "untouched")
    folders.append(untouched)
    of_ranks = run_ranks(look_in, 3, [str(folder) for folder in folders])
    of_0 = of_ranks[0]
    for of_rank in of_ranks[1:]:
        assert [of[:2] for of in of_rank] == [of[:2] for of in of_0]
        assert not any(said for *_, said in of_rank)
    assert of_0[-1] == (untouched / "checkpoint-3", None, "")
    for folder, case, (name, _, expected), (latest, refusal, said) in zip(
        folders, DAMAGES, DAMAGES.values(), of_0
    ):
        assert latest == folder / "checkpoint-2", case
        path = folder / "checkpoint-3" / name
        if case == "no adapter":  # and no manifest: peft's own file is looked for elsewhere
            assert refusal is None
        else:
            assert refusal.startswith(f"--resume_from_checkpoint {path.parent}: {path}")
            assert "give another checkpoint" in refusal and "\n" not in refusal
        (line,) = said.splitlines()
        assert line.startswith("Note: checkpoint-3 is skipped") and str(path) in line, case
        assert expected in line, case


def edited(path: Path, edit, folder: Path | None = None) -> None:
    """A file with what `edit` makes of its tensors, of which it gets the name of the first second
    moment, if there is one; the manifest is of the new file.
    """
    tensors = load_file(path)
    first = next((name for name in tensors if name.endswith(".exp_avg_sq")), next(iter(tensors)))
    save_file(edit(tensors, first), path)
    folder = folder or next(one for one in path.parents if one.name == "checkpoint-3")
    (folder / MANIFEST).unlink()
    write_manifest(folder, 3, {})


def with_number(number: float):
    def edit(tensors, first):
        tensors[first].view(-1)[-1] = number
        return tensors

    return edit


def teacher_with_nan(path: Path) -> None:
    path.parent.mkdir()
    shutil.copyfile(path.parents[1] / TENSORS, path)
    edited(path, with_number(float("nan")))


RUINED = {
    "NaN in a moment": (OPTIMIZER, partial(edited, edit=with_number(float("nan"))), NOT_FINITE),
    "Inf in a moment": (OPTIMIZER, partial(edited, edit=with_number(float("inf"))), NOT_FINITE),
    "-Inf in a weight": (TENSORS, partial(edited, edit=with_number(-float("inf"))), NOT_FINITE),
    "NaN in the teacher": (f"{TEACHER_FOLDER}/{TENSORS}", teacher_with_nan, NOT_FINITE),
    "a square below 0": (
        OPTIMIZER,
        partial(edited, edit=with_number(-1e-9)),
        r"tensor \S+ is -1e-09 at its least, and a mean of squares is not below 0",
    ),
    "all moments zero": (
        OPTIMIZER,
        partial(edited, edit=lambda found, _: {name: 0 * of for name, of in found.items()}),
        "all moments are 0, and trainer_state.json counts 3 updates",
    ),
    "moments of another dtype": (
        OPTIMIZER,
        partial(edited, edit=lambda found, _: {name: of.half() for name, of in found.items()}),
        r"tensor \S+ is F16, and a run writes F32",
    ),
    "weights of another dtype": (
        TENSORS,
        partial(edited, edit=lambda found, _: {name: of.bfloat16() for name, of in found.items()}),
        r"tensor \S+ is BF16, and a run writes F32",
    ),
}


def test_numbers_that_no_run_can_go_on_from(whole, tmp_path):
    """In files that are what was written, of a version with a manifest and of one without:
    checkpoint-2 is taken, and named where checkpoint-3 was asked for.
    """
    folders = []
    for number, (name, ruin, _) in enumerate(RUINED.values()):
        for has_manifest in (True, False):
            folders.append(shutil.copytree(whole, tmp_path / f"{number}-{has_manifest}"))
            ruin(folders[-1] / "checkpoint-3" / name)
            if not has_manifest:
                (folders[-1] / "checkpoint-3" / MANIFEST).unlink()
    of_ranks = run_ranks(look_in, 3, [str(folder) for folder in folders])
    for of_rank in of_ranks[1:]:
        assert [of[:2] for of in of_rank] == [of[:2] for of in of_ranks[0]]
    cases = [case for case in RUINED.items() for _ in (True, False)]
    for folder, (case, (name, _, expected)), found in zip(folders, cases, of_ranks[0]):
        latest, refusal, said = found
        assert latest == folder / "checkpoint-2", case
        path = re.escape(f"{folder / 'checkpoint-3' / name}: ")
        assert re.search(f"^Note: checkpoint-3 is skipped.*{path}{expected}.*$", said), case
        good = re.escape(f"({folder / 'checkpoint-2'} is the newest good one before it)")
        assert re.search(f"{path}{expected}.*; give another checkpoint {good}$", refusal), case


def test_an_adapter_that_is_not_finite(data, whole, tmp_path):
    adapter = shutil.copytree(whole / "checkpoint-3", tmp_path / "adapter")
    edited(adapter / TENSORS, with_number(float("nan")), folder=adapter)
    for flag in ("adapter", "teacher_adapter"):
        flags = flags_of_run(data, tmp_path / "out", max_steps=1, **{flag: adapter})
        with pytest.raises(RuntimeError, match=f"--{flag} {adapter}: .*{NOT_FINITE}"):
            run_training(1, flags)


def test_an_adapter_without_numbers(data, whole, tmp_path):
    """As DeepSpeed's ZeRO-3 leaves it."""
    adapter = shutil.copytree(whole / "checkpoint-3", tmp_path / "adapter")
    empty = lambda found, _: {name: of[:0] for name, of in found.items()}
    edited(adapter / TENSORS, empty, folder=adapter)
    flags = flags_of_run(data, tmp_path / "out", max_steps=1, adapter=adapter)
    with pytest.raises(RuntimeError, match=rf"{adapter / TENSORS}: tensor \S+ is empty, \[0, "):
        run_training(1, flags)


def without_moments(folder: Path, **learned) -> None:
    """checkpoint-3 with moments of 0, in its state `has_learned` as given or not at all."""
    state = json.loads((folder / "checkpoint-3" / STATE).read_text())
    del state["has_learned"]
    (folder / "checkpoint-3" / STATE).write_text(json.dumps(state | learned))
    zeros = lambda found, _: {name: 0 * of for name, of in found.items()}
    edited(folder / "checkpoint-3" / OPTIMIZER, zeros)


def test_moments_that_may_be_zero(whole, tmp_path):
    """Of a run whose gradients were all 0, and of an earlier version, which did not say."""
    folders = [shutil.copytree(whole, tmp_path / name) for name in ("no signal", "earlier")]
    without_moments(folders[0], has_learned=False)
    without_moments(folders[1])
    for found in run_ranks(look_in, 2, [str(folder) for folder in folders]):
        assert found == [(folder / "checkpoint-3", None, "") for folder in folders]


def opened_in_a_look(rank, world_size, folder):
    """How often each file is opened by Python, in a process that ends with this."""
    place, opened = parallel.initialize(torch.device("cpu")), Counter()

    def count(event, args):
        if event == "open" and str(args[0]).startswith(str(folder)):
            opened[Path(args[0]).name] += 1

    sys.addaudithook(count)
    assert not checkpoint_values.what_cannot_be(folder, None, place)
    return opened


def test_a_file_is_not_opened_for_each_tensor(whole):
    """But for its header, then for its numbers: 30B with LoRA on all linears of the experts has
    110,592 tensors in both files.
    """
    (opened,) = run_ranks(opened_in_a_look, 1, whole / "checkpoint-3")
    assert opened == {TENSORS: 2, OPTIMIZER: 2}


def look_where_rank_0_cannot(rank, world_size, emptied, whole):
    """What each look says that one more reading of rank 0 fails in."""
    place, found = parallel.initialize(torch.device("cpu")), []
    run = SimpleNamespace(
        parallel=place,
        progress=Progress(step=3),
        config=SimpleNamespace(
            run=SimpleNamespace(output_dir=str(whole), resume_from_checkpoint=None)
        ),
    )

    def fail(*args):
        raise OSError("gone")

    looks = [
        (checkpoint_values, "read_state", lambda: check_whole(emptied, None, place, "--flag")),
        (checkpoint, "checkpoints", lambda: check_whole(emptied, None, place, "--flag")),
        (health, "read_state", lambda: health.last_good_checkpoint(run)),
    ]
    for module, name, look in looks:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(module, name, fail)
            try:
                found.append(look())
            except OSError as error:
                found.append(str(error))
    return found


def test_no_rank_waits_for_what_rank_0_cannot_read(whole, tmp_path):
    emptied = shutil.copytree(whole, tmp_path / "emptied") / "checkpoint-3"
    without_moments(emptied.parent, has_learned=True)
    of_ranks = run_ranks(look_where_rank_0_cannot, 2, emptied, whole, timeout=60)
    assert of_ranks[0] == of_ranks[1]
    state, beside, before = of_ranks[0]
    assert re.fullmatch(rf"rank 0 \(on \S+\) cannot read {emptied}: gone", state)
    assert beside.startswith(f"--flag {emptied}: {emptied / OPTIMIZER}: all moments are 0")
    assert beside.endswith("; give another checkpoint; those beside it cannot be read: gone")
    assert "right after the last good step" in before and "cannot be read: gone;" in before


def test_a_run_goes_on_from_the_whole_one_or_not_at_all(data, whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    flip(copy / "checkpoint-3" / OPTIMIZER)
    flags = dict(max_steps=3, save_steps=1, lmbda=0, resume_from_checkpoint="latest")
    said = run_training(1, flags_of_run(data, copy, **flags))
    assert "Note: checkpoint-3 is skipped" in said and "checkpoint-2 at step 2 of 3" in said
    broken = shutil.copytree(whole, tmp_path / "broken")
    for step in (1, 2, 3):
        flip(broken / f"checkpoint-{step}" / TENSORS)
    with pytest.raises(RuntimeError, match="no checkpoint in .* is whole"):
        run_training(1, flags_of_run(data, broken, **flags))
    adapter = broken / "checkpoint-3"
    with pytest.raises(RuntimeError, match=f"--adapter {adapter}: .*its content has digest"):
        run_training(1, flags_of_run(data, tmp_path / "next", max_steps=1, adapter=adapter))


SCALE = {"scale": 2.0, "growth_tracker": 0, "hysteresis_tracker": 1.0}
NAN_SCALE = {"scale": float("nan")}


@pytest.mark.parametrize(
    "field, value",
    [
        *(("step", value) for value in (None, "3", -1, 1.5, True, [3], {"step": 3}, 10**12)),
        *(("num_updates", value) for value in (None, "3", -1, {})),
        *(("loss_scale", value) for value in (None, 1.0, [], {"scale": 1.0}, SCALE | NAN_SCALE)),
        *(("settings", value) for value in (None, "all", [1])),
        *(("lora", value) for value in (None, "r", [], {})),
        *(("lora.rank", value) for value in (None, 0, -4, "4", 4.5, [4], 10**400 * -1, 10**400)),
        *(("lora.alpha", value) for value in (None, 0, "8", float("nan"), {"all": 8}, 10**400)),
        *(("lora.targets", value) for value in (None, "q_proj", [], [1], {"q_proj": 1})),
        *(("lora.towers", value) for value in (None, "no", 0)),
        *(("lora.use_rslora", value) for value in (None, "false", 1)),
        *(("data", value) for value in (None, [])),
        *(("data.dataset", value) for value in ([], {}, {"rows": 3}, {"rows": "3", "digests": []})),
        *(("data.dataset", {"rows": 3, "digests": value}) for value in (None, "a", [1])),
        *(("identity", value) for value in (None, [], {}, {"weights": "a"})),
        *(("identity.weights", value) for value in (None, 3)),
        *(("identity.software", value) for value in (None, "1.0", [])),
    ],
)
def test_fields_of_the_state(tmp_path, field, value):
    state = dict(step=3, num_updates=3, loss_scale=SCALE, settings={})
    state["lora"] = dict(rank=4, alpha=8, targets=["q_proj"], towers=False, use_rslora=False)
    (tmp_path / STATE).write_text(json.dumps(state))
    assert read_state(tmp_path, "settings") == state  # of an earlier version
    state["data"] = dict(dataset=dict(rows=3, digests=["a"]), val_dataset=None)
    state["identity"] = dict(weights="a", software={"version of torch": "1.0"})
    (tmp_path / STATE).write_text(json.dumps(state))
    assert read_state(tmp_path, "settings") == state
    group, _, name = field.rpartition(".")
    (state[group] if group else state)[name] = value
    (tmp_path / STATE).write_text(json.dumps(state))
    with pytest.raises(ValueError) as error:
        read_state(tmp_path, "settings")
    said = str(error.value)
    assert said.startswith(f"{tmp_path / STATE}: ") and "\n" not in said and len(said) < 400
    assert name in said or value == {}


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"", b"null", b"[]", b"3", b"[" * 100_000])
def test_a_state_that_is_no_object(tmp_path, content):
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{STATE}: damaged"):
        read_state(tmp_path)


def test_a_missing_state_beside_an_optimizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="--save_only_model"):
        read_state(tmp_path)
    (tmp_path / OPTIMIZER).touch()
    with pytest.raises(FileNotFoundError, match="is missing beside optimizer.safetensors"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [
        *(("r", value) for value in (None, "8", 0, -8, [8], {"all": 8}, True)),
        *(("lora_alpha", value) for value in (None, "16", 0, -1, float("nan"), [16], 10**400)),
        *(("peft_type", value) for value in (None, 3, ["LORA"], "IA3")),
        *(("use_rslora", value) for value in ("false", 1, [])),
        *(("target_modules", value) for value in (3, [None], {"q_proj": 1}, [["q_proj"]])),
        *(("rank_pattern", value) for value in ([8], "q_proj", {"q_proj": "8"}, {"q_proj": -1})),
        *(("alpha_pattern", value) for value in ([8], {"q_proj": None}, {"q_proj": {"all": 1}})),
        *(("layers_to_transform", value) for value in ("all", [None], {"0": 1}, ["0"])),
        *(("lora_dropout", value) for value in ("0.1", -0.5, 2, [0.1])),
        *(("base_model_name_or_path", value) for value in (3, ["model"])),
        ("bias", ["all"] * 1000),
        ("modules_to_save", {"lm_head": 1}),
        ("init_lora_weights", ["pissa"]),
    ],
)
def test_fields_of_adapter_config(tmp_path, field, value):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert read_config(tmp_path) == config
    (tmp_path / CONFIG).write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError) as error:
        read_config(tmp_path)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / CONFIG}: {field} ") and "\n" not in said
    assert len(said) < 400


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"", b"[]", b"null", b"[" * 100_000])
def test_an_adapter_config_that_is_no_object(tmp_path, content):
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=f"{CONFIG}: not "):
        read_config(tmp_path)


@pytest.mark.parametrize("name, value", [("lora_alpha", 7), ("use_rslora", True)])
def test_two_files_that_contradict_each_other(data, whole, tmp_path, name, value):
    """Of a checkpoint without a manifest: no new stage that nobody asked for."""
    folder = shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / MANIFEST).unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {name: value}))
    flags = dict(max_steps=3, lmbda=0, resume_from_checkpoint=folder)
    with pytest.raises(RuntimeError, match=f"{CONFIG}: {name} is {value}, and {STATE} beside it"):
        run_training(1, flags_of_run(data, tmp_path / "out", **flags))


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "removed")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name, expected in (("gone", "removed, which is not there"), ("a", "leads in a circle")):
        with pytest.raises(FileNotFoundError, match=f"{name} is a link .*{expected}"):
            find_checkpoint(str(tmp_path / name), tmp_path)
