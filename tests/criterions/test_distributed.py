"""Two processes on two halves of a batch do what one process does on the whole of it."""

import os
from functools import cache
from typing import NamedTuple
from unittest import mock

import fairseq_runs
import pytest
import torch
from fairseq.distributed import DistributedTimeoutWrapper, FullyShardedDataParallel, ModuleProxyWrapper
from fairseq.models import distributed_fairseq_model
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from fairseq_softtopk.criterions.soft_beam import SoftBeamConfig, SoftBeamCriterion

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # fairseq's and hydra's

UPDATES = 20
SGD = ["--optimizer", "sgd", "--lr", "0.5", "--max-tokens", "40", "--dropout", "0"]


class Run(NamedTuple):
    """What a test trains, as options of fairseq-train."""

    backend: str
    rho: str
    update_freq: int = 1
    dtype: torch.dtype = torch.float64
    options: tuple[str, ...] = ()


SCHEDULED = ("--teacher-forcing-ratio-schedule", "linear", "--teacher-forcing-ratio-updates", "8")
SCHEDULED += ("--teacher-forcing-ratio-end", "0.2", "--soft-beam-start-update", "4", "--soft-beam-prob", "0.5")
RUNS = [
    Run("legacy_ddp", "0.8"),
    Run("legacy_ddp", "0", update_freq=2),
    Run("no_c10d", "0.8", dtype=torch.float32, options=("--sentence-avg",)),
    Run("pytorch_ddp", "0.8"),
    Run("pytorch_ddp", "0.8", update_freq=2),
    Run("pytorch_ddp", "1", update_freq=2, options=SCHEDULED),
]
ENDS_WITHOUT = (*SCHEDULED, "--teacher-forcing-ratio-end", "0")
REFUSED = [Run("pytorch_ddp", "0"), Run("pytorch_ddp", "1", options=ENDS_WITHOUT)]
# Sums in another order: a rounding error, which 20 updates of such a network do not blow up.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


class CPUDistributedDataParallel(DistributedDataParallel):
    """fairseq passes the number of a GPU to PyTorch's DDP, also on a CPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "device_ids": None, "output_device": None})


def train(corpus, run: Run, update_freq: int, *options: str):
    common = [*SGD, *run.options, "--teacher-forcing-ratio", run.rho, "--update-freq", str(update_freq)]
    common += ["--save-dir", str(corpus / "checkpoints")]
    trainer = fairseq_runs.make_trainer(fairseq_runs.configure(corpus, *common, *options), run.dtype)
    fairseq_runs.train(trainer, UPDATES)
    return fairseq_runs.parameters(trainer)


def work(rank: int, folder, runs: list[Run]) -> None:
    """One of two processes: trains everything, leaves its weights or its error in ``folder``."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for run in runs:
        world = ["--distributed-world-size", "2", "--distributed-rank", str(rank), "--ddp-backend", run.backend]
        (folder / "checkpoints").mkdir(exist_ok=True)  # fairseq saves the model that an error stops
        try:
            results[run] = train(folder, run, run.update_freq, *world)
        except ValueError as error:
            results[run] = str(error)
    torch.save([results[run] for run in runs], folder / f"rank{rank}.pt")
    distributed.barrier()
    # Not by way of Python's own end: PyTorch's DDP keeps its process group for good, also after
    # destroy_process_group, and gloo's threads, which drop what they last reduced, may then abort the process.
    os._exit(0)


def work_on_cpu(rank: int, folder, runs: list[Run]) -> None:
    with mock.patch.object(distributed_fairseq_model, "DistributedDataParallel", CPUDistributedDataParallel):
        work(rank, folder, runs)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return fairseq_runs.write_corpus(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def ranks(corpus):
    """What each of the two processes ends with."""
    runs = [*RUNS, *REFUSED]
    multiprocessing.spawn(work_on_cpu, (corpus, runs), nprocs=2)
    results = [torch.load(corpus / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    return [dict(zip(runs, of_rank, strict=True)) for of_rank in results]


@pytest.fixture(scope="module")
def alone(corpus):
    """Trains in this process, with one thread as the others: ``alone(rho, update_freq, dtype, options)``."""

    @cache
    def run(rho, update_freq, dtype, options=()):
        return train(corpus, Run("legacy_ddp", rho, update_freq, dtype, options), update_freq)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_two_processes_are_one_with_the_whole_batch(ranks, alone, run):
    first, second = (results[run] for results in ranks)
    assert torch.equal(first, second)
    expected = alone(run.rho, 2 * run.update_freq, run.dtype, run.options)
    assert (first - expected).abs().max() < TOLERANCE[run.dtype]


def test_half_of_the_batch_would_be_seen(alone):
    half, whole = (alone("0.8", update_freq, torch.float64) for update_freq in (1, 2))
    assert (half - whole).abs().max() > 0.01


@pytest.mark.parametrize("run", REFUSED, ids=str)
def test_a_backend_that_would_not_synchronise_is_refused_on_every_rank(ranks, run):
    for results in ranks:
        assert "wants --ddp-backend legacy_ddp" in results[run]
        assert "under CPUDistributedDataParallel gradients would stay unsynchronised" in results[run]


class SynchronisesInItsForward(torch.nn.Module):
    """What matters of PyTorch's DDP, SlowMo and sharding, without a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class ReducesWhenTold(SynchronisesInItsForward):
    """What matters of fairseq's legacy DDP."""

    def all_reduce_grads(self):
        """Averages the gradients over the processes."""


@pytest.mark.parametrize("patient", [False, True], ids=["plain", "with --heartbeat-timeout"])
@pytest.mark.parametrize("wrapper", [SynchronisesInItsForward, ReducesWhenTold])
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_is_refused_however_the_trainer_wraps_it(make_model, make_sample, task, wrapper, patient, rho):
    criterion = SoftBeamCriterion(task, SoftBeamConfig(sentence_avg=False, teacher_forcing_ratio=rho))
    model = ModuleProxyWrapper(wrapper(make_model()))
    # With a timeout of its own it would start a thread that no one ends.
    model = DistributedTimeoutWrapper(model, timeout=0) if patient else model
    if rho == 0 and wrapper is SynchronisesInItsForward:
        with pytest.raises(ValueError, match=r"legacy_ddp .*: under SynchronisesInItsForward grad"):
            criterion(model, make_sample([(3, 2)]))
    else:
        assert criterion(model, make_sample([(3, 2)]))[0].isfinite()


@pytest.mark.parametrize(
    ("wrapper", "rho", "layerdrop", "refused"),
    [
        (SynchronisesInItsForward, 0.8, 0.5, True),
        (SynchronisesInItsForward, 1.0, 0.5, False),
        (SynchronisesInItsForward, 0.8, 0.0, False),
        (ReducesWhenTold, 0.8, 0.5, False),
    ],
)
def test_layers_that_only_the_beam_uses_are_not_left_unsynchronised(
    make_model, make_sample, task, wrapper, rho, layerdrop, refused
):
    criterion = SoftBeamCriterion(task, SoftBeamConfig(sentence_avg=False, teacher_forcing_ratio=rho))
    model = ModuleProxyWrapper(wrapper(make_model("transformer", decoder_layerdrop=layerdrop)))
    if refused:
        with pytest.raises(ValueError, match=r"--decoder-layerdrop, .* wants --ddp-backend legacy_ddp"):
            criterion(model, make_sample([(3, 2)]))
    else:
        assert criterion(model, make_sample([(3, 2)]))[0].isfinite()


@pytest.mark.parametrize("rho", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("wrapper", [SynchronisesInItsForward, ReducesWhenTold])
def test_parts_of_a_model_are_not_left_unsynchronised(make_model, make_sample, task, wrapper, rho):
    """As multilingual_translation trains them, which passes the model of a language pair to the criterion."""

    def train_step(sample, model, criterion, optimizer, update_num):
        return criterion(model.part, sample)

    task.train_step = train_step
    criterion = SoftBeamCriterion(task, SoftBeamConfig(sentence_avg=False, teacher_forcing_ratio=rho))
    whole = torch.nn.Module()
    whole.part = make_model()
    model, sample = ModuleProxyWrapper(wrapper(whole)), make_sample([(3, 2)])
    if wrapper is SynchronisesInItsForward:
        with pytest.raises(ValueError, match=r"language pair, wants .* legacy_ddp .*: under Synchronises"):
            task.train_step(sample, model, criterion, None, 0)
        criterion.eval()
        assert criterion(whole.part, sample)[0].isfinite()
    else:
        assert task.train_step(sample, model, criterion, None, 0)[0].isfinite()
    assert task.train_step(sample, whole, criterion.train(), None, 1)[0].isfinite()


class Sharded(FullyShardedDataParallel):
    """fairseq's wrapper, without fairscale (which wants CUDA here); reduces when told, to be no other case."""

    def __init__(self, module):
        torch.nn.Module.__init__(self)
        self.module = module

    forward = SynchronisesInItsForward.forward
    all_reduce_grads = ReducesWhenTold.all_reduce_grads

    def __getattr__(self, name):
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["module"], name)


@pytest.mark.parametrize("rho", [0.0, 0.8, 1.0])
def test_weights_that_are_sharded_are_refused_by_the_beam(make_model, make_sample, task, rho):
    criterion = SoftBeamCriterion(task, SoftBeamConfig(sentence_avg=False, teacher_forcing_ratio=rho))
    model = DistributedTimeoutWrapper(Sharded(make_model()), timeout=0)
    if rho < 1:
        with pytest.raises(ValueError, match="cannot train with --ddp-backend fully_sharded"):
            criterion(model, make_sample([(3, 2)]))
    else:
        assert criterion(model, make_sample([(3, 2)]))[0].isfinite()


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({"RANK": "0", "WORLD_SIZE": "3"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "3"}, False),
    ],
)
def test_processes_that_fairseq_has_not_joined_are_warned_of(task, monkeypatch, caplog, environment, warned):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        SoftBeamCriterion(task, SoftBeamConfig(sentence_avg=False))
    warnings = [record.getMessage() for record in caplog.records if "model of its own" in record.getMessage()]
    assert len(warnings) == warned
    assert all("--distributed-world-size 3" in text for text in warnings)
