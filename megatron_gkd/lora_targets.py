"""Which linears carry LoRA.

A target is a linear of every decoder layer (`q_proj`), of one layer (`3.q_proj`), or the `lm_head`.
A list of them is in a fixed order and says the same thing in one way only, so that two may be
compared. Imports nothing slow.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache

from megatron_gkd.families import Family
from megatron_gkd.model.args import ModelArgs

# The linears that can carry LoRA, as Hugging Face and PEFT name them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + EXPERTS
HEAD = "lm_head"
ROUTER = "mlp.gate"

_ALL = ("all", "all-linear", "all_linear")


def join_targets(carriers: Collection[tuple[int, str]], num_layers: int, head: bool) -> list[str]:
    """Targets of the (layer, name) pairs `carriers`, and of the lm_head where `head` says so."""
    targets = []
    for name in LINEARS:
        layers = [layer for layer in range(num_layers) if (layer, name) in carriers]
        everywhere = len(layers) == num_layers
        targets += [name] if everywhere else [f"{layer}.{name}" for layer in layers]
    return targets + ([HEAD] if head else [])


def names_of(targets: Iterable[str]) -> list[str]:
    """The names alone, each once: q_proj of `3.q_proj`."""
    names = {target.rpartition(".")[2] for target in targets}
    return [name for name in (*LINEARS, HEAD) if name in names]


def targets_in(targets: Collection[str], layer: int) -> list[str]:
    """The names of the linears of decoder layer `layer` that carry LoRA."""
    return [name for name in LINEARS if name in targets or f"{layer}.{name}" in targets]


@lru_cache
def linears_of_layers(targets: tuple[str, ...], num_layers: int) -> tuple[tuple[str, ...], ...]:
    """`targets_in` of each decoder layer."""
    return tuple(tuple(targets_in(targets, layer)) for layer in range(num_layers))


def layers_of(targets: Collection[str], name: str) -> list[int] | None:
    """The decoder layers whose linear `name` carries LoRA; None for all (and for the lm_head)."""
    if name in targets:
        return None
    return [int(target.partition(".")[0]) for target in targets if target.endswith(f".{name}")]


def missing_targets(wanted: Collection[str], targets: Collection[str], num_layers: int) -> list:
    """What `wanted` has and `targets` has not, as targets."""
    lost = {
        (layer, name)
        for layer in range(num_layers)
        for name in targets_in(wanted, layer)
        if name not in targets_in(targets, layer)
    }
    return join_targets(lost, num_layers, HEAD in wanted and HEAD not in targets)


def describe_targets(targets: Sequence[str]) -> str:
    """For a line on the screen: `q_proj, v_proj (layers 0-11, 24), lm_head`."""
    words = []
    for name in names_of(targets):
        layers = layers_of(targets, name)
        words.append(name + (f" (layers {ranges(layers)})" if layers else ""))
    return ", ".join(words)


def ranges(numbers: Sequence[int]) -> str:
    """`0-11, 24` of sorted numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def is_expression(words: Sequence[str]) -> bool:
    """Whether --lora_target_modules is a regular expression: not a list of names or of ends of
    paths.
    """
    return len(words) == 1 and re.fullmatch(r"[\w.,\s-]*", words[0]) is None


def parse_layers(words: Sequence[str], num_layers: int | None = None) -> list[int]:
    """--lora_layers: `0-11,24`, or `last 4`, which needs `num_layers`. Raises ValueError for other
    words, or layers that the model does not have.
    """
    text = " ".join(words).replace(",", " ")
    if last := re.fullmatch(r"last[ :=]?(\d+)", text.strip()):
        number = int(last[1])
        if not number or num_layers and number > num_layers:
            raise ValueError(
                f"--lora_layers {text}: must be 1 or more of the model's "
                f"{num_layers or 'decoder'} layers"
            )
        return list(range(num_layers - number, num_layers)) if num_layers else []
    found: set[int] = set()
    for part in text.split():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, end = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > end:
            raise ValueError(
                f"--lora_layers {text}: {part!r} is no layer; give numbers and ranges from 0 on "
                "(0-11,24) or the last N (last 4)"
            )
        if num_layers and end >= num_layers:
            raise ValueError(
                f"--lora_layers {text}: layer {end}, and the model has {num_layers} "
                f"(0 to {num_layers - 1})"
            )
        found |= set(range(first, end + 1))
    if words and not found:
        raise ValueError(f"--lora_layers {text!r}: names no layer; leave it out for all")
    return sorted(found)


def resolve_targets(
    words: Sequence[str], model_args: ModelArgs, layers: Sequence[int] | None = None
) -> list[str]:
    """The words of --lora_target_modules -> targets, of `layers` alone where they are given.

    `ALL` and `all-linear` are every linear of the decoder's layers; lm_head is not one of them and
    has to be named. A word is a linear or the end of its path, as in PEFT; one that is no such
    list is a regular expression, which a whole path must match. Raises ValueError naming what the
    model does not have or what cannot carry LoRA.
    """
    flag, num_layers = f"--lora_target_modules {','.join(words)}", model_args.num_layers
    if any(word.lower() in _ALL for word in words):
        carriers, head = {(n, name) for n in range(num_layers) for name in LINEARS}, False
    elif is_expression(words):
        carriers, head = _matching(re.compile(words[0]), flag, model_args)
    else:
        carriers, head = _named(words, flag, model_args)
    if layers is not None:
        carriers = {(layer, name) for layer, name in carriers if layer in layers}
    return join_targets(carriers, num_layers, head)


def _named(
    words: Sequence[str], flag: str, model_args: ModelArgs
) -> tuple[set[tuple[int, str]], bool]:
    """The carriers that a list names, and whether it names the lm_head."""
    carriers: set[tuple[int, str]] = set()
    unknown = [] if words else ["(nothing)"]
    for word in words:
        layer, _, name = word.rpartition(".")
        if name in LINEARS and (not layer or layer.isdecimal()):
            of_layers = {int(layer)} if layer else set(range(model_args.num_layers))
            found = {(number, name) for number in of_layers & set(range(model_args.num_layers))}
        elif word == HEAD:
            continue
        else:
            expression = re.compile(rf"(?:.*\.)?{re.escape(word)}")
            found = _matching(expression, flag, model_args)[0] if layer else set()
        unknown += [] if found else [word]
        carriers |= found
    if unknown:
        raise ValueError(
            f"{flag}: {unknown[0]} is no linear of the decoder; choose ALL, or some of "
            f"{', '.join((*LINEARS, HEAD))}, or a regular expression over paths such as "
            f"{_example(model_args)}"
        )
    return carriers, HEAD in words


def _matching(
    expression: re.Pattern[str], flag: str, model_args: ModelArgs
) -> tuple[set[tuple[int, str]], bool]:
    """The carriers whose path `expression` matches, and whether it matches the lm_head."""
    family = model_args.family
    matches = lambda path: any(
        expression.fullmatch(before + path) for before in before_layers(family)
    )
    carriers: set[tuple[int, str]] = set()
    for layer in range(model_args.num_layers):
        if matches(f"{layer}.{ROUTER}"):
            raise ValueError(
                f"{flag}: matches {family.inner_roots[0]}layers.{layer}.{ROUTER}, the router, "
                "which cannot carry LoRA here; leave it out"
            )
        carriers |= {(layer, n) for n in ATTENTION if matches(f"{layer}.self_attn.{n}")}
        for name in EXPERTS:
            experts = range(model_args.num_experts)
            found = [n for n in experts if matches(f"{layer}.mlp.experts.{n}.{name}")]
            if 0 < len(found) < len(experts):
                lost = min(set(experts) - set(found))
                raise ValueError(
                    f"{flag}: matches {name} of expert {found[0]} in layer {layer} and not of "
                    f"expert {lost}; the experts of a layer carry LoRA together"
                )
            carriers |= {(layer, name)} if found else set()
    head = any(expression.fullmatch(root + HEAD) for root in family.adapter_roots)
    ends = [path for path in tower_paths(model_args, ends=True) if expression.fullmatch(path)]
    if ends:
        raise ValueError(
            f"{flag}: matches {ends[0]}, which cannot carry LoRA here (of the towers attention and "
            "MLP can, with --lora_towers); leave it out"
        )
    if not carriers and not head:
        raise ValueError(
            f"{flag}: matches no linear of the decoder; the expression must match a whole path, "
            f"such as {_example(model_args)} or {before_layers(family)[0]}0.mlp.experts.0.up_proj"
        )
    return carriers, head


def before_layers(family: Family) -> tuple[str, ...]:
    """What may stand before `3.self_attn.q_proj`: transformers' versions, the whole model or the
    part that is trained.
    """
    return tuple(f"{o}{i}layers." for o in family.adapter_roots for i in family.inner_roots)


def _example(model_args: ModelArgs) -> str:
    return f"{before_layers(model_args.family)[0]}0.self_attn.q_proj"


def tower_paths(model_args: ModelArgs, *, ends: bool) -> Iterator[str]:
    """Paths of the towers' linears, of some layer each: those that --lora_towers wraps, or (`ends`)
    the others.
    """
    family = model_args.family
    for outer in family.adapter_roots:
        for inner in ("", *family.inner_roots):
            for tower in family.towers:
                within = f"{outer}{inner}{tower.name}."
                for name in tower.ends if ends else tower.lora_linears:
                    yield within + name if ends else f"{within}{tower.layers}.0.{name}"
