"""The recipe ``examples/multi30k_en_de``, on a corpus of its own in the format of Multi30k's files."""

import csv
import gzip
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "multi30k_en_de"
SIZES = {"train": 200, "val": 20, "test_2016_flickr": 13}
SCRIPTS = ("prepare.sh", "train.sh", "generate.sh", "score.sh", "evaluate.sh", "run.sh")


@pytest.fixture(scope="session")
def multi30k(tmp_path_factory):
    """A folder with the files of Multi30k, but for what they say."""
    text, folder = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("multi30k")
    command = [sys.executable, str(ROOT / "scripts" / "write_corpus.py"), "--target", "de", "--out", str(text)]
    for name, size in zip(("train", "valid", "test"), SIZES.values(), strict=True):
        command += [f"--{name}", str(size)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    for ours, theirs in zip(("train", "valid", "test"), SIZES, strict=True):
        for lang in ("en", "de"):
            with gzip.open(folder / f"{theirs}.{lang}.gz", "wb") as file:
                file.write((text / f"{ours}.{lang}").read_bytes())
    return folder


@pytest.fixture
def copied(multi30k, tmp_path):
    """The same files, plain, to be spoilt."""
    (tmp_path / "copied").mkdir()
    for path in multi30k.iterdir():
        (tmp_path / "copied" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return tmp_path / "copied"


def bash(script, *arguments, **settings):
    """Runs a script of the recipe."""
    return subprocess.run(
        ["bash", str(RECIPE / script), *map(str, arguments)],
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
        capture_output=True,
        text=True,
        timeout=600,
    )


def fails_with(done, message):
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def lines(path):
    return path.read_text().splitlines()


# ------------------------------------------------------------------------------------------ end to end


def test_from_files_to_the_table(multi30k, tmp_path):
    run = tmp_path / "run"
    settings = {"MULTI30K": multi30k, "RUN": run, "SYSTEMS": "control soft_beam", "LENPENS": "1 2"}
    (run / "raw.part").mkdir(parents=True)  # as an interrupted run leaves it
    (run / "raw.part" / "train.en").write_text("half of it")
    done = bash("run.sh", "--small", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(run.rglob("*.part"))
    the_data_are_complete(run)
    every_model_has_its_scores(run)
    the_tables_say_what_the_scores_say(run, done.stdout)
    a_second_run_does_nothing(run, settings)
    other_settings_are_refused(run, settings)
    what_is_fine_tuned_is_known_by_its_contents(run, settings)
    an_unfinished_system_does_not_keep_the_others_from_the_table(run, settings)
    dropped_sentences_are_noticed(run)
    hydra_does_the_same(run, tmp_path)
    gradients_are_compared(run)


def test_the_papers_attention_settings_on_words(multi30k, tmp_path):
    run, settings = tmp_path / "run", {"SYSTEMS": "softmax soft_topk", "LENPENS": "1", "MULTI30K": multi30k}
    done = bash("run.sh", "--small", "attention_paper", RUN=run, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in table[2:]] == ["softmax", "soft_topk"]
    assert "above softmax" in table[0]
    known = {line.split()[0] for line in lines(run / "data-bin" / "dict.de.txt")}
    assert known != {line.split()[0] for line in lines(run / "data-bin" / "dict.en.txt")}
    for system in ("softmax", "soft_topk"):
        folder = run / "models" / "attention_paper" / system / "seed1"
        assert read_settings(folder / "model.pt")["model"]["attention_relaxation"] == system
        assert read_settings(folder / "model.pt")["optimizer"]["_name"] == "sgd"
        assert len(lines(folder / "test.txt")) == SIZES["test_2016_flickr"]
        assert not any("<unk>" in line for line in lines(folder / "test.txt"))


def test_a_transformer_is_fine_tuned(multi30k, tmp_path):
    run, settings = tmp_path / "run", {"MODEL": "transformer", "ATTENTION": "soft_topk --attention-top-k 3"}
    settings |= {"SYSTEMS": "k5", "LENPENS": "1", "MULTI30K": multi30k, "RUN": run}
    done = bash("run.sh", "--small", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("pretrained", "k5/seed1"):
        model = run / "models" / "finetuning" / name / "model.pt"
        settings = read_settings(model)["model"]
        assert settings["arch"] == "topk_attention_transformer_tiny" and settings["decoder_layers"] == 4
        assert settings["attention_relaxation"] == "soft_topk" and settings["attention_top_k"] == 3
        assert len(lines(model.parent / "test.txt")) == SIZES["test_2016_flickr"]
    assert read_settings(model)["criterion"]["_name"] == "soft_beam"
    assert read_settings(model)["optimization"]["lr"] == [1e-4]
    done = bash("train.sh", "finetuning/control", RUN=tmp_path / "other", MODEL="cnn")
    fails_with(done, "MODEL is lstm or transformer, got cnn")
    assert not list((tmp_path / "other").iterdir())  # what failed does not bind the next call


def test_fine_tuning_attends_as_its_checkpoint_does(tmp_path):
    settings = {"attention_relaxation": "soft_topk", "attention_top_k": 2, "attention_epsilon": 1.0}
    settings |= {"attention_score": "dot", "attention_epsilon_end": 0.5}
    for schedule, updates, epsilon in (("constant", 0, 1.0), ("linear", 10, 0.75)):
        model = {**settings, "attention_epsilon_schedule": schedule, "attention_epsilon_updates": updates}
        done = {"decoder.attention.relaxation._extra_state": torch.tensor(5.0)}
        torch.save({"cfg": {"model": model}, "model": done}, tmp_path / "model.pt")
        done = python("attention.py", tmp_path / "model.pt")
        expected = f"soft_topk --attention-top-k 2 --attention-epsilon {epsilon} --attention-cost-scale none"
        expected = f"--attention-relaxation {expected} --attention-score dot\n"
        assert done.stdout.decode() == expected, done.stderr
    del model["attention_score"]
    done = {f"decoder.layers.{i}.encoder_attn.relaxation._extra_state": torch.tensor(5.0) for i in range(2)}
    torch.save({"cfg": {"model": model}, "model": done}, tmp_path / "model.pt")
    done = python("attention.py", tmp_path / "model.pt")
    assert done.stdout.decode() == expected.replace(" --attention-score dot", ""), done.stderr
    (tmp_path / "model.pt").write_text("no checkpoint")
    settings = {"RUN": tmp_path / "run", "PRETRAINED": tmp_path / "model.pt"}
    done = bash("train.sh", "finetuning/control", **settings)
    assert done.returncode != 0 and "model.pt cannot be read" in done.stderr
    assert not list((tmp_path / "run").rglob("*.log"))
    torch.save({"cfg": {"model": Namespace(arch="lstm")}}, tmp_path / "model.pt")
    assert python("attention.py", tmp_path / "model.pt").stdout == b"--attention-relaxation softmax\n"


def the_data_are_complete(run):
    for split, size in zip(("train", "valid", "test"), SIZES.values(), strict=True):
        for kind in ("", "tok.", "bpe."):
            for lang in ("en", "de"):
                assert len(lines(run / "text" / f"{split}.{kind}{lang}")) == size
    assert lines(run / "data-bin" / "dict.en.txt") == lines(run / "data-bin" / "dict.de.txt")


def every_model_has_its_scores(run):
    for name in ("pretrained", "control/seed1", "soft_beam/seed1"):
        folder = run / "models" / "finetuning" / name
        assert (folder / "model.pt").exists()
        assert not list(folder.glob("checkpoint*.pt"))
        for split, size in (("valid-1", 20), ("valid-2", 20), ("test", 13)):
            assert len(lines(folder / f"{split}.txt")) == size
            assert not any("@@" in line for line in lines(folder / f"{split}.txt"))
        valid = {lenpen: bleu(folder / f"valid-{lenpen}.txt.bleu.json") for lenpen in "12"}
        chosen = (folder / "lenpen").read_text().strip()
        assert valid[chosen]["score"] == max(score["score"] for score in valid.values())
        assert f"'lenpen': {chosen}.0" in (folder / "test.txt.log").read_text()


def gradients_are_compared(run):
    command = [sys.executable, str(RECIPE / "gradients.py"), str(run / "data-bin")]
    command += [str(run / "models/finetuning/pretrained/model.pt"), "--batches", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {
        row[1]: row[2:-1]
        for row in ([*map(str.strip, line.split("|"))] for line in done.stdout.splitlines()[2:])
    }
    systems = [line.split()[0] for line in lines(RECIPE / "finetuning.txt") if line and line[0] != "#"]
    assert [name for name in rows if name not in ("system", "---", "teacher forcing")] == systems[1:]
    for name in systems[1:]:
        median, largest, mean, smallest = map(float, rows[name])
        assert 0 < median <= largest and -1 <= smallest <= mean <= 1
    assert rows["gold"] != rows["soft_beam"]


def bleu(path):
    return json.loads(path.read_text())


def the_tables_say_what_the_scores_say(run, printed):
    with (run / "models" / "finetuning" / "results.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(row["system"], row["seed"]) for row in rows] == [
        ("pretrained", "1"),
        ("control", "1"),
        ("soft_beam", "1"),
    ]
    assert [row["updates"] for row in rows[1:]] == ["3", "3"]
    for row in rows:
        folder = (
            run
            / "models"
            / "finetuning"
            / (row["system"] + ("" if row["system"] == "pretrained" else "/seed1"))
        )
        test = bleu(folder / "test.txt.bleu.json")
        assert float(row["test_bleu"]) == pytest.approx(test["score"], abs=0.006)
        at_1 = bleu(folder / "test-1.txt.bleu.json")["score"]
        assert float(row["test_bleu_at_lenpen_1"]) == pytest.approx(at_1, abs=0.006)
        assert test["verbose_score"].startswith(f"{row['test_precisions']} (BP = {row['test_bp']}")
    for name in ("p_value", "p_value_at_lenpen_1"):
        assert [row[name] != "" for row in rows] == [False, False, True]
    table = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in table[2:]] == ["pretrained", "control", "soft_beam"]
    assert "`BLEU|nrefs:1|case:lc|eff:no|tok:none|smooth:exp|version:" in printed
    assert (run / "models" / "finetuning" / "results.md").read_text() in printed


def a_second_run_does_nothing(run, settings):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.*") if path.stem != "results"}
    done = bash("run.sh", "--small", **settings)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("-- ")]
    assert len(steps) >= 15
    assert all(line.endswith(": done before") for line in steps)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.*") if path.stem != "results"}


def other_settings_are_refused(run, settings):
    done = bash("run.sh", "--small", **{**settings, "BPE_MERGES": 100})
    fails_with(done, "was made with other settings (BPE_MERGES=200 TRAIN_PAIRS=200")
    data = {"RUN": run, "BPE_MERGES": 200, "TRAIN_PAIRS": 200, "HELD_OUT": 20}
    done = bash("evaluate.sh", "finetuning/control/seed1", **data, LENPENS="1 3")
    fails_with(done, "was made with other settings (LENPENS=1 2)")
    small = {"RUN": run, "BPE_MERGES": 200, "TRAIN_PAIRS": 200, "HELD_OUT": 20, "LENPENS": "1 2"}
    done = bash("train.sh", "finetuning/control/seed1", "--teacher-forcing-ratio", "0.5", "--seed", 1, **small)
    fails_with(done, "control/seed1 was trained with other options")
    done = bash("train.sh", "finetuning/bad", "--soft-beam-epsilon", -1, **small)
    fails_with(done, "--soft-beam-epsilon must be positive and finite, got -1.0 (see ")
    assert not (run / "models" / "finetuning" / "bad" / "model.pt").exists()


def what_is_fine_tuned_is_known_by_its_contents(run, settings):
    models = run / "models" / "finetuning"
    small = {name: value for name, value in settings.items() if name != "SYSTEMS"}
    small |= {"BPE_MERGES": 200, "TRAIN_PAIRS": 200, "HELD_OUT": 20, "EPOCHS": 2, "UPDATES": 3}
    command = ["train.sh", "finetuning/control/seed1", "--teacher-forcing-ratio", "1", "--seed", 1]
    shutil.copy(models / "pretrained" / "model.pt", run / "copy.pt")
    done = bash(*command, **small, PRETRAINED=run / "copy.pt")
    assert done.returncode == 0 and done.stdout.rstrip().endswith("done before"), done.stderr
    done = bash(*command, **small, PRETRAINED=models / "soft_beam" / "seed1" / "model.pt")
    fails_with(done, "control/seed1 was trained with other options")

    control = models / "control" / "seed1"
    options = (control / "options").read_text()
    (control / "options").unlink()
    fails_with(
        bash(*command, **small), "control/seed1 has a model, but not the file options: remove the folder"
    )
    (control / "options").write_text(re.sub(" from .*", " from another", options))
    done = bash("run.sh", "--small", **settings | {"SYSTEMS": "soft_beam"})
    assert done.returncode != 0
    assert "soft_beam/seed1 was not fine-tuned from the same checkpoint as control/seed1" in done.stderr
    (control / "options").write_text(options)
    (control / "test.txt").touch()
    control.rename(models / "kept")
    done = bash("run.sh", "--small", **settings | {"SYSTEMS": "soft_beam"})
    assert "run.sh: soft_beam/seed1 has no control/seed1 to compare with" in done.stderr
    (models / "kept").rename(control)
    done = bash("run.sh", "--small", **settings | {"SYSTEMS": "soft_beam"})
    assert "-- compare soft_beam/seed1/test.txt with that of control/seed1" in done.stdout, done.stderr


def an_unfinished_system_does_not_keep_the_others_from_the_table(run, settings):
    unfinished = run / "models" / "finetuning" / "hard" / "seed1"
    unfinished.mkdir(parents=True)
    (unfinished / "options").write_text("others\n")
    done = bash("run.sh", "--small", **settings | {"SYSTEMS": "control hard soft_beam"})
    shutil.rmtree(unfinished.parent)
    assert done.returncode != 0 and "not all systems are finished" in done.stderr.splitlines()[-1]
    assert "hard/seed1 was trained with other options" in done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("| ")][2:] == [
        "pretrained", "control", "soft_beam"
    ]  # fmt: skip


def dropped_sentences_are_noticed(run):
    small = {"RUN": run, "BPE_MERGES": 200, "TRAIN_PAIRS": 200, "HELD_OUT": 20, "LENPENS": "1 2"}
    model, out = run / "models" / "finetuning" / "control" / "seed1" / "model.pt", run / "dropped.txt"
    done = bash("generate.sh", model, "test", out, "--required-batch-size-multiple", 8, **small)
    if "fairseq" in {package.metadata["Name"] for package in distributions()}:  # stock fairseq drops nothing
        assert done.returncode == 0, done.stderr
    else:
        fails_with(done, "8 translations of 13 sentences")
        assert not out.exists()


def hydra_does_the_same(run, folder):
    overrides = [
        f"task.data={run}/data-bin",
        f"common.user_dir={ROOT}/fairseq_softtopk",
        f"checkpoint.finetune_from_model={run}/models/finetuning/pretrained/model.pt",
        f"checkpoint.save_dir={folder}/hydra",
        "optimization.max_update=3",
    ]
    command = ["fairseq-hydra-train", "--config-dir", str(RECIPE), "--config-name", "soft_beam", *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "hydra" / "checkpoint_last.pt").exists()
    trained, by_hydra = (
        read_settings(run / "models/finetuning/soft_beam/seed1/model.pt"),
        read_settings(folder / "hydra/checkpoint_last.pt"),
    )
    for part in ("criterion", "optimizer", "lr_scheduler"):
        assert by_hydra[part] == trained[part]
    for part, names in {
        "optimization": ("lr", "clip_norm", "update_freq", "sentence_avg"),
        "dataset": ("max_tokens", "required_batch_size_multiple", "disable_validation"),
        "model": ("dropout", "encoder_hidden_size", "encoder_bidirectional", "attention_relaxation"),
    }.items():
        for name in names:
            assert by_hydra[part][name] == trained[part][name], name


def read_settings(checkpoint):
    from fairseq.checkpoint_utils import load_checkpoint_to_cpu

    import fairseq_softtopk.plugin  # noqa: F401  (says which classes a checkpoint may contain)

    cfg = load_checkpoint_to_cpu(str(checkpoint))["cfg"]
    return {part: vars(cfg[part]) if isinstance(cfg[part], Namespace) else cfg[part] for part in cfg}


# ------------------------------------------------------------------------------------------- bad input


def test_a_missing_file_is_named(copied, tmp_path):
    (copied / "val.de").unlink()
    done = bash("run.sh", "--small", MULTI30K=copied, RUN=tmp_path / "run")
    fails_with(done, f"MULTI30K={copied} has neither val.de.gz nor val.de")
    assert not (tmp_path / "run" / "raw").exists()


def test_files_of_different_length_are_named(copied, tmp_path):
    (copied / "test_2016_flickr.de").write_text("Nur ein Satz.\n")
    done = bash("run.sh", "--small", MULTI30K=copied, RUN=tmp_path / "run")
    fails_with(done, "test_2016_flickr.en has 13 lines but test_2016_flickr.de has 1")
    assert not (tmp_path / "run" / "raw").exists()


def test_an_empty_file_is_named(copied, tmp_path):
    for lang in ("en", "de"):
        (copied / f"train.{lang}").write_text("")
    fails_with(bash("prepare.sh", MULTI30K=copied, RUN=tmp_path / "run"), "train.en is empty")


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "message"),
    [
        ("run.sh", ["--smal"], {}, "run.sh: no experiment --smal, only finetuning, attention"),
        (
            "run.sh",
            ["--small"],
            {"SYSTEMS": "control hrad"},
            "run.sh: no system hrad in finetuning.txt, only control ",
        ),
        ("prepare.sh", [], {"BPE_MERGES": "many"}, "BPE_MERGES must be a whole number, 0 for words, got many"),
        ("prepare.sh", ["now"], {}, "prepare.sh: takes no arguments, got now"),
        ("train.sh", [], {}, "train.sh: which model? see --help"),
        (
            "train.sh",
            ["--seed", "1"],
            {},
            "the first argument is finetuning/NAME, attention/NAME or attention_paper/NAME, got --s",
        ),
        (
            "train.sh",
            ["finetuning/control"],
            {},
            "models/finetuning/pretrained/model.pt, which is not there: bash train.sh finetuning/pretrained",
        ),
        ("generate.sh", ["no.pt", "test", "out"], {}, "generate.sh: no.pt is not there"),
        ("score.sh", ["out"], {}, "wants hypotheses and a split, see --help"),
        (
            "evaluate.sh",
            ["attention/softmax"],
            {},
            "models/attention/softmax/model.pt is not there: bash train.sh attention/softmax",
        ),
    ],
)
def test_bad_arguments_end_in_one_line(script, arguments, settings, message, tmp_path):
    fails_with(bash(script, *arguments, RUN=tmp_path / "run", **settings), message)


TRAIN = """#!/usr/bin/env bash
touch "$RUN/started"
while [ ! -e "$RUN/go" ]; do sleep 0.1; done
while [ "$1" != --save-dir ]; do shift; done
touch "$2/checkpoint_best.pt"
"""


def test_a_folder_is_not_trained_twice_at_a_time_and_other_data_are_told_of_the_schedule(tmp_path):
    run, stub = tmp_path / "run", tmp_path / "stubs" / "fairseq-train"
    stub.parent.mkdir()
    stub.write_text(TRAIN)
    stub.chmod(0o755)
    settings = {"RUN": run, "TRAIN_PAIRS": 100, "PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(RECIPE / "train.sh"), "attention/softmax"]
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        while not (run / "started").exists():
            time.sleep(0.1)
            assert first.poll() is None
        fails_with(
            bash("train.sh", "attention/softmax", **settings), "softmax is being worked on by another process"
        )
        (run / "go").touch()
        assert "the learning rate is 0 after 5240 updates" in first.communicate(timeout=60)[0]
    assert first.returncode == 0
    done = bash("train.sh", "attention/softmax", **settings)
    assert done.returncode == 0 and done.stdout == "-- train attention/softmax: done before\n"


STUB = """#!/usr/bin/env bash
while [ $1 != --destdir ]; do shift; done
touch $2/half
echo broken on purpose >&2
exit 7
"""


def test_a_step_that_failed_is_run_again_and_words_need_no_bpe(copied, tmp_path):
    run, stub = tmp_path / "run", tmp_path / "stubs" / "fairseq-preprocess"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    settings = {"MULTI30K": copied, "RUN": run, "BPE_MERGES": 0}
    done = bash("prepare.sh", **settings, PATH=f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    fails_with(done, "prepare.sh: fairseq-preprocess: broken on purpose (see ")
    assert "scores do not compare with others'" in done.stdout
    assert not (run / "data-bin").exists()

    done = bash("prepare.sh", **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["-- raw: done before", "-- text: done before", "-- data-bin"]
    assert not (run / "data-bin" / "half").exists()
    words = {word for line in lines(run / "text" / "train.tok.de") for word in line.split()}
    entries = {line.split()[0] for line in lines(run / "data-bin" / "dict.de.txt")}
    assert {entry for entry in entries if not entry.startswith("madeupword")} == words


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, tmp_path):
    done = bash(script, "--help", RUN=tmp_path / "run")
    assert done.returncode == 0
    assert f"bash {script}" in done.stdout
    assert "set -euo" not in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("experiment", "control"), [("finetuning", "control"), ("attention", "softmax")])
def test_every_system_is_a_name_and_options_that_fairseq_knows(experiment, control):
    text = lines(RECIPE / f"{experiment}.txt")
    systems = [line.split(maxsplit=1) for line in text if line and line[0] != "#"]
    names = [system[0] for system in systems]
    assert names[0] == control
    assert len(names) == len(set(names))
    given = [shlex.split(system[1]) if len(system) > 1 else [] for system in systems]
    shared = f"data --user-dir {ROOT}/fairseq_softtopk --arch topk_attention_tiny --criterion soft_beam".split()
    parse = (
        "from fairseq import options\n"
        f"for given in {given!r}:\n"
        f"    options.parse_args_and_arch(options.get_training_parser(), {shared!r} + given)\n"
    )
    done = subprocess.run([sys.executable, "-c", parse], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]


# ---------------------------------------------------------------------------------- tokens, BLEU, table


def python(script, *arguments, text=b""):
    command = [sys.executable, str(RECIPE / script), *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, timeout=60)


def test_tokens_are_split_at_hyphens_lower_cased_and_not_escaped():
    text = 'It\'s a well-known "Test" & <more> | Äpfel.\n\nA\rB\u2028C\n'
    done = python("moses.py", "tokenize", "en", text=text.encode())
    assert done.stdout.decode() == 'it \'s a well @-@ known " test " & < more > | äpfel .\n\na b c\n'
    back = python("moses.py", "detokenize", "de", text=b"ein gut @-@ bekannter &amp; hund , ja .\n")
    assert back.stdout == b"ein gut-bekannter &amp; hund, ja.\n"


def corpus_bleu(hypotheses, references):
    """BLEU as Papineni et al. (2002) and Moses' multi-bleu.perl define it, with one reference."""
    matched, proposed = Counter(), Counter()
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for n in range(1, 5):
            ours, theirs = (
                Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
                for words in (hypothesis.lower().split(), reference.lower().split())
            )
            matched[n] += sum((ours & theirs).values())
            proposed[n] += sum(ours.values())
    ratio = sum(len(line.split()) for line in references) / proposed[1]
    logs = [math.log(matched[n] / proposed[n]) for n in range(1, 5)]
    return 100 * math.exp(min(0, 1 - ratio) + sum(logs) / 4)


@pytest.mark.parametrize("kept", [0.95, 1.0])
def test_the_score_is_the_bleu_of_multi_bleu(multi30k, tmp_path, kept):
    rng = random.Random(1)
    references = gzip.decompress((multi30k / "train.de.gz").read_bytes()).decode().lower().splitlines()
    vocabulary = " ".join(references).split()

    def spoil(word):
        return rng.choice([word] * 6 + [rng.choice(vocabulary)])

    hypotheses = [" ".join(spoil(word) for word in line.split() if rng.random() < kept) for line in references]
    text = tmp_path / "run" / "text"
    text.mkdir(parents=True)
    for name in ("test.de", "test.tok.de"):
        (text / name).write_text("\n".join(references) + "\n")
    (tmp_path / "hypotheses").write_text("\n".join(hypotheses) + "\n")
    done = bash("score.sh", tmp_path / "hypotheses", "test", RUN=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    score = bleu(tmp_path / "hypotheses.bleu.json")
    assert 30 < score["score"] < 90
    assert score["score"] == pytest.approx(corpus_bleu(hypotheses, references), abs=0.006)
    assert (kept < 1) == ("(BP = 0." in score["verbose_score"])
    assert bleu(tmp_path / "hypotheses.detok.json")["signature"].startswith("nrefs:1|case:lc|eff:no|tok:13a")


def write_scores(folder, valid, test, paired=None):
    def write(name, score):
        words = {
            "score": score,
            "signature": "nrefs:1|tok:none",
            "verbose_score": f"{score}/40.0/30.0/20.0 (BP = 0.9{int(score)} ratio = 0.9)",
        }
        (folder / name).write_text(json.dumps(words))

    folder.mkdir(parents=True)
    for lenpen, score in valid.items():
        write(f"valid-{lenpen}.txt.bleu.json", score)
    for kind in ("bleu", "detok"):
        write(f"test.txt.{kind}.json", test)
    write("test-1.txt.bleu.json", test + 0.5)
    if paired:
        for name, control, p in (("test", 34.0, paired), ("test-1", 34.25, paired / 10)):
            scores = [{"score": control, "p_value": None}, {"score": test, "p_value": p}]
            (folder / f"{name}.paired.json").write_text(json.dumps([{"BLEU": score} for score in scores]))
    texts = {"lenpen": "1.5\n", "seconds": "1800\n1800\n", "commit": "abc1234\n", "options": "--lr 1\n"}
    texts["train.log"] = "x - loss=3, num_updates=75, lr=1\ny | num_updates 80 | lr 1\n"
    for name, text in texts.items():
        (folder / name).write_text(text)


def test_the_length_penalty_with_the_best_validation_score_is_chosen(tmp_path):
    write_scores(tmp_path / "model", {"2.5": 31.0, "0.5": 30.0, "1": 33.0, "1.5": 33.0, "2": 32.0}, 34.0)
    assert python("table.py", "choose", tmp_path / "model").stdout == b"1\n"
    assert b"has no valid-LENPEN.txt.bleu.json" in python("table.py", "choose", tmp_path).stderr


GENERATE = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case $* in *"--lenpen 1.5"*) cut=99 ;; *) cut=4 ;; esac
while [ "$1" != --gen-subset ]; do shift; done
split=$2
while [ "$1" != --results-path ]; do shift; done
mkdir "$2"
cut -d ' ' -f 1-$cut "$RUN/text/$split.tok.de" | awk '{ print "D-" NR - 1 "\\t-1\\t" $0 }' |
  sort -r > "$2/generate-$split.txt"
"""


def test_the_test_set_is_translated_with_what_is_best_on_validation_and_with_1(tmp_path):
    run, stub = tmp_path / "run", tmp_path / "stubs" / "fairseq-generate"
    for folder in (run / "text", run / "models" / "finetuning" / "control", stub.parent):
        folder.mkdir(parents=True)
    (run / "models" / "finetuning" / "control" / "model.pt").write_text("")
    for name in ("valid.de", "valid.tok.de", "test.de", "test.tok.de"):
        (run / "text" / name).write_text("ein mann mit einem hut steht dort .\n" * 11)
    stub.write_text(GENERATE)
    stub.chmod(0o755)
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    done = bash(
        "evaluate.sh", "finetuning/control", RUN=run, PATH=path, CALLS=tmp_path / "calls", LENPENS="1 1.5 2"
    )
    assert done.returncode == 0, done.stderr
    assert (run / "models" / "finetuning" / "control" / "lenpen").read_text() == "1.5\n"
    words = [line.split() for line in lines(tmp_path / "calls")]
    calls = [(line[line.index("--gen-subset") + 1], line[line.index("--lenpen") + 1]) for line in words]
    assert calls == [("valid", "1"), ("valid", "1.5"), ("valid", "2"), ("test", "1.5"), ("test", "1")]
    assert bleu(run / "models" / "finetuning" / "control" / "test.txt.bleu.json")["score"] == 100
    assert bleu(run / "models" / "finetuning" / "control" / "test-1.txt.bleu.json")["score"] < 50


def test_the_table_has_mean_and_spread_and_leaves_out_what_is_not_finished(tmp_path):
    models = tmp_path
    for seed in (1, 2):
        write_scores(models / "control" / f"seed{seed}", {"1": 32.0, "1.5": 33.0}, 34.0)
        write_scores(models / "beam" / f"seed{seed}", {"1": 32.0, "1.5": 33.0}, 34.0 + seed, 0.25 / seed)
    (models / "beam" / "seed3").mkdir()
    (models / "beam" / "seed3" / "options").write_text("--lr 1\n")
    done = python("table.py", "write", tmp_path)
    assert done.stderr == b"table.py: beam/seed3 is not finished: left out\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.decode().splitlines()[:4]]
    assert rows[0][:4] == ["system", "seeds", "updates", "length penalty"]
    assert rows[2][:6] == [
        "control",
        "1 2",
        "80",
        "1.5 1.5",
        "33.00 (33.00 to 33.00)",
        "34.00 (34.00 to 34.00)",
    ]
    assert rows[3] == [
        "beam", "1 2", "80", "1.5 1.5", "33.00 (33.00 to 33.00)",
        "35.50 (35.00 to 36.00)", "+1.50 (+1.00 to +2.00)", "0.250 0.125",
        "36.00 (35.50 to 36.50)", "+1.25 (+0.75 to +1.75)", "0.025 0.013",
        "0.935 (0.935 to 0.936)", "0.932 (0.932 to 0.932)", "35.5/40.0/30.0/20.0",
        "35.50 (35.00 to 36.00)", "1.00 (1.00 to 1.00)",
    ]  # fmt: skip
    assert len((tmp_path / "results.tsv").read_text().splitlines()) == 5


def test_a_p_value_that_is_not_known_keeps_its_seed(tmp_path):
    for seed in (1, 2):
        write_scores(tmp_path / "control" / f"seed{seed}", {"1": 32.0, "1.5": 33.0}, 34.0)
        write_scores(tmp_path / "beam" / f"seed{seed}", {"1": 32.0, "1.5": 33.0}, 35.0, [None, 0.25][seed - 1])
    row = python("table.py", "write", tmp_path).stdout.decode().splitlines()[3].split("|")
    assert row[2].strip() == "1 2" and row[8].strip() == "- 0.250"


def test_scores_of_different_kinds_are_not_tabulated(tmp_path):
    for name, kind in (("a", "none"), ("b", "13a")):
        folder = tmp_path / name / "seed1"
        write_scores(folder, {"1": 32.0, "1.5": 33.0}, 34.0)
        path = folder / "test.txt.bleu.json"
        path.write_text(path.read_text().replace("tok:none", f"tok:{kind}"))
    done = python("table.py", "write", tmp_path)
    assert done.returncode != 0
    assert b"the systems were scored differently: BLEU|nrefs:1|tok:13a, BLEU|nrefs:1|tok:none" in done.stderr
