"""The towers' sizes, counted from config.json, against towers that are built and transformers'."""

import json
from pathlib import Path

import pytest
import torch

from megatron_gkd.families import families
from megatron_gkd.plan.towers import COUNTS, tower_parameters
from tests.ranks import run_ranks
from tests.train_runs import SMALL


def test_tower_parameters_are_those_of_the_towers(tiny_folder):
    folder = tiny_folder(**SMALL)
    ((audio, visual),) = run_ranks(_built, 1, folder)
    assert tower_parameters(folder, True, False) == audio > 0
    assert tower_parameters(folder, False, True) == visual > 0
    assert tower_parameters(folder, True, True) == audio + visual
    assert tower_parameters(tiny_folder(family="qwen3_moe", **SMALL), True, True) == 0


@pytest.mark.parametrize("value", ["many", -3, 0, 1.5, True, None])
def test_a_size_of_a_tower_that_is_none_is_refused(value, tiny_folder, tmp_path):
    config = json.loads((Path(tiny_folder(**SMALL)) / "config.json").read_text())
    of_audio = config.get("thinker_config", config)["audio_config"]
    of_audio["encoder_layers"] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: audio_config.encoder_layers = "):
        tower_parameters(tmp_path, True, False)
    assert tower_parameters(tmp_path, False, True) > 0


def _built(rank, world_size, folder):
    from megatron_gkd import parallel as layout
    from megatron_gkd.media.towers import build_towers
    from megatron_gkd.model.args import read_model_args

    place = layout.initialize(torch.device("cpu"))
    args = read_model_args(folder)
    towers = build_towers(folder, args, place, torch.float32, audio=True, visual=True)
    of = lambda module: sum(parameter.numel() for parameter in module.parameters())
    return of(towers.audio_tower), of(towers.visual)


def test_what_config_json_leaves_out_is_as_transformers_has_it():
    """Qwen3-Omni-30B-A3B's own sizes but for the outputs, which are the decoder's hidden size."""
    family = families()["qwen3_omni"]
    config = family.config_class()()
    for tower in family.towers:
        defaults, count = COUNTS[tower.name]
        of_transformers = getattr(config, tower.config)
        for name, value in defaults.items():
            found = getattr(of_transformers, name)
            assert value == (tuple(found) if isinstance(value, tuple) else found), name
        with torch.device("meta"):
            tower_class = tower.load_class()
            made = tower_class(of_transformers)
        assert count(defaults) == sum(parameter.numel() for parameter in made.parameters())
