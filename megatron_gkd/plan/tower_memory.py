"""What the towers hold of the media of a micro-batch, on the first stage: in a forward at its
highest, for their backward where they carry LoRA, and as features. From the shapes of
transformers' audio and vision encoders and of media/towers.py.

Frozen towers encode a step's media at its start, once for all passes, and the features stay until
its end. With LoRA they encode in every pass, on every rank all media of the micro-batch, and
autograd saves of a layer:

    attention   its input [P, D], the norm's output [P, D], queries, keys and values (of a patch
                also before they are rotated), the context as each window or frame gave it and
                joined, a number a head in fp32
    MLP         its input [P, D], the norm's output [P, D], [P, I] before and after the activation
    both        LoRA's low numbers [P, r] of each linear, two numbers of each norm in fp32

The decoder's --recompute leaves them alone. Legend: P positions (tokens of sound, patches of images
and video), D a layer's width, I of its MLP, H of the decoder, b bytes of a number.

Ranks share the media of frozen towers by whole images, frames and windows of sound
(media/chunks.py). How large one of them is no flag tells, so each rank counts with all of them. A
sound counts with the blocks of frames that its tokens fill. Buffers of cuDNN's convolutions are not
counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from megatron_gkd.plan.shapes import Device
from megatron_gkd.plan.towers import AudioTower, Tower, VisualTower, halved
from megatron_gkd.plan.workload import Workload


@dataclass(frozen=True)
class MediaShapes:
    """Of the media of one micro-batch."""

    tokens: int
    number_bytes: int
    device: Device = "cuda"
    lora_rank: int = 0
    """Of LoRA on the towers; 0 where they are frozen"""
    drops: bool = True
    """Whether LoRA has dropout, which keeps W_down as it is, in fp32"""


@dataclass(frozen=True)
class TowerBytes:
    """Of the media of one micro-batch."""

    forward: int = 0
    """Without gradients, at its highest"""
    kept: int = 0
    """By autograd, from the forward to the backward; 0 without LoRA"""
    forward_with_lora: int = 0
    """At its highest, with what is kept"""
    backward: int = 0
    """Beside what is kept"""


@dataclass(frozen=True)
class MediaBytes:
    """What a step holds of its media on the first stage."""

    towers: TowerBytes = TowerBytes()
    """Of a micro-batch; the forward of frozen ones beside the features that stay"""
    of_step: int = 0
    """Features that stay for the whole step: of frozen towers"""
    of_pass: int = 0
    """Features of a micro-batch while a pass reads them: of towers with LoRA"""
    deepstack: int = 0
    """Of a micro-batch on a tensor-parallel rank, an input of the first decoder layers"""


def media_bytes(load: Workload, shard: int, device: Device = "cuda") -> MediaBytes:
    """shard: tokens of the micro-batch on a tensor-parallel rank."""
    if not load.towers:
        return MediaBytes()
    tokens, towers = media_tokens(load, load.micro_batch_tokens), tower_bytes(load, device)
    features, deepstack = feature_bytes(load, tokens), deepstack_bytes(load, min(tokens, shard))
    if load.lora_towers:
        return MediaBytes(towers, of_pass=features, deepstack=deepstack)
    of_step = feature_bytes(load, media_tokens(load, load.rows * load.row_tokens))
    beside = replace(towers, forward=max(towers.forward - features, 0))
    return MediaBytes(beside, of_step=max(of_step, features), deepstack=deepstack)


def tower_bytes(load: Workload, device: Device = "cuda") -> TowerBytes:
    """The most that any mixture of kinds needs: tokens of the costlier kind alone."""
    shapes = MediaShapes(
        tokens=media_tokens(load, load.micro_batch_tokens),
        number_bytes=load.number_bytes,
        device=device,
        lora_rank=load.lora_rank if load.lora_towers else 0,
        drops=load.lora_dropout > 0,
    )
    found = [of_tower(tower, shapes) for tower in load.towers] if shapes.tokens else []

    def most(of: Callable[[TowerBytes], int]) -> int:
        return max(map(of, found), default=0)

    return TowerBytes(
        forward=most(lambda each: each.forward),
        kept=most(lambda each: each.kept),
        forward_with_lora=most(lambda each: each.forward_with_lora),
        backward=most(lambda each: each.backward),
    )


def of_tower(tower: Tower, shapes: MediaShapes) -> TowerBytes:
    """With all tokens from this tower."""
    if isinstance(tower, AudioTower):
        return _of_audio(tower, shapes)
    return _of_visual(tower, shapes)


def media_tokens(load: Workload, tokens: int) -> int:
    """In rows of so many tokens together, at most."""
    return ceil(load.media_share * tokens)


def feature_bytes(load: Workload, tokens: int) -> int:
    """[n, H] of so many tokens of media; of images and videos also deepstack's planes [_, n, H], a
    view of a tensor with one more.
    """
    planes = [1 if isinstance(tower, AudioTower) else 2 + tower.deepstack for tower in load.towers]
    return max(planes, default=0) * _plane(load, tokens)


def deepstack_bytes(load: Workload, tokens: int) -> int:
    """Of these the latter, of so many tokens on a tensor-parallel rank."""
    return max((_deepstack(tower) for tower in load.towers), default=0) * _plane(load, tokens)


def tower_lora_parameters(load: Workload) -> int:
    """Whole on every rank of the first stage."""
    return load.lora_rank * load.lora_towers * sum(tower.lora_numbers for tower in load.towers)


def _deepstack(tower: Tower) -> int:
    return tower.deepstack if isinstance(tower, VisualTower) else 0


def _plane(load: Workload, tokens: int) -> int:
    return tokens * load.towers[0].output * load.number_bytes if load.towers else 0


def _lora_kept(tower: Tower, shapes: MediaShapes, positions: int, linears: int) -> int:
    """Of a layer's LoRA: low numbers, and without dropout W_downs in the base's type."""
    rank, b = shapes.lora_rank, shapes.number_bytes
    cast = 0 if shapes.drops or b == 4 else rank * tower.lora_numbers // tower.layers // 2
    return (linears * rank * positions + cast) * b


def _of_audio(of: AudioTower, shapes: MediaShapes) -> TowerBytes:
    tokens, b, width = shapes.tokens, shapes.number_bytes, of.width
    of_block = halved(of.block_frames, 3)  # tokens
    blocks = ceil(tokens / of_block)
    numbers = blocks * of.block_frames * of.bins
    # float32 on a GPU, joined, in blocks, and those in the tower's type
    given = numbers * 4 * (2 if shapes.device == "cuda" else 1)
    sound = given + numbers * b
    at_once = min(blocks, of.blocks_at_once)
    convolution = 2 * at_once * of.channels * halved(of.bins, 1) * halved(of.block_frames, 1) * b
    convolved = of.channels * halved(of.bins, 3) * of_block * b
    embedded = blocks * of_block * width * b
    held = sound + blocks * convolved + embedded
    layer = tokens * b * max(8 * width, 2 * width + 2 * of.inner)
    features = tokens * of.output * b
    forward = max(
        given + numbers * (4 if b == 4 else 4 + b),
        sound + convolution + (blocks - at_once) * convolved,
        sound + 3 * blocks * convolved + embedded,
        held + layer,
        3 * features,
    )
    if not shapes.lora_rank:
        return TowerBytes(forward)
    saved = tokens * ((9 * width + 2 * of.inner) * b + 16 + 4 * of.heads)
    saved += _lora_kept(of, shapes, tokens, linears=6)
    kept = of.layers * saved + tokens * (width * b + 8)
    with_lora = max(
        forward,
        (of.layers - 1) * saved + held + layer,
        kept + held + features + tokens * width * b,
        kept + 3 * features,
    )
    return TowerBytes(forward, kept, with_lora, backward=tokens * 2 * of.inner * b)


def _of_visual(of: VisualTower, shapes: MediaShapes) -> TowerBytes:
    patches, b, width = shapes.tokens * of.merged, shapes.number_bytes, of.width
    # float32 on a GPU, and joined
    pixels = patches * of.patch * 4 * (2 if shapes.device == "cuda" else 1)
    rotations = patches * 2 * width // of.heads * 4
    # places in float32, and of what they are interpolated
    held = pixels + patches * (4 * width + 64)
    plane = shapes.tokens * of.output * b
    features = (1 + of.deepstack) * plane
    # queries and keys are rotated in float32
    rotary = 9 * width * b if b == 4 else 5 * width * b + 24 * width
    block = patches * max(rotary, 10 * width * b, (3 * width + 2 * of.inner) * b)
    in_blocks = held + rotations + block + of.deepstack * plane
    forward = max(
        pixels + patches * (0 if b == 4 else of.patch * b) + patches * width * b,
        pixels + patches * (5 * width * b + 16 * width + 48),
        in_blocks,
        3 * features + plane,
    )
    if not shapes.lora_rank:
        return TowerBytes(forward)
    saved = patches * ((11 * width + 2 * of.inner) * b + 16 + 4 * of.heads)
    saved += _lora_kept(of, shapes, patches, linears=4)
    mergers = (1 + of.deepstack) * patches * width * b + 8 * patches
    kept = of.layers * saved + mergers + rotations
    with_lora = max(
        forward,
        (of.layers - 1) * saved + in_blocks,
        kept + held + features + patches * width * b,
        kept + 3 * features + plane,
    )
    backward = patches * (2 * of.inner + width) * b
    return TowerBytes(forward, kept, with_lora, backward)
