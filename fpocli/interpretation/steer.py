"""fpo features steer: samples with features added or ablated, beside samples without."""

import json
import shutil
from typing import Any

import torch

from fpocli.config import CacheConfig, SteerConfig
from fpocli.data.dropped import DroppedRows
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.display.single_features import show_steering
from fpocli.evaluation.prompts import Prompt, find_prompts, read_prompts
from fpocli.evaluation.sampling import Sampler
from fpocli.features.pretrained import check_encoder, load_sae
from fpocli.features.site import Site
from fpocli.features.steering import Steering
from fpocli.model.hook_point import changed_output
from fpocli.model.network import check_layers, choose_device, load_network, read_config
from fpocli.scoring.saes import choose_default_saes
from fpocli.system.console import data_console, progress
from fpocli.system.model_folder import find_model


def steer(config: SteerConfig) -> dict[str, Any]:
    """Sample from a model with features added or ablated and without, and print both.

    Args:
        config: the settings.

    Returns:
        model, sae, site, what was `added` (feature, value) and `ablated`; and `samples`, by prompt
        `plain` and `steered`: text, tokens, entropy in nats per token, and whether it ended. The
        second turn of a prompt follows the answer to the first, of the same kind.

    Raises:
        UserError: the model, SAE, features or prompts cannot be used.
    """
    prompts = _read_prompts(config)
    site = Site(config.layer, config.site)
    device = choose_device(config.device)
    trust = config.trust_remote_code
    folder = find_model(config.model, weights=False, trust_remote_code=trust)
    model_config = read_config(folder)
    check_layers(model_config, [site])
    sae = config.sae or choose_default_saes(folder, model_config, [site])[0]
    folder = find_model(config.model, revision=folder.revision, trust_remote_code=trust)
    # The limits are those of pairs, and there are none here.
    tokenizer = PairTokenizer(
        folder,
        config.chat_template,
        CacheConfig.max_length,
        CacheConfig.max_prompt_length,
        DroppedRows(),
    )
    steering = _load_steering(config, sae, site, model_config.hidden_size, device)
    with progress("Loading the model", None):
        network = load_network(folder, getattr(torch, config.dtype)).to(device)
    sampler = Sampler(
        network,
        tokenizer.tokenizer,
        bos=tokenizer.bos,
        end_of_turn=tokenizer.end_of_turn,
        top_p=config.top_p,
        seed=config.seed,
    )
    result = {
        "model": folder.source,
        "sae": sae,
        "site": str(site),
        "added": [{"feature": f, "value": value} for f, value in config.added.items()],
        "ablated": config.ablate,
        "samples": _sample(config, sampler, prompts, site, steering),
    }
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        # The two texts of a prompt are broken to fit side by side.
        show_steering(result, data_console(shutil.get_terminal_size().columns))
    return result


def _read_prompts(config: SteerConfig) -> list[Prompt]:
    """Those of the command line, then those of the file."""
    prompts = [Prompt((text,), {"prompt": text}) for text in config.prompt]
    if config.prompts:
        prompts += read_prompts(find_prompts(config.prompts))[: config.limit]
    return prompts


def _load_steering(
    config: SteerConfig, source: str, site: Site, width: int, device: torch.device
) -> Steering:
    """The change of the hidden states; of the decoder only the rows in use stay in memory."""
    with progress("Loading the SAE", None):
        encoder, decoder = load_sae(source, device)
    check_encoder(encoder, source, site, width)
    return Steering(encoder, decoder, config.added, config.ablate)


def _sample(
    config: SteerConfig, sampler: Sampler, prompts: list[Prompt], site: Site, steering: Steering
) -> list[dict[str, Any]]:
    """Both samples of every prompt, with the same seed.

    Prompts are answered one at a time, so that nothing but the steering differs.
    """
    samples = []
    with progress("Sampling with and without steering", len(prompts)) as bar:
        for number, prompt in enumerate(prompts):
            asked = ([prompt], config.temperature, number, config.max_new_tokens)
            (plain,) = sampler.answer(*asked)
            with changed_output(sampler.network, site, steering):
                (steered,) = sampler.answer(*asked)
            samples += [
                {"prompt": question, "plain": _describe(one), "steered": _describe(other)}
                for question, one, other in zip(
                    prompt.turns, plain["turns"], steered["turns"], strict=True
                )
            ]
            bar.advance()
    return samples


def _describe(turn: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": turn["text"],
        "tokens": len(turn["ids"]),
        "entropy": turn["entropy"],
        "ended": turn["ended"],
    }
