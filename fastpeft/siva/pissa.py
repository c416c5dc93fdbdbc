"""A PiSSA adapter of PEFT as the state of a SiVA adapter.

PiSSA (Meng, Wang, Zhang 2024) trains the factors of the same triplets that SiVA trains. With PEFT's scaling c it starts
from `B0 = U0 diag(S0 / c)^1/2` and `A0 = diag(S0 / c)^1/2 V0` on the weight `W0 - c B0 A0`. So

    c B A = U diag(S0) V  with  U = B diag(c / S0)^1/2  and  V = diag(c / S0)^1/2 A

is the trained product in SiVA's coordinates, whose initial values are U0 and V0. A PiSSA folder holds B and A only. U0,
S0 and V0 are computed from the base model's weight again, by the same call as in PEFT.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.siva.decompose import Factors
from fastpeft.support import files
from fastpeft.support.adapter_files import CONFIG, PREFIX, WEIGHTS

_A, _B = ".lora_A.weight", ".lora_B.weight"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PissaAdapter:
    """The configuration in a folder of `save_pretrained`, and the tensors by their names in the base model."""

    path: Path
    config: LoraConfig
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | Path) -> PissaAdapter:
        """Read a local folder.

        Raises:
            FastpeftError: it holds no PiSSA adapter, or one that SiVA cannot take over.
        """
        path = files.path_of(path)
        kind = files.read_json(path / CONFIG).get("peft_type")
        config: Any = PeftConfig.from_pretrained(str(path)) if kind == "LORA" else None
        start = config.init_lora_weights if config is not None else None
        if isinstance(start, str) and start.startswith("pissa_niter"):
            raise FastpeftError(
                f"the adapter in {str(path)!r} started from {start!r}, a decomposition drawn at random that its folder "
                "does not hold. Let PEFT convert it to a LoRA (save_pretrained with "
                "path_initial_model_for_weight_conversion), or train with init_lora_weights='pissa'."
            )
        if start != "pissa":
            raise FastpeftError(
                f"the adapter in {str(path)!r} is not PiSSA's: its type is {kind}, its init_lora_weights {start!r}. "
                "Give the folder of one with init_lora_weights='pissa', as save_pretrained wrote it."
            )
        unknown = ("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices")
        used = [name for name in unknown if getattr(config, name, None)]
        if used or config.bias != "none":
            raise FastpeftError(
                f"the adapter in {str(path)!r} has {', '.join(used) or f'bias={config.bias!r}'}, which SiVA does not "
                "take over. Merge it into its base model instead."
            )
        weights = path / WEIGHTS
        if not weights.is_file():
            raise FastpeftError(f"there is no {weights}. Save the adapter again with safe_serialization=True.")
        if config.lora_dropout:
            logger.info("lora_dropout=%s of the adapter in %s is left out: SiVA has none", config.lora_dropout, path)
        return cls(path, config, {key.removeprefix(PREFIX): value for key, value in load_file(weights).items()})

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that its configuration and SiVA's share."""
        shared = ["r", "target_modules", "rank_pattern", "layers_to_transform", "layers_pattern", "exclude_modules"]
        shared += ["modules_to_save", "task_type", "base_model_name_or_path", "revision"]
        return {name: getattr(self.config, name) for name in shared}

    def check_targets(self, targets: Collection[str]) -> None:
        """Raise `FastpeftError` unless it holds factors for exactly these layers."""
        held = {key.removesuffix(_A) for key in self.tensors if key.endswith(_A)}
        if held != set(targets):
            raise FastpeftError(
                f"the PiSSA adapter in {str(self.path)!r} has other layers than this model: "
                f"{', '.join(sorted(held ^ set(targets)))}. Load the base model that it was trained on, and take the "
                "configuration from SivaConfig.from_pissa as it is."
            )

    def factors(self, name: str, weight: Tensor) -> tuple[Factors, Factors]:
        """The trained and the initial factors of the layer `name` with the pretrained `weight` `(N, K)`.

        Raises:
            FastpeftError: the shapes of factors and weight differ.
        """
        a, b = self.tensors[f"{name}{_A}"].float(), self.tensors[f"{name}{_B}"].float()
        if (len(b), a.shape[1]) != tuple(weight.shape):
            raise FastpeftError(
                f"{name} has the shape {tuple(weight.shape)}, but the PiSSA adapter in {str(self.path)!r} is for "
                f"{(len(b), a.shape[1])}. Load the base model that it was trained on."
            )
        r = len(a)
        u0, s, v0 = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        u0, s, v0 = u0[:, :r].contiguous(), s[:r].contiguous(), v0[:r].contiguous()
        root = torch.where(s > 0, self._scaling(name, r) / s, 0).sqrt()
        a, b = a.to(s.device), b.to(s.device)
        return Factors(b * root, s, root[:, None] * a), Factors(u0, s, v0)

    def _scaling(self, name: str, r: int) -> float:
        pattern = get_pattern_key(list(self.config.alpha_pattern), name)
        alpha = self.config.alpha_pattern.get(pattern, self.config.lora_alpha)
        return alpha / (math.sqrt(r) if self.config.use_rslora else r)

    def fill_saved_modules(self, model: nn.Module, adapter_name: str) -> None:
        """Load the weights of modules that trained whole, such as a classification head."""
        for name, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                start = f"{name}."
                own = {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}
                module.modules_to_save[adapter_name].load_state_dict(own)
