"""Names of the linears that can carry LoRA, as Hugging Face and PEFT name them."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + EXPERTS
HEAD = "lm_head"


def resolve_targets(names: list[str]) -> list[str]:
    """Flag values -> linear names in their fixed order. `ALL` and `all-linear` are every linear of
    the decoder's layers; lm_head is none of them and has to be named.

    Raises ValueError naming a linear that the model does not have.
    """
    if any(name.lower() in ("all", "all-linear", "all_linear") for name in names):
        return list(LINEARS)
    unknown = [name for name in names if name not in (*LINEARS, HEAD)]
    if unknown or not names:
        raise ValueError(
            f"--lora_target_modules {','.join(names) or '(nothing)'}: choose ALL, or some of {', '.join((*LINEARS, HEAD))}"
        )
    return [name for name in (*LINEARS, HEAD) if name in names]
