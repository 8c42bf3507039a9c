"""The towers' sizes, counted from config.json, against towers that are built and transformers'."""

import json
from pathlib import Path

import pytest
import torch

from megatron_gkd.families import families
from megatron_gkd.plan.towers import AudioTower, VisualTower, read_towers
from tests.ranks import run_ranks
from tests.tower_adapters import RANK
from tests.train_runs import SMALL


def test_tower_parameters_are_those_of_the_towers(tiny_folder):
    """And those of the LoRA that --lora_towers puts on them."""
    folder = tiny_folder(**SMALL)
    ((of_base, of_lora),) = run_ranks(_built, 1, folder)
    towers = read_towers(folder, True, True)
    assert [tower.parameters for tower in towers] == of_base
    assert [RANK * tower.lora_numbers for tower in towers] == of_lora
    assert read_towers(folder, True, False) == towers[:1]
    assert read_towers(folder, False, True) == towers[1:]
    assert read_towers(tiny_folder(family="qwen3_moe", **SMALL), True, True) == ()


@pytest.mark.parametrize("value", ["many", -3, 1.5, True])
def test_a_size_of_a_tower_that_is_none_is_refused(value, tiny_folder, tmp_path):
    config = json.loads((Path(tiny_folder(**SMALL)) / "config.json").read_text())
    of_audio = config.get("thinker_config", config)["audio_config"]
    of_audio |= {"encoder_layers": value, "num_hidden_layers": None}  # whose name would win
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: audio_config.encoder_layers is "):
        read_towers(tmp_path, True, False)


def _built(rank, world_size, folder):
    """(numbers of the audio tower and of the vision tower, those of LoRA on them)"""
    from tests.lora_runs import initialize
    from tests.tower_adapters import make_model

    _, model = make_model(initialize(1, 1, 1), folder)
    found = []
    for trains in (False, True):
        of = lambda tower: sum(p.numel() for p in tower.parameters() if p.requires_grad == trains)
        found.append([of(model.towers.audio_tower), of(model.towers.visual)])
    return found


def test_what_config_json_leaves_out_is_as_transformers_has_it():
    """Qwen3-Omni-30B-A3B's own sizes but for the outputs, which are the decoder's hidden size."""
    family = families()["qwen3_omni"]
    config = family.config_class()()
    for tower in family.towers:
        defaults = tower.defaults
        of_transformers = getattr(config, tower.config)
        for name, value in defaults.items():
            found = getattr(of_transformers, name)
            assert value == (tuple(found) if isinstance(value, tuple) else found), name
        with torch.device("meta"):
            tower_class = tower.load_class()
            made = tower_class(of_transformers)
        kind = AudioTower if tower.name == "audio_tower" else VisualTower
        numbers = sum(parameter.numel() for parameter in made.parameters())
        assert kind.of(defaults).parameters == numbers
