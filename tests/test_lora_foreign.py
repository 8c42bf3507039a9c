"""Adapters made elsewhere: other names of the same tensors, fused experts in the order of an
earlier peft, LoRA on linears that can only be merged. Each gives the right function or is refused
by what it is.
"""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from checkpoint_tools.lower_rank import LowerRankConfig, lower
from checkpoint_tools.merge_lora import MergeLoraConfig
from checkpoint_tools.merge_lora import convert as merge_lora
from checkpoint_tools.verify import VerifyConfig
from megatron_gkd.adapters import open_teacher, resolve
from megatron_gkd.config import parse_config
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.model.args import read_model_args
from megatron_gkd.verify.reference import decoder, tower
from tests.adapters import ALL, load_thinker, random_adapter, write_adapter
from tests.lora_runs import FOLDERS
from tests.ranks import run_ranks
from tests.test_lora_adapter import (
    CONFIG,
    TENSORS,
    difference,
    logits_with_adapters,
    reference_logits,
)
from tests.test_verify import run_verify
from tests.tower_adapters import write_tower_adapter

PLACE = SimpleNamespace(rank=0, world_size=1, pp_size=1, device=torch.device("cpu"))
ENDS = ["conv_out", "proj1", "proj2", "patch_embed.proj", "conv2d1", "conv2d2"]
ENDS += ["merger.mlp.0", "merger_list.0.mlp.2", "pos_embed", "embed_tokens"]


@pytest.fixture(scope="module")
def folder(tiny_folder):
    """Of a model with hidden = 2 x intermediate: fused experts fit peft's earlier order too."""
    return tiny_folder(**FOLDERS["4 KV heads"])


@pytest.fixture(scope="module")
def model_args(folder):
    return read_model_args(folder)


def renamed(wrap):
    return lambda name: wrap + name.removeprefix("base_model.model.")


NAMES = {
    "no wrapper": renamed(""),
    "module": renamed("module."),
    "PEFT twice": renamed("base_model.model.base_model.model."),
    "the part under model": renamed("base_model.model.model."),
    "FSDP and compile": renamed("_orig_mod._fsdp_wrapped_module.base_model.model."),
    "compiled and recomputed layers": lambda n: n.replace(
        ".self_attn", "._orig_mod._checkpoint_wrapped_module.self_attn"
    ),
    "FSDP around each linear": lambda n: n.replace(".lora_", "._fsdp_wrapped_module.lora_"),
    "the adapter's own name": lambda n: n.replace(".weight", ".default.weight"),
    "another name of its own": lambda n: n.replace(".weight", ".student-1.weight"),
    "transformers' decoder": lambda n: n.replace("thinker.model.", "model.language_model."),
}


def test_other_names_are_the_same_adapter(folder, model_args, tmp_path):
    targets = [*ALL, "lm_head"]
    tensors = random_adapter(model_args, 3, targets)
    for number, (kind, rename) in enumerate(NAMES.items()):
        spelled = {rename(name): value for name, value in tensors.items()}
        path = write_adapter(tmp_path / str(number), spelled, rank=3, alpha=5, targets=targets)
        save_file(spelled, Path(path) / TENSORS)
        adapter = PeftAdapter(path, model_args)
        assert (adapter.targets, adapter.merge_only, adapter.outside) == (targets, [], []), kind
        assert all(torch.equal(adapter.tensor(n)[0], value) for n, value in tensors.items()), kind


def old_order(model_args, parameters, rank=2, seed=0):
    """Tensors as peft before 0.19.1 saves them: lora_A [E r, out] and lora_B [in, r E]."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    hidden, inter = model_args.hidden_size, model_args.moe_intermediate_size
    sizes = {"gate_up_proj": (2 * inter, hidden), "down_proj": (hidden, inter)}
    width = rank * model_args.num_experts
    for layer in range(model_args.num_layers):
        # the wrapper around the other one has no base_layer in its name
        for number, parameter in enumerate(parameters):
            inner = "base_layer." if number < len(parameters) - 1 else ""
            name = f"base_model.model.model.language_model.layers.{layer}.mlp.experts.{inner}lora_"
            out, into = sizes[parameter]
            tensors[f"{name}A.weight"] = torch.randn(width, out, generator=generator) * 0.2
            tensors[f"{name}B.weight"] = torch.randn(into, width, generator=generator) * 0.2
    return tensors


def write_old(path, tensors, version, parameters, alpha=4):
    """With adapter_config.json as that peft writes it."""
    path.mkdir()
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    config = dict(peft_type="LORA", r=2, lora_alpha=alpha, bias="none", target_modules=[])
    config |= {"target_parameters": parameters} | ({"peft_version": version} if version else {})
    (path / CONFIG).write_text(json.dumps(config))
    return str(path)


@torch.no_grad()
def logits_of_old_order(folder, model_args, tensors, parameters, scale=2.0):
    """peft 0.18's get_delta_weight on the parameters as transformers holds them."""
    model = load_thinker(folder)
    for layer, block in enumerate(decoder(model).layers):
        for number, parameter in enumerate(parameters):
            inner = "base_layer." if number < len(parameters) - 1 else ""
            name = f"base_model.model.model.language_model.layers.{layer}.mlp.experts.{inner}lora_"
            down, up = tensors[f"{name}A.weight"], tensors[f"{name}B.weight"]
            down = down.reshape(model_args.num_experts, -1, down.shape[1])
            up = up.reshape(up.shape[0], -1, model_args.num_experts)
            change = torch.einsum("o r e, e r i -> e i o", up, down) * scale
            getattr(block.mlp.experts, parameter).data += change
    return reference_logits(model)


BOTH = ["gate_up_proj", "down_proj"]
OLD = {  # kind of folder, parameters, peft_version
    "both parameters": ("4 KV heads", BOTH, "0.18.1"),
    "gate_up alone": ("4 KV heads", BOTH[:1], "0.17.0"),
    "of the release before": ("4 KV heads", BOTH[:1], "0.19.0"),
    "by its sizes": ("2 KV heads, odd sizes", BOTH, None),
}


def test_fused_experts_in_the_order_of_an_earlier_peft(tiny_folder, tmp_path):
    """Training, merging and lowering read it the right way round, and write today's order."""
    runs, expected = [], []
    for number, (kind, parameters, version) in enumerate(OLD.values()):
        folder = tiny_folder(**FOLDERS[kind])
        args = read_model_args(folder)
        tensors = old_order(args, parameters)
        path = write_old(tmp_path / str(number), tensors, version, parameters)
        assert PeftAdapter(path, args).in_old_order
        runs.append((folder, path, {}))
        expected.append(logits_of_old_order(folder, args, tensors, parameters))
    (found,) = run_ranks(logits_with_adapters, 1, 1, 1, 1, runs)
    for name, ours, theirs, (folder, _, _) in zip(OLD, found, expected, runs):
        assert difference(ours, theirs) < 1e-4, name
        assert difference(theirs, reference_logits(load_thinker(folder))) > 0.2
    folder, path, _ = runs[0]
    merge_lora(MergeLoraConfig(folder, str(tmp_path / "merged"), [path], num_workers=1))
    assert difference(reference_logits(load_thinker(tmp_path / "merged")), expected[0]) < 1e-4
    lower(LowerRankConfig(folder, path, str(tmp_path / "lower"), 1))
    lowered = PeftAdapter(tmp_path / "lower", read_model_args(folder))
    assert not lowered.in_old_order and lowered.rank == 1


def test_an_order_that_nothing_tells_is_refused(model_args, tmp_path):
    tensors = old_order(model_args, BOTH[:1])
    for number, version in enumerate((None, "0.19.1.dev0@abc")):
        path = write_old(tmp_path / str(number), tensors, version, BOTH[:1])
        with pytest.raises(ValueError, match="fit two orders .*: peft_version is (missing|0.19.1)"):
            PeftAdapter(path, model_args)
    for version in ("0.19.1", "0.20.0", "1.0.0.dev0"):
        path = write_old(tmp_path / version, tensors, version, BOTH[:1])
        assert not PeftAdapter(path, model_args).in_old_order


@pytest.fixture(scope="module")
def with_rest(folder, tmp_path_factory):
    """kind -> (adapter folder, peft's logits): LoRA on the router, and on whatever else the model
    has beside the linears that train; `all` is peft's merge of it.
    """
    made = {}
    for kind, options in {
        "router": dict(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]),
        "all": dict(
            target_modules=["q_proj", "fc1", "linear_fc1", *ENDS],
            target_parameters=["mlp.gate.weight", "mlp.experts.down_proj"],
        ),
    }.items():
        torch.manual_seed(0)
        excluded = r".*(audio_tower|visual).*q_proj.*"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about embeddings, which it saves beside their LoRA
            model = get_peft_model(
                load_thinker(folder),
                LoraConfig(r=3, lora_alpha=6, exclude_modules=excluded, **options),
            )
            for name, parameter in model.named_parameters():
                if ".lora_B." in name or "embedding_A" in name:
                    parameter.data.normal_(std=0.1)
            path = tmp_path_factory.mktemp(kind)
            model.save_pretrained(path, save_embedding_layers=False)
        logits = reference_logits(model.eval())
        made[kind] = (str(path), logits, model.merge_and_unload() if kind == "all" else None)
    return made


def test_what_can_only_be_merged_is_merged_as_peft_does(folder, with_rest, tmp_path):
    """W + B A of every weight: router, convolutions, embeddings and the towers' linears too."""
    path, _, merged = with_rest["all"]
    adapter = PeftAdapter(path, read_model_args(folder))
    kinds = {linear.rpartition(".")[2] for linear in adapter.merge_only}
    assert kinds == {"gate", "0", "2"} | {end for end in ENDS if "mlp" not in end} - {
        "patch_embed.proj"
    } | {"proj"}
    merge_lora(MergeLoraConfig(folder, str(tmp_path / "out"), [path], num_workers=1))
    ours, base = (load_thinker(f).state_dict() for f in (tmp_path / "out", folder))
    theirs, changed = merged.state_dict(), 0
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, atol=1e-5), name
        changed += not torch.equal(base[name], value)
    assert changed > 20
    lost = "audio_tower.proj2.lora_A.weight"
    tensors = load_file(Path(path) / TENSORS)
    (name,) = [name for name in tensors if name.endswith(lost)]
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text((Path(path) / CONFIG).read_text())
    with pytest.raises(ValueError, match="LoRA on audio_tower.proj2 is of a weight .* has"):
        merge_lora(MergeLoraConfig(folder, str(tmp_path / "no"), [str(tmp_path)], num_workers=1))


def config_of(folder, **flags):
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return parse_config(["--model", folder, "--dataset", "d", *words])


@pytest.mark.usefixtures("world_of_one")
def test_training_refuses_them_with_the_way_out(folder, model_args, with_rest, capsys):
    router, everything = with_rest["router"][0], with_rest["all"][0]
    way_out = "merge the adapter into the model .*merge_lora .*, or train the adapter again"
    with pytest.raises(ValueError, match=f"LoRA on the router .mlp.gate. cannot .*: {way_out}"):
        resolve(config_of(folder, adapter=router), model_args, PLACE, has_media=False)
    config = config_of(folder, adapter=everything, lora_towers=True)
    with pytest.raises(ValueError, match="the router .* and the embedding .* and the towers' ends"):
        resolve(config, model_args, PLACE)
    config = config_of(folder, teacher_adapter=router)
    with pytest.raises(
        ValueError, match="--teacher_adapter .*the router.* here: train the adapter"
    ):
        open_teacher(config, model_args, PLACE, has_media=False)
    assert not capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="^--adapter a/b: no adapter_config.json; expected"):
        resolve(config_of(folder, adapter="a/b"), model_args, PLACE)


@pytest.mark.usefixtures("world_of_one")
def test_text_leaves_the_towers_ends_out(folder, model_args, tmp_path, capsys):
    """As it does with LoRA on their layers."""
    tensors = random_adapter(model_args, 3, ["q_proj"])
    root = "base_model.model.thinker.audio_tower.proj1.lora_"
    tensors |= {f"{root}{side}.weight": torch.ones(3, 3) for side in "AB"}
    path = write_adapter(tmp_path, tensors, rank=3, alpha=5, targets=["q_proj", "proj1"])
    config, adapter, _ = resolve(
        config_of(folder, adapter=path), model_args, PLACE, has_media=False
    )
    assert config.lora.lora_target_modules == ["q_proj"] and adapter.rank == 3
    assert "1 linears at the towers' ends (audio_tower.proj1, ...)" in capsys.readouterr().out


@pytest.mark.usefixtures("world_of_one")
def test_a_teacher_that_would_be_the_base_is_refused(folder, model_args, tmp_path):
    """LoRA that was never trained, whichever of its matrices is zero; or on towers that no row
    reaches.
    """
    tensors = random_adapter(model_args, 3, ["q_proj"])
    for side in "AB":
        idle = {n: torch.zeros_like(v) if f"lora_{side}" in n else v for n, v in tensors.items()}
        path = write_adapter(tmp_path / side, idle, rank=3, alpha=5, targets=["q_proj"])
        with pytest.raises(ValueError, match=f"--teacher_adapter {path}: its update is zero"):
            open_teacher(
                config_of(folder, teacher_adapter=path), model_args, PLACE, has_media=False
            )
    (tmp_path / "towers").mkdir()
    path = write_tower_adapter(folder, tmp_path / "towers", targets=[], towers=["visual"])
    config = config_of(folder, teacher_adapter=path)
    with pytest.raises(ValueError, match=f"{path}: has LoRA on the towers alone, which text does"):
        open_teacher(config, model_args, PLACE, has_media=False)
    assert open_teacher(config, model_args, PLACE, has_media=True).towers


def test_verify_and_lower_rank_take_the_router(folder, model_args, with_rest, tmp_path):
    """Added to the router's weight in fp32, it gives peft's logits; a lower rank keeps it."""
    path = with_rest["router"][0]
    lower(LowerRankConfig(folder, path, str(tmp_path / "lower"), 2))
    assert PeftAdapter(tmp_path / "lower", model_args).merge_only == [
        f"model.layers.{layer}.mlp.gate" for layer in range(2)
    ]
    old = write_old(tmp_path / "old", old_order(model_args, BOTH), "0.18.1", BOTH)
    tensors = random_adapter(model_args, 3, ["q_proj", "up_proj"])
    rows, columns = tower(load_thinker(folder), "audio_tower").proj1.weight.shape
    for side, size in (("A", (3, columns)), ("B", (rows, 3))):
        name = f"base_model.model.thinker.audio_tower.proj1.lora_{side}.weight"
        tensors[name] = torch.randn(size, generator=torch.Generator().manual_seed(1))
    spelled = {renamed("module.")(name): value for name, value in tensors.items()}
    swift = write_adapter(
        tmp_path / "swift", spelled, rank=3, alpha=5, targets=r"^(thinker\.model.*\.(q|up)_proj)$"
    )
    adapters = (path, tmp_path / "lower", old, swift)
    configs = [VerifyConfig(folder, adapter=str(adapter)) for adapter in adapters]
    for passed, printed in run_ranks(run_verify, 1, configs)[0]:
        assert passed, printed
    assert "rewritten for the installed ones" in printed
    with pytest.raises(ValueError, match="is no linear, has no lower rank here"):
        lower(LowerRankConfig(folder, with_rest["all"][0], str(tmp_path / "no"), 1))
