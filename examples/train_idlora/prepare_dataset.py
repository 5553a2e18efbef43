#!/usr/bin/env python
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["diffusers-idlora"]
# ///
r"""
Prepares a folder of talking clips for training an ID-LoRA: pairs of a clip and a recording of the speaker's voice,
encoded once by the base model's text encoder and VAEs.

    python prepare_dataset.py \
      --pretrained_model_name_or_path diffusers/LTX-2.3-Diffusers \
      --instance_data_root clips \
      --output_dir prepared

`clips` has a `metadata.jsonl` (or `.csv`, `.parquet`) with the columns `file_name`, `caption` (or `visual`, `speech`,
`sounds`) and `speaker_id` or `reference_file_name`. Start it with `accelerate launch` to use several GPUs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from diffusers_idlora.training.clips import Bucket
from diffusers_idlora.training.manifest import Columns
from diffusers_idlora.training.prepare import DTYPES, PreparationOptions, prepare_dataset, report_table


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `input_args` stands in for it."""
    parser = argparse.ArgumentParser(description="Prepare a data set for training an ID-LoRA.")
    defaults = {field.name: field.default for field in fields(PreparationOptions)}

    model = parser.add_argument_group("base model")
    model.add_argument("--pretrained_model_name_or_path", required=True, help="A folder or a model on the Hub.")
    model.add_argument("--revision", help="Revision of the model on the Hub.")
    model.add_argument("--variant", help="Variant of the model's files, such as fp16.")
    model.add_argument("--dtype", choices=sorted(DTYPES), default=defaults["dtype"], help="Of models and samples.")
    model.add_argument("--max_sequence_length", type=int, default=defaults["max_sequence_length"])
    model.add_argument(
        "--negative_prompt",
        default=defaults["negative_prompt"],
        help="Stored once, for the text guidance of validation videos; diffusers' own for LTX-2 if left out.",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--instance_data_root", help="A local folder with metadata.jsonl, .csv or .parquet.")
    data.add_argument("--dataset_name", help="A data set of that kind on the Hub.")
    data.add_argument("--video_column", default=Columns.video)
    data.add_argument("--caption_column", default=Columns.caption)
    data.add_argument("--speaker_id_column", default=Columns.speaker_id)
    data.add_argument("--reference_column", default=Columns.reference)
    data.add_argument("--limit", type=int, help="Prepare only so many samples, for a trial.")

    pairs = parser.add_argument_group("pairs")
    pairs.add_argument("--pairs_per_clip", type=int, default=defaults["pairs_per_clip"])
    pairs.add_argument(
        "--allow_same_clip", action="store_true", help="Pair a speaker's only clip with a later part of itself."
    )
    pairs.add_argument("--validation_speakers", type=int, default=defaults["validation_speakers"])
    pairs.add_argument("--seed", type=int, default=defaults["seed"])

    media = parser.add_argument_group("video and sound")
    media.add_argument(
        "--resolution_buckets", nargs="+", default=["512x512x121"], help="WIDTHxHEIGHTxFRAMES, one or several."
    )
    media.add_argument("--fps", type=float, default=defaults["fps"], help="Frames per second of the samples.")
    media.add_argument(
        "--reference_seconds",
        type=float,
        default=defaults["reference_seconds"],
        help="Longer references are cut to their loudest part of this length.",
    )
    media.add_argument("--denoise_command", help='Run on each reference, for example "denoise {in} {out}".')

    parser.add_argument("--output_dir", type=Path, required=True, help="Where the samples go.")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> int:
    """Prepares the data set and returns the exit code."""
    values = vars(args)
    column_names = {field.name: values.pop(f"{field.name}_column") for field in fields(Columns)}
    is_main_process = os.environ.get("RANK", "0") == "0"
    try:
        buckets = tuple(Bucket.parse(text) for text in values.pop("resolution_buckets"))
        options = PreparationOptions(**values, columns=Columns(**column_names), resolution_buckets=buckets)
        report = prepare_dataset(options)
    except (ValueError, OSError) as error:
        if is_main_process:
            Console(stderr=True, soft_wrap=True).print(f"prepare_dataset.py: error: {error}", markup=False)
        return 2
    if is_main_process:
        Console().print(report_table(report))
    return 0 if report["pairs"] else 1


if __name__ == "__main__":
    sys.exit(main(parse_args()))
