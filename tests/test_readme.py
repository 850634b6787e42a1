"""What the README shows is run, and prints what the README says."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, flags=re.DOTALL)
BASH = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
RECIPES = [block for block in BASH if "fairseq-" in block]


def test_the_readme_has_the_blocks_that_are_tested():
    assert "@@" not in README
    assert len(PYTHON) >= 2
    assert len(RECIPES) == 1
    assert any("bash examples/quickstart.sh" in block for block in BASH)
    assert any("bash scripts/test.sh" in block for block in BASH)


@pytest.mark.parametrize(("code", "output"), PYTHON)
def test_python_blocks_print_what_they_say(code, output, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


@pytest.mark.parametrize("block", RECIPES)
def test_the_recipe_runs_from_pre_training_to_bleu(block, tiny_corpus, shell):
    """As it stands there, but for the size of the model and the number of updates."""
    small = (
        'fairseq-train() { command fairseq-train "$@" --encoder-embed-dim 32 --decoder-embed-dim 32'
        " --decoder-out-embed-dim 32 --max-update 2 --num-workers 0; }\n"
    )
    out = shell(["bash", "-c", "set -euo pipefail\n" + small + block])
    assert '"name": "BLEU"' in out
    for folder in ("pretrained", "soft_beam"):
        assert (tiny_corpus / "checkpoints" / folder / "checkpoint_last.pt").exists()


def test_the_table_of_options_has_all_of_them_with_their_defaults():
    from fairseq_softtopk.criterions.soft_beam import SoftBeamConfig
    from fairseq_softtopk.models.topk_attention import TopKAttentionConfig

    fields = {
        f"--{field.name.replace('_', '-')}": field.default
        for config in (SoftBeamConfig, TopKAttentionConfig)
        for field in dataclasses.fields(config)
        if config is SoftBeamConfig or field.name.startswith("attention")
    }
    rows = re.findall(
        r"^\| (`--(?:teacher|label|soft|attention)[^|]*) \| ([^|]*) \|", README, flags=re.MULTILINE
    )
    for options, defaults in rows:
        for option, default in zip(options.split(", "), defaults.split(", "), strict=True):
            expected = fields[option.strip("`")]
            shown = {"off": "False", "on": "True", "unset": "None"}.get(default, default.strip("`"))
            assert shown == str(expected) or float(shown) == float(expected)
    inherited = {"---name", "--sentence-avg", "--seed"}
    assert all(f"`{option}`" in README or f"`{option} " in README for option in fields.keys() - inherited)
