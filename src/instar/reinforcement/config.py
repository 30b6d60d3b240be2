"""What the update of PPO is told."""

from dataclasses import dataclass, field

from instar.errors import UserError


@dataclass(frozen=True)
class AdaptiveKlConfig:
    """A coefficient that holds the KL near `target` (Ziegler et al. 2019, section 2.2).

    `target` is in nats, summed over a response; `horizon` is in responses, and more than a fifth
    of an iteration's. The coefficient stands still while the critic alone learns.
    """

    target: float = 6.0
    horizon: float = 10_000.0

    def check(self) -> None:
        if not (self.target > 0 and self.horizon > 0):
            raise UserError("adaptive_kl.target and adaptive_kl.horizon must be positive")


@dataclass(frozen=True)
class BetaDecayConfig:
    """A coefficient that falls linearly to `final`, which iteration number `iterations` has."""

    final: float
    iterations: int

    def check(self) -> None:
        if self.final < 0 or self.iterations < 2:
            raise UserError(
                f"beta_decay.final ({self.final}) must not be negative, and beta_decay.iterations "
                f"({self.iterations}) at least 2"
            )


@dataclass(frozen=True)
class ScoreConfig:
    """What becomes of scores before they are rewards, in this order.

    Attributes:
      limit: scores are clipped to +- this (None: not).
      eos_penalty: subtracted where a response has no end token (TRL).
      eos_replacement: the score of such a response, instead of a penalty (Ziegler et al. 2019).
    """

    limit: float | None = None
    eos_penalty: float = 0.0
    eos_replacement: float | None = None

    def check(self) -> None:
        if self.limit is not None and not self.limit > 0:
            raise UserError(f"scores.limit must be positive or None, not {self.limit}")
        if self.eos_penalty < 0:
            raise UserError(f"scores.eos_penalty must not be negative ({self.eos_penalty})")
        if self.eos_penalty and self.eos_replacement is not None:
            raise UserError("scores.eos_penalty and scores.eos_replacement exclude each other")


@dataclass(frozen=True)
class UpdateConfig:
    """How an iteration's responses change policy and critic.

    Attributes:
      beta: the KL coefficient; with `adaptive_kl` or `beta_decay` the first one.
      gamma, lam: discount and decay of generalised advantage estimation.
      clip, value_clip: of the policy's ratio and of the critic's move (None: free).
      dual_clip: bounds the loss of a negative advantage (None: not).
      log_ratio_limit: bounds log ratios (None: not).
      importance_cap: weights tokens by pi_trainer / pi_sampler up to this (None: not), where the
        two differ in their numerics.
      value_coefficient: of the critic's loss.
      whiten_rewards, whiten_advantages: to unit variance; advantages to mean 0 too.
      epochs, minibatch: passes over the responses, and responses of an update.
      target_kl: the updates of an iteration end with one before which the policy is farther than
        this from the one that sampled, in nats a token (None: never).
      critic_warmup: so many first iterations change the critic alone.
      ptx_coefficient: of the pretraining loss that each update adds (0 where there is none).
    """

    beta: float = 0.05
    adaptive_kl: AdaptiveKlConfig | None = None
    beta_decay: BetaDecayConfig | None = None
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float | None = 0.2
    dual_clip: float | None = None
    log_ratio_limit: float | None = None
    importance_cap: float | None = None
    value_coefficient: float = 0.1
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    epochs: int = 4
    minibatch: int = 64
    target_kl: float | None = None
    critic_warmup: int = 0
    ptx_coefficient: float = 27.8

    def check(self) -> None:
        for name in ("beta", "value_coefficient", "critic_warmup", "ptx_coefficient"):
            if getattr(self, name) < 0:
                raise UserError(f"update.{name} must not be negative ({getattr(self, name)})")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"update.{name} must be in [0, 1], not {getattr(self, name)}")
        for name in ("clip", "value_clip", "log_ratio_limit", "importance_cap", "target_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"update.{name} must be positive, not {value}")
        if self.adaptive_kl is not None and self.beta_decay is not None:
            raise UserError("update.adaptive_kl and update.beta_decay exclude each other")
        if self.adaptive_kl is not None and self.beta == 0:
            raise UserError(
                "update.adaptive_kl multiplies update.beta, and 0 would stay 0: set update.beta to "
                "a positive one, or leave update.adaptive_kl out"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"update.dual_clip must be above 1, not {self.dual_clip}")
        if self.epochs < 1 or self.minibatch < 1:
            raise UserError("update.epochs and update.minibatch must each be at least 1")
