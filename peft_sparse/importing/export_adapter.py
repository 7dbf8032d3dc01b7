"""Sparse adapters, made into files of other libraries, and into stock adapters of PEFT, on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.adapter_files import read_adapter
from ..checks import check_one_of
from ..errors import ConfigError
from ..files import check_apart, check_output
from .composable_sft import DIFF_FILE, write_composable_sft
from .extra_tensors import refuse_extra_tensors
from .foreign import COMPOSABLE_SFT
from .stock_peft import STOCK, StockAdapter, write_stock_adapter


@dataclass(frozen=True)
class Exported:
    """What `export_adapter` wrote.

    Attributes:
        output: the directory.
        file: the weights in it.
        num_weights: how many weights it changes.
        heads: parameters that are in it whole.
        padding: weights with a difference of zero that the format made necessary beside those.
        error: distance of the written difference from the adapter's, as a share of its Euclidean norm; 0 where it is
            the same.
    """

    output: str
    file: str
    num_weights: int
    heads: tuple[str, ...]
    padding: int = 0
    error: float = 0.0


def export_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str = COMPOSABLE_SFT,
    base: str | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a sparse adapter in the format of another library, or as one that PEFT loads without this package.

    Args:
        adapter: the sparse adapter: folder, or id of the Hub ("owner/name[/folder][@revision]").
        output: directory to write into.
        to: what to write.

            - "composable-sft": `pytorch_diff.bin`, which composable-sft and BiStil read. `import_adapter` makes the
              same adapter of it again, but for what its config says of how it was trained.
            - "shira", "supertuning": PEFT's own sparse types, for adapters of linear weights alone. The differences
              are the adapter's; both have rules for how many there are in a layer, met by differences of zero. In
              float32 the model computes the same to the bit. On a bfloat16 base PEFT's Super-Tuning rounds the
              differences before it adds them, where the sparse adapter rounds their sum.
            - "lora": the nearest matrices of rank `rank` in place of the differences. A sparse difference is of full
              rank: look at the error.
        base: for the stock types, folder or Hub id of the base model, of which only config.json is read; by default
            what the adapter says.
        rank: of LoRA.
        overwrite: replace what is in `output`.

    Raises:
        ConfigError: there is no such adapter, `to` is not known, the output is taken, the base has no config, or the
            adapter holds what the format has no place for, which is named.
        FormatError: the adapter is damaged, no sparse one, or not of that base.
    """
    check_one_of("to", to, FORMATS)
    if to == COMPOSABLE_SFT and (base, rank) != (None, None):
        raise ConfigError(f"base and rank are for {', '.join(STOCK)}: {COMPOSABLE_SFT} needs neither.")
    files = read_adapter(adapter)
    check_apart(output, adapter=adapter, base_model=base)
    check_output(output, overwrite=overwrite)
    if to == COMPOSABLE_SFT:
        refuse_extra_tensors(files, DIFF_FILE)
        written = StockAdapter(write_composable_sft(Path(output), files.deltas, files.others))
    else:
        written = write_stock_adapter(files, Path(output), kind=to, base=base, rank=rank, overwrite=overwrite)
    count = sum(delta.count for delta in files.deltas.values())
    return Exported(
        os.fspath(output), os.fspath(written.path), count, tuple(files.others), written.padding, written.error
    )


FORMATS = (COMPOSABLE_SFT, *STOCK)
