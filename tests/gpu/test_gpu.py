"""Results on a GPU equal those on the CPU."""

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
def test_decoded_clips_match(codec: str, tmp_path: Path):
    # NVDEC does not decode frames as small as those of the other tests.
    make_shards("synthetic", tmp_path, "--train-clips=8", "--test-clips=1", f"--codec={codec}", "--short-side=160")
    split = ShardedDataset.open(tmp_path).split("train")
    ids = np.arange(8)
    on_cpu, on_gpu = (
        Loader(split, DATA, AugmentConfig(), 0, 8, device).load(ids, 0)
        for device in (torch.device("cpu"), torch.device("cuda", 0))
    )
    assert on_gpu.media["frames"].is_cuda and on_gpu.valid.all()
    difference = (on_cpu.media["frames"].int() - on_gpu.media["frames"].cpu().int()).abs().float()
    assert difference.mean() < 4
    torch.testing.assert_close(on_cpu.media["audio"], on_gpu.media["audio"].cpu(), atol=1e-4, rtol=1e-3)


def test_random_numbers_match():
    seeds = sample_seeds(1, 2, torch.arange(50))
    assert torch.equal(uniform(seeds, 3, 9), uniform(seeds.cuda(), 3, 9).cpu())
    rows = [Bank(20, 8, 0.5, torch.device(device)).columns["visual"].cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(rows[0], rows[1])


@pytest.mark.parametrize("name", ["cudnn", "flash", "flex", "tiles"])
@pytest.mark.parametrize(("num_queries", "num_rows"), [(9, 3000), (1024, 40_000), (100, 1), (33, 1025)])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_attention_backends_match_the_reference(name: str, num_queries: int, num_rows: int, temperature: float):
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(num_queries + num_rows, 128, generator=generator), dim=1).cuda().bfloat16()
    queries, keys = rows[:num_queries], rows[num_queries:]
    takes_bias = name in ("flex", "tiles")
    bias = torch.linspace(-1, 1, num_rows).cuda() if takes_bias else None
    exclude = torch.zeros(num_queries, 1, dtype=torch.long).cuda() if takes_bias else None
    inputs = AttentionInputs(queries, keys, keys, 1 / temperature, bias, exclude)
    if num_rows == 1:
        inputs = AttentionInputs(queries, keys, keys, 1 / temperature)
    backend = next(candidate for candidate in BACKENDS if candidate.name == name)
    if name == "cudnn" and num_rows == 1:
        assert backend.unsupported_reason(inputs) == "needs at least 2 keys"
        return
    assert backend.supports(inputs)
    num_excluded = 0 if inputs.exclude is None else 1
    assert not backend.device or not self_test(backend, keys.device, 64, inputs.bias is not None, num_excluded)
    for output, expected in zip(backend.run(inputs), reference_attention(inputs), strict=True):
        torch.testing.assert_close(output.double(), expected, atol=1e-2, rtol=1e-2)


def test_attention_matches():
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(3000, 32, generator=generator), dim=1)
    for on_cpu, on_gpu in zip(
        attend(keys[:9], keys, keys, 0.07), attend(keys[:9].cuda(), keys.cuda(), keys.cuda(), 0.07), strict=True
    ):
        torch.testing.assert_close(on_cpu, on_gpu.cpu(), atol=1e-4, rtol=1e-4)


def test_nearest_neighbors_match():
    features = F.normalize(torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    features[100:200] = features[300]
    groups, valid = torch.arange(20_000) // 3, torch.ones(20_000, dtype=torch.bool)
    (ids, similarity), (gpu_ids, gpu_similarity) = (
        nearest_neighbors(features.to(device), 50, groups.to(device), valid.to(device)) for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(similarity, gpu_similarity.cpu(), atol=2e-6, rtol=0)
    row, rank = (ids != gpu_ids.cpu()).nonzero(as_tuple=True)  # Scores there are equal up to float32 rounding.
    on_cpu, on_gpu = (features[device_ids[row, rank]].double() for device_ids in (ids, gpu_ids.cpu()))
    assert ((features[row].double() * (on_cpu - on_gpu)).sum(1).abs() < 2e-6).all()


def complementary_on(device_type: str) -> tuple[torch.Tensor, ...]:
    """Return losses, matching probabilities, gradients and rSum, computed on a device."""
    device, generator = torch.device(device_type), torch.Generator().manual_seed(0)
    bank, ids = Bank(500, 16, 0.5, device), torch.randperm(500, generator=generator)[:24].to(device)
    pair = [F.normalize(torch.randn(24, 16, generator=generator), dim=1).to(device).requires_grad_() for _ in range(2)]
    global_batch = GlobalBatch.gather(ids, ids >= 0, *pair)
    loss_of = active_complementary_loss(torch.linspace(0, 1, 24, device=device), 5.0)
    candidates = (
        InBatchNegatives(global_batch, *pair, 0.07),
        SampledNegatives(bank, global_batch, *pair, 0.07, NegativeSampling(63, 0, 1)),
    )
    losses = torch.stack([negatives.losses(loss_of) for negatives in candidates])
    losses.sum().backward()
    scores = retrieval(pair[0].detach(), pair[1].detach(), ids % 3)
    return (
        losses,
        *(negatives.matching_probability() for negatives in candidates),
        *(embeddings.grad for embeddings in pair),
        torch.tensor(scores["rsum"]),
    )


def test_complementary_losses_and_retrieval_match():
    for on_cpu, on_gpu in zip(complementary_on("cpu"), complementary_on("cuda"), strict=True):
        torch.testing.assert_close(on_cpu, on_gpu.cpu(), atol=1e-3, rtol=1e-3)


def test_bank_keeps_bf16_keys_of_its_float32_rows():
    bank = Bank(50, 16, 0.5, torch.device("cuda"), dtype=torch.bfloat16, num_categories=4)
    ids = torch.tensor([3, 3, 49]).cuda()
    rows = F.normalize(torch.randn(2, 3, 16), dim=2).cuda()
    bank.update(GlobalBatch.gather(ids, ids >= 0, rows[0], rows[1]), torch.ones(3).cuda(), torch.rand(3, 2, 4).cuda())
    for name in ("visual", "audio"):
        assert torch.equal(bank.keys(name), bank.columns[name].bfloat16())


def curve(run_root: Path, config: Path, *overrides: str) -> list[float]:
    """Return the losses of a training run of one rank.

    It is started by the deepspeed launcher, because ranks forked by `tests.helpers.rank_group` cannot use the GPU.
    """
    train(config, f"run.root={run_root}", *overrides, launcher=True)
    (run,) = run_root.iterdir()
    return losses(run)


@pytest.fixture(scope="module")
def shards_and_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Shards with frames that a GPU can decode, and the losses of a training run on the CPU in fp32."""
    folder = tmp_path_factory.mktemp("reference")
    make_shards("synthetic", folder / "set", "--train-clips=96", "--test-clips=24", "--short-side=160")
    overrides = f"data.root={folder / 'set'}", "run.device=cpu", "deepspeed.precision=fp32", "deepspeed.zero_stage=0"
    return folder / "set", curve(folder / "cpu", tiny_config(folder), *overrides)


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.long), 1, pytest.param(2, marks=pytest.mark.long), 3]
)
def test_bf16_training_follows_fp32_on_the_cpu(
    stage: int, shards_and_reference: tuple[Path, list[float]], tmp_path: Path
):
    shards, fp32 = shards_and_reference
    overrides = f"data.root={shards}", "run.device=gpu", "deepspeed.precision=bf16", f"deepspeed.zero_stage={stage}"
    bf16 = curve(tmp_path / "gpu", tiny_config(tmp_path), *overrides)
    for phase in (slice(0, 12), slice(12, 20)):  # Means, because the initial weights of stage 3 differ in bfloat16.
        assert np.mean(bf16[phase]) == pytest.approx(np.mean(fp32[phase]), rel=0.1)


def test_bf16_event_parsing_follows_fp32_on_the_cpu(tmp_path: Path):
    write_llp(tmp_path / "raw")
    llp_shards(tmp_path / "raw", tmp_path / "shards")
    config, overrides = ROOT / "configs" / "han.yaml", (f"data.root={tmp_path}/shards", "run.log_every=1",
        "optim.global_batch=16", "optim.lr=1e-3", "phases.parse.epochs=6")  # fmt: skip
    fp32 = curve(tmp_path / "cpu", config, *overrides, "run.device=cpu", "deepspeed.precision=fp32")
    bf16 = curve(tmp_path / "gpu", config, *overrides, "run.device=gpu", "deepspeed.precision=bf16")
    assert np.allclose(fp32, bf16, rtol=0.05) and bf16[-1] < 0.8 * bf16[0]


def test_teacher_scores_match(tmp_path: Path):
    pytest.importorskip("transformers", reason="teachers need transformers: pip install 'distav[teachers]'")
    from distav.tools.pseudo_label.clap_teacher import CLAPTeacher
    from distav.tools.pseudo_label.clip_teacher import CLIPTeacher
    from distav.tools.pseudo_label.prompts import read_prompts
    from tests.helpers.teachers import SIDE, write_prompts, write_teachers

    write_teachers(tmp_path, ["A photo of a cat.", "This is a sound of a dog"])
    write_prompts(tmp_path / "prompts.yaml", tmp_path, ["cat", "dog"])
    prompts = read_prompts(tmp_path / "prompts.yaml")
    frames = torch.randint(0, 256, (2, 3, SIDE, SIDE, 3), dtype=torch.uint8)
    audio = torch.rand(2, 48000) - 0.5
    devices = torch.device("cpu"), torch.device("cuda")
    visual = [CLIPTeacher(prompts["visual"], device).scores(frames.to(device)).cpu() for device in devices]
    audio_scores = [
        CLAPTeacher(prompts["audio"], device, 16000, 3).scores(audio.to(device)).cpu() for device in devices
    ]
    torch.testing.assert_close(*visual, atol=0.02, rtol=1e-3)
    torch.testing.assert_close(*audio_scores, atol=0.02, rtol=1e-3)
