"""Step time of a served language model, from its sizes and a data sheet.

One decoding step of B sequences on n accelerators, L layers, P parameters of which a share `a` is
activated, w bytes each, context c, output O tokens, prompt I tokens:

    weights    read w P / (n W);  of a mixture of experts the share  a + (1-a) d,
               d = 1 - (1-a)^(g B), in 8 bits more: padding kernels also read experts not drawn
    cache      read B c k L / (n W)
    arithmetic 2 a P B / (n F)
    launches   host + L (launch + routing to experts + tensor-parallel latency log2 n
               + unpacking of 8-bit weights)
    sequences  B s: sampling, bookkeeping
    step       the sum; without a captured graph (more than 512 sequences, or a step with prompts)
               at least L times an eager layer

The faster a device, the smaller the share of its speed and peak that kernels reach; wide matrices
reach more of the peak. A share 1 - exp(-B/O) of the steps also processes prompts and takes longer;
the mean step gives tokens per second. Prompts differ in length, so that the extra time is about
exponential: with a rate r of such steps a quantile 1-p of the latency lies log(r/p) of it above a
plain step if r > p. Memory left beside the weights limits the concurrent sequences.
L = 17 (P / 1e9)^(1/3) where it is not given: 34 layers for 8e9 parameters, 126 for 405e9.

The roofline of weights, cache and arithmetic is Pope et al. 2022 (section 2 and 3); the share of
experts is that of independent draws. Parameters are positive and fitted as logarithms
(`supple.core.llm.inference`), with priors from data sheets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from supple.core.hardware import lookup
from supple.core.layouts.model import Device
from supple.core.spec import check_counts, is_count, is_positive
from supple.core.words import in_digits

_Array = npt.NDArray[np.float64]

_GRAPH_LIMIT = 512.0
"""Largest number of sequences for which common engines capture a step as a graph."""
USABLE = 0.9
"""Share of the memory that engines use."""
_CACHE_ATTENTION = 0.7
"""Share of the memory bandwidth that attention over the cache reaches."""
_TENTH, _HALF = -math.log(0.9), -math.log(0.5)
"""Rates of mixed steps (with prompts) at which a tenth, or half, of all steps are mixed."""
_REFERENCE_SPEED, _REFERENCE_WIDTH = 3.35e12, 4096.0
"""Memory bandwidth (bytes/s, of an h100) and hidden size at which `_PRIORS` hold."""
_REFERENCE_LINK = lookup("nvlink-h100")
FIGURES = 4
"""Number of predicted figures: tokens per second, 90th percentile and median of the time between
tokens, and concurrent sequences."""

# Centre and standard deviation of the logarithm.
_PRIORS: dict[str, tuple[float, float]] = {
    "weights": (0.75, 0.2),  # of the memory's speed
    "experts": (0.6, 0.3),  # of the memory's speed, for experts
    "fill": (0.3, 0.3),  # exponent: how the share reached falls with a device's speed
    "width": (0.2, 0.5),  # exponent: how the share of the peak grows with the hidden size
    "routing": (0.5, 0.4),  # independent draws of experts per token
    "experts_8bit": (1.4, 0.4),  # factor on the time per byte
    "padded_8bit": (0.05, 2.0),  # weight of experts not drawn against those drawn
    "imbalance": (0.1, 0.7),  # of the experts, per doubling of devices
    "cache": (4e3, 0.3),  # bytes per token and layer
    "cache_experts": (0.5, 0.4),  # the same for a mixture of experts, relative
    "capacity": (1.0, 0.3),  # largest cache of a request, relative
    "arithmetic": (0.55, 0.5),  # of the peak, decoding
    "prefill": (0.5, 0.5),  # of the peak
    "sequence": (2e-5, 0.7),  # s
    "host": (2e-3, 0.7),  # s
    "layer": (4e-5, 0.5),  # s: ten kernels of 4e-6
    "layer_experts": (3e-5, 0.7),  # s more: eight kernels to route
    "tensor": (2e-5, 0.5),  # s per layer and doubling
    "layer_8bit": (5e-6, 1.5),  # s
    "link": (2.5e-12, 0.5),  # s per byte, over the reference link
    "eager": (5e-4, 0.4),  # s per layer
    "tail": (1.0, 0.4),  # of the time of mixed steps, relative to an exponential one
    "sharpness": (4.0, 0.5),  # of the onset of mixed steps in a quantile
}
_WORKLOAD_SPREADS = (0.5, 0.7, 0.7, 0.5)
"""Prior spreads: prompt tokens, fixed part of a mixed step, part per prompt, mixed-step rate."""
_SITE_CENTRES = (5e-4, 8.0, 0.06)
_SITE_SPREADS = (1.5, 0.7, 0.7)
"""Priors of host stalls: seconds per step, onset in sequences, spread of the steps."""
_STALLS = 0.7
"""Standard deviation of the logarithm of a stall between sessions of one site."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Sizes of a decoder."""

    family: str
    """Base model; variants of one family have correlated errors."""
    num_parameters: float
    num_activated: float
    """Parameters used per token; fewer than `num_parameters` in a mixture of experts."""
    bytes_per_weight: float = 2.0
    num_layers: int | None = None
    cache_bytes: float | None = None
    """Keys and values of one token in one layer; None: as usual."""

    def __post_init__(self) -> None:
        for what, size in (
            ("number of parameters", self.num_parameters),
            ("number of activated parameters", self.num_activated),
            ("bytes of a weight", self.bytes_per_weight),
        ):
            if not is_positive(size):
                raise ValueError(
                    f"a served model has {size:g} as its {what}: it must be positive and finite. "
                    "Correct the number."
                )
        if self.cache_bytes is not None and not is_positive(self.cache_bytes):
            raise ValueError(
                f"a served model has {self.cache_bytes:g} bytes of cache per token and layer: it "
                "must be positive and finite. Correct the number."
            )
        if self.num_activated > self.num_parameters:
            raise ValueError(
                f"a served model has {self.num_activated:g} activated of {self.num_parameters:g} "
                "parameters: no more parameters activated than there are. Correct the number."
            )
        if self.num_layers is not None and not is_count(self.num_layers):
            raise ValueError(
                f"a served model has {self.num_layers:g} layers: it must be a whole number of at "
                "least 1. Correct the number."
            )

    @property
    def layers(self) -> float:
        return self.num_layers or 17.0 * (self.num_parameters / 1e9) ** (1 / 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests to the model; rough figures, corrected by measurements of the same name."""

    name: str
    prompt_tokens: float
    media_s: float = 0.0
    """Time to encode the images or the video of one prompt, in s."""

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_tokens < math.inf:
            raise ValueError(
                f"a prompt of workload {self.name} has {self.prompt_tokens:g} tokens: it must be "
                "at least 1 and finite. Correct the number."
            )
        if not 0 <= self.media_s < math.inf:
            raise ValueError(
                f"the pictures of a prompt of workload {self.name} take {self.media_s:g} s: it "
                "must be at least 0 and finite. Correct the number."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingRun:
    """One copy of a model under `concurrency` simultaneous requests."""

    model: Decoder
    device: Device
    num_devices: int
    concurrency: int
    workload: Workload
    output_tokens: float
    """Mean length of an answer."""

    def __post_init__(self) -> None:
        check_counts(
            "a serving run was requested",
            num_devices=self.num_devices,
            concurrency=self.concurrency,
        )
        if not 1 <= self.output_tokens < math.inf:
            raise ValueError(
                f"a serving run was requested with output_tokens={self.output_tokens:g}: it must "
                "be at least 1 and finite. Correct the number."
            )


def weight_bytes(model: Decoder) -> float:
    return model.num_parameters * model.bytes_per_weight


def weights_fit(run: DecodingRun) -> bool:
    """Whether the weights leave memory for a cache."""
    return weight_bytes(run.model) < USABLE * run.num_devices * run.device.memory_bytes


def weights_and_room(run: DecodingRun) -> str:
    """Message part with the bytes of the weights, the usable memory and the rule."""
    held, total = weight_bytes(run.model), run.num_devices * run.device.memory_bytes
    return (
        f"{in_digits(held / 1e9)} GB of weights on {in_accelerators(run.num_devices)} "
        f"({run.device.name}): {in_digits(total / 1e9)} GB, of which engines use {USABLE:.0%}, "
        f"{in_digits(USABLE * total / 1e9)} GB. Weights must leave room for a cache."
    )


def in_accelerators(count: int) -> str:
    """Format a count: "1 accelerator", "2 accelerators"."""
    return f"{count:,} accelerator{'s' * (count != 1)}"


class Groups:
    """Order of the parameter vector, logarithms relative to the priors: first the common ones, then
    a block for each workload and each site (workload, device, one or several)."""

    def __init__(self, runs: Sequence[DecodingRun]) -> None:
        self.workloads = sorted({run.workload.name for run in runs})
        self.sites = sorted({site(run) for run in runs})

    def spreads(self) -> _Array:
        """Standard deviations of the priors, (parameters,)."""
        return np.array(
            [spread for _, spread in _PRIORS.values()]
            + list(_WORKLOAD_SPREADS) * len(self.workloads)
            + list(_SITE_SPREADS) * len(self.sites)
        )

    def loose(self) -> _Array:
        """Standard deviations of the parameters between sessions, (parameters,)."""
        found = np.zeros(len(self.spreads()))
        found[len(found) - len(_SITE_SPREADS) * len(self.sites) :: len(_SITE_SPREADS)] = _STALLS
        return found


def site(run: DecodingRun) -> tuple[str, str, bool]:
    """Key of runs with the same host behaviour: workload, device, one device or several."""
    return run.workload.name, run.device.name, run.num_devices == 1


class Rows:
    """Many runs as arrays of shape (runs,), for a vectorized evaluation."""

    def __init__(self, runs: Sequence[DecodingRun], groups: Groups) -> None:
        def column(values: Sequence[float]) -> _Array:
            return np.array(values, dtype=float)

        models = [run.model for run in runs]
        self.n = column([run.num_devices for run in runs])
        self.doublings = np.log2(self.n)
        self.sequences = column([run.concurrency for run in runs])
        self.output = column([run.output_tokens for run in runs])
        self.parameters = column([model.num_parameters for model in models])
        self.activated = column([model.num_activated for model in models])
        self.weight = column([model.bytes_per_weight for model in models])
        self.layers = column([model.layers for model in models])
        self.cache = column([model.cache_bytes or math.nan for model in models])
        """Bytes of the cache per token and layer; NaN where they are not given."""
        self.prompt = column([run.workload.prompt_tokens for run in runs])
        self.media_s = column([run.workload.media_s for run in runs])
        speeds = column([run.device.memory_bytes_per_s for run in runs])
        self.faster = speeds / _REFERENCE_SPEED
        self.speed = self.n * speeds
        links = column([lookup(run.device.local_link).bandwidth_bytes_per_s for run in runs])
        self.slower_link = _REFERENCE_LINK.bandwidth_bytes_per_s / links
        self.peak = self.n * column([run.device.flops_per_s for run in runs])
        self.memory = self.n * column([run.device.memory_bytes for run in runs])
        self.peak *= 2.0 / np.maximum(self.weight, 1.0)
        self.left = USABLE * self.memory - self.parameters * self.weight
        """Bytes beside the weights."""
        self.hidden = np.sqrt(self.activated / (12.0 * self.layers))
        workloads = {name: index for index, name in enumerate(groups.workloads)}
        sites = {key: index for index, key in enumerate(groups.sites)}
        # An index beyond the last means a group that was not measured: its prior.
        self.workload = [workloads.get(run.workload.name, len(workloads)) for run in runs]
        self.site = [sites.get(site(run), len(sites)) for run in runs]
        self.num_workloads, self.num_sites = len(workloads), len(sites)


def request_bytes(x: _Array, rows: Rows) -> _Array:
    """Largest cache of one request in bytes, (vectors, runs)."""
    p = _common(x)
    prompt = rows.prompt * _block(x, len(_PRIORS), rows.num_workloads, 4, rows.workload)[0]
    return p["capacity"] * _token_bytes(p, rows) * (prompt + rows.output / 2.0)


def logs(x: _Array, rows: Rows) -> _Array:
    """Logarithms of the `FIGURES`: (vectors, figures, runs) for `x` of (vectors, parameters)."""
    p = _common(x)
    prompt, media, request, mixing = _block(x, len(_PRIORS), rows.num_workloads, 4, rows.workload)
    at = len(_PRIORS) + 4 * rows.num_workloads
    stall, onset, spread = _block(x, at, rows.num_sites, 3, rows.site)
    prompt = rows.prompt * prompt
    one, several = rows.weight <= 1.0, rows.activated < rows.parameters

    cache = _token_bytes(p, rows)
    context = prompt + rows.output / 2.0
    room = np.maximum(rows.left, 1e-3 * rows.memory) / request_bytes(x, rows)
    running = (rows.sequences**-6.0 + room**-6.0) ** (-1.0 / 6.0)

    share = rows.activated / rows.parameters
    drawn = -np.expm1(p["routing"] * running * np.log1p(-np.where(several, share, 0.0)))
    eight = one & (rows.weight > 0.75)
    drawn = np.where(eight, (p["padded_8bit"] + drawn) / (p["padded_8bit"] + 1.0), drawn)
    touched = np.where(several, share + (1.0 - share) * drawn, 1.0) * rows.parameters * rows.weight
    slower = np.where(one, p["experts_8bit"], 1.0) * (1.0 + p["imbalance"] * rows.doublings)
    filled = rows.faster ** -p["fill"]
    reached = np.where(several, p["experts"] / slower, p["weights"]) * filled
    peak = rows.peak * filled * (rows.hidden / _REFERENCE_WIDTH) ** p["width"]
    message = 2.0 * running * rows.hidden
    layer = (
        p["layer"]
        + np.where(one, p["layer_8bit"], 0.0)
        + np.where(several, p["layer_experts"], 0.0)
        + p["tensor"] * rows.doublings
        + np.where(rows.n > 1, 2.0 * message * p["link"] * rows.slower_link, 0.0)
    )
    device = (
        p["host"]
        + rows.layers * layer
        + _SITE_CENTRES[0] * stall / (1.0 + (_SITE_CENTRES[1] * onset / rows.sequences) ** 3)
        + touched / (rows.speed * reached)
        + running * context * cache / (rows.speed * _CACHE_ATTENTION)
        + 2.0 * rows.activated * running / (peak * p["arithmetic"])
    )
    floor = rows.layers * p["eager"]
    beyond = 1.0 / (1.0 + (_GRAPH_LIMIT / running) ** 8)
    bookkeeping = p["sequence"] * running
    step = np.cbrt(device**3 + (beyond * floor) ** 3) + bookkeeping
    whole = np.cbrt(device**3 + floor**3) + bookkeeping
    mixed = whole - step + (2e-3 + rows.media_s) * media
    each = 2.0 * rows.activated * prompt / (peak * p["prefill"])
    each = each + (1e-3 + rows.media_s / 5.0) * request
    arrivals = running / rows.output
    often = mixing * arrivals
    mean = step - np.expm1(-often) * mixed + arrivals * each

    def quantile(rate: float) -> _Array:
        """Time above a plain step, about 0 where mixed steps are rarer than `rate`."""
        beyond = np.logaddexp(0.0, p["sharpness"] * np.log(often / rate)) / p["sharpness"]
        return (mixed + each) * p["tail"] * beyond + each * often

    slow = step * (1.0 + _SITE_CENTRES[2] * spread) + quantile(_TENTH)
    usual = step + quantile(_HALF)
    return np.stack([np.log(running / mean), np.log(slow), np.log(usual), np.log(running)], axis=1)


def _common(x: _Array) -> dict[str, _Array]:
    """Common parameters by name, each (vectors, 1)."""
    return {
        name: centre * np.exp(x[:, [index]])
        for index, (name, (centre, _)) in enumerate(_PRIORS.items())
    }


def _token_bytes(p: Mapping[str, _Array], rows: Rows) -> _Array:
    """Bytes of the cache per token."""
    experts = np.where(rows.activated < rows.parameters, p["cache_experts"], 1.0)
    usual = p["cache"] * experts
    return np.where(np.isnan(rows.cache), usual, rows.cache) * rows.layers


def _block(x: _Array, at: int, groups: int, width: int, index: Sequence[int]) -> list[_Array]:
    """Factors on the priors of each run's group, one array (vectors, runs) per parameter."""
    part = x[:, at : at + groups * width].reshape(len(x), groups, width)
    part = np.concatenate([part, np.zeros((len(x), 1, width))], axis=1)
    return [np.exp(part[:, list(index), k]) for k in range(width)]
