"""Whether anything can be learned: refused is a run whose divergence is 0 in every step, that could
only lead the student back to the base, or whose steps need responses that no row has.
"""

import filecmp
from pathlib import Path

from megatron_gkd.checkpoint import find_checkpoint
from megatron_gkd.config import Config
from megatron_gkd.data.dataset import SampleDataset
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.teacher_template import TeacherTemplate
from megatron_gkd.lora.peft_config import CONFIG, TENSORS

MORE_TO_SEE = "teacher_messages or teacher_prompt in the data rows, --teacher_template"


def check_trainable(config: Config, report: DataReport) -> None:
    """Raise ValueError when none of the steps could learn anything."""
    distill = config.distill
    has_sft = distill.sft_alpha > 0 and distill.may_use_data_responses(config.train.max_steps)
    has_view, template = report.has_teacher_view, config.data.teacher_template
    if not has_view and template is not None and distill.may_be_on_policy:
        # it may give the row's own response no text, and what the student writes some
        has_view = TeacherTemplate(template).reads_response
    if not (has_view or has_sft or distill.allow_zero_signal):
        resumes = config.run.resume_from_checkpoint
        if distill.teacher_follows:
            raise ValueError(
                f"nothing to learn: the teacher is the {distill.teacher_line()} and sees the same "
                "input, so where they start alike the divergence stays 0, and elsewhere it only "
                f"holds the student back. Give the teacher more to see ({MORE_TO_SEE}), or set "
                "--sft_alpha above 0 (it counts on the data set's own responses: --lmbda below 1, "
                "no --seq_kd); --allow_zero_signal runs it all the same"
            )
        if distill.teacher_adapter:
            checkpoint = find_checkpoint(resumes, config.run.output_dir) if resumes else None
            check_other_adapter(distill.teacher_adapter, checkpoint or config.lora.adapter)
            return
        given = config.lora.adapter or (resumes and find_checkpoint(resumes, config.run.output_dir))
        why = (
            f"the divergence can only pull the student from the LoRA of {given} back to the base "
            "model"
            if given
            else "with fresh LoRA the divergence and its gradient are exactly 0"
        )
        raise ValueError(
            "nothing to learn: the teacher is the student with LoRA off and sees the same input, "
            f"so {why}. Give the teacher more to see ({MORE_TO_SEE}) or an adapter of its own "
            "(--teacher_adapter), or set --sft_alpha above 0 "
            "(it counts on the data set's own responses: --lmbda below 1, no --seq_kd); "
            "--allow_zero_signal runs it all the same"
        )


def check_responses(config: Config, data: SampleDataset) -> str | None:
    """Raise ValueError where steps learn from the data set's own responses and no row has one.
    Returns a line for the screen where some have and others have not.
    """
    distill, has_response = config.distill, data.lengths.has_response
    number, total = int(has_response.sum()), len(data)
    if number == total:
        return None
    if number and distill.may_use_data_responses(config.train.max_steps):
        return (
            f"{total - number} of {total} rows have no response: they serve steps whose responses "
            f"the run writes; steps that learn from the data's own draw from the other {number}"
        )
    if number:
        return f"{total - number} of {total} rows have no response; the run writes every response"
    first = f"{data.location(0)} has no response, and of {total} rows no other has one"
    if distill.may_use_data_responses(config.train.max_steps):
        raise ValueError(
            f"{first}, but with --lmbda {distill.lmbda} steps may learn from the data's own: set "
            "--lmbda 1 (the student writes every response) or --seq_kd true (the teacher does), or "
            "give rows with responses"
        )
    if distill.sft_alpha > 0:
        raise ValueError(
            f"{first}, but --sft_alpha {distill.sft_alpha:g} is cross-entropy on the data's own: "
            "leave it out"
        )
    return None


def check_skipped_tokens(config: Config, data: SampleDataset) -> None:
    """Raise ValueError when --skip_first_tokens leaves no token of any response of the data, and a
    step may learn from those.
    """
    skipped, distill = config.distill.skip_first_tokens, config.distill
    if not skipped or not distill.may_use_data_responses(config.train.max_steps):
        return
    longest = data.longest_response()
    if skipped >= longest:
        raise ValueError(
            f"--skip_first_tokens {skipped}: no response of the data has more than {longest} "
            "tokens, so none would carry a loss; skip fewer, or let the run write its responses "
            "(--lmbda 1, --seq_kd)"
        )


def check_other_adapter(teacher: str, student: str | Path | None) -> None:
    """Raise ValueError where the student starts from the very adapter that the teacher has, or a
    copy of its folder.
    """
    if student is None:
        return
    same_files, _, _ = filecmp.cmpfiles(teacher, student, [CONFIG, TENSORS], shallow=False)
    if len(same_files) == 2:
        raise ValueError(
            f"nothing to learn: --teacher_adapter {teacher} is the adapter that the student starts "
            "from, and the teacher sees the same input, so the divergence is 0. Start from another "
            f"--adapter or from fresh LoRA, give the teacher more to see ({MORE_TO_SEE}), or set "
            "--sft_alpha above 0; --allow_zero_signal runs it all the same"
        )
