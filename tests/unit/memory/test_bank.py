import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.losses.info_nce import SampledNegatives, ScoreLoss, cross_entropy, noise_contrastive
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory import attention_backends
from distav.memory.attention import AttentionInputs, reference_attention, tiled_attention
from distav.memory.attention_backends import AttentionBackend, select_backend
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.key_shard import Tiling
from distav.memory.knn import nearest_neighbors
from distav.memory.negative_sampling import NegativeSampling, Partition, drawn_ids
from distav.memory.softmax import attend

CPU = torch.device("cpu")


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled_bank(num: int, dim: int) -> Bank:
    bank = Bank(num, dim, 0.5, CPU, num_categories=3)
    bank.columns["visual"].copy_(unit(num, dim, seed=1))
    bank.columns["audio"].copy_(unit(num, dim, seed=2))
    bank.columns["visits"][:] = 1
    bank.refresh()
    return bank


def visitors(ids: Tensor, visual: Tensor, audio: Tensor, valid: Tensor | None = None) -> GlobalBatch:
    return GlobalBatch.gather(ids, torch.ones_like(ids, dtype=torch.bool) if valid is None else valid, visual, audio)


def losses_of(bank: Bank, ids: Tensor, visual: Tensor, audio: Tensor, *settings: Any, **more: Any) -> Tensor:
    return instance_losses(bank, visitors(ids, visual, audio), visual, audio, *settings, **more).losses


def drawn_losses(
    bank: Bank, ids: Tensor, visual: Tensor, audio: Tensor, draw: NegativeSampling, loss_of: ScoreLoss
) -> Tensor:
    return SampledNegatives(bank, visitors(ids, visual, audio), visual, audio, 0.07, draw).losses(loss_of)


SHAPES = [(3, 50, 16), (8, 64, 64), (5, 1, 8), (2, 130, 128), (300, 2051, 24), (17, 1023, 20), (1, 4097, 8)]


@pytest.mark.parametrize("back_end", ["flash-cpu", "tiles"])
@pytest.mark.parametrize(("num_queries", "num_rows", "dim"), SHAPES)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attend_equals_the_reference(
    back_end: str, num_queries: int, num_rows: int, dim: int, temperature: float, biased: bool, dtype: torch.dtype
):
    queries, keys, values = unit(num_queries, dim), unit(num_rows, dim, seed=1), unit(num_rows, dim, seed=2)
    keys, values = keys.to(dtype), values.to(dtype)
    keys[num_rows // 2 :] = keys[: num_rows - num_rows // 2].clone()  # every key twice
    bias = torch.linspace(-3, 3, num_rows) if biased else None
    if bias is not None:
        bias[::3] = -math.inf if num_rows > 1 else 0.0
    if back_end == "flash-cpu" and dim % 8:
        with pytest.raises(ValueError, match="flash-cpu cannot do this here; these can: tiles"):
            attend(queries, keys, values, temperature, bias=bias, backend=back_end)
        return
    lse, out = attend(queries, keys, values, temperature, bias=bias, backend=back_end)
    expected_lse, expected_out = reference_attention(AttentionInputs(queries, keys, values, 1 / temperature, bias))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-4, atol=2e-5)


def test_the_fused_operator_serves_here_and_excluded_keys_go_to_the_tiles():
    rows = unit(40, 16)
    assert select_backend(AttentionInputs(rows, rows, rows, 1.0, torch.zeros(40))).name == "flash-cpu"
    assert (
        select_backend(AttentionInputs(rows, rows, rows, 1.0, None, torch.zeros(40, 1, dtype=torch.long))).name
        == "tiles"
    )


@pytest.mark.parametrize("num_rows", [1, 1000, 2600])
@pytest.mark.parametrize("with_more", [False, True])
def test_flex_attention_takes_bias_and_excluded_keys(num_rows: int, with_more: bool, monkeypatch: pytest.MonkeyPatch):
    # Not compiled, as it would be on a GPU: the same function, slowly.
    monkeypatch.setattr(attention_backends, "_compiled_flex", lambda: attention_backends._flex_attention)
    queries, keys, values = unit(20, 16), unit(num_rows, 16, seed=1), unit(num_rows, 16, seed=2)
    bias = torch.linspace(-2, 2, num_rows) if with_more else None
    exclude = torch.randint(-1, num_rows, (20, 2)) if with_more and num_rows > 1 else None
    asked = AttentionInputs(queries, keys, values, 8.0, bias, exclude)
    flex = next(each for each in attention_backends.BACKENDS if each.name == "flex")
    for ours, expected in zip(flex.run(asked), reference_attention(asked), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_back_end_that_answers_wrongly_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    wrong = AttentionBackend("wrong", lambda asked: tuple(2 * each for each in tiled_attention(asked)), "cpu")  # type: ignore[arg-type]
    broken = AttentionBackend("broken", lambda asked: asked.no_such_operator, "cpu")  # type: ignore[attr-defined]
    monkeypatch.setattr(attention_backends, "BACK_ENDS", (wrong, broken, *attention_backends.BACKENDS))
    rows = unit(40, 16)
    assert select_backend(AttentionInputs(rows, rows, rows, 1.0)).name == "flash-cpu"


def test_attend_leaves_rows_out():
    queries, keys = unit(4, 8), unit(20, 8, seed=1)
    exclude = torch.tensor([[3, 4], [-1, -1], [19, -1], [0, 0]])
    asked = AttentionInputs(queries, keys, keys, 10.0, None, exclude)
    found = tiled_attention(asked, tile=6)
    for ours, expected in zip(found, reference_attention(asked), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend(queries, keys, keys, 0.1, exclude=exclude), found)
    for back_end in ("flash-cpu", "tiles"):
        lse, out = attend(queries, keys, keys, 0.1, bias=torch.full((20,), -math.inf), backend=back_end)
        assert (lse == -math.inf).all() and (out == 0).all()


def test_attend_refuses_a_temperature_of_zero():
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        attend(unit(2, 8), unit(3, 8), unit(3, 8), 0.0)


def dense_losses(
    bank: Bank, ids: Tensor, visual: Tensor, audio: Tensor, tau: float, softness: Tensor, soft: SoftTargets
) -> Tensor:
    """The published formulas, term by term, in float64."""
    bars = {name: bank.columns[name].double() for name in ("visual", "audio")}
    queries = {"visual": visual.double(), "audio": audio.double()}
    pair = (bars["visual"] * bars["audio"]).sum(1)
    total = torch.zeros(len(ids), dtype=torch.float64)
    for own, other in (("visual", "audio"), ("audio", "visual")):
        log_p = (queries[own] @ bars[other].T / tau).log_softmax(1)
        with torch.no_grad():
            scores = {
                "none": torch.zeros(len(ids), bank.num_samples, dtype=torch.float64),
                "bootstrapping": queries[own] @ bars[other].T / soft.temperature,
                "swapped": queries[other] @ bars[own].T / soft.temperature,
                "neighbor": bars[own][ids] @ bars[own].T / soft.temperature,
                "cycle": pair[ids][:, None] / soft.cycle_temperature
                + bars[other][ids] @ bars[other].T / soft.temperature
                + pair / soft.cycle_temperature,
            }[soft.kind]
            if soft.excludes_self:
                scores[torch.arange(len(ids)), ids] = -math.inf
            targets = scores.softmax(1) * softness.double()[:, None]
            targets[torch.arange(len(ids)), ids] += 1 - softness.double()
        total = total - (targets * log_p).sum(1)
    return total


@pytest.mark.parametrize("kind", ["none", "bootstrapping", "swapped", "neighbor", "cycle"])
@pytest.mark.parametrize("excludes_self", [False, True])
def test_instance_loss_and_gradient_equal_the_dense_formula(kind: str, excludes_self: bool):
    bank = filled_bank(40, 16)
    ids = torch.tensor([7, 30, 12, 12, 39])
    softness = torch.tensor([0.0, 0.2, 0.5, 0.5, 1.0]) * (kind != "none")
    soft = SoftTargets(kind, 0.2, 0.3, excludes_self)
    gradients = []
    for function in (losses_of, dense_losses):
        raw = [torch.randn(5, 16, generator=torch.Generator().manual_seed(seed), requires_grad=True) for seed in (8, 9)]
        visual, audio = (F.normalize(each, dim=1) for each in raw)
        losses = function(bank, ids, visual, audio, 0.07, softness, soft)
        (losses * torch.arange(1.0, 6.0)).sum().backward()
        gradients.append([losses.detach().double(), *(each.grad.double() for each in raw)])
    for ours, published in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, published, rtol=2e-5, atol=2e-5)


def test_exact_loss_of_a_random_bank_is_log_n_plus_0_8_each_way():
    num, dim = 20000, 128
    bank = filled_bank(num, dim)
    ids = torch.arange(256)
    losses = losses_of(bank, ids, unit(256, dim, seed=5), unit(256, dim, seed=6), 0.07)
    assert abs(losses.mean().item() / 2 - (math.log(num) + 1 / (2 * dim * 0.07**2))) < 0.12


def test_weighted_mean_is_the_weighted_mean():
    losses, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 3.0])
    assert weighted_mean(losses, weights).item() == pytest.approx(13 / 4)
    assert weighted_mean(losses, torch.zeros(3)).item() == 0


def test_temperature_gets_its_gradient():
    bank, ids = filled_bank(30, 8), torch.tensor([4, 9, 9])
    visual, audio = unit(3, 8, seed=5), unit(3, 8, seed=6)
    softness, soft = torch.tensor([0.0, 0.3, 1.0]), SoftTargets("neighbor", 0.1, 0.1)
    gradients = []
    for function in (losses_of, dense_losses):
        tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        (function(bank, ids, visual, audio, tau, softness, soft) * torch.arange(1.0, 4.0)).sum().backward()
        gradients.append(tau.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_rows_never_written_can_be_left_out():
    bank, ids = filled_bank(30, 8), torch.tensor([3, 25])
    bank.columns["visits"][20:] = 0
    visual, audio = (unit(2, 8, seed=seed).requires_grad_() for seed in (5, 6))
    losses = losses_of(bank, ids, visual, audio, 0.1, mask_uninitialized=True)
    expected = sum(
        (query[0] @ rows[:20].T / 0.1).logsumexp(0) - query[0] @ rows[3] / 0.1
        for query, rows in ((visual, bank.columns["audio"]), (audio, bank.columns["visual"]))
    )
    torch.testing.assert_close(losses, torch.stack([expected, torch.zeros(())]))
    losses.sum().backward()
    assert (visual.grad[1] == 0).all() and (visual.grad[0] != 0).any()


def test_drawn_rows_give_the_softmax_over_themselves():
    bank, ids = filled_bank(500, 16), torch.tensor([7, 0, 499])
    drawn = drawn_ids(ids, 64, 500, seed=1, step=5)
    assert not (drawn == ids[:, None]).any() and drawn.min() >= 0 and drawn.max() < 500
    assert not torch.equal(drawn, drawn_ids(ids, 64, 500, seed=1, step=6))
    gradients = []
    for exact in (False, True):
        visual, audio = (unit(3, 16, seed=seed).requires_grad_() for seed in (5, 6))
        if exact:
            losses = torch.zeros(3)
            for query, rows in ((visual, bank.columns["audio"]), (audio, bank.columns["visual"])):
                every = rows[torch.cat([ids[:, None], drawn], dim=1)]
                losses = losses - (torch.einsum("bd,bmd->bm", query, every) / 0.07).log_softmax(1)[:, 0]
        else:
            losses = drawn_losses(bank, ids, visual, audio, NegativeSampling(64, 1, 5), cross_entropy)
        losses.sum().backward()
        gradients.append((losses, visual.grad, audio.grad))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_noise_contrastive_estimation_starts_where_avid_does_and_has_its_gradient():
    """Random unit rows, D = 128, temperature 0.07, M = 1024: Z = 2.215, and 7.71 + 1.00 for each direction."""
    bank, ids = Bank(20_000, 128, 0.5, torch.device("cpu"), seed=2), torch.arange(64)
    visual, audio = (unit(64, 128, seed=seed).double().float().requires_grad_() for seed in (8, 9))
    partition = Partition()
    draw, loss_of = NegativeSampling(1024, 1, 5), noise_contrastive(partition)
    losses = drawn_losses(bank, ids, visual, audio, draw, loss_of)
    assert partition.value == pytest.approx(2.215, abs=0.02)
    assert losses.mean().item() / 2 == pytest.approx(8.71, abs=0.2)
    losses.sum().backward()

    drawn = drawn_ids(ids, 1024, 20_000, seed=1, step=5)
    total = torch.zeros(64)
    copies = [each.detach().clone().requires_grad_() for each in (visual, audio)]
    for query, rows in zip(copies, (bank.columns["audio"], bank.columns["visual"]), strict=True):
        scores = (torch.einsum("bd,bmd->bm", query, rows[torch.cat([ids[:, None], drawn], dim=1)]) / 0.07).exp()
        noise = 1024 * partition.value
        total = total - (scores[:, 0] / (scores[:, 0] + noise)).log() - (noise / (scores[:, 1:] + noise)).log().sum(1)
    torch.testing.assert_close(losses, total, rtol=1e-4, atol=1e-4)
    total.sum().backward()
    for ours, theirs in zip((visual, audio), copies, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    first = partition.value
    drawn_losses(bank, ids, audio, visual, draw, loss_of)
    assert partition.value == first


def test_the_exact_softmax_starts_at_log_n_and_what_random_rows_add():
    bank, ids = Bank(20_000, 128, 0.5, torch.device("cpu"), seed=2), torch.arange(256)
    losses = losses_of(bank, ids, unit(256, 128, seed=8), unit(256, 128, seed=9), 0.07)
    assert losses.mean().item() / 2 == pytest.approx(math.log(20_000) + 0.80, abs=0.15)


def test_drawn_ids_cover_all_others_evenly():
    drawn = drawn_ids(torch.tensor([2]), 50_000, 5, seed=0, step=0)
    share = torch.bincount(drawn[0], minlength=5) / 50_000
    torch.testing.assert_close(share, torch.tensor([0.25, 0.25, 0, 0.25, 0.25]), atol=0.01, rtol=0)


def test_bank_averages_repeated_ids_and_refuses_what_is_not_finite():
    bank = filled_bank(6, 4)
    before = bank.columns["visual"].clone()
    ids, valid = torch.tensor([2, 2, 4, 5, 1]), torch.tensor([True, True, True, False, True])
    visual, audio = unit(5, 4, seed=3), unit(5, 4, seed=4)
    visual[2, 0] = math.nan
    bank.update(visitors(ids, visual, audio, valid), torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5]))
    after = bank.columns["visual"]
    torch.testing.assert_close(after[2], F.normalize(0.5 * before[2] + 0.5 * visual[:2].mean(0), dim=0))
    torch.testing.assert_close(after[1], F.normalize(0.5 * before[1] + 0.5 * visual[4], dim=0))
    for untouched in (0, 3, 4, 5):
        assert torch.equal(after[untouched], before[untouched])
    assert bank.columns["visits"].tolist() == [1, 2, 2, 1, 1, 1]
    assert bank.columns["category_agreement"][2] == pytest.approx(0.75)
    torch.testing.assert_close(bank.columns["pair_similarity"], (after * bank.columns["audio"]).sum(1))


def test_stored_categories_add_up_exactly():
    bank = filled_bank(50, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(50, (12,), generator=generator)
        shares = torch.rand(12, 2, 3, generator=generator)
        bank.update(visitors(ids, unit(12, 4), unit(12, 4)), torch.ones(12), shares)
    stored = bank.columns["categories"].double()
    visual, audio = stored.unbind(1)
    assert torch.equal(bank.assignments.gram, torch.stack([visual.T @ visual, visual.T @ audio, audio.T @ audio]))
    gram, count = bank.assignments.gram_matrices()
    torch.testing.assert_close(gram[1].double(), visual.T @ audio / 127**2, rtol=1e-6, atol=1e-6)
    assert count == int(stored.flatten(1).any(1).sum())


def test_rows_begin_as_random_directions_and_count_as_unseen():
    bank = Bank(4000, 32, 0.5, CPU)
    for name in ("visual", "audio"):
        torch.testing.assert_close(bank.columns[name].norm(dim=1), torch.ones(4000))
        assert bank.columns[name].mean(0).abs().max() < 0.02
    assert (bank.columns["visual"] * bank.columns["audio"]).sum(1).mean().abs() < 0.02
    assert torch.isnan(bank.pair_similarity()).all()


def test_bank_state_goes_by_id_range():
    bank = filled_bank(10, 4)
    bank.update(visitors(torch.arange(4), unit(4, 4), unit(4, 4)), torch.ones(4), torch.rand(4, 2, 3))
    bank.store_column("votes", torch.rand(10, 3))
    state = bank.state()
    parts = [
        {key: (value[low:high] if key != "range" else torch.tensor([low, high, 10])) for key, value in state.items()}
        for low, high in ((0, 3), (3, 7), (7, 10))
    ]
    other = Bank(10, 4, 0.5, CPU, num_categories=3)
    other.restore(parts)
    assert torch.equal(other.assignments.gram, bank.assignments.gram)
    assert all(torch.equal(other.columns[name], column) for name, column in bank.columns.items())
    with pytest.raises(ValueError, match="lacks 3"):
        Bank(10, 4, 0.5, CPU, num_categories=3).restore(parts[1:])


def brute_force(features: Tensor, k: int, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Every score, in float64, and a full sort."""
    scores = (features.double() @ features.double().T).masked_fill((groups[:, None] == groups) | ~valid, -9.0)
    best = scores.sort(dim=1, descending=True, stable=True)
    return best.indices[:, :k].masked_fill(best.values[:, :k] == -9, -1), best.values[:, :k]


def check_neighbors(features: Tensor, k: int, groups: Tensor, valid: Tensor, tiling: Tiling | None) -> None:
    """Ids are those of a full sort but where float32 cannot tell two scores apart."""
    ids, similarity = nearest_neighbors(features, k, groups, valid, tiling=tiling)
    expected = brute_force(features, k, groups, valid)
    torch.testing.assert_close(similarity[ids >= 0].double(), expected[1][ids >= 0], rtol=0, atol=2e-6)
    row, place = (ids != expected[0]).nonzero(as_tuple=True)
    ours, theirs = (features[each[row, place]].double() for each in (ids, expected[0]))
    assert ((features[row].double() * (ours - theirs)).sum(1).abs() < 2e-6).all()


TILINGS = [None, Tiling(100, 40), Tiling(1000, 33), Tiling(64, 50, torch.bfloat16)]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize(("num", "k"), [(300, 20), (33, 32), (3, 1), (1800, 200), (1200, 700), (2100, 2048)])
def test_neighbors_are_those_of_a_full_sort(tiling: Tiling | None, num: int, k: int):
    features = unit(num, 12)
    groups = torch.arange(num) // 2 * 2 if num > 40 else torch.arange(num)
    valid = torch.ones(num, dtype=torch.bool)
    if num > 40:
        groups[100:110] = 100
        valid[torch.arange(0, num, 31)] = False
        features[7] = 0  # not valid is not looked at
        valid[7] = False
    check_neighbors(features, k, groups, valid, tiling)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_equal_similarities_go_by_id(tiling: Tiling | None):
    num, groups, valid = 600, torch.arange(600), torch.ones(600, dtype=torch.bool)
    features = unit(num // 50, 16).repeat(50, 1)  # fifty copies of each
    ids, _ = nearest_neighbors(features, 60, groups, valid, tiling=tiling)
    for sample in (0, 11, 599):
        copies = [each for each in range(sample % 12, num, 12) if each != sample]
        assert ids[sample, :49].tolist() == copies
        assert ids[sample, 49:].tolist() == sorted(ids[sample, 49:].tolist())
    same = torch.ones(300, 8)
    ids, _ = nearest_neighbors(same, 5, torch.arange(300), valid[:300], tiling=tiling)
    assert ids[0].tolist() == [1, 2, 3, 4, 5] and ids[299].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_order_of_the_keys_may_mislead_the_guess(tiling: Tiling | None):
    # Every tile but the first is far from the queries, so the bound guessed from the first is too high.
    num = 1500
    features = unit(num, 8) * 0.05
    features[:, 0] = 0.1
    features[:: math.ceil(num / tiling.keys) if tiling else 2, 0] = 1.0
    groups, valid = torch.arange(num), torch.ones(num, dtype=torch.bool)
    check_neighbors(features, 90, groups, valid, tiling)


def test_neighbors_do_not_hang_on_the_tiling_and_can_be_asked_of_some():
    features, groups, valid = unit(2000, 40), torch.arange(2000), torch.ones(2000, dtype=torch.bool)
    expected = nearest_neighbors(features, 50, groups, valid)
    for tiling in (Tiling(1, 40), Tiling(500, 64), Tiling(33, 1999)):
        queries = torch.tensor([5, 1999, 0, 77]) if tiling.queries == 1 else None
        found = nearest_neighbors(features, 50, groups, valid, queries=queries, tiling=tiling)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs if queries is None else theirs[queries])


def test_neighbors_refuse_the_impossible():
    groups, valid = torch.arange(5), torch.ones(5, dtype=torch.bool)
    with pytest.raises(ValueError, match="k=5 .* 1 to 4"):
        nearest_neighbors(unit(5, 4), 5, groups, valid)
    with pytest.raises(ValueError, match="k=3000 .* 1 to 2048"):
        nearest_neighbors(unit(5000, 4), 3000, torch.arange(5000), torch.ones(5000, dtype=torch.bool))
    broken = unit(5, 4)
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match="samples 2 are not finite.*valid=False"):
        nearest_neighbors(broken, 2, groups, valid)
    broken[2] = 0
    with pytest.raises(ValueError, match="samples 2 are all zero.*valid=False"):
        nearest_neighbors(broken, 2, groups, valid)
    with pytest.raises(ValueError, match="queries must be ids of this rank, 0 to 4"):
        nearest_neighbors(unit(5, 4), 2, groups, valid, queries=torch.tensor([5]))
    ids, similarity = nearest_neighbors(unit(5, 4), 3, torch.tensor([0, 0, 0, 0, 1]), valid)
    assert ids[0].tolist() == [4, -1, -1] and similarity[0, 1:].tolist() == [0, 0]
