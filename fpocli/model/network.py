"""Loads transformers' configuration and model of a folder; no parameter is left to chance."""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from safetensors import safe_open

from fpocli.features.site import Site
from fpocli.model.four_bit import four_bit_config, require_bitsandbytes
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder, refuse_code


def read_config(folder: ModelFolder) -> Any:
    """transformers' configuration of a text model.

    Raises:
        UserError: transformers does not know the model type, or it needs remote code that is not
            allowed.
    """
    return _read_config(folder).get_text_config()


def _read_config(folder: ModelFolder) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder.path, trust_remote_code=folder.trust_remote_code)
    except Exception as error:  # transformers checks little before it computes with a value
        refuse_code(folder, error)
        raise UserError(f"the configuration of {folder.source} cannot be read: {error}") from error


def load_network(
    folder: ModelFolder, dtype: torch.dtype, partitioned: AbstractContextManager | None = None
) -> Any:
    """Load transformers' model of a folder on the CPU, every parameter from the folder's files.

    Args:
        folder: where its files are.
        dtype: of the weights.
        partitioned: a context in which transformers partitions the parameters over the ranks while
            it loads them.

    Raises:
        UserError: the configuration does not match the weights, or the model needs remote code
            that is not allowed; or bitsandbytes is not installed, which 4 bits need.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # Its bars for reading and writing shards would stand between fpo's own lines.
    logging.disable_progress_bar()
    # Missing weights become an error below. Where sae-lens is imported, it has silenced this too.
    logging.set_verbosity_error()
    config = _read_config(folder)
    quantised = {}
    if folder.load_in_4bit:
        require_bitsandbytes()
        quantised["quantization_config"] = four_bit_config(dtype)
    loaded: Any
    try:
        _check_size(folder, config)
        with partitioned or nullcontext():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder.path,
                dtype=dtype,
                use_safetensors=True,
                # transformers' default; the configuration might name a kernel on the hub.
                attn_implementation=None,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=folder.trust_remote_code,
                **quantised,
            )
    except UserError:
        raise
    except Exception as error:  # as in _read_config
        refuse_code(folder, error)
        raise UserError(f"the model {folder.source} cannot be loaded: {error}") from error
    network, report = loaded
    # transformers initialises these at random.
    absent = sorted(report["missing_keys"])
    other = sorted(name for name, *_ in report["mismatched_keys"])
    for names, what in ((absent, "lack"), (other, "have another shape of")):
        if names:
            raise UserError(
                f"the weights of {folder.source} {what} {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
                "the model was not saved completely, or its config.json belongs to another model",
            )
    _without_noise(network)
    return network


def _without_noise(network: Any) -> None:
    """Turn off dropout and the noise of routers, which would set the policy apart from a reference
    that is run without. The configuration, which is saved, is left as it is."""
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            noise = any(word in name for word in ("drop", "jitter"))
            if noise and isinstance(value, float):
                setattr(module, name, 0.0)


def _check_size(folder: ModelFolder, config: Any) -> None:
    """Refuse a configuration with far more parameters than the weight files, before allocating.

    Up to twice as many are let through: then some are missing, and `load_network` names them.
    """
    from transformers import AutoModelForCausalLM

    held, tensors = 0, 0
    for file in folder.weight_files:
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            held += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
            tensors += len(names)
    layers = config.get_text_config().num_hidden_layers
    # transformers creates objects for each layer even on the meta device.
    larger = f"{layers:,} layers, and the weights {tensors:,} tensors" if layers > tensors else ""
    if not larger:
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=None,
                trust_remote_code=folder.trust_remote_code,
            )
        described = sum(parameter.numel() for parameter in shapes.parameters())
        if described > 2 * held:
            larger = f"{described:,} parameters, and the weights {held:,}"
    if larger:
        raise UserError(
            f"config.json of {folder.source} describes a larger model than its weights: {larger}",
            "the files belong to different models, or the weights are quantised",
        )


def count_parameters(folder: ModelFolder) -> int:
    """Number of parameters of a model, from its configuration alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(
            _read_config(folder), trust_remote_code=folder.trust_remote_code
        )
    return sum(parameter.numel() for parameter in network.parameters())


def choose_device(name: str | None) -> torch.device:
    """The torch device of a name; None is the GPU if there is one, else the CPU. Of several GPUs
    it is the one of this process, unless the name has an index."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name} cannot be used: {error}", "try --device cpu") from error
    return device


def check_layers(config: Any, sites: list[Site]) -> None:
    """Refuse a site whose layer the model does not have."""
    for site in sites:
        if not 0 <= site.layer < config.num_hidden_layers:
            raise UserError(
                f"layer {site.layer} is out of range: the model has layers 0 to "
                f"{config.num_hidden_layers - 1}",
                "choose another --layer",
            )
