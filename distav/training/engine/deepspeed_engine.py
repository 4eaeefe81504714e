"""The DeepSpeed engine of a run."""

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distav.config.errors import UserError
from distav.config.schema import Config, Device, Precision
from distav.data.pipeline.loader import Batch
from distav.data.pipeline.sampler import micro_batch_size
from distav.distributed import deepspeed_internals
from distav.distributed.deepspeed_internals import full_shape
from distav.distributed.process_group import World
from distav.distributed.torch_internals import group_timeout
from distav.models.av_model import parameter_groups
from distav.models.towers import Tower
from distav.training.engine.sharded_state import export_sharded_state, load_sharded_state

DERIVED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
"""Keys of the DeepSpeed config that follow from other settings and are not allowed in `deepspeed.extra`."""


def deepspeed_config(config: Config, world: World) -> dict[str, Any]:
    """Return the DeepSpeed config of a run.

    Raises:
        UserError: if the global batch cannot be divided among the ranks, or `deepspeed.extra` has a derived key.
    """
    optim, extra = config.optim, config.deepspeed.extra
    for key in DERIVED_KEYS:
        if key in extra:
            raise UserError(f"deepspeed.extra.{key} follows from `optim`; set optim.* instead.")
    derived: dict[str, Any] = {
        "train_batch_size": optim.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch_size(
            optim.global_batch, optim.gradient_accumulation_steps, world.world_size
        ),
        "gradient_accumulation_steps": optim.gradient_accumulation_steps,
        "gradient_clipping": optim.grad_clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": _zero_stage(config, world)},
        "bf16": {"enabled": trains_in_bf16(config, world)},
        "timers": {"throughput": {"enabled": False}},  # It synchronizes the device twice per micro-batch.
    }
    for key, value in extra.items():
        is_section = isinstance(value, dict) and isinstance(derived.get(key), dict)
        derived[key] = {**derived[key], **value} if is_section else value
    zero = derived["zero_optimization"]
    if zero["stage"] == 1 and not zero.get("overlap_comm"):
        zero.setdefault("contiguous_gradients", False)  # Copies each gradient twice, which only overlapping requires.
    return derived


def trains_in_bf16(config: Config, world: World) -> bool:
    """Return whether the model computes in bfloat16."""
    precision = config.deepspeed.precision
    return precision is Precision.bf16 or (precision is Precision.auto and world.device.type == "cuda")


def _zero_stage(config: Config, world: World) -> int:
    stage = config.deepspeed.zero_stage
    return int(world.device.type == "cuda") if stage is None else stage


def _set_accelerator(device: torch.device, setting: Device) -> None:
    """Make DeepSpeed use the device of the run; by default it uses a GPU if there is one.

    Raises:
        UserError: if the environment variable DS_ACCELERATOR names another type of device.
    """
    name = os.environ.setdefault("DS_ACCELERATOR", device.type)
    if name != device.type:
        raise UserError(
            f"DS_ACCELERATOR={name} contradicts run.device={setting.name}: this run computes on {device.type}. Unset "
            "DS_ACCELERATOR or change run.device."
        )
    accelerator: Any = importlib.import_module("deepspeed.accelerator")
    if accelerator.get_accelerator().device_name() != name:  # DeepSpeed was imported before the device was known.
        module = importlib.import_module(f"deepspeed.accelerator.{name}_accelerator")
        accelerator.set_accelerator(getattr(module, f"{name.upper()}_Accelerator")())


class _AdamW(torch.optim.AdamW):
    """AdamW that can skip a step; DeepSpeed skips non-finite steps itself, except in float32 without ZeRO."""

    skips = False

    def step(self, closure: Any = None) -> Any:
        return None if self.skips else super().step(closure)


class Engine:
    """A network and its optimizer under DeepSpeed.

    Attributes:
        config: the DeepSpeed config.
        stage: the ZeRO stage.
        initial_weights: returns the weights of a new network that are not random, by name.
        skipped: whether the last step left the weights unchanged because a gradient was not finite.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        config: Config,
        world: World,
        initial_weights: Callable[[nn.Module], Mapping[str, Tensor]] = lambda model: {},
    ):
        # The import takes seconds and selects the accelerator, so it must come after `_set_accelerator`.
        _set_accelerator(world.device, config.run.device)
        import deepspeed

        deepspeed_internals.prepare(_AdamW)
        self.config = deepspeed_config(config, world)
        deepspeed.init_distributed(dist_init_required=False)
        self.stage = int(self.config["zero_optimization"]["stage"])
        torch.manual_seed(config.run.seed)
        sharded = deepspeed.zero.Init(config_dict_or_path=self.config) if self.stage == 3 else contextlib.nullcontext()
        with sharded:
            model = build_model()
        if config.run.compile:
            _compile_towers(model, self.stage)
        optim = config.optim
        self._adamw = _AdamW(
            parameter_groups(model, optim.weight_decay),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            fused=world.device.type == "cuda" or None,
        )
        self.skipped, self._epoch = False, 0
        self.initial_weights, self._build_model = initial_weights, build_model
        self._gathered = deepspeed.zero.GatheredParameters
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=self._adamw, config=self.config, dist_init_required=False
        )
        deepspeed_internals.batch_operations(self._engine)
        deepspeed_internals.set_collective_timeout(self._engine, group_timeout())

    @staticmethod
    def release_groups() -> None:
        """Forget the process groups of DeepSpeed, so that another run of this process creates its own."""
        deepspeed_internals.release_groups()

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the network, on all ranks together."""
        return sum(full_shape(weight).numel() for weight in self.model.parameters())

    @property
    def model(self) -> nn.Module:
        """The module; at ZeRO-3 its parameters are partitioned and appear empty."""
        return self._engine.module

    def __call__(self, batch: Batch, **options: bool) -> dict[str, Tensor]:
        """Return the outputs for a batch; options are passed to the forward method."""
        return self._engine(**batch.media, seeds=batch.seeds, **options)

    def train(self, mode: bool = True) -> None:
        """Set training or evaluation mode."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch; they are averaged over ranks and micro-batches.

        If the loss is not finite on any rank, all gradients become NaN and `step` skips the step on all ranks.
        """
        self._engine.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))

    def step(self) -> Tensor:
        """Update the weights after the last micro-batch of a step.

        A step with a non-finite gradient is skipped on all ranks, see `skipped`; weights and optimizer state are
        unchanged.

        Returns:
            The gradient norm, a scalar. Reading it synchronizes with the GPU, so only logged steps should do it.
        """
        complete = self._engine.is_gradient_accumulation_boundary()
        norm = self._grad_norm() if complete and self._optimizer is self._adamw else None
        self._adamw.skips = norm is not None and not bool(torch.isfinite(norm))
        self._engine.step()
        if complete and self.stage == 3:
            deepspeed_internals.clear_gradients(self._engine)
        self.skipped = complete and (self._adamw.skips or not self._engine.was_step_applied())
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(float("nan") if norm is None else norm)

    def _grad_norm(self) -> Tensor | None:
        """Return the norm of the averaged gradients; without ZeRO in float32, DeepSpeed does not check it."""
        norms = [parameter.grad.float().norm() for parameter in self.model.parameters() if parameter.grad is not None]
        return torch.stack(norms).norm() if norms else None

    def set_epoch(self, epoch: int) -> None:
        """Train the parts of the towers that are frozen before this epoch of the run."""
        self._epoch = epoch
        for module in self.model.modules():
            if isinstance(module, Tower):
                module.set_epoch(epoch)

    def set_lr(self, towers: float, heads: float) -> None:
        """Set the learning rates of the towers and of the heads; those of frozen parameters are 0."""
        for group in self._optimizer.param_groups:
            rate = towers if group.get("lr_group") == "towers" else heads
            group["lr"] = rate * group.get("lr_scale", 1.0) * (self._epoch >= group.get("first_epoch", 0))

    def state(self) -> tuple[dict[str, Tensor], int]:
        """Return this rank's ranges of weights, buffers and optimizer state, and the steps of the optimizer."""
        return export_sharded_state(self._engine)

    def restore(self, read: Callable[[str, int, int], Tensor], steps: int, names: list[str]) -> None:
        """Load a saved state; all ranks call this. See `load_sharded_state` for the arguments."""
        load_sharded_state(self._engine, read, steps, names)

    def reinitialize(self, seed: int) -> None:
        """Start with new weights, those of `initial_weights` or random ones, and reset the optimizer; on all ranks.

        Args:
            seed: seed of the random weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._build_model()
        model.load_state_dict(self.initial_weights(model), strict=False)
        tensors = {f"weight/{name}": values.detach().flatten() for name, values in model.named_parameters()}
        tensors |= {f"buffer/{name}": values.flatten() for name, values in model.named_buffers()}
        load_sharded_state(self._engine, lambda name, start, size: tensors[name][start : start + size], 0, [])

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and buffers as float32 on the CPU; sharded parameters are gathered."""
        parameters = list(self.model.parameters())
        context = self._gathered(parameters) if self.stage == 3 else contextlib.nullcontext()
        with context:
            state = self.model.state_dict()
            return {name: _full_precision(value).cpu().clone().contiguous() for name, value in state.items()}


def _compile_towers(model: nn.Module, stage: int) -> None:
    if stage == 3:
        raise UserError(
            "run.compile=true: ZeRO stage 3 gathers weights between layers; allowed: deepspeed.zero_stage=2."
        )
    for module in model.modules():
        if isinstance(module, Tower):
            module.net.compile()


def _full_precision(values: Tensor) -> Tensor:
    values = values.detach()
    return values.float() if values.is_floating_point() else values
