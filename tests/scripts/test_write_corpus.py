"""The script is run as a user runs it; what its docstring promises is read off its files."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "write_corpus.py"
TARGETS = ("de", "fr")
SIZES = {"train": 8000, "valid": 500, "test": 500}  # the defaults
FEW = ["--train", "400", "--valid", "30", "--test", "40"]

Corpus = dict[str, list[str]]  # the lines of each file


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script, from a folder that is not the checkout's."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=SCRIPT.anchor,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
    )


def write(folder: Path, target: str, *options: object, **environment: str) -> Corpus:
    """Write a corpus and read it back."""
    done = run("--target", target, "--out", folder, *options, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    names = {f"{split}.{lang}" for split in SIZES for lang in ("en", target)}
    assert {path.name for path in folder.iterdir()} == names
    corpus = {}
    for name in names:
        text = (folder / name).read_bytes().decode("utf-8")
        assert text.endswith("\n")
        corpus[name] = text[:-1].split("\n")
    return corpus


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    """What the script writes by default."""
    folders = [tmp_path_factory.mktemp(target) for target in TARGETS]
    with ThreadPoolExecutor() as pool:
        return dict(zip(TARGETS, pool.map(write, folders, TARGETS), strict=True))


@pytest.fixture(scope="module")
def corpus(corpora: dict[str, Corpus], target: str) -> Corpus:
    return corpora[target]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, target: str) -> Corpus:
    return write(tmp_path_factory.mktemp(target), target, *FEW)


def pairs(corpus: Corpus, target: str) -> list[tuple[str, str]]:
    """All pairs of the three splits."""
    return [
        pair for split in SIZES for pair in zip(corpus[f"{split}.en"], corpus[f"{split}.{target}"], strict=True)
    ]


# ------------------------------------------------------------------------- sizes, seeds, splits


def test_each_file_has_the_lines_asked_for(corpus: Corpus, few: Corpus, target: str) -> None:
    for split, size in SIZES.items():
        assert len(corpus[f"{split}.en"]) == len(corpus[f"{split}.{target}"]) == size
    for split, size in {"train": 400, "valid": 30, "test": 40}.items():
        assert len(few[f"{split}.en"]) == len(few[f"{split}.{target}"]) == size


def test_same_bytes_in_any_process(few: Corpus, target: str, tmp_path: Path) -> None:
    surroundings = [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Pacific/Kiritimati"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "fr_FR.UTF-8", "LANGUAGE": "fr", "TZ": "UTC"},
    ]
    for number, environment in enumerate(surroundings):
        assert write(tmp_path / str(number), target, *FEW, **environment) == few


def test_another_seed_gives_another_corpus_split_the_same_way(
    corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    other = write(tmp_path, "de", "--train", 1800, "--valid", 80, "--test", 80, "--seed", 2)
    split_of = {line: split for split in SIZES for line in corpora["de"][f"{split}.en"]}
    again = [(split_of[line], split) for split in SIZES for line in other[f"{split}.en"] if line in split_of]
    assert 5 < len(again) < 100, "too few for this test to mean something, or hardly another corpus"
    assert all(before == after for before, after in again)


def test_no_line_comes_twice(corpus: Corpus, target: str) -> None:
    for lang in ("en", target):
        lines = [line for split in SIZES for line in corpus[f"{split}.{lang}"]]
        assert len(set(lines)) == len(lines) == sum(SIZES.values())


def test_growing_a_split_moves_no_sentence(few: Corpus, corpus: Corpus) -> None:
    for name, lines in few.items():
        assert len(corpus[name]) > len(lines)
        assert corpus[name][: len(lines)] == lines


def test_growing_train_leaves_the_others(few: Corpus, target: str, tmp_path: Path) -> None:
    grown = write(tmp_path, target, *FEW, "--train", 1500)
    for lang in ("en", target):
        assert len(grown[f"train.{lang}"]) == 1500
        for split in ("valid", "test"):
            assert grown[f"{split}.{lang}"] == few[f"{split}.{lang}"]


def test_english_is_the_same_for_both_targets(corpora: dict[str, Corpus]) -> None:
    for split in SIZES:
        assert corpora["de"][f"{split}.en"] == corpora["fr"][f"{split}.en"]


# -------------------------------------------------------------------------------------- the text


def test_lengths(corpus: Corpus) -> None:
    for lines in corpus.values():
        for line in lines:
            words = line.split()
            marks = [character for character in line if character in ".,:;?!'-/"]
            assert len(words) + 1 >= 5, line  # the last mark is a token, others may not be
            assert len(re.sub(r"[.,:;?!'/-]", " ", line).split()) + len(marks) <= 25, line


def test_lengths_are_not_the_same_for_all(corpus: Corpus) -> None:
    for lines in corpus.values():
        lengths = [len(line.split()) for line in lines]
        assert min(lengths) <= 6
        assert max(lengths) >= 17


def test_lines_are_sentences(corpus: Corpus) -> None:
    for lines in corpus.values():
        for line in lines:
            assert line[-1] in ".?", line
            assert line[0].isupper() or line[0].isdigit(), line
            assert line == " ".join(line.split(" ")), line
            assert "  " not in line, line
            assert not re.search(r"[{}|<>_]", line), line


def test_spaces_and_apostrophes_are_plain(corpora: dict[str, Corpus]) -> None:
    for corpus in corpora.values():
        for lines in corpus.values():
            text = "".join(lines)
            assert not re.findall(r"[^\S ]|[\u200b\u2060\ufeff\u2019\u02bc]", text)
    french = " ".join(corpora["fr"]["train.fr"])
    assert re.search(r"\b\d \d{3}\b", french), "nothing that CLDR writes with a narrow space"


def test_at_least_half_of_the_numbers_are_words(corpus: Corpus) -> None:
    text = " ".join(corpus["train.en"]).lower()
    figures = re.findall(r"\d[\d,.:/]*", text)
    words = re.findall(
        r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|"
        r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty(?:-\w+)?)\b",
        text,
    )
    assert len(words) > len(figures)


def test_few_words_are_copied(corpus: Corpus, target: str) -> None:
    copied = [
        word in english
        for english, translation in (map(str.split, pair) for pair in pairs(corpus, target))
        for word in translation
    ]
    assert sum(copied) < 0.15 * len(copied)


# ----------------------------------------------------------------------- the languages themselves

ENGLISH_UNITS = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]
GERMAN_UNITS = ["zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
GERMAN_TENS = [
    *("zwanzig", "dreißig", "vierzig", "fünfzig"),
    *("sechzig", "siebzig", "achtzig", "neunzig"),
]


# An English cardinal from 22 to 99 that is no ordinal, no end of a year and no part of a hundred.
CARDINAL = re.compile(
    r"(?<!and )(?<!nineteen )(?<!twenty )"
    rf"\b({'|'.join(ENGLISH_TENS)})-({'|'.join(ENGLISH_UNITS)})\b(?! hundred)",
    re.I,
)


def test_german_tens_follow_units(corpora: dict[str, Corpus]) -> None:
    found = 0
    for english, german in pairs(corpora["de"], "de"):
        for ten, unit in CARDINAL.findall(english):
            tens = GERMAN_TENS[ENGLISH_TENS.index(ten.lower())]
            word = f"{GERMAN_UNITS[ENGLISH_UNITS.index(unit)]}und{tens}"
            assert re.search(rf"\b{word}\b", german, re.I), (english, german)
            found += 1
    assert found > 100


def test_french_counts_in_scores(corpora: dict[str, Corpus]) -> None:
    teens = "(douze|treize|quatorze|quinze|seize|dix-sept|dix-huit|dix-neuf)"  # 72 to 79
    expected = {
        "seventy": rf"soixante-{teens}\b",
        "eighty": r"quatre-vingt-(deux|trois|quatre|cinq|six|sept|huit|neuf)\b",
        "ninety": rf"quatre-vingt-{teens}\b",
    }
    found = dict.fromkeys(expected, 0)
    for english, french in pairs(corpora["fr"], "fr"):
        for ten, _ in CARDINAL.findall(english):
            if ten.lower() in expected:
                assert re.search(expected[ten.lower()], french, re.I), (english, french)
                found[ten.lower()] += 1
    assert min(found.values()) > 10


def hour_of_day(hour: str, half: str) -> int:
    return int(hour) % 12 + (12 if half == "PM" else 0)


def test_times_are_written_on_24_hours(corpora: dict[str, Corpus]) -> None:
    found = 0
    for target in TARGETS:
        for english, translation in pairs(corpora[target], target):
            for hour, minute, half in re.findall(r"\b(\d+):(\d\d) ([AP]M)\b", english):
                hours = hour_of_day(hour, half)
                french = f"{hours} h" if minute == "00" else f"{hours} h {minute}"
                expected = {"de": f"{hours}:{minute} Uhr", "fr": french}[target]
                assert re.search(rf"\b{expected}(?! \d)", translation), (english, translation)
                found += 1
    assert found > 100


def test_dates_in_figures_change_their_order(corpora: dict[str, Corpus]) -> None:
    for target, pattern in (("de", "{:02}.{:02}.{}"), ("fr", "{:02}/{:02}/{}")):
        found = 0
        for english, translation in pairs(corpora[target], target):
            for month, day, year in re.findall(r"\b(\d+)/(\d+)/(\d{4})\b", english):
                assert pattern.format(int(day), int(month), year) in translation
                found += 1
        assert found > 30


ALWAYS = {  # what is in the translation wherever a pattern is in the English
    "de": {
        r"Swedish kronor": "Schwedische Kronen",
        r"kilometers\b": "Kilometer",
        r"days ago|in [\w-]+ days\b": "Tagen",
        r"living in .* \w+ (days|months|years)": r"seit .*(Tagen|Monaten|Jahren) ",
        r"with .* (guests|children|visitors)": r"mit .* (Gästen|Kindern|Besuchern) ",
        r"apartment of": "Quadratmetern",
        r"On Wednesday, (?!\w+ \d)": "Am Mittwoch",
        r"\b[Oo]n Wednesday, \w+ \d": "[Aa]m Mittwoch, dem",
        r"\bMarch (19|20)\d\d": "März",
        r"because she needed": r"weil sie .* brauchte\.",
        r"knows that": r"weiß, dass .* dauert\.",
        r"will take place": r"findet am .* statt\.",
        r"\b(to|for|in) (the )?Switzerland": "Schweiz",
        r"moved from \w+ to Switzerland": "in die Schweiz",
        r"moved from \w+ to Spain": "nach Spanien",
        r"(saves|sold|return|for) the red (chair|table|coat)": "den roten",
        r"translated from .* into French": "ins Französische",
        r"percent\b": "Prozent",
    },
    "fr": {
        r"Swedish kronor": "couronnes suédoises",
        r"kilometers\b": "kilomètre",
        r"days ago": "il y a|Il y a",
        r"\b[A-Z]\w+ 1(,|\.|$)|\b1 (May|June|July) ": "1er ",
        r"\btwenty-one (minutes|hours|weeks|apples|chairs|candles)": "vingt et une ",
        r"\btwenty-one (days|months|years|books|visitors|kilometers)": "vingt et un ",
        r"because she needed": r"parce qu'elle avait besoin de",
        r"left for (Germany|Spain|Egypt)": r"est partie? en ",
        r"left for (Japan|Portugal|Canada)": r"est partie? au ",
        r"from (Ireland|Austria|India)": r"d'(Irlande|Autriche|Inde)",
        r"went to the museum": "au musée",
        r"went to the (school|hotel)": "à l'(école|hôtel)",
        r"The (exhibition|meeting) was canceled": "annulée",
        r"The (concert|match) was canceled": "annulé ",
        r"of water\b": "d'eau",
        r"of oil\b": "d'huile",
        r"the white (chair|car|dress)\b": "blanche",
        r"percent\b": "pour cent",
    },
}


@pytest.mark.parametrize(
    ("lang", "english", "expected"),
    [(lang, *pattern) for lang, patterns in ALWAYS.items() for pattern in patterns.items()],
)
def test_translations(corpora: dict[str, Corpus], lang: str, english: str, expected: str) -> None:
    found = [pair for pair in pairs(corpora[lang], lang) if re.search(english, pair[0])]
    assert found, "the corpus of the test is too small"
    assert [pair for pair in found if not re.search(expected, pair[1])] == []


NEVER = {
    "en": r"(?<!-)\b[Oo]ne \w+s\b|\b1 (hours|minutes|days)\b|\bthe the\b|(?<![\d,.])1 [a-z]",
    "de": r"\b[Zz]u de[rm]\b|\b([Vv]on|[Aa]n|[Ii]n) dem\b|\bvor \S+ (Tage|Monate|Jahre)\b"
    r"|\b[Ii]n (Schweiz|Ukraine|Slowakei)\b|\bnach (Schweiz|Ukraine|Slowakei)\b",
    "fr": r"\b(de|à) les?\b (?!plus)|\b(de|le|la|que|ne|se) (?!onz)[aeiouéèêâîôAEIOUÉ]"
    r"|\b1 (janvier|mai)|quatre-vingts-|cents (un|deux|vingt)|\bun (heures|minutes|semaines)\b",
}


@pytest.mark.parametrize("lang", NEVER)
def test_mistakes_that_do_not_occur(corpora: dict[str, Corpus], lang: str) -> None:
    corpus = corpora["fr" if lang == "fr" else "de"]
    lines = [line for split in SIZES for line in corpus[f"{split}.{lang}"]]
    assert [line for line in lines if re.search(NEVER[lang], line)] == []


# ------------------------------------------------------------------------------------ bad input


def assert_refused(done: subprocess.CompletedProcess[str], *quoted: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("write_corpus.py: error: ")
    assert done.stderr.count("\n") == 1
    for text in quoted:
        assert text in done.stderr


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        (["--target", "it"], ["--target", "'it'", "de", "fr"]),
        ([], ["--target"]),
        (["--target", "de", "--train", "0"], ["--train", "'0'", "from 1 to 100000"]),
        (["--target", "de", "--valid", "-3"], ["--valid", "'-3'", "from 1 to 5000"]),
        (["--target", "fr", "--test", "1.5"], ["--test", "'1.5'", "whole number"]),
        (["--target", "fr", "--train", "100001"], ["--train", "'100001'", "from 1 to 100000"]),
        (["--target", "de", "--seed", "-1"], ["--seed", "'-1'", "at least 0"]),
        (["--target", "de", "--sed", "1"], ["--sed"]),
    ],
)
def test_bad_options(tmp_path: Path, options: list[str], quoted: list[str]) -> None:
    out = tmp_path / "out"
    assert_refused(run("--out", out, *options), *quoted)
    assert not out.exists()


def test_out_is_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert_refused(run("--target", "de", "--out", out), "--out", repr(str(out)), "folder")
    assert out.read_text() == "mine"


def test_out_is_empty() -> None:
    assert_refused(run("--target", "de", "--out", ""), "--out", "''", "folder")


def test_out_is_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    assert_refused(run("--target", "de", "--out", out, *FEW), repr(str(out)))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_is_taken_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "test.de").mkdir()
    assert_refused(run("--target", "de", "--out", tmp_path, *FEW), "test.de is a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["test.de"]


@pytest.mark.parametrize("library", ["babel", "num2words"])
def test_a_library_is_missing(tmp_path: Path, library: str) -> None:
    (tmp_path / f"{library}.py").write_text(f"raise ModuleNotFoundError(name={library!r})")
    out = tmp_path / "out"
    done = run("--target", "de", "--out", out, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert done.stderr == (f'write_corpus.py: {library} is missing: pip install "fairseq-softtopk[examples]"\n')
    assert not out.exists()


# ------------------------------------------------------------------------------------ from inside


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_corpus", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_frame_gives_sentences(script: ModuleType) -> None:
    assert len(script.PARSED_FRAMES) >= 40
    for frame in script.PARSED_FRAMES:
        rng = random.Random(1)
        good = sum(script.has_good_length(script.compose(frame, rng)) for _ in range(24))
        assert good >= 12, frame


def test_a_frame_never_says_the_same_thing_twice(script: ModuleType) -> None:
    frame = script.parse_frame("{language}, {language2}, {language3}\n" * 3)
    rng = random.Random(1)
    for _ in range(100):
        assert len(set(script.compose(frame, rng)["en"].lower().split(", "))) == 3


def test_libraries_spaces_and_apostrophes_become_plain(script: ModuleType) -> None:
    assert script.finish("1\u202f234\u00a0m de l\u2019eau\u2009.", "fr") == "1 234 m de l'eau ."


def test_frames_that_run_dry(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Two English sentences for each German one: the second of them is dropped.
    blocks = (
        f"{word} and so on {{weekday}}.\nUnd so fort {{weekday}}.\nEt {word} ainsi {{weekday}}."
        for word in ("One", "Two")
    )
    monkeypatch.setattr(script, "PARSED_FRAMES", [script.parse_frame(block) for block in blocks])
    with pytest.raises(SystemExit) as stopped:
        script.main(["--target", "fr", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("the frames give only 7 distinct sentences\n")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_what_was_there(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "train.en").write_text("mine\n")
    write_text = Path.write_text

    def full(path: Path, text: str, **options: str) -> int:
        if path.name == "test.de":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--target", "de", "--out", str(tmp_path), *FEW])
    assert stopped.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.en"]
    assert (tmp_path / "train.en").read_text() == "mine\n"
