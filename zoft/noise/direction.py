"""The direction ``u = s z`` of one probe, read from the noise table piece by piece."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from zoft.memory import to_device
from zoft.noise import fused
from zoft.noise.table import ROW, TABLE_SIZE, Layout, Where, chunk_length, layout, noise_table, row_length
from zoft.weights.blocks import Block
from zoft.weights.dtypes import work_dtype
from zoft.weights.perturbed import WeightSource


class Direction(WeightSource, Protocol):
    """The direction ``u`` of one probe, along which blocks are perturbed and updated, read piece by piece.

    `NoiseDirection` reads it from the noise table; methods derive others from it (`zoft.optim.core.derived`).
    """

    def idle(self, block: Block) -> bool:
        """Return whether ``u`` is zero on all of ``block``, which is then not perturbed."""
        ...

    def u(self, block: Block, where: Where) -> torch.Tensor:
        """Return ``u`` at ``where``, in float32 (float64 for float64 weights): a piece of one chunk, or rows."""
        ...

    def windows(self, block: Block, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor, float]]:
        """Yield ``(lo, hi, z, factor)`` that cover the flat range ``start:stop`` of ``block``: ``u = factor * z``."""
        ...


class NoiseDirection:
    """The direction ``u = s z`` with ``z`` from the noise table, as in MeZO and with a tuner.

    ``scales`` holds the normalised scale ``s`` of blocks by name; ``s = 1`` for other blocks. ``table_dtype`` is the
    dtype of most weights; pieces for blocks of another dtype are converted when they are read. ``blocks`` are those
    that will be read: the table positions of all of them are copied to a GPU at once.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        probe: int = 0,
        scales: Mapping[str, float] | None = None,
        table_dtype: torch.dtype = torch.float32,
        blocks: Sequence[Block] = (),
    ) -> None:
        self.seed, self.step, self.probe = seed, step, probe
        self.scales = scales or {}
        self.table_dtype = table_dtype
        self.blocks = blocks
        self._layouts: dict[str, Layout] = {}
        self._places: dict[tuple[torch.device, float], fused.Places] = {}

    def windows(self, block: Block, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor, float]]:
        """Yield ``(lo, hi, z, factor)`` that cover the flat range ``start:stop`` of ``block``; ``u = factor * z``.

        ``z`` is a read-only view of the table in ``table_dtype``, on the block's device: ``(rows, width)``, whole rows
        of one chunk or a part of one row.
        """
        scale = self.scales.get(block.name, 1.0)
        for lo, hi, z, sign in self.layout(block).windows(self.table(block), start, stop):
            yield lo, hi, z, scale * sign

    def pieces(self, block: Block, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor, float]]:
        """Yield ``(lo, hi, z, factor)`` as `windows` does, one per chunk, with a flat ``z``."""
        length = chunk_length(block)
        for chunk in range(start // length, -(-stop // length)):
            lo, hi = max(start, chunk * length), min(stop, (chunk + 1) * length)
            parts = list(self.windows(block, lo, hi))
            z = [part.reshape(-1) for _, _, part, _ in parts]
            yield lo, hi, z[0] if len(z) == 1 else torch.cat(z), parts[0][3]

    def perturb(self, block: Block, start: int, stop: int, eps: float, out: torch.Tensor) -> torch.Tensor:
        """Write ``theta + eps * u`` for the flat range ``start:stop`` into the flat ``out`` and return it.

        The sum is rounded once to the dtype of ``theta``; the stored weights are not changed.
        """
        theta = block.parameter.detach().view(-1)
        if fused.supports(theta):
            span, shape = (start, stop), (row_length(block), chunk_length(block))
            places = self.places(block, abs(eps))
            return fused.perturb(theta, out, self.table(block), places, block.name, span, shape, _side(eps))
        for lo, hi, z, factor in self.windows(block, start, stop):
            to = out[lo - start : hi - start].view(z.shape)
            torch.add(theta[lo:hi].view(z.shape), z.to(theta.dtype), alpha=eps * factor, out=to)
        return out

    def perturb_rows(self, block: Block, rows: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``theta + eps * u`` at ``rows`` (any shape, integer) of a 2-D block: ``(*rows.shape, width)``.

        They equal rows of `perturb` up to one rounding in half precision; only these rows are read.
        """
        theta = block.parameter.detach()
        width = block.shape[-1]
        if width > ROW:  # a row spans several chunks: read it as a flat range
            return long_rows(self, block, rows, eps)
        if fused.supports(theta):
            places, shape = self.places(block, abs(eps)), (width, chunk_length(block))
            return fused.perturb_rows(theta, rows, self.table(block), places, block.name, shape, _side(eps))
        z, factor = self.rows(block, rows.flatten())
        perturbed = torch.add(theta[rows.flatten()], z.to(theta.dtype), alpha=eps * factor)
        return perturbed.view(*rows.shape, width)

    def rows(self, block: Block, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return ``z`` at the flat ``rows`` of a 2-D block, ``(rows, width)``, and its factor: ``u = factor * z``."""
        layout, parameter = self.layout(block), block.parameter
        numbers = np.array([layout.offsets, layout.strides, layout.signs])
        offsets, strides, signs = to_device(torch.from_numpy(numbers), parameter.device)
        per_chunk = layout.length // layout.width
        chunk = rows // per_chunk
        place = offsets[chunk] + rows % per_chunk * strides[chunk]
        table = self.table(block)
        windows = table.as_strided((TABLE_SIZE - layout.width + 1, layout.width), (1, 1))
        z = windows[place].to(parameter.dtype) * signs[chunk, None].to(parameter.dtype)
        return z, self.scales.get(block.name, 1.0)

    def u(self, block: Block, where: Where) -> torch.Tensor:
        """Return ``u`` at ``where``, in float32 (float64 for float64 weights): a piece of one chunk, or rows."""
        if isinstance(where, slice):
            ((_, _, z, factor),) = self.pieces(block, where.start, where.stop)
        else:
            z, factor = self.rows(block, where)
        return z.to(work_dtype(block.parameter.dtype)) * factor

    def idle(self, block: Block) -> bool:
        """Return whether ``u`` is zero on all of ``block``, which is then not perturbed."""
        return self.scales.get(block.name) == 0.0

    def values(self, block: Block) -> torch.Tensor:
        """Return the whole ``u`` of ``block`` in float32; for tests and small blocks."""
        out = torch.empty(block.size, dtype=torch.float32, device=block.parameter.device)
        for lo, hi, z, factor in self.pieces(block, 0, block.size):
            torch.mul(z.float(), factor, out=out[lo:hi])
        return out.view(block.shape)

    def table(self, block: Block) -> torch.Tensor:
        """Return the noise table on the device of ``block``."""
        return noise_table(self.seed, self.table_dtype, block.parameter.device)

    def places(self, block: Block, eps: float) -> fused.Places:
        """Return the table positions of ``block`` on its device, copied at once with those of other blocks there."""
        key = block.parameter.device, eps
        if key not in self._places or block.name not in self._places[key].first:
            beside = [other for other in self.blocks if other.parameter.device == key[0] and other.name != block.name]
            rows, first = self.place_rows([*beside, block], eps)
            self._places[key] = fused.Places(to_device(torch.from_numpy(rows), key[0]), first)
        return self._places[key]

    def place_rows(self, blocks: Sequence[Block], eps: float) -> tuple[np.ndarray, dict[str, int]]:
        """Return the rows of `fused.Places` for ``blocks``, in host memory, and the first row of each block."""
        rows: list[tuple[int, int, float]] = []
        first = {}
        for block in blocks:
            first[block.name] = len(rows)
            rows += self.steps(block, eps)
        numbers = np.empty((len(rows), 3), dtype=np.int32)
        numbers[:, 0], numbers[:, 1], numbers[:, 2] = (
            [place for place, _, _ in rows],
            [stride for _, stride, _ in rows],
            np.array([step for _, _, step in rows], dtype=np.float32).view(np.int32),
        )
        return numbers, first

    def steps(self, block: Block, length: float) -> list[tuple[int, int, float]]:
        """Return place, stride and ``length * s * sign`` of every chunk of ``block``."""
        layout, scale = self.layout(block), self.scales.get(block.name, 1.0)
        chunks = zip(layout.offsets, layout.strides, layout.signs, strict=True)
        return [(offset, stride, length * (scale * sign)) for offset, stride, sign in chunks]

    def layout(self, block: Block) -> Layout:
        """Return the positions of the chunks of ``block`` in the table."""
        if block.name not in self._layouts:
            width = row_length(block)
            key = f"{self.seed}/{self.step}/{self.probe}/{block.name}"
            self._layouts[block.name] = layout(key, block, TABLE_SIZE, (width, width))
        return self._layouts[block.name]


def long_rows(source: WeightSource, block: Block, rows: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``rows`` of a perturbed matrix whose rows span several chunks, each read as a range."""
    width = block.shape[-1]
    ranges = [(int(row) * width, int(row) * width + width) for row in rows.flatten()]
    found = [source.perturb(block, *span, eps, block.parameter.new_empty(width)) for span in ranges]
    return torch.stack(found).view(*rows.shape, width)


def _side(eps: float) -> int:
    return -1 if eps < 0 else 1
