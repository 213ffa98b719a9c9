"""Train with TRL's trainer and with ours, as one of several processes: `python on_ranks.py SETTINGS.json`.

Each process leaves in `rank-N.json` what it ran on and how far the two were apart.
"""

import json
import sys
from pathlib import Path

from canned import relative_difference
from training import OURS, THEIRS, share_one_engine, train
from vllm_on_cpu import send_through_store

from trl_grpo_ext.ranks import run_as_rank


def main(settings) -> None:
    folder, options = Path(settings["output_dir"]), settings["options"]
    if options["vllm_mode"] == "server":
        send_through_store()
    else:
        share_one_engine()
    theirs = train(THEIRS, settings["policy"], folder, **options)
    ours = train(OURS, settings["policy"], folder, shared_prefix="on", **options)
    accelerator = ours.trainer.accelerator
    found = {
        "processes": accelerator.num_processes,
        "wrapper": type(ours.trainer.model_wrapped).__name__,
        "grad_norms": {"ours": ours.exact_grad_norms, "theirs": theirs.exact_grad_norms},
        "mean_lengths": {
            name: run.metric("completions/mean_length") for name, run in (("ours", ours), ("theirs", theirs))
        },
        "logp_differences": ours.metric("sampling/sampling_logp_difference/max"),
        "weights": {name: weight.double().sum().item() for name, weight in ours.weights.items()},
        "relative_difference": relative_difference(ours.weights, theirs.weights, ours.start),
    }
    (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()  # a rank that is gone early can leave the other one waiting


if __name__ == "__main__":
    run_as_rank(main, json.loads(Path(sys.argv[1]).read_text()))
