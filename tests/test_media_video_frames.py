"""Which frames are taken and what the tower reads of them: against transformers' image processor,
numbers that torchvision gave, and, where torchvision is installed, transformers' video processor.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor
from transformers.models.qwen3_omni_moe import processing_qwen3_omni_moe as of_transformers

from megatron_gkd.errors import DataError
from megatron_gkd.media.medium import Reference
from megatron_gkd.media.processor import MediaProcessor
from megatron_gkd.media.video_file import Scan
from megatron_gkd.media.video_frames import (
    MAX_PIXELS,
    MIN_PIXELS,
    VideoSettings,
    _resize,
    choose_frames,
    plan_frames,
    to_patches,
)
from tests.test_media_processor import build_model
from tests.video_files import HAS_TORCHVISION, NO_TORCHVISION, FrameByFrame, pictures

LIMITS = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("media"))


def planned(frames, fps, settings):
    """(the plan, float32 [P, values of a patch]) of a video of these frames."""
    _, height, width, _ = frames.shape
    plan = plan_frames(Scan(list(range(len(frames))), fps, height, width), settings)
    return plan, to_patches(frames[plan.times], plan, settings)


@pytest.mark.parametrize(
    "num_frames, fps, expected",
    [
        (30, 5.0, [0, 5, 10, 15, 20, 25]),
        (35, 5.0, [0, 5, 11, 17, 23, 29]),  # seven seconds: pairs of frames
        (30, 29.97, [0, 7, 15, 22]),  # four at least
        (3, 1.0, [0, 1]),
        (2, 25.0, [0, 1]),
        (59, 1.0, list(range(58))),  # transformers asks for frame 59
    ],
)
def test_the_frames_that_are_taken(num_frames, fps, expected):
    assert choose_frames(num_frames, fps, VideoSettings()) == expected


def test_frames_are_never_beyond_the_end():
    for fps in (1.0, 24.0, 29.97, 60.0):
        for num_frames in range(2, 2000, 7):
            found = choose_frames(num_frames, fps, VideoSettings())
            assert len(found) % 2 == 0 and len(found) <= 768
            assert sorted(set(found)) == found and found[-1] < num_frames


def test_limits_are_those_of_transformers():
    if hasattr(of_transformers.Qwen3OmniMoeProcessor, "videos_kwargs"):
        settings = of_transformers.Qwen3OmniMoeProcessor.videos_kwargs
    else:  # until 5.22
        settings = of_transformers.Qwen3OmniMoeProcessorKwargs._defaults["videos_kwargs"]
    assert settings["size"] == LIMITS


def test_settings_of_the_folder(model, tmp_path):
    settings = VideoSettings.read(model)
    assert (settings.patch_size, settings.merge_size, settings.image_mean) == (16, 2, [0.5] * 3)
    assert (settings.fps, settings.seconds_per_grid) == (1.0, 2.0)
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    path = tmp_path / "model" / "video_preprocessor_config.json"
    path.write_text(json.dumps(config | {"fps": 4, "max_frames": 8}))
    settings = VideoSettings.read(str(tmp_path / "model"))
    assert (settings.fps, settings.max_frames, settings.seconds_per_grid) == (4, 8, 0.5)
    for refused in ({"resample": 2}, {"num_frames": 8}, {"video_processor_type": "Other"}):
        path.write_text(json.dumps(config | refused))
        with pytest.raises(DataError, match=next(iter(refused))):
            MediaProcessor(str(tmp_path / "model")).measure(Reference("video", "v.mp4", None))


@pytest.mark.parametrize("height, width", [(64, 96), (131, 517), (352, 384), (720, 1280)])
def test_patches_are_those_of_the_image_processor(model, height, width):
    """Which resizes with PIL: one value in a thousand is a step of 1/255 away, hardly any two."""
    frames = pictures(7, height, width)
    plan, patches = planned(frames, 2.0, VideoSettings.read(model))
    assert plan.times == [0, 1, 3, 5]
    expected = FrameByFrame(AutoImageProcessor.from_pretrained(model))([frames[plan.times]])
    assert expected["video_grid_thw"].tolist() == [list(plan.grid_thw)]
    assert plan.num_tokens == np.prod(plan.grid_thw) // 4 == len(patches) // 4
    steps = ((patches - expected["pixel_values_videos"]) * 255 / 2).abs()
    if plan.size == (height, width):
        assert steps.max() < 1e-4
    assert steps.max() < 2.1 and steps.mean() < 1e-3


def test_an_uneven_number_of_frames_ends_with_the_last_twice():
    settings = VideoSettings()
    frames = pictures(4, 364, 364)
    plan, whole = planned(frames, 1.0, settings)
    assert torch.equal(
        to_patches(frames[:3], plan, settings),
        to_patches(frames[[0, 1, 2, 2]], plan, settings),
    )
    assert not torch.equal(whole, to_patches(frames[:3], plan, settings))


def test_resized_as_torchvision_did():
    """The red plane by torchvision 0.29.1, and the sum of all three."""
    y, x, plane = np.mgrid[0:7, 0:9, 0:3]
    frame = ((37 * x + 59 * y + 83 * plane) % 256).astype(np.uint8)
    smaller, larger = _resize(frame, (4, 6)), _resize(frame, (10, 12))
    assert smaller[0].tolist() == [
        [35, 87, 153, 202, 100, 45],
        [142, 199, 131, 75, 101, 161],
        [150, 99, 91, 148, 173, 124],
        [80, 128, 202, 149, 48, 95],
    ]
    assert larger[0, 0].tolist() == [0, 17, 47, 75, 102, 130, 158, 189, 241, 80, 0, 38]
    assert (int(smaller.sum()), int(larger.sum())) == (9101, 45460)


@pytest.mark.skipif(not HAS_TORCHVISION, reason=NO_TORCHVISION)
@pytest.mark.parametrize("taken_a_second", [1.0, 3.0])
@pytest.mark.parametrize(
    "num_frames, fps, height, width",
    [
        (30, 5.0, 64, 96),
        (61, 29.97, 97, 131),
        (9, 2.0, 352, 384),
        (4, 0.5, 1080, 1920),
        (3, 25.0, 33, 1700),
        (40, 12.5, 500, 37),
    ],
)
def test_equal_to_transformers_video_processor(
    model, num_frames, fps, height, width, taken_a_second
):
    from transformers import AutoVideoProcessor

    frames = pictures(num_frames, height, width)
    settings = VideoSettings(**vars(VideoSettings.read(model)) | {"fps": taken_a_second})
    plan, patches = planned(frames, fps, settings)
    expected = AutoVideoProcessor.from_pretrained(model)(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()],
        video_metadata=[{"total_num_frames": num_frames, "fps": fps}],
        do_sample_frames=True,
        fps=taken_a_second,
        size=LIMITS,
        return_tensors="pt",
    )
    assert expected["video_grid_thw"].tolist() == [list(plan.grid_thw)]
    assert torch.equal(patches, expected["pixel_values_videos"])
