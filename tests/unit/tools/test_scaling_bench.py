"""The simulator of training steps: formulas by hand, limits, and the fit to the published table."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tools.bench.command import main
from tools.bench.scaling import cluster, gloo, published, report, step_benchmark
from tools.bench.scaling.collectives import (
    BANK,
    BATCH_NORM,
    CONTROL,
    GRADIENTS,
    PARAMETERS,
    NormExchange,
    StepShape,
    sent_bytes,
    step_collectives,
)
from tools.bench.scaling.command import AIMS, MAX_POINTS
from tools.bench.scaling.failures import Failures, first_order_goodput
from tools.bench.scaling.measured_steps import relative_spread
from tools.bench.scaling.network import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, KINDS, REDUCE_SCATTER, Link, Network
from tools.bench.scaling.step_time import (
    COMPUTE,
    JITTER,
    LOADING,
    Compute,
    Machine,
    expected_maximum,
    one_network,
    predict_step,
)

FLAT = Network(64, Link(1e-6, 1e9), Link(1e-6, 1e9))
PAIRS = Network(2, Link(1e-6, 3e9), Link(10e-6, 1e9), post_s=2e-6)
TREES = Network(4, Link(1e-6, 1e9, tree_latency_s=2e-6), Link(1e-4, 1e9, tree_latency_s=30e-6), start_s=5e-6)
SHAPE = StepShape(
    clips=8, dim=16, rows=100, categories=3, replicated=False, softmaxes=(4,), gathers_targets=True,
    category_memory=False, norms_forward=(5, 7), norms_backward=(5,), groups=(1001, 500), parameters=(1001, 500),
    num_gradients=1400, number_bytes=4, zero_stage=0,
)  # fmt: skip
COMPUTE_TIMES = Compute(forward_s=0.1, loss_s=0.05, backward_s=0.2, optimizer_s=0.04)
NODES = Machine(one_network(FLAT), FLAT)


def test_times_of_collectives_by_hand():
    assert FLAT.seconds(ALL_REDUCE, 4e6, 4) == pytest.approx(6 * 1e-6 + 6 / 4 * 4e-3)
    for kind in (ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL):
        assert FLAT.seconds(kind, 4e6, 4) == pytest.approx(3 * 1e-6 + 3 / 4 * 4e-3)


def test_rings_leave_a_node_through_the_links_of_all_its_ranks():
    # Four ranks on two nodes: three messages, one of them between the nodes; two links of 1 GB/s leave a node.
    assert PAIRS.seconds(ALL_GATHER, 4e6, 4) == pytest.approx(2 * 1e-6 + 10e-6 + 3 / 4 * 4e6 / 2e9)
    # Rows for the rank on the same node take 1 us + 1 MB / 3 GB/s; those for two other ranks take longer.
    assert PAIRS.seconds(ALL_TO_ALL, 4e6, 4) == pytest.approx(10e-6 + 2 * (2e-6 + 1e-3))


def test_an_all_reduce_of_few_bytes_uses_a_tree_and_one_of_many_a_ring():
    # Sixteen ranks on four nodes: three messages inside the node and two between nodes, up and down.
    assert TREES.seconds(ALL_REDUCE, 0, 16) == pytest.approx(5e-6 + 2 * (3 * 2e-6 + 2 * 30e-6))
    ring = 5e-6 + (30 - 6) * 1e-6 + 6 * 1e-4 + 2 * 15 / 16 * 1.0
    assert TREES.seconds(ALL_REDUCE, 1e9, 16) == pytest.approx(ring)
    assert TREES.seconds(ALL_GATHER, 0, 16) == pytest.approx(5e-6 + 12 * 1e-6 + 3 * 1e-4)


def test_parts_of_an_all_gather_are_copied_one_by_one():
    network = dataclasses.replace(FLAT, part_s=5e-6)
    seconds = network.seconds(ALL_GATHER, 1e3, 32, in_parts=True)
    assert seconds - network.seconds(ALL_GATHER, 1e3, 32) == pytest.approx(32 * 5e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", [FLAT, PAIRS, TREES])
def test_limits_of_collectives(kind: str, network: Network):
    assert network.seconds(kind, 1e6, 1) == 0
    times = [network.seconds(kind, 1e6 * ranks, ranks) for ranks in (2, 4, 8, 16, 64)]
    assert times == sorted(times) and times[0] > 0
    faster = dataclasses.replace(
        network,
        within=dataclasses.replace(network.within, bandwidth=2 * network.within.bandwidth),
        between=dataclasses.replace(network.between, bandwidth=2 * network.between.bandwidth),
    )
    latency = network.seconds(kind, 0, 16)
    # Doubling the bandwidth halves the part that depends on the bytes.
    many = 1e9  # Bytes for which an all-reduce uses a ring on either network.
    assert network.seconds(kind, many, 16) > 2 * latency
    slow, fast = (n.seconds(kind, 2 * many, 16) - n.seconds(kind, many, 16) for n in (network, faster))
    assert fast == pytest.approx(slow / 2)


def test_unknown_collectives_are_refused():
    with pytest.raises(ValueError, match="collective 'gather': allowed: all_reduce"):
        FLAT.seconds("gather", 1, 2)


def bytes_by_kind(shape: StepShape, ranks: int, term: str) -> Counter:
    counts: Counter = Counter()
    for item in step_collectives(shape, ranks):
        if item.term == term:
            counts[item.kind, item.num_bytes] += item.count
    return counts


def test_collectives_of_a_step_by_hand():
    assert step_collectives(SHAPE, 1) == []
    norms = {(ALL_REDUCE, 2 * 5 * 8): 1, (ALL_REDUCE, 2 * 7 * 8): 1, (ALL_REDUCE, 2 * 5 * 4): 1}
    assert bytes_by_kind(SHAPE, 4, BATCH_NORM) == norms
    bank = {
        (ALL_GATHER, 4 * 8 * (2 * 16 + 3) * 4): 1,  # Embeddings, flags and ids of the global batch.
        (ALL_TO_ALL, 8 * 4): 2,  # Correspondence, agreement.
        (ALL_REDUCE, 4): 1,
        (ALL_TO_ALL, 8 * 2 * 16 * 4): 1,  # Rows of the batch.
        (ALL_TO_ALL, 4 * 8 * 4 * 17 * 4): 1,  # Four softmaxes of the queries of all ranks.
        (ALL_GATHER, 4 * 8 * 2 * 16 * 4): 1,  # Rows that are queries of soft targets.
    }
    assert bytes_by_kind(SHAPE, 4, BANK) == bank
    replicated = dataclasses.replace(SHAPE, replicated=True)
    assert bytes_by_kind(replicated, 4, BANK) == {key: bank[key] for key in list(bank)[:3]}
    assert bytes_by_kind(SHAPE, 4, CONTROL) == {(ALL_REDUCE, 4): 1}


def test_collectives_of_the_zero_stages_by_hand():
    stages = [dataclasses.replace(SHAPE, zero_stage=stage) for stage in range(4)]
    assert bytes_by_kind(stages[0], 4, GRADIENTS) == {(ALL_REDUCE, 1501 * 4): 1, (ALL_REDUCE, 4): 1}
    assert not bytes_by_kind(stages[0], 4, PARAMETERS)
    for shape in stages[1:3]:
        assert bytes_by_kind(shape, 4, GRADIENTS) == {(ALL_REDUCE, 1400 * 4): 1, (ALL_REDUCE, 4): 2}
        # Padded to a multiple of eight numbers.
        assert bytes_by_kind(shape, 4, PARAMETERS) == {(ALL_GATHER, 1008 * 4): 1, (ALL_GATHER, 504 * 4): 1}
    large = dataclasses.replace(stages[3], parameters=(200_001, 150_000, 10))
    assert bytes_by_kind(large, 4, GRADIENTS) == {(REDUCE_SCATTER, 1400 * 4): 1, (ALL_REDUCE, 8): 2}
    assert bytes_by_kind(large, 4, PARAMETERS) == {(ALL_GATHER, (200_004 + 150_000) * 4): 1, (ALL_GATHER, 12 * 4): 1}


def test_sent_bytes_do_not_depend_on_the_rows_of_the_bank():
    items = step_collectives(SHAPE, 4)
    assert sent_bytes(items, 4) == sent_bytes(step_collectives(dataclasses.replace(SHAPE, rows=10**9), 4), 4)
    only = [item for item in items if item.term == GRADIENTS]
    assert sent_bytes(only, 4) == pytest.approx(2 * 3 / 4 * (1501 * 4 + 4))
    assert sent_bytes(items, 1) == 0


def test_expected_maxima_of_normal_numbers():
    assert expected_maximum(1) == pytest.approx(0, abs=1e-6)
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-4)
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-4)
    draws = np.random.default_rng(0).standard_normal((2000, 1024)).max(1)
    assert expected_maximum(1024) == pytest.approx(draws.mean(), abs=0.03)
    with pytest.raises(ValueError, match="world_size=0"):
        expected_maximum(0)


def test_a_step_of_one_rank_is_its_compute_time():
    terms = predict_step(COMPUTE_TIMES, SHAPE, dataclasses.replace(NODES, jitter=0.1), 1)
    assert terms[COMPUTE] == pytest.approx(0.39) and sum(terms.values()) == pytest.approx(0.39)


def test_terms_of_a_step_by_hand():
    shape = dataclasses.replace(SHAPE, zero_stage=1, norms_forward=(), norms_backward=())
    nodes = dataclasses.replace(NODES, cores_per_node=2, jitter=0.1, memory_bandwidth=1e9)
    terms = predict_step(COMPUTE_TIMES, shape, nodes, 4)
    compute = 2 * (0.35 + 0.04 / 4)  # Four ranks on two cores; each updates a quarter of the parameters.
    assert terms[COMPUTE] == pytest.approx(compute)
    assert terms[JITTER] == pytest.approx(0.1 * compute * expected_maximum(4))
    reduction = FLAT.seconds(ALL_REDUCE, 1400 * 4, 4) + 2 * FLAT.seconds(ALL_REDUCE, 4, 4)
    assert terms[GRADIENTS] == pytest.approx(reduction + 2 * 6 * 1400 * 4 / 1e9)
    assert terms[CONTROL] == 0 and terms[BATCH_NORM] == 0
    waiting = predict_step(COMPUTE_TIMES, shape, dataclasses.replace(nodes, waits_for_control=True), 4)
    assert waiting[CONTROL] == pytest.approx(6e-6 + 6 / 4 * 4 / 1e9)
    hidden = predict_step(COMPUTE_TIMES, shape, dataclasses.replace(nodes, overlap=1.0), 4)
    assert hidden[GRADIENTS] == pytest.approx(2 * 6 * 1400 * 4 / 1e9)
    measured = predict_step(COMPUTE_TIMES, shape, dataclasses.replace(nodes, slowdowns={4: 3.0}), 4)
    assert measured[COMPUTE] == pytest.approx(1.5 * compute)


def test_independent_delays_add_up_over_the_stretches_of_a_step():
    nodes = dataclasses.replace(NODES, jitter=0.1)
    one, many = (
        predict_step(COMPUTE_TIMES, SHAPE, dataclasses.replace(nodes, stretches=number), 8)[JITTER] for number in (1, 9)
    )
    assert many == pytest.approx(3 * one)


def test_a_step_takes_at_least_as_long_as_loading_its_batch():
    slow = predict_step(COMPUTE_TIMES, SHAPE, dataclasses.replace(NODES, loader_clips_per_s=4), 2)
    assert sum(slow.values()) == pytest.approx(8 / 4)
    fast = predict_step(COMPUTE_TIMES, SHAPE, dataclasses.replace(NODES, loader_clips_per_s=1000), 2)
    assert fast[LOADING] == 0


def test_goodput_with_failures():
    failures = Failures(node_mtbf_s=7.9 * 3600 * 128, checkpoint_s=10, restart_s=120)
    assert failures.mtbf_s(128) == pytest.approx(28440)
    young = failures.young_interval_s(128)
    assert young == pytest.approx(math.sqrt(2 * 10 * 28440)) == pytest.approx(754, abs=0.5)
    assert first_order_goodput(young, 10, 120, 28440) == pytest.approx(0.969, abs=5e-4)
    assert failures.goodput(young, 128) == pytest.approx(first_order_goodput(young, 10, 120, 28440), abs=1e-3)
    # Without failures, checkpoints alone take time.
    assert Failures(1e15, 10, 120).goodput(90, 1) == pytest.approx(0.9)
    goodputs = [failures.goodput(young, nodes) for nodes in (1, 16, 128, 1024, 10**6)]
    assert goodputs == sorted(goodputs, reverse=True) and goodputs[-1] < 0.01


def test_dalys_interval_has_the_largest_goodput():
    failures = Failures(node_mtbf_s=3600 * 8, checkpoint_s=60, restart_s=120)
    best = failures.goodput(failures.daly_interval_s(8), 8)
    intervals = np.linspace(50, 3000, 600)
    assert best >= max(failures.goodput(float(interval), 8) for interval in intervals) - 1e-5
    assert best > failures.goodput(failures.young_interval_s(8), 8)
    assert Failures(100, 300, 1).daly_interval_s(1) == 100


def test_the_published_table_is_reproduced_from_two_constants():
    tiny, base = published.TABLE.values()
    assert 100 * tiny.efficiency[-1] == pytest.approx(87.3, abs=0.05)
    assert 100 * base.efficiency[-1] == pytest.approx(84.5, abs=0.05)
    constants = published.fit()
    largest = max(float(abs(errors).max()) for errors in published.errors(constants).values())
    assert largest <= MAX_POINTS and largest == pytest.approx(2.1, abs=0.2)
    assert 0.05 < constants.network_fraction < 0.9 and 0.002 < constants.jitter < 0.05
    # Constants that are fitted to one of the networks predict the other one.
    for name in published.TABLE:
        errors = published.errors(published.fit([name]))
        assert all(abs(values).max() <= MAX_POINTS for values in errors.values())


def test_efficiencies_of_the_published_training_fall_with_either_constant():
    model = published.TABLE["HTSAT-base, RoBERTa-base"]
    good, slow, uneven = (
        published.predicted_efficiency(model, published.FittedConstants(*values))
        for values in ((0.8, 0.0), (0.1, 0.0), (0.8, 0.03))
    )
    assert good[0] == slow[0] == uneven[0] == pytest.approx(1)
    assert (slow[1:] < good[1:]).all() and (uneven[1:] < good[1:]).all()


def test_the_constants_of_a_network_are_recovered_from_times_of_collectives():
    link = Link(3e-4, 0.8e9)
    network = Network(2**20, link, link, start_s=2e-4)
    points = [
        gloo.CollectiveTime(kind, size, ranks, gloo.shared(network, ranks, 2).seconds(kind, size, ranks))
        for kind in KINDS
        for size in gloo.SIZES
        for ranks in gloo.RANKS
    ]
    fitted = gloo.fit(points, cores=2)
    for kind in KINDS:
        assert fitted[kind].within.latency_s == pytest.approx(3e-4) and fitted[kind].start_s == pytest.approx(2e-4)
        assert fitted[kind].within.bandwidth == pytest.approx(0.8e9)
    assert max(gloo.relative_errors(fitted, points, 2)) < 1e-6
    # With four ranks on two cores, messages take twice as long.
    assert gloo.shared(network, 4, 2).within == Link(6e-4, 0.4e9) and gloo.shared(network, 4, 4) == network


def test_the_shortest_times_of_the_rounds_are_used():
    rounds = [[gloo.CollectiveTime(ALL_REDUCE, 64, 2, seconds)] for seconds in (0.3, 0.1, 0.2)]
    assert gloo.fastest(rounds) == rounds[1]


def test_the_spread_of_steps_ignores_rare_delays():
    seconds = [1 + 0.01 * value for value in np.random.default_rng(0).standard_normal(999)] + [50.0]
    assert relative_spread(seconds) == pytest.approx(0.01, rel=0.15)


def measurements() -> step_benchmark.Measurements:
    """Return measurements of a machine whose steps take as long as predicted, but for one case."""
    compute = Compute(0.05, 0.01, 0.1, 0.01)
    link = Link(3e-4, 0.8e9)
    points = [
        gloo.CollectiveTime(kind, size, ranks, Network(99, link, link).seconds(kind, size, ranks))
        for kind in KINDS
        for size in gloo.SIZES
        for ranks in (2, 4)
    ]
    names = [case.name for case in step_benchmark.CASES]
    keys = [(name, ranks) for name in names for ranks in step_benchmark.RANKS]
    found = step_benchmark.Measurements(
        alone=dict.fromkeys(names, compute), jitter=dict.fromkeys(names, 0.02), beside={1: 0.17, 2: 0.18, 4: 0.37},
        copy_s=0.02, points=points, steps=dict.fromkeys(keys, 1.0), busy_cores=dict.fromkeys(keys, 2.0),
        recorded={key: Counter() for key in keys}, dataset=(96, 6),
    )  # fmt: skip
    rows = step_benchmark.evaluate(found, 16, 4)["rows"]
    found.steps = {(row["case"], row["ranks"]): row["predicted_s"] for row in rows}
    return found


def test_predictions_are_compared_with_measured_steps():
    found = measurements()
    key = (step_benchmark.CASES[0].name, 4)
    found.steps[key] /= 1.3
    steps = step_benchmark.evaluate(found, 16, 4)
    errors = {(row["case"], row["ranks"]): row["error"] for row in steps["rows"]}
    assert errors.pop(key) == pytest.approx(0.3) and all(abs(error) < 1e-9 for error in errors.values())
    alone, *others = steps["rows"][:3]
    assert alone["predicted_s"] == pytest.approx(0.17) and alone["collectives"] == 0
    assert [row["terms"][COMPUTE] for row in others] == pytest.approx([0.18, 0.37])
    tables = report.steps_tables({**steps, "arguments": steps["arguments"] | {"rounds": 3}})
    assert "| ZeRO 0, sharded memory bank | 4 |" in tables and "+30.0 %" in tables and "1.06 with 2" in tables


def test_the_cluster_meets_the_aims_and_names_what_grows():
    constants = published.fit()
    recipe, machine = cluster.multinode_recipe(), cluster.h100_cluster(constants)
    assert recipe.shape.zero_stage == 1 and recipe.shape.replicated and recipe.checkpoint_every == 1000
    # R(2+1)D-18 has 37 batch normalizations and the audio tower 9; the forward pass computes them twice.
    heads = len(recipe.shape.norms_backward) - 46
    assert len(recipe.shape.norms_forward) == 2 * 46 + heads == 98
    rows = cluster.scaling_rows(recipe, machine)
    efficiencies = {row["gpus"]: row["efficiency"] for row in rows}
    assert efficiencies[8] == 1 and list(efficiencies.values()) == sorted(efficiencies.values(), reverse=True)
    assert all(efficiencies[gpus] >= aim for gpus, aim in AIMS.items())
    assert all(row["step_s"] == pytest.approx(sum(row["terms"].values())) for row in rows)
    assert all(0 < row["goodput"] <= row["best_goodput"] + 1e-6 < 1 for row in rows)
    assert [term for term, _ in cluster.bottlenecks(rows)][:2] == [JITTER, BATCH_NORM]


def test_gathered_batch_statistics_grow_with_the_number_of_gpus():
    constants = published.fit()
    recipe, machine = cluster.multinode_recipe(), cluster.h100_cluster(constants)

    def norm_s(exchange: NormExchange, gpus: int) -> float:
        shape = dataclasses.replace(recipe.shape, norm_exchange=exchange)
        return predict_step(recipe.compute, shape, machine, gpus)[BATCH_NORM]

    assert norm_s(NormExchange.reduced, 1024) < 2 * norm_s(NormExchange.reduced, 64)
    assert norm_s(NormExchange.gathered, 1024) > 6 * norm_s(NormExchange.gathered, 64)
    assert norm_s(NormExchange.gathered_in_parts, 1024) > norm_s(NormExchange.gathered, 1024) + 98 * 1024 * 4e-6


def test_the_command_predicts_and_keeps_measured_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "deep" / "scaling.json"
    file.parent.mkdir()
    steps = step_benchmark.evaluate(measurements(), 16, 4)
    steps["arguments"]["rounds"] = 3
    file.write_text(json.dumps({"steps": steps}))
    # Nothing was recorded, so the number of bytes is wrong.
    assert main(["scaling", "--parts", "none", f"--json={file}"]) == 3
    stored = json.loads(file.read_text())
    assert stored["steps"] == steps and stored["cluster"]["rows"][-1]["gpus"] == 1024 and "costs" not in stored
    failed = [name for name, ratio in stored["ratios"].items() if not ratio["passed"]]
    assert failed and all("bytes of collectives" in name for name in failed)
    assert "| 1,024 | " in capsys.readouterr().out


def test_invalid_arguments_of_the_command_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "list.json").write_text("[")
    assert main(["scaling", "--clips=1"]) == main(["scaling", "--rounds=0"]) == 1
    assert main(["scaling", "--parts", "none", f"--json={tmp_path / 'list.json'}"]) == 1
    errors = capsys.readouterr().err
    assert "--clips=1: allowed: 2 or more" in errors and "--rounds=0: allowed: 1 or more" in errors
    assert "not a JSON file of this benchmark" in errors


@pytest.mark.long
def test_steps_of_this_machine_are_measured(tmp_path: Path):
    file = tmp_path / "scaling.json"
    assert main(["scaling", "--parts", "steps", "--clips=4", "--rounds=1", f"--json={file}"]) in (0, 3)
    ratios = json.loads(file.read_text())["ratios"]
    wire = {name: ratio for name, ratio in ratios.items() if "bytes of collectives" in name}
    assert len(wire) == 4 and all(ratio["passed"] for ratio in wire.values())
