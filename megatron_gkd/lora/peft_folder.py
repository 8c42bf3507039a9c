"""A PEFT adapter folder, read and written: adapter_config.json and adapter_model.safetensors.

Reads what PEFT writes for this model under transformers 4 (a linear an expert) and 5 (experts fused
into stacked parameters, whose LoRA has E ranks side by side), under any of the family's roots
(adapter_names.py). Writes per-expert names, which PEFT loads on both.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_gkd.families import Family
from megatron_gkd.formats.stored_tensor import SAFETENSORS_NAMES, memory
from megatron_gkd.lora.adapter import (
    EXPERTS,
    HEAD,
    adapter_slices,
    adapter_tensors,
    applied,
    resolve_targets,
    tower_tensors,
)
from megatron_gkd.lora.adapter_names import adapter_names
from megatron_gkd.model.args import ModelArgs

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
RECORD = "megatron_gkd.lora"  # in the metadata of TENSORS: what adapter_config.json should say
# Settings of PEFT's LoraConfig that change what the tensors mean, with the value at which they do
# not.
_PLAIN = {
    **{"use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "use_qalora": False},
    **{
        "bias": "none",
        "modules_to_save": [],
        "layer_replication": [],
        "alora_invocation_tokens": [],
    },
}
# Ways to start that leave the base alone; others (PiSSA, OLoRA, ...) move a part of it into the
# adapter.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Source:
    """Where one tensor of the adapter lies: a stored one, or one expert's part of a fused one."""

    stored: str
    alpha: float
    expert: int | None = None
    rows: slice | None = None  # of a fused lora_B: the gate's or the up's half


class PeftAdapter:
    """An opened adapter folder. `rank`, `alpha`, `targets` (of the decoder) and `towers` (linears
    of the towers, by name) describe it, `outside` are tensors of LoRA on the family's other models;
    `tensor(name)` gives one matrix and its scale.
    """

    def __init__(self, folder: str | Path, model_args: ModelArgs):
        """Raises FileNotFoundError, or ValueError naming the setting or tensor that plain LoRA on
        this model cannot represent.
        """
        self.folder, self.model_args = Path(folder), model_args
        self._family, self._names = model_args.family, adapter_names(model_args.family)
        for name in (CONFIG, TENSORS):
            if not (self.folder / name).is_file():
                hint = (
                    "; adapter_model.bin is a pickle and is not read"
                    if (self.folder / "adapter_model.bin").is_file()
                    else ""
                )
                raise FileNotFoundError(
                    f"{self.folder}: no {name}; expected a PEFT adapter folder{hint}"
                )
        self.config = self._read_config()
        self.path = self.folder / TENSORS
        try:
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.path}: not a complete safetensors file ({error})") from error
        self.outside: list[str] = []
        self._base_copies: dict[str, str] = {}  # "lm_head" or "embed_tokens" -> stored
        self._sources, in_towers = self._find_sources()
        stored_targets = {_linear(name) for name in self._sources}
        self._check_tensors(stored_targets)
        used = [target for target in stored_targets if self._is_used(target)]
        if not used:
            raise ValueError(
                f"{self.path}: every tensor is zero, so that the adapter does nothing and cannot be trained further"
            )
        self.targets = resolve_targets(used)
        self.towers = self._check_towers(in_towers)
        self._check_ranks()
        self._sources |= in_towers
        downs = [name for name in self._sources if ".lora_A." in name and name in self]
        self.rank = max(self._rank(name) for name in downs)
        self.alpha = self._sources[downs[0]].alpha * (self.rank / self._divisor(downs[0]))

    def __contains__(self, name: str) -> bool:
        """Whether the adapter has tensor `name`, spelled as in `adapter_tensors` and
        `tower_tensors`.
        """
        return name in self._sources and (
            not name.startswith(self._family.adapter_layers) or _linear(name) in self.targets
        )

    def _read_config(self) -> dict:
        path = self.folder / CONFIG
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        if config.get("peft_type") != "LORA":
            raise ValueError(
                f"{path}: peft_type {config.get('peft_type')!r}; only LORA adapters load"
            )
        if "lora_alpha" not in config:
            raise ValueError(f"{path}: lora_alpha is missing")
        for setting, neutral in _PLAIN.items():
            if config.get(setting) not in (None, neutral):
                raise ValueError(
                    f"{path}: {setting} = {config[setting]!r} is not supported (expected {neutral!r})"
                )
        if config.get("init_lora_weights") not in _STARTS:
            raise ValueError(
                f"{path}: init_lora_weights = {config['init_lora_weights']!r} belongs to a changed base model; save it as plain LoRA with "
                "PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        return config

    def _setting(self, name: str, module: str, spellings: Sequence[str], default: float) -> float:
        """What the pattern setting `name` says of `module` ("0.self_attn.q_proj"), whose name it
        may spell out as in any of PEFT's models.
        """
        for pattern, value in (self.config.get(name) or {}).items():
            try:
                expression = re.compile(rf"(.*\.)?({pattern})")
            except re.error as error:
                raise ValueError(
                    f"{self.folder / CONFIG}: {name} {pattern!r} is no regular expression: {error}"
                ) from None
            if any(expression.fullmatch(spelling + module) for spelling in spellings):
                return float(value)
        return default

    def _alpha(self, module: str, spellings: Sequence[str]) -> float:
        return self._setting("alpha_pattern", module, spellings, float(self.config["lora_alpha"]))

    def _find_sources(self) -> tuple[dict[str, _Source], dict[str, _Source]]:
        """Of the decoder's tensors, and of the towers'."""
        sources, in_towers, fused, unknown = {}, {}, {}, []
        names, root, layers = self._names, self._family.adapter_root, self._family.adapter_layers
        for name in self._file.keys():
            if match := names.linear.fullmatch(name):
                linear, side = match.groups()
                sources[f"{layers}{linear}.lora_{side}.weight"] = _Source(
                    name, self._alpha(linear, names.layer_spellings)
                )
            elif match := names.head.fullmatch(name):
                sources[f"{root}{HEAD}.lora_{match[1]}.weight"] = _Source(
                    name, self._alpha(HEAD, names.head_spellings)
                )
            elif match := names.fused.fullmatch(name):
                layer, inner, side = match.groups()
                fused.setdefault((layer, inner), {})[side] = name
            elif match := names.base_copy.fullmatch(name):
                self._base_copies[match[1]] = name
            elif not self._changes_something(name):
                continue
            elif names.outside.fullmatch(name):
                self.outside.append(name)
            elif match := names.tower.fullmatch(name):
                linear, side = match.groups()
                in_towers[f"{root}{linear}.lora_{side}.weight"] = _Source(
                    name, self._alpha(linear, names.layer_spellings)
                )
            else:
                unknown.append(name)
        if unknown:
            raise ValueError(
                f"{self.path}: tensor {unknown[0]} and {len(unknown) - 1} more are not LoRA on "
                f"{self._family.trained_part}'s decoder or towers"
            )
        for (layer, _), pair in fused.items():
            self._add_fused(sources, layer, pair)
        if not sources:
            raise ValueError(
                f"{self.path}: no LoRA on {self._family.trained_part}'s decoder linears"
            )
        return sources, in_towers

    def _changes_something(self, name: str) -> bool:
        """False for LoRA that was never trained (lora_B is zero): PEFT puts it on linears of the
        same names in the towers and the talker.
        """
        up = name.replace(".lora_A.", ".lora_B.")
        return (
            ".lora_B." not in up
            or up not in self._file.keys()
            or bool(self._file.get_tensor(up).any())
        )

    def _add_fused(self, sources: dict[str, _Source], layer: str, pair: dict[str, str]) -> None:
        """LoRA of all experts on gate_up_proj or on down_proj: the sizes of its lora_A and lora_B
        say on which.
        """
        hidden, inter = self.model_args.hidden_size, self.model_args.moe_intermediate_size
        if len(pair) < 2:
            [(side, name)] = pair.items()
            raise ValueError(
                f"{self.path}: tensor {name} has no lora_{'B' if side == 'A' else 'A'} beside it"
            )
        size_a, size_b = (self._size(pair[side]) for side in "AB")
        if (size_a[-1], size_b[0]) == (hidden, 2 * inter):
            parameter, parts = (
                "gate_up_proj",
                {"gate_proj": slice(0, inter), "up_proj": slice(inter, 2 * inter)},
            )
        elif (size_a[-1], size_b[0]) == (inter, hidden):
            parameter, parts = "down_proj", {"down_proj": slice(None)}
        else:
            raise ValueError(
                f"{self.path}: {pair['A']} {size_a} and {pair['B']} {size_b} fit neither gate_up_proj ({hidden} to {2 * inter}) nor "
                f"down_proj ({inter} to {hidden}), the sizes of the model's config.json"
            )
        alpha = self._alpha(f"{layer}.mlp.experts.{parameter}", self._names.layer_spellings)
        experts = f"{self._family.adapter_layers}{layer}.mlp.experts."
        for expert in range(self.model_args.num_experts):
            for projection, rows in parts.items():
                for side, stored in pair.items():
                    name = f"{experts}{expert}.{projection}.lora_{side}.weight"
                    sources[name] = _Source(stored, alpha, expert, rows)

    def _check_tensors(self, targets: set[str]) -> None:
        """A layer has both matrices of a target or neither, of all experts or of none; of the
        model's sizes and one rank.
        """
        expected, layers = (
            adapter_tensors(self.model_args, 1, targets),
            self.config.get("layers_to_transform"),
        )
        if layers is not None:
            layers = [layers] if isinstance(layers, int) else layers
            expected = {
                name: size
                for name, size in expected.items()
                if not name.startswith(self._family.adapter_layers)
                or int(self._layer_and_linear(name)[0]) in layers
            }
        present = {self._layer_and_linear(name) for name in self._sources}
        expected = {
            name: size for name, size in expected.items() if self._layer_and_linear(name) in present
        }
        missing = [name for name in expected if name not in self._sources]
        if missing:
            raise ValueError(
                f"{self.path}: misses tensor {missing[0]} and {len(missing) - 1} more of LoRA on {', '.join(sorted(targets))}"
            )
        extra = [source.stored for name, source in self._sources.items() if name not in expected]
        if extra:
            raise ValueError(
                f"{self.path}: tensor {extra[0]} and {len(extra) - 1} more are of layers or experts that the model does not have"
            )
        for name, (num_outputs, num_inputs) in expected.items():
            source = self._sources[name]
            size, size_a = (
                self._size(source.stored),
                self._size(self._sources[name.replace(".lora_B.", ".lora_A.")].stored),
            )
            if source.rows is not None and ".lora_B." in name:
                num_outputs = size[0]  # of the fused projections together, looked at in _add_fused
            wanted = [size_a[0], num_inputs] if ".lora_A." in name else [num_outputs, size_a[0]]
            num_experts = 1 if source.expert is None else self.model_args.num_experts
            if size != wanted or size_a[0] % num_experts or not size_a[0]:
                raise ValueError(
                    f"{self.path}: tensor {source.stored} has shape {size}, rank and the model's config.json ask for {wanted}"
                )

    def _layer_and_linear(self, name: str) -> tuple[str, str]:
        """("3", "q_proj") of a tensor of layer 3, any expert's; ("", "lm_head") of the head's."""
        layers = self._family.adapter_layers
        if not name.startswith(layers):
            return "", _linear(name)
        return name[len(layers) :].split(".")[0], _linear(name)

    def _check_ranks(self) -> None:
        """The tensors of attention have the ranks that the configuration states (those of experts
        PEFT multiplies when it fuses them).
        """
        for name in self._sources:
            linear = name.removeprefix(self._family.adapter_layers).removesuffix(".lora_A.weight")
            if ".lora_A." in name and ".self_attn." in name and "r" in self.config and name in self:
                rank, stated = (
                    self._rank(name),
                    self._setting(
                        "rank_pattern", linear, self._names.layer_spellings, self.config["r"]
                    ),
                )
                if rank != stated:
                    raise ValueError(
                        f"{self.path}: {self._sources[name].stored} has rank {rank}, and {CONFIG} says {stated:g} (r, rank_pattern): "
                        "the scale alpha / r would not be the one that it was trained with"
                    )

    def _check_towers(self, in_towers: dict[str, _Source]) -> list[str]:
        """The towers' linears with LoRA; both matrices of each must be there, of one rank. Their
        sizes are the module's to check.
        """
        root = self._family.adapter_root
        linears = sorted({name[len(root) :].rsplit(".", 2)[0] for name in in_towers})
        for linear in linears:
            down, up = (f"{root}{linear}.lora_{side}.weight" for side in "AB")
            for name in (down, up):
                if name not in in_towers:
                    raise ValueError(f"{self.path}: misses tensor {name}")
            size_a, size_b = self._size(in_towers[down].stored), self._size(in_towers[up].stored)
            if len(size_a) != 2 or len(size_b) != 2 or size_a[0] != size_b[1] or not size_a[0]:
                raise ValueError(
                    f"{self.path}: lora_A {size_a} and lora_B {size_b} of {linear} are not of one rank"
                )
        return linears

    def _is_used(self, target: str) -> bool:
        """False for a linear without LoRA that `save_checkpoint` wrote as zeros (see
        saved_targets).
        """
        return any(
            bool(self._stored(source.stored).any())
            for name, source in self._sources.items()
            if _linear(name) == target
        )

    def _size(self, stored: str) -> list[int]:
        return self._file.get_slice(stored).get_shape()

    def _rank(self, name: str) -> int:
        """Rank of the linear that tensor `name` belongs to."""
        source = self._sources[name.replace(".lora_B.", ".lora_A.")]
        return self._size(source.stored)[0] // (
            1 if source.expert is None else self.model_args.num_experts
        )

    def _divisor(self, name: str) -> float:
        return self._rank(name) ** 0.5 if self.config.get("use_rslora") else self._rank(name)

    def tensor(self, name: str) -> tuple[Tensor, float]:
        """One matrix (lora_A [r', d_in] or lora_B [d_out, r']) in fp32, and the scale its product
        is multiplied by.
        """
        source = self._sources[name]
        values = self._stored(source.stored)
        if source.expert is not None:
            num_experts = self.model_args.num_experts
            if ".lora_A." in name:
                values = values.reshape(num_experts, -1, values.shape[1])[source.expert]
            else:
                values = values.reshape(values.shape[0], -1, num_experts)[
                    source.rows, :, source.expert
                ]
        return values, source.alpha / self._divisor(name)

    def is_empty(self, name: str) -> bool:
        """Whether both matrices of the linear that tensor `name` belongs to are zero: LoRA that is
        not there, as our checkpoints write it.
        """
        down = name.replace(".lora_B.", ".lora_A.")
        return not any(
            bool(self.tensor(side)[0].any())
            for side in (down, down.replace(".lora_A.", ".lora_B."))
        )

    @property
    def one_scale(self) -> bool:
        """Whether alpha / r is the same for all linears."""
        return (
            len(
                {
                    source.alpha / self._divisor(name)
                    for name, source in self._sources.items()
                    if name in self
                }
            )
            == 1
        )

    @property
    def shares_downs(self) -> bool:
        """Whether gate_proj and up_proj have one lora_A together."""
        return any(source.rows not in (None, slice(None)) for source in self._sources.values())

    def check_base(self, name: str, rows: slice, base: Tensor) -> None:
        """Raise ValueError if the adapter brings `name` ("lm_head", "embed_tokens") along and its
        `rows` are not `base`.
        """
        stored = self._base_copies.get(name)
        if stored is None:
            return
        copy = self._file.get_slice(stored)[rows]
        relative = max(
            torch.finfo(dtype).eps for dtype in (copy.dtype, base.dtype)
        )  # either may be a rounding of the other
        absolute = (
            6e-8 if torch.float16 in (copy.dtype, base.dtype) else 0.0
        )  # below that float16 has no number
        if not torch.allclose(
            copy.to(base.device).float(), base.float(), rtol=relative, atol=absolute
        ):
            raise ValueError(
                f"{self.path}: {stored} is not the {name} of this model: the adapter was trained on another base, or {name} was trained "
                "with it"
            )

    @lru_cache(maxsize=4)
    def _stored(self, stored: str) -> Tensor:
        return self._file.get_tensor(stored).float()


def _linear(name: str) -> str:
    """q_proj of "....q_proj.lora_A.weight"."""
    return name.rsplit(".", 3)[1]


def load_adapter(
    model, model_args: ModelArgs, parallel, adapter: PeftAdapter, *, more_linears: bool = True
) -> None:
    """Set this stage's LoRA parameters to `adapter`, so that the model computes the same function
    as with PEFT.

    W_up absorbs a scale that is not the run's. Where the run has a larger rank than the whole
    adapter, W_up gets zero columns and W_down keeps the fresh rows it started with: they will
    learn. A linear of lower rank than the others (rank_pattern) is padded with zeros on both sides:
    these have no gradient, there is nothing for PEFT either. more_linears: linears that the adapter
    has nothing of keep their start and will learn; otherwise that holds for other kinds than the
    adapter's only, and layers that it leaves out stay without LoRA.

    Raises ValueError for a larger rank, a target that has no LoRA here, or another base. No
    collectives.
    """
    rank, scale, targets = applied(model)
    if adapter.rank > rank:
        raise ValueError(
            f"{adapter.folder}: rank {adapter.rank} does not fit into --lora_rank {rank}; raise --lora_rank, or leave it out"
        )
    absent = [name for name in adapter.targets if name not in targets]
    if absent:
        raise ValueError(
            f"{adapter.folder}: has LoRA on {', '.join(absent)}; add it to --lora_target_modules {','.join(targets)}"
        )
    _check_base(model, model_args, parallel, adapter)
    in_towers = tower_tensors(model, model_args)
    for part in adapter_slices(model, model_args, parallel):
        name, (rows, columns) = part.stored.name, part.stored.index
        if name not in adapter or adapter.is_empty(name):
            if not more_linears and name not in in_towers and _linear(name) in adapter.targets:
                part.view.zero_()
            continue
        values, own_scale = adapter.tensor(name)
        side = 0 if ".lora_B." in name else 1
        if name in in_towers and values.shape[side] != in_towers[name][side]:
            raise ValueError(
                f"{adapter.path}: {name} is {list(values.shape)}, "
                f"this model's tower has {list(in_towers[name])}"
            )
        is_up = ".lora_B." in name
        own_rank = values.shape[1] if is_up else values.shape[0]
        if is_up:
            part.view.zero_()
            part.view[:, :own_rank].copy_(values[rows] * (own_scale / scale))
        else:
            part.view[:own_rank].copy_(values[:, columns])
            if rank == adapter.rank:
                part.view[own_rank:].zero_()


def _check_base(model, model_args: ModelArgs, parallel, adapter: PeftAdapter) -> None:
    held = (
        {"embed_tokens": model.embedding.word_embeddings.weight} if parallel.is_first_stage else {}
    )
    held |= {"lm_head": model.output_layer.weight} if parallel.is_last_stage else {}
    for name, weight in held.items():
        first = parallel.tp_rank * len(weight)
        num_rows = min(max(model_args.vocab_size - first, 0), len(weight))  # the rest is padding
        adapter.check_base(name, slice(first, first + num_rows), weight[:num_rows].detach())


def save_tensors(
    tensors: dict[str, Tensor],
    folder: Path,
    family: Family,
    *,
    rank: int,
    alpha: float,
    targets: list[str],
) -> None:
    """Write FOLDER/adapter_model.safetensors. Its metadata, which PEFT does not read, say what the
    tensors were trained with. The lm_head's tensors are there under every root of the family:
    unlike the others' PEFT 0.21 looks for them on a part of the whole model without its prefix.

    The same arguments give the same bytes: safetensors' own save_file puts metadata in an order of
    chance.
    """
    head = f"{family.adapter_root}{HEAD}."
    tensors = tensors | {
        f"base_model.model.{root}{name.removeprefix(family.adapter_root)}": tensor
        for name, tensor in tensors.items()
        for root in family.adapter_roots
        if name.startswith(head)
    }
    record = json.dumps({"rank": rank, "alpha": alpha, "targets": targets})
    header, end = {"__metadata__": {"format": "pt", RECORD: record}}, 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / TENSORS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(memory(tensors[name].contiguous()))


def read_record(folder: Path) -> dict | None:
    """The rank, alpha and targets that the weights were trained with; None in an adapter of another
    writer.
    """
    with safe_open(folder / TENSORS, framework="pt") as file:
        text = (file.metadata() or {}).get(RECORD)
    return json.loads(text) if text else None


def peft_config(
    family: Family,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    base_model: str,
    towers: Collection[str] = (),
) -> dict:
    """adapter_config.json for PEFT. towers: their linears with LoRA, by name.

    The decoder's names are bare (PEFT rewrites those of fused experts), so the towers without LoRA
    and the other models, whose linears have the same names, are excluded. PEFT refuses dropout on
    fused experts even at inference: an adapter with experts states 0.
    """
    has_experts = any(name in EXPERTS for name in targets)
    with_lora = {name.split(".")[0] for name in towers}
    excluded = [name for name in family.excluded_modules if name not in with_lora]
    exclude = {"exclude_modules": f".*({'|'.join(excluded)}).*"} if excluded else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if has_experts else dropout,
        "bias": "none",
        "target_modules": saved_targets(targets) + list(towers),
        **exclude,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def saved_targets(targets: list[str]) -> list[str]:
    """The linears an adapter on disk names: PEFT loads an expert's gate, up and down together or
    not at all, so missing ones are saved as zeros.
    """
    if any(name in EXPERTS for name in targets):
        return [name for name in targets if name not in EXPERTS] + list(EXPERTS)
    return targets


def zero_tensors(model_args: ModelArgs, rank: int, targets: list[str]) -> dict[str, Tensor]:
    """The zero matrices of `saved_targets` that training does not have."""
    added = [name for name in saved_targets(targets) if name not in targets]
    return {
        name: torch.zeros(size) for name, size in adapter_tensors(model_args, rank, added).items()
    }
