"""LoRA against peft at every parallel layout, and the toggle.

Ranks are gloo processes (tests/ranks.py); peft on transformers runs in this process.
"""

from statistics import median
from types import SimpleNamespace

import pytest
import torch

from megatron_gkd import parallel
from megatron_gkd.lora import as_student, as_teacher
from megatron_gkd.lora.adapter import adapter_slices
from megatron_gkd.lora.apply import count_parameters
from megatron_gkd.lora.load import load_teacher
from megatron_gkd.lora.modules import LoraLinear
from megatron_gkd.lora.peft_config import peft_config
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora.slots import STUDENT, TEACHER, activate, lora_modules
from megatron_gkd.model.args import read_model_args
from megatron_gkd.verify.reference import decoder
from tests.adapters import (
    ALL,
    ATTENTION,
    EXPERTS,
    linear_sizes,
    load_peft,
    load_text_model,
    load_thinker,
    make_batches,
    peft_gradients,
    random_adapter,
    with_zero_experts,
    write_adapter,
)
from tests.lora_runs import (
    FOLDERS,
    VOCAB_SIZE,
    add_lora,
    build,
    in_reducer,
    initialize,
    make_optimizer,
    run_schedule,
    share,
)
from tests.ranks import run_ranks

CASES = {  # folder, targets, rank, alpha
    "all, rank 4": ("4 KV heads", ALL, 4, 8),
    "all, rank 3": ("2 KV heads, odd sizes", ALL, 3, 5),
    "o, rank 16": ("4 KV heads", ["o_proj"], 16, 8),
    "k and experts, rank 1": ("2 KV heads, odd sizes", ["k_proj", *EXPERTS], 1, 2),
    "gate and up, rank 3": ("4 KV heads", ["gate_proj", "up_proj"], 3, 4),
    "down, rank 16": ("4 KV heads", ["down_proj"], 16, 32),
    "all and lm_head, rank 3": ("2 KV heads, odd sizes", [*ALL, "lm_head"], 3, 5),
    "text, all and lm_head, rank 2": ("text", [*ALL, "lm_head"], 2, 6),
    "layer 1 alone, rank 4": ("4 KV heads", [f"1.{name}" for name in ALL], 4, 8),
    "by layer, rsLoRA, rank 3": (
        "2 KV heads, odd sizes",
        ["0.q_proj", "0.gate_proj", "1.o_proj", "1.down_proj", "lm_head"],
        3,
        2,
    ),
}
DROPOUT = 0.3


def gradients_of(model, model_args, place):
    """(tensor name, slice of it, gradient) of every LoRA parameter on this rank, copies of
    replicated ones included.
    """
    return [
        (piece.stored.name, piece.stored.index, piece.parameter.main_grad[piece.where].clone())
        for piece in adapter_slices(model, model_args, place)
    ]


def lora_at_layout(rank, world_size, tp, pp, ep, runs):
    """For each (folder, adapter, options): logits, gradients, gradient norm, and whether LoRA off
    equals the base bit for bit.
    """
    place = initialize(tp, pp, ep)
    batches = share(make_batches(VOCAB_SIZE), place)
    results = []
    for folder, adapter, options in runs:
        model_args, model = build(place, folder, **options)
        base = run_schedule(place, in_reducer(model), batches, backward=False)
        add_lora(place, model_args, model, adapter)
        ddp = in_reducer(model)
        optimizer = make_optimizer(ddp, place)
        optimizer.zero_grad()
        logits = run_schedule(place, ddp, batches)
        gradients = gradients_of(model, model_args, place)
        update = optimizer.step(0.05, 0.0)
        trained = run_schedule(place, ddp, batches, backward=False)
        off = run_schedule(place, ddp, batches, backward=False, forward_slot=TEACHER)
        results.append(
            SimpleNamespace(
                logits=logits,
                gradients=gradients,
                grad_norm=update.grad_norm,
                dtypes={
                    parameter.dtype for parameter in model.parameters() if parameter.requires_grad
                },
                off_is_base=[torch.equal(*pair) for pair in zip(off, base)],
                moved=[(new - old).abs().max().item() for new, old in zip(trained, logits)],
                numbers=list(range(max(2, place.dp_size)))[place.dp_rank :: place.dp_size],
            )
        )
    return results


class Reference:
    """One case through peft: logits of each micro-batch and gradients of their summed losses,
    computed when first asked for.
    """

    def __init__(self, folder: str, adapter: str, model_args, rank: int, targets: list[str]):
        load = load_text_model if model_args.model_type == "qwen3_moe" else load_thinker
        model, missing = load_peft(load(folder), adapter, is_trainable=True)
        assert not missing
        attention = linear_sizes(model_args, [t for t in targets if t.split(".")[-1] in ATTENTION])
        wrapped = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
        assert {n.split("layers.")[1] for n in wrapped if ".self_attn." in n} == set(attention)
        self.logits, self.gradients, self.num_tokens = [], [], []
        for batch in make_batches(VOCAB_SIZE):
            logits = model(input_ids=batch.input_ids).logits
            (logits * batch.cotangent(VOCAB_SIZE)).sum().backward()
            self.logits.append(logits.detach())
            self.gradients.append(peft_gradients(model, model_args, rank))
            self.num_tokens.append(int(batch.real.sum()))
            model.zero_grad(set_to_none=True)

    def mean_gradients(self, num_batches: int) -> dict[str, torch.Tensor]:
        total = sum(self.num_tokens[:num_batches])
        return {
            name: sum(of[name] for of in self.gradients[:num_batches]) / total
            for name in self.gradients[0]
        }


@pytest.fixture(scope="module")
def cases(tiny_folder, tmp_path_factory):
    """name -> (folder, adapter folder, targets, Reference)."""
    made = {}
    for name, (kind, targets, rank, alpha) in CASES.items():
        folder = tiny_folder(**FOLDERS[kind])
        model_args = read_model_args(folder)
        tensors, _ = with_zero_experts(
            random_adapter(model_args, rank, targets), model_args, rank, targets
        )
        settings = peft_config(
            model_args.family,
            rank=rank,
            alpha=alpha,
            dropout=0.0,
            targets=targets,
            base_model=folder,
            use_rslora="rsLoRA" in name,
        )
        ours = ("use_rslora", "layers_to_transform", "alpha_pattern")
        adapter = write_adapter(
            tmp_path_factory.mktemp("adapter"),
            tensors,
            rank=rank,
            alpha=alpha,
            targets=settings["target_modules"],
            **{name: settings[name] for name in ours if name in settings},
        )
        made[name] = (
            folder,
            adapter,
            targets,
            Reference(folder, adapter, model_args, rank, targets),
        )
    return made


def check_logits(result, reference, name, tolerance=1e-4):
    for number, value in zip(result.numbers, result.logits):
        expected, real = reference.logits[number], make_batches(VOCAB_SIZE)[number].real
        difference = ((value[..., :VOCAB_SIZE] - expected).abs() * real[..., None]).max().item()
        assert difference < tolerance, (
            f"{name}, micro-batch {number}: logits differ by {difference}"
        )


def is_target(name, targets):
    """Whether the tensor `name` belongs to LoRA that is trained, of every layer or of its own."""
    linear, layer = name.split(".")[-3], name.partition("layers.")[2].partition(".")[0]
    return linear in targets or f"{layer}.{linear}" in targets


def check_gradients(results, expected, targets, tolerance=1e-4):
    """Every rank's gradients, copies of replicated weights included, and every element of every
    tensor seen.
    """
    expected = {name: value for name, value in expected.items() if is_target(name, targets)}
    largest = {}
    for name, value in expected.items():
        kind = tuple(name.split(".")[-3:])
        largest[kind] = max(largest.get(kind, 0.0), value.abs().max().item())
    assert min(largest.values()) > 1e-3, "the reference's own gradients must not vanish"
    seen = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in expected.items()}
    for rank, result in enumerate(results):
        for name, index, value in result.gradients:
            limit = tolerance * largest[tuple(name.split(".")[-3:])]
            difference = (value - expected[name][index]).abs().max().item()
            assert difference < limit, (
                f"rank {rank}: gradient of {name} differs by {difference}, allowed {limit}"
            )
            seen[name][index] = True
    assert all(flags.all() for flags in seen.values())
    norm = torch.stack([value.norm() for value in expected.values()]).norm().item()
    for result in results:
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)


LAYOUTS = [  # world size, TP, PP, EP; DP is the rest
    pytest.param(1, 1, 1, 1, id="one rank"),
    pytest.param(2, 2, 1, 2, id="TP2 EP2"),
    pytest.param(2, 1, 2, 1, id="PP2"),
    pytest.param(4, 4, 1, 1, id="TP4", marks=pytest.mark.extended),
    pytest.param(4, 2, 1, 1, id="TP2 DP2", marks=pytest.mark.extended),
    pytest.param(4, 1, 1, 4, id="EP4 over DP4", marks=pytest.mark.extended),
    pytest.param(8, 8, 1, 8, id="TP8 EP8, the flagship", marks=pytest.mark.extended),
    pytest.param(8, 4, 2, 2, id="TP4 PP2 EP2", marks=pytest.mark.extended),
    pytest.param(8, 2, 2, 4, id="TP2 PP2 DP2 EP4", marks=pytest.mark.smoke),
]


@pytest.mark.parametrize("world_size, tp, pp, ep", LAYOUTS)
def test_logits_and_gradients_equal_peft(cases, world_size, tp, pp, ep):
    """Every set of linears, plus full recompute of the first; and LoRA off is the base bit for bit,
    also after a step of training.
    """
    names = [*cases, "all, rank 4"]
    runs = [
        (*cases[name][:2], {"recompute": number == len(cases)}) for number, name in enumerate(names)
    ]
    by_rank = run_ranks(lora_at_layout, world_size, tp, pp, ep, runs)
    for number, name in enumerate(names):
        _, _, targets, reference = cases[name]
        results = [of_rank[number] for of_rank in by_rank]
        for result in results:
            check_logits(result, reference, name)
            assert all(result.off_is_base), f"{name}: LoRA off is not the base"
            assert all(difference > 1e-2 for difference in result.moved), (
                f"{name}: a step of training does not show"
            )
            assert result.dtypes <= {torch.float32}  # a stage may have no LoRA
        assert {number for result in results if result.logits for number in result.numbers} == set(
            range(max(2, world_size // tp // pp))
        )
        check_gradients(results, reference.mean_gradients(max(2, world_size // tp // pp)), targets)


@pytest.mark.parametrize(
    "dtype, logits_limit, cosine_limit", [("bfloat16", 0.05, 0.995), ("float16", 0.01, 0.9999)]
)
def test_fp32_adapters_over_a_half_precision_base(cases, dtype, logits_limit, cosine_limit):
    """LoRA weights and gradients stay fp32, results follow peft's in fp32 as closely as the base's
    dtype allows, off is still the base. A token that rounding sends to another expert can weigh
    much in one gradient: the limit is for the median of the cases.
    """
    in_all_layers = [case for name, case in cases.items() if "layer" not in name]
    runs = [(folder, adapter, {"dtype": dtype}) for folder, adapter, _, _ in in_all_layers]
    by_rank, cosines = run_ranks(lora_at_layout, 2, 2, 1, 2, runs), []
    for number, (_, _, _, reference) in enumerate(in_all_layers):
        expected, ours, theirs = reference.mean_gradients(2), [], []
        for result in (of_rank[number] for of_rank in by_rank):
            assert result.dtypes == {torch.float32} and all(result.off_is_base)
            assert all(value.dtype == torch.float32 for _, _, value in result.gradients)
            errors = []
            for batch, value in zip(result.numbers, result.logits):
                real, wanted = make_batches(VOCAB_SIZE)[batch].real, reference.logits[batch]
                difference = (value[..., :VOCAB_SIZE] - wanted).norm(dim=-1)
                errors.append((difference / wanted.norm(dim=-1))[real])
            error = torch.cat(errors).median().item()
            assert error < logits_limit, f"relative error {error}"
            ours += [value.flatten() for _, _, value in result.gradients]
            theirs += [expected[name][index].flatten() for name, index, _ in result.gradients]
        cosines.append(
            torch.nn.functional.cosine_similarity(torch.cat(ours), torch.cat(theirs), dim=0).item()
        )
    assert median(cosines) > cosine_limit and min(cosines) > 0.95, f"cosines {cosines}"


def gradients_with_toggles(rank, world_size, tp, pp, ep, folder, adapter, teacher):
    """Gradients without recompute, then with it while the model is the student in forward and the
    teacher in backward, and the other way round. Dropout is on. teacher: the adapter that it has,
    or None.
    """
    place = initialize(tp, pp, ep)
    results = []
    for recompute, forward_slot, backward_slot in (
        (False, STUDENT, STUDENT),
        (True, STUDENT, TEACHER),
        (True, TEACHER, STUDENT),
    ):
        model_args, model = build(place, folder, adapter, recompute=recompute, dropout=DROPOUT)
        if teacher:
            load_teacher(model, model_args, place, PeftAdapter(teacher, model_args))
        ddp = in_reducer(model).train()
        ddp.zero_grad_buffer()
        parallel.seed_step(42, 0, place)
        batches = make_batches(VOCAB_SIZE)[:3]
        run_schedule(place, ddp, batches, forward_slot=forward_slot, backward_slot=backward_slot)
        assert all(module.active == STUDENT for module in lora_modules(model)), "not restored"
        results.append([value for _, _, value in gradients_of(model, model_args, place)])
    return results


@pytest.mark.parametrize("teacher", [None, "gate and up, rank 3"])
@pytest.mark.parametrize("world_size, tp, pp, ep", [(1, 1, 1, 1), (2, 1, 2, 1), (2, 2, 1, 2)])
def test_recompute_sees_the_slot_of_the_forward_pass(cases, world_size, tp, pp, ep, teacher):
    """Backward may run after the toggle's context has ended, or inside the teacher's: gradients are
    those of what the forward pass did, dropout masks included.
    """
    folder, adapter, _, _ = cases["all, rank 4"]
    own = teacher and cases[teacher][1]
    for plain, student, of_teacher in run_ranks(
        gradients_with_toggles, world_size, tp, pp, ep, folder, adapter, own
    ):
        for expected, recomputed, frozen in zip(plain, student, of_teacher):
            assert expected.abs().max() > 0
            torch.testing.assert_close(recomputed, expected, rtol=1e-5, atol=1e-7)
            assert not frozen.any(), "the teacher's forward pass has no gradient of the student"


def test_toggle_nests_and_comes_back_after_an_exception():
    model = torch.nn.ModuleList(
        LoraLinear(torch.nn.Identity(), sequence_parallel=False) for _ in range(3)
    )
    active = lambda: [module.active for module in model]
    model[1].active = None
    with pytest.raises(KeyError, match="a step went wrong"):
        with as_teacher(model):
            assert active() == [TEACHER] * 3
            with as_student(model):
                assert active() == [STUDENT] * 3
                with activate(model, None):
                    assert active() == [None] * 3
            assert active() == [TEACHER] * 3
            raise KeyError("a step went wrong")
    assert active() == [STUDENT, None, STUDENT]


def test_parameter_count_is_what_trains(cases):
    """The count of the banner against the elements of the adapter that peft loads."""
    folder, adapter, targets, _ = cases["k and experts, rank 1"]
    model_args = read_model_args(folder)
    expected = sum(d_in + d_out for d_in, d_out in linear_sizes(model_args, targets).values())
    model = load_thinker(folder)
    base = sum(
        value.numel() for part in (decoder(model), model.lm_head) for value in part.parameters()
    )
    assert count_parameters(model_args, 1, targets) == (expected, base + expected)
    assert expected == sum(
        value.numel() for value in random_adapter(model_args, 1, targets).values()
    )
