"""Train on canned rollouts in a process of its own: `python run_canned.py SETTINGS.json`. It can kill itself."""

import json
import os
import signal
import sys
from pathlib import Path

from canned import canned_config, train_canned
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.trainer import GRPOExtTrainer


class Kill(TrainerCallback):
    """End this process as a machine that fails does: at once, and without a word."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(settings):
    options = {"peft_config": LoraConfig(r=2, init_lora_weights=False)} if settings.get("lora") else {}
    classes = (GRPOTrainer, GRPOConfig) if settings.get("trainer") == "trl" else (GRPOExtTrainer, GRPOExtConfig)
    run = train_canned(
        classes[0],
        canned_config(settings["output_dir"], classes[1], **settings["options"]),
        settings["policy"],
        resume=settings.get("resume"),
        callbacks=[Kill(settings["kill_at"])] if "kill_at" in settings else [],
        **options,
    )
    accelerator = run.trainer.accelerator
    if accelerator.is_main_process:
        folder = Path(settings["output_dir"])
        save_file(run.weights, folder / "final.safetensors")
        ran_on = {
            "processes": accelerator.num_processes,
            "wrapper": type(run.trainer.model_wrapped).__name__,
            "packs": getattr(run.trainer, "packs", False),
        }
        (folder / "ran_on.json").write_text(json.dumps(ran_on))
    accelerator.wait_for_everyone()  # a rank that is gone early can leave the other one waiting
    run.trainer.end()
    os._exit(0)  # see the end of the recipe: deallocating a process group can deadlock


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
