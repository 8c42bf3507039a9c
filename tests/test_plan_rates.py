"""Rates of a machine: files, interpolation, the seconds of products and collectives; what
benchmarks/rates.py times.
"""

import json
import math
from dataclasses import replace

import pytest
import torch

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.placement import Group
from megatron_gkd.plan.rates import NEEDED, SHIPPED, interpolate, read_rates
from megatron_gkd.plan.step_time import step_time
from megatron_gkd.plan.work import Attention, Launches, Moved, Product
from tests.plans import GUIDE_STEP, REAL

H100 = read_rates("h100")


def test_what_ships_names_its_sources():
    assert (H100.device, H100.gpus_per_node, H100.nics_per_gpu) == ("cuda", 8, 1)
    assert H100.gpu_memory_bytes == pytest.approx(79.2 * 2**30, rel=0.001)
    measured = dict(
        zip(("bytes.copy", "launch.forward"), (2.58e12, 1.05e-5)),
    )
    assert {name: H100.number(name) for name in measured} == measured
    assert 4.6e14 <= H100.at("grouped.columns", 768) < H100.at("grouped.columns", 1536)
    assert H100.at("grouped.columns", 1536) == pytest.approx(5.6e14)
    assert H100.at("dense.rows", 4096) == 7.5e14
    assert set(SHIPPED) == {"h100"}


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda file: file.pop("entries"), '"entries" is missing'),
        (lambda file: file["entries"].pop("wait"), "wait is missing"),
        (lambda file: file["entries"]["wait"].pop("source"), "wait has no value, unit and source"),
        (lambda file: file["entries"]["wait"].update(value=-1), "wait is -1, it must be a number"),
        (lambda file: file["entries"]["wait"].update(value=True), "wait is True"),
        (lambda file: file["entries"]["wait"].update(value=[[1, 2]]), "wait must be one number"),
        (lambda file: file["entries"]["bytes.copy"].update(value=0), "bytes.copy is 0, it must be"),
        (lambda file: file["entries"]["bytes.copy"].update(value=math.inf), "bytes.copy is inf"),
        (lambda file: file["entries"]["gpus_per_node"].update(value=0.5), "gpus_per_node is 0.5"),
        (lambda file: file.update(name="mine\ntouch /tmp/mine"), "name must be one line of 200"),
        (lambda file: file.update(device="tpu"), "device is 'tpu', it must be cuda or cpu"),
        (
            lambda file: file["entries"]["dense.rows"].update(value=[[8, 1.0], [4, 1.0]]),
            "dense.rows: its points must ascend",
        ),
    ],
)
def test_a_file_that_is_wrong(tmp_path, change, says):
    entries = {name: {"value": 1, "unit": "s", "source": "here"} for name in NEEDED}
    file = {"name": "mine", "device": "cpu", "entries": entries}
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(file))
    assert read_rates(str(path)).name == "mine"
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match="rates.json: ") as error:
        read_rates(str(path))
    assert says in str(error.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"--gpu a100: no such file, .*\(h100\); .* --output F"):
        read_rates("a100")
    (tmp_path / "text").write_text("rates")
    with pytest.raises(ValueError, match="text: no JSON"):
        read_rates(str(tmp_path / "text"))


@pytest.mark.parametrize(
    "gpus, missing",
    [(16, "no network.any, for collectives between machines"), (8, "no node.any, for")],
)
def test_links_that_were_not_measured(gpus, missing):
    """On one machine benchmarks/rates.py cannot measure a network, on one GPU no link at all."""
    links = ("network.", "node.") if gpus == 8 else ("network.",)
    entries = {name: of for name, of in H100.entries.items() if not name.startswith(links)}
    rates, layout = replace(H100, entries=entries), ParallelConfig(1)
    args = read_model_args(REAL)
    alone = step_time(args, layout, GUIDE_STEP, 1, rates)
    assert alone == step_time(args, layout, GUIDE_STEP, 1, H100)
    with pytest.raises(ValueError, match=missing):
        step_time(args, layout, GUIDE_STEP, gpus, rates)


def test_interpolation():
    points = ((4.0, 1.0), (16.0, 4.0), (64.0, 4.0))
    assert interpolate(points, 8) == pytest.approx(2.0)
    assert [interpolate(points, size) for size in (1, 4, 16, 30, 64, 100)] == [1, 1, 4, 4, 4, 4]


def test_products_take_the_slower_of_multiplications_and_bytes():
    large = Product(part="", rows=8192, columns=4096, inner=2048, number_bytes=2)
    assert H100.seconds(large, {}) == pytest.approx(2 * 8192 * 4096 * 2048 / 7.5e14)
    narrow = replace(large, columns=8)
    numbers = 8192 * 2048 + 8 * 2048 + 8192 * 8
    assert H100.seconds(narrow, {}) == pytest.approx(2 * numbers / 2.9e12)
    # an expert's rows are few, and every expert has a matrix
    experts = replace(large, rows=128 * 4, groups=128)
    numbers = 512 * 2048 + 128 * 2048 * 4096 + 512 * 4096
    assert H100.seconds(experts, {}) == pytest.approx(2 * numbers / 2.9e12)
    result = replace(experts, rows=16, inner=65536, outer=True)
    assert result.num_bytes == 2 * (16 * 65536 + 65536 * 4096 + 128 * 16 * 4096)
    three = H100.seconds(replace(large, times=3), {})
    assert three == pytest.approx(3 * H100.seconds(large, {}))


def test_an_h100s_attention_and_copies():
    """As docs/training_step.md has them: 4 rows of 2,048 tokens."""
    forward = Attention(pairs=4 * 2048 * 2048 / 2, row=2048, heads=32 * 128)
    assert H100.seconds(forward, {}) == pytest.approx(259e-6, rel=0.01)
    assert H100.seconds(replace(forward, backward=True), {}) == pytest.approx(919e-6, rel=0.01)
    assert H100.seconds(Moved(kernel="add", num_bytes=2.58e9, times=2), {}) == pytest.approx(2e-3)
    # the system's memory costs a GPU nothing, nor does what its kernels read in place
    for kernel in ("fresh", "pair_matrices"):
        moved = Moved(kernel=kernel, num_bytes=2.58e9)
        assert H100.seconds(moved, {}) == 0
        measured = replace(H100, entries=H100.entries | {f"bytes.{kernel}": 1e9})
        assert measured.seconds(moved, {}) == pytest.approx(2.58)
    assert H100.seconds(Launches(kind="forward", times=100), {}) == pytest.approx(1.05e-3)


def test_collectives_by_link():
    size, inside = 2**30, Group(8, 1, 8, 1)
    of = lambda kind, group, rates=H100: rates.collective(kind, size, group)
    assert of("all_gather", Group(1, 1, 1, 1)) == 0
    gather = of("all_gather", inside)
    assert gather == pytest.approx(3 * 4e-6 + 7 / 8 * size / 3.6e11)
    assert of("reduce_scatter", inside) == gather
    assert of("all_reduce", inside) == pytest.approx(2 * gather)
    exchange = of("all_to_all", inside)
    assert exchange == pytest.approx(7 * 3e-6 + 7 / 8 * size / 3e11)
    # over two machines a ring has eight NICs, so that its NVLinks are slower; an exchange of pairs
    # has the one of its rank
    across = Group(16, 1, 8, 2)
    assert of("all_gather", across) == pytest.approx(4 * 1e-5 + 15 / 16 * size / 3.6e11)
    two_a_node = Group(16, 4, 2, 8)
    expected = 4 * 1e-5 + 7 / 8 * size / (2 * 4.8e10)
    assert of("all_gather", two_a_node) == pytest.approx(expected)
    assert of("all_to_all", across) == pytest.approx(15 * 3e-6 + size / 2 / 4.8e10)
    two_nics = replace(H100, nics_per_gpu=2)
    assert of("all_to_all", across, two_nics) < 0.51 * of("all_to_all", across)
    alone = Group(128, 8, 1, 128)  # one rank of each machine
    assert of("all_reduce", alone) == pytest.approx(14 * 1e-5 + 2 * 127 / 128 * size / 4.8e10)
    assert of("send", Group(2, 64, 1, 2)) == pytest.approx(1e-5 + size / 4.8e10)
    assert all(math.isfinite(of(kind, across)) for kind in ("broadcast", "send", "reduce_scatter"))


def test_everything_that_is_timed_runs():
    """With sizes that take a second: every entry that a file needs, or is assumed."""
    from benchmarks.rate_kernels import SIZES, all_timed

    few = replace(
        SIZES["cpu"], side=32, sides=(8, 16), group_rows=(2, 4), tokens=16, hidden=32, inter=16
    )
    few = replace(few, experts=4, chosen=2, heads=2, key_heads=1, head_dim=16, rows=(8,))
    few = replace(few, columns=64)
    entries = set()
    for timed in all_timed(torch.device("cpu"), torch.float32, few):
        with torch.set_grad_enabled(timed.entry.endswith("backward")):
            timed.run()
        assert timed.amount > 0
        entries.add(timed.entry)
    given = {name for name in NEEDED if not name.startswith(("launch.", "gpu", "nics"))}
    assert given - entries == {"grouped.group", "wait"}
    kernels = "rms_norm rms_norm_backward norm_rotary norm_rotary_backward gather_rows sum_rows"
    kernels += " activation activation_backward router order_pairs add copy divergence adamw"
    kernels += " sum_own_rows pair_matrices"
    assert {f"bytes.{name}" for name in kernels.split()} <= entries


@pytest.mark.extended
def test_a_measured_file(tmp_path):
    from benchmarks.rates import main

    path = tmp_path / "rates.json"
    main(["--output", str(path), "--ranks", "2", "--device", "cpu", "--seconds", "4"])
    rates = read_rates(str(path))
    assert (rates.device, rates.gpus_per_node) == ("cpu", 2)
    assert 1e8 < rates.at("dense.rows", 512) < 1e13
    group = Group(2, 1, 2, 1)
    for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "broadcast"):
        assert 1e-6 < rates.collective(kind, 4096, group) < 1
    for kind in ("forward", "backward", "eager", "graph"):
        assert 1e-7 < rates.number(f"launch.{kind}") < 1e-2
