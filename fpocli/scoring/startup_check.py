"""The start-up check: does the model compute what plain transformers computes?

Model families are many, and a kernel that drops attention sinks, a soft-cap or a sliding window
makes every number wrong without an error. So before a model scores anything, a pair is scored in
two ways on the device in use: packed with another pair, by fpo's kernels, and one sequence at a
time by transformers' own eager attention and head. Both must agree.

Shapes: M scored tokens, L tokens of the packed sequence, d model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fpocli.data.pairs import TokenIds, TokenPair
from fpocli.features.site import Site
from fpocli.model.attention import SUPPORTED, length_multiple
from fpocli.model.head import logprobs
from fpocli.model.hook_point import captured_outputs, changed_output
from fpocli.model.language_model import LanguageModel
from fpocli.model.packing import PackedSequence, pack
from fpocli.store.records import TokenPairs
from fpocli.system.console import progress
from fpocli.system.errors import UserError

# The last tokens of each response are compared; transformers' logits of all might not fit.
_COMPARED = 256
# Pairs that are tried until plain transformers gives finite values.
_TRIED = 8
# Log-probabilities, float32 [n] in nats, and hidden states of each site, [n, d].
Scores = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Difference:
    """How far two computations of the same pair are apart.

    Args:
        nats: mean difference of the scored tokens' log-probabilities, in nats.
        states: mean relative difference of the hidden states, ||a - b|| / ||b|| per position, at
            the site where it is largest; 0 without sites.
    """

    nats: float
    states: float


# The most that rounding explains, by the dtype of the model. In bfloat16 every product is rounded
# to 8 bits and kernels sum in different orders; a missing sink, soft-cap or window exceeds it.
TOLERANCE = {
    torch.float32: Difference(nats=1e-3, states=1e-3),
    torch.float16: Difference(nats=0.02, states=0.02),
    torch.bfloat16: Difference(nats=0.05, states=0.05),
}
# Of a parameter's gradient, ||a - b|| / ||b||.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# A response's log-probabilities must not depend on other responses at all, whatever the dtype.
_INDEPENDENT = 1e-4
# Of the MLP's output; the residual stream it is added to may be much larger, and so its rounding.
_ADDITIVE = 0.3


def check_against_transformers(model: LanguageModel, tokens: TokenPairs) -> Difference:
    """`check_scores` at the start of a command, with progress."""
    with progress("Checking the model against transformers", None):
        return check_scores(model, tokens)


@torch.no_grad()
def check_scores(model: LanguageModel, tokens: TokenPairs) -> Difference:
    """Refuse a model whose packed log-probabilities or hidden states are not transformers' own.

    Args:
        model: on its device, in evaluation mode.
        tokens: pairs of the store, of which one is used, and one more as its neighbour.

    Returns:
        the difference that was found.

    Raises:
        UserError: it exceeds TOLERANCE, or the model cannot run on packed sequences.
    """
    name = type(model.network).__name__
    most = TOLERANCE[model.network.dtype]
    try:
        pair, neighbour, plain = _sample(model, tokens)
        found = _difference(model, pair, neighbour, plain)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise UserError(f"{name} cannot run on packed sequences: {error}", SUPPORTED) from error
    leak = _dependence(model, pair, neighbour)
    # Written so that nan is too large.
    if not (found.nats <= most.nats and found.states <= most.states):
        raise UserError(
            f"{name} does not compute what transformers computes: log-probabilities of a pair "
            f"differ by {found.nats:.3g} nats per token on average (tolerance {most.nats:g}), "
            f"hidden states by {found.states:.3g} of their norm (tolerance {most.states:g})",
            SUPPORTED,
        )
    if not leak <= _INDEPENDENT:
        raise UserError(
            f"{name} does not follow the attention rule of packed sequences: the score of a "
            f"response changes by {leak:.3g} nats per token with the responses next to it",
            SUPPORTED,
        )
    for site in model.sites:
        if site.kind == "mlp_out" and not _additive(model, pair, site) <= _ADDITIVE:
            raise UserError(
                f"{name} does not add the output of its MLP to the residual stream as it is, so "
                f"there is no hook point {site}",
                "use --site resid_post",
            )
    return found


def check_gradients(model: LanguageModel, tokens: TokenPairs) -> float:
    """Refuse a model whose packed backward pass is not transformers' own.

    The gradient is that of the margin in nats per token, summed over the pairs, with respect to
    every parameter. None of them may be zero, as that of a bias of the keys is.

    Args:
        model: on its device, in evaluation mode; float32 or bfloat16.
        tokens: few pairs, packed into one sequence. A response has at most 256 tokens.

    Returns:
        ||a - b|| / ||b|| of the parameter where it is largest.

    Raises:
        UserError: it exceeds GRADIENT_TOLERANCE.
    """
    pairs = [tokens.pair(number) for number in range(len(tokens))]
    batch = _packed(model, pairs)
    ours = _gradient(model, _scores(model, batch)[0].split(batch.counts))
    with _eager(model):
        responses = ((pair.prompt, y) for pair in pairs for y in (pair.chosen, pair.rejected))
        theirs = _gradient(model, [_plain_scores(model, x, y)[0] for x, y in responses])
    apart = {
        name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs
    }
    # nan counts as largest.
    worst = max(apart, key=lambda name: (apart[name] != apart[name], apart[name]))
    most = GRADIENT_TOLERANCE[model.network.dtype]
    if not apart[worst] <= most:
        raise UserError(
            f"the backward pass of {type(model.network).__name__} is not transformers' own: the "
            f"gradient of {worst} differs by {apart[worst]:.3g} of its norm (tolerance {most:g})",
            SUPPORTED,
        )
    return apart[worst]


def _gradient(model: LanguageModel, responses: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of the margins' sum, in float32, by parameter; `responses` are the log-probabilities of
    chosen and rejected, pair after pair."""
    means = torch.stack([logp.mean() for logp in responses])
    margin = (means[::2] - means[1::2]).sum()
    parameters = dict(model.network.named_parameters())
    gradients = torch.autograd.grad(margin, list(parameters.values()))
    return {name: one.float() for name, one in zip(parameters, gradients, strict=True)}


def _difference(
    model: LanguageModel, pair: TokenPair, neighbour: TokenPair, plain: list[Scores]
) -> Difference:
    """Compare a pair, packed before its neighbour, with its plain scores."""
    ours, states = _scores(model, _packed(model, [pair, neighbour]))
    stop, nats, relative = 0, [], [torch.zeros((), device=ours.device)]
    for response, (theirs, hidden) in zip((pair.chosen, pair.rejected), plain, strict=True):
        stop += len(response)
        compared = slice(stop - len(theirs), stop)
        nats.append(ours[compared] - theirs)
        for site, value in hidden.items():
            own = states[site][compared].float()
            relative.append(((own - value).norm(dim=-1) / value.norm(dim=-1)).mean())
    return Difference(torch.cat(nats).abs().mean().item(), torch.stack(relative).max().item())


def _sample(model: LanguageModel, tokens: TokenPairs) -> tuple[TokenPair, TokenPair, list[Scores]]:
    """A pair, longer than the sliding window if there is one, another one as its neighbour, and the
    plain scores of the pair's two sequences.

    A pair for which plain transformers gives NaN as well shows nothing; `fpo cache` names it later.
    """
    window = getattr(model.config, "sliding_window", None) or 0
    lengths = tokens.spans[:, 2] - tokens.spans[:, 0]
    order = np.argsort(lengths <= window, kind="stable")[:_TRIED].tolist()
    with _eager(model):
        for number in order:
            pair = tokens.pair(number)
            plain = [_plain_scores(model, pair.prompt, y) for y in (pair.chosen, pair.rejected)]
            if all(logp.isfinite().all() for logp, _ in plain):
                break
    return pair, tokens.pair((number + 1) % len(tokens)), plain


def _packed(model: LanguageModel, pairs: list[TokenPair]) -> PackedSequence:
    device = model.network.device
    return pack(pairs, length_multiple(device)).to(device)


def _scores(model: LanguageModel, batch: PackedSequence) -> Scores:
    """Log-probabilities, float32 [M] in nats, and hidden states of each site, [M, d]."""
    final, states = model.states(batch)
    return logprobs(model.network, final, batch.targets, model.head), states


def _plain_scores(model: LanguageModel, prompt: TokenIds, response: TokenIds) -> Scores:
    """The same of the last tokens of one sequence, by transformers' own forward pass."""
    count = min(len(response), _COMPARED)
    ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)
    ids = ids.to(model.network.device)[None]
    with captured_outputs(model.network, model.sites) as captured:
        # The last `count` + 1 positions; the very last predicts what follows.
        output = model.network(input_ids=ids, use_cache=False, logits_to_keep=count + 1)
    logits = output.logits[0, :-1].float()
    values = logits.log_softmax(-1).gather(-1, ids[0, -count:, None])[:, 0]
    return values, {name: state[0, -count - 1 : -1].float() for name, state in captured.items()}


@contextmanager
def _eager(model: LanguageModel) -> Iterator[None]:
    """transformers' own eager attention for a while."""
    kernel = model.config._attn_implementation
    model.network.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.network.set_attn_implementation(kernel)


def _dependence(model: LanguageModel, pair: TokenPair, neighbour: TokenPair) -> float:
    """How much the rejected response's average log-probability changes, in nats per token, when
    all tokens of the chosen response and of the pair next to it are replaced by as many others.

    With another number of rows a matrix product may sum in another order, in bfloat16 with an
    error of thousandths of a nat."""

    def other(ids: TokenIds) -> TokenIds:
        return np.full_like(ids, pair.prompt[-1])

    rejected = slice(len(pair.chosen), len(pair.chosen) + len(pair.rejected))
    changed = replace(pair, chosen=other(pair.chosen))
    beside = TokenPair(other(neighbour.prompt), other(neighbour.chosen), other(neighbour.rejected))
    before, _ = _scores(model, _packed(model, [pair, neighbour]))
    after, _ = _scores(model, _packed(model, [changed, beside]))
    return (before[rejected] - after[rejected]).mean().abs().item()


def _additive(model: LanguageModel, pair: TokenPair, site: Site) -> float:
    """How far the layer's output is from falling by the MLP's output when that is set to zero, as
    a share of the norm of the MLP's output."""
    batch = _packed(model, [pair])
    own = LanguageModel(model.network, [site, Site(site.layer, "resid_post")])
    _, states = own.states(batch)
    contribution, before = (states[str(site)].float() for site in own.sites)
    with changed_output(model.network, site, lambda output: output * 0):
        _, states = own.states(batch)
    fallen = before - states[f"layer_{site.layer}.resid_post"].float()
    return ((fallen - contribution).norm() / contribution.norm()).item()
