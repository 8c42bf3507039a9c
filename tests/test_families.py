"""The families of models: found by their files, read without torch, with transformers' defaults."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, Qwen3MoeConfig, Qwen3OmniMoeThinkerConfig

from megatron_gkd.families import families, family_of, language_sections
from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.lora.peft_names import peft_names
from megatron_gkd.model.args import read_model_args
from megatron_gkd.rollout.generate import generate  # noqa: F401  (the package imports as a whole)
