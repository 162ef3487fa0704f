"""The trained matrices of a live artifact for any alpha: one expert as stored, a mixture as one weighted sum.

    W' = sum_r c_r W_r    over the folds W_r that the artifact holds: the base, and each expert alone

    delta    c = (1 - sum(alpha), alpha)
    literal  c = (0, alpha)
    renorm   c = (0, alpha / sum_k alpha_k share_k)    share_k: the k-th expert's sum of singular values over the base's

If one coefficient is 1 and the others are 0, the graph gets the mapped file itself, so a switch copies nothing. Any
other mixture reads each fold with a weight once and writes one: it costs memory bandwidth. No torch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from ...cores import num_usable_cores
from ...errors import HavocError
from .live_table import BASE, ITEM_BYTES, STORED, expert_key, weights_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from .live_table import FoldPlace, LiveMatrix, LiveTable

_PIECE_VALUES = 1 << 15
"""A sum is computed in pieces, so that a piece's result and one product fit into a core's own cache."""
_SMALLEST_SHARE = 1e-6

Piece = tuple[list[tuple[float, "NDArray[np.float32]"]], "NDArray[np.float32]"]


class LiveWeights:
    """The folds of one live artifact, mapped, and memory for mixtures; `alpha` is the mixture of `values`."""

    def __init__(
        self,
        directory: Path,
        table: LiveTable,
        *,
        alpha: Mapping[str, float],
        rule: str,
        device: str = "cpu",
        num_threads: int | None = None,
        num_kept: int = 1,
    ) -> None:
        """Map the files; nothing is read yet. `alpha` and `rule` are the manifest's: the mixture in the weight file.

        `device` is where the session needs its weights. `num_threads` None: one thread for each core. The last
        `num_kept` sums are kept; each is as large as one fold of all trained matrices.
        """
        if num_kept < 1:
            raise HavocError(f"{num_kept} mixtures cannot be kept: give at least 1")
        self._directory, self._table, self._rule = directory, table, rule
        self._stored_alpha = dict(alpha)
        self._device = device
        self._num_threads = num_threads or num_usable_cores()
        files = {place.file for matrix in table.matrices for place in matrix.places.values()}
        self._files = {file: _mapped_file(directory / file) for file in sorted(files)}
        self._num_kept = num_kept
        self._sums: dict[tuple[float, ...], dict[str, NDArray[np.float32]]] = {}
        self.alpha: dict[str, float] = {}
        self.arrays: dict[str, NDArray[np.float32]] = {}
        self.values: dict[str, ort.OrtValue] = {}
        self.version = 0
        self.switch(self._stored_alpha)

    def switch(self, alpha: Mapping[str, float]) -> None:
        """Set `values`, by initializer, to the weights of `alpha`; experts that it does not name get the weight 0.

        `arrays` are the same values on the host, fp32, as the graph reads them. Values of earlier calls become invalid:
        a new sum overwrites the oldest. An unknown expert, a weight that is not finite, and (renorm) weights that
        cannot be normalised are a `HavocError`; then nothing changes.
        """
        weights = weights_of(self._stored_alpha, alpha, where=str(self._directory))
        if self.values and weights == self.alpha:
            return
        rows = {matrix.name: self._rows(matrix, weights) for matrix in self._table.matrices}
        self.alpha = {}  # until the switch is complete: an interrupted switch is done again
        sums = self._summed(tuple(weights.values()), {name: found for name, found in rows.items() if not _lone(found)})
        self.arrays = {
            matrix.name: self._array(rows[matrix.name], matrix, sums).reshape(matrix.shape)
            for matrix in self._table.matrices
        }
        self.values = {
            name: ort.OrtValue.ortvalue_from_numpy(array, self._device, 0) for name, array in self.arrays.items()
        }
        self.alpha = weights
        self.version += 1

    def _rows(self, matrix: LiveMatrix, weights: Mapping[str, float]) -> dict[FoldPlace, float]:
        """The coefficient of every fold that counts, by its place in a file: equal folds share one place."""
        if weights == self._stored_alpha:
            return {matrix.places[STORED]: 1.0}
        scale, base = 1.0, 0.0
        if self._rule == "delta":
            base = 1.0 - sum(weights.values())
        elif self._rule == "renorm":
            share = sum(weight * matrix.norm_shares[domain] for domain, weight in weights.items())
            if abs(share) <= _SMALLEST_SHARE:
                raise HavocError(
                    f"{matrix.name}: alpha leaves {share:.3g} of the base's singular values; renorm needs more"
                )
            scale = 1.0 / share
        rows: dict[FoldPlace, float] = {matrix.places[BASE]: base}
        for domain, weight in weights.items():
            place = matrix.places[expert_key(domain)]
            rows[place] = rows.get(place, 0.0) + scale * weight
        return {place: coefficient for place, coefficient in rows.items() if coefficient}

    def _array(
        self, rows: Mapping[FoldPlace, float], matrix: LiveMatrix, sums: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """The matrix that the graph gets: the fold itself, or the sum."""
        lone = _lone(rows)
        return sums[matrix.name] if lone is None else self._mapped(lone, matrix)

    def _summed(
        self, key: tuple[float, ...], rows: Mapping[str, Mapping[FoldPlace, float]]
    ) -> dict[str, NDArray[np.float32]]:
        """The sum of each matrix that needs one: a kept sum, or a new one that overwrites the oldest."""
        if not rows:
            return {}
        sums = self._sums.pop(key, None)
        if sums is None:
            is_full = len(self._sums) >= self._num_kept
            room = self._sums.pop(next(iter(self._sums))) if is_full else {}
            sizes = {matrix.name: matrix.num_bytes // ITEM_BYTES for matrix in self._table.matrices}
            sums = {name: room[name] if name in room else np.empty(sizes[name], np.float32) for name in rows}
            self._sum(rows, sums)
        self._sums[key] = sums
        return sums

    def _mapped(self, place: FoldPlace, matrix: LiveMatrix) -> NDArray[np.float32]:
        whole = self._files[place.file]
        return whole[place.offset_bytes : place.offset_bytes + matrix.num_bytes].view(np.float32)

    def _sum(self, rows: Mapping[str, Mapping[FoldPlace, float]], sums: Mapping[str, NDArray[np.float32]]) -> None:
        matrices = {matrix.name: matrix for matrix in self._table.matrices}
        pieces: list[Piece] = []
        for name, places in rows.items():
            terms = [(weight, self._mapped(place, matrices[name])) for place, weight in places.items()]
            for start in range(0, len(sums[name]), _PIECE_VALUES):
                part = slice(start, start + _PIECE_VALUES)
                pieces.append(([(weight, values[part]) for weight, values in terms], sums[name][part]))
        shares = [pieces[first :: self._num_threads] for first in range(min(self._num_threads, len(pieces)))]
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(_weighted_sums, shares))


def _mapped_file(path: Path) -> NDArray[np.uint8]:
    try:
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise HavocError(f"{path}: cannot be mapped ({error})") from error


def _lone(rows: Mapping[FoldPlace, float]) -> FoldPlace | None:
    """The fold itself if it is the only one and its coefficient is 1."""
    if len(rows) != 1:
        return None
    ((place, coefficient),) = rows.items()
    return place if coefficient == 1 else None


def _weighted_sums(pieces: list[Piece]) -> None:
    product = np.empty(_PIECE_VALUES, np.float32)
    for terms, result in pieces:
        if not terms:  # the rule literal, and all weights 0
            result[:] = 0
        for index, (weight, values) in enumerate(terms):
            into = product[: len(values)] if index else result
            np.multiply(values, np.float32(weight), out=into)
            if index:
                np.add(result, into, out=result)
