"""A PEFT adapter folder, opened.

It may hold what PEFT writes for this model under transformers 4 (a linear for every expert) or 5
(experts fused into stacked parameters, whose LoRA has E ranks side by side), under any of the
family's roots.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_gkd.lora.adapter import HEAD, adapter_tensors, resolve_targets
from megatron_gkd.lora.peft_config import CONFIG, TENSORS, pattern_value, read_config
from megatron_gkd.lora.peft_names import layer_and_linear, linear_of, peft_names
from megatron_gkd.model.args import ModelArgs


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the adapter lies: a stored tensor, or one expert's part of a fused one."""

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
        self._family, self._names = model_args.family, peft_names(model_args.family)
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
        self.config = read_config(self.folder)
        self.path = self.folder / TENSORS
        try:
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.path}: not a complete safetensors file ({error})") from error
        # The experts' parts of a fused tensor are asked for one after the other.
        self._stored = lru_cache(maxsize=4)(lambda stored: self._file.get_tensor(stored).float())
        self.outside: list[str] = []
        self._base_copies: dict[str, str] = {}  # "lm_head" or "embed_tokens" -> stored
        self._sources, in_towers = self._find_sources()
        stored_targets = {linear_of(name) for name in self._sources}
        self._check_tensors(stored_targets)
        used = [target for target in stored_targets if self._is_used(target)]
        if not used:
            raise ValueError(
                f"{self.path}: every tensor is zero, so that the adapter does nothing and cannot "
                "be trained further"
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
            not name.startswith(self._family.adapter_layers) or linear_of(name) in self.targets
        )

    def _alpha(self, module: str, spellings: Iterable[str]) -> float:
        alpha = float(self.config["lora_alpha"])
        return self._setting("alpha_pattern", module, spellings, alpha)

    def _setting(self, name: str, module: str, spellings: Iterable[str], default: float) -> float:
        try:
            return pattern_value(self.config.get(name) or {}, module, spellings, default)
        except ValueError as error:
            raise ValueError(f"{self.folder / CONFIG}: {name} {error}") from None

    def _find_sources(self) -> tuple[dict[str, _Source], dict[str, _Source]]:
        """The sources of the decoder's tensors, and those of the towers'."""
        sources: dict[str, _Source] = {}
        in_towers: dict[str, _Source] = {}
        fused: dict[tuple[str, str], dict[str, str]] = {}
        unknown = []
        names, root, layers = self._names, self._family.adapter_root, self._family.adapter_layers
        for name in self._file.keys():
            if match := names.linear.fullmatch(name):
                linear, side = match.groups()
                alpha = self._alpha(linear, names.layer_spellings)
                sources[f"{layers}{linear}.lora_{side}.weight"] = _Source(name, alpha)
            elif match := names.head.fullmatch(name):
                alpha = self._alpha(HEAD, names.head_spellings)
                sources[f"{root}{HEAD}.lora_{match[1]}.weight"] = _Source(name, alpha)
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
                alpha = self._alpha(linear, names.layer_spellings)
                in_towers[f"{root}{linear}.lora_{side}.weight"] = _Source(name, alpha)
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
        same names in the towers and the other models.
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
                f"{self.path}: {pair['A']} {size_a} and {pair['B']} {size_b} fit neither "
                f"gate_up_proj ({hidden} to {2 * inter}) nor down_proj ({inter} to {hidden}), "
                "the sizes of the model's config.json"
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
        expected = adapter_tensors(self.model_args, 1, sorted(targets))
        family, layers = self._family, self.config.get("layers_to_transform")
        if layers is not None:
            layers = [layers] if isinstance(layers, int) else layers
            expected = {
                name: size
                for name, size in expected.items()
                if not name.startswith(family.adapter_layers)
                or int(layer_and_linear(name, family)[0]) in layers
            }
        present = {layer_and_linear(name, family) for name in self._sources}
        expected = {
            name: size
            for name, size in expected.items()
            if layer_and_linear(name, family) in present
        }
        missing = [name for name in expected if name not in self._sources]
        if missing:
            raise ValueError(
                f"{self.path}: misses tensor {missing[0]} and {len(missing) - 1} more of LoRA on "
                f"{', '.join(sorted(targets))}"
            )
        extra = [source.stored for name, source in self._sources.items() if name not in expected]
        if extra:
            raise ValueError(
                f"{self.path}: tensor {extra[0]} and {len(extra) - 1} more are of layers or "
                "experts that the model does not have"
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
                    f"{self.path}: tensor {source.stored} has shape {size}, rank and the model's "
                    f"config.json ask for {wanted}"
                )

    def _check_ranks(self) -> None:
        """The tensors of attention have the ranks that the configuration states (those of experts
        PEFT multiplies when it fuses them).
        """
        for name in self._sources:
            linear = name.removeprefix(self._family.adapter_layers).removesuffix(".lora_A.weight")
            if ".lora_A." in name and ".self_attn." in name and "r" in self.config and name in self:
                rank, spellings = self._rank(name), self._names.layer_spellings
                stated = self._setting("rank_pattern", linear, spellings, self.config["r"])
                if rank != stated:
                    raise ValueError(
                        f"{self.path}: {self._sources[name].stored} has rank {rank}, and {CONFIG} "
                        f"says {stated:g} (r, rank_pattern): the scale alpha / r would not be the "
                        "one that it was trained with"
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
                    f"{self.path}: lora_A {size_a} and lora_B {size_b} of {linear} are not of one "
                    "rank"
                )
        return linears

    def _is_used(self, target: str) -> bool:
        """False for a linear without LoRA that `save_checkpoint` wrote as zeros (see
        saved_targets).
        """
        return any(
            bool(self._stored(source.stored).any())
            for name, source in self._sources.items()
            if linear_of(name) == target
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
        dtypes = (copy.dtype, base.dtype)
        relative = max(
            torch.finfo(dtype).eps for dtype in dtypes
        )  # either may be the other, rounded
        absolute = 6e-8 if torch.float16 in dtypes else 0.0  # float16 has no smaller number
        if not torch.allclose(
            copy.to(base.device).float(), base.float(), rtol=relative, atol=absolute
        ):
            raise ValueError(
                f"{self.path}: {stored} is not the {name} of this model: the adapter was trained "
                f"on another base, or {name} was trained with it"
            )
