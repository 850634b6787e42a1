"""What importing the package does, by every route, each in a fresh process."""

import subprocess
import sys

import pytest


def run(code: str, cwd) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_operators_and_beam_import_nothing_but_torch(tmp_path):
    run(
        "import sys, torch; before = set(sys.modules)\n"
        "import fairseq_softtopk.ops, fairseq_softtopk.beam\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        # PyTorch needs sympy and mpmath, which older versions import late.
        "others = new - {'torch', 'fairseq_softtopk', 'sympy', 'mpmath'} - sys.stdlib_module_names\n"
        "assert not others, others",
        tmp_path,
    )


IMPORT = "import fairseq_softtopk.ops\n"
USER_DIR = (
    "from argparse import Namespace; from fairseq.utils import import_user_module\n"
    "import_user_module(Namespace(user_dir='fairseq_softtopk'))\n"
)
PLUGIN = "import fairseq_softtopk.plugin\n"
REGISTERED = (
    "from fairseq.criterions import CRITERION_REGISTRY; from fairseq.models import ARCH_MODEL_REGISTRY\n"
    "assert {'soft_beam', 'soft_beam_search'} <= CRITERION_REGISTRY.keys()\n"
    "assert {'topk_attention', 'topk_attention_tiny'} <= ARCH_MODEL_REGISTRY.keys()\n"
)


@pytest.mark.parametrize(
    "route",
    [
        USER_DIR,
        PLUGIN,
        USER_DIR + USER_DIR,
        PLUGIN + USER_DIR,
        USER_DIR + PLUGIN,
        IMPORT + PLUGIN + USER_DIR,
        IMPORT + USER_DIR + PLUGIN,
        "import fairseq\n" + IMPORT + USER_DIR,
    ],
)
def test_the_plugin_registers_once_by_any_route(tmp_path, route):
    run(route + REGISTERED, tmp_path)


@pytest.mark.parametrize(
    ("command", "warned"),
    [
        ("/usr/bin/fairseq-generate data --user-dir fairseq_softtopk", True),
        ("fairseq-train data --user-dir=fairseq_softtopk --required-batch-size-multiple=8", True),
        ("fairseq_cli/validate.py data --required-batch-size-multiple --user-dir fairseq_softtopk", True),
        ("fairseq-generate data --user-dir fairseq_softtopk --required-batch-size-multiple 1", False),
        ("fairseq-generate data --required-batch-size-multiple=1 --user-dir fairseq_softtopk", False),
        ("fairseq-interactive data --user-dir fairseq_softtopk", False),
        ("fairseq-hydra-train common.user_dir=fairseq_softtopk", False),
        ("train.py", False),
    ],
)
def test_warns_of_the_sentences_that_fairseq_would_leave_out(tmp_path, command, warned):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = {command.split()}; import fairseq_softtopk.plugin"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Stock fairseq, which Python 3.10 has, leaves nothing out.
    leaves_out = sys.version_info >= (3, 11)
    assert ("given --required-batch-size-multiple 1" in done.stderr) == (warned and leaves_out)
