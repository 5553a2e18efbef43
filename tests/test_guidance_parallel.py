"""The passes of a step, shared among processes, give what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig

from diffusers_idlora.parallel import GuidanceParallel, check_parallelism, guidance_group
from diffusers_idlora.tiny import tiny_components


SCRIPT = Path(__file__).parent / "parallel_denoising.py"
STEPS = 3


@pytest.fixture(scope="module", params=[2, 3])
def reports(request, tmp_path_factory):
    """What each of several processes saw."""
    folder = tmp_path_factory.mktemp("processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*launcher, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("setting", ["sequential", "packed", "shared"])
def test_processes_together_give_what_one_gives_and_all_of_them_the_same(reports, setting):
    for report in reports:
        assert report["settings"][setting]["difference"] < 1e-5
        assert not report["settings"][setting]["differs_between_processes"]


@pytest.mark.parametrize(("setting", "num_forwards"), [("sequential", 5), ("shared", 4)])
def test_every_pass_runs_in_one_process_and_the_shares_are_even(reports, setting, num_forwards):
    counts = [report["settings"][setting]["forwards"] for report in reports]
    assert sum(counts) == STEPS * num_forwards
    assert max(counts) - min(counts) <= STEPS


def test_a_process_packs_its_own_share(reports):
    assert [report["settings"]["packed"]["forwards"] for report in reports] == [STEPS] * len(reports)


def test_what_each_process_drew_for_itself_becomes_the_first_one_s(reports):
    for report in reports:
        assert report["noise_differs"] and not report["shared_noise_differs"]


def test_processes_get_the_same_clip_of_two_stages_from_noise_of_their_own(reports):
    assert not any(report["two_stages_differ"] for report in reports)


def test_an_error_in_one_process_ends_the_step_in_all_of_them_and_the_next_step_runs(reports):
    # The perturbed pass is the fourth.
    owner = 3 % len(reports)
    for rank, report in enumerate(reports):
        expected = (
            "FloatingPointError: of this process" if rank == owner else "RuntimeError: Passes of guidance failed"
        )
        assert report["failure"].startswith(expected)
        assert rank == owner or f"process [{owner}]" in report["failure"]
        assert report["goes_on"]


def test_without_a_group_of_processes_it_is_an_error_that_says_how_to_start_them():
    with pytest.raises(ValueError, match="`torch.distributed` is not initialised; start them with `torchrun`"):
        GuidanceParallel()


@pytest.mark.parametrize("where", ["model", "processors"])
def test_context_parallelism_is_refused_and_guidance_parallelism_named(where):
    transformer = tiny_components("ltx-2.3")["transformer"]
    check_parallelism(transformer)
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    holder = transformer if where == "model" else transformer.transformer_blocks[0].attn1.processor
    holder._parallel_config = config
    for refuse in (check_parallelism, guidance_group):
        with pytest.raises(ValueError, match="context parallelism enabled .*ring_degree=2.* guidance parallelism"):
            refuse(transformer)
