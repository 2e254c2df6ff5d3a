"""A score that other processes can import, the designs it prices, and the harm it does on request."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memsplit.dse.sweep import Grid

GRID = Grid({"bandwidth_TBps": np.linspace(1, 8, 9), "capacity_GB": np.linspace(10, 200, 11), "batch": range(1, 6)})
CHUNK = 50  # ten chunks, the last one smaller


@dataclass(frozen=True, slots=True)
class Machine:
    """A score that can be imported; row 260, the eleventh of chunk 5, may do harm: "" no harm, or what is done, ``times`` times."""

    harm: str = ""
    folder: str = ""
    times: int = 1

    def __call__(self, columns):
        held = 20.0 * columns["batch"]
        feasible = columns["capacity_GB"] >= held
        result = {
            "latency_s": np.where(feasible, held / columns["bandwidth_TBps"] / 3, np.nan),
            "price_USD": columns["capacity_GB"] * 10 + columns["bandwidth_TBps"] * 100,
            "feasible": feasible,
            "reason": np.where(feasible, "", "too large"),
        }
        if self.harm and (columns["bandwidth_TBps"][0], columns["capacity_GB"][0]) == HARMED:
            self._do_harm()
        return result

    def _do_harm(self):
        folder = Path(self.folder)
        done = len(list(folder.glob("harm*")))
        if done < self.times:
            kept = {path.name: path.stat().st_ino for path in sorted(folder.glob("checkpoint/rows*.npz"))}
            (folder / f"harm{done}").write_text(json.dumps(kept))
            if self.harm == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.harm == "kill the server":  # which has started this process
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)
            raise RuntimeError("no such machine")


def start_of(chunk: int) -> tuple[float, float]:
    columns = GRID.columns(chunk * CHUNK, chunk * CHUNK + 1)
    return float(columns["bandwidth_TBps"][0]), float(columns["capacity_GB"][0])


HARMED = start_of(5)
