"""The DeepSpeed engine, the only place that knows DeepSpeed."""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distav.data.loader import Batch
from distav.data.order import check_batch
from distav.errors import UserError
from distav.models.av import parameter_groups
from distav.settings import Precision, Settings
from distav.world import World

DERIVED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
"""Keys of DeepSpeed's dictionary that follow from other settings and cannot be given in `deepspeed.extra`."""


def deepspeed_config(settings: Settings, world: World) -> dict[str, Any]:
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
        "train_micro_batch_size_per_gpu": check_batch(optim.global_batch, optim.accumulation, world.num_ranks),
        "gradient_accumulation_steps": optim.accumulation,
        "gradient_clipping": optim.grad_clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": chosen.zero_stage},
        "bf16": {"enabled": trains_in_bf16(settings, world)},
    }
    for key, value in chosen.extra.items():
        both = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if both else value
    return config


def trains_in_bf16(settings: Settings, world: World) -> bool:
    """Whether the model runs in bfloat16."""
    precision = settings.deepspeed.precision
    return precision is Precision.bf16 or (precision is Precision.auto and world.device.type == "cuda")


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its whole state."""

    def __init__(self, build_model: Callable[[], nn.Module], settings: Settings, world: World):
        # Imported late: it takes seconds, and chooses its accelerator when it is.
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.WARNING)
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
        optimizer = torch.optim.AdamW(
            parameter_groups(model, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2)
        )
        self._gathered = deepspeed.zero.GatheredParameters
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.config, dist_init_required=False
        )

    @property
    def model(self) -> nn.Module:
        """The module inside; at ZeRO-3 its parameters are empty here."""
        return self._engine.module

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Run the model on a batch."""
        return self._engine(batch.frames, batch.sound, batch.seeds)

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; averaged over ranks and micro-batches."""
        self._engine.backward(loss)

    def step(self) -> float:
        """Update the parameters if the micro-batches of the step are complete; return the gradient norm."""
        norm = self._plain_norm() if self.stage == 0 else None
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return float(norm) if norm is not None else float("nan")

    def _plain_norm(self) -> Tensor | None:
        """Return the norm of the averaged gradients where no ZeRO optimiser keeps it."""
        if not self._engine.is_gradient_accumulation_boundary():
            return None
        grads = [each.grad.float().norm() for each in self.model.parameters() if each.grad is not None]
        return torch.stack(grads).norm() if grads else None

    def set_lr(self, towers: float, heads: float) -> None:
        """Set the learning rates of the two parts of the model."""
        for group in self._optimizer.param_groups:
            group["lr"] = towers if group.get("part") == "towers" else heads

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state; every rank calls this."""
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        """Read weights and optimiser state; every rank calls this."""
        loaded, _ = self._engine.load_checkpoint(str(folder), tag="engine")
        if loaded is None:
            raise UserError(
                f"{folder}: DeepSpeed could not load the checkpoint; delete that folder to take the one before."
            )

    def whole_state(self) -> dict[str, Tensor]:
        """Return all parameters and buffers in float32 on the CPU, gathered where they are sharded."""
        parameters = list(self.model.parameters())
        context = self._gathered(parameters) if self.stage == 3 else contextlib.nullcontext()
        with context:
            state = self.model.state_dict()
            return {name: value.detach().float().cpu().clone().contiguous() for name, value in state.items()}

    def described(self) -> str:
        """Return DeepSpeed's dictionary as JSON."""
        return json.dumps(self.config, indent=1, sort_keys=True)
