"""The planner's bytes of the towers against those of all tensors that are alive: in towers of
several shapes alone, and in whole steps over media on ranks at several layouts.
"""

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from megatron_gkd.config import parse_config
from megatron_gkd.data.report import Lengths
from megatron_gkd.families import families
from megatron_gkd.plan.memory import standing_parts
from megatron_gkd.plan.tower_memory import MediaShapes, media_bytes, of_tower
from megatron_gkd.plan.towers import AudioTower, VisualTower, read_towers
from megatron_gkd.plan.training_memory import moments
from megatron_gkd.plan.workload import workload
from tests.live_bytes import LiveBytes
from tests.plans import job_of
from tests.random_media import PATCH, MediaRow, Prompt, make_batch
from tests.ranks import run_ranks
from tests.test_plan_measured import SIZES, flags_of
from tests.train_runs import build_parts

extended = pytest.mark.extended
RANK = 8
AUDIO = dict(d_model=160, encoder_layers=5, encoder_ffn_dim=640, encoder_attention_heads=4)
AUDIO |= dict(downsample_hidden_size=24, output_dim=256)
VISUAL = dict(hidden_size=128, depth=4, intermediate_size=480, num_heads=4, out_hidden_size=256)
VISUAL |= dict(deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=64)
SOUND, PICTURES = [2300, 1050], [(16, 16), (24, 16)]


def _alone(rank, world_size, cases):
    """Of each case (measured, counted) by name."""
    from tests.lora_runs import initialize

    parallel, found = initialize(1, 1, 1), []
    for name, sizes, sizes_of_media, dtype, lora_rank in cases:
        towers = _towers(parallel, name, sizes, dtype, lora_rank)
        media = _media(name, sizes_of_media)
        tensors = [*towers.parameters(), *towers.buffers(), media.audio, media.pixels]
        measured, memory = {}, LiveBytes()
        memory.ignore(tensors)
        with memory:
            with torch.no_grad():
                towers.encode(media)
            measured["forward"] = memory.peak()
            memory.begin()
            if lora_rank:
                features = towers.encode(media)
                measured["forward_with_lora"] = memory.peak()
                given = [x for x in (features.embeddings, features.deepstack) if x is not None]
                storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in given}
                of_features = sum(storage.nbytes() for storage in storages.values())
                measured["kept"] = memory.used() - of_features
                gradients = [torch.ones_like(x) for x in given]
                of_gradients = sum(x.untyped_storage().nbytes() for x in gradients)
                memory.begin()
                torch.autograd.backward(given, gradients)
                measured["backward"] = memory.peak() - of_features - of_gradients
                del features, given, gradients
        kind = AudioTower if name == "audio_tower" else VisualTower
        shapes = MediaShapes(
            tokens=sum(item.num_tokens for item in media.items),
            number_bytes=dtype.itemsize,
            device="cpu",
            lora_rank=lora_rank,
            drops=False,
        )
        (tower,) = (of for of in families()["qwen3_omni"].towers if of.name == name)
        counted = vars(of_tower(kind.of({**tower.defaults, **sizes}), shapes))
        counted["backward"] += counted["kept"]
        found.append({name: (measured[name], counted[name]) for name in measured})
    return found


def _towers(parallel, name, sizes, dtype, lora_rank):
    """The tower alone, its weights random, all its linears with LoRA where that has a rank."""
    from megatron_gkd.lora.modules import LoraLinear
    from megatron_gkd.media.towers import Towers

    family = families()["qwen3_omni"]
    (tower,) = (tower for tower in family.towers if tower.name == name)
    config = getattr(family.config_class()(), tower.config)
    for setting, value in sizes.items():
        setattr(config, setting, value)
    options = dict(dtype=dtype, attn_implementation="sdpa")
    module = tower.load_class()._from_config(config, **options)
    is_audio = name == "audio_tower"
    towers = Towers(parallel, module if is_audio else None, None if is_audio else module)
    for layer in getattr(module, tower.layers) if lora_rank else ():
        for linear in tower.lora_linears:
            parent, _, last = linear.rpartition(".")
            owner = layer.get_submodule(parent)
            wrapped = LoraLinear(getattr(owner, last), sequence_parallel=False)
            wrapped.add_slot("student", [last], rank=lora_rank, alpha=8, dropout=0.0)
            setattr(owner, last, wrapped)
    return towers


def _media(name, sizes):
    from megatron_gkd.media.medium import Media, Medium

    if name == "audio_tower":
        tokens = [size // 100 * 13 + -(-(size % 100) // 8) for size in sizes]
        of = zip(sizes, tokens)
        return Media.of([Medium("audio", torch.randn(128, size), None, n) for size, n in of])
    return Media.of(
        [Medium("image", torch.randn(h * w, PATCH), (1, h, w), h * w // 4) for h, w in sizes]
    )


CASES = [
    ("visual", VISUAL, PICTURES),
    ("visual", VISUAL | dict(hidden_size=192, intermediate_size=200, depth=6), PICTURES),
    ("audio_tower", AUDIO, SOUND),
    # the layers are the most, or the convolutions' results together
    ("audio_tower", AUDIO | dict(downsample_hidden_size=2, conv_chunksize=10), SOUND),
    ("audio_tower", AUDIO | dict(downsample_hidden_size=32, conv_chunksize=3), SOUND),
]


def test_towers_hold_what_the_planner_counts():
    """Frozen and with LoRA; what autograd keeps to the byte but for norms' statistics in bfloat16,
    which a CPU keeps in that type.
    """
    cases = [
        (*case, dtype, lora_rank)
        for case in CASES
        for dtype in (torch.float32, torch.bfloat16)
        for lora_rank in (0, RANK)
    ]
    (found,) = run_ranks(_alone, 1, cases)
    for case, numbers in zip(cases, found, strict=True):
        for name, (measured, counted) in numbers.items():
            rel = {"kept": 1e-6 if case[-2] == torch.float32 else 0.005}.get(name, 0.015)
            assert counted == pytest.approx(measured, rel=rel), (name, *case)


def _step(rank, world_size, argv, kind, micro_batches):
    """Of the second step of a run: the most that is alive while media are encoded at its start, in
    the teacher's pass and in the student's, measured and counted, with weights and LoRA; and the
    bytes of these.
    """
    from megatron_gkd import forward
    from megatron_gkd.media.positions import MediaTokenIds
    from megatron_gkd.media.towers import StepMedia
    from megatron_gkd.parallel import seed_step

    audio, config, memory = kind == "audio", parse_config(argv), LiveBytes()
    parts = build_parts(argv, audio=audio, visual=not audio)
    parallel, model, args = parts.parallel, parts.model, parts.model_args
    ids = MediaTokenIds.read(config.model.model)
    sizes = [500, 600, 400, 500] if audio else [(16, width) for width in (16, 20, 12, 16)]
    media = [("audio" if audio else "image", size) for size in sizes]
    rows = [MediaRow(ids, number, [of], Prompt([0])) for number, of in enumerate(media)]
    batches = [
        make_batch(rows, parallel.tp_size, 4 * number, parallel.row_multiple)
        for number in range(micro_batches)
    ]
    tensors = [*model.parameters(), *model.buffers()]
    weights = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    of_views = (view for b in batches for view in (b.student, b.teacher, b.media))
    of_batches = [x for view in of_views for x in vars(view).values() if torch.is_tensor(x)]
    memory.ignore([*tensors, *of_batches])
    measured = {}

    def passed(name):
        measured[name] = sum(weights.values()) + memory.peak()
        memory.begin()

    for number in range(2):
        seed_step(0, number, parallel)
        with memory:
            parts.optimizer.zero_grad()
            memory.begin()
            before = memory.used()
            media = StepMedia(model.towers, [batch.media for batch in batches])
            features = memory.used() - before
            passed("start")
            teacher = forward.teacher_forward(model, batches, parallel, media)
            passed("teacher")
            forward.student_forward_backward(
                parts.ddp, batches, teacher, parts.loss, parallel, media
            )
            passed("student")
            parts.optimizer.step(1e-3, 0.5)
            del media, teacher
    batch, lora_towers = batches[0], config.lora.lora_towers
    size, wanted = batch.student.size, (audio or lora_towers, not audio or lora_towers)
    load = workload(
        config,
        args,
        micro_batch_tokens=size,
        towers=read_towers(config.model.model, *wanted),
        media_share=len(batch.student.media_rows) / size,
    )
    # of both towers' weights, media for one
    stands = standing_parts(args, config.parallel, replace(load, completion_tokens=0), 0)
    only = read_towers(config.model.model, audio, not audio)
    load = replace(
        load,
        towers=only,
        batch_size=1,
        accumulation=micro_batches,
        row_tokens=size,
        teacher_row_tokens=size,
        response_tokens=len(batch.student.targets),
        completion_tokens=0,
    )
    stage = parallel.pp_rank
    if stage:
        stands = standing_parts(args, config.parallel, load, stage)
    found = moments(args, config.parallel, load, stage, device="cpu")
    sums = {name: sum(parts.values()) + sum(stands.values()) for name, parts in found.items()}
    start, teacher = sums.pop("towers' forward"), sums.pop("teacher's forward")
    counted = {"student": max(sums.values()), "start": start, "teacher": teacher}
    if lora_towers:  # they encode in the passes
        counted["teacher"] = max(teacher, counted.pop("start"))
    kept = media_bytes(load, size // parallel.tp_size, "cpu").of_step if not stage else 0
    assert kept == pytest.approx(features, rel=0.001)
    return measured, counted, sum(stands.values())


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("lora_towers", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize(
    "world_size, tp, pp, recompute",
    [
        pytest.param(1, 1, 1, "none", id="1 rank", marks=extended),
        pytest.param(1, 1, 1, "full", id="1 rank, full"),
        pytest.param(2, 2, 1, "none", id="TP2", marks=extended),
        pytest.param(2, 1, 2, "none", id="PP2", marks=extended),
        pytest.param(2, 1, 2, "full", id="PP2, full", marks=extended),
    ],
)
def test_a_step_over_media_holds_what_the_planner_counts(
    world_size, tp, pp, recompute, lora_towers, kind, tiny_folder, tmp_path
):
    """Of the rank that has most, within 2 %; of one rank also without weights and LoRA, within 3.
    Where ranks share the media of frozen towers, they are counted as one rank's.
    """
    flags = dict(recompute=recompute) | (dict(lora_towers="true") if lora_towers else {})
    argv = flags_of(tiny_folder(**SIZES), tmp_path, (tp, pp, 1, 1), None, **flags)
    ranks = run_ranks(_step, world_size, argv, kind, 4 if pp > 1 else 1)
    for name in ranks[0][1]:
        measured, counted = (max(rank[which][name] for rank in ranks) for which in (0, 1))
        if name == "start" and tp > 1:
            assert measured < counted
        else:
            assert counted == pytest.approx(measured, rel=0.02), name
        if world_size == 1:
            (stands,) = (rank[2] for rank in ranks)
            assert counted - stands == pytest.approx(measured - stands, rel=0.03), name


def test_a_flag_says_how_much_of_a_row_is_media():
    """Without it all of it, in the view that is longer; of text nothing."""
    share = lambda *flags: job_of("--gpus", "8", "--max_length", "2048", *flags).load.media_share
    assert share() == 0 and share("--media_tokens", "100") == 0
    assert share("--media", "audio") == share("--lora_towers", "true") == 1
    assert share("--media", "video", "--row_tokens", "1024", "--teacher_row_tokens", "1536") == 1.5
    flags = ["--media", "image", "--row_tokens", "1000", "--media_tokens"]
    assert share(*flags, "250") == 0.25 and share(*flags, "5000") == 1
    with pytest.raises(ValueError, match="media_tokens 0"):
        share(*flags, "0")


def test_a_run_counts_the_media_of_its_rows():
    """Those of any rows that fit into a micro-batch, tried one by one."""
    draw = random.Random(3)
    for _ in range(20):
        prompts = [draw.randint(2, 30) for _ in range(8)]
        media = [draw.randint(0, prompt) for prompt in prompts]
        lengths = Lengths(*map(np.array, ([n + 5 for n in prompts], prompts, media)))
        for tokens in (30, 55, sum(prompts), 2 * sum(prompts)):
            sets = (rows for n in range(9) for rows in combinations(range(8), n))
            fitting = [rows for rows in sets if sum(prompts[row] for row in rows) <= tokens]
            most = max(sum(media[row] for row in rows) for rows in fitting)
            assert most <= lengths.most_media(tokens) < most + 30 + sum(media)
        assert lengths.most_media(2 * sum(prompts)) == 2 * sum(media)
