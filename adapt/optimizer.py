"""MuonGrokfast: a gradient filter before two optimizers, and the settings of the seed's phase 7.

    filter    mu <- alpha mu + (1 - alpha) g;   g~ = g + lambda mu / (1 - alpha^t)       Grokfast, arXiv 2405.20233
    muon      parameters with 2 or more dimensions, when enabled: torch.optim.Muon       https://kellerjordan.github.io/posts/muon/
    fallback  all others: AdamW, arXiv 1711.05101, or Lion, arXiv 2302.06675

Singular-value scales are vectors, so they always take the fallback. They are trained as delta = z - 1: weight decay
pulls delta to 0 and z to 1, the base model, not the weights to 0. With lambda = 0.05 the filter turns an AdamW step by
less than 5 %: AdamW forgets the scale of a gradient, so only the direction can change. Unlike in the paper's code, mu
starts at 0 with bias correction (there: at the first gradient, in full), and it lives in the optimizer's state dict.

If a gradient has NaN or Inf, the whole step is skipped and counted, and the state does not change.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor

from ..errors import HavocError, MeasurementError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Route = Literal["muon", "adamw", "lion"]

_MATRIX_NDIM: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuGrokConfig:
    """Settings of `MuonGrokfast`; the defaults are those of the seed's phase 7, `MuGrokConfig.from_phase(7)`.

    `enable_muon`: send parameters with 2 or more dimensions to Muon (never z: it is a vector). `muon_*`: as in
    `torch.optim.Muon`. `fallback_*`: AdamW ("adamw") or Lion ("lion") for all others. `grokfast_alpha`: decay of the
    mean, `grokfast_lambda`: how much of it is added. `use_qk_clip`: must stay False. QK-Clip (arXiv 2507.20534) scales
    each head of W_q and W_k by its own factor; z scales singular directions, which span all heads, so no z can express
    it. `kl_coefficient`: weight of KL(policy || base) in the loss, for the trainer. `max_consecutive_skips`: this many
    non-finite gradients in a row end the run. `keep_last_good`: keep a copy of the last state with a finite gradient.
    """

    enable_muon: bool = False
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.0
    muon_nesterov: bool = True
    muon_num_iterations: int = 5

    fallback_type: Literal["adamw", "lion"] = "adamw"
    fallback_lr: float = 2e-3
    fallback_betas: tuple[float, float] = (0.9, 0.999)
    fallback_eps: float = 1e-8
    fallback_weight_decay: float = 0.01

    enable_grokfast: bool = True
    grokfast_alpha: float = 0.98
    grokfast_lambda: float = 0.05

    use_qk_clip: bool = False
    kl_coefficient: float = 0.2
    phase_name: str = "phase7_transformer2"

    max_consecutive_skips: int = 10
    keep_last_good: bool = True

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything, by name and value."""
        for name in (
            "muon_lr",
            "muon_weight_decay",
            "fallback_lr",
            "fallback_weight_decay",
            "grokfast_lambda",
            "kl_coefficient",
        ):
            _require(
                math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, name, getattr(self, name), "0 or more"
            )
        for name in ("muon_momentum", "grokfast_alpha"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(
            [0 <= beta < 1 for beta in self.fallback_betas] == [True, True],
            "fallback_betas",
            self.fallback_betas,
            "two numbers in [0, 1)",
        )
        _require(self.fallback_type in {"adamw", "lion"}, "fallback_type", self.fallback_type, "adamw or lion")
        _require(self.fallback_eps > 0, "fallback_eps", self.fallback_eps, "above 0")
        _require(self.muon_num_iterations >= 1, "muon_num_iterations", self.muon_num_iterations, "1 or more")
        _require(self.max_consecutive_skips >= 1, "max_consecutive_skips", self.max_consecutive_skips, "1 or more")
        if self.use_qk_clip:
            raise HavocError("use_qk_clip: QK-Clip acts per attention head and z spans all heads; set it to false")

    @classmethod
    def from_phase(cls, phase: int) -> MuGrokConfig:
        """Return the settings of a phase; HAVOC is phase 7, any other number is a `HavocError`."""
        if phase != 7:  # noqa: PLR2004
            raise HavocError(f"phase {phase} is not known here: HAVOC is phase 7, MuGrokConfig.from_phase(7)")
        return cls()


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise HavocError(f"{name} is {value!r}, expected {expected}")


class MuonGrokfast(torch.optim.Optimizer):
    """The filter, the routing and the two update rules with the usual optimizer interface.

    Each parameter group is split by route, so learning-rate schedulers see one rate per route; a group may set
    `enable_muon` (False for embeddings), `lr` and `weight_decay` for itself. `num_steps` and `num_skipped` count.
    """

    def __init__(self, params: Iterable[Any], config: MuGrokConfig) -> None:
        """Optimise `params` (tensors or group dicts) as `config` says."""
        self.config = config
        self.num_steps = 0
        self.num_skipped = 0
        self.num_consecutive_skips = 0
        self._last_good: dict[str, Any] | None = None
        super().__init__(params, defaults={"route": None, "lr": None, "weight_decay": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split into the parameters that Muon takes and the others."""
        group = dict(param_group)
        use_muon = group.pop("enable_muon", self.config.enable_muon)
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        matrices = [param for param in params if use_muon and param.ndim >= _MATRIX_NDIM]
        others = [param for param in params if not (use_muon and param.ndim >= _MATRIX_NDIM)]
        config = self.config
        if matrices:
            own = {"route": "muon", "lr": config.muon_lr, "weight_decay": config.muon_weight_decay}
            super().add_param_group({**own, **group, "params": matrices})
        if others or not params:
            own = {
                "route": config.fallback_type,
                "lr": config.fallback_lr,
                "weight_decay": config.fallback_weight_decay,
            }
            super().add_param_group({**own, **group, "params": others})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Filter and apply the gradients; skip the step if one has NaN or Inf.

        Raises `MeasurementError` after `max_consecutive_skips` skips in a row; `restore_last_good()` then restores the
        last parameters and state that had a finite gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._has_finite_gradients():
            self._count_skip()
            return loss
        self.num_consecutive_skips = 0
        if self.config.keep_last_good:
            self._last_good = self._copy()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, self._filtered(param), group)
        self.num_steps += 1
        return loss

    def _has_finite_gradients(self) -> bool:
        gradients = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        return all(bool(gradient.isfinite().all()) for gradient in gradients)

    def _count_skip(self) -> None:
        self.num_skipped += 1
        self.num_consecutive_skips += 1
        if self.num_consecutive_skips >= self.config.max_consecutive_skips:
            raise MeasurementError(
                f"{self.num_consecutive_skips} gradients in a row held NaN or Inf after {self.num_steps} good steps; "
                "lower the learning rate and continue from the last good state"
            )

    def _filtered(self, param: Tensor) -> Tensor:
        """Return g~; the gradient itself is not changed."""
        state, gradient = self.state[param], param.grad
        assert gradient is not None  # noqa: S101
        state["step"] = state.get("step", 0) + 1
        if not self.config.enable_grokfast:
            return gradient
        mean = _slot(state, "grokfast_mean", param)
        alpha = self.config.grokfast_alpha
        mean.lerp_(gradient, 1 - alpha)
        return gradient.add(mean, alpha=self.config.grokfast_lambda / (1 - alpha ** state["step"]))

    def _update(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        route: Route = group["route"]
        lr, weight_decay = group["lr"], group["weight_decay"]
        if route == "muon":
            _muon(param, gradient, self.state[param], lr=lr, weight_decay=weight_decay, config=self.config)
            return
        param.mul_(1 - lr * weight_decay)
        step = _adam if route == "adamw" else _lion
        step(param, gradient, self.state[param], lr=lr, config=self.config)

    def _copy(self) -> dict[str, Any]:
        params = [param.detach().clone() for group in self.param_groups for param in group["params"]]
        state = {
            param: {key: value.clone() if isinstance(value, Tensor) else value for key, value in own.items()}
            for param, own in self.state.items()
        }
        return {"params": params, "state": state, "num_steps": self.num_steps}

    @torch.no_grad()
    def restore_last_good(self) -> bool:
        """Put back the parameters and state before the last finite gradient was applied; False if there was none."""
        if self._last_good is None:
            return False
        params = (param for group in self.param_groups for param in group["params"])
        for param, good in zip(params, self._last_good["params"], strict=True):
            param.copy_(good)
        self.state.clear()
        self.state.update(self._last_good["state"])
        self.num_steps = self._last_good["num_steps"]
        self.num_consecutive_skips = 0
        self._last_good = None
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a later run needs to continue bit for bit: state, groups, counters, settings."""
        counters = {name: getattr(self, name) for name in ("num_steps", "num_skipped", "num_consecutive_skips")}
        return {**super().state_dict(), "counters": counters, "config": dataclasses.asdict(self.config)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict; one that was made with other settings is a `HavocError` that names them."""
        theirs, ours = state_dict["config"], dataclasses.asdict(self.config)
        changed = [name for name in ours if list(_flat(theirs.get(name))) != list(_flat(ours[name]))]
        if changed:
            raise HavocError(f"the saved optimizer used other settings: {', '.join(changed)}; use those or start again")
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        for name, value in state_dict["counters"].items():
            setattr(self, name, value)
        self._last_good = None


def _flat(value: object) -> Iterable[object]:
    return value if isinstance(value, list | tuple) else [value]


def _slot(state: dict[str, Any], name: str, param: Tensor) -> Tensor:
    """Return the running value `name` of a parameter, zeros at first."""
    if name not in state:
        state[name] = torch.zeros_like(param)
    slot: Tensor = state[name]
    return slot


def _adam(param: Tensor, gradient: Tensor, state: dict[str, Any], *, lr: float, config: MuGrokConfig) -> None:
    """Adam with bias correction; the decay was applied before (AdamW)."""
    beta1, beta2 = config.fallback_betas
    mean = _slot(state, "exp_avg", param).lerp_(gradient, 1 - beta1)
    square = _slot(state, "exp_avg_sq", param).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (square.sqrt() / (1 - beta2 ** state["step"]) ** 0.5).add_(config.fallback_eps)
    param.addcdiv_(mean, root, value=-lr / (1 - beta1 ** state["step"]))


def _lion(param: Tensor, gradient: Tensor, state: dict[str, Any], *, lr: float, config: MuGrokConfig) -> None:
    """Lion: the sign of one mean is the step, another mean is kept."""
    beta1, beta2 = config.fallback_betas
    mean = _slot(state, "exp_avg", param)
    param.add_(mean.lerp(gradient, 1 - beta1).sign_(), alpha=-lr)
    mean.lerp_(gradient, 1 - beta2)


def _muon(
    param: Tensor, gradient: Tensor, state: dict[str, Any], *, lr: float, weight_decay: float, config: MuGrokConfig
) -> None:
    """One step of `torch.optim.Muon`, which keeps its momentum in `state`; it takes matrices only, [first, all others].

    It is used only for this step, because groups and state dict belong to `MuonGrokfast`.
    """
    matrix = param.detach().flatten(1)
    matrix.grad = gradient.flatten(1)
    muon = torch.optim.Muon(
        [matrix],
        lr=lr,
        weight_decay=weight_decay,
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        ns_steps=config.muon_num_iterations,
    )
    muon.state[matrix] = state
    muon.step()
