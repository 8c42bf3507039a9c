"""A PEFT adapter folder, opened.

It may hold what PEFT writes for this model under transformers 4 (a linear for every expert) or 5
(experts fused into stacked parameters, whose LoRA has E ranks side by side), under any of the
family's roots.
"""

from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_gkd.links import check_link
from megatron_gkd.lora.adapter import adapter_tensors
from megatron_gkd.lora.peft_config import CONFIG, TENSORS, read_config
from megatron_gkd.lora.peft_names import layer_and_linear, peft_names, unwrapped
from megatron_gkd.lora.peft_sources import Finder, Source, setting_of
from megatron_gkd.lora_settings import scale_divisor
from megatron_gkd.lora_targets import ATTENTION, HEAD, LINEARS, ROUTER, join_targets, targets_in
from megatron_gkd.model.args import ModelArgs


class PeftAdapter:
    """An opened adapter folder. `rank`, `alpha` (of alpha / rank), `targets` (of the decoder) and
    `towers` (linears of the towers, by name) describe it. `merge_only` are linears whose LoRA can
    be added to their weights and not be trained, `outside` tensors of LoRA on the family's other
    models; `tensor(name)` gives one matrix and its scale.
    """

    def __init__(self, folder: str | Path, model_args: ModelArgs):
        """Raises FileNotFoundError, or ValueError naming the setting or tensor that plain LoRA on
        this model cannot represent.
        """
        self.folder, self.model_args = Path(folder), model_args
        self._family, self._names = model_args.family, peft_names(model_args.family)
        for name in (CONFIG, TENSORS):
            check_link(self.folder / name)
            if not (self.folder / name).is_file():
                raise FileNotFoundError(
                    f"{self.folder}: no {name}; expected a PEFT adapter folder"
                    f"{_what_else_it_is(self.folder)}"
                )
        self.config = read_config(self.folder)
        self.use_rslora = bool(self.config.get("use_rslora"))
        self.path = self.folder / TENSORS
        try:
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.path}: not a complete safetensors file ({error})") from error
        # The experts' parts of a fused tensor are asked for one after the other.
        self._stored = lru_cache(maxsize=4)(self._read)
        sizes = {
            name: self._size(name) for name in self._file.keys() if self._changes_something(name)
        }
        self._check_contents(sizes)
        found = Finder(self.path, sizes, self.config, model_args).find()
        self.outside, self._base_copies = found.outside, found.base_copies
        self._decoder = found.decoder
        if not found.decoder and not found.merge_only and not found.towers:
            raise ValueError(
                f"{self.path}: no LoRA on {self._family.trained_part}'s decoder linears"
            )
        self._check_tensors()
        self.towers = self._check_pairs(found.towers)
        self.merge_only = self._check_pairs(found.merge_only)
        self._sources: dict[str, Source] = found.decoder | found.towers | found.merge_only
        self.targets = self._used_targets()
        if not self.targets and not self.merge_only and not self.towers:
            raise ValueError(
                f"{self.path}: every tensor is zero, so that the adapter does nothing and cannot "
                "be trained further"
            )
        self._check_ranks()
        downs = [name for name in self._sources if ".lora_A." in name and name in self]
        trained = [name for name in downs if name not in found.merge_only] or downs
        self.rank = max(self._rank(name) for name in trained)
        self.stated_alpha = self._sources[trained[0]].alpha * (
            scale_divisor(self.rank, self.use_rslora) / self._divisor(trained[0])
        )
        self.alpha = self.stated_alpha * (self.rank / scale_divisor(self.rank, self.use_rslora))

    def __contains__(self, name: str) -> bool:
        """Whether the adapter has tensor `name`, spelled as in `adapter_tensors` and
        `tower_tensors`.
        """
        if name not in self._sources or name not in self._decoder:
            return name in self._sources
        layer, linear = layer_and_linear(name, self._family)
        return linear in (targets_in(self.targets, int(layer)) if layer else self.targets)

    def _changes_something(self, name: str) -> bool:
        """False for LoRA beside the decoder's linears that was never trained (its second matrix is
        zero): PEFT puts it on linears of the same names in the towers and the other models.
        """
        bare = unwrapped(name)
        if any(of.fullmatch(bare) for of in (self._names.linear, self._names.head)):
            return True
        starts_at_zero = name.replace(".lora_A.", ".lora_B.").replace(
            ".lora_embedding_B", ".lora_embedding_A"
        )
        is_second = ".lora_B." in starts_at_zero or ".lora_embedding_A" in starts_at_zero
        if not is_second or self._names.fused.fullmatch(bare):
            return True
        return starts_at_zero not in self._file.keys() or bool(
            self._file.get_tensor(starts_at_zero).any()
        )

    def _check_contents(self, sizes: dict[str, list[int]]) -> None:
        """Floating-point numbers, and some of them in every tensor."""
        for name, size in sizes.items():
            dtype = self._file.get_slice(name).get_dtype()
            if "F" not in dtype:
                raise ValueError(
                    f"{self.path}: tensor {name} is {dtype}, which is no floating-point type: LoRA "
                    "that was quantised is not read"
                )
            if 0 in size:
                raise ValueError(
                    f"{self.path}: tensor {name} is empty, {size}; DeepSpeed's ZeRO-3 leaves "
                    "such files where weights were not gathered before they were saved"
                )

    def _check_tensors(self) -> None:
        """A layer has both matrices of a target or neither, of all experts or of none; of the
        model's sizes and one rank.
        """
        present = {layer_and_linear(name, self._family) for name in self._decoder}
        num_layers = self.model_args.num_layers
        carriers = {(int(layer), linear) for layer, linear in present if layer}
        head = ("", HEAD) in present
        expected = adapter_tensors(self.model_args, 1, join_targets(carriers, num_layers, head))
        missing = [name for name in expected if name not in self._decoder]
        if missing:
            raise ValueError(
                f"{self.path}: misses tensor {missing[0]} and {len(missing) - 1} more of LoRA on "
                f"{', '.join(sorted({linear for _, linear in present}))}"
            )
        extra = [source.stored for name, source in self._decoder.items() if name not in expected]
        if extra:
            raise ValueError(
                f"{self.path}: tensor {extra[0]} and {len(extra) - 1} more are of layers or "
                "experts that the model does not have"
            )
        for name, (num_outputs, num_inputs) in expected.items():
            source = self._decoder[name]
            if source.expert is not None:
                continue  # looked at where it was found
            size, size_a = (
                self._size(source.stored),
                self._size(self._decoder[name.replace(".lora_B.", ".lora_A.")].stored),
            )
            wanted = [size_a[0], num_inputs] if ".lora_A." in name else [num_outputs, size_a[0]]
            if size != wanted:
                raise ValueError(
                    f"{self.path}: tensor {source.stored} has shape {size}, rank and the model's "
                    f"config.json ask for {wanted}"
                )
        self._check_layers(carriers)

    def _check_layers(self, carriers: set[tuple[int, str]]) -> None:
        """Attention of a layer that layers_to_transform leaves out would be no LoRA to PEFT; that
        of experts it loads in all layers.
        """
        layers = self.config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        lost = [
            (layer, name)
            for layer, name in sorted(carriers)
            if layers and layer not in layers and name in ATTENTION
        ]
        if lost:
            raise ValueError(
                f"{self.path}: has LoRA on {lost[0][1]} of layer {lost[0][0]}, and {CONFIG} says "
                f"layers_to_transform {layers}: PEFT would leave it out; correct one of them"
            )

    def _check_ranks(self) -> None:
        """The tensors of attention have the ranks that the configuration states (those of experts
        PEFT multiplies when it fuses them).
        """
        for name in self._decoder:
            linear = name.removeprefix(self._family.adapter_layers).removesuffix(".lora_A.weight")
            if ".lora_A." in name and ".self_attn." in name and "r" in self.config and name in self:
                rank, spellings = self._rank(name), self._names.layer_spellings
                stated = setting_of(
                    self.path, self.config, "rank_pattern", linear, spellings, self.config["r"]
                )
                if rank != stated:
                    raise ValueError(
                        f"{self.path}: {self._sources[name].stored} has rank {rank}, and {CONFIG} "
                        f"says {stated:g} (r, rank_pattern): the scale alpha / r would not be the "
                        "one that it was trained with"
                    )

    def _check_pairs(self, sources: dict[str, Source]) -> list[str]:
        """The linears of `sources`; both matrices of each must be there, of one rank. Their sizes
        are the module's to check.
        """
        root = self._family.adapter_root
        linears = sorted({name[len(root) :].rsplit(".", 2)[0] for name in sources})
        for linear in linears:
            down, up = (f"{root}{linear}.lora_{side}.weight" for side in "AB")
            for name in (down, up):
                if name not in sources:
                    raise ValueError(f"{self.path}: misses tensor {name}")
            sizes = {side: self._size(sources[name].stored) for side, name in zip("AB", (down, up))}
            (size_a, size_b), transposed = sizes.values(), sources[down].transposed
            ranks = (size_a[1], size_b[0]) if transposed else (size_a[0], size_b[1])
            # of a convolution lora_A has the kernel's size, lora_B 1
            matrices = len(size_a) == len(size_b) >= 2 and all(n == 1 for n in size_b[2:])
            if not matrices or ranks[0] != ranks[1] or not ranks[0]:
                raise ValueError(
                    f"{self.path}: lora_A {size_a} and lora_B {size_b} of {linear} are not of one "
                    "rank"
                )
        return linears

    def _used_targets(self) -> list[str]:
        """Without the linears that have no LoRA and were written as zeros (peft_writer.py)."""
        used: set[tuple[str, str]] = set()
        for name, source in self._decoder.items():
            of = layer_and_linear(name, self._family)
            if of not in used and self._is_any(source.stored):
                used.add(of)
        carriers = {(int(layer), linear) for layer, linear in used if layer}
        return join_targets(carriers, self.model_args.num_layers, ("", HEAD) in used)

    def _is_any(self, stored: str) -> bool:
        """Whether a number of a stored tensor is not zero; mostly its first row tells."""
        return bool(self._file.get_slice(stored)[:1].any()) or bool(self._stored(stored).any())

    def _read(self, stored: str) -> Tensor:
        """A tensor of the file in fp32. Raises ValueError where it is not finite."""
        values = self._file.get_tensor(stored).float()
        if not values.isfinite().all():
            raise ValueError(f"{self.path}: tensor {stored} has numbers that are NaN or Inf")
        return values

    def _size(self, stored: str) -> list[int]:
        return self._file.get_slice(stored).get_shape()

    def _rank(self, name: str) -> int:
        """Rank of the linear that tensor `name` belongs to."""
        source = self._sources[name.replace(".lora_B.", ".lora_A.")]
        return self._size(source.stored)[1 if source.transposed else 0] // (
            1 if source.expert is None else self.model_args.num_experts
        )

    def _divisor(self, name: str) -> float:
        return scale_divisor(self._rank(name), self.use_rslora)

    def tensor(self, name: str) -> tuple[Tensor, float]:
        """One matrix (lora_A [r', d_in] or lora_B [d_out, r']; of a convolution with the kernel's
        dimensions behind) in fp32, and the scale its product is multiplied by.
        """
        source = self._sources[name]
        side = "A" if ".lora_A." in name else "B"
        values = source.part(self._stored(source.stored), side, self.model_args.num_experts)
        return values, source.alpha / self._divisor(name)

    @property
    def is_trained(self) -> bool:
        """Whether the update W_up W_down of some linear is not zero: one of the two starts so."""
        ups = [name for name in self._sources if ".lora_B." in name]
        return any(
            self._is_any(self._sources[up].stored)
            and self._is_any(self._sources[up.replace(".lora_B.", ".lora_A.")].stored)
            for up in ups
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
        return any(source.rows not in (None, slice(None)) for source in self._decoder.values())

    @property
    def in_old_order(self) -> bool:
        """Whether its fused experts' LoRA is as peft before 0.19.1 wrote it."""
        return any(source.transposed for source in self._decoder.values())

    @property
    def is_scaled_up_when_fused(self) -> bool:
        """Whether PEFT under transformers 5 would multiply its update of gate and up by sqrt(2):
        rsLoRA on each expert, of which the fused rank is twice r, without the pattern that corrects
        it (peft_config.py).
        """
        corrected = "gate_up_proj" in (self.config.get("alpha_pattern") or {})
        alone = any(
            ".gate_proj." in name and source.expert is None and name in self
            for name, source in self._decoder.items()
        )
        return self.use_rslora and alone and not corrected

    @property
    def is_as_peft_writes_it(self) -> bool:
        """Whether the installed PEFT reads it as it is meant: a regular expression in
        target_modules is about the model that it was made on.
        """
        endings = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
        names = [source.stored for source in self._sources.values()]
        named = all(n.startswith("base_model.model.") and n.endswith(endings) for n in names)
        listed = not isinstance(self.config.get("target_modules"), str)
        return named and listed and not self.in_old_order and not self.is_scaled_up_when_fused

    def check_base(self, name: str, rows: slice, base: Tensor) -> None:
        """Raise ValueError if the adapter brings `name` ("lm_head", "embed_tokens") along and its
        `rows` are not `base`.
        """
        stored = self._base_copies.get(name)
        if stored is None:
            return
        copy = self._file.get_slice(stored)[rows]
        if copy.shape != base.shape:
            raise ValueError(
                f"{self.path}: {stored} has shape {self._size(stored)}, and {name} of this model "
                f"other rows or columns: the adapter was trained on another base"
            )
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


def _what_else_it_is(folder: Path) -> str:
    """The way out where `folder` is no adapter folder, for the end of a message."""
    if (folder / "adapter_model.bin").is_file():
        return "; adapter_model.bin is a pickle and is not read"
    if folder.is_file():
        return f"; this is a file: give {folder.parent}"
    if not folder.is_dir():
        return " on this machine (nothing is downloaded)"
    inside = [path for path in folder.glob("checkpoint-*") if (path / CONFIG).is_file()]
    return f"; {max(inside, key=_step)} is one" if inside else ""


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else -1


def merge_only_message(adapter: PeftAdapter, linears: list[str], may_be_merged: bool = True) -> str:
    """Why an adapter with LoRA on `linears` cannot be used beside the base, and the way out."""
    kinds = {
        f".{ROUTER}": "the router (mlp.gate)",
        ".embed_tokens": "the embedding (embed_tokens)",
    }
    found = [what for end, what in kinds.items() if any(f".{n}".endswith(end) for n in linears)]
    others = [n for n in linears if not any(f".{n}".endswith(end) for end in kinds)]
    found += [f"the towers' ends ({others[0]})"] if others else []
    merge = (
        "merge the adapter into the model (python -m checkpoint_tools.merge_lora --hf_model DIR "
        f"--adapter {adapter.folder} --output MERGED) and use MERGED as the model, or "
    )
    return (
        f"{adapter.path}: LoRA on {' and '.join(found)} cannot be used beside the base here: "
        f"{merge if may_be_merged else ''}train the adapter again with --target_modules "
        f"{' '.join(LINEARS)}"
    )
