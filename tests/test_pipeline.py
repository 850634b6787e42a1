"""The stock fairseq commands, as subprocesses, on a tiny corpus, from a folder of their own."""

import math
import re
import subprocess

import pytest
from fairseq.checkpoint_utils import load_checkpoint_to_cpu

import fairseq_softtopk.plugin  # noqa: F401  (says which classes a checkpoint may contain)

PLUGIN = ["--user-dir", "fairseq_softtopk"]
WHOLE = ["--max-tokens", "400", "--required-batch-size-multiple", "1"]
TRAIN = [
    "--share-all-embeddings", "--dropout", "0.1", "--optimizer", "adam", "--lr", "1e-3", *WHOLE,
    "--log-format", "simple", "--log-interval", "1", "--num-workers", "0", "--no-epoch-checkpoints",
]  # fmt: skip
TINY = ["--arch", "topk_attention_tiny"]
MIXED = ["--criterion", "soft_beam", "--teacher-forcing-ratio", "0.2"]
LSTM = [
    "--arch", "lstm", "--encoder-embed-dim", "32", "--decoder-embed-dim", "32", "--decoder-out-embed-dim", "32",
]  # fmt: skip

SMALL = [
    "--encoder-embed-dim", "32", "--decoder-embed-dim", "32", "--encoder-layers", "1", "--decoder-layers", "1",
]  # fmt: skip
FFN = ["--encoder-ffn-embed-dim", "64", "--decoder-ffn-embed-dim", "64"]
TRANSFORMER = ["--arch", "transformer", *SMALL, *FFN]
TOPK_TRANSFORMER = ["--arch", "topk_attention_transformer", *SMALL, *FFN]


@pytest.fixture(scope="session")
def train(tiny_corpus):
    """Runs ``fairseq-train`` on the tiny corpus, returns what it printed."""

    def run(*options: str) -> subprocess.CompletedProcess:
        command = ["fairseq-train", "data-bin", *TRAIN, *PLUGIN, *options]
        return subprocess.run(command, cwd=tiny_corpus, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def trained(train, tiny_corpus):
    """The log and the checkpoint of three updates with ``soft_beam``."""
    done = train(*TINY, *MIXED, "--max-update", "3", "--save-dir", "tiny")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout, "tiny/checkpoint_last.pt"


def updates(log: str) -> list[dict[str, float]]:
    """What every ``train_inner`` line says."""
    lines = [line for line in log.splitlines() if "| train_inner |" in line]
    return [{key: float(value) for key, value in re.findall(r"(\w+)=([\d.e+-]+)", line)} for line in lines]


def test_the_log_shows_both_losses_and_how_soft_the_beam_is(trained):
    log, _ = trained
    rows = updates(log)
    assert [row["num_updates"] for row in rows] == [1, 2, 3]
    for row in rows:
        mixed = 0.2 * row["teacher_forcing_loss"] + 0.8 * row["soft_beam_risk"] / math.log(2)
        assert row["loss"] == pytest.approx(mixed, abs=2e-3)
        assert 0 < row["soft_beam_risk"] <= 1
        assert 0 < row["sharpness"] <= 1
        assert 0 <= row["agreement"] <= 1
        assert row["score_grad_norm"] >= 0  # three digits, of a model that has learnt nothing yet
        assert row["ppl"] == pytest.approx(2 ** row["teacher_forcing_loss"], rel=1e-2)
    valid = next(line for line in log.splitlines() if "valid on 'valid' subset" in line)
    assert "soft_beam_risk" in valid
    assert "sharpness" in valid


def test_resumes_where_it_was(train, trained):
    done = train(*TINY, *MIXED, "--max-update", "5", "--save-dir", "tiny")
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stderr + done.stdout
    assert [row["num_updates"] for row in updates(log)] == [4, 5]
    assert "Loaded checkpoint" in log


@pytest.mark.parametrize(
    "name, model", [("lstm", LSTM), ("transformer", TRANSFORMER), ("topk_transformer", TOPK_TRANSFORMER)]
)
def test_other_models_train_under_the_alias(train, name, model):
    options = [
        "--criterion",
        "soft_beam_search",
        "--soft-beam-size",
        "2",
        "--max-update",
        "2",
        "--save-dir",
        name,
    ]
    done = train(*model, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert updates(done.stderr + done.stdout)[-1]["soft_beam_risk"] > 0
    resumed = train(*model, *options[:-3], "3", *options[-2:])  # its checkpoint holds an argparse.Namespace
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert [row["num_updates"] for row in updates(resumed.stderr + resumed.stdout)] == [3]


def test_checkpoints_are_chosen_by_the_bleu_of_fairseq(train):
    """As in fairseq's own recipe for IWSLT'14."""
    bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 5}', "--eval-bleu-remove-bpe"]
    best = ["--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"]
    done = train(*TINY, "--criterion", "soft_beam", *bleu, *best, "--max-update", "1", "--save-dir", "by_bleu")
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stderr + done.stdout
    found = re.search(r"valid on 'valid' subset .* beam_bleu .* \| bleu ([\d.]+)", log)
    saved = re.search(r"\(epoch 1 @ 1 updates, score ([\d.]+)\)", log)
    assert found is not None
    assert saved is not None
    assert float(saved[1]) == float(found[1])  # as numbers: without any hit it says 0 and 0.0


PAIR = ["--lang-pairs", "en-de"]
LANGTOK = ["--lang-dict", "langs.txt", "--encoder-langtok", "src", "--decoder-langtok"]
PREFIX = ["--soft-beam-prefix-size", "1"]


@pytest.mark.parametrize(
    ("task", "model"),
    [
        (["multilingual_translation", *PAIR], ["--arch", "multilingual_transformer", *SMALL, *FFN]),
        (["translation_multi_simple_epoch", *PAIR, *LANGTOK, *PREFIX], TRANSFORMER),
    ],
)
def test_multilingual_tasks_train(train, tiny_corpus, task, model):
    (tiny_corpus / "langs.txt").write_text("en\nde\n")
    done = train("--task", *task, *model, *MIXED, "--max-update", "2", "--disable-validation", "--no-save")
    assert done.returncode == 0, done.stderr[-3000:]
    assert updates(done.stderr + done.stdout)[-1]["soft_beam_risk"] > 0


LANGUAGES = ["--source-lang", "en", "--target-lang", "de"]
RAW_TEXT = ["--tokenizer", "moses", "--bpe", "subword_nmt", "--bpe-codes", "codes"]
DECODE = [
    *PLUGIN,
    *LANGUAGES,
    *RAW_TEXT,
    "--beam",
    "2",
    "--max-len-b",
    "20",
    "--required-batch-size-multiple",
    "1",
]


def test_generate_translates_every_sentence_and_sacrebleu_scores_it(trained, tiny_corpus, shell):
    out = shell(["fairseq-generate", "data-bin", "--path", trained[1], *DECODE])
    hypotheses = {
        int(line[2:].split()[0]): line.split("\t")[2] for line in out.splitlines() if line.startswith("D-")
    }
    references = (tiny_corpus / "test.de").read_text().splitlines()
    assert sorted(hypotheses) == list(range(len(references)))
    (tiny_corpus / "hypotheses.de").write_text("\n".join(hypotheses[i] for i in sorted(hypotheses)) + "\n")
    assert '"signature": "nrefs:1|case:mixed|eff:no|tok:13a' in shell(
        ["sacrebleu", "test.de", "-i", "hypotheses.de", "-m", "bleu"]
    )


@pytest.mark.parametrize("name, model", [("lstm", TINY), ("transformer", TOPK_TRANSFORMER)])
def test_interactive_translates_raw_text_and_says_what_it_looks_at(train, shell, tiny_corpus, name, model):
    schedule = "--attention-epsilon-schedule linear --attention-epsilon-end 0.05 --attention-epsilon-updates 4"
    folder = f"interactive_{name}"
    done = train(*model, *schedule.split(), "--max-update", "2", "--save-dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = f"{folder}/checkpoint_last.pt"
    out = shell(
        ["fairseq-interactive", "data-bin", "--path", checkpoint, *DECODE, "--print-alignment"],
        stdin="The train leaves on Monday.\n",
    )
    lines = dict(line.split("\t", 1) for line in out.splitlines() if re.match(r"[SDHA]-0\t", line))
    assert lines.keys() == {"S-0", "D-0", "H-0", "A-0"}
    pairs = [tuple(map(int, pair.split("-"))) for pair in lines["A-0"].split()]
    source, target = len(lines["S-0"].split()), len(lines["H-0"].split("\t")[1].split())
    assert pairs and all(0 <= s <= source and 0 <= t <= target for s, t in pairs)

    state = load_checkpoint_to_cpu(str(tiny_corpus / checkpoint))["model"]
    before_the_last = {int(value) for key, value in state.items() if key.endswith("relaxation._extra_state")}
    assert before_the_last == {1}  # of two updates: epsilon is that of the last one


def test_validate_reports_the_soft_beam(trained, shell):
    out = shell(
        ["fairseq-validate", "data-bin", "--path", trained[1], "--task", "translation", *PLUGIN, *WHOLE]
    )
    for name in "soft_beam_risk", "sharpness", "agreement", "gold_rank", "gold_on_beam":
        assert name in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--soft-beam-size", "0"], "--soft-beam-size must lie in [1, "),
        (["--soft-beam-size", "99999"], "got 99999"),
        (["--soft-beam-epsilon", "-1"], "--soft-beam-epsilon must be positive and finite, got -1.0"),
        (["--teacher-forcing-ratio", "2"], "--teacher-forcing-ratio must lie in [0, 1], got 2.0"),
        (["--soft-beam-cost-scale", "mean"], "invalid choice: 'mean' (choose from"),
        (["--attention-relaxation", "relu"], "invalid choice: 'relu' (choose from"),
        (["--attention-top-k", "0"], "--attention-top-k must be a whole number, at least 1, got 0"),
        (["--attention-epsilon", "0"], "--attention-epsilon must be positive and finite, got 0.0"),
    ],
)
def test_bad_options_end_in_one_line_that_names_the_value(train, options, message):
    done = train(*TINY, "--criterion", "soft_beam", "--max-update", "1", "--save-dir", "bad", *options)
    assert done.returncode != 0
    assert message in done.stderr.strip().splitlines()[-1]


def test_a_model_that_cannot_be_stepped_is_refused(train, tiny_corpus):
    kernels = ["--encoder-kernel-size-list", "[3]", "--decoder-kernel-size-list", "[3]"]
    done = train("--arch", "lightconv", *SMALL, *kernels, "--criterion", "soft_beam", "--save-dir", "lightconv")
    assert done.returncode != 0
    # Not the last line always: a process that ends while a thread of PyTorch's runs says so on its way.
    last = [line for line in done.stderr.splitlines() if "cannot step the decoder LightConvDecoder" in line][-1]
    assert "implement fairseq_softtopk.beam.StepDecoder" in last
    assert not (tiny_corpus / "lightconv" / "checkpoint_last.pt").exists()
