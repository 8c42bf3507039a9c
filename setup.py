"""Install with `pip install -e .` (see launch/setup_env.sh, which installs the right torch first).

Every range is what the tests have run with; `tests/run.sh` runs on the newest that the Python at
hand allows.
"""

from setuptools import find_packages, setup

TORCH = "2.13.0"  # what launch/setup_env.sh installs where there is none

DEPENDENCIES = [
    # The experts are one grouped_mm. setup_env.sh installs 2.13.0, with which all tests run. Parts
    # have passed on 2.11.0 (model, loss, rollout), on 2.14.1 and on 2.15.0 (CPU layer, layouts,
    # loss, LoRA, experts, steps, rollouts, training, resume; on 2.15.0 the kernels too, with triton
    # 3.9; both with numpy 2.5.5 and Python 3.12). Install it before this package: on Linux, pip by
    # itself takes a CUDA build.
    "torch>=2.11,<2.16",
    # GPTModel, schedules, optimizer. The CPU layer (cpu.py) is written against exactly these two
    # versions.
    "megatron-core>=0.16.1,<0.20,!=0.17.*,!=0.18.*",
    # Qwen3OmniMoe with fused experts in memory and per-expert names on disk. 5.20 is the last one
    # for Python 3.10.
    "transformers>=5.20,<5.24",
    # Reads per-expert adapters of fused experts since 0.21; only the demo and the tests call it.
    "peft>=0.21,<0.22",
    # Encoded rows on disk, memory-mapped.
    "pyarrow>=21,<27",
    # Weights and adapters, read slice by slice.
    "safetensors>=0.8,<0.9",
    # Trains the byte-level BPE of the small model.
    "tokenizers>=0.23,<0.24",
    # Folders that hold a tokenizer.model only; protobuf reads it. sentencepiece 0.2.3 asks for
    # protobuf 7.36, which swanlab does not allow, and without it every such folder is refused.
    "sentencepiece>=0.2,<0.2.3",
    "protobuf>=6.31,<8",
    # PIL image processors, part of the processor files.
    "pillow>=12,<14",
    # Reads sound files of many kinds, and writes the demo's.
    "soundfile>=0.13,<0.15",
    # Brings sound of any rate to the audio tower's 16 kHz.
    "soxr>=1.0,<2",
    # Frames and sound of videos; its wheels hold FFmpeg. 17.1 is the last one for Python 3.10, 18.1
    # for 3.11; 17.1.0, 18.1.0 and 19.0.2 gave the same frames.
    "av>=17.1,<20",
    # --config files.
    "pyyaml>=6,<7",
    # --teacher_template and the page of python -m megatron_gkd.report. torch asks for it too.
    "jinja2>=3.1.6,<4",
    # Metrics files for TensorBoard, the progress bar, the demo's curves.
    "tensorboard>=2.21,<2.22",
    "tqdm>=4.70,<5",
    "matplotlib>=3.10,<3.12",
    # Python 3.10 has numpy 2.2 as its last. With 2.5 Triton's interpreter, which only tests use,
    # needs triton 3.7.
    "numpy>=2.2,<2.6",
]

EXTRAS = {
    # Data sets by name (--download_datasets). Files and folders of rows do without.
    "datasets": ["datasets>=5.2,<5.3"],
    # Attention and grouped linears on GPU. The range is megatron-core 0.16.1's own; 2.11.0 was
    # compiled and imported with torch 2.13.0+cu130, and has not run on a GPU here yet. It is
    # compiled against the torch at hand: `EXTRAS=test,gpu bash launch/setup_env.sh`, or `pip
    # install --no-build-isolation -e .[gpu]` where nvcc of torch's CUDA, setuptools, wheel,
    # packaging and ninja are. apex has no place in this list: the `apex` on PyPI is another
    # project, NVIDIA's is built from https://github.com/NVIDIA/apex (python -m megatron_gkd.doctor
    # tells them apart).
    "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],
    # What tests of videos are compared with, bit by bit, where they can be imported; no run needs
    # them. Each torch has a torchvision of its own, which pip finds; the tests ran with torch
    # 2.14.1, torchvision 0.29.1, torchcodec 0.17.0 and the libraries of FFmpeg 8.1.
    "video-reference": ["torchvision>=0.28,<0.30", "torchcodec>=0.12,<0.18"],
    # Compiled too unless a wheel fits; torch's own attention is used without it.
    "flash": ["flash-attn>=2.8,<2.9"],
    # What benchmarks/loss.py is compared with on CUDA, besides TRL (extra `test`). It calls two
    # autograd Functions by the order of their arguments, which is 0.8's; no test here has run it.
    "benchmarks": ["liger-kernel>=0.8,<0.9"],
    # --report_to wandb and --report_to swanlab; tests/run.sh installs both and tests them offline.
    "wandb": ["wandb>=0.31,<0.32"],
    "swanlab": ["swanlab>=0.10.3,<0.11"],
    "test": [
        "datasets>=5.2,<5.3",
        "pytest>=9,<10",
        "pytest-timeout>=2.4,<3",
        # Two tests at a time on two cores: ranks wait for each other half of the time.
        "pytest-xdist>=3.8,<4",
        # Runs the loss kernels in its interpreter where there is no GPU. CUDA builds of torch bring
        # their own triton.
        "triton>=3.6,<3.10",
        # The reference for the divergence. 1.14 is the last one for Python 3.10.
        "trl>=1.14,<1.17",
    ],
    "lint": [
        # Format, lint and types, which tests/run.sh checks: another version formats differently.
        "ruff==0.17.6",
        "mypy==2.4.1",
    ],
}

setup(
    name="megatron_gkd",
    version="0.1.0",
    description="GKD LoRA self-distillation of Qwen3-Omni and Qwen3-MoE on megatron-core",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["megatron_gkd*", "checkpoint_tools*", "demo*"]),
    package_data={
        "megatron_gkd": [
            "plan/*.json",
            "recipes/*.yaml",
            "report/*.jinja",
            "report/*.css",
            "report/*.js",
            "plan/*.sh",
        ],
        "demo": ["**/*.txt", "**/*.json", "**/*.jinja", "*.sh"],
    },
    python_requires=">=3.10,<3.13",
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
)
