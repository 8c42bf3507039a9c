"""The loss as the formulas say it, dense in float64, differentiated by autograd; and inputs for the
loss's tests.
"""

import math

import torch
import torch.nn.functional as F


def top_k_and_rest(log_prob, teacher_logits, top_k):
    """Log-probabilities [N, V] -> [N, K + 1]: of the teacher's K best columns, of equal ones the
    lowest, and of all others together, where there are any.
    """
    order = teacher_logits.sort(dim=-1, descending=True, stable=True).indices
    sorted_by_teacher = log_prob.gather(-1, order)
    parts = [sorted_by_teacher[:, :top_k]]
    if top_k < log_prob.shape[1]:
        parts.append(sorted_by_teacher[:, top_k:].logsumexp(-1, keepdim=True))
    return torch.cat(parts, -1)


def reference_divergences(student_logits, teacher_logits, beta=0.5, temperature=1.0, top_k=None):
    """Name -> entries of the sum over the vocabulary, float64 [N, V], of logits [N, V]; with top_k
    over [N, K + 1]. beta: the student's weight.
    """
    log_q = F.log_softmax(student_logits.double() / temperature, -1)
    log_p = F.log_softmax(teacher_logits.double() / temperature, -1)
    if top_k is not None:
        log_q, log_p = (top_k_and_rest(side, teacher_logits, top_k) for side in (log_q, log_p))
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return {
        "jsd": beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m),
        "forward_kl": p * (log_p - log_q),
        "reverse_kl": q * (log_q - log_p),
    }


def reference_results(
    student_logits,
    teacher_logits,
    labels=None,
    sft_alpha=0.0,
    beta=0.5,
    temperature=1.0,
    divergence="jsd",
    clip=None,
    top_k=None,
):
    """LinearJsdOutput's fields as a dict, float64 [N] each; `loss` keeps its graph. labels [N] or
    None, -100 masks.
    """
    student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
    values = reference_divergences(student_logits, teacher_logits, beta, temperature, top_k)
    results = {
        "kl_forward": values["forward_kl"].sum(-1),
        "kl_reverse": values["reverse_kl"].sum(-1),
    }
    results["jsd"] = (
        values[divergence].clamp(max=clip).sum(-1) if clip else values[divergence].sum(-1)
    )
    for name, logits in (("student", student_logits), ("teacher", teacher_logits)):
        log_prob = F.log_softmax(logits / temperature, -1)
        results[f"entropy_{name}"] = -(log_prob.exp() * log_prob).sum(-1)
    results["top1_agreement"] = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).double()
    results["loss"] = (1 - sft_alpha) * results["jsd"]
    if labels is None:
        return results
    kept = labels != -100
    ids = labels.clamp_min(0)
    results["sft_loss"] = F.cross_entropy(student_logits, ids, reduction="none")
    results["label_logprob_student"] = -results["sft_loss"]
    results["label_logprob_teacher"] = -F.cross_entropy(teacher_logits, ids, reduction="none")
    results["token_correct"] = (student_logits.argmax(-1) == ids).double()
    results["loss"] = results["loss"] + sft_alpha * results["sft_loss"]
    return {
        name: torch.where(kept, value, torch.zeros_like(value)) for name, value in results.items()
    }


def logit_pair(num_rows, vocab_size, gap, seed=0, dtype=torch.float32):
    """Student logits of spread 2, and teacher logits that differ from them by about `gap`."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_rows, vocab_size, generator=generator) * 2
    teacher = student + gap * torch.randn(num_rows, vocab_size, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def shifted_pair(num_rows, vocab_size):
    """Logits of equal softmaxes: the teacher's are the student's plus a number of the row, without
    rounding.
    """
    student, _ = logit_pair(num_rows, vocab_size, 0.0)
    student = (student * 64).round() / 64
    return student, student + torch.linspace(-37.0, 21.0, num_rows).round()[:, None]


def labels_for(num_rows, vocab_size, seed=1):
    """Random labels; the second of more than two rows is masked."""
    labels = torch.randint(
        0, vocab_size, (num_rows,), generator=torch.Generator().manual_seed(seed)
    )
    if num_rows > 2:
        labels[1] = -100
    return labels


def upstream_for(num_rows):
    """A different upstream gradient for each row, one of them negative."""
    return torch.linspace(-0.7, 2.3, num_rows)


def relative_error(actual, expected):
    """Norm of the difference over the norm of `expected`, both in float64; a norm below 1e-30
    counts as that.
    """
    difference = (actual.double() - expected.double()).norm().item()
    return difference / max(expected.double().norm().item(), 1e-30)


def student_gradient(output, inputs):
    """Gradient of `inputs` for the upstream gradient of `upstream_for`."""
    return torch.autograd.grad(output, inputs, upstream_for(len(output)).to(output))[0]


def hidden_pair(num_rows, hidden_size, vocab_size, gap, seed=0, dtype=torch.float32):
    """Hidden states of both sides and a head [V, H] that gives logits of spread about 2."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_rows, hidden_size, generator=generator)
    teacher = student + gap * torch.randn(num_rows, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * 2 / hidden_size**0.5
    return student.to(dtype), teacher.to(dtype), weight.to(dtype)


def reference_linear(student, teacher, weight, labels, settings):
    """Reference results and the gradient of the student's hidden states, from logits in float64."""
    student = student.detach().double().requires_grad_()
    results = reference_results(
        student @ weight.double().t(), teacher.double() @ weight.double().t(), labels, **settings
    )
    return results, student_gradient(results["loss"], student)
