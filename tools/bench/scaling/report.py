"""Tables of the scaling benchmark, in Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.bench.scaling.network import KINDS

_TITLES = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter",
           "all_to_all": "all-to-all"}  # fmt: skip
Record = Mapping[str, Any]


def section(record: Record) -> str:
    """Return all tables of a record, with the measured parts that it has."""
    parts = [
        steps_tables(record["steps"]) if "steps" in record else "",
        published_tables(record["published"]),
        cluster_tables(record["cluster"]),
        costs_table(record["costs"]) if "costs" in record else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.1f}"


def _terms(rows: Sequence[Record]) -> list[str]:
    """Return the terms of which any row has more than 0.05 ms."""
    return [term for term in rows[0]["terms"] if any(row["terms"][term] > 5e-5 for row in rows)]


def steps_tables(steps: Record) -> str:
    """Return measured and predicted steps, their terms, and the constants of the predictions."""
    rows, arguments = steps["rows"], steps["arguments"]
    terms = _terms(rows)
    table = _table(
        ["settings", "ranks", "measured, ms", "predicted, ms", "error", "busy cores", *terms],
        [
            [
                row["case"],
                str(row["ranks"]),
                _ms(row["measured_s"]),
                f"**{_ms(row['predicted_s'])}**",
                f"{100 * row['error']:+.1f} %",
                f"{row['busy_cores']:.2f}",
                *(_ms(row["terms"][term]) for term in terms),
            ]
            for row in rows
        ],
    )
    networks = _table(
        ["collective", "start, ms", "message, ms", "bandwidth, GB/s"],
        [
            [
                _TITLES[kind],
                f"{1000 * steps['networks'][kind]['start_s']:.2f}",
                f"{1000 * steps['networks'][kind]['within']['latency_s']:.2f}",
                f"{steps['networks'][kind]['within']['bandwidth'] / 1e9:.2f}",
            ]
            for kind in KINDS
        ],
    )
    alone = steps["beside"]["1"]
    slowdowns = ", ".join(
        f"{seconds / alone:.2f} with {runs}" for runs, seconds in steps["beside"].items() if runs != "1"
    )
    errors = steps["network_errors"]
    text = (
        f"Steps of {arguments['clips']} clips per rank on {arguments['cores']} cores, median of {arguments['steps']} "
        f"steps in the fastest of {arguments['rounds']} round(s). Busy cores: CPU time of all ranks per second; if it "
        "is less than the number of ranks or cores, ranks wait for messages, or other load has disturbed the steps. "
        "The terms are those of the prediction, in ms."
    )
    constants = (
        "Constants, measured apart from these steps: slowdown of one of several runs of one rank, which do not "
        f"communicate: {slowdowns} runs; copies in memory: {steps['memory_bandwidth'] / 1e9:.1f} GB/s; single "
        "collectives of gloo between computations, with 2 and 4 ranks, to which the following constants are fitted "
        "with relative errors of "
        f"{100 * errors['median']:.0f} % in the median and {100 * errors['largest']:.0f} % at most."
    )
    return "\n\n".join([text, table, constants, networks])


def published_tables(published: Record) -> str:
    """Return the published table, the errors of the fit, and those of fits to parts of the table."""
    constants = published["constants"]
    first = published["rows"][0]
    table = _table(
        ["published efficiency, % (predicted minus published)", *(f"{number}" for number in first["gpus"])],
        [
            [
                row["model"],
                *(f"{value:.1f} ({error:+.1f})" for value, error in zip(row["published"], row["errors"], strict=True)),
            ]
            for row in published["rows"]
        ],
    )
    text = (
        f"Fitted constants: {100 * constants['network_fraction']:.0f} % of the nominal bandwidth between nodes, and a "
        f"standard deviation of {100 * constants['jitter']:.1f} % of the compute time of a GPU in a step. Columns: "
        "number of GPUs."
    )
    partial = _table(
        ["two constants", "bandwidth, %", "standard deviation, %", "largest error in the complete table, points"],
        [
            [
                row["fit"],
                f"{100 * row['network_fraction']:.0f}",
                f"{100 * row['jitter']:.1f}",
                f"{row['largest_error']:.1f}",
            ]
            for row in published["partial"]
        ],
    )
    return "\n\n".join([text, table, partial])


def cluster_tables(cluster: Record) -> str:
    """Return the prediction for the cluster: assumptions, steps, variants and steps with a constant global batch."""
    rows = cluster["rows"]
    terms = _terms(rows)
    steps = _table(
        ["GPUs", "step, ms", "efficiency, %", "goodput, %", "both, %", *terms],
        [
            [
                f"{row['gpus']:,}",
                _ms(row["step_s"]),
                f"**{100 * row['efficiency']:.1f}**",
                f"{100 * row['goodput']:.1f}",
                f"{100 * row['efficiency'] * row['goodput']:.1f}",
                *(_ms(row["terms"][term]) for term in terms),
            ]
            for row in rows
        ],
    )
    forward, backward = cluster["norms"]
    text = (
        f"Predicted, not measured: {cluster['parameters'] / 1e6:.1f} M parameters, {cluster['collectives']} "
        f"collectives in a step, {forward + backward} of them for batch normalization. Efficiencies are relative to 8 "
        "GPUs. Goodput: fraction of the time that advances training, with failures and the checkpoints of the recipe. "
        "The terms are in ms."
    )
    growth = [row for row in cluster["growth"] if row["seconds"] > 5e-4]
    largest = ", ".join(f"{row['term']} {1000 * row['seconds']:+.1f} ms" for row in growth)
    last = rows[-1]
    interval = (
        f"Terms by how much they grow from {rows[0]['gpus']} to {last['gpus']:,} GPUs: {largest}. The interval between "
        f"checkpoints with the largest goodput (Daly) is {last['best_interval_s'] / 60:.0f} minutes with "
        f"{last['gpus']:,} GPUs, for {100 * last['best_goodput']:.1f} %."
    )
    compared = list(cluster["variants"][0]["efficiency"])
    variants = _table(
        ["efficiency, %", *(f"{int(number):,} GPUs" for number in compared)],
        [
            [row["variant"], *(f"{100 * row['efficiency'][number]:.1f}" for number in compared)]
            for row in cluster["variants"]
        ],
    )
    fixed = _table(
        ["GPUs", *(f"{row['gpus']:,}" for row in cluster["fixed_batch"])],
        [
            _cells("clips per GPU", cluster["fixed_batch"], lambda row: str(row["clips"])),
            _cells("step, ms", cluster["fixed_batch"], lambda row: _ms(row["step_s"])),
            _cells("efficiency, %", cluster["fixed_batch"], lambda row: f"{100 * row['efficiency']:.0f}"),
        ],
    )
    assumptions = _table(["topic", "assumption"], [[*pair] for pair in cluster["assumptions"].items()])
    batch = (
        "With the global batch of the recipe, 1,024 clips, for any number of GPUs, and a compute time that is "
        "proportional to the clips of a GPU (a lower bound):"
    )
    return "\n\n".join([text, steps, interval, variants, batch, fixed, assumptions])


def _cells(title: str, rows: Sequence[Record], cell: Callable[[Record], str]) -> list[str]:
    return [title, *(cell(row) for row in rows)]


def costs_table(costs: Record) -> str:
    """Return measured times of the loss and of the nearest-neighbor search, and their ratios to the formulas."""
    text = (
        "The loss takes 8 B N D operations on all ranks together, and the memory bank holds 2 N D numbers. The "
        "nearest-neighbor search takes 2 N^2 D operations and sends N D (W - 1) numbers in the ring exchange."
    )
    rows = [
        [row["point"], f"{row['seconds']:.2f} s" if row["seconds"] > 1 else f"{_ms(row['seconds'])} ms",
         f"{row['ratio']:.3f}"]
        for row in costs["rows"]
    ]  # fmt: skip
    return f"{text}\n\n{_table(['point', 'measured', 'measured / formula'], rows)}"
