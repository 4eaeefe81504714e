"""What runs on a GPU equals what runs on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distav.config.schema import AugmentConfig, DataConfig
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Loader
from distav.distributed.rng import sample_seeds, uniform
from distav.evaluation.metrics import retrieval
from distav.losses.active_complementary import active_complementary_loss
from distav.losses.info_nce import InBatchNegatives, SampledNegatives
from distav.memory.attention import AttentionInputs, reference_attention
from distav.memory.attention_backends import BACKENDS, self_test
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.knn import nearest_neighbors
from distav.memory.negative_sampling import NegativeSampling
from distav.memory.softmax import attend
from tests.conftest import make_shards
from tests.helpers.events import llp_shards, write_llp
from tests.helpers.launch import ROOT, losses, tiny_config, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DATA = DataConfig(num_frames=3, frame_stride=2, frame_size=24, audio_s=0.5)


@pytest.mark.parametrize("codec", ["mjpeg", "vp9", "h264"])
def test_the_graph_decodes_alike_on_gpu_and_cpu(codec: str, tmp_path: Path):
    # NVDEC takes no frames as small as the other tests use.
    make_shards("synthetic", tmp_path, "--train-clips=8", "--test-clips=1", f"--codec={codec}", "--short-side=160")
    split = ShardedDataset.open(tmp_path).split("train")
    ids = np.arange(8)
    here, there = (
        Loader(split, DATA, AugmentConfig(), 0, 8, device).load(ids, 0)
        for device in (torch.device("cpu"), torch.device("cuda", 0))
    )
    assert there.media["frames"].is_cuda and there.valid.all()
    difference = (here.media["frames"].int() - there.media["frames"].cpu().int()).abs().float()
    assert difference.mean() < 4
    torch.testing.assert_close(here.media["audio"], there.media["audio"].cpu(), atol=1e-4, rtol=1e-3)


def test_random_numbers_are_the_same_on_both():
    seeds = sample_seeds(1, 2, torch.arange(50))
    assert torch.equal(uniform(seeds, 3, 9), uniform(seeds.cuda(), 3, 9).cpu())
    rows = [Bank(20, 8, 0.5, torch.device(kind)).columns["visual"].cpu() for kind in ("cpu", "cuda")]
    torch.testing.assert_close(rows[0], rows[1])


@pytest.mark.parametrize("back_end", ["cudnn", "flash", "flex", "tiles"])
@pytest.mark.parametrize(("num_queries", "num_rows"), [(9, 3000), (1024, 40_000), (100, 1), (33, 1025)])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_back_ends_equal_the_reference(back_end: str, num_queries: int, num_rows: int, temperature: float):
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(num_queries + num_rows, 128, generator=generator), dim=1).cuda().bfloat16()
    queries, keys = rows[:num_queries], rows[num_queries:]
    bias = torch.linspace(-1, 1, num_rows).cuda() if back_end in ("flex", "tiles") else None
    exclude = torch.zeros(num_queries, 1, dtype=torch.long).cuda() if back_end in ("flex", "tiles") else None
    asked = AttentionInputs(queries, keys, keys, 1 / temperature, bias, exclude)
    if num_rows == 1:
        asked = AttentionInputs(queries, keys, keys, 1 / temperature)
    chosen = next(each for each in BACKENDS if each.name == back_end)
    if back_end == "cudnn" and num_rows == 1:
        assert chosen.unsupported_reason(asked) == "needs at least 2 keys"
        return
    assert chosen.supports(asked)
    num_excluded = 0 if asked.exclude is None else 1
    assert not chosen.device or not self_test(chosen, keys.device, 64, asked.bias is not None, num_excluded)
    for ours, expected in zip(chosen.run(asked), reference_attention(asked), strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-2, rtol=1e-2)


def test_attention_is_the_same_on_both():
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(3000, 32, generator=generator), dim=1)
    for ours, theirs in zip(
        attend(keys[:9], keys, keys, 0.07), attend(keys[:9].cuda(), keys.cuda(), keys.cuda(), 0.07), strict=True
    ):
        torch.testing.assert_close(ours, theirs.cpu(), atol=1e-4, rtol=1e-4)


def test_neighbors_are_the_same_on_both():
    features = F.normalize(torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    features[100:200] = features[300]
    groups, valid = torch.arange(20_000) // 3, torch.ones(20_000, dtype=torch.bool)
    (ids, similarity), (gpu_ids, gpu_similarity) = (
        nearest_neighbors(features.to(kind), 50, groups.to(kind), valid.to(kind)) for kind in ("cpu", "cuda")
    )
    torch.testing.assert_close(similarity, gpu_similarity.cpu(), atol=2e-6, rtol=0)
    row, place = (ids != gpu_ids.cpu()).nonzero(as_tuple=True)  # only where float32 cannot tell two scores apart
    ours, theirs = (features[each[row, place]].double() for each in (ids, gpu_ids.cpu()))
    assert ((features[row].double() * (ours - theirs)).sum(1).abs() < 2e-6).all()


def complementary_on(kind: str) -> tuple[torch.Tensor, ...]:
    device, generator = torch.device(kind), torch.Generator().manual_seed(0)
    bank, ids = Bank(500, 16, 0.5, device), torch.randperm(500, generator=generator)[:24].to(device)
    pair = [F.normalize(torch.randn(24, 16, generator=generator), dim=1).to(device).requires_grad_() for _ in range(2)]
    global_batch = GlobalBatch.gather(ids, ids >= 0, *pair)
    loss_of = active_complementary_loss(torch.linspace(0, 1, 24, device=device), 5.0)
    candidates = (
        InBatchNegatives(global_batch, *pair, 0.07),
        SampledNegatives(bank, global_batch, *pair, 0.07, NegativeSampling(63, 0, 1)),
    )
    losses = torch.stack([each.losses(loss_of) for each in candidates])
    losses.sum().backward()
    scores = retrieval(pair[0].detach(), pair[1].detach(), ids % 3)
    return (
        losses,
        *(each.matching_probability() for each in candidates),
        *(each.grad for each in pair),
        torch.tensor(scores["rsum"]),
    )


def test_complementary_losses_and_retrieval_are_the_same_on_both():
    for ours, theirs in zip(complementary_on("cpu"), complementary_on("cuda"), strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), atol=1e-3, rtol=1e-3)


def test_the_bank_keeps_a_rounded_copy_of_its_rows():
    bank = Bank(50, 16, 0.5, torch.device("cuda"), dtype=torch.bfloat16, num_categories=4)
    ids = torch.tensor([3, 3, 49]).cuda()
    rows = F.normalize(torch.randn(2, 3, 16), dim=2).cuda()
    bank.update(GlobalBatch.gather(ids, ids >= 0, rows[0], rows[1]), torch.ones(3).cuda(), torch.rand(3, 2, 4).cuda())
    for name in ("visual", "audio"):
        assert torch.equal(bank.keys(name), bank.columns[name].bfloat16())


def curve(run_root: Path, config: Path, *overrides: str) -> list[float]:
    """The losses of a training of one rank.

    The deepspeed launcher starts it: a rank forked from the process of `tests.helpers.team` cannot use the GPU, since
    DeepSpeed has initialized CUDA there.
    """
    train(config, f"run.root={run_root}", *overrides, launcher=True)
    (run,) = run_root.iterdir()
    return losses(run)


@pytest.fixture(scope="module")
def shards_and_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Shards with frames that a GPU decodes, and the losses of a training on them on the CPU in fp32."""
    folder = tmp_path_factory.mktemp("reference")
    make_shards("synthetic", folder / "set", "--train-clips=96", "--test-clips=24", "--short-side=160")
    overrides = f"data.root={folder / 'set'}", "run.device=cpu", "deepspeed.precision=fp32", "deepspeed.zero_stage=0"
    return folder / "set", curve(folder / "cpu", tiny_config(folder), *overrides)


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.long), 1, pytest.param(2, marks=pytest.mark.long), 3]
)
def test_training_in_bf16_follows_the_cpu_in_fp32(
    stage: int, shards_and_reference: tuple[Path, list[float]], tmp_path: Path
):
    shards, full = shards_and_reference
    overrides = f"data.root={shards}", "run.device=gpu", "deepspeed.precision=bf16", f"deepspeed.zero_stage={stage}"
    low = curve(tmp_path / "gpu", tiny_config(tmp_path), *overrides)
    for phase in (slice(0, 12), slice(12, 20)):  # Means, since stage 3 draws other initial weights in bfloat16.
        assert np.mean(low[phase]) == pytest.approx(np.mean(full[phase]), rel=0.1)


def test_parsing_in_bf16_follows_the_cpu_in_fp32(tmp_path: Path):
    write_llp(tmp_path / "raw")
    llp_shards(tmp_path / "raw", tmp_path / "shards")
    config, same = ROOT / "configs" / "han.yaml", (f"data.root={tmp_path}/shards", "run.log_every=1",
        "optim.global_batch=16", "optim.lr=1e-3", "phases.parse.epochs=6")  # fmt: skip
    full = curve(tmp_path / "cpu", config, *same, "run.device=cpu", "deepspeed.precision=fp32")
    low = curve(tmp_path / "gpu", config, *same, "run.device=gpu", "deepspeed.precision=bf16")
    assert np.allclose(full, low, rtol=0.05) and low[-1] < 0.8 * low[0]


def test_teachers_say_the_same_on_both(tmp_path: Path):
    pytest.importorskip("transformers", reason="teachers need transformers: pip install 'distav[teachers]'")
    from distav.tools.pseudo_label.prompts import read_prompts
    from distav.tools.pseudo_label.teachers import CLAPTeacher, CLIPTeacher
    from tests.helpers.teachers import SIDE, write_prompts, write_teachers

    write_teachers(tmp_path, ["A photo of a cat.", "This is a sound of a dog"])
    write_prompts(tmp_path / "prompts.yaml", tmp_path, ["cat", "dog"])
    prompts = read_prompts(tmp_path / "prompts.yaml")
    frames = torch.randint(0, 256, (2, 3, SIDE, SIDE, 3), dtype=torch.uint8)
    sound = torch.rand(2, 48000) - 0.5
    here, there = (torch.device(kind) for kind in ("cpu", "cuda"))
    seen = [CLIPTeacher(prompts["visual"], device).scores(frames.to(device)).cpu() for device in (here, there)]
    heard = [
        CLAPTeacher(prompts["audio"], device, 16000, 3).scores(sound.to(device)).cpu() for device in (here, there)
    ]
    torch.testing.assert_close(*seen, atol=0.02, rtol=1e-3)
    torch.testing.assert_close(*heard, atol=0.02, rtol=1e-3)
