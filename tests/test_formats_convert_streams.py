"""Conversions as streams: every byte of a tensor is read once, memory is that of a few blocks, the
progress is shown.
"""

import json
import math
import multiprocessing
import os
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf
from megatron_gkd.formats import megatron_writer, safetensors_writer, stored_tensor
from megatron_gkd.formats.megatron_folder import MegatronFolder
from megatron_gkd.formats.safetensors_folder import SINGLE, SafetensorsFolder
from megatron_gkd.formats.sources import FolderSource
from megatron_gkd.formats.stored_tensor import plan_shards
from megatron_gkd.formats.torch_dist import TorchDist
from megatron_gkd.formats.torch_dist_writer import EXTRA_STATE_FILE, write_description
from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.model.args import read_model_args
from tests.conversions import SHARD_BYTES, WHOLE

# --- each byte once -------------------------------------------------------------------------------


@pytest.fixture
def ranges_read(tmp_path, monkeypatch):
    """-> a function that gives the ranges (first byte, end) read of each file's tensors since it
    was called last, by whichever process.
    """
    log, read_into = tmp_path / "reads", stored_tensor._read_into
    log.touch()

    def read_and_note(descriptor, target, offset, path):
        with open(
            log, "a"
        ) as file:  # a line is one write, so lines of several processes do not mix
            file.write(json.dumps([str(path), offset, offset + target.nbytes]) + "\n")
        read_into(descriptor, target, offset, path)

    def since_last():
        found = defaultdict(list)
        for path, start, end in map(json.loads, log.read_text().splitlines()):
            if end > start:
                found[path].append((start, end))
        log.write_text("")
        return found

    monkeypatch.setattr(stored_tensor, "_read_into", read_and_note)
    return since_last


def joined(ranges):
    """Ranges that follow each other as one. AssertionError where two overlap."""
    whole = []
    for start, end in sorted(ranges):
        if whole and start < whole[-1][1]:
            raise AssertionError(f"bytes {start} to {min(end, whole[-1][1])} are read twice")
        if whole and start == whole[-1][1]:
            whole[-1] = (whole[-1][0], end)
        else:
            whole.append((start, end))
    return whole


@pytest.mark.parametrize("tp", [1, 2])
def test_each_byte_of_a_tensor_is_read_once(tiny_folder, tmp_path, ranges_read, tp):
    """Both directions; at TP 2 the matrices that are cut into columns as well."""
    folder, checkpoint = tiny_folder(**WHOLE), tmp_path / "checkpoint"
    hf_to_megatron(HfToMegatronConfig(folder, str(checkpoint), tp, num_workers=2), SHARD_BYTES)
    read, expected = ranges_read(), defaultdict(list)
    for tensor in SafetensorsFolder(folder).tensors.values():
        expected[str(tensor.path)].append((tensor.start, tensor.start + tensor.num_bytes))
    assert {path: joined(ranges) for path, ranges in read.items()} == {
        p: joined(r) for p, r in expected.items()
    }

    megatron_to_hf(
        MegatronToHfConfig(str(checkpoint), str(tmp_path / "back"), num_workers=2), SHARD_BYTES
    )
    read, expected, stored = ranges_read(), defaultdict(list), TorchDist(checkpoint / "release")
    for key, chunks in stored._chunks.items():
        for chunk in chunks:
            if chunk.file not in (EXTRA_STATE_FILE, "__padding_0.distcp"):
                start = stored._payload(key, chunk)
                num_bytes = math.prod(chunk.sizes) * stored.dtypes[key].itemsize
                expected[str(stored.folder / chunk.file)].append((start, start + num_bytes))
    assert {path: joined(ranges) for path, ranges in read.items()} == {
        p: joined(r) for p, r in expected.items()
    }


# --- memory ---------------------------------------------------------------------------------------

BIG = dict(vocab_size=150_000, hidden_size=512)  # fp32: 307 MB
MOST_MEMORY = 130e6  # a few blocks of 32 MiB


def make_big_folder(folder: Path) -> None:
    """A thinker whose embedding, tied to the head, is one tensor of 307 MB; the file is a hole."""
    text = dict(
        BIG,
        model_type="qwen3_omni_moe_text",
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    text |= dict(head_dim=8, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=16)
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    config = {
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": text,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, size in decoder_tensors(read_model_args(folder)).items():
        start, end = end, end + 4 * math.prod(size)
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / SINGLE, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def peak_growth(function) -> tuple:
    """(result, bytes by which the resident memory grew at its peak), in a process of its own: of a
    second call, as the first one brings pages of code and of the parent back that the system had
    taken. A tensor of hundreds of megabytes goes back to the system when it is freed.
    """

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    def run(connection):
        torch.set_num_threads(1)
        function()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        connection.send((function(), status("VmHWM") - before))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(theirs,))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def test_a_worker_holds_no_large_tensor(tmp_path):
    """The shard of a 307 MB tensor, both directions: memory is that of blocks."""
    make_big_folder(tmp_path / "model")
    model_args, folder = read_model_args(tmp_path / "model"), SafetensorsFolder(tmp_path / "model")
    source = megatron_writer.CheckpointSource(folder, model_args, 1, None)
    name = "model.embed_tokens.weight"
    shard = next(s for s in plan_shards({SINGLE: folder.tensors}) if name in s.names)
    assert shard.num_bytes > 300e6
    release = tmp_path / "checkpoint" / "release"
    release.mkdir(parents=True)
    file = release / "__0_0.distcp"
    result, growth = peak_growth(
        lambda: megatron_writer.write_shard(source, shard, file, lambda num_bytes: None)
    )
    assert growth < MOST_MEMORY
    assert file.stat().st_size > 300e6

    sizes = {
        key: size for key, size in source.checkpoint_sizes().items() if key.startswith("embedding.")
    }
    write_description(
        release, sizes, source.checkpoint_dtypes(), {file.name: result["chunks"]}, model_args
    )
    tensors = MegatronFolderOfOne(release, model_args).tensors
    source = FolderSource("test", release, model_args, {}, None, tensors, release, [], None, {})
    targets = {name: folder.tensors[name]}
    shard = type(shard)(SINGLE, (name,), shard.num_bytes)
    back, growth = peak_growth(
        lambda: safetensors_writer.write_shard(source, shard, targets, lambda num_bytes: None)
    )
    assert growth < MOST_MEMORY
    assert back["sha256"][name] == result["sha256"][name]


class MegatronFolderOfOne(MegatronFolder):
    """A checkpoint that holds one tensor of the model, not looked at more closely."""

    def _find_prefix(self):
        return ""

    def _check(self, model_args):
        pass


# --- the screen -----------------------------------------------------------------------------------


def test_progress_shows_bytes_rate_and_time_left(tiny_folder, tmp_path, capfd):
    folder = tiny_folder(**WHOLE)
    hf_to_megatron(HfToMegatronConfig(folder, str(tmp_path / "there"), num_workers=2), SHARD_BYTES)
    shown = re.split(r"[\r\n]", capfd.readouterr().err)
    size = sum(tensor.num_bytes for tensor in SafetensorsFolder(folder).tensors.values()) / 1e6
    line = next(line for line in reversed(shown) if line.startswith("there:"))
    assert re.match(
        rf"there: 100%.* {size:.2f}M/{size:.2f}M \[\d+:\d\d<00:00, +[\d.]+[kM]?B/s\]", line
    ), line


def test_number_of_processes(monkeypatch):
    """The default is two or more."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert HfToMegatronConfig("DIR", "DIR").num_workers == 2
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert MegatronToHfConfig("DIR", "DIR").num_workers == 8
    for settings in (HfToMegatronConfig, MegatronToHfConfig):
        with pytest.raises(ValueError, match="--num_workers 0: must be 1 or more"):
            settings("DIR", "DIR", num_workers=0)
