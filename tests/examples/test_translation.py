"""The recipes at full size, ``examples/translation`` and those built on it, on a corpus of 600 pairs."""

import ast
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fairseq.optim.lr_scheduler.manual_lr_scheduler import ManualSchedule
from fairseq.optim.sgd import SGD
from sacrebleu import corpus_bleu
from sacrebleu.dataset import DATASETS
from sacremoses import MosesTokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SMALL = {
    "DEVICE": "cpu", "PROCESSES": 2, "WORKERS": 2, "HELD_OUT": 20, "MERGES": 300, "SHARD": 230, "UPDATES": 6,
    "FINETUNE_UPDATES": 2, "AVERAGE": 2,
}  # fmt: skip
TRAIN_PAIRS = 600


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Sentence pairs, 600 for training."""
    folder = tmp_path_factory.mktemp("text")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "write_corpus.py"),
        "--target",
        "de",
        "--out",
        str(folder),
    ]
    subprocess.run(
        [*command, "--train", str(TRAIN_PAIRS), "--valid", "20", "--test", "15"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return folder


@pytest.fixture
def data(text, tmp_path):
    """Its training pairs alone, to be spoilt."""
    folder = tmp_path / "data"
    folder.mkdir()
    for language in ("en", "de"):
        (folder / f"train.{language}").write_bytes((text / f"train.{language}").read_bytes())
    return folder


def bash(recipe, script, *arguments, **settings):
    return subprocess.run(
        ["bash", str(EXAMPLES / recipe / script), *map(str, arguments)],
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def prepared(data, run, recipe="wmt16_en_de", **settings):
    done = bash(recipe, "prepare.sh", DATA=data, RUN=run, **{**SMALL, **settings})
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails_with(done, message):
    assert done.returncode != 0
    assert message in done.stderr, done.stderr


def lines(path):
    return path.read_text().splitlines()


def squeezed(sentence):
    return "".join(sentence.split()).lower()


# ------------------------------------------------------------------------------------------ end to end


def corpus(text, tmp_path):
    """The folder in the variable WMT_SAMPLE, or the corpus above with what tokenised corpora contain."""
    if "WMT_SAMPLE" in os.environ:
        return Path(os.environ["WMT_SAMPLE"]), {"HELD_OUT": 100, "MERGES": 1000, "SHARD": 4000}
    folder = tmp_path / "data"
    folder.mkdir()
    for language in ("en", "de"):
        sentences = lines(text / f"train.{language}")
        sentences[5] = "Parliament &apos;s &quot; vote &quot; &amp; more &#91; sic &#93; ."
        sentences[7] = ""
        sentences[9] = "word " * 60
        sentences[11:14] = [sentences[0]] * 3  # the first pair is held out
        with gzip.open(folder / f"train.{language}.gz", "wt") as file:
            file.write("".join(f"{sentence}\n" for sentence in sentences))
    return folder, {}


def test_from_a_corpus_to_a_table(text, tmp_path):
    data, sizes = corpus(text, tmp_path)
    run, settings = tmp_path / "run", {**SMALL, **sizes}
    done = bash("wmt16_en_de", "run.sh", "--small", DATA=data, RUN=run, TOKENIZED=1, **settings)
    assert done.returncode == 0, done.stderr

    # Shards: each is a sample of everything.
    shards = sorted(path.stem for path in (run / "shards").glob("*.en"))
    assert len(shards) >= 3
    for language in ("en", "de"):
        everything = lines(run / "raw" / f"train.{language}")
        for i, shard in enumerate(shards):
            assert lines(run / "shards" / f"{shard}.{language}") == everything[i :: len(shards)]

    # Text: nothing of the held-out sets is trained on, and entities are what they stand for.
    held_out = set()
    for language in ("en", "de"):
        for split in ("valid", "test"):
            assert len(lines(run / "raw" / f"{split}.{language}")) == settings["HELD_OUT"]
            held_out |= set(map(squeezed, lines(run / "raw" / f"{split}.{language}")))
        train = [line for shard in shards for line in lines(run / "tokens" / f"{shard}.{language}")]
        assert train and not held_out & set(map(squeezed, train))
        assert not re.search(r"&(amp|apos|quot|#\d+);", "\n".join(train))
        assert all(0 < len(line.split()) <= 50 for line in train)
    counts = {what: int(number) for number, what in re.findall(r"^   (\d+) (.+)$", done.stdout, re.MULTILINE)}
    assert counts["kept"] == len(train)
    assert counts["held out"] > 0 and counts["too long"] > 0 and counts["empty"] > 0

    # Binary data: one dictionary for all shards, of the size that was asked for.
    dictionaries = {path.read_text() for path in (run / "data-bin").glob("*/dict.*.txt")}
    assert len(dictionaries) == 1
    symbols = {line.split(" ")[0] for line in dictionaries.pop().splitlines()}
    characters = {character for line in train for character in line}
    assert settings["MERGES"] * 0.5 < len(symbols) < settings["MERGES"] + 4 * len(characters)

    # Models: the mean of the last checkpoints.
    folder = run / "models" / "soft_beam"
    last = sorted(folder.glob("checkpoint_*_*.pt"), key=lambda path: int(path.stem.split("_")[-1]))
    model, *both = (torch.load(path, weights_only=True)["model"] for path in (folder / "model.pt", *last[-2:]))
    assert len(both) == 2
    moved = 0.0
    for name, value in model.items():
        if not value.is_floating_point():  # a count
            assert value.equal(both[1][name])
            continue
        torch.testing.assert_close(value, (both[0][name] + both[1][name]) / 2)
        moved += (both[0][name] - both[1][name]).abs().sum().item()
    assert moved > 0

    # Scores.
    for name in ("pretrained", "control", "soft_beam"):
        assert f"\n| {name} | " in done.stdout
        bleu, _ = json.loads((run / "models" / name / "scores.json").read_text())
        assert "tok:13a" in bleu["signature"] and "version:" in bleu["signature"]
        assert len(lines(run / "models" / name / "test.txt")) == settings["HELD_OUT"]

    again = bash("wmt16_en_de", "run.sh", "--small", DATA=data, RUN=run, TOKENIZED=1, **settings)
    assert again.returncode == 0, again.stderr
    assert "done before" in again.stdout and again.stdout.splitlines()[-5:] == done.stdout.splitlines()[-5:]
    other = bash("wmt16_en_de", "run.sh", "--small", RUN=run, **{**settings, "MERGES": 77})
    fails_with(other, "was made with other settings")
    other = bash(
        "wmt16_en_de", "run.sh", "--small", DATA=data, RUN=run, TOKENIZED=1, **settings, SCHEDULE="paper"
    )
    fails_with(other, "models/pretrained was trained with other options")


def test_sentencepiece_finds_the_pieces_of_plain_text(data, tmp_path):
    run = tmp_path / "run"
    prepared(data, run, "iwslt14_de_en", SEGMENTER="sentencepiece", MERGES=400)
    pieces = lines(run / "pieces" / "0000.de")
    assert any("\N{LOWER ONE EIGHTH BLOCK}" in line for line in pieces)
    joined = ["".join(line.split()).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").strip() for line in pieces]
    assert joined == [" ".join(line.split()) for line in lines(run / "tokens" / "0000.de")]
    assert all(line == line.lower() for line in joined)


def test_the_papers_schedule_in_one_process(data, tmp_path):
    run = tmp_path / "run"
    prepared(data, run)
    settings = {**SMALL, "RUN": run, "SMALL": 1, "SCHEDULE": "paper", "PROCESSES": 1, "UPDATE_FREQ": 2}
    for name in ("pretrained", "soft_beam"):
        done = bash("wmt16_en_de", "train.sh", name, **settings)
        assert done.returncode == 0, done.stderr
        log = (run / "models" / name / "train.log").read_text()
        updates = 6 if name == "pretrained" else 2
        rate = 1.0 if name == "pretrained" else 0.05
        found = re.findall(rf"train \| .*num_updates {updates} \| lr ([\d.e-]+) ", log)
        assert found and float(found[-1]) == rate
        sizes = re.findall(r"bsz=([\d.]+)", log) or re.findall(r"bsz ([\d.]+)", log)
        assert sizes and all(float(size) <= 80 for size in sizes) and max(map(float, sizes)) > 60
    assert "teacher_forcing_loss" in log and "soft_beam_loss" in log

    # A million updates: the rate falls to a tenth every 100,000 from 500,000 on.
    steps = ast.literal_eval(
        re.search(r"--update2lr (\{.*?\})", (run / "models/pretrained/options").read_text())[1]
    )
    optimizer = SGD(Namespace(lr=[1.0], momentum=0.0, weight_decay=0.0), [torch.zeros(1, requires_grad=True)])
    schedule = ManualSchedule(Namespace(lr=[1.0], epoch2lr="{}", update2lr=str(steps)), optimizer)
    for updates, rate in ((499_999, 1), (500_000, 0.1), (599_999, 0.1), (600_000, 0.01), (999_999, 1e-5)):
        assert schedule.step_update(updates) == rate == schedule.step_begin_epoch(9)

    # Another pre-trained model is another start.
    (run / "models" / "pretrained" / "model.pt").write_bytes(b"another")
    done = bash("wmt16_en_de", "train.sh", "soft_beam", **settings)
    fails_with(done, "models/soft_beam was trained with other options, or from another model")


def test_the_shares_of_a_batch_are_whole(tmp_path):
    settings = {"RUN": tmp_path, "SCHEDULE": "paper", "PROCESSES": 3}
    fails_with(bash("wmt14_en_fr", "train.sh", "pretrained", **settings), "a batch of 80 cannot be shared by 3")


def test_the_error_of_a_process_is_shown(data, tmp_path):
    prepared(data, tmp_path / "run")
    settings = {**SMALL, "RUN": tmp_path / "run", "BATCH": 800, "UPDATE_FREQ": 1}
    done = bash("wmt16_en_de", "train.sh", "pretrained", "--patience", "much", **settings)
    fails_with(done, "argument --patience: invalid int value: 'much' (see")
    done = bash("wmt16_en_de", "train.sh", "pretrained", **{**settings, "BATCH": 16})
    fails_with(done, "a process takes batches of 8 tokens, less than the longest sentence has, ")


def test_the_error_is_of_this_start_and_not_of_the_one_before(tmp_path):
    log = tmp_path / "log"
    log.write_text("ValueError: of yesterday\n")
    for command, message in (
        ("bash -c 'echo one; echo two; exit 3'", "bash: two (see"),
        ("bash -c 'echo KeyError: today; echo two; exit 3'", "bash: KeyError: today (see"),
        ("bash -c 'echo two; echo ====; exit 3'", "bash: two (see"),  # as torchrun ends
        ("bash -c 'kill -9 $$'", "bash:  (see"),
    ):
        script = f'source "{EXAMPLES}/functions.sh"; logged "{log}" {command}'
        fails_with(subprocess.run(["bash", "-c", script], capture_output=True, text=True), message)


def test_bpe_that_cannot_be_written_ends_preparation(text, tmp_path):
    script = f'source "{EXAMPLES}/functions.sh"; learn_bpe 50 "$0" "{tmp_path}/log" < "{text}/train.en"'
    done = subprocess.run(["bash", "-c", script, "/dev/full"], capture_output=True, text=True)
    fails_with(done, "No space left on device")
    subprocess.run(["bash", "-c", script, str(tmp_path / "codes")], check=True)
    assert len(lines(tmp_path / "codes")) == 51


SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") printf 'localhost\\nlocalhost\\n' ;;
  "show job") echo "   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=${PREEMPTED:-None}" ;;
  *) echo "$*" >> "$CALLS" ;;
esac
"""
# One task a node; ends all with the first that fails, which is what --kill-on-bad-exit does.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
[ -z "${HANG:-}" ] || { touch "$HANG" && exec sleep 600; }
while [[ $1 == --* ]]; do shift; done
trap 'kill $(jobs -p) 2> /dev/null' EXIT
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & done
for ((node = 0; node < SLURM_NNODES; node++)); do wait -n; done
"""


def is_free(port):
    with socket.socket() as one:
        return one.connect_ex(("localhost", port)) != 0


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job on two machines of one GPU, which are this one; ``calls`` has what it calls."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, script in (("scontrol", SCONTROL), ("srun", SRUN)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    job = next(number for number in range(os.getpid() % 10000, 20000) if is_free(20000 + number))
    return {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"),
        "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_ON_NODE": "1",
        "SLURM_JOB_NODELIST": "localhost,localhost", "SLURM_JOB_ID": str(job),
    }  # fmt: skip


def test_a_job_on_two_machines_trains_one_model(data, tmp_path, slurm):
    run = tmp_path / "run"
    prepared(data, run)
    settings = {**SMALL, "RUN": run, "SMALL": 1, "BATCH": 800, "UPDATE_FREQ": 1}
    del settings["PROCESSES"]
    script, recipe = EXAMPLES / "translation" / "slurm.sh", EXAMPLES / "wmt16_en_de"
    done = subprocess.run(
        ["bash", script, recipe, "pretrained", "--no-save-optimizer-state"],
        env={**slurm, **{name: str(value) for name, value in settings.items()}},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = run / "models" / "pretrained"
    assert (folder / "model.pt").is_file()
    options = (folder / "options").read_text()
    assert "--max-tokens 400 " in options and "--no-save-optimizer-state; 2 x 1 such batches" in options
    for name, rank in (("train.log", 0), ("train-1.log", 1)):
        assert f"initialized host {socket.gethostname()} as rank {rank}" in (folder / name).read_text()
    assert (tmp_path / "slurm" / "calls").read_text().startswith("srun --kill-on-bad-exit=1 --cpus-per-task=1 ")


def test_a_job_that_is_out_of_time_is_queued_again(tmp_path, slurm):
    started = tmp_path / "started"
    command = ["bash", EXAMPLES / "translation" / "slurm.sh", EXAMPLES / "wmt16_en_de", "pretrained"]
    with subprocess.Popen(command, env={**slurm, "HANG": str(started)}, start_new_session=True) as job:
        try:
            deadline = time.monotonic() + 30
            while not started.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert started.exists()
            job.send_signal(signal.SIGUSR1)
            job.wait(timeout=30)
        finally:
            os.killpg(job.pid, signal.SIGKILL)
    assert f"requeue {slurm['SLURM_JOB_ID']}\n" in (tmp_path / "slurm" / "calls").read_text()


@pytest.mark.parametrize(("preempted", "status"), [("None", 1), ("2026-01-01T00:00:00", 0)])
def test_a_job_that_fails_is_queued_again_if_it_is_pre_empted(tmp_path, slurm, preempted, status):
    """Its tasks have got SIGTERM, the job's own script has not."""
    command = ["bash", EXAMPLES / "translation" / "slurm.sh", EXAMPLES / "wmt16_en_de", "none of the models"]
    done = subprocess.run(command, env={**slurm, "PREEMPTED": preempted}, capture_output=True, timeout=60)
    assert done.returncode == status
    calls = (tmp_path / "slurm" / "calls").read_text()
    assert (f"requeue {slurm['SLURM_JOB_ID']}\n" in calls) == (status == 0)


def test_references_come_back_as_they_were(tmp_path):
    """What a perfect model would write has a BLEU of 100."""
    text = {
        "de": ["\u201eWir haben 100\u00a0000 Euro \u2013 mindestens\u201c, sagte Merkel.",
               "\u201eDas ist gut.\u201c Dann ging er."],
        "fr": ["\u00ab tr\u00e8s content \u00bb \u2014 a dit l'homme d'\u00c9tat en 2014.",
               "Qu'est-ce que c'est ?"],
    }  # fmt: skip
    script = [sys.executable, str(EXAMPLES / "translation" / "text.py")]
    for language, sentences in text.items():
        for side in ("en", language):
            (tmp_path / f"in.{side}").write_text("".join(f"{sentence}\n" for sentence in sentences))
        command = [
            *script,
            "tokens",
            str(tmp_path / "in"),
            str(tmp_path / "out"),
            "en",
            language,
            "--aggressive",
        ]
        subprocess.run(command, check=True, capture_output=True)
        with (tmp_path / f"out.{language}").open() as tokens:
            done = subprocess.run(
                [*script, "detokenize", language], stdin=tokens, capture_output=True, text=True
            )
        assert corpus_bleu(done.stdout.splitlines(), [sentences]).score == pytest.approx(100), done.stdout


def test_checkpoints_of_epochs_are_averaged_where_they_stand_for_an_update(tmp_path):
    def save(name, value, updates):
        checkpoint = {"model": {"w": torch.full((2,), value)}, "optimizer_history": [{"num_updates": updates}]}
        torch.save(checkpoint, tmp_path / f"{name}.pt")

    save("checkpoint_1_10", 1.0, 10)
    save("checkpoint1", 100.0, 15)  # an epoch that ended between
    save("checkpoint2", 3.0, 20)
    save("checkpoint_3_30", 8.0, 30)
    save("checkpoint_last", 100.0, 30)
    command = [sys.executable, str(EXAMPLES / "translation" / "checkpoints.py"), "average", str(tmp_path)]
    for number, mean in (("2", 5.5), ("3", 4.0), ("9", 4.0)):
        done = subprocess.run(
            [*command, number, "10", str(tmp_path / "mean")], check=True, capture_output=True, text=True
        )
        assert torch.load(tmp_path / "mean", weights_only=True)["model"]["w"].tolist() == [mean, mean]
        assert ("there are no 9" in done.stdout) == (number == "9")
    done = subprocess.run([*command, "2", "7", str(tmp_path / "mean")], capture_output=True, text=True)
    fails_with(done, "no checkpoint of a multiple of 7 updates")


def test_an_interrupted_copy_of_the_last_checkpoint_is_mended(tmp_path):
    command = [sys.executable, str(EXAMPLES / "translation" / "checkpoints.py"), "mend", str(tmp_path)]
    for number, name in enumerate(("checkpoint_1_10", "checkpoint2", "checkpoint_3_30", "checkpoint_last")):
        torch.save({"model": {"w": torch.full((999,), float(number))}}, tmp_path / f"{name}.pt")
        os.utime(tmp_path / f"{name}.pt", (number, number))
    whole = (tmp_path / "checkpoint_last.pt").read_bytes()
    subprocess.run(command, check=True)
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == whole
    for name in ("checkpoint_last", "checkpoint_3_30"):
        os.truncate(tmp_path / f"{name}.pt", 2000)
        os.utime(tmp_path / f"{name}.pt", (9, 9))
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "goes on from checkpoint2.pt" in done.stdout
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == (tmp_path / "checkpoint2.pt").read_bytes()
    for path in tmp_path.glob("*.pt"):
        os.truncate(path, 0)
    fails_with(subprocess.run(command, capture_output=True, text=True), "cannot be read, nor any other there")


# ------------------------------------------------------------------------------------------- downloads


def pack(archive, files):
    folder = archive.parent / "content"
    for name, sentences in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = "".join(f"{sentence}\n" for sentence in sentences).encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with tarfile.open(archive, "w") as tar:
        for name in files:
            tar.add(folder / name, name)
    return archive.as_uri()


def test_wmt_is_downloaded_checked_and_joined(text, tmp_path):
    english, german = lines(text / "train.en"), lines(text / "train.de")
    url = pack(tmp_path / "a.tar", {"x/a.en": english[:300], "x/a.de": german[:300]})
    other = pack(tmp_path / "b.tar", {"b.en.gz": english[300:], "b.de.gz": german[300:]})
    for name in ("wmt15", "wmt16"):  # as if sacrebleu had downloaded them
        (tmp_path / "sets" / name).mkdir(parents=True)
        for field in DATASETS[name].fieldnames("en-de"):
            file = text / f"{'valid' if name == 'wmt15' else 'test'}.{'de' if field == 'ref' else 'en'}"
            (tmp_path / "sets" / name / f"{name}.en-de.{field}").write_bytes(file.read_bytes())
    settings = {
        **SMALL, "RUN": tmp_path / "run", "CORPORA": tmp_path / "corpora.txt", "SACREBLEU": tmp_path / "sets",
    }  # fmt: skip
    (tmp_path / "corpora.txt").write_text(f"# a comment\n{'0' * 64} {url} x/a.en x/a.de\n")
    fails_with(bash("wmt16_en_de", "prepare.sh", **settings), f"{url} does not have the checksum {'0' * 64}")
    (tmp_path / "run" / "downloads" / "a.tar.part").unlink()
    (tmp_path / "corpora.txt").write_text(f"- {url} x/a.en x/a.de\n- {other} b.en.gz b.de.gz\n")
    done = bash("wmt16_en_de", "prepare.sh", **settings)
    assert done.returncode == 0, done.stderr
    assert "no checksum is known of it; it has the SHA-256" in done.stdout
    raw = tmp_path / "run" / "raw"
    assert lines(raw / "train.en") == english and lines(raw / "train.de") == german
    assert lines(raw / "valid.de") == lines(text / "valid.de")
    assert lines(raw / "test.en") == lines(text / "test.en")


def test_iwslt_is_taken_out_of_its_xml(text, tmp_path):
    files = {}
    for language in ("de", "en"):
        sentences = lines(text / f"train.{language}")
        files[f"de-en/train.tags.de-en.{language}"] = [
            "<url>http://talk</url>",
            "<keywords>a, b</keywords>",
            f"<title>{sentences[0]}</title>",
            *sentences[1:],
        ]
        for i, year in enumerate(("dev2010", "dev2012", "tst2010", "tst2011", "tst2012")):
            files[f"de-en/IWSLT14.TED.{year}.de-en.{language}.xml"] = [
                "<doc>", f'<seg id="1"> {lines(text / f"test.{language}")[i]} </seg>', "</doc>",
            ]  # fmt: skip
    url = pack(tmp_path / "de-en.tgz", files)
    done = bash("iwslt14_de_en", "prepare.sh", RUN=tmp_path / "run", ARCHIVE=url, **SMALL)
    assert done.returncode == 0, done.stderr
    raw = tmp_path / "run" / "raw"
    pairs = list(zip(lines(text / "train.de"), lines(text / "train.en"), strict=True))
    lengths = [
        [
            len(MosesTokenizer(language).tokenize(sentence))
            for language, sentence in zip(("de", "en"), pair, strict=True)
        ]
        for pair in pairs
    ]
    cleaned = [pair for pair, length in zip(pairs, lengths, strict=True) if max(length) <= 1.5 * min(length)]
    assert 500 < len(cleaned) < len(pairs)
    for i, language in enumerate(("de", "en")):
        sentences = [pair[i] for pair in cleaned]
        assert lines(raw / f"valid.{language}") == sentences[22::23]
        assert sorted(lines(raw / f"train.{language}") + sentences[22::23]) == sorted(sentences)
        assert lines(raw / f"test.{language}") == lines(text / f"test.{language}")[:5]


# ------------------------------------------------------------------------------------------- bad input


def spoil(data, language, number, line):
    path = data / f"train.{language}"
    content = path.read_bytes().splitlines(keepends=True)
    content[number - 1] = line
    path.write_bytes(b"".join(content))


def test_what_is_not_utf8_is_named_with_its_line(data, tmp_path):
    spoil(data, "de", 17, "Gr\u00fc\u00dfe\n".encode("latin-1"))
    done = bash("wmt16_en_de", "prepare.sh", DATA=data, RUN=tmp_path / "run", **SMALL)
    fails_with(done, f"{data}/train.de, line 17 is not UTF-8")
    spoil(data, "de", 17, "Gr\u00fc\u00dfe\n".encode())
    prepared(data, tmp_path / "run")


def test_files_of_different_lengths_are_named(data, tmp_path):
    with (data / "train.de").open("a") as file:
        file.write("Noch ein Satz.\n")
    done = bash("wmt16_en_de", "prepare.sh", DATA=data, RUN=tmp_path / "run", **SMALL)
    fails_with(done, f"train.en ends before line {TRAIN_PAIRS + 1}")
    done = bash("wmt16_en_de", "prepare.sh", DATA=data, RUN=tmp_path / "some", PAIRS=300, **SMALL)
    fails_with(
        done, f"train.en has {TRAIN_PAIRS} lines but train.de has {TRAIN_PAIRS + 1}: they must be parallel"
    )


def test_a_held_out_line_that_is_too_long_for_fairseq_is_named(data, tmp_path):
    for split in ("valid", "test"):
        for language in ("en", "de"):
            (data / f"{split}.{language}").write_text("a b c\n" * 3)
    with (data / "test.de").open("a") as file, (data / "test.en").open("a") as other:
        file.write("x " * 1500 + "\n")
        other.write("x\n")
    done = bash("wmt16_en_de", "prepare.sh", DATA=data, RUN=tmp_path / "run", **SMALL)
    fails_with(done, f"{data}/test.de, line 4 has 1500 words, more than 1023")
    (data / "test.de").write_text("a b c\n" * 3 + "x" * 1500 + "\n")
    done = bash("wmt16_en_de", "prepare.sh", DATA=data, RUN=tmp_path / "run", **SMALL)
    fails_with(done, "test.de, line 4 has 1500 pieces, more than the 1023 that fairseq's task takes")
    shutil.rmtree(tmp_path / "run")
    (data / "test.de").write_text("a b c\n" * 4)
    prepared(data, tmp_path / "run")


def test_held_out_sets_are_given_whole_or_not_at_all(data, tmp_path):
    for language in ("en", "de"):
        (data / f"test.{language}").write_text("a b c\n" * 3)
    done = bash("wmt16_en_de", "prepare.sh", DATA=data, RUN=tmp_path / "run", **SMALL)
    fails_with(done, f"DATA={data} has neither valid.en.gz nor valid.en")


def test_what_is_held_out_is_found_in_other_spellings(data, tmp_path):
    spoil(data, "en", 30, "It\u2019s R&D that they  wanted here today .\n".encode())
    for split in ("valid", "test"):
        for language in ("en", "de"):
            (data / f"{split}.{language}").write_text("it's R&amp;D that they wanted here today.\n" * 3)
    assert "   1 held out\n" in prepared(data, tmp_path / "run")


def test_a_first_try_with_a_wrong_folder_can_be_repeated(data, tmp_path):
    done = bash("wmt16_en_de", "prepare.sh", DATA="/nowhere", RUN=tmp_path / "run", **SMALL)
    fails_with(done, "DATA=/nowhere has neither")
    prepared(data, tmp_path / "run")
    done = bash("wmt16_en_de", "prepare.sh", DATA="/nowhere", RUN=tmp_path / "run", **SMALL)
    fails_with(done, "was made with other settings")


def test_lines_of_thousands_of_words_and_empty_ones_are_left_out(data, tmp_path):
    spoil(data, "en", 30, b"word " * 10_000 + b"\n")
    spoil(data, "de", 40, b"\n")
    out = prepared(data, tmp_path / "run")
    assert "   1 too long\n" in out and "   1 empty\n" in out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SEGMENTER": "words"}, "SEGMENTER must be bpe or sentencepiece, got words"),
        ({"SHARD": "1e6"}, "SHARD must be a positive whole number, got 1e6"),
        ({"HELD_OUT": "0"}, "HELD_OUT must be a positive whole number, got 0"),
        ({"PAIRS": "all"}, "PAIRS must be a whole number, got all"),
        ({"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK must be less than NODES, 2, got 2"),
        ({"HELD_OUT": "200"}, "has 600 pairs of 1 to 50 words, too few to hold out 400"),
        ({"BATCH": "0"}, "BATCH must be a positive whole number, got 0"),
        ({"RUN": "a:b"}, "RUN must not contain a colon"),
        ({"DATA": "/nowhere"}, "DATA=/nowhere has neither train.en.gz nor train.en"),
    ],
)
def test_bad_settings_name_the_value(data, tmp_path, settings, message):
    fails_with(
        bash("wmt16_en_de", "prepare.sh", **{"RUN": tmp_path / "run", "DATA": data, **SMALL, **settings}),
        message,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_before_anything_is_prepared(data, tmp_path):
    done = bash("wmt16_en_de", "run.sh", DATA=data, RUN=tmp_path / "run")
    fails_with(done, "run.sh: PyTorch sees no GPU: give DEVICE=cpu, or install a PyTorch with CUDA")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (["beam"], {}, "wants pretrained, control or soft_beam"),
        (["pretrained"], {"SCHEDULE": "old"}, "SCHEDULE must be modern or paper, got old"),
        (["soft_beam"], {"DEVICE": "tpu"}, "DEVICE must be gpu or cpu, got tpu"),
        (["soft_beam"], {"PRECISION": "bf16"}, "PRECISION must be fp16, amp or fp32, got bf16"),
        (["soft_beam"], {"DEVICE": "cpu", "PRECISION": "fp16"}, "PRECISION must be fp32 on CPUs, got fp16"),
        (["soft_beam"], {"DEVICE": "cpu"}, "models/pretrained/model.pt: train that first"),
        (["pretrained"], {"DEVICE": "cpu"}, "data-bin is not there: run prepare.sh"),
    ],
)
def test_training_says_what_it_wants(tmp_path, arguments, settings, message):
    fails_with(bash("wmt14_en_fr", "train.sh", *arguments, RUN=tmp_path, **settings), message)


# -------------------------------------------------------------------------------------- interruptions


def everything(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".log")
    }


def test_a_half_written_shard_is_not_taken_for_a_finished_one(data, tmp_path):
    prepared(data, tmp_path / "whole")
    for name in ("settings", "raw", "shards"):
        (tmp_path / "half").mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", tmp_path / "whole" / name, tmp_path / "half"], check=True)
    for folder, names in (("tokens", ("0000.en", "0001.en", "0001.de")), ("pieces", ("0000.en.part",))):
        (tmp_path / "half" / f"{folder}.part").mkdir()
        for name in names:
            (tmp_path / "half" / f"{folder}.part" / name).write_text("half a li")
    (tmp_path / "half" / "data-bin.part" / "0000.part").mkdir(parents=True)
    (tmp_path / "half" / "data-bin.part" / "0000.part" / "train.en-de.en.bin").write_text("x")
    prepared(data, tmp_path / "half")
    for folder in ("tokens", "data-bin"):
        whole, half = (everything(tmp_path / name / folder) for name in ("whole", "half"))
        assert whole == half


def test_a_full_disk_ends_preparation_and_is_mended_by_running_it_again(data, tmp_path):
    """In a file system of 300 kB, of which this one has more text."""
    mount = 'mount -t tmpfs -o size="$0" tmpfs "$1"'
    if subprocess.run(
        ["unshare", "-rm", "bash", "-c", mount, "1m", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("file systems cannot be mounted here")
    run = tmp_path / "run"
    run.mkdir()
    script = (
        f'{mount} && {{ bash "$2" 2> "$3"; echo "rc $?"; mount -o remount,size=50m "$1" && bash "$2" && '
        'cp -r "$1" "$4"; }'
    )
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "300k", str(run), str(EXAMPLES / "wmt16_en_de" / "prepare.sh"),
         str(tmp_path / "errors"), str(tmp_path / "after")],
        env={**os.environ, "DATA": str(data), "RUN": str(run), **{k: str(v) for k, v in SMALL.items()}},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert "rc 0" not in done.stdout and "No space left on device" in (tmp_path / "errors").read_text()
    assert done.returncode == 0, done.stderr
    prepared(data, tmp_path / "whole")
    assert everything(tmp_path / "after" / "data-bin") == everything(tmp_path / "whole" / "data-bin")
