"""PEFT folders in: every form that peft itself saves is read, with the same logits, and goes on at
a higher rank.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from megatron_gkd.lora.load import load_adapter
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora.slots import STUDENT, slot_of
from megatron_gkd.model.args import read_model_args
from megatron_gkd.verify.reference import decoder
from tests.adapters import (
    ALL,
    ATTENTION,
    EXPERTS,
    TOWERS,
    load_peft,
    load_thinker,
    load_whole,
    make_batches,
    random_adapter,
    write_adapter,
)
from tests.lora_runs import FOLDERS, VOCAB_SIZE, build, in_reducer, initialize, run_schedule, share
from tests.ranks import run_ranks

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
        torch.manual_seed(0)
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
    folder_of_rslora, rslora, _, its_logits = cases["peft's own: rslora"]
    again = (folder_of_rslora, rslora, dict(rank=16), its_logits)
    cases["rsLoRA continued at rank 16"] = again
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
    for copy, problem in (
        (tensors[copies[0]], "is not the lm_head of this model"),
        (tensors[copies[0]][:300], r"has shape [300, 64], and lm_head of this model other rows"),
    ):
        save_file(tensors | {copies[0]: copy.clone()}, tmp_path / TENSORS)
        assert problem in run_ranks(load_on_its_base, 1, folder, str(tmp_path))[0]


def second_stage(rank, world_size, folder, adapter, targets):
    """Which layers' q_proj can learn when `adapter` goes on at a higher rank."""
    place, model_args = initialize(1, 1, 1), read_model_args(folder)
    opened = PeftAdapter(adapter, model_args)
    targets = targets or opened.targets
    _, model = build(place, folder, rank=8, alpha=opened.alpha, targets=targets, seed=0)
    load_adapter(model, model_args, place, opened)
    slots = [slot_of(x.self_attention.linear_qkv, STUDENT) for x in model.decoder.layers]
    return [slot is not None and bool(slot.down["q_proj"].any()) for slot in slots]


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
    assert PeftAdapter(adapter, read_model_args(folder)).targets == ["0.q_proj"]
    assert run_ranks(second_stage, 1, folder, adapter, None) == [[True, False]]
    assert run_ranks(second_stage, 1, folder, adapter, ["q_proj"]) == [[True, True]]
