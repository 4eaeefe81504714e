"""Names that libraries do not document and distav uses: each exists, has its arguments, and is used in one file."""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.conftest import ROOT
from tests.helpers.engine import new_engine, step
from tests.helpers.spawn import on_ranks

TORCH = "distav/distributed/torch_internals.py"
DEEPSPEED = "distav/distributed/deepspeed_internals.py"
TIMM = "distav/models/families/timm_networks.py"
DOCUMENTED = {"os._exit", "sys._current_frames", "_asdict"}
"""Documented names that begin with an underscore."""


class Name(NamedTuple):
    """A function or class that a library does not document.

    Attributes:
        package: the package that has it.
        path: its module, and its name in the module.
        parameters: names of its parameters, all of them if the last one is not "...". None if they are not checked.
        file: the file of distav that uses it.
        purpose: what for.
    """

    package: str
    path: str
    parameters: str | None
    file: str
    purpose: str


OPTIMIZER = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BATCHED = "process all parameters at once"
TAR = "distav/data/preparation/sources/tar_index.py"
NAMES = [
    Name("deepspeed", "deepspeed.runtime.zero.utils:ZERO_SUPPORTED_OPTIMIZERS", None, DEEPSPEED, "use its own AdamW"),
    Name("deepspeed", "deepspeed.ops:__compatible_ops__", None, DEEPSPEED, "skip the compilation of an op"),
    Name("deepspeed", "deepspeed.utils:logger", None, DEEPSPEED, "silence messages"),
    Name("deepspeed", "deepspeed.utils.groups:_release_process_group_references", "...", DEEPSPEED, "start a new run"),
    Name("deepspeed", f"{OPTIMIZER}.reduce_gradients", "self pipeline_parallel", DEEPSPEED, BATCHED),
    Name("deepspeed", f"{OPTIMIZER}.check_overflow", "self partition_gradients", DEEPSPEED, BATCHED),
    Name("deepspeed", f"{OPTIMIZER}.get_grad_norm_direct", "self gradients params norm_type", DEEPSPEED, BATCHED),
    Name("deepspeed", f"{OPTIMIZER}.unscale_and_clip_grads", "self grad_groups_flat total_norm", DEEPSPEED, BATCHED),
    Name("deepspeed", f"{OPTIMIZER}._update_model_bit16_weights", "self group_index", DEEPSPEED, BATCHED),
    Name("deepspeed", f"{OPTIMIZER}.allreduce_bucket", "self bucket communication_data_type ...", DEEPSPEED, BATCHED),
    Name("deepspeed", f"{OPTIMIZER}.overlapping_partition_gradients_reduce_epilogue", "self", DEEPSPEED, BATCHED),
    Name("deepspeed", f"{OPTIMIZER}.update_lp_params", "self", DEEPSPEED, "load weights at ZeRO-1 and 2"),
    Name("deepspeed", f"{STAGE_3}.get_param_id", "self param", DEEPSPEED, "save and load weights at ZeRO-3"),
    Name("deepspeed", f"{STAGE_3}._partition_all_parameters", None, DEEPSPEED, "load weights at ZeRO-3"),
    Name("deepspeed", f"{STAGE_3}._reassign_or_swap_out_partitioned_parameters", None, DEEPSPEED, "load weights"),
    Name("torch", "torch._C:_distributed_c10d._dump_fr_trace_json", None, TORCH, "find the rank that stalls"),
    Name("torch", "torch._C:_distributed_c10d._dump_fr_trace", None, TORCH, "write the flight recorder"),
    Name("torch", "torch._C:_distributed_c10d._dump_nccl_trace_json", None, TORCH, "find the rank that stalls"),
    Name("torch", "torch._C:_distributed_c10d._dump_nccl_trace", None, TORCH, "write the flight recorder"),
    Name("torch", "torch.distributed.distributed_c10d:_get_default_group", "", TORCH, "read the timeout"),
    Name("torch", "torch.distributed:ProcessGroup._get_backend", None, TORCH, "read the timeout"),
    Name("torch", "torch.distributed:ProcessGroup.set_timeout", None, DEEPSPEED, "set the timeout"),
    Name("torch", "torch._dynamo.config:patch", None, TORCH, "compile more forms of inputs"),
    Name("torch", "torch._dynamo.config:recompile_limit", None, TORCH, "compile more forms of inputs"),
    Name("torch", "torch._inductor.config:patch", None, TORCH, "compile in one process"),
    Name("torch", "torch._inductor.config:compile_threads", None, TORCH, "compile in one process"),
    Name("torch", "torch.utils.tensorboard.summary:hparams", "hparam_dict metric_dict ...",
         "distav/training/trackers/tensorboard.py", "log hyperparameters"),
    Name("timm", "timm.models._hub:load_model_config_from_path", "model_path", TIMM, "read a directory with a network"),
    Name("webdataset", "webdataset.tariterators:group_by_keys", "data keys lcase suffixes handler", TAR, "read tars"),
    Name("webdataset", "webdataset.tariterators:base_plus_ext", "path", TAR, "read tars"),
    Name("webdataset", "webdataset.shardlists:expand_urls", "urls",
         "distav/data/preparation/sources/split_patterns.py", "expand braces"),
    Name("webdataset", "webdataset.writer:TarWriter", "fileobj user group mode compress encoder keep_meta mtime ...",
         "distav/data/preparation/shard_writer.py", "write shards"),
    Name("hydra-core", "hydra.core.override_parser.overrides_parser:OverridesParser.parse_override", "self s",
         "distav/config/overrides.py", "parse overrides"),
    Name("python", "argparse:ArgumentParser._check_value", "self action value",
         "distav/config/cli.py", "suggest values"),
]  # fmt: skip

OPERATORS = {
    "_scaled_dot_product_flash_attention_for_cpu": "query key value dropout_p is_causal attn_mask scale",
    "_scaled_dot_product_flash_attention": "query key value dropout_p is_causal return_debug_mask scale",
    "_scaled_dot_product_cudnn_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal"
    " return_debug_mask scale",
}
"""Arguments of operators of PyTorch; each returns the output and the log-partition first."""

ENGINE = ("basic_optimizer", "data_parallel_group", "module", "optimizer")
ZERO_1_AND_2 = (
    "overlap_comm", "contiguous_gradients", "ipg_buckets", "dtype", "dp_process_group", "unflatten", "bit16_groups",
    "bit16_groups_flat", "reduce_bucket_size", "compute_grad_norm", "device", "clip_grad", "loss_scale", "cpu_offload",
)  # fmt: skip
ATTRIBUTES = {
    (0, "bf16"): ("fp16_groups", "fp32_groups"),
    (1, "fp32"): ZERO_1_AND_2,
    (2, "bf16"): ZERO_1_AND_2,
    (3, "fp32"): ("grad_position", "fp32_partitioned_groups_flat", "fp16_groups", "persistent_parameters",
                  "grad_partitions_flat_buffer"),
}  # fmt: skip
"""Attributes of DeepSpeed's optimizer, by ZeRO stage and precision."""
PARAMETER = {1: ("_hp_mapping",), 2: ("_hp_mapping",), 3: ("ds_id", "ds_numel", "ds_shape", "ds_tensor", "all_gather")}
"""Attributes of parameters, by ZeRO stage."""


def version(package: str) -> str:
    return f"{package} {metadata.version(package)}" if package != "python" else "Python"


def problem_of(name: Name) -> str:
    """Return what is wrong with a name, in words; empty if nothing is."""
    module, _, attributes = name.path.partition(":")
    words = f"{name.path.replace(':', '.')}, which {name.file} uses to {name.purpose}"
    owner: Any = None
    try:
        owner = import_module(module)
        for attribute in attributes.split("."):
            owner = getattr(owner, attribute)
    except (ImportError, AttributeError):
        return f"{version(name.package)} no longer has {words}."
    if name.parameters is None:
        return ""
    expected, actual = name.parameters.split(), list(inspect.signature(owner).parameters)
    if expected[-1:] == ["..."]:
        expected.pop()
        actual = actual[: len(expected)]
    if actual == expected:
        return ""
    return f"{version(name.package)} has the parameters {actual} instead of {expected} in {words}."


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.path.replace(":", "."))
def test_a_library_has_the_name_with_its_parameters(name: Name):
    if "nccl" in name.path and not torch.distributed.is_nccl_available():
        pytest.skip("this build of PyTorch has no NCCL")
    if name.package == "timm":
        pytest.importorskip("timm", reason="needs timm: pip install 'distav[pretrained]'")
    assert not problem_of(name)


def test_names_that_have_moved_or_changed_are_reported_in_words():
    moved = Name("torch", "torch.distributed.distributed_c10d:_no_such_group", "", TORCH, "read the timeout")
    words = "no longer has torch.distributed.distributed_c10d._no_such_group, which"
    assert problem_of(moved) == f"{version('torch')} {words} {TORCH} uses to read the timeout."
    assert "no longer has torch._no_such_module.patch" in problem_of(moved._replace(path="torch._no_such_module:patch"))
    changed = Name("python", "argparse:ArgumentParser._check_value", "self value", "distav/config/cli.py", "suggest")
    assert "has the parameters ['self', 'action', 'value'] instead of ['self', 'value']" in problem_of(changed)


@pytest.mark.parametrize("operator", OPERATORS)
def test_pytorch_has_the_operator_with_its_arguments(operator: str):
    schema = getattr(torch.ops.aten, operator).default._schema
    assert [argument.name for argument in schema.arguments] == OPERATORS[operator].split(), (
        f"{version('torch')}: the arguments of aten::{operator} have changed; {TORCH} uses it for the memory bank."
    )
    assert [str(value.type) for value in schema.returns[:2]] == ["Tensor", "Tensor"]


def test_norms_of_many_tensors_are_computed_in_float64():
    from distav.distributed.torch_internals import vector_norms

    norms = vector_norms([torch.full((4,), 3.0), torch.full((2,), 2**0.5)], 2.0, torch.float64)
    torch.testing.assert_close(torch.stack(norms), torch.tensor([6.0, 2.0], dtype=torch.float64))


def describe_groups() -> list[str]:
    """Return what is wrong with what PyTorch tells about a process group."""
    from distav.distributed.torch_internals import flight_recorders, group_timeout, recorded_collectives

    torch.distributed.all_reduce(torch.zeros(1))
    faults = []
    if ("gloo" not in flight_recorders("_json")) or not list(recorded_collectives())[0][0]:
        faults.append(f"{version('torch')}: the flight recorder of gloo has no default group, which {TORCH} reads.")
    if group_timeout().total_seconds() != 90:
        faults.append(f"{version('torch')}: {TORCH} reads another timeout than that of the process group.")
    return faults


def test_flight_recorder_and_timeout_of_a_process_group_can_be_read():
    assert on_ranks(1, describe_groups, timeout_s=90)[0] == []


def missing_attributes() -> list[str]:
    """Return the attributes that engines, optimizers and parameters of DeepSpeed lack, as sentences."""
    missing = []
    for (stage, precision), names in ATTRIBUTES.items():
        engine = new_engine(stage, precision, 1)
        step(engine)
        own = engine._engine
        parameter = next(own.module.parameters())
        owners = [("engine", own, ENGINE), ("optimizer", own.optimizer, names)]
        owners.append(("parameter", parameter, PARAMETER.get(stage, ())))
        if stage in (1, 2):
            mapping = parameter._hp_mapping
            owners += [
                ("_hp_mapping", mapping, ("hp_fragment", "lp_fragment_address")),
                ("lp_fragment_address", mapping.lp_fragment_address, ("start", "numel")),
            ]
        where = f"{version('deepspeed')} at ZeRO-{stage} ({precision})"
        for kind, owner, attributes in owners:
            missing += [
                f"{where}: {kind} no longer has {name}, which {DEEPSPEED} uses."
                for name in attributes
                if not hasattr(owner, name)
            ]
        kind = type(own.optimizer).__name__
        if stage in (1, 2) and kind != "BatchedZeroOptimizer":
            missing.append(f"{where}: the optimizer is a {kind}, which {DEEPSPEED} does not know.")
    return missing


def test_engines_of_deepspeed_have_the_attributes():
    assert on_ranks(1, missing_attributes, timeout_s=120)[0] == []


def private_uses(file: Path, own: set[str]) -> Iterator[str]:
    """Yield the private names that a file uses, except those that distav defines itself."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [] if {ast.unparse(node), node.attr} & DOCUMENTED else [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("distav", "tools", "__future__")):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        yield from (name for name in names if name.startswith("_") and not name.startswith("__") and name not in own)


def own_names(files: list[Path]) -> set[str]:
    """Return the names that files define: functions, classes, variables and attributes."""
    names: set[str] = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def test_private_names_of_libraries_are_used_in_these_files_only():
    files = sorted(file for folder in ("distav", "tools") for file in (ROOT / folder).rglob("*.py"))
    own = own_names(files)
    uses = {str(file.relative_to(ROOT)): sorted(set(private_uses(file, own))) for file in files}
    assert {file for file, names in uses.items() if names} == {TORCH, DEEPSPEED, TIMM}, uses


def test_the_test_finds_private_names(tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text(
        "import os, torch._dynamo\nfrom torch._C import _host\n_own = 1\n"
        "x = torch.ops._op(_own)\nx.y._z()\nos._exit(1)\n"
    )
    assert set(private_uses(file, own_names([file]))) == {"_dynamo", "_C", "_host", "_op", "_z"}
