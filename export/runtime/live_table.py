"""The part of a manifest that says where a live artifact stores its experts' weights; every value is checked.

A live artifact holds one mixture, as any other artifact, and in addition the trained matrices of the base and of every
expert alone. All are stored as the graph reads them, so an expert is used without a copy, and a mixture is one weighted
sum. No torch and no numpy, because every reader of a manifest imports this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Mapping

EXPERTS_FILE = "experts.data"
WEIGHTS_FILE = "model.onnx.data"
BASE, STORED = "base", "stored"
"""The folds of every matrix besides those of the experts: the base's, and that of the artifact's own mixture."""

ITEM_BYTES = 4
_RULES = ("delta", "literal", "renorm")
_MAX_SIZE, _MAX_MATRICES = 1 << 40, 1 << 16


@dataclass(frozen=True, kw_only=True)
class FoldPlace:
    """Where one matrix is stored: a file of the artifact and the offset in it."""

    file: str
    offset_bytes: int


@dataclass(frozen=True, kw_only=True)
class LiveMatrix:
    """One trained matrix: the graph's initializer, its shape, and the place of each of its folds.

    `places` has the keys `base`, `stored` and every expert as `expert/DOMAIN`. `norm_shares` is, by domain, the sum of
    the expert's singular values over the base's; only the rule renorm needs it.
    """

    name: str
    shape: tuple[int, ...]
    places: Mapping[str, FoldPlace]
    norm_shares: Mapping[str, float]

    @property
    def num_bytes(self) -> int:
        """Bytes of one fold, fp32."""
        return ITEM_BYTES * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class LiveTable:
    """Every trained matrix in file order, and what the switched model answered when the artifact was written.

    `fingerprints` holds the fingerprint of each expert alone, by domain; see `probe.fingerprint`.
    """

    matrices: tuple[LiveMatrix, ...]
    fingerprints: Mapping[str, dict[str, Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """The decoder's initializers that are replaced."""
        return tuple(matrix.name for matrix in self.matrices)

    @property
    def num_bytes(self) -> int:
        """Bytes of one fold of all trained matrices: the memory that a mixture needs."""
        return sum(matrix.num_bytes for matrix in self.matrices)

    def to_json(self) -> dict[str, Any]:
        """The document that `parse_live` reads back."""
        return {
            "matrices": [
                {
                    "name": matrix.name,
                    "shape": list(matrix.shape),
                    "places": {key: [place.file, place.offset_bytes] for key, place in matrix.places.items()},
                    **({"norm_shares": dict(matrix.norm_shares)} if matrix.norm_shares else {}),
                }
                for matrix in self.matrices
            ],
            "fingerprints": dict(self.fingerprints),
        }


def expert_key(domain: str) -> str:
    """The key of an expert's place."""
    return f"expert/{domain}"


def parse_live(
    document: Any,  # noqa: ANN401 - JSON
    domains: list[str],
    rule: str,
    file_bytes: Mapping[str, int],
) -> LiveTable:
    """Read the table of a manifest; one that does not fit its mixture or exceeds a file is a `ValueError`.

    `file_bytes` is the size of every listed file. A field of a wrong type raises Python's own error.
    """
    if rule not in _RULES:
        raise ValueError(f"live: a rule {rule!r:.80}")
    matrices = tuple(_matrix(entry, domains, rule, file_bytes) for entry in document["matrices"][:_MAX_MATRICES])
    if not domains or not matrices or len(matrices) != len(document["matrices"]):
        raise ValueError(f"live: {len(domains)} experts and {len(document['matrices'])} matrices")
    if len({matrix.name for matrix in matrices}) != len(matrices):
        raise ValueError("live: a matrix is listed twice")
    if not file_bytes.get(EXPERTS_FILE):
        raise ValueError(f"live: {EXPERTS_FILE} is missing")
    fingerprints = document["fingerprints"]
    if set(fingerprints) != set(domains) or not all(isinstance(found, dict) for found in fingerprints.values()):
        raise ValueError("live: expected one fingerprint for each expert")
    return LiveTable(matrices=matrices, fingerprints=fingerprints)


def _matrix(entry: dict[str, Any], domains: list[str], rule: str, file_bytes: Mapping[str, int]) -> LiveMatrix:
    name, shape = entry["name"], tuple(entry["shape"])
    if not isinstance(name, str) or not shape or not all(type(n) is int and 0 < n < _MAX_SIZE for n in shape):
        raise ValueError(f"live: {name!r:.80} of shape {list(shape)!r:.80}")
    if set(entry["places"]) != {BASE, STORED, *map(expert_key, domains)}:
        raise ValueError(f"live: the places of {name:.80} do not match the mixture's experts")
    matrix = LiveMatrix(
        name=name,
        shape=shape,
        places={key: FoldPlace(file=file, offset_bytes=offset) for key, (file, offset) in entry["places"].items()},
        norm_shares={domain: _share(share) for domain, share in entry.get("norm_shares", {}).items()},
    )
    if set(matrix.norm_shares) != (set(domains) if rule == "renorm" else set()):
        raise ValueError(f"live: expected one norm of {name:.80} for each expert")
    for place in matrix.places.values():
        _require_inside(matrix, place, file_bytes)
    return matrix


def _require_inside(matrix: LiveMatrix, place: FoldPlace, file_bytes: Mapping[str, int]) -> None:
    offset = place.offset_bytes
    if place.file not in (WEIGHTS_FILE, EXPERTS_FILE) or place.file not in file_bytes:
        raise ValueError(f"live: {matrix.name:.80} lies in {place.file!r:.80}")
    if type(offset) is not int or offset < 0 or offset % ITEM_BYTES:
        raise ValueError(f"live: {matrix.name:.80} begins at byte {offset!r:.80}")
    if offset + matrix.num_bytes > file_bytes[place.file]:
        raise ValueError(f"live: {matrix.name:.80} ends beyond the end of {place.file}")


def _share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"live: {value!r:.80} is not a share of a norm")
    return float(value)


def weights_of(domains: Mapping[str, float], alpha: Mapping[str, float], *, where: str) -> dict[str, float]:
    """Return `alpha` as one weight for each of the artifact's experts; experts that it does not name get 0.

    An unknown expert and a weight that is not finite are a `HavocError`.
    """
    unknown = sorted(set(alpha) - set(domains))
    if unknown:
        raise HavocError(f"{where}: no expert is called {unknown[0]}; it holds {', '.join(domains)}")
    if not all(math.isfinite(weight) for weight in alpha.values()) or not math.isfinite(sum(map(abs, alpha.values()))):
        raise HavocError(f"{where}: alpha holds a weight that is not finite")
    return {domain: float(alpha.get(domain, 0.0)) for domain in domains}


def refuse_alpha(alpha: Mapping[str, float] | None, model: str) -> None:
    """Refuse an alpha for a base, which has no experts to mix: a `HavocError`."""
    if alpha is not None:
        raise HavocError(f"--alpha mixes the experts of a live artifact, and {model} is a base: export it with --live")
