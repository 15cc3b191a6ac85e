"""The parameters of a synthetic world, and worlds of several sizes."""

import dataclasses
import math
from typing import Any

from genrec_jax.errors import UserError

#: Seconds without a request that begin a new session ("long" gap); shorter gaps are below SHORT_GAP seconds.
SESSION_GAP = 1800
SHORT_GAP = 600
#: A user has at most this many times the mean number of requests.
LONGEST = 8


@dataclasses.dataclass(frozen=True)
class World:
    """Everything that decides a world; equal worlds are equal to the last bit. Raises UserError naming a bad field.

    Size: users; requests (mean per user, about geometric); candidates (K events per request, each with its labels);
    items (ever born); days.
    Hidden state: domains G, in each of which a user has a type of Z ``types`` and an interest of S ``states`` (powers
    of two); the more domains, the longer a history it takes to know a user. persistence and long_persistence, the
    probability that an interest outlives a short and a long gap; long_gap, the probability that a gap is long.
    Items: clusters; qualities (levels); concentration of the popularity's Dirichlet process (about the number of items
    that share most of the traffic); periods, and turnover, the share of the popularity's atoms that die from one period
    to the next; novelty, the share of their successors that are new items (the others bring a known item back);
    category_noise, the share of items with a random category.
    Labels: tasks and their base logits; affinity, interest, cross, quality and noise, each effect's standard
    deviation in logits.
    Context: regions, region_signal.
    """

    users: int = 4096
    requests: int = 64
    candidates: int = 4
    items: int = 4000
    days: int = 90
    domains: int = 4
    types: int = 16
    states: int = 4
    persistence: float = 0.97
    long_persistence: float = 0.2
    long_gap: float = 0.1
    clusters: int = 16
    qualities: int = 8
    concentration: float = 1000.0
    periods: int = 30
    turnover: float = 0.03
    novelty: float = 0.05
    category_noise: float = 0.2
    tasks: tuple[str, ...] = ("click", "like", "share")
    base: tuple[float, ...] = (-0.3, -0.9, -1.5)
    affinity: float = 0.8
    interest: float = 1.2
    cross: float = 1.0
    quality: float = 0.8
    noise: float = 0.5
    regions: int = 8
    region_signal: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("persistence", "long_persistence", "long_gap", "novelty", "category_noise", "region_signal"):
            _require(0 <= getattr(self, name) <= 1, name, "a probability", self)
        _require(0 <= self.turnover < 1, "turnover", "in [0, 1)", self)
        self._check_sizes()
        _require(0 < self.concentration < 1e6, "concentration", "in (0, 1e6)", self)
        for name in ("affinity", "interest", "cross", "quality", "noise"):
            _require(0 <= getattr(self, name) <= 4, name, "in [0, 4] logits", self)
        _require(1 <= len(self.tasks) <= 6 and len(set(self.tasks)) == len(self.tasks), "tasks", "1 to 6 names", self)
        one_each = len(self.base) == len(self.tasks) and all(math.isfinite(b) and abs(b) <= 8 for b in self.base)
        _require(one_each, "base", "one logit in [-8, 8] per task", self)
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2^63)", self)

    def _check_sizes(self) -> None:
        for name in (
            "users",
            "requests",
            "candidates",
            "items",
            "days",
            "domains",
            "clusters",
            "qualities",
            "periods",
            "regions",
        ):
            _require(getattr(self, name) >= 1, name, "at least 1", self)
        _require(self.domains <= self.clusters, "domains", "at most the number of clusters", self)
        for name in ("types", "states"):
            value = getattr(self, name)
            _require(value >= 2 and value & (value - 1) == 0, name, "a power of two, at least 2", self)
        _require(self.types * self.states <= 4096, "types", "at most 4096 / states", self)
        _require(self.clusters * self.qualities <= 2**16, "clusters", "at most 65536 / qualities", self)
        _require(self.periods <= 2048, "periods", "at most 2048", self)
        _require(self.items < 2**31 - 1, "items", "below 2^31 - 1", self)
        _require(self.days <= 3650, "days", "at most 3650 (times are 32-bit seconds)", self)
        enough = self.turnover * self.novelty == 0 or self.periods == 1 or self.new_items >= 1
        _require(enough, "items", "enough for one new item", self)
        fits = LONGEST * self.requests * SESSION_GAP < self.days * 86400
        need = math.ceil((LONGEST * self.requests * SESSION_GAP + 1) / 86400)
        _require(fits, "days", f"at least {need} for {self.requests} requests per user", self)

    @property
    def new_items(self) -> int:
        """Items born after the first period, spread evenly over the later ones."""
        relative = self.turnover * self.novelty * (self.periods - 1)
        return int(self.items * relative / (1 + relative))

    @property
    def first_items(self) -> int:
        """Items alive in the first period, and atoms of the popularity in it."""
        return self.items - self.new_items

    @property
    def new_atoms(self) -> int:
        """Atoms born in each period after the first: as many as are expected to die, so that numbers stay level."""
        return math.ceil(self.turnover * self.first_items)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "World":
        """The inverse of :meth:`to_json`. Raises UserError for an unknown parameter."""
        return _changed(cls(), record)


def _require(holds: bool, name: str, rule: str, world: World) -> None:
    if not holds:
        raise UserError(f"synthetic world: {name} must be {rule}, not {getattr(world, name)!r}")


PRESETS: dict[str, World] = {
    # About 50 thousand, 500 thousand, 1 million, 100 million and 1 billion events.
    "tiny": World(users=512, requests=24, items=500, concentration=125.0),
    "quick": World(users=2048, requests=32, items=1000, concentration=250.0, candidates=8),
    "small": World(),
    "medium": World(users=2**18, requests=96, items=100_000, concentration=25_000.0, domains=8),
    "large": World(users=2**21, requests=128, items=1_000_000, concentration=250_000.0, days=365, domains=8),
}


def preset(name: str, **changes: Any) -> World:
    """A world of :data:`PRESETS` with parameters replaced. Raises UserError for an unknown name or parameter."""
    if name not in PRESETS:
        raise UserError(f"unknown synthetic world {name!r}; there is: {', '.join(PRESETS)}")
    return _changed(PRESETS[name], changes)


def _changed(world: World, changes: dict[str, Any]) -> World:
    known = {field.name for field in dataclasses.fields(World)}
    for name in changes:
        if name not in known:
            raise UserError(f"unknown parameter {name!r} of a synthetic world; there is: {', '.join(sorted(known))}")
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return dataclasses.replace(world, **changes)
