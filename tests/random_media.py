"""Random rows with media, built without a processor: as the package's samples, and as
`transformers` wants them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.data import Packing, Sample, View, collate
from megatron_gkd.data.sample import MediumPositions
from megatron_gkd.media.medium import Medium
from megatron_gkd.media.positions import MediaTokenIds, rope_positions

MEL_BINS, PATCH = 128, 3 * 2 * 16 * 16
TEXT_IDS = 150  # ids below are text's; the special ones of the small tokenizer come after them


@dataclass
class Prompt:
    """The media in the prompt of one view: indices of the row's media, ("both", video, audio) for a
    video with its audio.
    """

    items: list
    use_audio_in_video: bool = False


class MediaRow:
    """A row with a prompt for each view. `media`: ("audio", frames), ("image", (h, w)) or
    ("video", (t, h, w), seconds per grid).
    """

    def __init__(
        self,
        ids: MediaTokenIds,
        seed: int,
        media: list[tuple],
        student: Prompt,
        teacher: Prompt | None = None,
    ):
        self.ids, self.generator = ids, torch.Generator().manual_seed(seed)
        self.media = [self.medium(*medium) for medium in media]
        self.response = self.text(5)
        self.student = self.prompt(student)
        self.teacher = self.student if teacher is None else self.prompt(teacher)

    def text(self, length):
        return torch.randint(TEXT_IDS, (length,), generator=self.generator).tolist()

    def medium(self, kind, size, seconds=0.0):
        if kind == "audio":
            tokens = size // 100 * 13 + -(-(size % 100) // 8)
            return Medium(kind, torch.randn(MEL_BINS, size, generator=self.generator), None, tokens)
        grid = (1, *size) if kind == "image" else size
        patches = torch.randn(grid[0] * grid[1] * grid[2], PATCH, generator=self.generator)
        return Medium(kind, patches, grid, len(patches) // self.ids.spatial_merge_size**2, seconds)

    def prompt(self, prompt: Prompt):
        """(tokens, positions of media in them, indices of media by kind, whether videos show their
        audio).
        """
        ids, tokens, media_positions = self.ids, self.text(3), []
        order = {"audio": [], "image": [], "video": []}
        pads = {
            "audio": ids.audio_token_id,
            "image": ids.image_token_id,
            "video": ids.video_token_id,
        }
        for item in prompt.items:
            if isinstance(item, tuple):
                _, video, audio = item
                self._both(tokens, media_positions, video, audio)
                order["video"].append(video)
                order["audio"].append(audio)
            else:
                medium = self.media[item]
                marks = (ids.vision_start_token_id, ids.vision_end_token_id)
                if medium.kind == "audio":
                    marks = (ids.audio_start_token_id, ids.audio_end_token_id)
                tokens.append(marks[0])
                media_positions.append(
                    MediumPositions(item, list(range(len(tokens), len(tokens) + medium.num_tokens)))
                )
                tokens += [pads[medium.kind]] * medium.num_tokens + [marks[1]]
                order[medium.kind].append(item)
            tokens += self.text(2)
        return tokens, media_positions, order, prompt.use_audio_in_video

    def _both(self, tokens, media_positions, video, audio):
        """Placeholders of a video and its audio in random order: the model knows them by their ids
        alone.
        """
        ids, positions = self.ids, {video: [], audio: []}
        tokens += [ids.vision_start_token_id, ids.audio_start_token_id]
        kinds = [video] * self.media[video].num_tokens + [audio] * self.media[audio].num_tokens
        for index in torch.randperm(len(kinds), generator=self.generator).tolist():
            positions[kinds[index]].append(len(tokens))
            tokens.append(ids.video_token_id if kinds[index] == video else ids.audio_token_id)
        tokens += [ids.audio_end_token_id, ids.vision_end_token_id]
        media_positions += [MediumPositions(number, found) for number, found in positions.items()]

    def view(self, prompt) -> View:
        tokens, media_positions, order, use_audio_in_video = prompt
        positions = rope_positions(
            tokens + self.response,
            self.ids,
            audio_tokens=[self.media[index].num_tokens for index in order["audio"]],
            image_grids=[self.media[index].grid_thw for index in order["image"]],
            video_grids=[self.media[index].grid_thw for index in order["video"]],
            seconds_per_grid=[self.media[index].seconds_per_grid for index in order["video"]],
            use_audio_in_video=use_audio_in_video,
        )
        labels = [-100] * len(tokens) + self.response
        return View(tokens + self.response, labels, len(tokens), positions, tuple(media_positions))

    def sample(self, row: int) -> Sample:
        student = self.view(self.student)
        teacher = student if self.teacher is self.student else self.view(self.teacher)
        return Sample(student, teacher, "", row, 0, tuple(self.media))

    def inputs(self, side: str, with_response: bool = True) -> dict[str, Tensor]:
        """The arguments of transformers' thinker for this view of the row alone; it computes the
        positions itself.
        """
        tokens, _, order, use_audio_in_video = getattr(self, side)
        ids = torch.tensor([tokens + self.response * with_response])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "use_audio_in_video": use_audio_in_video,
        }
        of = {kind: [self.media[index] for index in indices] for kind, indices in order.items()}
        if of["audio"]:
            lengths = torch.tensor([medium.features.shape[1] for medium in of["audio"]])
            inputs["input_features"] = torch.zeros(len(lengths), MEL_BINS, int(lengths.max()))
            for row, medium in zip(inputs["input_features"], of["audio"]):
                row[:, : medium.features.shape[1]] = medium.features
            inputs["feature_attention_mask"] = (
                torch.arange(int(lengths.max())) < lengths[:, None]
            ).long()
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if of[kind]:
                inputs[pixels] = torch.cat([medium.features for medium in of[kind]])
                inputs[grid] = torch.tensor([medium.grid_thw for medium in of[kind]])
        if of["video"]:
            inputs["video_second_per_grid"] = torch.tensor(
                [medium.seconds_per_grid for medium in of["video"]]
            )
        return inputs


def make_rows(ids: MediaTokenIds) -> list[list[MediaRow]]:
    """Three micro-batches: audio and images; video, with its audio and without, and all kinds in a
    row; text alone.
    """
    audio_and_images = [
        MediaRow(
            ids, 0, [("audio", 50)], Prompt([0]), Prompt([])
        ),  # the teacher reads, the student hears
        MediaRow(ids, 1, [("audio", 37), ("audio", 130)], Prompt([0, 1]), Prompt([1])),
        MediaRow(ids, 2, [("audio", 850)], Prompt([0])),
        MediaRow(ids, 3, [("audio", 800), ("audio", 3)], Prompt([]), Prompt([0])),
        MediaRow(
            ids,
            4,
            [("image", (4, 6)), ("image", (2, 2)), ("image", (8, 2))],
            Prompt([0, 1, 2]),
            Prompt([2, 0]),
        ),
    ]
    mixed = [
        MediaRow(
            ids, 5, [("video", (3, 4, 4), 0.7), ("image", (4, 4))], Prompt([0, 1]), Prompt([1, 0])
        ),
        MediaRow(
            ids,
            6,
            [("video", (2, 4, 6), 0.5), ("audio", 140)],
            Prompt([("both", 0, 1)], True),
            Prompt([0]),
        ),
        MediaRow(
            ids,
            7,
            [("image", (2, 4)), ("audio", 100), ("video", (2, 2, 4), 1.0), ("audio", 61)],
            Prompt([0, 1, ("both", 2, 3)], True),
            Prompt([3, 2, 1, 0]),
        ),
        MediaRow(ids, 8, [], Prompt([])),
    ]
    text = [
        MediaRow(ids, 9, [], Prompt([]), Prompt([])),
        MediaRow(ids, 10, [], Prompt([]), Prompt([])),
    ]
    return [audio_and_images, mixed, text]


def make_batch(rows: list[MediaRow], tp_size: int, first_row: int = 0, row_multiple: int = 1):
    samples = [row.sample(first_row + index) for index, row in enumerate(rows)]
    return collate(samples, Packing(0, tp_size * row_multiple, row_multiple))
