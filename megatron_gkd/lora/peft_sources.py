"""Where the matrices of an adapter lie in its file: a stored tensor each, or an expert's part of a
fused one.

PEFT turned LoRA on fused experts round in 0.19.1: before, it took their parameter [E, out, in] for
[E, in, out], so that lora_A [E r, out] and lora_B [in, r E] are what is B and A now, transposed.
The shapes say which order a file has, or where both fit its peft_version.

E experts, r rank, I intermediate size, H hidden size.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_gkd.lora.peft_config import CONFIG, pattern_value
from megatron_gkd.lora.peft_names import PeftNames, peft_names, unwrapped, what_it_is
from megatron_gkd.model.args import ModelArgs

_FIRST_IN_NEW_ORDER = (0, 19, 1)


@dataclass(frozen=True)
class Source:
    """Of one matrix."""

    stored: str
    alpha: float
    expert: int | None = None
    """Of a fused tensor, which expert's part"""
    rows: slice | None = None
    """Of a fused lora_B: the gate's or the up's half"""
    transposed: bool = False
    """lora_A is what is stored as B, and the other way round"""

    def part(self, values: Tensor, side: str, num_experts: int) -> Tensor:
        """lora_A [r, in] or lora_B [out, r] (`side`) out of the stored tensor `values`."""
        if self.expert is not None:
            if (side == "A") != self.transposed:
                values = values.reshape(num_experts, -1, values.shape[1])[self.expert]
            else:
                values = values.reshape(values.shape[0], -1, num_experts)[:, :, self.expert]
        values = values.T if self.transposed else values
        return values[self.rows] if side == "B" and self.rows is not None else values


@dataclass
class Sources:
    """Of a whole file, by the names of `adapter_tensors` and `tower_tensors`."""

    decoder: dict[str, Source] = field(default_factory=dict)
    towers: dict[str, Source] = field(default_factory=dict)
    merge_only: dict[str, Source] = field(default_factory=dict)
    """On linears that cannot carry LoRA here, but be added to: the router, the towers' ends, the
    embedding"""
    outside: list[str] = field(default_factory=list)
    """Tensors of LoRA on the family's other models"""
    base_copies: dict[str, str] = field(default_factory=dict)
    """`lm_head` or `embed_tokens` -> a copy of the base's weight"""


class Finder:
    """The file's tensors put into `Sources`."""

    def __init__(
        self, path: Path, sizes: Mapping[str, list[int]], config: dict, model_args: ModelArgs
    ):
        """sizes: of the tensors that the file holds and that change something."""
        self.path, self.sizes, self.config, self.model_args = path, sizes, config, model_args
        self.names: PeftNames = peft_names(model_args.family)
        self.found = Sources()
        self._own_names: set[str | None] = set()
        self._fused: dict[tuple[str, str], dict[str, str]] = {}
        self._twice: list[tuple[str, str]] = []

    def find(self) -> Sources:
        """Raises ValueError naming a tensor that has no meaning here, and what it is."""
        unknown = [name for name in self.sizes if not self._take(name)]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ValueError(f"{self.path}: tensor {unknown[0]}{more}: {what_it_is(unknown[0])}")
        if len(self._own_names) > 1:
            names = ", ".join(sorted(str(name) for name in self._own_names))
            raise ValueError(
                f"{self.path}: holds several adapters ({names}); save the one that is meant alone"
            )
        if self._twice:
            first, second = self._twice[0]
            raise ValueError(
                f"{self.path}: {first} and {second} are one matrix, so which of them is meant is "
                "unknown; save the adapter anew"
            )
        if self._fused:
            is_old = self._in_old_order()
            for (layer, _), pair in self._fused.items():
                self._add_fused(layer, pair, is_old)
        return self.found

    def _take(self, name: str) -> bool:
        """Note where tensor `name` belongs; False if it has no place."""
        names, family, found = self.names, self.model_args.family, self.found
        bare = unwrapped(name)
        root, layers = family.adapter_root, family.adapter_layers
        model = f"{root}{family.inner_roots[0]}"
        kinds = (
            (names.linear, found.decoder, layers, names.layer_spellings),
            (names.head, found.decoder, root, names.head_spellings),
            (names.tower, found.towers, root, names.inside_spellings),
            (names.router, found.merge_only, layers, names.layer_spellings),
            (names.tower_rest, found.merge_only, root, names.inside_spellings),
        )
        for pattern, sources, before, spellings in kinds:
            if match := pattern.fullmatch(bare):
                self._own_names.add(match["adapter"])
                matrix = f"{before}{match['linear']}.lora_{match['side']}.weight"
                # a checkpoint of training has the lm_head's under every root (peft_writer.py)
                if matrix in sources and pattern is not names.head:
                    self._twice.append((sources[matrix].stored, name))
                sources[matrix] = Source(name, self._alpha(match["linear"], spellings))
                return True
        if match := names.embedding.fullmatch(bare):  # lora_A [r, V] and lora_B [H, r] of W [V, H]
            alpha = self._alpha(match["linear"], names.inside_spellings)
            before = model if match["linear"] == "embed_tokens" else root
            other = "B" if match["side"] == "A" else "A"
            source = Source(name, alpha, transposed=True)
            found.merge_only[f"{before}{match['linear']}.lora_{other}.weight"] = source
        elif match := names.fused.fullmatch(bare):
            self._own_names.add(match["adapter"])
            pair = self._fused.setdefault((match["layer"], match["inner"]), {})
            if match["side"] in pair:
                self._twice.append((pair[match["side"]], name))
            pair[match["side"]] = name
        elif match := names.base_copy.fullmatch(bare):
            found.base_copies[match["linear"]] = name
        elif names.outside.fullmatch(bare):
            found.outside.append(name)
        else:
            return False
        return True

    def _alpha(self, module: str, spellings: Iterable[str]) -> float:
        alpha = float(self.config["lora_alpha"])
        return setting_of(self.path, self.config, "alpha_pattern", module, spellings, alpha)

    def _fits(self, pair: dict[str, str]) -> list[tuple[bool, str]]:
        """(old order?, parameter) of which the sizes of lora_A and lora_B can be."""
        if len(pair) < 2:
            [(side, name)] = pair.items()
            raise ValueError(
                f"{self.path}: tensor {name} has no lora_{'B' if side == 'A' else 'A'} beside it"
            )
        hidden, inter = self.model_args.hidden_size, self.model_args.moe_intermediate_size
        size_a, size_b = (self.sizes[pair[side]] for side in "AB")
        forms = {
            (False, "gate_up_proj"): [hidden, 2 * inter],
            (False, "down_proj"): [inter, hidden],
            (True, "gate_up_proj"): [2 * inter, hidden],
            (True, "down_proj"): [hidden, inter],
        }
        found = [form for form, size in forms.items() if size == [size_a[-1], size_b[0]]]
        if not found:
            raise ValueError(
                f"{self.path}: {pair['A']} {size_a} and {pair['B']} {size_b} fit neither "
                f"gate_up_proj ({hidden} to {2 * inter}) nor down_proj ({inter} to {hidden}) of "
                f"{self.model_args.num_experts} experts, in the order of any peft: the adapter was "
                "made for a model of other sizes"
            )
        if size_a[0] != size_b[-1] or size_a[0] % self.model_args.num_experts or not size_a[0]:
            raise ValueError(
                f"{self.path}: tensor {pair['A']} has shape {size_a} and {pair['B']} {size_b}: "
                f"one rank for each of {self.model_args.num_experts} experts is expected in both"
            )
        return found

    def _in_old_order(self) -> bool:
        """Whether the fused tensors are in the order that peft had before 0.19.1."""
        orders = {True, False}
        for pair in self._fused.values():
            orders &= {is_old for is_old, _ in self._fits(pair)}
        if len(orders) == 1:
            return orders.pop()
        if not orders:
            raise ValueError(
                f"{self.path}: LoRA on the fused experts is in two orders (peft before and from "
                "0.19.1 on); save the adapter with one version of peft"
            )
        version = str(self.config.get("peft_version") or "")
        match = re.match(r"(\d+)\.(\d+)\.(\d+)(.*)", version)
        numbers = tuple(int(part) for part in match.groups()[:3]) if match else ()
        if not match or numbers == _FIRST_IN_NEW_ORDER and match[4]:
            raise ValueError(
                f"{self.path}: LoRA on the fused experts has sizes that fit two orders (peft "
                f"turned them round in 0.19.1), and {CONFIG} does not tell which: peft_version is "
                f"{version or 'missing'}; write the version there that the adapter was made with"
            )
        return numbers < _FIRST_IN_NEW_ORDER

    def _add_fused(self, layer: str, pair: dict[str, str], is_old: bool) -> None:
        """LoRA of all experts on gate_up_proj or on down_proj."""
        inter = self.model_args.moe_intermediate_size
        parameter = next(of for old, of in self._fits(pair) if old == is_old)
        parts = {"down_proj": slice(None)}
        if parameter == "gate_up_proj":
            parts = {"gate_proj": slice(0, inter), "up_proj": slice(inter, 2 * inter)}
        alpha = self._alpha(f"{layer}.mlp.experts.{parameter}", self.names.layer_spellings)
        experts = f"{self.model_args.family.adapter_layers}{layer}.mlp.experts."
        for expert in range(self.model_args.num_experts):
            for projection, rows in parts.items():
                for side, other in ("AB", "BA"):
                    stored = pair[other if is_old else side]
                    name = f"{experts}{expert}.{projection}.lora_{side}.weight"
                    self.found.decoder[name] = Source(stored, alpha, expert, rows, is_old)


def setting_of(
    path: Path,
    config: dict[str, Any],
    name: str,
    module: str,
    spellings: Iterable[str],
    default: float,
) -> float:
    """What the patterns `name` of adapter_config.json say of `module`. Raises ValueError for a
    pattern that is no regular expression.
    """
    try:
        return pattern_value(config.get(name) or {}, module, spellings, default)
    except ValueError as error:
        raise ValueError(f"{path.parent / CONFIG}: {name} {error}") from None
