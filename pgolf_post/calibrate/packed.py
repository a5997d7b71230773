"""Symmetric matrices on disk: the upper triangle, row by row, in float32: half the bytes, and exactly symmetric.

Reading is lazy: a file of statistics is memory-mapped, and each access to a matrix unpacks a fresh one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError

BLOCK = 128  # rows that are mirrored at a time: by blocks a transposed copy stays in the cache


def pack_upper(matrix: Tensor, dtype: type = np.float32) -> Tensor:  # (n, n) → (n(n+1)/2,)
    """Return the upper triangle of a matrix, row by row; entries below the diagonal are not read."""
    rows = matrix.numpy(force=True)
    return torch.from_numpy(np.concatenate([row[i:] for i, row in enumerate(rows)], dtype=dtype, casting="same_kind"))


def unpack_upper(packed: Tensor) -> Tensor:  # (n(n+1)/2,) → (n, n) float64
    """Return the symmetric matrix of a packed triangle: the inverse of `pack_upper`, up to rounding to float32."""
    n = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
    values, matrix, start = packed.numpy(), np.empty((n, n)), 0
    for i in range(n):
        matrix[i, i:] = values[start : start + n - i]
        start += n - i
    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        rows, columns = np.tril_indices(high - low, -1)
        matrix[high:, low:high] = matrix[low:high, high:].T
        matrix[low + rows, low + columns] = matrix[low + columns, low + rows]
    return torch.from_numpy(matrix)


def mirror_upper(matrix: Tensor) -> Tensor:  # (n, n) → (n, n), fresh
    """Return the symmetric matrix of an upper triangle; entries below the diagonal are not read."""
    upper = torch.triu(matrix, 1)
    return upper + upper.mT + torch.diag(matrix.diagonal())


class LazyTensors(Mapping[str, Tensor]):
    """The tensors `kind.NAME` of a safetensors file by NAME, read and decoded, fresh and on the CPU, on each access.

    Raises NotFoundError or DamagedFileError when the file is first touched, MismatchError for a name it lacks.
    """

    def __init__(self, path: Path, kind: str, decode: Callable[[Tensor], Tensor]) -> None:
        self.path, self.kind, self.decode = path, kind, decode

    @cached_property
    def _file(self) -> Any:
        if not self.path.is_file():
            raise NotFoundError(f"no such file: {self.path}", hint="pgolf-post calibrate")
        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(f"{self.path} is damaged: {error}", hint="pgolf-post calibrate --fresh") from None

    @cached_property
    def _names(self) -> list[str]:
        prefix = f"{self.kind}."
        return [key.removeprefix(prefix) for key in self._file.keys() if key.startswith(prefix)]  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self.decode(self._file.get_tensor(f"{self.kind}.{name}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def named(mapping: Mapping[str, Tensor], name: str, what: str) -> Tensor:
    """Return mapping[name]. Raises MismatchError that lists the names there are."""
    if name not in mapping:
        raise MismatchError(f"no {what} for {name!r}; calibrated: {', '.join(sorted(mapping)) or 'none'}")
    return mapping[name]
