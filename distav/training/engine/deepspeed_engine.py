"""The DeepSpeed engine, the only place that knows DeepSpeed."""

import contextlib
import importlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from distav.config.errors import UserError
from distav.config.schema import Config, Device, Precision
from distav.data.pipeline.loader import Batch
from distav.data.pipeline.sampler import micro_batch_size
from distav.distributed.process_group import World, collective_timeout
from distav.models.av_model import parameter_groups
from distav.training.engine.sharded_state import export_sharded_state, load_sharded_state

DERIVED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
"""Keys of DeepSpeed's dictionary that follow from other settings and cannot be given in `deepspeed.extra`."""


def deepspeed_config(settings: Config, world: World) -> dict[str, Any]:
    """Derive DeepSpeed's dictionary from the settings.

    Raises:
        UserError: for a batch that cannot be divided, or a key that is derived.
    """
    optim, chosen = settings.optim, settings.deepspeed
    for key in DERIVED_KEYS:
        if key in chosen.extra:
            raise UserError(f"deepspeed.extra.{key} follows from `optim`; set optim.* instead.")
    config: dict[str, Any] = {
        "train_batch_size": optim.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch_size(
            optim.global_batch, optim.gradient_accumulation_steps, world.world_size
        ),
        "gradient_accumulation_steps": optim.gradient_accumulation_steps,
        "gradient_clipping": optim.grad_clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": _zero_stage(settings, world)},
        "bf16": {"enabled": trains_in_bf16(settings, world)},
        "timers": {"throughput": {"enabled": False}},  # It synchronizes the device twice per micro-batch.
    }
    for key, value in chosen.extra.items():
        both = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if both else value
    return config


def trains_in_bf16(settings: Config, world: World) -> bool:
    """Whether the model runs in bfloat16."""
    precision = settings.deepspeed.precision
    return precision is Precision.bf16 or (precision is Precision.auto and world.device.type == "cuda")


def _zero_stage(settings: Config, world: World) -> int:
    stage = settings.deepspeed.zero_stage
    return int(world.device.type == "cuda") if stage is None else stage


def _set_accelerator(device: torch.device, setting: Device) -> None:
    """Make DeepSpeed use the run's device; by itself it takes a GPU wherever there is one.

    Raises:
        UserError: if the environment variable DS_ACCELERATOR names another kind of device.
    """
    kind = os.environ.setdefault("DS_ACCELERATOR", device.type)
    if kind != device.type:
        raise UserError(
            f"DS_ACCELERATOR={kind} contradicts run.device={setting.name}, by which this run computes on "
            f"{device.type}; unset DS_ACCELERATOR or change run.device."
        )
    accelerator: Any = importlib.import_module("deepspeed.accelerator")
    if accelerator.get_accelerator().device_name() != kind:  # DeepSpeed was imported before the device was known.
        module = importlib.import_module(f"deepspeed.accelerator.{kind}_accelerator")
        accelerator.set_accelerator(getattr(module, f"{kind.upper()}_Accelerator")())


class _AdamW(torch.optim.AdamW):
    """AdamW that can be told to leave a step out; DeepSpeed does so by itself in all but plain float32."""

    skips = False

    def step(self, closure: Any = None) -> Any:
        return None if self.skips else super().step(closure)


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its whole state.

    Attributes:
        skipped: whether the last step left the weights as they were, since a gradient was not finite.
    """

    def __init__(self, build_model: Callable[[], nn.Module], settings: Config, world: World):
        # Imported late: it takes seconds, and chooses its accelerator when it is.
        _set_accelerator(world.device, settings.run.device)
        import deepspeed
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
        from deepspeed.utils import logger

        logger.setLevel(logging.WARNING)
        if _AdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # It looks for the very type, and would warn of a subclass.
            ZERO_SUPPORTED_OPTIMIZERS.append(_AdamW)
        # Sums in shared memory serve inference alone, and building them takes a compiler and half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config = deepspeed_config(settings, world)
        deepspeed.init_distributed(dist_init_required=False)
        self.stage = int(self.config["zero_optimization"]["stage"])
        torch.manual_seed(settings.run.seed)
        sharded = deepspeed.zero.Init(config_dict_or_path=self.config) if self.stage == 3 else contextlib.nullcontext()
        with sharded:
            model = build_model()
        optim = settings.optim
        self._adamw = _AdamW(parameter_groups(model, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2))
        self.skipped = False
        self._build_model = build_model
        self._gathered = deepspeed.zero.GatheredParameters
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=self._adamw, config=self.config, dist_init_required=False
        )
        # DeepSpeed's own process group has a timeout of half an hour, whatever the run's.
        self._engine.data_parallel_group.set_timeout(collective_timeout())

    @property
    def model(self) -> nn.Module:
        """The module inside; at ZeRO-3 its parameters are empty here."""
        return self._engine.module

    def __call__(self, batch: Batch, **how: bool) -> dict[str, Tensor]:
        """Run the model on a batch; `how` goes to its forward pass."""
        return self._engine(**batch.media, seeds=batch.seeds, **how)

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; averaged over ranks and micro-batches.

        A loss that is not finite on any rank makes every gradient of the step so, and with that `step` skips it.
        """
        self._engine.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))

    def step(self) -> Tensor:
        """Update the parameters if the micro-batches of the step are complete.

        A step whose gradient is not finite is skipped on all ranks: weights and optimiser state stay, see `skipped`.

        Returns:
            The gradient norm, a scalar. On a GPU, reading it waits for the device: do so in steps that are logged.
        """
        complete = self._engine.is_gradient_accumulation_boundary()
        norm = self._plain_norm() if complete and self._optimizer is self._adamw else None
        self._adamw.skips = norm is not None and not bool(torch.isfinite(norm))
        self._engine.step()
        self.skipped = complete and (self._adamw.skips or not self._engine.was_step_applied())
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(float("nan") if norm is None else norm)

    def _plain_norm(self) -> Tensor | None:
        """Return the norm of the averaged gradients, which DeepSpeed checks in all but plain float32."""
        grads = [each.grad.float().norm() for each in self.model.parameters() if each.grad is not None]
        return torch.stack(grads).norm() if grads else None

    def set_lr(self, towers: float, heads: float) -> None:
        """Set the learning rates of the two parts of the model."""
        for group in self._optimizer.param_groups:
            group["lr"] = towers if group.get("part") == "towers" else heads

    def state(self) -> tuple[dict[str, Tensor], int]:
        """Return this rank's part of weights, buffers and optimiser state, and the optimiser's steps."""
        return export_sharded_state(self._engine)

    def restore(self, read: Callable[[str, int, int], Tensor], steps: int, kinds: list[str]) -> None:
        """Take up a saved state; every rank calls this. See `distav.training.engine.sharded_state.put_back`."""
        load_sharded_state(self._engine, read, steps, kinds)

    def reinitialize(self, seed: int, weights: Mapping[str, Tensor] = MappingProxyType({})) -> list[str]:
        """Begin again with new initial weights and no optimiser state; every rank calls this.

        Args:
            seed: of the weights.
            weights: what takes the place of those of the same name and shape.

        Returns:
            The names of weights that found a place.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._build_model()
        own = model.state_dict()
        taken = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
        model.load_state_dict(taken, strict=False)
        fresh = {f"weight/{name}": value.detach().flatten() for name, value in model.named_parameters()}
        fresh |= {f"buffer/{name}": value.flatten() for name, value in model.named_buffers()}
        load_sharded_state(self._engine, lambda name, start, size: fresh[name][start : start + size], 0, [])
        return list(taken)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and buffers in float32 on the CPU, gathered where they are sharded."""
        parameters = list(self.model.parameters())
        context = self._gathered(parameters) if self.stage == 3 else contextlib.nullcontext()
        with context:
            state = self.model.state_dict()
            return {name: value.detach().float().cpu().clone().contiguous() for name, value in state.items()}

    def described(self) -> str:
        """Return DeepSpeed's dictionary as JSON."""
        return json.dumps(self.config, indent=1, sort_keys=True)
