"""A second engine behind `RolloutBackend`: transformers' generate with peft, which shares with the
training process nothing but the protocol. It loads the adapter that `update_weights` saves and
reads the media from their files. Greedy, it writes what the training model writes.
"""

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor

from megatron_gkd.checkpoint import save_checkpoint
from megatron_gkd.config import RolloutConfig
from megatron_gkd.data import collate, load_datasets, step_loader
from megatron_gkd.data.micro_batches import Budget
from megatron_gkd.data.order import batch_indices
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.lora.load import load_adapter
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.media.towers import StepMedia, build_towers
from megatron_gkd.model.args import read_model_args
from megatron_gkd.rollout.generate import Response
from megatron_gkd.rollout.rollout import make_rollout
from megatron_gkd.run import packing
from tests.adapters import load_peft, load_thinker, random_adapter, write_adapter
from tests.lora_runs import build, initialize
from tests.media_rows import write_rows
from tests.packed import rows_of
from tests.ranks import run_ranks
from tests.train_runs import arguments, layout_flags, read_lines, run_training

MAX_NEW_TOKENS = 6
STUDENT_WRITES, TEACHER_WRITES = "write for the student", "write for the teacher"
LORA = dict(rank=3, alpha=5.0)
TARGETS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = dict(
    num_hidden_layers=4, hidden_size=64, head_dim=16, moe_intermediate_size=32, vocab_size=1024
)


class TransformersBackend:
    """Greedy text of the base model in `folder` with the adapter of the last update. One rank of a
    replica runs it, the others get its responses. `events`: what was called.
    """

    def __init__(self, folder, saved, events, engine, seed):
        """saved: where the adapters go. The rest as for `MegatronBackend`: of `engine` only the
        settings are read, `seed` is for texts that are drawn.
        """
        parallel, settings = engine.parallel, engine.settings
        assert settings.sampling.temperature == 0 and settings.sampling.repetition_penalty == 1
        self.folder, self.saved, self.events = folder, saved, events
        self.model_args, self.parallel = read_model_args(folder), parallel
        self.settings = dict(
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=settings.stop_token_ids,
            pad_token_id=settings.pad_token_id,
        )
        self.is_engine = parallel.tp_rank == parallel.pp_rank == 0
        self.base, self.student = load_thinker(folder), None
        self.sounds = AutoFeatureExtractor.from_pretrained(folder)
        self.pictures = AutoImageProcessor.from_pretrained(folder)

    def update_weights(self, model, step):
        self.events.append(("update_weights", step))
        adapter = save_checkpoint(
            self.saved,
            step,
            model=model,
            model_args=self.model_args,
            parallel=self.parallel,
            alpha=LORA["alpha"],
            dropout=0.0,
            base_model=self.folder,
            optimizer=None,
            state={},
        )
        if self.is_engine:
            self.student, missing = load_peft(load_thinker(self.folder), str(adapter))
            assert not missing

    def write(self, prompts, step):
        self.events.append((f"write for the {prompts.author}", step))
        model = self.student if prompts.author == "student" else self.base
        responses = []
        if self.is_engine:
            for index, ids in enumerate(prompts.token_ids):
                for _ in range(prompts.num_samples):
                    text = self.generate(model, ids, prompts.references(index))
                    responses.append(Response(text, None))
        group, of_group = self.parallel.groups.mp, [responses]
        engine = torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast_object_list(of_group, engine, group=group)
        return of_group[0]

    def close(self):
        self.events.append(("close", None))

    def generate(self, model, ids, references):
        inputs = {"use_audio_in_video": references.use_audio_in_video}
        of_kind = {"audio": [], "image": []}
        for reference in references.media:
            of_kind[reference.kind].append(reference.path)
        if of_kind["audio"]:
            samples = [soundfile.read(path, dtype="float32")[0] for path in of_kind["audio"]]
            found = self.sounds(
                samples,
                sampling_rate=16_000,
                padding=True,
                truncation=False,
                return_attention_mask=True,
                return_tensors="pt",
            )
            inputs["input_features"] = found["input_features"]
            inputs["feature_attention_mask"] = found["attention_mask"]
        if of_kind["image"]:
            images = [Image.open(path) for path in of_kind["image"]]
            inputs |= self.pictures(images=images, return_tensors="pt")
        ids = torch.tensor([ids])
        with torch.no_grad():
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **self.settings, **inputs
            )
        return written[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def model(tiny_folder):
    return tiny_folder(**SIZES)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Two, far enough from zero and from each other to change the text."""
    root, found = tmp_path_factory.mktemp("adapters"), []
    for seed in (1, 2):
        tensors = random_adapter(read_model_args(model), LORA["rank"], TARGETS, seed)
        found.append(write_adapter(root / str(seed), tensors, targets=TARGETS, **LORA))
    return found


@pytest.fixture(scope="module")
def dataset(model, tmp_path_factory):
    """Eight rows: text, sounds, pictures and both, the teacher's media other than the student's."""
    return write_rows(tmp_path_factory.mktemp("rows"), model)[0]


def texts_of(batches, side):
    texts = {}
    for batch in batches:
        view = getattr(batch, side)
        of_rows = zip(batch.rows, rows_of(view.input_ids[0], view), view.prompt_lengths)
        texts |= {row: ids[start:].tolist() for row, ids, start in of_rows if row >= 0}
    return texts


def check_settings(parts):
    """Each flag is a setting of the engine, and of the greedy one but for the temperature."""
    flags = dict(rollout_temperature=0.7, top_p=0.8, top_k=7, repetition_penalty=1.3)
    flags |= dict(max_completion_length=11, rollout_prefill_tokens=77, num_generations=3)
    rollout = make_rollout(RolloutConfig(**flags, rollout_cuda_graphs=False), **parts)
    sampling = dict(temperature=0.7, top_p=0.8, top_k=7, repetition_penalty=1.3)
    engine = rollout.backend.engine
    for used, temperature in ((engine, 0.7), (engine.greedy, 0.0)):
        found = used.settings
        assert vars(found.sampling) == sampling | dict(temperature=temperature)
        sizes = found.max_new_tokens, found.prefill_tokens, found.cuda_graphs
        assert sizes == (11, 77, False)
    assert (rollout.num_samples, rollout.max_new_tokens) == (3, 11)
    evaluation = rollout.for_evaluation(parts["data"], Budget(max_tokens=50))
    assert (evaluation.num_samples, evaluation.greedy) == (1, True)


def write_with_both(rank, world_size, folder, dataset, adapters, saved, tp, pp, ep):
    """{(step, author): (text of the training model, text of transformers)} by row, and what the
    second engine was asked for. At step n the model has the n-th adapter.
    """
    place = initialize(tp, pp, ep)
    model_args, model = build(place, folder, **LORA, targets=TARGETS, seed=0)
    model.towers = build_towers(folder, model_args, place, torch.float32, audio=True, visual=True)
    settings = DataConfig(dataset=[dataset], max_length=512)
    data, _ = load_datasets(settings, folder, model_args.vocab_size, 0)
    budget = Budget(max_tokens=100)
    loader = step_loader(
        data,
        lambda step: batch_indices(step, len(data), len(data), seed=0),
        lambda step: data.lengths.views,
        global_batch_size=len(data),
        budget=budget,
        dp_rank=place.dp_rank,
        dp_size=place.dp_size,
        start_step=0,
        num_steps=1,
        num_workers=0,
    )
    packed = packing(data.pad_token_id, place)
    batches = [
        collate([sample for _, sample in numbered], packed, [number for number, _ in numbered])
        for numbered in next(loader)
    ]
    assert len(batches) > 1
    parts = dict(
        model=model,
        model_args=model_args,
        parallel=place,
        data=data,
        model_folder=folder,
        budget=budget,
        packing=packed,
        seed=0,
    )
    check_settings(parts)
    rollout = make_rollout(
        RolloutConfig(
            max_completion_length=MAX_NEW_TOKENS,
            rollout_temperature=0.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
        ),
        **parts,
    )
    found, events = {}, []
    engine = TransformersBackend(folder, saved, events, **vars(rollout.backend))
    with contextlib.closing(replace(rollout, backend=engine)) as outside:
        for step, author in ((0, "student"), (0, "teacher"), (1, "student")):
            load_adapter(model, model_args, place, PeftAdapter(adapters[step], model_args))
            media = StepMedia(model.towers, [batch.media for batch in batches])
            found[step, author] = [
                texts_of(used.respond(batches, step, author, media), author)
                for used in (rollout, outside)
            ]
    return found, events


@pytest.mark.parametrize("layout", [(1, 1, 1, 1), (4, 2, 1, 2)], ids=["single", "TP2-EP2-DP2"])
def test_an_engine_outside_writes_what_the_training_model_writes(
    model, dataset, adapters, tmp_path, layout
):
    results = run_ranks(write_with_both, layout[0], model, dataset, adapters, tmp_path, *layout[1:])
    texts = {}
    for found, events in results:
        for key, (inside, outside) in found.items():
            assert inside == outside, key
            texts.setdefault(key, {}).update(inside)
        assert events == [
            ("update_weights", 0),
            (STUDENT_WRITES, 0),
            (TEACHER_WRITES, 0),
            ("update_weights", 1),
            (STUDENT_WRITES, 1),
            ("close", None),
        ]
    for of_key in texts.values():
        assert sorted(of_key) == list(range(8))
        assert max(map(len, of_key.values())) == MAX_NEW_TOKENS
    before, teacher, after = texts.values()
    assert before != after and before != teacher


def train_with(rank, world_size, argv, folder, saved):
    """A whole run whose responses transformers writes; what the engine was asked for."""
    from megatron_gkd import parallel, train
    from megatron_gkd.rollout import rollout

    train.destroy = parallel.parallel_state.destroy_model_parallel  # the harness leaves the rest
    events = []
    rollout.MegatronBackend = partial(TransformersBackend, folder, saved, events)
    train.main(argv)
    return events


def test_a_run_with_an_engine_outside_has_the_numbers_of_one_without(model, dataset, tmp_path):
    """Three on-policy steps on 2 ranks, the weights moving between them. The training model writes
    each text twice, which changes no mean.
    """
    flags = dict(
        model=model,
        dataset=dataset,
        lora_rank=LORA["rank"],
        lora_alpha=LORA["alpha"],
        learning_rate=0.02,
        lr_scheduler_type="constant",
        lmbda=1,
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_completion_length=MAX_NEW_TOKENS,
        rollout_temperature=0,
        repetition_penalty=1,
        **layout_flags(tp=2, ep=2),
    )
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    run_training(2, arguments(output_dir=inside, num_generations=2, **flags))
    all_events = run_ranks(
        train_with, 2, arguments(output_dir=outside, **flags), model, tmp_path / "saved"
    )
    for events in all_events:
        steps = [(name, step) for step in range(3) for name in ("update_weights", STUDENT_WRITES)]
        assert events == [*steps, ("close", None)]
    lines = [read_lines(output / "metrics.jsonl") for output in (inside, outside)]
    for mine, other in zip(*lines, strict=True):
        assert mine["num_tokens"] == 2 * other["num_tokens"]
        for name in ("jsd", "kl_forward", "entropy_student", "grad_norm"):
            assert other[name] == pytest.approx(mine[name], rel=1e-3), name
        # transformers told no log-probabilities
        assert mine["rollout_logprob_gap"] < 1e-4 and "rollout_logprob_gap" not in other
    assert len({line["kl_forward"] for line in lines[0]}) == 3
