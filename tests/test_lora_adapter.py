"""PEFT folders in and out: what peft itself saves is read, what a checkpoint holds is loaded by
peft, with the same logits each way.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from megatron_gkd.checkpoint import save_checkpoint
from megatron_gkd.lora.adapter_sum import refuse_outside
from megatron_gkd.lora.load import load_adapter
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.model.args import read_model_args
from megatron_gkd.verify.reference import decoder
from tests.adapters import (
    ALL,
    ATTENTION,
    EXPERTS,
    ROOT,
    TOWERS,
    load_peft,
    load_thinker,
    load_whole,
    make_batches,
    random_adapter,
    write_adapter,
)
from tests.lora_runs import (
    FOLDERS,
    VOCAB_SIZE,
    build,
    in_reducer,
    initialize,
    make_optimizer,
    run_schedule,
    share,
)
from tests.ranks import run_ranks
from tests.train_runs import arguments, make_rows, run_training, write_rows

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# what get_peft_model is asked for; "load" is the model, the rest LoraConfig's arguments
PEFT_FORMS = {
    "attention": dict(r=4, target_modules=ATTENTION, exclude_modules=TOWERS),
    "bare names, the audio tower too": dict(r=4, target_modules=["q_proj", "v_proj"]),
    "stacked parameters": dict(
        r=5,
        lora_alpha=7,
        target_modules=["o_proj"],
        target_parameters=STACKED,
        exclude_modules=TOWERS,
    ),
    "gate_up_proj alone": dict(r=3, target_modules=[], target_parameters=STACKED[:1]),
    "down_proj alone": dict(r=3, target_modules=[], target_parameters=STACKED[1:]),
    "seven bare names": dict(r=3, target_modules=ALL, exclude_modules=TOWERS),
    "seven bare names, the whole model": dict(
        load=load_whole, r=3, target_modules=ALL, exclude_modules=TOWERS
    ),
    "patterns": dict(
        r=4,
        lora_alpha=6,
        target_modules=ALL,
        exclude_modules=TOWERS,
        rank_pattern={"q_proj": 2, r"^model\.(language_model\.)?layers\.1\.self_attn\.v_proj": 9},
        alpha_pattern={
            r"layers\.0\.self_attn\.k_proj": 20,
            r"^model\.(language_model\.)?layers\.1\.self_attn\.o_proj": 1,
            "q_proj": 3,
        },
    ),
    "rslora": dict(
        r=5,
        lora_alpha=4,
        use_rslora=True,
        target_modules=ATTENTION,
        target_parameters=STACKED,
        exclude_modules=TOWERS,
    ),
    "linears that differ by layer": dict(
        r=4,
        target_modules=r".*(layers\.0\.self_attn\.(q|v)_proj|layers\.1\.self_attn\.o_proj)",
        exclude_modules=TOWERS,
    ),
    "experts of one layer": dict(
        r=3,
        target_modules=["layers.1.self_attn.k_proj"],
        target_parameters=["layers.0.mlp.experts.down_proj"],
        exclude_modules=TOWERS,
    ),
    "one layer": dict(
        r=4, target_modules=["k_proj", "o_proj"], exclude_modules=TOWERS, layers_to_transform=[1]
    ),
}


def thinker_of(model):
    """The thinker inside a PeftModel or the whole model, or the model itself."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "thinker", base)


@torch.no_grad()
def reference_logits(model):
    """[B, S, V] of each micro-batch that `share` gives out at DP 1."""
    return [
        thinker_of(model)(input_ids=batch.input_ids).logits
        for batch in make_batches(VOCAB_SIZE)[:2]
    ]


def fill_lora_b(model) -> None:
    """Random values for every lora_B of the decoder; peft starts them at zero."""
    generator, filled = torch.Generator().manual_seed(4), 0
    for name, parameter in decoder(thinker_of(model)).named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(generator=generator, std=0.1)
            filled += 1
    assert filled


def difference(logits, expected):
    """Largest difference on real positions; columns past the vocabulary are padding."""
    reals = [batch.real for batch in make_batches(VOCAB_SIZE)]
    return max(
        ((actual[..., :VOCAB_SIZE] - wanted).abs() * real[..., None]).max().item()
        for actual, wanted, real in zip(logits, expected, reals)
    )


def logits_with_adapters(rank, world_size, tp, pp, ep, runs):
    """Logits of this rank's micro-batches for each (folder, adapter, settings of LoRA)."""
    place = initialize(tp, pp, ep)
    batches = share(make_batches(VOCAB_SIZE), place)
    models = (build(place, folder, adapter, **lora)[1].eval() for folder, adapter, lora in runs)
    return [run_schedule(place, in_reducer(model), batches, backward=False) for model in models]


@pytest.fixture(scope="module")
def adapters_in(tiny_folder, tmp_path_factory):
    """name -> (folder, adapter folder, settings of LoRA, peft's logits): every form that peft
    saves, and per-expert names.
    """
    whole, thinker = (
        tiny_folder(**FOLDERS[kind]) for kind in ("4 KV heads", "2 KV heads, odd sizes")
    )
    cases = {}
    for name, form in PEFT_FORMS.items():
        folder = whole if "load" in form else thinker
        model = get_peft_model(
            form.get("load", load_thinker)(folder),
            LoraConfig(**{k: v for k, v in form.items() if k != "load"}),
        )
        fill_lora_b(model.eval())
        adapter = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(adapter)
        cases[f"peft's own: {name}"] = (folder, str(adapter), {}, reference_logits(model))
    for folder, targets in ((whole, ALL), (thinker, ["q_proj", *EXPERTS])):
        tensors = random_adapter(read_model_args(folder), 3, targets)
        for prefix in ("thinker.", ""):
            spelled = {name.replace("thinker.", prefix): value for name, value in tensors.items()}
            adapter = write_adapter(
                tmp_path_factory.mktemp("adapter"), spelled, rank=3, alpha=5, targets=targets
            )
            logits = reference_logits(load_peft(load_thinker(folder), adapter)[0])
            cases[f"per expert, {len(targets)} linears, prefix {prefix!r}"] = (
                folder,
                adapter,
                {},
                logits,
            )
    cases["continued at rank 16, another alpha"] = (
        folder,
        adapter,
        dict(rank=16, alpha=50.0),
        logits,
    )
    cases["continued on more linears"] = (folder, adapter, dict(targets=ALL), logits)
    for kind in {case[0] for case in cases.values()}:
        base = reference_logits(load_thinker(kind))
        assert all(difference(case[3], base) > 0.2 for case in cases.values() if case[0] == kind), (
            "an adapter must show in the logits"
        )
    return cases


@pytest.mark.parametrize("world_size, tp, pp, ep", [(1, 1, 1, 1), (2, 1, 2, 1), (4, 4, 1, 2)])
def test_every_form_of_peft_adapter_gives_pefts_logits(adapters_in, world_size, tp, pp, ep):
    by_rank = run_ranks(
        logits_with_adapters, world_size, tp, pp, ep, [case[:3] for case in adapters_in.values()]
    )
    for number, (name, case) in enumerate(adapters_in.items()):
        seen = [of_rank[number] for of_rank in by_rank if of_rank[number]]
        assert seen
        for logits in seen:
            assert difference(logits, case[3]) < 1e-4, name


def test_what_an_opened_adapter_says(adapters_in, tmp_path):
    """Rank, alpha and linears of the forms, and an alpha that survives alpha / r * r exactly."""

    def opened(name):
        folder, adapter = adapters_in[name][:2]
        return PeftAdapter(adapter, read_model_args(folder))

    seven = opened("peft's own: seven bare names")
    assert (seven.rank, seven.targets) == (6, ALL)  # peft stacks gate and up to rank 2 r
    assert (opened("peft's own: attention").rank, opened("peft's own: attention").alpha) == (4, 8)
    assert opened("peft's own: gate_up_proj alone").targets == ["gate_proj", "up_proj"]
    assert opened("peft's own: down_proj alone").targets == ["down_proj"]
    assert opened("peft's own: patterns").rank == 9
    model_args = read_model_args(adapters_in["peft's own: attention"][0])
    for rank, alpha in ((49, 16), (7, 29), (3, 0.1)):
        folder = write_adapter(
            tmp_path / f"{rank}",
            random_adapter(model_args, rank, ["o_proj"]),
            rank=rank,
            alpha=alpha,
            targets=["o_proj"],
        )
        assert PeftAdapter(folder, model_args).alpha == alpha


def refused_by_the_model(rank, world_size, folder, adapter):
    """What load_adapter says to an adapter that the model's LoRA cannot hold."""
    place, messages = initialize(1, 1, 1), []
    for lora in (dict(rank=2), dict(targets=["q_proj", "down_proj"])):
        with pytest.raises(ValueError) as refusal:
            build(place, folder, adapter, **lora)
        messages.append(str(refusal.value))
    return messages


def test_adapters_that_do_not_fit_the_models_lora(tiny_folder, tmp_path):
    folder = tiny_folder(**FOLDERS["4 KV heads"])
    targets = ["q_proj", "o_proj"]
    adapter = write_adapter(
        tmp_path,
        random_adapter(read_model_args(folder), 4, targets),
        rank=4,
        alpha=8,
        targets=targets,
    )
    ((rank, targets),) = run_ranks(refused_by_the_model, 1, folder, adapter)
    assert (
        rank
        == f"{adapter}: rank 4 does not fit into --lora_rank 2; raise --lora_rank, or leave it out"
    )
    assert (
        targets
        == f"{adapter}: has LoRA on o_proj; add it to --lora_target_modules q_proj,down_proj"
    )


Q0, E3 = f"{ROOT}0.self_attn.q_proj", f"{ROOT}1.mlp.experts.3.gate_proj"
STACK = f"{ROOT}0.mlp.experts"


BAD_TENSORS = {  # edit of a good adapter's tensors -> what the error says after the file's name
    "lora_A of another width": (
        lambda t: t | {f"{Q0}.lora_A.weight": torch.ones(3, 63)},
        rf"tensor {Q0}.lora_A.weight has shape \[3, 63\], .*config.json ask for \[3, 64\]",
    ),
    "lora_B of another height": (
        lambda t: t | {f"{E3}.lora_B.weight": torch.ones(31, 3)},
        rf"tensor {E3}.lora_B.weight has shape \[31, 3\], .*ask for \[32, 3\]",
    ),
    "two ranks in one linear": (
        lambda t: t | {f"{Q0}.lora_B.weight": torch.ones(128, 2)},
        rf"tensor {Q0}.lora_B.weight has shape \[128, 2\], .*ask for \[128, 3\]",
    ),
    "a vector": (
        lambda t: t | {f"{Q0}.lora_A.weight": torch.ones(64)},
        rf"tensor {Q0}.lora_A.weight has shape \[64\]",
    ),
    "a missing matrix": (
        lambda t: {k: v for k, v in t.items() if k != f"{E3}.lora_A.weight"},
        rf"misses tensor {E3}.lora_A.weight",
    ),
    "a missing expert": (
        lambda t: {k: v for k, v in t.items() if not k.startswith(E3)},
        rf"misses tensor {E3}.lora_A.weight and 1 more",
    ),
    "an expert too many": (
        lambda t: (
            t
            | {
                f"{ROOT}0.mlp.experts.8.gate_proj.lora_{side}.weight": torch.ones(3, 3)
                for side in "AB"
            }
        ),
        r"tensor .*experts.8.gate_proj.* of layers or experts that the model does not have",
    ),
    "a layer too many": (
        lambda t: (
            t | {f"{ROOT}2.self_attn.q_proj.lora_{side}.weight": torch.ones(3, 3) for side in "AB"}
        ),
        r"tensor .*layers.2.self_attn.q_proj.* that the model does not have",
    ),
    "an lm_head of another size": (
        lambda t: (
            t
            | {
                f"base_model.model.thinker.lm_head.lora_{side}.weight": torch.ones(3, 3)
                for side in "AB"
            }
        ),
        r"tensor base_model.model.thinker.lm_head.lora_A.weight has shape \[3, 3\], "
        r".* ask for \[3, 64\]",
    ),
    "half of an lm_head": (
        lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(3, 64)},
        r"misses tensor base_model.model.thinker.lm_head.lora_B.weight",
    ),
    "a linear of the audio tower that --lora_towers leaves alone": (
        lambda t: (
            t
            | {
                f"base_model.model.thinker.audio_tower.proj1.lora_{side}.weight": torch.ones(3, 3)
                for side in "AB"
            }
        ),
        r"tensor base_model.model.thinker.audio_tower.proj1.lora_A.weight and 1 more are not LoRA",
    ),
    "an unknown kind": (
        lambda t: t | {f"{Q0}.lora_magnitude_vector.weight": torch.zeros(3)},
        rf"tensor {Q0}.lora_magnitude_vector.weight",
    ),
    "half of a stack": (
        lambda t: t | {f"{STACK}.lora_A.weight": torch.ones(24, 64)},
        rf"tensor {STACK}.lora_A.weight has no lora_B",
    ),
    "a stack of another model": (
        lambda t: (
            t
            | {
                f"{STACK}.lora_A.weight": torch.ones(24, 60),
                f"{STACK}.lora_B.weight": torch.ones(64, 24),
            }
        ),
        rf"{STACK}.lora_A.weight \[24, 60\] and .* fit neither gate_up_proj \(64 to 64\) "
        r"nor down_proj \(32 to 64\)",
    ),
    "a stack of another number of experts": (
        lambda t: {
            f"{ROOT}{n}.mlp.experts.lora_{s}.weight": torch.ones(21, 64)
            if s == "A"
            else torch.ones(64, 21)
            for n in (0, 1)
            for s in "AB"
        },
        r"lora_A.weight has shape \[21, 64\]",
    ),
    "only zeros": (
        lambda t: {name: torch.zeros_like(value) for name, value in t.items()},
        "every tensor is zero",
    ),
    "nothing": (lambda t: {}, "no LoRA on the thinker's decoder linears"),
}

BAD_SETTINGS = {
    "peft_type": ("LOHA", "peft_type 'LOHA'; only LORA adapters load"),
    "use_dora": (True, "use_dora = True is not supported"),
    "bias": ("lora_only", "bias = 'lora_only' is not supported"),
    "modules_to_save": (["lm_head"], r"modules_to_save = \['lm_head'\] is not supported"),
    "alora_invocation_tokens": ([5, 6], r"alora_invocation_tokens = \[5, 6\] is not supported"),
    "layer_replication": ([[0, 1], [0, 2]], "layer_replication"),
    "init_lora_weights": ("pissa", "init_lora_weights = 'pissa' belongs to a changed base model"),
}


@pytest.fixture
def good_adapter(tiny_folder, tmp_path):
    """(shape, adapter folder to spoil)."""
    model_args = read_model_args(tiny_folder(**FOLDERS["4 KV heads"]))
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    folder = write_adapter(
        tmp_path / "adapter",
        random_adapter(model_args, 3, targets),
        rank=3,
        alpha=5,
        targets=targets,
    )
    PeftAdapter(folder, model_args)
    return model_args, Path(folder)


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_named_with_their_file(good_adapter, name):
    model_args, folder = good_adapter
    spoil, message = BAD_TENSORS[name]
    save_file(
        {key: value.contiguous() for key, value in spoil(load_file(folder / TENSORS)).items()},
        folder / TENSORS,
    )
    with pytest.raises(ValueError, match=f"{folder / TENSORS}: .*{message}"):
        PeftAdapter(folder, model_args)


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_settings_that_plain_lora_cannot_represent(good_adapter, setting):
    model_args, folder = good_adapter
    value, message = BAD_SETTINGS[setting]
    (folder / CONFIG).write_text(
        json.dumps(json.loads((folder / CONFIG).read_text()) | {setting: value})
    )
    with pytest.raises(ValueError, match=f"{folder / CONFIG}: .*{message}"):
        PeftAdapter(folder, model_args)


def test_files_that_are_missing_or_broken(good_adapter):
    model_args, folder = good_adapter
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{folder / TENSORS}: not a complete safetensors file"):
        PeftAdapter(folder, model_args)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError,
        match=f"{folder}: no {TENSORS}; .*adapter_model.bin is a pickle and is not read",
    ):
        PeftAdapter(folder, model_args)
    (folder / TENSORS).write_bytes(whole)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=f"{folder / CONFIG}: not JSON"):
        PeftAdapter(folder, model_args)
    (folder / CONFIG).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{folder}: no {CONFIG}; expected a PEFT adapter folder"
    ):
        PeftAdapter(folder, model_args)


def test_untrained_lora_on_the_towers_and_the_talker_is_passed_over(good_adapter):
    """PEFT puts it there for bare names; its lora_B is zero, so nothing is lost."""
    model_args, folder = good_adapter
    idle = {}
    for linear in (
        "thinker.audio_tower.layers.0.self_attn.q_proj",
        "talker.model.layers.0.mlp.experts.base_layer",
    ):
        idle |= {
            f"base_model.model.{linear}.lora_A.weight": torch.ones(3, 3),
            f"base_model.model.{linear}.lora_B.weight": torch.zeros(3, 3),
        }
    save_file(load_file(folder / TENSORS) | idle, folder / TENSORS)
    assert PeftAdapter(folder, model_args).targets == [
        "q_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


def write_checkpoints(rank, world_size, tp, pp, ep, output, runs):
    """For each name -> (folder, adapter or None, LoRA, train): a checkpoint in `output`/name, and
    the logits of the model that wrote it.
    """
    place = initialize(tp, pp, ep)
    logits, batches = {}, share(make_batches(VOCAB_SIZE), place)
    for name, (folder, adapter, lora, train) in runs.items():
        model_args, model = build(place, folder, adapter, **lora)
        ddp = in_reducer(model)
        if train:
            optimizer = make_optimizer(ddp)
            for _ in range(2):
                optimizer.zero_grad()
                run_schedule(place, ddp, batches)
                optimizer.step(0.05, 0.0)
        save_checkpoint(
            f"{output}/{name}",
            1,
            model=model,
            model_args=model_args,
            parallel=place,
            alpha=5,
            dropout=0.0,
            base_model=folder,
            optimizer=None,
            state={},
        )
        logits[name] = run_schedule(place, ddp, batches, backward=False)
    return logits


@pytest.fixture(scope="module")
def to_write(tiny_folder, tmp_path_factory):
    """name -> (folder, adapter or None, LoRA, whether to train before writing); and the adapters'
    tensors.
    """
    whole, thinker = (
        tiny_folder(**FOLDERS[kind]) for kind in ("4 KV heads", "2 KV heads, odd sizes")
    )
    runs, tensors = {}, {}
    for name, folder, targets in (
        ("all", whole, ALL),
        ("gate-up", whole, ["gate_proj", "up_proj"]),
        ("q-v", thinker, ["q_proj", "v_proj"]),
        ("k-down", thinker, ["k_proj", "down_proj"]),
        ("o-head", whole, ["o_proj", "lm_head"]),
    ):
        tensors[name] = random_adapter(read_model_args(folder), 3, targets)
        adapter = write_adapter(
            tmp_path_factory.mktemp("adapter"), tensors[name], rank=3, alpha=5, targets=targets
        )
        runs[name] = (folder, adapter, {}, False)
    runs["fresh"] = (whole, None, dict(rank=8, alpha=5, targets=ALL, seed=7), False)
    runs["another-seed"] = (whole, None, dict(rank=8, alpha=5, targets=ALL, seed=8), False)
    runs["trained"] = (whole, None, dict(rank=3, alpha=5, targets=ALL, seed=7), True)
    return runs, tensors


@pytest.fixture(scope="module")
def written(to_write, tmp_path_factory):
    """layout -> (name -> checkpoint folder, name -> logits)."""
    runs, _ = to_write
    made = {}
    for layout in ((1, 1, 1, 1), (4, 2, 2, 2), (8, 8, 1, 8), (4, 2, 1, 1)):
        output = tmp_path_factory.mktemp("written")
        results = run_ranks(write_checkpoints, *layout, str(output), runs)
        logits = {
            name: next(of_rank[name] for of_rank in results if of_rank[name]) for name in runs
        }
        made[layout] = {name: output / name / "checkpoint-1" for name in runs}, logits
    return made


def without_training(runs):
    return [name for name, run in runs.items() if not run[3]]


def test_the_file_is_the_same_at_every_layout(to_write, written):
    """Loaded adapters and fresh ones alike: every parallel layout writes the same bytes, and what
    was loaded comes out as it went in.
    """
    runs, tensors = to_write
    for name in without_training(runs):
        digests = {
            layout: [
                hashlib.sha256((folders[name] / file).read_bytes()).hexdigest()
                for file in (TENSORS, CONFIG)
            ]
            for layout, (folders, _) in written.items()
        }
        assert len(set(map(tuple, digests.values()))) == 1, f"{name}: {digests}"
    for name, expected in tensors.items():
        saved = load_file(written[1, 1, 1, 1][0][name] / TENSORS)
        assert all(torch.equal(saved.pop(key), value) for key, value in expected.items()), name
        for key in [key for key in saved if ".lm_head." in key]:  # under both names
            assert torch.equal(
                saved.pop(key),
                expected[key.replace("base_model.model.", "base_model.model.thinker.")],
            )
        assert not any(value.any() for value in saved.values()), (
            "what PEFT wants beside them is zero"
        )


def peft_loads(folder, adapter):
    """(label, loaded PeftModel, missing adapter keys) for each way to load an adapter of this
    folder.
    """
    yield "thinker", *load_peft(load_thinker(folder), adapter)
    if read_model_args(folder).prefix:
        yield "whole.thinker", *load_peft(load_whole(folder).thinker, adapter)
        yield "whole", *load_peft(load_whole(folder), adapter)


@pytest.mark.smoke
def test_peft_loads_what_is_saved(to_write, written):
    """On the thinker, on the whole model's thinker and on the whole model: our logits, and no LoRA
    of the decoder silently left at zero.
    """
    runs, _ = to_write
    for layout, (folders, logits) in written.items():
        names = list(runs) if layout == (1, 1, 1, 1) else ["trained"]
        for name in set(names) - {"fresh", "another-seed"}:
            folder = runs[name][0]
            base = reference_logits(load_thinker(folder))
            for label, model, missing in peft_loads(folder, str(folders[name])):
                expected = reference_logits(model)
                assert difference(logits[name], expected) < 1e-4, f"{name} on {label}"
                assert difference(base, expected) > 0.2
                assert not [key for key in missing if label != "whole"], (
                    f"{name} on {label}: {missing}"
                )
                zero = [
                    key
                    for key, value in model.named_parameters()
                    if ".lora_B." in key and "talker" not in key and not value.any()
                ]
                of_zeros = {"gate-up": "experts.lora_B", "k-down": "experts.base_layer.lora_B"}.get(
                    name
                )
                assert all(of_zeros and of_zeros in key for key in zero), (
                    f"{name} on {label}: {zero[:3]}"
                )


def test_a_subset_of_the_experts_linears_comes_back_as_such(to_write, written):
    """The zeros that PEFT wants beside gate and up are not taken for LoRA: such a run can be
    resumed, with its own linears.
    """
    runs, _ = to_write
    for name, targets in (
        ("gate-up", ["gate_proj", "up_proj"]),
        ("k-down", ["k_proj", "down_proj"]),
    ):
        folder = written[1, 1, 1, 1][0][name]
        assert (
            json.loads((folder / CONFIG).read_text())["target_modules"]
            == [target for target in targets if target not in EXPERTS] + EXPERTS
        )
        assert PeftAdapter(folder, read_model_args(runs[name][0])).targets == targets


def test_such_a_run_resumes_where_it_stood(tiny_folder, tmp_path):
    """Also at a rank and alpha whose quotient does not give alpha back, and with rank, alpha and
    linears left to the checkpoint.
    """
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(8, vocab_size=VOCAB_SIZE))
    flags = dict(
        model=tiny_folder(**FOLDERS["4 KV heads"]),
        dataset=rows,
        output_dir=tmp_path,
        max_steps=3,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
    )
    lora = dict(lora_target_modules="gate_proj,up_proj", lora_rank=49, lora_alpha=16)
    run_training(1, arguments(**flags, **lora))
    expected = read_metrics(tmp_path)[-1]
    for given in (lora, {}):
        run_training(
            1, arguments(**flags, **given, resume_from_checkpoint=tmp_path / "checkpoint-2")
        )
        resumed = read_metrics(tmp_path)[-1]
        assert all(
            resumed[name] == expected[name]
            for name in ("step", "loss", "jsd", "grad_norm", "learning_rate")
        ), resumed


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_fresh_adapters_start_as_pefts(to_write, written):
    """lora_B zero; lora_A uniform within 1 / sqrt(d_in) as PEFT draws it, no two tensors alike, and
    from the seed.
    """
    runs, _ = to_write
    folders = written[1, 1, 1, 1][0]
    fresh, other = (load_file(folders[name] / TENSORS) for name in ("fresh", "another-seed"))
    torch.manual_seed(0)  # PEFT draws from the global generator
    model = get_peft_model(
        load_thinker(runs["fresh"][0]), LoraConfig(r=8, target_modules=ALL, exclude_modules=TOWERS)
    )
    for module, d_in in (
        ("self_attn.q_proj", 64),
        ("self_attn.o_proj", 128),
        ("experts.base_layer", 64),
        ("experts", 32),
    ):
        theirs = torch.cat(
            [
                value.flatten()
                for name, value in model.named_parameters()
                if f"{module}.lora_A" in name
            ]
        )
        leaf = {"experts.base_layer": "up_proj", "experts": "down_proj"}.get(module, module)
        ours = torch.cat(
            [value.flatten() for name, value in fresh.items() if f"{leaf}.lora_A" in name]
        )
        for values in (ours, theirs):
            assert 0.98 * d_in**-0.5 < values.abs().max() <= d_in**-0.5
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
        assert ours.mean().abs() < 0.05 * ours.std()
    assert not any(value.any() for name, value in fresh.items() if ".lora_B." in name)
    downs = [value for name, value in fresh.items() if ".lora_A." in name]
    assert len({tuple(value.flatten()[:8].tolist()) for value in downs}) == len(downs)
    assert not any(
        torch.equal(value, other[name]) for name, value in fresh.items() if ".lora_A." in name
    )


def test_adapters_of_half_precision_load(good_adapter):
    """PEFT may save bf16 or fp16: the values are taken as they are."""
    model_args, folder = good_adapter
    tensors = load_file(folder / TENSORS)
    save_file({name: value.bfloat16() for name, value in tensors.items()}, folder / TENSORS)
    name = f"{Q0}.lora_B.weight"
    values, scale = PeftAdapter(folder, model_args).tensor(name)
    assert (
        values.dtype == torch.float32
        and torch.equal(values, tensors[name].bfloat16().float())
        and scale == 5 / 3
    )


def test_lora_on_talker_and_vocoder_is_left_out_in_words(good_adapter):
    """PEFT puts it there for bare names, and a training of the whole model may have moved it."""
    model_args, folder = good_adapter
    names = [
        f"base_model.model.talker.model.layers.0.self_attn.q_proj.lora_{side}.weight"
        for side in "AB"
    ]
    save_file(
        load_file(folder / TENSORS) | {name: torch.ones(3, 3) for name in names}, folder / TENSORS
    )
    adapter = PeftAdapter(folder, model_args)
    assert sorted(adapter.outside) == names and adapter.targets == [
        "q_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    with pytest.raises(
        ValueError, match="talker.*lora_[AB].weight and 1 more are not LoRA on the thinker"
    ):
        refuse_outside(adapter)


def test_a_rank_that_the_tensors_do_not_have(good_adapter):
    model_args, folder = good_adapter
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"r": 64}))
    with pytest.raises(
        ValueError, match="q_proj.lora_A.weight has rank 3, and adapter_config.json says 64"
    ):
        PeftAdapter(folder, model_args)
    (folder / CONFIG).write_text(json.dumps(config | {"r": 64, "rank_pattern": {"q_proj": 3}}))
    PeftAdapter(folder, model_args)
    (folder / CONFIG).write_text(json.dumps(config | {"rank_pattern": {"(": 3}}))
    with pytest.raises(ValueError, match="rank_pattern '\\(' is no regular expression"):
        PeftAdapter(folder, model_args)


def load_on_its_base(rank, world_size, folder, adapter):
    try:
        build(initialize(1, 1, 1), folder, adapter)
    except ValueError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")  # peft's, about the embedding it saves
def test_the_head_that_peft_saves_beside_lora(tiny_folder, tmp_path):
    """Its copy of the base's lm_head is no LoRA; one of another base is refused."""
    folder = tiny_folder(**FOLDERS["4 KV heads"])
    model = get_peft_model(
        load_thinker(folder),
        LoraConfig(
            r=4,
            target_modules=["q_proj", "lm_head"],
            exclude_modules=TOWERS,
            init_lora_weights=False,
        ),
    )
    model.save_pretrained(tmp_path)
    copies = [name for name in load_file(tmp_path / TENSORS) if "lora" not in name]
    assert copies == ["base_model.model.lm_head.base_layer.weight"]
    assert run_ranks(load_on_its_base, 1, folder, str(tmp_path)) == [None]
    tensors = load_file(tmp_path / TENSORS)
    for dtype in (torch.bfloat16, torch.float16):  # a rounding of the base is the base
        save_file(tensors | {copies[0]: tensors[copies[0]].to(dtype)}, tmp_path / TENSORS)
        assert run_ranks(load_on_its_base, 1, folder, str(tmp_path)) == [None]
    tensors[copies[0]][5, 5] += 1
    save_file(tensors, tmp_path / TENSORS)
    assert (
        "is not the lm_head of this model"
        in run_ranks(load_on_its_base, 1, folder, str(tmp_path))[0]
    )


def second_stage(rank, world_size, folder, adapter, more_linears):
    """Which layers' q_proj can learn (W_down is not 0) when `adapter` goes on at a higher rank."""
    place, model_args = initialize(1, 1, 1), read_model_args(folder)
    opened = PeftAdapter(adapter, model_args)
    _, model = build(place, folder, rank=8, alpha=opened.alpha, targets=opened.targets, seed=0)
    load_adapter(model, model_args, place, opened, more_linears=more_linears)
    return [
        bool(layer.self_attention.linear_qkv.slot.down["q_proj"].any())
        for layer in model.decoder.layers
    ]


@pytest.mark.parametrize("written_by", ["peft", "a checkpoint"])
def test_layers_without_lora_stay_so_at_a_higher_rank(tiny_folder, tmp_path, written_by):
    """A checkpoint of ours writes them as zeros, PEFT leaves them out: both mean that there is
    none.
    """
    folder = tiny_folder(**FOLDERS["4 KV heads"])
    tensors = random_adapter(read_model_args(folder), 4, ["q_proj"])
    in_layer_1 = {name for name in tensors if ".layers.1." in name}
    if written_by == "peft":
        tensors = {name: value for name, value in tensors.items() if name not in in_layer_1}
    else:
        tensors = {
            name: value * 0 if name in in_layer_1 else value for name, value in tensors.items()
        }
    settings = dict(layers_to_transform=[0]) if written_by == "peft" else {}
    adapter = write_adapter(
        tmp_path / "adapter", tensors, rank=4, alpha=8, targets=["q_proj"], **settings
    )
    assert run_ranks(second_stage, 1, folder, adapter, False) == [[True, False]]
    assert run_ranks(second_stage, 1, folder, adapter, True) == [[True, True]]
