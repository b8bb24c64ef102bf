"""One AR step on the device: its graphs and copies in the order they are enqueued.

Knows where everything lies (device_layout.py) and nothing of streams, captures or uploads (device_program.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from ...sampling.chains import modulation_parts
from ..blocks import ALIGNMENT, Block, padded
from .device_layout import DeviceLayout, StepLayout


class Program(Protocol):
    """What enqueues, and where the areas begin (device_program.py)."""

    layout: DeviceLayout

    def base_of(self, layout: StepLayout, name: str) -> tuple[Block, int]: ...

    def call(self, kind: str, sizes: Mapping[str, int], addresses: Mapping[str, int]) -> None: ...

    def copy_rows(
        self, destination: int, pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None: ...


class StepWork:
    """Enqueues one AR step."""

    def __init__(self, program: Program, layout: StepLayout) -> None:
        self._program, self._layout = program, layout
        self._batch = program.layout.batch
        self._rows = self._batch * layout.step.predicted
        self._guided = {"G": layout.step.branches}

    def address(self, name: str, index: int = 0) -> int:
        """Address of a block, or of one reverse step of it."""
        block, base = self._program.base_of(self._layout, name)
        return block.at(base, index)

    def _addresses(self, *names: str, **renamed: str) -> dict[str, int]:
        return {name: self.address(name) for name in names} | {k: self.address(v) for k, v in renamed.items()}

    def parts(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        """What queues each part, by the kind of its graph; one after the other they are the AR step."""
        return (("backbone", self._backbone), ("diffusion_step", self._head))

    def enqueue(self) -> None:
        """Queues everything."""
        for _, part in self.parts():
            part()

    def _channels(self) -> int:
        """Bytes of a token."""
        return self._program.layout.architecture.token_channels * 4

    def _backbone(self) -> None:
        step, channels = self._layout.step, self._channels()
        row, known = self._program.layout.architecture.tokens * channels, step.known * channels
        self._program.copy_rows(self.address("tokens"), known, self.address("latents"), row, known, self._batch)
        self._program.call(
            "backbone",
            {**self._guided, "B": self._batch, "V": step.known, "P": step.predicted, "R": step.context},
            self._addresses("tokens", "visible", "predict", "context", *self._program.layout.conditioning, "z"),
        )

    def _head(self) -> None:
        step, split, channels = self._layout.step, self._layout.split, self._channels()
        row, known, predicted = (
            n * channels for n in (self._program.layout.architecture.tokens, step.known, step.predicted)
        )
        if split.longer:
            x = self._two_chains()
        else:
            x = self._chain(self.address("x"), "z", self._rows, split.common, "", "noise")
        self._program.copy_rows(self.address("latents") + known, row, x, predicted, predicted, self._batch)

    def _chain(self, x: int, z: str, rows: int, steps: int, part: str, noise: str, merged: bool = False) -> int:
        """Reverse steps between two buffers; the address where the last one wrote."""
        buffers = [self.address(name) for name in ("x_even", "x_odd")]
        guidance, vectors = self.address("guidance"), self._layout.step.branches * rows
        timesteps, coefficients = f"timestep{part}", f"coefficients{part}"
        if merged:
            timesteps, coefficients = "part_timestep", "padded_coefficients"
        for number, (start, stop) in enumerate(modulation_parts(steps, vectors)):
            given = {"z": self.address(z), "row": self.address(f"row{part}")}
            given |= {"timestep": self.address(timesteps, number), "modulation": self.address("modulation")}
            self._program.call("modulation", {"Q": vectors, "T": vectors * (stop - start)}, given)
            modulation, pitch = self._aligned_modulation(vectors, stop - start)
            for index in range(start, stop):
                target = buffers[index % 2]
                given = {
                    "x": x,
                    "modulation": modulation + pitch * (index - start),
                    "coefficients": self.address(coefficients, index),
                    "guidance": guidance,
                    "noise": self.address(noise, index),
                    "x_next": target,
                }
                self._program.call("diffusion_step", {**self._guided, "N": rows}, given)
                x = target
        return x

    def _aligned_modulation(self, vectors: int, steps: int) -> tuple[int, int]:
        """Where each reverse step's modulation begins as engines want it, and the bytes from one to the next."""
        made, entry = self.address("modulation"), vectors * self._program.layout.architecture.modulation * 4
        if entry % ALIGNMENT == 0:
            return made, entry
        aligned = self.address("padded_modulation")
        self._program.copy_rows(aligned, padded(entry), made, entry, entry, steps)
        return aligned, padded(entry)

    def _two_chains(self) -> int:
        """Some rows have more reverse steps: they run alone first, then all together."""
        step, split = self._layout.step, self._layout.split
        longer = self._batch * split.longer
        if self._layout.scored:
            image = {"B": self._batch, "P": step.predicted}
            self._program.call("detail_score", image, self._addresses("z", "score", "norm"))
            key = "norm" if self._program.layout.plan.settings.fts == "norm" else "score"
            self._program.call(
                "select_rows",
                {**image, "K": split.longer},
                self._addresses("direction", "row_index", "ranks", "rows", key=key, positions="predict"),
            )
        self._program.call(
            "gather_rows",
            {**self._guided, "N": self._rows, "S": split.alone, "M": longer},
            self._addresses("z", "x", "rows", "z_rows", "x_rows", "noise_rows", noise="noise_alone"),
        )
        self._pad("padded_noise", "noise_rows", longer * self._entry("noise_rows"), split.alone)
        made = self._chain(self.address("x_rows"), "z_rows", longer, split.alone, "_alone", "padded_noise")
        given = ("x", "rows", "row_index", "slot_index")
        both = [f"{name}_{side}" for name in ("noise", "timestep", "coefficients") for side in ("short", "long")]
        self._program.call(
            "merge_rows",
            {"N": self._rows, "M": longer, "S": split.common},
            self._addresses(
                *given, *both, "x_merged", **{n: f"merged_{n}" for n in ("noise", "timestep", "coefficients")}
            )
            | {"x_rows": made},
        )
        for name in ("noise", "coefficients"):
            self._pad(f"padded_{name}", f"merged_{name}", self._rows * self._entry(f"merged_{name}"), split.common)
        self._timesteps_by_branch(split.common)
        return self._chain(self.address("x_merged"), "z", self._rows, split.common, "", "padded_noise", merged=True)

    def _timesteps_by_branch(self, steps: int) -> None:
        """The merged timesteps [S, N], each for every branch, as the modulation of some reverse steps takes them."""
        branches, width = self._layout.step.branches, self._rows * 8
        source = self.address("merged_timestep")
        for number, (start, stop) in enumerate(modulation_parts(steps, branches * self._rows)):
            for branch in range(branches):
                target = self.address("part_timestep", number) + branch * width
                self._program.copy_rows(target, branches * width, source + start * width, width, width, stop - start)

    def _entry(self, name: str) -> int:
        """Bytes of one row of one reverse step in a work block [S, N, ...]."""
        block = self._program.layout.work[name]
        return block.entry_bytes // block.shape[1]

    def _pad(self, destination: str, source: str, width: int, steps: int) -> None:
        """Dense reverse steps, ``width`` bytes each, to padded ones."""
        stride = self._program.layout.work[destination].stride
        assert stride is not None
        self._program.copy_rows(self.address(destination), stride, self.address(source), width, width, steps)
