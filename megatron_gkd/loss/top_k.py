"""The teacher's K best entries over vocabulary shards: what the passes must know of a row to tell
them from the rest (mathematics: divergence.py).

Letters: N rows, V columns of this rank, G ranks. Each rank sends its K largest logits, and from
these all know the K-th largest and how many of the logits equal to it belong to the K. Ranks own
columns in their order, so the lowest of equal columns are the first ranks': each rank then finds
the last of its own. Every layout chooses the same columns.
"""

import torch

from megatron_gkd.loss.rows import RowScalars, SideStatistics, row_scalars

TIED_ENTRIES = 2**24  # logits of the rows with ties that are looked at together


def best_logits(teacher: torch.Tensor, num_columns: int, number: int) -> torch.Tensor:
    """float64 [number, N]: the largest of the first `num_columns` logits of each row of `teacher`
    [N, W] in falling order, then -inf where there are fewer.
    """
    found = torch.topk(teacher[:, :num_columns], min(number, num_columns), dim=1).values
    padding = (0, number - found.shape[1])
    return torch.nn.functional.pad(found.double(), padding, value=-float("inf")).t()


def chosen_columns(
    teacher: torch.Tensor, num_columns: int, own: torch.Tensor, every: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """RowScalars.lowest and last_column, float32 [N, 1] each.

    own: this rank's K + 1 `best_logits`; every: the K best of all ranks, [G, K, N] in rank order.
    Waits for the device: rows of whose equal logits only some are chosen are looked at again.
    """
    k = every.shape[1]
    lowest = every.flatten(0, 1).topk(k, dim=0).values[-1]  # [N]
    num_tied = k - (every > lowest).sum((0, 1))  # chosen of those that are equal, on all ranks
    before = (every[:rank] == lowest).sum((0, 1))  # a rank lists K of them at most, which is enough
    of_rank = (own == lowest).sum(0)  # at least one more than are chosen, where not all are
    num_own = (num_tied - before).clamp_min(0).minimum(of_rank)
    last_column = torch.where(num_own > 0, num_columns, -1)
    is_cut = (num_own > 0) & (num_own < of_rank) & lowest.isfinite()  # -inf: no such column
    cut = is_cut.nonzero().squeeze(1)
    for rows in cut.split(max(1, TIED_ENTRIES // num_columns)) if len(cut) else ():
        is_equal = teacher[rows, :num_columns] == lowest[rows, None]
        is_last = is_equal & (is_equal.cumsum(1, dtype=torch.int32) == num_own[rows, None])
        last_column[rows] = is_last.int().argmax(1)
    return lowest.float().unsqueeze(1), last_column.float().unsqueeze(1)


def with_rest(
    scalars: RowScalars,
    student: SideStatistics,
    student_rest: SideStatistics,
    teacher_rest: SideStatistics,
    temperature: float,
) -> RowScalars:
    """`scalars`, which know the chosen columns, with what is left to know of the rest. student and
    both sides' rests: statistics over the whole vocabulary.
    """
    log_mass = (student_rest.top - student.top) / temperature + (
        student_rest.sum_exp.log() - student.sum_exp.log()
    )
    return scalars._replace(
        rest_shift=row_scalars(student_rest, teacher_rest, temperature).shift,
        rest_mass=log_mass.exp().float().unsqueeze(1),
    )
