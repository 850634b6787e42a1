"""Bad input to the quickstart and the small scripts; that the job itself runs is CI's second step."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPLITS = [f"{split}.{lang}" for split in ("train", "valid", "test") for lang in ("en", "de")]


def quickstart(tmp_path, *options, **settings):
    environment = {**os.environ, "RUN": str(tmp_path / "run"), "VENV": str(tmp_path / "venv"), **settings}
    return subprocess.run(
        ["bash", str(ROOT / "examples" / "quickstart.sh"), *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for name in SPLITS:
        (tmp_path / "data" / name).write_text("A sentence.\nAnother one.\n")
    return tmp_path / "data"


def fails_with(done, tmp_path, message):
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "done").exists()
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("name", ["train.de", "test.en"])
def test_a_missing_file_is_named(folder, tmp_path, name):
    (folder / name).unlink()
    fails_with(quickstart(tmp_path, DATA=str(folder)), tmp_path, f"has no file {name}")


def test_an_empty_corpus_is_named(folder, tmp_path):
    (folder / "train.en").write_text("")
    fails_with(quickstart(tmp_path, DATA=str(folder)), tmp_path, "train.en is empty")


def test_files_of_different_length_are_named(folder, tmp_path):
    (folder / "valid.de").write_text("Nur ein Satz.\n")
    fails_with(quickstart(tmp_path, DATA=str(folder)), tmp_path, "valid.en has 2 lines but valid.de has 1")


def test_an_unknown_option_is_named(tmp_path):
    fails_with(quickstart(tmp_path, "--smal"), tmp_path, "the only option is --small, got --smal")


def test_a_run_folder_of_other_settings_is_not_taken(folder, tmp_path):
    (tmp_path / "run" / "done").mkdir(parents=True)
    (tmp_path / "run" / "settings").write_text("data= src=en tgt=fr\n")
    done = quickstart(tmp_path, DATA=str(folder))
    assert done.returncode != 0
    assert "was made with other settings (data= src=en tgt=fr)" in done.stderr


def test_languages_that_the_corpus_does_not_have_are_refused_before_anything_is_made(tmp_path):
    done = quickstart(tmp_path, TGT="xx")
    fails_with(done, tmp_path, "the written corpus is en-de or en-fr, got en-xx")
    assert not (tmp_path / "run").exists()


STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case $(basename "$0") in
  fairseq-train)
    [ -z "${BREAK_TRAINING:-}" ] || { echo "stub: broken on purpose" >&2; exit 7; }
    echo "x | INFO | train_inner | epoch 001: 1 / 2 loss=1, teacher_forcing_loss=1, num_updates=1" ;;
  fairseq-generate)
    while [ "$1" != --results-path ]; do shift; done
    printf 'D-1\\t-1\\tzwei\\nD-0\\t-1\\teins\\n' > "$2/generate-test.txt" ;;
  sacrebleu)
    echo '[{"name": "BLEU", "score": 60.0, "signature": "b", "verbose_score": "(BP = 1.000 ratio = 1)"},
           {"name": "chrF2", "score": 70.0, "signature": "c"}]' ;;
  python) case $* in *score_table*) exec "$PYTHON" "$@" ;; esac ;;
esac
"""


@pytest.fixture
def stubs(tmp_path):
    """An environment, complete by its stamp, in which every tool only notes that it was called."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").write_text(f"export PATH={folder}:$PATH\n")
    names = "python pip sacremoses subword-nmt fairseq-preprocess fairseq-train fairseq-generate sacrebleu"
    for name in names.split():
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    calls = tmp_path / "calls"
    return {"CALLS": str(calls), "PYTHON": sys.executable, "RUN": "relative/run"}, calls


def test_steps_that_are_done_are_skipped_and_one_that_failed_is_run_again(folder, tmp_path, stubs):
    settings, calls = stubs
    broken = quickstart(tmp_path, DATA=str(folder), **settings, BREAK_TRAINING="1")
    assert broken.returncode != 0
    assert "stub: broken on purpose" in broken.stderr
    assert "quickstart.sh: fairseq-train failed, see" in broken.stderr
    assert not (tmp_path / "relative" / "run" / "done" / "pretrain").exists()

    calls.unlink()
    done = quickstart(tmp_path, DATA=str(folder), **settings)
    assert done.returncode == 0, done.stderr
    assert "-- binarize: done before" in done.stdout
    assert "| soft_beam | 60.0 | 1.000 | 70.0 | " in done.stdout
    run = calls.read_text()
    assert "fairseq-preprocess" not in run
    assert run.count("fairseq-train") == 3
    assert (tmp_path / "relative/run/control/hypotheses.de").read_text() == "eins\nzwei\n"

    calls.unlink()
    again = quickstart(tmp_path, DATA=str(folder), **settings)
    assert again.returncode == 0, again.stderr
    assert "fairseq" not in calls.read_text()


def test_help_names_every_setting(tmp_path):
    done = quickstart(tmp_path, "--help")
    assert done.returncode == 0
    settings = set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "examples" / "quickstart.sh").read_text()))
    for name in {"--small", *settings - {"OMP_WAIT_POLICY"}}:
        assert name in done.stdout


def test_settings_reach_the_commands(folder, tmp_path, stubs):
    settings, calls = stubs
    settings |= {"MERGES": "77", "UPDATES": "9", "FINETUNE_UPDATES": "4", "MAX_TOKENS": "123", "ARCH": "lstm"}
    done = quickstart(tmp_path, "--small", DATA=str(folder), **settings)
    assert done.returncode == 0, done.stderr
    run = calls.read_text()
    assert "learn-bpe -s 77\n" in run
    assert run.count("--max-update 9 ") == 1 and run.count("--max-update 4 ") == 2
    assert run.count("--max-tokens 123 ") == run.count("--arch lstm ") == 3


@pytest.mark.parametrize("name", ["MERGES", "UPDATES", "FINETUNE_UPDATES", "MAX_TOKENS"])
def test_a_setting_that_is_no_number_is_named(folder, tmp_path, name):
    fails_with(quickstart(tmp_path, DATA=str(folder), **{name: "0"}), tmp_path, "are positive numbers, got 0")


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_score_table_prints_a_row_a_system(tmp_path):
    for system in ("control", "soft_beam"):
        (tmp_path / system).mkdir()
        (tmp_path / system / "seconds").write_text("10\n5\n")
        (tmp_path / "text").write_text("The train leaves on Monday morning.\n")
        (tmp_path / system / "text").write_text("The train leaves on Sunday morning.\n")
        scores = subprocess.run(
            ["sacrebleu", str(tmp_path / "text"), "-i", str(tmp_path / system / "text"), "-m", "bleu", "chrf"],
            capture_output=True,
            text=True,
            check=True,
        )
        (tmp_path / system / "scores.json").write_text(scores.stdout)
    lines = script("score_table.py", tmp_path / "control", tmp_path / "soft_beam").stdout.splitlines()
    assert lines[0] == "| system | BLEU | brevity penalty | chrF | training, seconds |"
    assert lines[2].startswith("| control | 48.9 | 1.000 | ")
    assert lines[3].startswith("| soft_beam | ")
    assert lines[3].endswith("| 15 |")
    assert lines[5].startswith("BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert lines[6].startswith("chrF2|")


LOG = """2026-01-01 | INFO | train_inner | epoch 001: 1 / 2 loss=3.5, teacher_forcing_loss=3, num_updates={}
2026-01-01 | INFO | train_inner | epoch 001: 2 / 2 loss=2.5, teacher_forcing_loss=2e-1, num_updates={}
"""


def test_plot_training_reads_a_resumed_log_once(tmp_path):
    sys.path.insert(0, str(ROOT / "scripts"))
    from plot_training import read_log

    log = tmp_path / "train.log"
    log.write_text(LOG.format(1, 2) + LOG.format(2, 3))
    assert read_log(log)["teacher_forcing_loss"] == [(1, 3.0), (2, 3.0), (3, 0.2)]
    done = script("plot_training.py", log, "--out", tmp_path / "loss.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("logs", "names"),
    [
        (["a/train.log", "b/train.log"], ["a", "b"]),
        (["a/seed1/train.log", "b/seed1/train.log"], ["a/seed1", "b/seed1"]),
        (["a/one.log", "a/two.log", "b/one.log"], ["a/one.log", "a/two.log", "b/one.log"]),
        (["a/one.log", "a/two.log"], ["one.log", "two.log"]),
    ],
)
def test_plot_training_names_the_curves_apart(tmp_path, monkeypatch, logs, names):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from plot_training import name_curves

    assert name_curves([tmp_path / log for log in logs]) == names
    (tmp_path / logs[0]).parent.mkdir(parents=True)
    (tmp_path / logs[0]).write_text(LOG.format(1, 2))
    done = script("plot_training.py", *[tmp_path / logs[0]] * 2, "--out", tmp_path / "loss.png")
    assert (done.returncode, "one of the logs is named twice" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot_training.py", "no.log", "--out", "x.png"], "no.log is not a file"),
        (["plot_training.py", str(ROOT / "README.md"), "--out", "x.png"], "holds no training log"),
        (["score_table.py", "nowhere"], "nowhere/scores.json is missing"),
        (
            ["plot_attention.py", ".", "no.pt", "--bpe-codes", "c", "--sentence", "x", "--out", "x.png"],
            "no.pt does not exist",
        ),
    ],
)
def test_scripts_name_what_is_wrong(arguments, message):
    done = script(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
